"""A program and an objective as one module: batches in, losses out."""

from __future__ import annotations

import copy
from collections.abc import Callable, Collection, Iterable
from typing import Any, TypeVar

import torch
from torch import Tensor, fx

from offramp.errors import SpecError
from offramp.passes.infra.contract import stack_named
from offramp.program.graph import copied, results
from offramp.program.program import Program
from offramp.training.batches import Batch, Batches, epoch_of, require_batches, tensors
from offramp.training.objectives import Objective

Known = TypeVar("Known")


class ObjectiveModule(torch.nn.Module):
    """Computes what an objective wants of a batch, and no more: of exits that it does not ask for, nothing runs.

    A batch may hold values of the nodes that the program's stacks and records refer to, hidden states say, under the
    nodes' names (see `remember`): what makes them does not run, and inputs that only that would read may be left out.

    The objective's teacher is part of it, so that it is where the program is; it is frozen and in eval mode. With
    ``apart`` it has weights of its own: those that it shares with the program would be trained with it.
    """

    def __init__(self, program: Program, objective: Objective, *, apart: bool = False) -> None:
        super().__init__()
        self.module = program.module
        self.program, self.objective = program, objective
        teacher = objective.teacher
        if teacher is not None and apart:
            teacher = copy.deepcopy(teacher)
        self.teacher = None if teacher is None else ObjectiveModule(teacher, Objective())
        self._parts: dict[tuple[tuple[str, ...], ...], fx.GraphModule] = {}
        self._known: dict[str, Any] = {}

    def train(self, mode: bool = True) -> ObjectiveModule:
        """The program's mode; a teacher stays in eval mode."""
        super().train(mode)
        if self.teacher is not None:
            self.teacher.eval()
        return self

    def forward(self, batch: Batch, step: int) -> dict[str, Tensor]:
        """The losses by name; their sum is what is minimised."""
        return self.objective.compute(self, batch, step)

    def known(self, name: str, find: Callable[[], Known]) -> Known:
        """What follows from the program or the teacher alone, ``name``, and so is found at the first step only."""
        if name not in self._known:
            self._known[name] = find()
        found: Known = self._known[name]
        return found

    def taught(self, wanted: Iterable[str], batch: Batch, given: Batch | None = None) -> dict[str, Tensor]:
        """What the teacher makes of a batch, by name as in `values`, without gradient."""
        assert self.teacher is not None
        with torch.no_grad():
            return self.teacher.values(wanted, batch, given)

    def values(self, wanted: Iterable[str], batch: Batch, given: Batch | None = None) -> dict[str, Tensor]:
        """Outputs of the program, or values of nodes, by name; ``given`` are values of nodes that do not run."""
        known = tuple(sorted({*(self.program.pinned & batch.keys()), *(given or ())}))
        batch = {**batch, **(given or {})}
        wanted = list(wanted)
        if unknown := sorted({*wanted} - results(self.module.graph).keys() - self.program.nodes.keys()):
            raise SpecError(
                f"the program has no outputs or nodes {unknown}; its outputs are {list(results(self.module.graph))}"
            )
        part = self._part(tuple(sorted(set(wanted))), known)
        needed = [str(node.target) for node in part.graph.find_nodes(op="placeholder")]
        if missing := [name for name in needed if name not in batch]:
            raise SpecError(f"the batch lacks the inputs {missing}; it has {sorted(batch)}")
        found: dict[str, Tensor] = part(**{name: batch[name] for name in needed})
        return found

    def _part(self, wanted: tuple[str, ...], known: tuple[str, ...]) -> fx.GraphModule:
        """The graph that returns just ``wanted`` and takes ``known`` nodes from outside."""
        if (wanted, known) in self._parts:
            return self._parts[wanted, known]
        graph = copied(self.module.graph)
        nodes = {node.name: node for node in graph.nodes}
        returned = {**nodes, **results(graph)}
        graph.output_node().args = ({name: returned[name] for name in wanted},)
        for name in known:
            with graph.inserting_before(next(iter(graph.nodes))):
                given = graph.placeholder(f"given_{name}")
            given.target = name
            nodes[name].replace_all_uses_with(given)
        graph.eliminate_dead_code(lambda node: node.op == "output")
        for node in graph.find_nodes(op="placeholder"):
            if not node.users:
                graph.erase_node(node)
        made = fx.GraphModule(self.module, graph, "Part")  # the same weights and dropout modules
        self._parts[wanted, known] = made
        return made


def remember(
    program: Program, batches: Batches, stack: str, keep: Collection[str] = (), dtype: torch.dtype | None = None
) -> list[dict[str, Tensor]]:
    """The batches with the hidden states of a stack's exits in them, so that training what was added runs no block.

    A frozen model makes the same of the same batch at every epoch: it runs once, here, in eval mode. Batches are what
    ``fit`` takes; of their own tensors those named in ``keep`` (a name, or several) and ``labels`` stay. ``dtype`` is
    what hidden states are stored as.

    Raises:
        SpecError: there is no such stack, a batch does not fit the program, or has nothing of a name to keep.
    """
    stack_named(program, stack)
    require_batches(batches)
    if dtype is not None and not (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
        raise SpecError(f"dtype={dtype!r}: what floats are stored as", hint="dtype=torch.bfloat16")
    kept_names = {keep} if isinstance(keep, str) else {*keep}
    model = ObjectiveModule(program, Objective())
    model.eval()
    names = [item.hidden for item in program.exits_of(stack)] + [program.stacks[stack].output]
    found = []
    device = next(program.module.parameters()).device
    for place, given in enumerate(epoch_of(batches, 0)):
        try:
            batch = tensors(program, given, device)
            if lacking := sorted(kept_names - batch.keys()):
                raise SpecError(f"keep={lacking}: the batch has {sorted(batch)}")
            with torch.no_grad():
                states = model.values(names, batch)
        except SpecError as error:
            raise SpecError(f"batch {place}: {error.reason}", hint=error.hint) from error
        kept = {name: value for name, value in batch.items() if name in {*kept_names, "labels"}}
        found.append({**kept, **{name: value.to(dtype) if dtype else value for name, value in states.items()}})
    return found
