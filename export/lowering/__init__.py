"""Lowering: a piece of a program becomes an ONNX model."""
