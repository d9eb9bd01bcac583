"""Stacks: runs of isomorphic transformer blocks joined by one hidden state, found from structure alone.

The nodes that every path from some value to the outputs passes form a tree (post-dominators). A stack is a
path of this tree on which the pieces between its nodes repeat: the same weights' shapes in the same order,
with at least one attention in each repetition. Module paths only give names.
"""

from __future__ import annotations

import itertools
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import networkx as nx
from torch import fx

from offramp.program.analysis.attention import AttentionSite
from offramp.program.dropout import keeps
from offramp.program.graph import data_inputs, is_tensor, read_by, results, shape, shape_key, weights

_GENERIC = re.compile(
    r"\d+|(hidden_)?(layers?|blocks?|h|stages?|groups?|modules?|model|transformer|net|network)(_\w+)?"
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
class _Chain:
    """Nodes that dominate each other, and what lies between: ``pieces[i]`` ends in ``nodes[i]``."""

    nodes: list[fx.Node]
    pieces: list[list[fx.Node]] = field(default_factory=list)


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
    for chain in _chains(graph, outputs or list(results(graph).values()), attentions, order):
        for stack in _runs(chain, attentions, order):
            if not taken & {node for block in stack.blocks for node in block}:
                taken |= {node for block in stack.blocks for node in block}
                found.append(stack)
    return sorted(found, key=lambda stack: order[stack.cuts[0]])


def _chains(
    graph: fx.Graph, outputs: Sequence[fx.Node], attentions: set[fx.Node], order: Mapping[fx.Node, int]
) -> list[_Chain]:
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
    chains = []
    for node in live:
        if onward.get(parents[node]) is node:
            continue
        path = [node]
        while path[-1] in onward:
            path.append(onward[path[-1]])
        if len(path) > 2:
            chains.append(_pieces(_Chain(path[::-1]), order))
    return sorted(chains, key=lambda chain: -len(chain.nodes))


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


def _pieces(chain: _Chain, order: Mapping[fx.Node, int]) -> _Chain:
    """Piece i: the nodes that read the contents of node i-1 of the chain but not yet of node i, and node i."""
    position = {node: i for i, node in enumerate(chain.nodes)}
    last = chain.nodes[-1]
    reach: dict[fx.Node, int] = {chain.nodes[0]: 0}
    chain.pieces = [[] for _ in chain.nodes]
    chain.pieces[0].append(chain.nodes[0])
    for node in order:
        if order[node] > order[last]:
            break
        deepest = max((reach[arg] for arg in data_inputs(node) if arg in reach), default=-1)
        if node in position and position[node] > 0:
            chain.pieces[position[node]].append(node)
            reach[node] = position[node]
        elif deepest >= 0 and node not in reach:
            reach[node] = deepest
            if deepest + 1 < len(chain.nodes):
                chain.pieces[deepest + 1].append(node)
    return chain


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


def _runs(chain: _Chain, attentions: set[fx.Node], order: Mapping[fx.Node, int]) -> list[Found]:
    """The periodic runs of a chain, longest first, then what lies left and right of them."""
    labels = [signature(piece, attentions) for piece in chain.pieces]
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
        found += _cut(chain, heavy, start, period, count)
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


def _cut(chain: _Chain, heavy: Sequence[int], start: int, period: int, count: int) -> list[Found]:
    """Place the cuts: light nodes (no weights) between blocks go where they go in every other gap."""
    firsts = [heavy[start + period * k] for k in range(count)]
    lasts = [heavy[start + period * (k + 1) - 1] for k in range(count)]
    gaps = [list(range(end + 1, begin)) for end, begin in zip(lasts, firsts[1:], strict=False)]
    lead = list(range(heavy[start - 1] + 1 if start > 0 else 0, firsts[0]))
    following = heavy[start + period * count] if start + period * count < len(heavy) else len(chain.nodes)
    light = [[_op(chain.nodes[i]) for i in gap] for gap in (lead, gaps[0], range(lasts[-1] + 1, following))]
    # a gap is the end of a block, which the last block has too, then the start of the next
    opening = _common_suffix(light[0], light[1])
    closing = len(gaps[0]) - opening
    if light[2][:closing] != light[1][:closing]:
        closing = _common_suffix(light[2][::-1], light[1][::-1])
        opening = len(gaps[0]) - closing
    ends = [end + closing for end in lasts]
    entry = firsts[0] - 1 - opening
    if entry >= 0:
        entered = chain.nodes[entry]
    elif entry == -1 and (found := _stream(chain, ends[0] + 1)) is not None:
        entered = found
    else:
        return []
    nodes = [entered, *(chain.nodes[i] for i in ends)]
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
            [[node for i in range(spans[k][0] + 1, spans[k][1] + 1) for node in chain.pieces[i]] for k in group],
        )
        for group in groups
        if len(group) > 1
    ]


def _stream(chain: _Chain, start: int) -> fx.Node | None:
    """What enters the first block where the chain begins inside of it.

    That is the value that its first node reads where the first node of the second block (number ``start``)
    reads the hidden state.
    """
    first, second, hidden = chain.nodes[0], chain.nodes[start], chain.nodes[start - 1]
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


def why_none(graph: fx.Graph, sites: Sequence[AttentionSite]) -> tuple[str, str]:
    """Why a graph has no stack, and what to try."""
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
    return (
        f"no stack: the model has {len(sites)} attentions, but the pieces between its residual joins do not repeat",
        "blocks whose weights have equal shapes, each reading the hidden state that the one before made",
    )


def name_stacks(found: Sequence[Found], causal: Sequence[bool]) -> dict[str, Stack]:
    """Names from module paths (``encoder`` where a path says so or none does), numbered where they agree."""
    paths = [_path(stack) for stack in found]
    roles = ["decoder" if flag else "encoder" for flag in causal]
    named = [_name(path, role) for path, role in zip(paths, roles, strict=True)]
    for i, name in enumerate(named):
        if named.count(name) > 1:  # tell them apart by the module above, if that does
            words = [word for word in paths[i].split(".") if word != name and not _GENERIC.fullmatch(word)]
            others = {path for j, path in enumerate(paths) if j != i}
            telling = [word for word in words if not any(word in other.split(".") for other in others)]
            named[i] = telling[-1] if telling else name
    total = Counter(named)
    counts: Counter[str] = Counter()
    stacks: dict[str, Stack] = {}
    for stack, path, role, name in zip(found, paths, roles, named, strict=True):
        numbered = f"{name}{counts[name]}" if total[name] > 1 or name == "stack" else name
        counts[name] += 1
        stacks[numbered] = Stack(numbered, role, tuple(node.name for node in stack.cuts), path)
    return stacks


def _name(path: str, role: str) -> str:
    if not path:
        return "stack"
    told = [word for word in path.split(".") if re.search("encoder|decoder", word)]
    return told[-1] if told else role


def _path(stack: Found) -> str:
    """The module path that holds the blocks: the longest prefix that most nodes of all blocks share."""
    paths = []
    for block in stack.blocks:
        counts: Counter[str] = Counter()
        for node in block:
            modules = [] if keeps(node) else list((node.meta.get("nn_module_stack") or {}).values())
            for weight in weights(node):
                counts[str(weight.target).rpartition(".")[0]] += 1
            if modules:
                counts[str(modules[-1][0])] += 1
        paths += [path for path, _ in counts.most_common()]
    if not paths:
        return ""
    split = [path.split(".") for path in paths if path]
    prefix = []
    for level in range(max(map(len, split), default=0)):
        word, count = Counter(parts[level] for parts in split if len(parts) > level).most_common(1)[0]
        if count < 0.9 * len(split) or word.isdigit():
            break
        prefix.append(word)
    return ".".join(prefix)
