"""Masks in the shape of what a stack makes, which the next stack needs from its start."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import tiny
import torch
from breadth import slow_but
from torch import Tensor

from offramp.export import save
from offramp.export.filled import made_early
from offramp.export.prepare import prepared
from offramp.passes import InsertExits, apply
from offramp.program import capture

LIKE: dict[str, Callable[[Tensor], Tensor]] = {
    "ones_like": lambda x: torch.ones_like(x[..., 0], dtype=torch.int64),
    "new_ones": lambda x: x.new_ones(x.shape[:2]).long(),
    "one more": lambda x: x.new_ones((x.shape[0], x.shape[1] + 1)).long()[:, 1:],
    "zeros_like": lambda x: torch.zeros_like(x[..., 0]).long() + 1,
    "new_full": lambda x: x.new_full(x.shape[:2], 1).long(),
    "empty_like": lambda x: torch.empty_like(x[..., 0]).fill_(1).long(),
}


class Lengths(tiny.TwoStacks):
    """The decoder sees the first ``reach`` of what the encoder makes, of half of the tokens where ``halved``."""

    def __init__(self, like: str, halved: bool = False) -> None:
        super().__init__()
        self.like, self.halved = LIKE[like], halved
        self.between = torch.nn.Conv1d(tiny.WIDTH, tiny.WIDTH, 3, 2, 1)

    def forward(self, source_ids: Tensor, reach: Tensor, input_ids: Tensor) -> Tensor:
        x = self.encoder.embed(source_ids)
        x = self.between(x.transpose(1, 2)).transpose(1, 2) if self.halved else x
        for block in self.encoder.blocks:
            x = block(x, None)
        memory = self.encoder.leave(x)
        seen = (self.like(memory).cumsum(1) <= reach[:, None])[:, None, None]
        y = self.decoder.embed(input_ids)
        for block in self.decoder.blocks:
            y = block(y, None, memory, seen)
        logits: Tensor = self.decoder.head(self.decoder.leave(y))
        return logits


def inputs() -> dict[str, Tensor]:
    return {"source_ids": tiny.ids(14, 3, 2), "reach": torch.tensor([7, 3, 5]), "input_ids": tiny.ids(5, 3, 3)}


@pytest.mark.parametrize(
    ("like", "halved"), [("ones_like", True), *slow_but([("ones_like", False)], [(like, False) for like in LIKE])]
)
def test_a_mask_like_what_a_stack_makes_is_made_before_it(tmp_path: Path, like: str, halved: bool) -> None:
    program = capture(tiny.seeded(lambda: Lengths(like, halved)), inputs())
    assert made_early(program)
    assert not made_early(prepared(program))
    first = next(iter(program.stacks))
    save(apply(program, [InsertExits(after=(2,), stack=first)]), tmp_path / "model.offramp")


class Scattered(tiny.Encoder):
    """Each block's output is scattered into zeros of its shape."""

    def run(self, x: Tensor, mask: Tensor | None) -> Tensor:
        for block in self.blocks:
            x = block(x, mask)
            x = torch.zeros_like(x).scatter(-1, x.argsort(-1), x)
        return x


def test_what_is_read_beside_its_like_stays(encoder: tiny.Captured) -> None:
    program = capture(tiny.seeded(Scattered), encoder.inputs)
    assert program.graph.find_nodes(op="call_function", target=torch.ops.aten.zeros_like.default)
    assert not made_early(program)
    assert prepared(program) is program
