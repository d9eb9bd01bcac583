"""Stacks: runs of isomorphic transformer blocks joined by one hidden state, found from structure alone.

The nodes that every path from some value to the outputs passes form a tree (post-dominators). A stack is a
path of this tree on which the pieces between its nodes repeat: the same weights' shapes in the same order,
with at least one attention in each repetition. Module paths only give names.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from torch import fx
from torch._ops import OpOverload

from offramp.program.analysis.attention import AttentionSite
from offramp.program.analysis.tree_paths import TreePath, tree_paths
from offramp.program.graph import (
    data_inputs,
    dependents,
    is_tensor,
    read_by,
    results,
    shape,
    shape_key,
    source,
    weights,
)


@dataclass(frozen=True)
class Stack:
    """A run of isomorphic blocks, by names of graph nodes.

    ``cuts[k]`` is the hidden state after ``k`` blocks: ``cuts[0]`` enters the stack, ``cuts[-1]`` leaves it.
    ``role`` is "decoder" where the blocks' attention is causal, else "encoder". ``path`` is the module path
    that the blocks share, "" where none is known.
    """

    name: str
    role: str
    cuts: tuple[str, ...]
    path: str = ""

    @property
    def blocks(self) -> int:
        """How many blocks the stack has."""
        return len(self.cuts) - 1

    @property
    def input(self) -> str:
        """The node of the hidden state that enters the first block."""
        return self.cuts[0]

    @property
    def output(self) -> str:
        """The node of the hidden state that leaves the last block."""
        return self.cuts[-1]

    def renamed(self, names: Mapping[str, str]) -> Stack:
        """The stack where nodes have new names: ``names`` maps old ones to new ones, other nodes keep theirs."""
        return replace(self, cuts=tuple(names.get(name, name) for name in self.cuts))


@dataclass
class Found:
    """A stack before it has a name: its hidden states, and the nodes of every block."""

    cuts: list[fx.Node]
    blocks: list[list[fx.Node]]


def find_stacks(
    graph: fx.Graph, sites: Sequence[AttentionSite], outputs: Sequence[fx.Node] | None = None
) -> list[Found]:
    """Every stack of two or more blocks, in graph order; ``outputs`` may leave out some of the graph's."""
    attentions = {site.weights for site in sites}
    order = {node: i for i, node in enumerate(graph.nodes)}
    taken: set[fx.Node] = set()
    found: list[Found] = []
    for path in tree_paths(graph, outputs or list(results(graph).values()), attentions, order):
        for stack in _runs(path, attentions, order):
            if not taken & {node for block in stack.blocks for node in block}:
                taken |= {node for block in stack.blocks for node in block}
                found.append(stack)
    return sorted(found, key=lambda stack: order[stack.cuts[0]])


def signature(piece: Sequence[fx.Node], attentions: set[fx.Node]) -> str:
    """What must agree for two pieces to be the same kind: weights' shapes in order, and attentions."""
    parts = []
    for node in piece:
        found = [str(tuple(shape(weight))) for weight in weights(node) if is_tensor(weight)]
        if found:
            parts.append(",".join(found))
        if node in attentions:
            parts.append("attention")
    return ";".join(parts)


def _runs(path: TreePath, attentions: set[fx.Node], order: Mapping[fx.Node, int]) -> list[Found]:
    """The periodic runs of a path, longest first, then what lies left and right of them."""
    labels = [signature(piece, attentions) for piece in path.pieces]
    heavy = [i for i, label in enumerate(labels) if label and i > 0]
    found: list[Found] = []
    todo = [(0, len(heavy))]
    while todo:
        low, high = todo.pop()
        best = _best_run([labels[i] for i in heavy[low:high]])
        if best is None:
            continue
        start, period, count = best
        start += low
        todo += [(low, start), (start + period * count, high)]
        found += _cut(path, heavy, start, period, count)
    return found


def _best_run(labels: Sequence[str]) -> tuple[int, int, int] | None:
    """Start, period and count of the run that covers most; the smallest period, then the latest start."""
    best: tuple[tuple[int, int, int], tuple[int, int, int]] | None = None
    for period in range(1, len(labels) // 2 + 1):
        at = 0
        while at + period < len(labels):
            end = at
            while end + period < len(labels) and labels[end] == labels[end + period]:
                end += 1
            count, rest = divmod(end - at + period, period)
            if count > 1 and any("attention" in label for label in labels[at : at + period]):
                start = at + rest
                score = (count * period, -period, start)
                if best is None or score > best[0]:
                    best = (score, (start, period, count))
            at = max(end, at) + 1
    return best[1] if best else None


def _cut(path: TreePath, heavy: Sequence[int], start: int, period: int, count: int) -> list[Found]:
    """Place the cuts: light nodes (no weights) between blocks go where they go in every other gap."""
    firsts = [heavy[start + period * k] for k in range(count)]
    lasts = [heavy[start + period * (k + 1) - 1] for k in range(count)]
    gaps = [list(range(end + 1, begin)) for end, begin in zip(lasts, firsts[1:], strict=False)]
    lead = list(range(heavy[start - 1] + 1 if start > 0 else 0, firsts[0]))
    following = heavy[start + period * count] if start + period * count < len(heavy) else len(path.nodes)
    light = [[_op(path.nodes[i]) for i in gap] for gap in (lead, gaps[0], range(lasts[-1] + 1, following))]
    # a gap is the end of a block, which the last block has too, then the start of the next
    opening = _common_suffix(light[0], light[1])
    closing = len(gaps[0]) - opening
    if light[2][:closing] != light[1][:closing]:
        closing = _common_suffix(light[2][::-1], light[1][::-1])
        opening = len(gaps[0]) - closing
    ends = [end + closing for end in lasts]
    entry = firsts[0] - 1 - opening
    if entry >= 0:
        entered = path.nodes[entry]
    elif entry == -1 and (found := _stream(path, ends[0] + 1)) is not None:
        entered = found
    else:
        return []
    nodes = [entered, *(path.nodes[i] for i in ends)]
    spans = list(zip([entry, *ends], ends, strict=False))
    groups: list[list[int]] = [[]]
    for k, (here, there) in enumerate(itertools.pairwise(nodes)):
        if not is_tensor(here) or not is_tensor(there) or shape_key(here) != shape_key(there):
            groups.append([])
        else:
            groups[-1].append(k)
    return [
        Found(
            [nodes[group[0]], *(nodes[k + 1] for k in group)],
            [[node for i in range(spans[k][0] + 1, spans[k][1] + 1) for node in path.pieces[i]] for k in group],
        )
        for group in groups
        if len(group) > 1
    ]


def _stream(path: TreePath, start: int) -> fx.Node | None:
    """What enters the first block where the path begins inside of it.

    That is the value that its first node reads where the first node of the second block (number ``start``)
    reads the hidden state.
    """
    first, second, hidden = path.nodes[0], path.nodes[start], path.nodes[start - 1]
    for mine, other in zip(first.args, second.args, strict=False):
        if other is hidden and isinstance(mine, fx.Node) and is_tensor(mine):
            return mine
    return None


def _op(node: fx.Node) -> str:
    return str(node.target)


def _common_suffix(a: Sequence[str], b: Sequence[str]) -> int:
    count = 0
    while count < min(len(a), len(b)) and a[-1 - count] == b[-1 - count]:
        count += 1
    return count


def _custom(node: fx.Node) -> bool:
    """Whether the node's operator is neither torch's nor offramp's."""
    return isinstance(node.target, OpOverload) and node.target.namespace not in ("aten", "prims", "offramp")


def why_none(graph: fx.Graph, sites: Sequence[AttentionSite]) -> tuple[str, str]:
    """Why a graph has no stack, and what to try."""
    if not sites and (hidden := sorted({str(node.target) for node in graph.nodes if _custom(node)})):
        return (
            f"no stack: no attention is seen, and what is inside of the operators {', '.join(hidden)} is not",
            "the same by operators of torch: scaled_dot_product_attention for a kernel of its own, say",
        )
    if not sites:
        return (
            "no stack: the model has no attention (two products of activations with a softmax between them)",
            "a transformer; recurrent, state-space, convolutional and plain feed-forward models have nothing to leave",
        )
    if len(sites) == 1:
        return (
            "no stack: the model has one attention, and a stack is two or more transformer blocks",
            "a model with more blocks; one block leaves nothing to skip",
        )
    returned = results(graph)
    depth = {name: sum(len(s.blocks) for s in find_stacks(graph, sites, [node])) for name, node in returned.items()}
    deepest = max(depth, key=lambda name: depth[name])  # the first of those from behind all blocks
    if len(returned) > 1 and depth[deepest]:
        inner = [name for name in returned if depth[name] < depth[deepest]] or [n for n in returned if n != deepest]
        return (
            f"no stack: with the outputs {inner} the model returns values from between its blocks",
            f"wrap the model so that it returns {deepest!r} only (output_hidden_states=False, say)",
        )
    if (between := _read_between(graph, sites)) is not None:
        blocks, reader = between
        where = f"first in {reader.name} ({source(reader)})"
        return (
            f"no stack: {blocks} blocks repeat, but the model's head reads states between them, {where}",
            "a head that reads the state behind the last block alone; some models have an option for that",
        )
    if reading := sum(any(other.key is site.key for other in sites[:at]) for at, site in enumerate(sites)):
        return (
            f"no stack: {reading} of {len(sites)} attentions read keys of earlier ones, behind which no blocks repeat",
            "more blocks of each kind behind those that make the keys and values",
        )
    return (
        f"no stack: the model has {len(sites)} attentions, but the pieces between its residual joins do not repeat",
        "blocks whose weights have equal shapes, each reading the hidden state that the one before made",
    )


def _read_between(graph: fx.Graph, sites: Sequence[AttentionSite]) -> tuple[int, fx.Node] | None:
    """How many blocks repeat up to some value behind the last attention, and the first that reads earlier ones too."""
    behind = dependents([sites[-1].weights], graph)
    earlier = dependents([site.weights for site in sites], graph) - behind

    def blocks(node: fx.Node) -> list[list[fx.Node]]:
        return max((stack.blocks for stack in find_stacks(graph, sites, [node])), key=len, default=[])

    for node in (node for node in graph.nodes if node in behind and not earlier.isdisjoint(data_inputs(node))):
        for last in behind.intersection(data_inputs(node)):
            deepest, own = blocks(last), read_by([last])
            if len(blocks(node)) < len(deepest):
                inside = {node for block in deepest[:-1] for node in block}
                readers = (node for node in graph.nodes if node not in own and not inside.isdisjoint(data_inputs(node)))
                return len(deepest), next(readers, node)
    return None
