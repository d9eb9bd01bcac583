"""Training what comes behind encoders, and the encoders themselves, for every depth at which they may be left."""

from __future__ import annotations

import random
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from offramp.errors import SpecError
from offramp.program.groups import Groups, token_axis
from offramp.program.program import Program
from offramp.training.losses import Values
from offramp.training.objective_module import ObjectiveModule
from offramp.training.objectives import Objective, require_one_run


@dataclass(frozen=True)
class EncoderDepths(Objective):
    """A task's losses where each row leaves the encoders at random exits; groups of tokens (MuE) each at their own.

    So a decoder learns to read every depth, and every depth to be read. Task ``DeepSupervision`` is MuE's layer-wise
    task loss beside it (arXiv 2211.11152, sec. 3.3), which trains the decoder's depths alone.

    Attributes:
        task: What is minimised; one that needs a single run of the program.
        full: The share of rows that go to full depth everywhere, 0 to 1; the others draw from all exits, and full
            depth, with the same probability.
        seed: Of the draws.
    """

    task: Objective
    full: float = 0.25
    seed: int = 0

    def check(self, program: Program) -> None:
        require_one_run(self.task)
        self.task.check(program)
        if not 0 <= self.full <= 1:
            raise SpecError(f"full={self.full}: a share of the rows, from 0 to 1")
        if not self.stacks(program):
            raise SpecError(
                "no stack with exits is followed by another one", hint="insert-exits{stack=encoder}, before a decoder"
            )
        if program.axes.batch is None:
            raise SpecError("the program's rows are not computed apart", hint="a model with a batch axis")

    def stacks(self, program: Program) -> list[str]:
        """The stacks that rows leave early: those with exits that other stacks follow, or whose groups leave apart."""
        names = {item.stack for item in program.exits if not item.outputs} | {item.stack for item in program.groups}
        return [name for name in program.stacks if name in names and self._early(program, name)]

    def drawn(self, program: Program, step: int, rows: int, batch: Values) -> dict[str, Tensor]:
        """After how many blocks rows leave in this step, by stack: int64 [rows, groups], one column without groups.

        Of a group whose tokens leave alone there is a column for each.
        """
        drawn = torch.Generator().manual_seed(random.Random(f"{self.seed} {step}").getrandbits(62))
        whole = torch.rand(rows, 1, generator=drawn) < self.full
        found = {}
        for name in self.stacks(program):
            blocks, groups = program.stacks[name].blocks, program.groups_of(name)
            depths = torch.tensor([*self._early(program, name), blocks])
            count = 1 if groups is None else sum(groups.scores(groups.counts(program, batch)))
            some = depths[torch.randint(len(depths), (rows, count), generator=drawn)]
            found[name] = torch.where(whole, blocks, some)
        return found

    def compute(self, model: ObjectiveModule, batch: Values, step: int) -> dict[str, Tensor]:
        program, given = model.program, dict[str, Tensor]()
        depths: Mapping[str, Tensor] | None = None
        for name in self.stacks(program):
            stack, groups = program.stacks[name], program.groups_of(name)
            first = model.values([stack.input], batch, given)[stack.input]
            place = program.axes.batch_axis(program.nodes[stack.input])
            assert place is not None  # see check
            depths = depths or self.drawn(program, step, first.shape[place[0]] // place[1], batch)
            drawn = depths[name].to(first.device)
            given[stack.output] = (
                _left(model, batch, name, drawn, given)
                if groups is None
                else _left_in_groups(model, batch, groups, drawn, {**given, stack.input: first})
            )
        wanted = self.task.wants(program, step)
        return self.task.losses(program, model.values(wanted, batch, given), batch)

    def _early(self, program: Program, name: str) -> list[int]:
        blocks = program.stacks[name].blocks
        return [item.after for item in program.exits_of(name) if item.after < blocks]


def _left(model: ObjectiveModule, batch: Values, name: str, depths: Tensor, given: Values) -> Tensor:
    """What stands for a stack's output where each row leaves at its depth, [rows, 1]."""
    program = model.program
    stack = program.stacks[name]
    states = {item.after: item.state for item in program.exits_of(name) if item.after < stack.blocks}
    found = model.values([*states.values(), stack.output], batch, given)
    axis, factor = program.axes.batch_axis(program.nodes[stack.output]) or (0, 1)
    made = found[stack.output]
    sizes = [-1 if i == axis else 1 for i in range(made.dim())]
    for after, state in states.items():
        leaves = (depths[:, 0] == after).repeat_interleave(factor).reshape(sizes)
        made = torch.where(leaves, found[state], made)
    return made


def _left_in_groups(model: ObjectiveModule, batch: Values, item: Groups, depths: Tensor, given: Values) -> Tensor:
    """The same where groups of tokens leave at their depths, [rows, groups], and stay as they are."""
    program = model.program
    stack = program.stacks[item.stack]
    by_token = item.by_token(depths, item.counts(program, batch))[..., None]
    by_token = by_token if token_axis(program, stack.input) == 1 else by_token.transpose(0, 1)
    others = {name: value for name, value in given.items() if name != stack.input}
    state = given[stack.input]
    for depth in range(1, stack.blocks + 1):
        before, after = stack.cuts[depth - 1], stack.cuts[depth]
        made = model.values([after], batch, {**others, before: state})[after]
        state = torch.where(by_token >= depth, made, state)
    return state
