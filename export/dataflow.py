"""When what runs: the order of the stacks, how many must have run for a value, and how often it is made."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import cached_property
from typing import Any, Literal

from torch import fx

from offramp.errors import ExportError
from offramp.program.analysis.stacks import Stack
from offramp.program.graph import (
    ancestors,
    data_inputs,
    dependents,
    is_symint,
    is_tensor,
    placeholders,
    results,
    shape,
    sizes_of,
    symbols,
)
from offramp.program.program import Program

#: How often a value is made: once for each input, when the caches' capacity changes, or for each chunk of tokens.
When = Literal["input", "capacity", "chunk"]
WHEN: tuple[When, ...] = ("input", "capacity", "chunk")


class Dataflow:
    """What the graph of a program says of when its values are made.

    Attributes:
        program: The program.
        returned: Its outputs by name.
        stacks: Its stacks, in an order in which they can run.
        cuts: The hidden states before and after each block.
        level: By node, how many stacks must have run for it; None for what depends on the inside of one.

    Raises:
        ExportError: stacks wait for each other, or something after the last one keeps a cache.
    """

    def __init__(self, program: Program) -> None:
        self.program = program
        self.returned = results(program.graph)
        self.stacks = self._ordered()
        self.cuts = {program.nodes[name] for stack in self.stacks for name in stack.cuts}
        self.level = self._levels()

    def _ordered(self) -> list[Stack]:
        stacks = list(self.program.stacks.values())
        nodes = self.program.nodes
        done: list[Stack] = []
        while stacks:
            for stack in stacks:
                needed = ancestors([nodes[stack.output]])
                if all(nodes[other.output] not in needed for other in stacks if other is not stack):
                    done.append(stack)
                    stacks.remove(stack)
                    break
            else:
                raise ExportError(f"the stacks {[stack.name for stack in stacks]} wait for each other")
        return done

    def _levels(self) -> dict[fx.Node, int | None]:
        graph = self.program.graph
        level: dict[fx.Node, int | None] = dict.fromkeys(graph.nodes, 0)
        for index, stack in enumerate(self.stacks):
            inner = [self.program.nodes[name] for name in stack.cuts[:-1]]
            after = dependents([self.program.nodes[stack.output]], graph)
            inside = dependents(inner, graph) - after
            for node in after:
                level[node] = index + 1
            for node in inside:
                level[node] = None
        for index, stack in enumerate(self.stacks):
            level[self.program.nodes[stack.output]] = index + 1
        return level

    # how often

    def when(self, node: fx.Node) -> When:
        """How often a value is made."""
        return "capacity" if node in self._sized else "chunk" if node in self.chunked else "input"

    @cached_property
    def chunked(self) -> set[fx.Node]:
        """What depends on a chunk of tokens or on caches."""
        cache = self.program.cache
        if cache is None:
            return set()
        inputs = placeholders(self.program.graph)
        chunked = {inputs[name] for name in (*cache.tokens, cache.lengths, *cache.buffers)}
        chunked |= dependents(chunked, self.program.graph)
        chunk = next(e for e in sizes_of(inputs[cache.tokens[0]]) if e in self.program.axes.tokens)
        return chunked | self._counting(chunk, chunked)

    @cached_property
    def _sized(self) -> set[fx.Node]:
        """What else depends on the caches' capacity."""
        cache = self.program.cache
        if cache is None:
            return set()
        (capacity,) = sizes_of(placeholders(self.program.graph)[cache.places])
        return self._counting(capacity, self.chunked)

    def _counting(self, axis: Any, apart: set[fx.Node]) -> set[fx.Node]:
        """The nodes that depend on the length of an axis, other than those ``apart``."""
        found: set[fx.Node] = set()
        for node in self.program.graph.nodes:
            if node.op != "call_function" or node in apart:
                continue
            sizes: Iterable[Any] = [node.meta["val"]] if is_symint(node) else shape(node) if is_tensor(node) else ()
            if any(axis in symbols(size) for size in sizes) or any(arg in found for arg in node.all_input_nodes):
                found.add(node)
        return found

    # caches

    def contents(self, stack: Stack, depth: int) -> list[fx.Node]:
        """The new contents of caches that are made behind so many blocks of a stack, -1 for before it."""
        return self._contents.get((stack.name, depth), [])

    @cached_property
    def _contents(self) -> dict[tuple[str, int], list[fx.Node]]:
        found: dict[tuple[str, int], list[fx.Node]] = {}
        if self.program.cache is None:
            return found
        causal = [stack for stack in self.stacks if self.program.nodes[stack.input] in self.chunked]
        deepest = self._deepest(causal)
        for output in self.program.cache.buffers.values():
            node = self.returned[output]
            if node not in deepest:
                place = self._reader(node, causal)
            else:
                at, depth = deepest[node]
                place = (causal[at].name, depth)
                if depth == causal[at].blocks:
                    if at + 1 == len(causal):
                        raise ExportError(f"stack {causal[at].name} is followed by attention that keeps a cache")
                    place = (causal[at + 1].name, -1)
            found.setdefault(place, []).append(node)
        return found

    def _deepest(self, causal: Sequence[Stack]) -> dict[fx.Node, tuple[int, int]]:
        """By node, the last hidden state whose contents it depends on: number of the stack, and blocks before."""
        cuts = {self.program.nodes[name]: (i, d) for i, stack in enumerate(causal) for d, name in enumerate(stack.cuts)}
        found = dict(cuts)
        for node in self.program.graph.nodes:
            places = [found[arg] for arg in data_inputs(node) if arg in found]
            if places:
                found[node] = max([*places, *([cuts[node]] if node in cuts else [])])
        return found

    def _reader(self, node: fx.Node, causal: Sequence[Stack]) -> tuple[str, int]:
        """Where contents are made that depend on no block: in the one block that reads them (a mask's), or before."""
        cuts = {self.program.nodes[name] for stack in causal for name in stack.cuts}
        for stack in causal:
            for depth, name in enumerate(stack.cuts[1:]):
                if node in ancestors([self.program.nodes[name]], stop=cuts - {self.program.nodes[name]}):
                    return stack.name, depth
        return causal[0].name, -1
