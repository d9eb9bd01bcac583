"""One value, one node: nodes that compute the same from the same are merged."""

from __future__ import annotations

import operator
from collections.abc import Callable, Hashable
from typing import Any

import torch
from torch import fx


def merge_equal(graph: fx.Graph, key: Callable[[fx.Node], Hashable | None]) -> int:
    """Merge every node into the first one of equal ``key``, where that is not None; returns how many went."""
    first: dict[Hashable, fx.Node] = {}
    gone = 0
    for node in list(graph.nodes):
        found = key(node)
        if found is not None and first.setdefault(found, node) is not node:
            node.replace_all_uses_with(first[found])
            graph.erase_node(node)
            gone += 1
    return gone


def call_key(node: fx.Node) -> Hashable | None:
    """Equal for calls of one function with equal arguments; None for what is no call, or not pure."""
    if node.op != "call_function" or not _pure(node.target):
        return None
    return (node.target, _frozen(node.args), _frozen(node.kwargs))


def _pure(target: Any) -> bool:
    if isinstance(target, torch._ops.OpOverload):
        return torch.Tag.nondeterministic_seeded not in target.tags and not target._schema.is_mutable
    return getattr(target, "__module__", "") == operator.add.__module__


def _frozen(value: Any) -> Hashable:
    if isinstance(value, (list, tuple)):
        return (type(value).__name__, *map(_frozen, value))
    if isinstance(value, dict):
        return tuple((key, _frozen(item)) for key, item in sorted(value.items()))
    if isinstance(value, slice):
        return ("slice", _frozen(value.start), _frozen(value.stop), _frozen(value.step))
    return (type(value).__name__, value)
