"""The table of lowerings: what becomes of the operators that ONNX and torch's exporter do not know."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

from torch import fx

from offramp.export.lowering.node_builder import Builder, Target

#: ``lowering(builder, *args, **kwargs)`` writes what an operator becomes, calls of ATen or of ONNX, before the node
#: whose arguments it is given; it returns the node in its place, or several where the operator has several results.
Lowering = Callable[..., Any]
Function = TypeVar("Function", bound=Callable[..., Any])

#: By operator, in the order in which they are lowered: a lowering may look at the operators behind it as they were.
lowerings: dict[Any, Lowering] = {}

#: By the operator's name: functions of onnxscript, for operators that become values of sizes that nobody knows before.
#: The library that defines such an operator need not be there.
onnx_functions: dict[str, Callable[..., Any]] = {}


def lowering(operator: Any) -> Callable[[Function], Function]:
    """Put a function into the table: ``@lowering(torch.ops.mine.twist.default)``.

    Raises:
        ValueError: the operator has a lowering.
    """

    def register(function: Function) -> Function:
        if operator in lowerings:
            raise ValueError(f"{operator} has a lowering: lowerings[{operator}] = ... puts another in its place")
        lowerings[operator] = function
        return function

    return register


def lower_operators(graph: fx.Graph, target: Target) -> None:
    """Replace the operators of the table."""
    builder = Builder(graph, target)
    for operator, function in lowerings.items():
        for node in graph.find_nodes(op="call_function", target=operator):
            if not node.users:  # by those that were lowered with it
                continue
            builder.origin = node
            with graph.inserting_before(node):
                made = function(builder, *node.args, **node.kwargs)
            if isinstance(made, fx.Node):
                node.replace_all_uses_with(made)
                continue
            for user in list(node.users):
                user.replace_all_uses_with(made[user.args[1]])
        graph.eliminate_dead_code()
