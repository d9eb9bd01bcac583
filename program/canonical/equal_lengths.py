"""Axes of inputs that have one length: a mask of tokens and the tokens, say, where no operator says so itself."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import sympy
import torch
from torch import fx

from offramp.program.graph import ancestors, aten, data_inputs, expression, is_tensor, shape

_INDEXING = (aten.index.Tensor, aten.index_put.default)


def equal_lengths(graph: fx.Graph) -> bool:
    """Make two axes one where a tensor is indexed place by place; returns whether any were.

    Sizes that torch takes for any two become one symbol: an index that counts the tokens of one input reads as many of
    another, and so does a mask that selects among them.
    """
    pairs = [pair for node in graph.nodes if node.target in _INDEXING for pair in _indexed(node)]
    return sum(_join(*pair) for pair in pairs) > 0


def _indexed(node: fx.Node) -> Iterator[tuple[Any, Any]]:
    tensor, indices = node.args[:2]
    axis = 0
    for index in indices:  # type: ignore[union-attr]
        if not isinstance(index, fx.Node) or not is_tensor(index):
            axis += 1
            continue
        sizes = shape(index)
        if index.meta["val"].dtype == torch.bool:
            yield from zip(sizes, shape(tensor)[axis : axis + len(sizes)], strict=False)  # type: ignore[arg-type]
            axis += len(sizes)
            continue
        if _counts(index) and len(wide := [size for size in sizes if expression(size) != 1]) == 1:
            yield wide[0], shape(tensor)[axis]  # type: ignore[arg-type]
        axis += 1


def _counts(index: fx.Node) -> bool:
    """Whether an index is 0, 1, 2, ... in some shape."""
    calls: Sequence[fx.Node] = [node for node in ancestors([index]) if node.op == "call_function" and is_tensor(node)]
    starts = [node for node in calls if not data_inputs(node)]
    views = (aten.unsqueeze.default, aten.reshape.default, aten.expand.default)
    return (
        len(starts) == 1
        and starts[0].target is aten.arange.default
        and all(n.target in views for n in calls if n not in starts)
    )


def _join(one: Any, other: Any) -> bool:
    """Tell torch that two free sizes are equal, if they are so in the example."""
    found = expression(one), expression(other)
    if found[0] == found[1] or not all(isinstance(size, sympy.Symbol) for size in found):
        return False
    return bool(one == other)  # a guard: from now on both are one symbol
