"""Paths of the post-dominator tree: nodes that every path to the outputs passes, and what lies between them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import networkx as nx
from torch import fx

from offramp.program.graph import data_inputs, is_tensor, read_by, shape_key


@dataclass
class TreePath:
    """Nodes that dominate each other, and what lies between: ``pieces[i]`` ends in ``nodes[i]``."""

    nodes: list[fx.Node]
    pieces: list[list[fx.Node]] = field(default_factory=list)


def tree_paths(
    graph: fx.Graph, outputs: Sequence[fx.Node], attentions: set[fx.Node], order: Mapping[fx.Node, int]
) -> list[TreePath]:
    """The paths of the post-dominator tree, longest first, each with the pieces between its nodes.

    Where paths join, the one goes on that the others read from (a residual stream, not the branch that
    is added to it), unless a branch holds a whole stack more (the stream then feeds its blocks from aside).
    """
    sink = graph.output_node()
    flow: nx.DiGraph = nx.DiGraph([(sink, node) for node in outputs])
    live = sorted(read_by(outputs), key=order.__getitem__)
    flow.add_edges_from((node, arg) for node in live for arg in data_inputs(node))
    parents = nx.immediate_dominators(flow, sink)
    children: dict[fx.Node, list[fx.Node]] = {}
    reads: dict[fx.Node, int] = {}
    depth: dict[fx.Node, int] = {}
    mixed: dict[fx.Node, int] = {}
    onward: dict[fx.Node, fx.Node] = {}
    for node in live:
        reads[node] = 1 << order[node]
        for arg in data_inputs(node):
            reads[node] |= reads[arg]
        branches = children.get(node, [])
        streams = [c for c in branches if is_tensor(node) and is_tensor(c) and shape_key(c) == shape_key(node)]
        streams = streams or branches
        apart = [c for c in streams if not any(reads[c] >> order[other] & 1 for other in streams if other is not c)]
        best = max(apart, key=lambda c: depth[c], default=None)
        rival = max(streams, key=lambda c: mixed[c], default=None)
        if best is not None and rival is not None:
            onward[node] = rival if mixed[rival] > mixed[best] + 1 else best
        before = onward.get(node)
        depth[node] = 1 + (depth[before] if before else 0)
        mixed[node] = (mixed[before] if before else 0) + (
            node in attentions
            or _mixes_aside([c for c in branches if c is not before], attentions, reads[before] if before else 0, order)
        )
        children.setdefault(parents[node], []).append(node)
    paths = []
    for node in live:
        if onward.get(parents[node]) is node:
            continue
        path = [node]
        while path[-1] in onward:
            path.append(onward[path[-1]])
        if len(path) > 2:
            paths.append(_pieces(TreePath(path[::-1]), order))
    return sorted(paths, key=lambda path: -len(path.nodes))


def _mixes_aside(
    branches: Sequence[fx.Node], attentions: set[fx.Node], stream: int, order: Mapping[fx.Node, int]
) -> bool:
    """Whether an attention lies on one of the branches, before they meet what the stream reads (a bit set)."""
    todo, seen = list(branches), set()
    while todo:
        here = todo.pop()
        if here in attentions:
            return True
        if here not in seen and not stream >> order[here] & 1:
            seen.add(here)
            todo += data_inputs(here)
    return False


def _pieces(path: TreePath, order: Mapping[fx.Node, int]) -> TreePath:
    """Piece i: the nodes that read the contents of node i-1 of the path but not yet of node i, and node i."""
    position = {node: i for i, node in enumerate(path.nodes)}
    last = path.nodes[-1]
    reach: dict[fx.Node, int] = {path.nodes[0]: 0}
    path.pieces = [[] for _ in path.nodes]
    path.pieces[0].append(path.nodes[0])
    for node in order:
        if order[node] > order[last]:
            break
        deepest = max((reach[arg] for arg in data_inputs(node) if arg in reach), default=-1)
        if node in position and position[node] > 0:
            path.pieces[position[node]].append(node)
            reach[node] = position[node]
        elif deepest >= 0 and node not in reach:
            reach[node] = deepest
            if deepest + 1 < len(path.nodes):
                path.pieces[deepest + 1].append(node)
    return path
