"""Outlining: a subgraph of a program becomes a computation, a function of tensors and of nothing else."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from torch import fx

from offramp.export.lowering.merged_products import merged
from offramp.export.subgraph import Subgraph
from offramp.program.graph import aten, expression, is_symint, is_tensor, shape, sizes_of


@dataclass(frozen=True)
class Computation:
    """A subgraph as a function of tensors: its activations first, then its weights.

    ``key`` is the computation as text: equal texts have equal translations. ``weights`` are nodes of the program, in
    the order of the parameters: weights, or several that lie one behind the other (`merged`).
    """

    graph: fx.Graph
    inputs: tuple[fx.Node, ...]
    weights: tuple[fx.Node, ...]
    outputs: tuple[fx.Node, ...]
    key: str


def outline(subgraph: Subgraph) -> Computation:
    """The subgraph as a computation: sizes are read from its own inputs, weights become parameters.

    A size that none of the inputs has, and that cannot be computed from theirs, brings the tensor that it
    is read from along as one more input.
    """
    joined = {node for node in subgraph.nodes if merged(node)} - set(subgraph.outputs)
    nodes = [node for node in subgraph.nodes if node not in joined]
    weights = list(
        dict.fromkeys(arg for n in nodes for arg in n.all_input_nodes if arg.op == "get_attr" or arg in joined)
    )
    inputs = list(subgraph.inputs)
    inside = set(subgraph.nodes)
    for node in nodes:
        for arg in node.all_input_nodes:
            if is_symint(arg):
                inputs += [extra for extra in _unread(arg, inside, inputs) if extra not in inputs]
    graph = fx.Graph()
    env: dict[fx.Node, fx.Node] = {}
    for i, node in enumerate([*inputs, *weights]):
        env[node] = graph.placeholder(f"in{i}" if i < len(inputs) else f"w{i - len(inputs)}")
        with node.meta["val"].fake_mode:  # ONNX knows no strides, so none may come in from outside
            env[node].meta["val"] = node.meta["val"].contiguous()
        env[node].meta["weight"] = i >= len(inputs)
    _copy(nodes, inputs, graph, env)
    graph.output(tuple(env[node] for node in subgraph.outputs))
    return Computation(graph, tuple(inputs), tuple(weights), subgraph.outputs, fingerprint(graph))


def _copy(nodes: Iterable[fx.Node], inputs: Iterable[fx.Node], graph: fx.Graph, env: dict[fx.Node, fx.Node]) -> None:
    """Copy nodes to a graph, with sizes that ``inputs`` have read from those."""
    sizes: dict[str, tuple[fx.Node, int]] = {}
    for node in inputs:
        for axis, s in enumerate(shape(node)):
            if not isinstance(expression(s), int):
                sizes.setdefault(str(expression(s)), (node, axis))

    def size(node: fx.Node) -> None:
        if node in env:
            return
        place = sizes.get(str(expression(node.meta["val"])))
        if place is not None:
            env[node] = graph.call_function(aten.sym_size.int, (env[place[0]], place[1]))
        else:
            for arg in filter(is_symint, node.all_input_nodes):
                size(arg)
            env[node] = graph.node_copy(node, env.__getitem__)
        env[node].meta = {"val": node.meta["val"]}

    for node in nodes:
        for arg in filter(is_symint, node.all_input_nodes):
            size(arg)
        env[node] = graph.node_copy(node, env.__getitem__)


def _unread(node: fx.Node, inside: set[fx.Node], inputs: list[fx.Node]) -> list[fx.Node]:
    """The tensors outside of the subgraph that a size must be read from."""
    have = {str(size) for node in inputs for size in sizes_of(node)}
    if str(expression(node.meta["val"])) in have:
        return []
    needed = []
    for arg in node.all_input_nodes:
        if is_symint(arg):
            needed += _unread(arg, inside, inputs)
        elif is_tensor(arg) and arg not in inside and arg not in inputs:
            needed.append(arg)
    return needed


def fingerprint(graph: fx.Graph) -> str:
    """A computation's graph as text, whatever its nodes are called, with what torch knows of its axes' sizes."""
    index = {node: f"%{i}" for i, node in enumerate(graph.nodes)}
    lines: list[str] = []
    facts: dict[object, str] = {}
    for node in graph.nodes:
        kind = ""
        if is_tensor(node):
            kind = f"{sizes_of(node)}{node.meta['val'].dtype}"
            facts |= {key: text for size in shape(node) for key, text in _facts(size).items()}
        args = fx.node.map_arg((node.args, node.kwargs), index.__getitem__)
        lines.append(f"{node.op} {node.target} {args} {kind}")  # placeholders say whether they are weights
    return "\n".join([*lines, *sorted(facts.values())])


def _facts(size: object) -> dict[object, str]:
    """What torch knows of the symbols of a size, by symbol."""
    known = expression(size)
    if isinstance(known, int):
        return {}
    env = size.node.shape_env  # type: ignore[attr-defined]
    return {s: f"{s} {env.var_to_range[s]} {env.backed_var_to_val.get(s)}" for s in known.free_symbols}
