"""Cut a program at its stacks: which nodes make up which segment, and which values cross."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import fx

from offramp.bundle.measures import OF_LOGITS
from offramp.errors import ExportError, SpecError
from offramp.export.lowering.merged_products import merged
from offramp.program.analysis.stacks import Stack
from offramp.program.exit import Exit
from offramp.program.graph import (
    ancestors,
    dependents,
    expression,
    is_symint,
    is_tensor,
    placeholders,
    read_by,
    results,
    shape,
    symbols,
)
from offramp.program.program import Program


@dataclass(frozen=True)
class Subgraph:
    """A segment before it is lowered: computes ``outputs`` from ``inputs`` (tensors) by ``nodes``."""

    name: str
    inputs: tuple[fx.Node, ...]
    outputs: tuple[fx.Node, ...]
    nodes: tuple[fx.Node, ...]


@dataclass
class StackPlan:
    """The pieces of one stack: blocks by the depth they reach, and what each exit runs."""

    stack: Stack
    blocks: list[tuple[int, Subgraph]] = field(default_factory=list)
    adapters: dict[int, Subgraph] = field(default_factory=dict)
    heads: dict[int, list[Subgraph]] = field(default_factory=dict)


@dataclass
class Plan:
    """Pieces in the order in which they run: before each stack (None: nothing to do), the stacks, the tails.

    A tail makes the model's outputs from the last stack's; of a program with caches the first makes the logits that
    generation reads, and a second one all else (so it is with an exit's own heads).

    Of a program with caches ``before`` is what runs once; what runs when their capacity changes is apart. What runs
    for each chunk of tokens (the embedding, say) is part of the stack's first piece, or apart too where more than the
    stack needs it.
    """

    before: list[Subgraph | None]
    tables: list[Subgraph | None]
    enter: list[Subgraph | None]
    stacks: list[StackPlan]
    tails: list[Subgraph]


def partition(program: Program, segments: int | None = None) -> Plan:
    """Cut the program into pieces.

    Every block is a piece of its own; with ``segments`` each stack's blocks are grouped into about so many
    pieces of near-equal size, cut at its exits in any case. Work that several pieces share and that does not
    depend on a stack's hidden state (masks, position tables, an encoder's output) is done once, before the
    first stack that can use it.

    Raises:
        SpecError: ``segments`` is not a positive number.
        StructureError: the program has no stack to cut at.
    """
    if segments is not None and segments < 1:
        raise SpecError(f"segments={segments}: at least one")
    program.require_stacks()
    returned = results(program.graph)
    if fixed := [name for name in program.outputs if returned[name].op == "get_attr"]:
        raise ExportError(f"the outputs {fixed} are weights, whatever the inputs are", hint="a model without them")
    if strange := [item for item in program.records if item.graph_inputs and item is not program.cache]:
        raise ExportError(
            f"the {strange[0].kind} ({strange[0].summary(program)}) has the inputs {list(strange[0].graph_inputs)}, "
            "and nothing feeds them when a bundle runs",
            hint="leave out the pass that adds it",
        )
    plan = _Partition(program, segments)
    last = plan.stacks[-1].name
    for item in program.exits:
        if item.stack != last and (item.head == "own" or set(item.scores) & set(OF_LOGITS)):
            raise ExportError(
                f"the exit after block {item.after} of stack {item.stack} has a head or scores of its own outputs, but "
                f"stack {last} runs after it",
                hint="a shared head, and measure=cosine or learned, on every stack but the last",
            )
    return plan.plan()


def whole(program: Program) -> Subgraph:
    """The model's outputs as one piece, uncut: what one session for the whole model would run."""
    outputs = _unique(results(program.graph)[name] for name in program.outputs)
    inside = {node for node in ancestors(outputs) if node.op == "call_function" and not is_symint(node)}
    inputs = tuple(node for node in program.graph.nodes if node.op == "placeholder" and set(node.users))
    return Subgraph("model", inputs, tuple(outputs), tuple(node for node in program.graph.nodes if node in inside))


class _Partition:
    def __init__(self, program: Program, segments: int | None) -> None:
        self.program = program
        self.graph = program.graph
        self.order = {node: i for i, node in enumerate(self.graph.nodes)}
        self.returned = results(self.graph)
        self.stacks = self._ordered()
        self.cuts = {program.nodes[name] for stack in self.stacks for name in stack.cuts}
        self.level = self._levels()
        self.segments = segments
        self.chunked, self.sized = self._chunked()
        self.buffers = self._buffers()

    def _ordered(self) -> list[Stack]:
        """Stacks in the order in which they can run."""
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
        """By node: how many stacks must have run for it; None for what depends on the inside of a stack."""
        level: dict[fx.Node, int | None] = dict.fromkeys(self.graph.nodes, 0)
        for index, stack in enumerate(self.stacks):
            inner = [self.program.nodes[name] for name in stack.cuts[:-1]]
            after = dependents([self.program.nodes[stack.output]], self.graph)
            inside = dependents(inner, self.graph) - after
            for node in after:
                level[node] = index + 1
            for node in inside:
                level[node] = None
        for index, stack in enumerate(self.stacks):
            level[self.program.nodes[stack.output]] = index + 1
        return level

    def _chunked(self) -> tuple[set[fx.Node], set[fx.Node]]:
        """What depends on a chunk of tokens or on caches, and what else depends on the caches' capacity."""
        cache = self.program.cache
        if cache is None:
            return set(), set()
        inputs = placeholders(self.graph)
        chunked = {inputs[name] for name in (*cache.tokens, cache.lengths, *cache.buffers)}
        chunked |= dependents(chunked, self.graph)
        (capacity,) = (expression(size) for size in shape(inputs[cache.places]))
        chunk = next(e for e in map(expression, shape(inputs[cache.tokens[0]])) if e in self.program.axes.tokens)
        chunked |= self._counting(chunk, chunked)
        return chunked, self._counting(capacity, chunked)

    def _counting(self, axis: Any, apart: set[fx.Node]) -> set[fx.Node]:
        """The nodes that depend on the length of an axis, other than those ``apart``."""
        found: set[fx.Node] = set()
        for node in self.graph.nodes:
            if node.op != "call_function" or node in apart:
                continue
            sizes = [node.meta["val"]] if is_symint(node) else shape(node) if is_tensor(node) else ()
            if any(axis in symbols(size) for size in sizes) or any(arg in found for arg in node.all_input_nodes):
                found.add(node)
        return found

    def _buffers(self) -> dict[tuple[str, int], list[fx.Node]]:
        """The new contents of caches by what makes them: stack and the number of blocks before, -1 for its entry.

        Raises:
            ExportError: one is made after the last stack.
        """
        found: dict[tuple[str, int], list[fx.Node]] = {}
        if self.program.cache is None:
            return found
        after: dict[tuple[str, int], set[fx.Node]] = {}
        for stack in self.stacks:
            for depth, name in enumerate(stack.cuts):
                after[stack.name, depth] = dependents([self.program.nodes[name]], self.graph)
        causal = [stack for stack in self.stacks if self.program.nodes[stack.input] in self.chunked]
        for output in self.program.cache.buffers.values():
            node = self.returned[output]
            place = self._reader(node, causal)
            for i, stack in enumerate(causal):
                for depth in range(stack.blocks):
                    if node in after[stack.name, depth]:
                        place = (stack.name, depth)
                if node in after[stack.name, stack.blocks]:
                    if i + 1 == len(causal):
                        raise ExportError(f"stack {stack.name} is followed by attention that keeps a cache")
                    place = (causal[i + 1].name, -1)
            found.setdefault(place, []).append(node)
        return found

    def _reader(self, node: fx.Node, causal: Sequence[Stack]) -> tuple[str, int]:
        """Where contents are made that depend on no block: in the one block that reads them (a mask's), or before."""
        cuts = {self.program.nodes[name] for stack in causal for name in stack.cuts}
        for stack in causal:
            for depth, name in enumerate(stack.cuts[1:]):
                if node in ancestors([self.program.nodes[name]], stop=cuts - {self.program.nodes[name]}):
                    return stack.name, depth
        return causal[0].name, -1

    def _slice(self, outputs: Iterable[fx.Node], stop: Iterable[fx.Node]) -> set[fx.Node]:
        """What computes ``outputs`` without going past ``stop``: calls only."""
        outputs = list(outputs)
        stop = set(stop) - set(outputs)
        return {n for n in ancestors(outputs, stop=stop) - stop if n.op == "call_function"}

    def _entering(self, stack: Stack) -> list[fx.Node]:
        """What is to be made before a stack: its input, unless another stack's output is that, and caches."""
        nodes = self.program.nodes
        made = nodes[stack.input] not in {nodes[other.output] for other in self.stacks}
        return [*([nodes[stack.input]] if made else []), *self.buffers.get((stack.name, -1), [])]

    def _groups(self, stack: Stack) -> list[tuple[int, int]]:
        """Runs of blocks, (first, last) exclusive, that make one piece each."""
        exits = {item.after for item in self.program.exits_of(stack.name)}
        count = self.segments or stack.blocks
        bounds = (
            {round(i * stack.blocks / count) for i in range(1, count)}
            if count < stack.blocks
            else set(range(1, stack.blocks))
        )
        edges = [0, *sorted((bounds | exits) - {0, stack.blocks}), stack.blocks]
        return list(itertools.pairwise(edges))

    def plan(self) -> Plan:
        wanted: dict[tuple[str, str, int], tuple[list[fx.Node], set[fx.Node]]] = {}
        nodes = self.program.nodes
        for stack in self.stacks:
            wanted["entry", stack.name, 0] = (self._entering(stack), self.cuts)
            exits = {item.after: item for item in self.program.exits_of(stack.name)}
            for first, last in self._groups(stack):
                inner = {nodes[name] for name in stack.cuts[first + 1 : last]}
                scores = self._scores(exits[last])[0] if last in exits else []
                kept = [node for depth in range(first, last) for node in self.buffers.get((stack.name, depth), [])]
                wanted["block", stack.name, last] = ([nodes[stack.cuts[last]], *scores, *kept], self.cuts - inner)
            for after, item in exits.items():
                if after < stack.blocks and item.head == "own":
                    logits, rest = self._parted(item.outputs)
                    made = [*logits, *self._scores(item)[1]]
                    wanted["head", stack.name, after] = (made, self.cuts)
                    if rest := [node for node in rest if node not in made]:
                        wanted["outputs", stack.name, after] = (rest, self.cuts | set(logits))
                elif after < stack.blocks and item.adapter != "identity":
                    wanted["adapter", stack.name, after] = ([nodes[item.state]], self.cuts)
        last_stack = self.stacks[-1]
        finals, rest = self._parted({name: name for name in self.program.outputs})
        made_first = set(finals) if rest else set()
        for item in self.program.exits:
            if item.after == self.program.stacks[item.stack].blocks:
                finals += self._scores(item)[1]
        wanted["tail", last_stack.name, 0] = (self._final(finals), self.cuts)
        wanted["rest", last_stack.name, 0] = (self._final([n for n in rest if n not in finals]), self.cuts | made_first)

        shared = self._shared([self._slice(*request) for request in wanted.values()])
        return self._assemble(wanted, shared)

    def _parted(self, outputs: Mapping[str, str]) -> tuple[list[fx.Node], list[fx.Node]]:
        """What generation reads of outputs (by their names in the graph), and the rest; without caches all is one."""
        logits = self.program.cache.logits if self.program.cache else ""
        first = [self.returned[key] for name, key in outputs.items() if logits in ("", name)]
        return first, [node for key in outputs.values() if (node := self.returned[key]) not in first]

    def _final(self, nodes: Iterable[fx.Node]) -> list[fx.Node]:
        return [node for node in _unique(nodes) if node.op == "call_function" and node not in self.cuts]

    def _scores(self, item: Exit) -> tuple[list[fx.Node], list[fx.Node]]:
        """An exit's scores: those made from hidden states alone, and those that need its head."""
        head = {self.returned[name] for name in item.outputs.values()} | {self.program.nodes[item.state]}
        own: list[fx.Node] = []
        late: list[fx.Node] = []
        for name in item.scores.values():
            node = self.returned[name]
            (late if ancestors([node], stop=self.cuts) & (head - self.cuts) else own).append(node)
        return own, late

    def _shared(self, slices: Sequence[set[fx.Node]]) -> set[fx.Node]:
        """Values that several pieces need, that no stack's inside goes into, and that are worth passing on."""
        counts = Counter(node for part in slices for node in part)
        shared = {node for node, count in counts.items() if count > 1}
        if self.program.cache is not None:  # what chunks read and do not change is made once
            shared |= {arg for node in counts if node in self.chunked for arg in node.all_input_nodes if arg in counts}
            shared = {node for node in shared if node not in self.chunked or counts[node] > 1}
            shared -= {node for node in shared if node in self.chunked and self._cheap(node)}
        shared = {node for node in shared if self.level[node] is not None and is_tensor(node)}
        return {node for node in shared if not merged(node) and not self._trivial(node)}

    def _cheap(self, node: fx.Node) -> bool:
        """Whether a value of chunks is made where it is used.

        It depends on lengths, of which each part has its own, or on nothing but the chunk's size.
        """
        assert self.program.cache is not None
        read = read_by([node])
        inputs = {arg for arg in read if arg.op == "placeholder"}
        return not inputs or self.program.nodes[self.program.cache.lengths] in inputs

    def _trivial(self, node: fx.Node) -> bool:
        """Whether a value is made where it is used: constants of one element, and positions in the batch.

        The latter (``arange`` over the rows, say) would be wrong for rows that are left when others have gone.
        """
        if any(arg.op == "placeholder" for arg in read_by([node])):
            return False
        sizes = [arg.meta["val"] for arg in ancestors([node]) if is_symint(arg)]
        by_rows = any(self.program.axes.batch in symbols(size) for size in sizes)
        return by_rows or all(isinstance(expression(size), int) and size == 1 for size in shape(node))

    def _assemble(
        self,
        wanted: dict[tuple[str, str, int], tuple[list[fx.Node], set[fx.Node]]],
        shared: set[fx.Node],
    ) -> Plan:
        pieces: dict[tuple[str, str, int], Subgraph] = {}
        crossing: set[fx.Node] = set()
        once: set[fx.Node] = set()
        for key, (outputs, cuts) in wanted.items():
            if key[0] in ("entry", "tail", "rest"):
                continue
            pieces[key] = self._piece(self._label(key), outputs, cuts | shared)
            crossing |= {node for node in pieces[key].inputs if node in shared}
        last = len(self.stacks)
        late = {node for node in shared if self.level[node] == last}
        tails = []
        for kind, name in (("tail", "tail"), ("rest", "outputs")):
            finals, cuts = wanted[kind, self.stacks[-1].name, 0]
            early = [node for node in finals if self.level[node] != last]  # once, not at every exit
            tails.append(self._piece(name, [node for node in finals if node not in early], (cuts | shared) - late))
            crossing |= {*early, *(node for node in tails[-1].inputs if node in shared)}
            once |= set(early)
        before: list[tuple[Subgraph | None, ...]] = []
        for index in range(last - 1, -1, -1):
            stack = self.stacks[index]
            here = sorted((node for node in crossing if self.level[node] == index), key=self.order.__getitem__)
            entering = self._entering(stack)
            outputs = _unique([*entering, *here])
            known = {node for node in shared if (self.level[node] or 0) < index}
            others = self.cuts - set(entering)
            outputs = [node for node in outputs if node.op == "call_function" and node not in others]
            made: list[Subgraph | None] = []
            for name, group in (
                ("before", [n for n in outputs if n not in self.chunked and n not in self.sized]),
                ("tables", [n for n in outputs if n in self.sized]),
                ("enter", [n for n in outputs if n in self.chunked]),
            ):
                piece = self._piece(f"{name}-{stack.name}", group, (self.cuts - set(group)) | known)
                crossing |= {node for node in piece.inputs if node in shared}
                made.append(piece if group else None)
                known = known | set(group)
            if (entry := made[-1]) is not None:
                outside = [piece for key, piece in pieces.items() if key[1] != stack.name]
                outside += [piece for piece in itertools.chain(*before) if piece]
                if not set(entry.outputs) & {*once, *(arg for piece in outside for arg in piece.inputs)}:
                    self._join(entry, stack, pieces, tails)
                    made[-1] = None
            before.append(tuple(made))
        plans = []
        for stack in self.stacks:
            plan = StackPlan(stack)
            for (kind, name, depth), piece in pieces.items():
                if name == stack.name and kind == "block":
                    plan.blocks.append((depth, piece))
                elif name == stack.name and kind == "adapter":
                    plan.adapters[depth] = piece
                elif name == stack.name:
                    plan.heads.setdefault(depth, []).append(piece)
            plans.append(plan)
        ahead, tables, enter = (list(column) for column in zip(*before[::-1], strict=True))
        return Plan(ahead, tables, enter, plans, [piece for piece in tails if piece.nodes])

    def _join(
        self, enter: Subgraph, stack: Stack, pieces: dict[tuple[str, str, int], Subgraph], tails: Sequence[Subgraph]
    ) -> None:
        """Make what enters a stack part of its first piece, which spares every chunk a session's call."""
        first = next(key for key in pieces if key[:2] == ("block", stack.name))
        block, others = pieces[first], [*tails, *(piece for key, piece in pieces.items() if key != first)]
        read = {arg for piece in others for arg in piece.inputs} | set(self.buffers.get((stack.name, -1), []))
        kept = [node for node in enter.outputs if node in read]
        nodes = sorted({*enter.nodes, *block.nodes}, key=self.order.__getitem__)
        inputs = [node for node in _unique([*enter.inputs, *block.inputs]) if node not in enter.nodes]
        pieces[first] = Subgraph(block.name, tuple(inputs), (*block.outputs, *kept), tuple(nodes))

    def _label(self, key: tuple[str, str, int]) -> str:
        kind, name, depth = key
        return f"{name}.{depth}" if kind == "block" else f"{name}.{depth}-{kind}"

    def _piece(self, name: str, outputs: Sequence[fx.Node], stop: set[fx.Node]) -> Subgraph:
        made = [node for node in _unique(outputs) if node.op == "call_function"]
        inside = self._slice(made, stop - set(made))
        calls = sorted((node for node in inside if not is_symint(node)), key=self.order.__getitem__)
        inputs = _unique(  # by first use: equal blocks agree on it, on the order in the graph they do not
            arg
            for node in calls
            for arg in node.all_input_nodes
            if is_tensor(arg) and arg not in inside and arg.op != "get_attr"
        )
        return Subgraph(name, tuple(inputs), tuple(made), tuple(calls))


def _unique(nodes: Iterable[fx.Node]) -> list[fx.Node]:
    return list(dict.fromkeys(nodes))
