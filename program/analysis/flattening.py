"""Where the tokens of all rows lie one after another: the value before, which tells rows and tokens apart."""

from __future__ import annotations

from torch import fx

from offramp.program.analysis.products import product
from offramp.program.graph import aten, data_inputs, is_pointwise, shape, sizes_of
from offramp.program.ops import FIRST_LEARNERS

_TOKEN_BY_TOKEN = (
    aten.linear.default,  # whatever its bias is made of
    aten.layer_norm.default,
    aten.rms_norm.default,
    aten.dropout.default,
    aten._to_copy.default,
    FIRST_LEARNERS,
)


def unflattened(tokens: fx.Node) -> fx.Node | None:
    """The value with the tokens of ``tokens`` [..., features], in their order, on more axes; None where none is found.

    A reshape, and what works token by token, lie between the two.
    """
    todo, seen = [tokens], set[fx.Node]()
    while todo:
        node = todo.pop()
        if node in seen:
            continue
        seen.add(node)
        given = [arg for arg in data_inputs(node) if len(shape(arg)) > 1]
        if node.target is aten.reshape.default:
            if len(shape(given[0])) > len(shape(node)) and sizes_of(given[0])[-1] == sizes_of(node)[-1]:
                return given[0]
        elif _token_by_token(node):
            todo += [arg for arg in given if sizes_of(arg)[:-1] == sizes_of(node)[:-1]]
    return None


def _token_by_token(node: fx.Node) -> bool:
    return is_pointwise(node) or node.target in _TOKEN_BY_TOKEN or product(node) is not None
