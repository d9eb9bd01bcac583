"""Two stacks side by side that end in one tail: exits in both, and the tail runs once, behind the join."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

import offramp
from offramp.program import Program
from offramp.runtime import Chain

BLOCKS = 3
DEPTHS = range(1, BLOCKS + 1)


class Towers(nn.Module):
    """Pixels and words, each through blocks of its own; the means of both make the classes."""

    def __init__(self) -> None:
        super().__init__()
        self.image, self.text = nn.Linear(5, tiny.WIDTH), nn.Embedding(tiny.WORDS, tiny.WIDTH)
        layer = nn.TransformerEncoderLayer(tiny.WIDTH, 2, 24, batch_first=True, norm_first=True)
        self.vision = nn.TransformerEncoder(layer, BLOCKS, enable_nested_tensor=False)
        self.language = nn.TransformerEncoder(layer, BLOCKS, enable_nested_tensor=False)
        for weight in self.language.parameters():
            nn.init.normal_(weight, std=0.2)
        self.head = nn.Linear(2 * tiny.WIDTH, 3)

    def forward(self, pixels: Tensor, ids: Tensor) -> dict[str, Tensor]:
        image, text = self.vision(self.image(pixels)).mean(1), self.language(self.text(ids)).mean(1)
        return {"logits": self.head(torch.cat([image, text], -1)), "image": image}


@pytest.fixture(scope="module")
def program() -> Program:
    model = tiny.seeded(Towers)
    inputs = {"pixels": torch.randn(4, 6, 5), "ids": torch.randint(0, tiny.WORDS, (4, 3))}
    return offramp.apply(
        offramp.capture(model, inputs),
        "insert-exits{stack=vision},insert-exits{stack=encoder},insert-adapter{stack=vision,after=1,kind=linear},"
        "insert-scores{stack=vision,measure=cosine}",
    )


@pytest.fixture(scope="module")
def chain(program: Program, tmp_path_factory: pytest.TempPathFactory) -> Chain:
    path = tmp_path_factory.mktemp("towers") / "m.offramp"
    offramp.save(program, path)
    return offramp.load(path)


def arrays(program: Program) -> dict[str, NDArray[Any]]:
    return {name: tensor.numpy() for name, tensor in program.example_inputs.items()}


def truncated(program: Program, vision: int, language: int) -> dict[str, NDArray[Any]]:
    for stack, after in (("vision", vision), ("encoder", language)):
        if after < BLOCKS:
            program = offramp.apply(program, f"truncate{{stack={stack},after={after}}}")
    with torch.no_grad():
        made = program.module(**program.example_inputs)
    return {name: made[name].numpy() for name in program.outputs}


def test_the_tail_belongs_to_the_join(program: Program, chain: Chain) -> None:
    stages = [stage.stack or stage.segment for stage in chain.manifest.stages]
    assert stages[-1] == "tail"
    assert not any(exit_.outputs for stack in chain.stacks.values() for exit_ in stack.exits)
    result = chain.run(arrays(program), lambda state: state.rows % 2 == 0)
    assert [timing.rows for timing in result.trace if timing.segment == "tail"] == [4]


@pytest.mark.parametrize(("vision", "language"), list(itertools.product(DEPTHS, DEPTHS)))
def test_each_combination_is_the_truncated_program(program: Program, chain: Chain, vision: int, language: int) -> None:
    found = chain.run(arrays(program), offramp.Depth({"vision": vision, "encoder": language}))
    assert {name: set(rows.tolist()) for name, rows in found.exits.items()} == {
        "vision": {vision},
        "encoder": {language},
    }
    for name, expected in truncated(program, vision, language).items():
        np.testing.assert_allclose(found.outputs[name], expected, rtol=1e-4, atol=1e-5)


def test_rows_leave_each_tower_on_their_own(program: Program, chain: Chain) -> None:
    vision, language = np.array([1, 3, 2, 1]), np.array([2, 1, 3, 1])
    at = {"vision": vision, "encoder": language}
    found = chain.run(arrays(program), lambda state: at[state.stack][state.rows] == state.after)
    assert [found.exits[name].tolist() for name in at] == [vision.tolist(), language.tolist()]
    for row, (a, b) in enumerate(zip(vision.tolist(), language.tolist(), strict=True)):
        expected = truncated(program, a, b)
        for name in program.outputs:
            np.testing.assert_allclose(found.outputs[name][row], expected[name][row], rtol=1e-4, atol=1e-5)


def test_an_exit_that_asks_the_classes_runs_the_tail_itself(program: Program, tmp_path: Path) -> None:
    scored = offramp.apply(program, "insert-scores{stack=encoder,measure=top1}")
    offramp.save(scored, tmp_path / "m.offramp")
    chain = offramp.load(tmp_path / "m.offramp")
    assert chain.manifest.stages[-1].stack == "encoder"
    policy = offramp.Each({"vision": offramp.Depth({"vision": 2}), "encoder": offramp.Confidence(0.0)})
    found = chain.run(arrays(program), policy)
    assert found.exits["encoder"].tolist() == [1] * 4
    for name, expected in truncated(program, 2, 1).items():
        np.testing.assert_allclose(found.outputs[name], expected, rtol=1e-4, atol=1e-5)
