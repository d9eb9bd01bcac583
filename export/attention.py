"""Lowering of cached attention: to ONNX's own operators (``portable``), or to ONNX Runtime's (``ort``)."""

from __future__ import annotations

import operator
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
from torch import fx
from torch.onnx.ops import _dtype_mappings, _symbolic_impl

from offramp.program import ops
from offramp.program.graph import aten, expression, shape

Target = Literal["ort", "portable"]
TARGETS = ("ort", "portable")
_KINDS = {dtype: kind for kind, dtype in _dtype_mappings.ONNX_DTYPE_TO_TORCH_DTYPE.items()}


def lower_attention(graph: fx.Graph, target: Target) -> None:
    """Replace the operators of ``offramp.program.ops`` in a closed graph.

    ``ort`` takes GroupQueryAttention, whose time follows the length that is filled; it needs keys and values of
    equal features. What does not fit it, and all for ``portable``, becomes TensorScatter and Attention of opset 24,
    whose time follows the capacity. Both write the caches in place where input and output share memory.
    """
    builder = _Builder(graph)
    for node in list(graph.nodes):
        if node.target is ops.ATTENTION:
            with graph.inserting_before(node):
                fits = target == "ort" and expression(shape(node.args[1])[-1]) == expression(shape(node.args[2])[-1])
                made = _grouped(builder, *node.args) if fits else _standard(builder, *node.args)
            for user in list(node.users):
                user.replace_all_uses_with(made[user.args[1]])
                graph.erase_node(user)
            graph.erase_node(node)
        elif node.target is ops.APPEND:
            with graph.inserting_before(node):
                whole = _scattered(builder, *node.args)
            node.replace_all_uses_with(whole)
            graph.erase_node(node)
    _merge_equal(graph)


class _Builder:
    """Writes nodes with their shapes into a graph."""

    def __init__(self, graph: fx.Graph) -> None:
        self.graph = graph

    def call(self, target: Any, *args: Any, **kwargs: Any) -> fx.Node:
        node = self.graph.call_function(target, args, kwargs)
        values = fx.node.map_arg((args, kwargs), lambda arg: arg.meta["val"])
        mode = next(v for a in self.graph.nodes if isinstance(v := a.meta.get("val"), torch.Tensor)).fake_mode  # type: ignore[attr-defined]
        with mode, torch.no_grad():
            node.meta["val"] = target(*values[0], **values[1])
        return node

    def size(self, node: fx.Node, axis: int) -> Any:
        found = expression(shape(node)[axis])
        return found if isinstance(found, int) else self.call(aten.sym_size.int, node, axis)

    def sizes(self, node: fx.Node) -> list[Any]:
        return [self.size(node, axis) for axis in range(len(shape(node)))]

    def onnx(
        self,
        name: str,
        inputs: Sequence[fx.Node | None],
        attributes: Mapping[str, Any],
        outputs: Sequence[Sequence[Any]],
        like: fx.Node | None = None,
        domain: str = "",
        version: int | None = None,
    ) -> list[fx.Node]:
        """A call of an ONNX operator with outputs of the given sizes, float32 or of the dtype of ``like``."""
        kind = _KINDS[like.meta["val"].dtype if like else torch.float32]
        encoded = _symbolic_impl.EncodedAttrs.from_dict(dict(attributes))
        # missing inputs at the end are left out
        given = list(inputs)
        while given and given[-1] is None:
            given.pop()
        called = self.call(
            torch.ops.onnx_symbolic._symbolic_multi_out.default,
            given,
            name,
            [kind] * len(outputs),
            shapes=[list(sizes) for sizes in outputs],
            attr_keys=encoded.attr_keys,
            attr_types=encoded.attr_types,
            attr_pos=encoded.attr_pos,
            attr_ints=encoded.attr_ints,
            attr_floats=encoded.attr_floats,
            attr_strs=encoded.attr_strs,
            metadata_props_keys=[],
            metadata_props_values=[],
            domain=domain,
            version=version,
        )
        return [self.call(operator.getitem, called, i) for i in range(len(outputs))]


def _grouped(
    b: _Builder,
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
    rows, heads, chunk, features = b.sizes(query)

    def flat(node: fx.Node) -> fx.Node:
        turned = b.call(aten.transpose.int, node, 1, 2)
        return b.call(aten.reshape.default, turned, [rows, chunk, int(shape(node)[1]) * int(shape(node)[3])])

    ends = b.call(aten.add.Tensor, lengths, chunk)
    last = b.call(aten._to_copy.default, b.call(aten.sub.Tensor, ends, 1), dtype=torch.int32)
    longest = b.call(aten.amax.default, ends, [0])
    total = b.call(aten._to_copy.default, longest, dtype=torch.int32)
    added = None
    if bias is not None:
        added = _as_float(b, bias)
        added = _first(b, added, longest)  # the operator takes as many keys as the longest row has
    attributes: dict[str, Any] = {"num_heads": heads, "kv_num_heads": int(shape(key)[1]), "scale": float(scale)}
    if window:
        attributes["local_window_size"] = window
    made = b.onnx(
        "GroupQueryAttention",
        [flat(query), flat(key), flat(value), key_cache, value_cache, last, total, None, None, None, added],
        attributes,
        [[rows, chunk, heads * features], b.sizes(key_cache), b.sizes(value_cache)],
        domain="com.microsoft",
        version=1,
    )
    apart = b.call(aten.reshape.default, made[0], [rows, chunk, heads, features])
    return [b.call(aten.transpose.int, apart, 1, 2), made[1], made[2]]


def _first(b: _Builder, table: fx.Node, count: fx.Node) -> fx.Node:
    """The first ``count`` (an int64 tensor) places of the last axis."""
    sizes = b.sizes(table)
    start, axis = (b.call(aten.full.default, [1], number, dtype=torch.int64) for number in (0, len(sizes) - 1))
    end = b.call(aten.reshape.default, count, [1])
    return b.onnx("Slice", [table, start, end, axis], {}, [sizes])[0]


def _standard(
    b: _Builder,
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
    """TensorScatter, then Attention with a mask of what each token sees."""
    keys = _scattered(b, key_cache, key, lengths, 2)
    values = _scattered(b, value_cache, value, lengths, 2)
    rows, heads, chunk, _ = b.sizes(query)
    capacity = b.size(key_cache, 2)
    steps = b.call(aten.arange.default, chunk)
    here = b.call(aten.add.Tensor, b.call(aten.unsqueeze.default, lengths, 1), steps)
    here = b.call(aten.reshape.default, here, [rows, 1, chunk, 1])
    there = b.call(aten.arange.default, capacity)
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


def _scattered(b: _Builder, cache: fx.Node, new: fx.Node, lengths: fx.Node, axis: int) -> fx.Node:
    """TensorScatter; of a cache with several places of each row on axis 0, each gets the row's length."""
    rows, places = b.size(lengths, 0), b.size(cache, 0)
    if expression(shape(cache)[0]) != expression(shape(lengths)[0]):
        wide = b.call(aten.unsqueeze.default, lengths, 1)
        each = b.call(operator.floordiv, places, rows)
        lengths = b.call(aten.reshape.default, b.call(aten.expand.default, wide, [rows, each]), [-1])
    return b.onnx("TensorScatter", [cache, new, lengths], {"axis": axis}, [b.sizes(cache)], like=cache)[0]


def _as_float(b: _Builder, bias: fx.Node) -> fx.Node:
    if bias.meta["val"].dtype != torch.bool:
        return bias
    zero = b.call(aten.zeros_like.default, bias, dtype=torch.float32)
    return b.call(aten.where.ScalarOther, bias, zero, float(torch.finfo(torch.float32).min))


def _merge_equal(graph: fx.Graph) -> None:
    """Blocks of one segment share what they compute from lengths."""
    seen: dict[Any, fx.Node] = {}
    for node in list(graph.nodes):
        if node.op != "call_function" or not isinstance(node.target, torch._ops.OpOverload):
            continue
        if node.target.namespace == "onnx_symbolic":
            continue
        key = (node.target, repr(node.args), repr(sorted(node.kwargs.items())))
        first = seen.setdefault(key, node)
        if first is not node:
            node.replace_all_uses_with(first)
            graph.erase_node(node)
