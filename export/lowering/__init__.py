"""Lowering: a subgraph of a program becomes an ONNX model."""
