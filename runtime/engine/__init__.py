"""The engine: segments as ONNX Runtime sessions, tensors between them, and the loop that rows leave early."""
