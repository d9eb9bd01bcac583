"""Operators that only say in other words what others do are written as those: analyses need to know one form."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import fx

from offramp.program.graph import add_call, aten, expression, fake_mode, is_weight, shape

_Call = Callable[..., fx.Node]
_Form = Callable[[fx.Node, _Call], tuple[Any, tuple[Any, ...]] | None]


def in_other_words(graph: fx.Graph) -> int:
    """``einsum`` with a matrix of weights becomes a product, ``glu`` a product of halves; returns how many did."""
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


_FORMS = {aten.einsum.default: _product, aten.glu.default: _halves}
