"""Where groups of tokens begin and end, as sizes of a graph."""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any

import sympy
from torch import fx

from offramp.errors import PassError
from offramp.program.graph import aten, expression, placeholders, shape
from offramp.program.groups import Group
from offramp.program.program import Program

#: Makes a call where a graph is written.
Call = Callable[..., fx.Node]


def group_bounds(program: Program, groups: Sequence[Group], call: Call) -> list[tuple[Any, Any]]:
    """Start and end of each group along the tokens, numbers or nodes that ``call`` makes."""
    sizes = [group_size(program, group) for group in groups]
    ends = [sum(sizes[: i + 1], sympy.Integer(0)) for i in range(len(sizes))]
    made = [0, *(size_node(program, end, call) for end in ends[:-1]), 2**63 - 1]
    return list(pairwise(made))


def group_size(program: Program, group: Group) -> Any:
    """How many tokens a group has, over the symbols of the graph."""
    names = {name: symbol for symbol, name in program.axes.names.items()}
    return sympy.sympify(group.tokens, locals=names)


def size_node(program: Program, size: Any, call: Call, hint: str = "leave split-modalities out") -> Any:
    """A size as a number, or as a node that ``call`` makes.

    Raises:
        PassError: it is neither a sum nor a product of inputs' sizes; with this ``hint``.
    """
    if size.is_Integer:
        return int(size)
    if size.is_Symbol:
        for node in placeholders(program.graph).values():
            for axis, found in enumerate(shape(node)):
                if expression(found) == size:
                    return call(aten.sym_size.int, node, axis)
    join: dict[Any, Callable[..., Any]] = {sympy.Add: operator.add, sympy.Mul: operator.mul}
    if size.func not in join:
        raise PassError(f"{size} tokens: no sum or product of inputs' sizes", hint=hint)
    first, *others = [size_node(program, arg, call, hint) for arg in size.args]
    for other in others:
        first = call(join[size.func], first, other)
    return first
