"""Program to bundle: partition, lowering, ONNX, quantization, manifest."""
