"""Operators that only say in other words what others do are written as those: analyses need to know one form."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import sympy
import torch
from torch import fx

from offramp.program.canonical.equal_nodes import call_key
from offramp.program.graph import add_call, aten, expression, fake_mode, is_weight, shape, sizes_of, symbols
from offramp.program.ops import FILL_PLACES

_Call = Callable[..., fx.Node]
_Form = Callable[[fx.Node, _Call], tuple[Any, tuple[Any, ...]] | None]


def in_other_words(graph: fx.Graph) -> int:
    """``einsum`` with weights becomes a product, ``glu`` one of halves, a scatter by mask rows in places.

    Returns how many did.
    """
    return sum(_rewrite(graph, node, _FORMS[node.target]) for node in list(graph.nodes) if node.target in _FORMS)


def _rewrite(graph: fx.Graph, node: fx.Node, form: _Form) -> bool:
    mode = fake_mode(graph)

    def call(target: Any, *args: Any) -> fx.Node:
        made = add_call(mode, graph, target, *args)
        made.meta = {**node.meta, "val": made.meta["val"]}
        return made

    with graph.inserting_before(node):
        found = form(node, call)
    if found is None:
        return False
    node.target, node.args = found
    node.kwargs = {}
    return True


def _product(node: fx.Node, call: _Call) -> tuple[Any, tuple[Any, ...]] | None:
    """``einsum("bti,io->bto", x, w)`` is ``x @ w``, and ``einsum("bti,oi->bto", x, w)`` is ``linear(x, w)``."""
    equation, operands = str(node.args[0]).replace(" ", ""), list[Any](node.args[1])  # type: ignore[arg-type]
    terms, _, made = equation.partition("->")
    first, _, second = terms.partition(",")
    if len(operands) != 2 or not is_weight(operands[1]) or len(second) != 2 or not second.isalpha():
        return None
    over, rest = first[-1:], first[:-1]
    new = second.replace(over, "", 1)
    if len(new) != 1 or new in first or made != rest + new or len({*rest, over}) != len(first.replace("...", ".")):
        return None
    return (aten.matmul.default if second[0] == over else aten.linear.default), (operands[0], operands[1])


def _halves(node: fx.Node, call: _Call) -> tuple[Any, tuple[Any, ...]] | None:
    """``glu(x)`` is the first half of ``x`` times the sigmoid of the second."""
    args: list[Any] = list(node.args)
    axis = (args[1] if len(args) > 1 else -1) % len(shape(args[0]))
    size = expression(shape(args[0])[axis])
    if not isinstance(size, int):
        return None
    first = call(aten.slice.Tensor, args[0], axis, 0, size // 2)
    second = call(aten.slice.Tensor, args[0], axis, size // 2, size)
    return aten.mul.Tensor, (first, call(aten.sigmoid.default, second))


def _scattered(node: fx.Node, call: _Call) -> tuple[Any, tuple[Any, ...]] | None:
    """``masked_scatter(tokens, mask, features)``: features, as many for every row, fill the places that are masked."""
    args: list[Any] = list(node.args)
    return _filling(args[0], args[1], args[2], call)


def _put(node: fx.Node, call: _Call) -> tuple[Any, tuple[Any, ...]] | None:
    """``tokens[mask] = features`` is the same; ``tokens[mask] += features`` adds features in their places to tokens."""
    args: list[Any] = list(node.args)
    if len(args[1]) != 1 or not isinstance(args[1][0], fx.Node) or any(args[3:]):
        return None
    tokens, (mask,), values = args[:3]
    if not _listed(values):
        return None
    if values.target is not aten.add.Tensor or values.kwargs:
        return _filling(tokens, mask, values, call)
    old, new = values.args if _taken(values.args[0], tokens, mask) else values.args[::-1]
    added = _taken(old, tokens, mask) and _listed(new)
    if not added or (found := _filling(tokens, mask, new, call)) is None:
        return _filling(tokens, mask, values, call)
    target, (_, *rest) = found
    return aten.add.Tensor, (tokens, call(target, call(aten.zeros_like.default, tokens), *rest))


def _taken(node: Any, tokens: fx.Node, mask: fx.Node) -> bool:
    """Whether it is ``tokens[mask]``, with a mask of its own that is made alike perhaps."""
    if not isinstance(node, fx.Node) or node.target is not aten.index.Tensor or node.args[0] is not tokens:
        return False
    own = node.args[1][0] if len(node.args[1]) == 1 else None  # type: ignore[arg-type, index]
    return own is mask or (isinstance(own, fx.Node) and call_key(own) == call_key(mask) is not None)


def _listed(values: Any) -> bool:
    """Whether it is features one by one; a number, or one row of features, is put in all places."""
    return isinstance(values, fx.Node) and len(shape(values)) > 1 and expression(shape(values)[-2]) != 1


def _filling(tokens: Any, mask: Any, values: Any, call: _Call) -> tuple[Any, tuple[Any, ...]] | None:
    while mask.target in (aten.unsqueeze.default, aten.expand.default) and len(shape(mask)) > 2:
        mask = mask.args[0]
    sizes = sizes_of(tokens)
    if len(sizes) != 3 or sizes_of(mask) != sizes[:2]:
        return None
    if mask.meta["val"].dtype != torch.bool or sizes_of(values)[-1:] != sizes[2:]:
        return None
    if kept := _kept(values, sizes[0]):
        return FILL_PLACES, (tokens, mask, *kept)
    places = math.prod(sizes_of(values)[:-1])
    count = sympy.simplify(places / sympy.sympify(sizes[0]))
    if not count.is_integer or symbols(shape(tokens)[0]) & count.free_symbols:  # not as many in each row
        return None
    if len(shape(values)) != 3 or expression(shape(values)[0]) != sizes[0]:
        rows = sizes[0] if isinstance(sizes[0], int) else call(aten.sym_size.int, tokens, 0)
        values = call(aten.reshape.default, values, [rows, -1, sizes[2]])
    return FILL_PLACES, (tokens, mask, values)


def _kept(values: fx.Node, rows: Any) -> tuple[fx.Node, fx.Node] | None:
    """Features of each row, ``[rows, n, features]``, and which of them count, where values are ``features[mask]``."""
    args: list[Any] = list(values.args)
    if values.target is not aten.index.Tensor or len(args[1]) != 1 or args[1][0].meta["val"].dtype != torch.bool:
        return None
    features, (mask,) = args
    taken, by_row = (sizes_of(node) for node in (features, mask))
    fits = len(taken) == 3 and len(by_row) == 2 and taken[0] == by_row[0] == rows
    return (features, mask) if fits else None


_FORMS = {
    aten.einsum.default: _product,
    aten.glu.default: _halves,
    aten.masked_scatter.default: _scattered,
    aten.index_put.default: _put,
}
