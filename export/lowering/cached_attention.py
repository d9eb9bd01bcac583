"""Lowering of cached attention: to ONNX's own operators (``portable``), or to ONNX Runtime's (``ort``)."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import Any

import torch
from torch import fx

from offramp.export.lowering.last_axis import part
from offramp.export.lowering.layouts import heads_beside
from offramp.export.lowering.node_builder import Builder
from offramp.export.lowering.rotary import ROTARY
from offramp.export.lowering.table import lowering
from offramp.program import ops
from offramp.program.graph import ancestors, aten, expression, shape


@lowering(ops.ATTENTION)
def _attention(
    b: Builder,
    query: fx.Node,
    key: fx.Node,
    value: fx.Node,
    key_cache: fx.Node,
    value_cache: fx.Node,
    lengths: fx.Node,
    bias: fx.Node | None,
    scale: float,
    window: int,
    causal: bool = True,
) -> list[fx.Node]:
    """GroupQueryAttention, whose time follows the length that is filled.

    It is causal, and needs keys and values of equal features. What does not fit it, and all for ``portable``, becomes
    TensorScatter and Attention of opset 24, whose time follows the capacity. Both write the caches in place where input
    and output share memory.
    """
    given = (query, key, value, key_cache, value_cache, lengths, bias, scale, window)
    grouped = b.target == "ort" and causal and _fits(key, value)
    made = _grouped(b, *given) if grouped else _standard(b, *given, causal)
    if bias is not None and any(arg.target is ops.APPEND for arg in ancestors([bias])):
        made[0] = b.call(aten.where.ScalarOther, _seen(b, query, key_cache, lengths, bias, causal), made[0], 0.0)
    return made


def _seen(b: Builder, query: fx.Node, key_cache: fx.Node, lengths: fx.Node, bias: fx.Node, causal: bool) -> fx.Node:
    """Which queries see any key, bool [rows, 1 or heads, chunk, 1]; others get 0."""
    rows, _, chunk, _ = b.sizes(query)
    visible = bias
    if bias.meta["val"].dtype != torch.bool:
        visible = b.call(aten.ge.Scalar, bias, float(torch.finfo(torch.float32).min))
    there, here = _places(b, lengths, rows, chunk, b.size(key_cache, 2), causal)
    both = b.call(aten.logical_and.default, visible, b.call(aten.le.Tensor, there, here))
    count = b.call(aten.amax.default, b.call(aten._to_copy.default, both, dtype=torch.float32), [-1], True)
    return b.call(aten.gt.Scalar, count, 0.5)


def _places(
    b: Builder, lengths: fx.Node, rows: Any, chunk: Any, capacity: Any, causal: bool
) -> tuple[fx.Node, fx.Node]:
    """Places of keys, [capacity], and the last that queries may see, [rows, 1, chunk or 1, 1]: theirs, or the last."""
    if not causal:
        last = b.call(aten.sub.Tensor, b.call(aten.add.Tensor, lengths, chunk), 1)
        return b.call(aten.arange.default, capacity), b.call(aten.reshape.default, last, [rows, 1, 1, 1])
    steps = b.call(aten.arange.default, chunk)
    here = b.call(aten.add.Tensor, b.call(aten.unsqueeze.default, lengths, 1), steps)
    return b.call(aten.arange.default, capacity), b.call(aten.reshape.default, here, [rows, 1, chunk, 1])


def _grouped(
    b: Builder,
    query: fx.Node,
    key: fx.Node,
    value: fx.Node,
    key_cache: fx.Node,
    value_cache: fx.Node,
    lengths: fx.Node,
    bias: fx.Node | None,
    scale: float,
    window: int,
) -> list[fx.Node]:
    """com.microsoft.GroupQueryAttention, with heads beside features: ``[rows, chunk, heads * features]``."""
    cos: Any = None
    sin: Any = None
    rotates = _rotates(query, key, lengths)
    if rotates:
        query, cos, sin, _ = query.args  # type: ignore[assignment]
        key = key.args[0]  # type: ignore[assignment]
    rows, heads, chunk, features = b.sizes(query)
    attributes: dict[str, Any] = {"num_heads": heads, "kv_num_heads": int(shape(key)[1]), "scale": float(scale)}
    if rotates:
        attributes["do_rotary"] = 1
    given: list[fx.Node | None] = [heads_beside(b, node) for node in (query, key, value)]
    whole = _packed(given)
    if whole is not None:
        given = [whole, None, None]
    ends = b.call(aten.add.Tensor, lengths, chunk)
    last = b.call(aten._to_copy.default, b.call(aten.sub.Tensor, ends, 1), dtype=torch.int32)
    longest = b.call(aten.amax.default, ends, [0])
    total = b.call(aten._to_copy.default, longest, dtype=torch.int32)
    added = None
    if bias is not None:
        added = _as_float(b, bias)
        added = _first(b, added, longest)  # the operator takes as many keys as the longest row has
    if window:
        attributes["local_window_size"] = window
    made = b.onnx(
        "GroupQueryAttention",
        [*given, key_cache, value_cache, last, total, cos, sin, None, added],
        attributes,
        [[rows, chunk, heads * features], b.sizes(key_cache), b.sizes(value_cache)],
        domain="com.microsoft",
        version=1,
    )
    apart = b.call(aten.reshape.default, made[0], [rows, chunk, heads, features])
    return [b.call(aten.transpose.int, apart, 1, 2), made[1], made[2]]


def _fits(key: fx.Node, value: fx.Node) -> bool:
    """Whether GroupQueryAttention takes heads of these features."""
    features = expression(shape(key)[-1])
    return bool(features == expression(shape(value)[-1]) and features % 8 == 0)


def _rotates(query: fx.Node, key: fx.Node, lengths: fx.Node) -> bool:
    """Whether GroupQueryAttention can rotate queries and keys itself."""
    if query.target is not ROTARY or key.target is not ROTARY or query.args[1:] != key.args[1:]:
        return False
    if query.args[3] is not lengths:
        return False
    half = expression(shape(query.args[1])[-1])  # type: ignore[arg-type]
    return bool(expression(shape(query)[-1]) % 16 == 0 and half % 8 == 0)


def _packed(given: Sequence[Any]) -> fx.Node | None:
    """What queries, keys and values are the parts of, in this order and with nothing else."""
    parts = [part(node) for node in given]
    if any(found is None or found[0] is not parts[0][0] for found in parts):  # type: ignore[index]
        return None
    whole, at = parts[0][0], 0  # type: ignore[index]
    for _, start, stop in parts:  # type: ignore[misc]
        if start != at:
            return None
        at = stop
    return whole if at == expression(shape(whole)[-1]) else None


@lowering(ROTARY)
def _rotated(b: Builder, x: fx.Node, cos: fx.Node, sin: fx.Node, lengths: fx.Node) -> fx.Node:
    """RotaryEmbedding, which takes positions."""
    last = b.call(operator.sub, b.size(cos, 0), 1)
    steps = b.call(aten.arange.default, b.size(x, 2))
    places = b.call(aten.add.Tensor, b.call(aten.unsqueeze.default, lengths, 1), steps)
    # places behind a shorter row's tokens may lie past the end: what they hold is not read
    places = b.call(aten.minimum.default, places, b.call(aten.scalar_tensor.default, last, dtype=torch.int64))
    turned = 2 * int(shape(cos)[-1])
    attributes = {} if turned == expression(shape(x)[-1]) else {"rotary_embedding_dim": turned}
    return b.onnx("RotaryEmbedding", [x, cos, sin, places], attributes, [b.sizes(x)])[0]


def _first(b: Builder, table: fx.Node, count: fx.Node) -> fx.Node:
    """The first ``count`` (an int64 tensor) places of the last axis."""
    sizes = b.sizes(table)
    start, axis = (b.call(aten.full.default, [1], number, dtype=torch.int64) for number in (0, len(sizes) - 1))
    end = b.call(aten.reshape.default, count, [1])
    return b.onnx("Slice", [table, start, end, axis], {}, [sizes])[0]


def _standard(
    b: Builder,
    query: fx.Node,
    key: fx.Node,
    value: fx.Node,
    key_cache: fx.Node,
    value_cache: fx.Node,
    lengths: fx.Node,
    bias: fx.Node | None,
    scale: float,
    window: int,
    causal: bool,
) -> list[fx.Node]:
    """TensorScatter, then Attention with a mask of what each token sees."""
    keys = _scattered(b, key_cache, key, lengths, 2)
    values = _scattered(b, value_cache, value, lengths, 2)
    rows, heads, chunk, _ = b.sizes(query)
    there, here = _places(b, lengths, rows, chunk, b.size(key_cache, 2), causal)
    visible = b.call(aten.le.Tensor, there, here)
    if window:
        near = b.call(aten.gt.Tensor, there, b.call(aten.sub.Tensor, here, window))
        visible = b.call(aten.logical_and.default, visible, near)
    mask = visible
    if bias is not None:
        mask = b.call(aten.where.ScalarOther, visible, _as_float(b, bias), float(torch.finfo(torch.float32).min))
    features = int(shape(value)[-1])
    made = b.onnx(
        "Attention",
        [query, keys, values, mask],
        {"scale": float(scale)},
        [[rows, heads, chunk, features]],
    )
    return [made[0], keys, values]


@lowering(ops.APPEND)
def _scattered(b: Builder, cache: fx.Node, new: fx.Node, lengths: fx.Node, axis: int) -> fx.Node:
    """TensorScatter; of a cache with several places of each row on axis 0, each gets the row's length."""
    rows, places = b.size(lengths, 0), b.size(cache, 0)
    if expression(shape(cache)[0]) != expression(shape(lengths)[0]):
        wide = b.call(aten.unsqueeze.default, lengths, 1)
        each = b.call(operator.floordiv, places, rows)
        lengths = b.call(aten.reshape.default, b.call(aten.expand.default, wide, [rows, each]), [-1])
    return b.onnx("TensorScatter", [cache, new, lengths], {"axis": axis}, [b.sizes(cache)], like=cache)[0]


def _as_float(b: Builder, bias: fx.Node) -> fx.Node:
    if bias.meta["val"].dtype != torch.bool:
        return bias
    zero = b.call(aten.zeros_like.default, bias, dtype=torch.float32)
    return b.call(aten.where.ScalarOther, bias, zero, float(torch.finfo(torch.float32).min))
