"""Fused attention over rows, heads, tokens and features: the axes that its ONNX operator and caches expect."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from torch import fx

from offramp.program.graph import add_call, aten, expression, shape, sizes_of

_ATTENTION = aten.scaled_dot_product_attention.default


def four_axes(graph: fx.Graph) -> int:
    """Give every fused attention operands of four axes; returns how many were rewritten.

    Over [rows, tokens, features], ``attention(q, k, v)`` is ``attention(q[:, None], k[:, None], v[:, None])[:, 0]``.
    Two axes get two more; of five and more, all between the first and the tokens count as heads. Leading axes that
    torch broadcasts are expanded. Masks follow. Grouped queries (``enable_gqa``) stay as they are.
    """
    return sum(_rewrite(graph, node) for node in graph.find_nodes(op="call_function", target=_ATTENTION))


def _rewrite(graph: fx.Graph, node: fx.Node) -> bool:
    args: list[Any] = [*node.args, *[None] * (4 - len(node.args))]
    operands, mask = args[:3], node.kwargs.get("attn_mask", args[3])
    layout = _Layout(graph, node, [*operands, mask] if mask is not None else operands)
    fits = all(len(shape(operand)) == 4 and layout.spans(operand) for operand in operands)
    if node.kwargs.get("enable_gqa") or (fits and (mask is None or len(shape(mask)) > 1)):
        return False
    users, own = list(node.users), node.meta["val"]
    with graph.inserting_before(node):
        operands = [layout.folded(layout.spread(operand)) for operand in operands]
        mask = None if mask is None else layout.folded_mask(mask)
    node.args = (*operands, mask, *args[4:])
    node.kwargs = {name: value for name, value in node.kwargs.items() if name != "attn_mask"}
    with own.fake_mode:
        node.meta["val"] = own.new_empty([*shape(operands[0])[:-1], shape(operands[2])[-1]])
    with graph.inserting_before(node.next):
        made = layout.unfolded(node, own)
    for user in users:
        user.replace_input_with(node, made)
    return True


class _Layout:
    """The axes before tokens and features of one attention: of four axes they are rows and heads."""

    def __init__(self, graph: fx.Graph, attention: fx.Node, tensors: Sequence[fx.Node]) -> None:
        self.graph, self._mode = graph, attention.meta["val"].fake_mode
        self.meta = {key: value for key, value in attention.meta.items() if key != "kept_dropout"}
        self.rank = max(len(shape(node)) - 2 for node in tensors)
        self.holders: list[tuple[fx.Node, int]] = []
        for axis in range(self.rank, 0, -1):  # before the last two
            having = [(node, len(shape(node)) - 2 - axis) for node in tensors if len(shape(node)) - 2 >= axis]
            self.holders.append(next(((n, at) for n, at in having if expression(shape(n)[at]) != 1), having[0]))

    def spans(self, node: fx.Node) -> bool:
        """Whether the tensor has all of them, in their full size."""
        mine = sizes_of(node)[:-2]
        return mine == [expression(shape(holder)[at]) for holder, at in self.holders]

    def spread(self, node: fx.Node) -> fx.Node:
        """The tensor with all of them."""
        for _ in range(self.rank + 2 - len(shape(node))):
            node = self._call(aten.unsqueeze.default, node, 0)
        return (
            node
            if self.spans(node)
            else self._call(aten.expand.default, node, [*map(self._size, *zip(*self.holders, strict=True)), -1, -1])
        )

    def folded(self, node: fx.Node) -> fx.Node:
        """A tensor that has ``rank`` of them as one of four axes."""
        for _ in range(2 - self.rank):
            node = self._call(aten.unsqueeze.default, node, min(self.rank, 1))
        if self.rank <= 2:
            return node
        heads = sizes_of(node)[1:-2]
        between = math.prod(heads) if all(isinstance(size, int) for size in heads) else -1
        ends = [self._size(node, axis) for axis in (0, self.rank, self.rank + 1)]
        return self._call(aten.reshape.default, node, [ends[0], between, *ends[1:]])

    def folded_mask(self, mask: fx.Node) -> fx.Node:
        """A mask that broadcasts over them, where it did."""
        if len(shape(mask)) == 1:
            return self._call(aten.unsqueeze.default, mask, 0)
        if len(shape(mask)) == 2:
            return mask
        if self.rank > 2:
            return self.folded(self.spread(mask))
        for _ in range(self.rank + 2 - len(shape(mask))):
            mask = self._call(aten.unsqueeze.default, mask, 0)
        return self.folded(mask)

    def unfolded(self, node: fx.Node, own: Any) -> fx.Node:
        """What the model's attention gives (``own``), of what the one over four axes gives."""
        if self.rank > 2:
            sizes = [*map(self._size, *zip(*self.holders, strict=True)), *(self._size(node, axis) for axis in (2, 3))]
            return self._call(aten.reshape.default, node, sizes)
        for _ in range(2 - self.rank):
            node = self._call(aten.squeeze.dim, node, min(self.rank, 1))
        node.meta = {**node.meta, "val": own}
        return node

    def _size(self, node: fx.Node, axis: int) -> Any:
        """A size, read from a tensor where it is not fixed."""
        size = shape(node)[axis]
        return expression(size) if isinstance(expression(size), int) else self._call(aten.sym_size.int, node, axis)

    def _call(self, target: Any, *args: Any) -> fx.Node:
        node = add_call(self._mode, self.graph, target, *args)
        node.meta = {**self.meta, "val": node.meta["val"]}
        return node
