"""A segment before it is lowered: the nodes of a program that make some values from others."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from torch import fx

from offramp.program.graph import ancestors, is_symint, is_tensor


@dataclass(frozen=True)
class Subgraph:
    """Computes ``outputs`` from ``inputs`` (tensors) by ``nodes``, in the order of the program's graph."""

    name: str
    inputs: tuple[fx.Node, ...]
    outputs: tuple[fx.Node, ...]
    nodes: tuple[fx.Node, ...]


def unique(nodes: Iterable[fx.Node]) -> list[fx.Node]:
    """The nodes, each where it comes first."""
    return list(dict.fromkeys(nodes))


def made_by(outputs: Iterable[fx.Node], stop: Iterable[fx.Node]) -> set[fx.Node]:
    """The calls that compute ``outputs`` without going past other values of ``stop``."""
    outputs = list(outputs)
    stop = set(stop) - set(outputs)
    return {n for n in ancestors(outputs, stop=stop) - stop if n.op == "call_function"}


def subgraph(name: str, outputs: Iterable[fx.Node], stop: Iterable[fx.Node]) -> Subgraph:
    """The subgraph that makes ``outputs`` (as far as they are no inputs of the program) and takes ``stop`` as given."""
    made = [node for node in unique(outputs) if node.op == "call_function"]
    inside = made_by(made, stop)
    if not made:
        return Subgraph(name, (), (), ())
    calls = [node for node in made[0].graph.nodes if node in inside and not is_symint(node)]
    inputs = unique(  # by first use: equal blocks agree on it, on the order in the graph they do not
        arg
        for node in calls
        for arg in node.all_input_nodes
        if is_tensor(arg) and arg not in inside and arg.op != "get_attr"
    )
    return Subgraph(name, tuple(inputs), tuple(made), tuple(calls))


def joined(first: Subgraph, second: Subgraph, kept: Iterable[fx.Node]) -> Subgraph:
    """Two subgraphs as one that is called as the second is; of the first's outputs only ``kept`` leave it."""
    inside = {*first.nodes, *second.nodes}
    nodes = [node for node in second.nodes[0].graph.nodes if node in inside]
    inputs = [node for node in unique([*first.inputs, *second.inputs]) if node not in first.nodes]
    return Subgraph(second.name, tuple(inputs), (*second.outputs, *kept), tuple(nodes))
