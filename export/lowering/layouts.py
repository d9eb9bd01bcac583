"""Changes of layout that undo each other."""

from __future__ import annotations

from typing import Any

from torch import fx

from offramp.program.graph import aten, expression, shape


def cancel_layout(graph: fx.Graph) -> None:
    """Drop what changes nothing: a transpose of a transpose, a reshape before another or to the shape that is there."""
    for node in graph.find_nodes(op="call_function", target=aten.transpose.int):
        given: Any = node.args[0]
        if given.target is aten.transpose.int and _axes(node) == _axes(given):
            node.replace_all_uses_with(given.args[0])
    for node in graph.find_nodes(op="call_function", target=aten.reshape.default):
        first = given = node.args[0]
        while given.target is aten.reshape.default:
            given = given.args[0]
        node.replace_input_with(first, given)
        if same_shape(node, given):
            node.replace_all_uses_with(given)
    graph.eliminate_dead_code()


def _axes(node: fx.Node) -> set[Any]:
    return {int(axis) % len(shape(node)) for axis in node.args[1:]}  # type: ignore[arg-type]


def same_shape(first: fx.Node, second: fx.Node) -> bool:
    """Whether two values are known to have equal sizes."""
    return [expression(size) for size in shape(first)] == [expression(size) for size in shape(second)]
