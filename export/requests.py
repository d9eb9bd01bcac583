"""Requests: what each segment of a program has to make, and what it takes as it comes."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Literal

from torch import fx

from offramp.export.dataflow import Dataflow
from offramp.export.subgraph import unique
from offramp.program.analysis.stacks import Stack
from offramp.program.exit import Exit
from offramp.program.graph import ancestors

Kind = Literal["entry", "block", "adapter", "head", "outputs", "tail", "rest"]


@dataclass(frozen=True)
class Request:
    """One segment's ``outputs``, to be computed without going past ``stop``.

    By ``kind``: what enters a stack; the hidden state after ``depth`` blocks, with scores and caches; of the exit after
    ``depth`` blocks its state (``adapter``), what generation reads and scores (``head``), and all else that the model
    gives (``outputs``); the latter two of full depth (``tail``, ``rest``). Without caches a head or a tail makes all.
    """

    kind: Kind
    stack: str
    depth: int
    outputs: tuple[fx.Node, ...]
    stop: frozenset[fx.Node]

    @property
    def name(self) -> str:
        """What the segment is called."""
        if self.kind in ("tail", "rest"):
            return {"tail": "tail", "rest": "outputs"}[self.kind]
        return f"{self.stack}.{self.depth}" + ("" if self.kind == "block" else f"-{self.kind}")


def requests(flow: Dataflow, segments: int | None) -> Iterator[Request]:
    """The requests of a program; with ``segments`` each stack's blocks are in about so many."""
    for stack in flow.stacks:
        yield Request("entry", stack.name, 0, tuple(entering(flow, stack)), frozenset(flow.cuts))
        yield from _blocks(flow, stack, segments)
        for item in flow.program.exits_of(stack.name):
            if item.after < stack.blocks:
                yield from _exit(flow, stack, item)
    yield from _tails(flow)


def entering(flow: Dataflow, stack: Stack) -> list[fx.Node]:
    """What is to be made before a stack: its input, unless another stack's output is that, and caches."""
    nodes = flow.program.nodes
    made = nodes[stack.input] not in {nodes[other.output] for other in flow.stacks}
    return [*([nodes[stack.input]] if made else []), *flow.contents(stack, -1)]


def _blocks(flow: Dataflow, stack: Stack, segments: int | None) -> Iterator[Request]:
    nodes = flow.program.nodes
    exits = {item.after: item for item in flow.program.exits_of(stack.name)}
    for first, last in _groups(stack, set(exits), segments):
        inner = {nodes[name] for name in stack.cuts[first + 1 : last]}
        scores = scores_of(flow, exits[last])[0] if last in exits else []
        kept = [node for depth in range(first, last) for node in flow.contents(stack, depth)]
        learners = (item for item in flow.program.learners if item.stack == stack.name)
        counts = [nodes[item.count] for item in learners if first < item.block <= last]
        outputs = (nodes[stack.cuts[last]], *scores, *counts, *kept)
        yield Request("block", stack.name, last, outputs, frozenset(flow.cuts - inner))


def _groups(stack: Stack, exits: set[int], segments: int | None) -> list[tuple[int, int]]:
    """Runs of blocks, (first, last) exclusive, that make one segment each."""
    count = min(segments or stack.blocks, stack.blocks)
    bounds = {round(i * stack.blocks / count) for i in range(1, count)}
    edges = [0, *sorted((bounds | exits) - {0, stack.blocks}), stack.blocks]
    return list(itertools.pairwise(edges))


def _exit(flow: Dataflow, stack: Stack, item: Exit) -> Iterator[Request]:
    cuts = frozenset(flow.cuts)
    if item.head == "own":
        logits, rest = _parted(flow, item.outputs)
        made = [*logits, *scores_of(flow, item)[1]]
        yield Request("head", stack.name, item.after, tuple(made), cuts)
        if rest := [node for node in rest if node not in made]:
            yield Request("outputs", stack.name, item.after, tuple(rest), cuts | set(logits))
    elif item.adapter != "identity":
        yield Request("adapter", stack.name, item.after, (flow.program.nodes[item.state],), cuts)


def _tails(flow: Dataflow) -> Iterator[Request]:
    program, last = flow.program, flow.stacks[-1]
    finals, rest = _parted(flow, {name: name for name in program.outputs})
    made_first = set(finals) if rest else set()
    for item in program.exits:
        if item.after == program.stacks[item.stack].blocks:
            finals += scores_of(flow, item)[1]
    others = [node for node in rest if node not in finals]
    yield Request("tail", last.name, 0, _computed(flow, finals), frozenset(flow.cuts))
    yield Request("rest", last.name, 0, _computed(flow, others), frozenset(flow.cuts | made_first))


def _computed(flow: Dataflow, nodes: Iterable[fx.Node]) -> tuple[fx.Node, ...]:
    return tuple(node for node in unique(nodes) if node.op == "call_function" and node not in flow.cuts)


def _parted(flow: Dataflow, outputs: Mapping[str, str]) -> tuple[list[fx.Node], list[fx.Node]]:
    """What generation reads of outputs (by their names in the graph), and the rest; without caches all is one."""
    cache = flow.program.cache
    logits = cache.logits if cache else ""
    first = [flow.returned[key] for name, key in outputs.items() if logits in ("", name)]
    return first, [node for key in outputs.values() if (node := flow.returned[key]) not in first]


def scores_of(flow: Dataflow, item: Exit) -> tuple[list[fx.Node], list[fx.Node]]:
    """An exit's scores: those made from hidden states alone, and those that need its head."""
    head = {flow.returned[name] for name in item.outputs.values()} | {flow.program.nodes[item.state]}
    own: list[fx.Node] = []
    late: list[fx.Node] = []
    for name in item.scores.values():
        node = flow.returned[name]
        needs_head = bool(ancestors([node], stop=flow.cuts) & (head - flow.cuts))
        (late if needs_head else own).append(node)
    return own, late
