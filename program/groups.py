"""Groups of tokens that leave an encoder apart: the patches of an image and the words of a question, say."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Any, ClassVar

import torch

from offramp.bundle.expressions import evaluate
from offramp.bundle.manifest import Group
from offramp.program.graph import placeholders, results, run, shape
from offramp.program.record import Record

if TYPE_CHECKING:
    from offramp.program.program import Program

__all__ = ["Group", "Groups", "left_early", "token_axis"]


@dataclass(frozen=True)
class Groups(Record):
    """The tokens of a stack in groups, one behind the other, that leave it at exits of their own.

    A group that has left stays visible: the others go on attending to its last states.
    """

    kind: ClassVar[str] = "groups"

    stack: str
    groups: tuple[Group, ...]

    @property
    def section(self) -> str:
        """The stack."""
        return self.stack

    @property
    def places(self) -> str:
        """The input of the exported graph that says which tokens have not left: int64 [batch, tokens that have not]."""
        return f"{self.stack}_places"

    @property
    def graph_inputs(self) -> tuple[str, ...]:
        """The places, where they have become an input: nobody who runs the captured model knows of them."""
        return (self.places,)

    def counts(self, program: Program, inputs: Mapping[str, torch.Tensor]) -> list[int]:
        """How many tokens each group has for these inputs."""
        sizes = program.sizes(inputs)
        return [evaluate(group.tokens, sizes) for group in self.groups]

    def scores(self, counts: Sequence[int]) -> list[int]:
        """How many scores each group has, for so many tokens of each."""
        return [group.scores(count) for group, count in zip(self.groups, counts, strict=True)]

    def by_token(self, depths: torch.Tensor, counts: Sequence[int]) -> torch.Tensor:
        """The depth of each token [batch, tokens], of depths for each score [batch, scores]."""
        times = [
            1 if group.alone else count
            for group, count in zip(self.groups, counts, strict=True)
            for _ in range(group.scores(count))
        ]
        return depths.repeat_interleave(torch.tensor(times, device=depths.device), 1)

    def total(self, program: Program) -> int:
        """How many tokens there are in the example."""
        return sum(self.counts(program, program.example_inputs))

    def summary(self, program: Program) -> str:
        """The groups and their tokens."""
        found = (f"{group.name} ({group.tokens}{', each alone' if group.alone else ''})" for group in self.groups)
        return f"tokens in groups: {', '.join(found)}"


def token_axis(program: Program, hidden: str) -> int:
    """The axis of tokens of a hidden state: the first that neither counts rows, or is one row, nor is the last one."""
    node = program.nodes[hidden]
    place = program.axes.batch_axis(node)
    if place is None:
        return next((axis for axis, size in enumerate(shape(node)[:-1]) if size != 1), 0)
    return next(axis for axis in range(len(shape(node))) if axis != place[0])


def left_early(
    program: Program, inputs: Mapping[str, torch.Tensor], depths: Mapping[str, torch.Tensor]
) -> dict[str, torch.Tensor]:
    """What the graph returns where groups of tokens leave stacks early, and stay visible there as they are.

    Args:
        program: one with `Groups`.
        inputs: as the graph takes them.
        depths: for each of these stacks, after how many blocks each group of each row leaves, int64 [batch, groups];
            of a group whose tokens leave alone there is one for each token.

    Returns:
        The outputs by name; gradients flow through them.
    """
    values: dict[Any, Any] = {node: inputs[name] for name, node in placeholders(program.graph).items()}
    order = [node for node in program.graph.nodes if node.op != "output"]
    places = {node: at for at, node in enumerate(order)}
    blocks = [
        (places[program.nodes[after]], item, depth, program.nodes[before], program.nodes[after])
        for item in program.groups
        if item.stack in depths
        for depth, (before, after) in enumerate(pairwise(program.stacks[item.stack].cuts), 1)
    ]
    done = 0
    for at, item, depth, before, after in sorted(blocks, key=lambda block: block[0]):
        run(program.graph_module, order[done : at + 1], values)
        done = at + 1
        by_token = item.by_token(depths[item.stack], item.counts(program, inputs))[..., None]
        if token_axis(program, program.stacks[item.stack].input) == 0:
            by_token = by_token.transpose(0, 1)
        values[after] = torch.where(by_token >= depth, values[after], values[before])
    run(program.graph_module, order[done:], values)
    return {name: values[node] for name, node in results(program.graph).items()}
