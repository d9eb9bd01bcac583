"""Lowerings of operators of torch and of libraries that torch's exporter has no translation for."""

from __future__ import annotations

import operator
from typing import Any

import onnx
import sympy
import torch
from onnxscript import opset23
from torch import fx

from offramp.export.lowering.node_builder import Builder
from offramp.export.lowering.table import lowering, onnx_functions
from offramp.program.graph import aten, expression, shape
from offramp.program.ops import FILL_PLACES, PUT_TOKENS, TAKE_TOKENS


@lowering(aten.sym_stride.int)
def _stride(b: Builder, tensor: fx.Node, axis: int) -> Any:
    """Torch may name a size of a (contiguous) input by the stride that equals it."""
    return b.product(*b.sizes(tensor)[axis + 1 :])


@lowering(operator.floordiv)
def _whole_parts(b: Builder, one: Any, other: Any) -> fx.Node:
    """Of sizes: ONNX divides towards zero, which is no floor below it, ``-(-length // 2)`` say."""
    assert b.origin is not None
    value = b.origin.meta["val"]
    if _may_be_negative(one) or _may_be_negative(other):
        one = b.call(operator.sub, one, b.call(operator.mod, one, other))
    made = b.call(operator.floordiv, one, other)
    made.meta["val"] = value
    return made


def _may_be_negative(value: Any) -> bool:
    size = value.meta["val"] if isinstance(value, fx.Node) else value
    if isinstance(size, torch.SymInt):
        return bool(size.node.shape_env.bound_sympy(size.node.expr).lower < 0)
    return isinstance(size, int) and size < 0


@lowering(aten.__and__.Tensor)
def _and(b: Builder, one: fx.Node, other: fx.Node) -> fx.Node:
    """What Python's ``&`` is called; unlike the operator itself it is decomposed, by tracing all that is around it."""
    return b.call(aten.bitwise_and.Tensor, one, other)


@lowering(aten.__or__.Tensor)
def _or(b: Builder, one: fx.Node, other: fx.Node) -> fx.Node:
    """``|``, likewise."""
    return b.call(aten.bitwise_or.Tensor, one, other)


@lowering(FILL_PLACES)
def _filled(b: Builder, tokens: fx.Node, places: fx.Node, rows: fx.Node, kept: fx.Node | None = None) -> fx.Node:
    """As in torch: where a row has another number of places, a row is gathered that is not there, which is an error."""
    batch, count, features = b.sizes(rows)
    at = b.call(aten.cumsum.default, b.call(aten._to_copy.default, places, dtype=torch.int64), 1)
    found = b.call(aten.slice.Tensor, at, 1, -1, 2**63 - 1)
    there = wanted = b.call(aten.scalar_tensor.default, count, dtype=torch.int64)
    if kept is not None:
        listed = b.call(aten.scalar_tensor.default, b.size(kept, 1), dtype=torch.int64)
        counted = b.call(aten._to_copy.default, kept, dtype=torch.int64)
        wanted = b.call(aten.sum.dim_IntList, counted, [1], True)
    wrong = b.call(aten.ne.Tensor, found, wanted)
    if kept is not None and expression(shape(kept)[1]) != expression(shape(rows)[1]):
        wrong = b.call(aten.logical_or.default, wrong, b.call(aten.ne.Tensor, listed, there))
    total = b.product(batch, count)
    beyond = b.call(aten.mul.Tensor, b.call(aten._to_copy.default, wrong, dtype=torch.int64), total)
    none = b.call(aten.zeros_like.default, at)
    at = b.call(aten.where.self, places, b.call(aten.sub.Tensor, at, 1), none)
    if kept is not None:
        at = b.call(aten.minimum.default, at, b.call(aten.sub.Tensor, listed, 1))
        at = b.call(aten.gather.default, _those_first(b, counted), 1, at)
    first = b.call(aten.mul.Tensor, b.call(aten.arange.default, batch), count)
    at = b.call(aten.add.Tensor, at, b.call(aten.add.Tensor, beyond, b.call(aten.unsqueeze.default, first, 1)))
    flat = b.call(aten.reshape.default, rows, [-1, features])
    taken = b.call(aten.index_select.default, flat, 0, b.call(aten.reshape.default, at, [-1]))
    taken = b.call(aten.reshape.default, taken, b.sizes(tokens))
    return b.call(aten.where.self, b.call(aten.unsqueeze.default, places, -1), taken, tokens)


def _those_first(b: Builder, marked: fx.Node) -> fx.Node:
    """Of each row the places that are marked (with 1) in their order, the others behind them; int64 as ``marked``."""
    count = b.size(marked, 1)
    order = b.call(aten.arange.default, count)
    ranks = b.call(aten.sub.Tensor, b.call(aten.mul.Tensor, marked, count), order)
    total = b.onnx("Shape", [order], {}, [[1]], like=order)[0]
    sizes = b.sizes(marked)
    return b.onnx("TopK", [ranks, total], {"axis": 1}, [sizes, sizes], like=marked)[1]


@lowering(TAKE_TOKENS)
def _taken(b: Builder, tokens: fx.Node, places: fx.Node, axis: int) -> fx.Node:
    """Whole rows of features are gathered, so that it takes what a copy does."""
    batch, count = b.sizes(places)
    if expression(shape(tokens)[0]) == 1:
        flat = b.call(aten.reshape.default, places, [-1])
        made = b.call(aten.index_select.default, b.call(aten.squeeze.dim, tokens, 0), axis - 1, flat)
        sizes = b.sizes(tokens)
        made = b.call(aten.reshape.default, made, [*sizes[1:axis], batch, count, *sizes[axis + 1 :]])
        return _moved(b, made, axis - 1, 0)
    inner = _moved(b, tokens, axis, 1)
    sizes = [b.size(inner, 0), count, *b.sizes(inner)[2:]]
    (made,) = b.onnx("GatherND", [inner, _rows(b, places, inner)], {"batch_dims": 1}, [sizes], like=inner)
    return _moved(b, made, 1, axis)


@lowering(PUT_TOKENS)
def _put(b: Builder, tokens: fx.Node, places: fx.Node, taken: fx.Node, axis: int) -> fx.Node:
    """Whole rows of features are written into a copy."""
    tokens, taken = (_moved(b, node, axis, 1) for node in (tokens, taken))
    at = _rows(b, places, tokens)
    rows = b.call(aten.reshape.default, b.call(aten.arange.default, b.size(tokens, 0)), [-1, 1, 1])
    where = b.call(aten.cat.default, [b.call(aten.expand.default, rows, b.sizes(at)), at], -1)
    (made,) = b.onnx("ScatterND", [tokens, where, taken], {}, [b.sizes(tokens)], like=tokens)
    return _moved(b, made, 1, axis)


def _moved(b: Builder, node: fx.Node, source: int, target: int) -> fx.Node:
    """The tensor with one axis at another place."""
    order = [axis for axis in range(len(shape(node))) if axis != source]
    order.insert(target, source)
    return node if source == target else b.call(aten.permute.default, node, order)


def _rows(b: Builder, places: fx.Node, like: fx.Node) -> fx.Node:
    """Places ``[rows, taken, 1]``, of as many rows as there are tensors of tokens."""
    at = b.call(aten.unsqueeze.default, places, -1)
    heads = sympy.simplify(sympy.sympify(expression(shape(like)[0])) / sympy.sympify(expression(shape(places)[0])))
    return at if heads == 1 else b.call(aten.repeat_interleave.self_int, at, int(heads), 0)


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
