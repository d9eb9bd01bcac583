"""Lowerings of operators of torch and of libraries that torch's exporter has no translation for."""

from __future__ import annotations

import operator
from functools import reduce
from typing import Any

import onnx
from onnxscript import opset23
from torch import fx

from offramp.export.lowering.node_builder import Builder
from offramp.export.lowering.table import lowering, onnx_functions
from offramp.program.graph import aten


@lowering(aten.sym_stride.int)
def _stride(b: Builder, tensor: fx.Node, axis: int) -> Any:
    """Torch may name a size of a (contiguous) input by the stride that equals it."""
    return reduce(lambda size, other: b.call(operator.mul, size, other), b.sizes(tensor)[axis + 1 :])


def _grouped_product(rows: Any, weights: Any, ends: Any) -> Any:
    """Experts' products, ``[n, in] x [experts, in, out] -> [n, out]``: rows lie expert by expert, up to its end."""
    ends = opset23.Cast(ends, to=onnx.TensorProto.INT64)
    start = opset23.Constant(value_ints=[0])
    axis = opset23.Constant(value_ints=[0])
    made = []
    for expert in range(weights.shape[0]):
        here: Any = opset23.Constant(value_ints=[expert])
        end = opset23.Gather(ends, here)
        weight: Any = opset23.Gather(weights, opset23.Constant(value_int=expert))  # type: ignore[type-var]
        made.append(opset23.MatMul(opset23.Slice(rows, start, end, axis), weight))
        start = end
    return opset23.Concat(*made, axis=0)


onnx_functions["transformers::grouped_mm_fallback"] = _grouped_product
