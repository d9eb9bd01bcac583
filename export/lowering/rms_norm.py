"""Norms by the root of the mean square: one operator each."""

# onnxscript's rule leaves as many nodes (100 of 112, a tiny decoder), but misses x * x and takes any factor as weight
from __future__ import annotations

import itertools
from typing import Any

from torch import fx

from offramp.program.graph import aten, expression, shape, sizes_of


def fuse_norms(graph: fx.Graph) -> None:
    """Rewrite the norms of a graph.

    ``x * rsqrt(mean(x ** 2, -1) + epsilon) * weight``  becomes  ``rms_norm(x, weight, epsilon)``
    """
    for node in list(graph.find_nodes(op="call_function", target=aten.mul.Tensor)):
        for weight, scaled in itertools.permutations(node.args):
            found = _scaled(scaled)
            if found is None or not isinstance(weight, fx.Node):
                continue
            x, epsilon = found
            size = [expression(shape(x)[-1])]
            if not isinstance(size[0], int) or sizes_of(weight) != size:
                continue
            with graph.inserting_before(node):
                made = graph.call_function(aten.rms_norm.default, (x, size, weight, epsilon))
            made.meta = dict(node.meta)
            node.replace_all_uses_with(made)
            break
    graph.eliminate_dead_code()


def _scaled(node: Any) -> tuple[fx.Node, float] | None:
    """``x`` and ``epsilon`` of ``x * rsqrt(mean(x ** 2, -1) + epsilon)``."""
    factors = _called(node, aten.mul.Tensor, 2)
    for x, root in itertools.permutations(factors) if factors else ():
        added = _called(root, aten.rsqrt.default, 1)
        mean, epsilon = _called(added and added[0], aten.add.Tensor, 2) or (None, None)
        squares, axes, kept = _called(mean, aten.mean.dim, 3) or (None, None, None)
        if kept is not True or not isinstance(epsilon, float) or axes not in ([-1], [len(shape(x)) - 1]):
            continue
        if _called(squares, aten.pow.Tensor_Scalar, 2) == (x, 2) or _called(squares, aten.mul.Tensor, 2) == (x, x):
            return x, epsilon
    return None


def _called(node: Any, target: Any, count: int) -> tuple[Any, ...] | None:
    """The arguments of a call of ``target`` with so many, and no other ones."""
    if not isinstance(node, fx.Node) or node.target is not target or node.kwargs or len(node.args) != count:
        return None
    return tuple(node.args)
