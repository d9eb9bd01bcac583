"""What one would do without a chain: one ONNX file, quantized by ONNX Runtime's own tools as its documentation says."""

from __future__ import annotations

import logging
import tempfile
from collections.abc import Mapping
from pathlib import Path

import onnx
import torch
from onnxruntime.quantization import QuantType, quantize_dynamic
from onnxruntime.quantization.shape_inference import quant_pre_process


def exported(module: torch.nn.Module, example: Mapping[str, torch.Tensor], path: Path) -> Path:
    """The module as ``torch.onnx.export`` writes it, every axis of its inputs free but features."""
    path.parent.mkdir(parents=True, exist_ok=True)
    free = {name: dict.fromkeys(range(value.ndim), torch.export.Dim.DYNAMIC) for name, value in example.items()}
    torch.onnx.export(
        module, kwargs=dict(example), f=path, dynamo=True, dynamic_shapes=free, external_data=False, verbose=False
    )
    return path


def quantized(source: Path, target: Path) -> Path:
    """A file through ``quant_pre_process`` and ``quantize_dynamic``: int8, a scale for each column of a weight."""
    target.parent.mkdir(parents=True, exist_ok=True)
    logging.disable(logging.WARNING)
    with tempfile.TemporaryDirectory() as folder:
        whole, ready = Path(folder) / "whole.onnx", Path(folder) / "ready.onnx"
        onnx.save(onnx.load(source), whole)  # in one file: quant_pre_process loses the other one
        quant_pre_process(whole, ready, skip_symbolic_shape=True)
        quantize_dynamic(
            ready,
            target,
            op_types_to_quantize=["MatMul", "Gemm", "Gather"],  # it takes ONNX's Attention for ONNX Runtime's own
            weight_type=QuantType.QInt8,
            per_channel=True,
            extra_options={"DefaultTensorType": onnx.TensorProto.FLOAT},
        )
    logging.disable(logging.NOTSET)
    return target
