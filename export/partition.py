"""Cut a program at its stacks: the segments' subgraphs, in the order in which they run."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from torch import fx

from offramp.bundle.measures import OF_LOGITS
from offramp.errors import ExportError, SpecError
from offramp.export.dataflow import WHEN, Dataflow, When
from offramp.export.requests import Request, entering, requests
from offramp.export.sharing import shared_values
from offramp.export.subgraph import Subgraph, joined, subgraph, unique
from offramp.program.analysis.stacks import Stack
from offramp.program.exit import asked_of
from offramp.program.graph import ancestors, is_symint, results
from offramp.program.learners import WIDTH
from offramp.program.program import Program


@dataclass
class StackPlan:
    """The subgraphs of one stack: blocks by the depth they reach, and what each exit runs."""

    stack: Stack
    blocks: list[tuple[int, Subgraph]] = field(default_factory=list)
    adapters: dict[int, Subgraph] = field(default_factory=dict)
    heads: dict[int, list[Subgraph]] = field(default_factory=dict)

    def add(self, request: Request, made: Subgraph) -> None:
        """Put what a request became in its place."""
        if request.kind == "block":
            self.blocks.append((request.depth, made))
        elif request.kind == "adapter":
            self.adapters[request.depth] = made
        else:
            self.heads.setdefault(request.depth, []).append(made)

    def subgraphs(self) -> list[Subgraph]:
        """All of them."""
        heads = [head for several in self.heads.values() for head in several]
        return [*(block for _, block in self.blocks), *self.adapters.values(), *heads]


@dataclass
class Plan:
    """Subgraphs in the order in which they run: before each stack (None: nothing to do), the stacks, the tails.

    A tail makes the model's outputs from the last stack's; of a program with caches the first makes the logits that
    generation reads, and a second one all else (so it is with an exit's own heads). Every exit of that stack runs the
    tails for its rows; where they ``join`` several stacks, of which none reads another, they run once behind all.

    Of a program with caches ``before`` is what runs once; what runs when their capacity changes is apart. What runs
    for each chunk of tokens (the embedding, say) is part of the stack's first block, or apart too where more than the
    stack needs it.
    """

    before: list[Subgraph | None]
    tables: list[Subgraph | None]
    enter: list[Subgraph | None]
    stacks: list[StackPlan]
    tails: list[Subgraph]
    join: bool = False


def partition(program: Program, segments: int | None = None) -> Plan:
    """Cut the program into subgraphs.

    Every block is one of its own; with ``segments`` each stack's blocks are grouped into about so many of near-equal
    size, cut at its exits in any case. Work that several share and that does not depend on a stack's hidden state
    (masks, position tables, an encoder's output) is done once, before the first stack that can use it.

    Raises:
        SpecError: ``segments`` is not a positive number.
        StructureError: the program has no stack to cut at.
        ExportError: it cannot be cut, for a reason that the message gives.
    """
    if segments is not None and (not isinstance(segments, int) or segments < 1):
        raise SpecError(f"segments={segments!r}: at least one")
    program.require_stacks()
    returned = results(program.graph)
    if fixed := [name for name in program.outputs if returned[name].op == "get_attr"]:
        raise ExportError(f"the outputs {fixed} are weights, whatever the inputs are", hint="a model without them")
    fed = {WIDTH, *(program.cache.graph_inputs if program.cache else ())}
    fed |= {item.places for item in program.groups} | {asked_of(stack) for stack in program.stacks}
    if strange := [item for item in program.records if set(item.graph_inputs) - fed]:
        raise ExportError(
            f"the {strange[0].kind} ({strange[0].summary(program)}) has the inputs {list(strange[0].graph_inputs)}, "
            "and nothing feeds them when a bundle runs",
            hint="leave out the pass that adds it",
        )
    flow = Dataflow(program)
    last = flow.stacks[-1].name
    for item in program.exits:
        if item.stack != last and (item.head == "own" or set(item.scores) & set(OF_LOGITS)):
            raise ExportError(
                f"the exit after block {item.after} of stack {item.stack} has a head or scores of its own outputs, but "
                f"stack {last} runs after it",
                hint="a shared head, and measure=cosine or learned, on every stack but the last",
            )
    wanted = list(requests(flow, segments))
    return _Planner(flow, shared_values(flow, wanted)).plan(wanted)


def whole(program: Program) -> Subgraph:
    """The model's outputs as one subgraph, uncut: what one session for the whole model would run."""
    outputs = unique(results(program.graph)[name] for name in program.outputs)
    inside = {node for node in ancestors(outputs) if node.op == "call_function" and not is_symint(node)}
    inputs = tuple(node for node in program.graph.nodes if node.op == "placeholder" and set(node.users))
    return Subgraph("model", inputs, tuple(outputs), tuple(node for node in program.graph.nodes if node in inside))


def _joins(flow: Dataflow) -> bool:
    """Whether the tails start from several stacks, and no exit of the last one needs them for itself."""
    program, last = flow.program, flow.stacks[-1].name
    ends = [stack.name for stack in flow.stacks if program.next_stack(stack.name) is None]
    alone = any(item.head == "own" or set(item.scores) & set(OF_LOGITS) for item in program.exits_of(last))
    return len(ends) > 1 and not alone and program.cache is None


class _Planner:
    """Subgraphs of requests, and of the shared values that they read."""

    def __init__(self, flow: Dataflow, shared: set[fx.Node]) -> None:
        self.flow, self.shared = flow, shared
        self.stacks = [StackPlan(stack) for stack in flow.stacks]
        self.tails: list[Subgraph] = []
        #: Shared values that something reads, and outputs of the model that are made before the last stack has run.
        self.read: set[fx.Node] = set()
        self.early: set[fx.Node] = set()

    def plan(self, wanted: Iterable[Request]) -> Plan:
        plans = {plan.stack.name: plan for plan in self.stacks}
        for request in wanted:
            if request.kind in ("tail", "rest"):
                self.tails.append(self._tail(request))
            elif request.kind != "entry":
                plans[request.stack].add(request, self._made(request.name, request.outputs, request.stop | self.shared))
        ahead: list[dict[When, Subgraph]] = []
        for index in reversed(range(len(self.stacks))):  # what a stack reads, those before it may have to make
            ahead.insert(0, self._ahead(index))
            self._enter(index, ahead)
        before, tables, enter = ([made.get(when) for made in ahead] for when in WHEN)
        tails = [tail for tail in self.tails if tail.nodes]
        return Plan(before, tables, enter, self.stacks, tails, bool(tails) and _joins(self.flow))

    def _made(self, name: str, outputs: Sequence[fx.Node], stop: Iterable[fx.Node]) -> Subgraph:
        """A subgraph; what it reads has to be made."""
        made = subgraph(name, outputs, stop)
        self.read |= self.shared.intersection(made.inputs)
        return made

    def _tail(self, request: Request) -> Subgraph:
        """A tail without the outputs that do not depend on the last stack: they are made once, not at every exit."""
        last, level = len(self.stacks), self.flow.level
        early = [node for node in request.outputs if level[node] != last]
        self.read |= set(early)
        self.early |= set(early)
        stop = (request.stop | self.shared) - {node for node in self.shared if level[node] == last}
        return self._made(request.name, [node for node in request.outputs if node not in early], stop)

    def _ahead(self, index: int) -> dict[When, Subgraph]:
        """What runs before a stack: its input, and values that are read there or later and can be made by then."""
        flow, stack = self.flow, self.flow.stacks[index]
        entry = entering(flow, stack)
        others = flow.cuts - set(entry)
        known = {node for node in self.shared if (flow.level[node] or 0) <= index}
        made: dict[When, Subgraph] = {}
        for when, name in reversed([*zip(WHEN, ("before", "tables", "enter"), strict=True)]):  # each reads earlier ones
            here = [node for node in flow.program.graph.nodes if node in self.read and flow.level[node] == index]
            outputs = [n for n in unique([*entry, *here]) if n.op == "call_function" and n not in others]
            group = [node for node in outputs if flow.when(node) == when]
            known -= {node for node in known if flow.level[node] == index and flow.when(node) == when}
            if group:
                made[when] = self._made(f"{name}-{stack.name}", group, (flow.cuts - set(group)) | known)
        return made

    def _enter(self, index: int, ahead: list[dict[When, Subgraph]]) -> None:
        """Make what enters a stack part of its first block, which spares every chunk a session's call.

        Unless something outside of the stack reads it. ``ahead`` has what runs before this stack and later ones.
        """
        entry, plan = ahead[0].get("chunk"), self.stacks[index]
        later = [made for each in ahead[1:] for made in each.values()]
        later += [made for other in self.stacks if other is not plan for made in other.subgraphs()]
        if entry is None or set(entry.outputs) & {*self.early, *(arg for made in later for arg in made.inputs)}:
            return
        depth, first = plan.blocks[0]
        read = {arg for made in [*self.tails, *plan.subgraphs()] if made is not first for arg in made.inputs}
        read |= {arg for made in later for arg in made.inputs} | set(self.flow.contents(plan.stack, -1))
        plan.blocks[0] = (depth, joined(entry, first, [node for node in entry.outputs if node in read]))
        del ahead[0]["chunk"]
