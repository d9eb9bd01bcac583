"""EncoderDepths: the task's loss where rows and groups of tokens leave encoders at drawn exits."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from two_modalities import captured, inputs

import offramp
from offramp.errors import SpecError
from offramp.program import Program
from offramp.program.groups import left_early
from offramp.training import CrossEntropy, DeepSupervision, EncoderDepths, Together, fit
from offramp.training.objective_module import ObjectiveModule
from offramp.training.width_objectives import LearnerDistillation

JOINT = "split-modalities,insert-exits{stack=encoder,after=1|2}"
SEPARATE = (
    "split-modalities{form=separate},insert-exits{stack=encoder.image,after=1},insert-exits{stack=encoder.text,after=2}"
)


def program(pipeline: str, **how: Any) -> Program:
    return offramp.apply(copy.deepcopy(captured(**how)), pipeline)


def batch(decodes: bool = True) -> dict[str, Tensor]:
    labels = torch.randint(0, 30, (3, 5) if decodes else (3,), generator=torch.Generator().manual_seed(3))
    return {**inputs(decodes), "labels": labels}


def loss(made: Program, objective: EncoderDepths, step: int = 0, decodes: bool = True) -> Tensor:
    return sum(ObjectiveModule(made, objective)(batch(decodes), step).values(), torch.zeros(()))


def of_logits(logits: Tensor) -> Tensor:
    labels = batch(logits.dim() == 3)["labels"]
    return F.cross_entropy(logits.flatten(0, -2), labels.flatten())


@pytest.mark.parametrize("how", [{}, {"decodes": False}, {"first": "text"}])
@pytest.mark.parametrize("step", range(3))
def test_groups_leave_where_they_are_drawn(how: dict[str, Any], step: int) -> None:
    made, objective = program(JOINT, **how), EncoderDepths(CrossEntropy(), full=0.2)
    depths = objective.drawn(made, step, 3, batch())
    assert depths["encoder"].shape == (3, 2)
    expected = left_early(made, made.fresh(inputs(how.get("decodes", True))), depths)["logits"]
    torch.testing.assert_close(loss(made, objective, step, how.get("decodes", True)), of_logits(expected))


def test_stacks_of_groups_leave_where_they_are_drawn() -> None:
    made, objective = program(SEPARATE), EncoderDepths(CrossEntropy(), full=0.0)
    drawn = objective.drawn(made, 0, 3, batch())
    assert {name: depth.shape for name, depth in drawn.items()} == {"encoder.image": (3, 1), "encoder.text": (3, 1)}
    rows = []
    for row in range(3):
        cuts = {name: int(depth[row]) for name, depth in drawn.items()}
        text = ",".join(f"truncate{{stack={name},after={depth}}}" for name, depth in cuts.items() if depth < 3)
        short = offramp.apply(made, text) if text else made
        rows.append(short.module(**inputs())["logits"][row])
    torch.testing.assert_close(loss(made, objective), of_logits(torch.stack(rows)))


def test_rows_at_full_depth_are_the_task() -> None:
    made = program(JOINT)
    torch.testing.assert_close(
        loss(made, EncoderDepths(CrossEntropy(), full=1.0)), of_logits(made.module(**inputs())["logits"])
    )


def test_draws_are_of_all_exits_and_differ_by_step() -> None:
    made, objective = program(JOINT), EncoderDepths(CrossEntropy(), full=0.0, seed=1)
    seen = torch.cat([objective.drawn(made, step, 3, batch())["encoder"] for step in range(40)])
    assert set(seen.flatten().tolist()) == {1, 2, 3}
    assert (seen[:, 0] != seen[:, 1]).any()
    again = EncoderDepths(CrossEntropy(), full=0.0, seed=1).drawn(made, 7, 3, batch())["encoder"]
    assert torch.equal(again, objective.drawn(made, 7, 3, batch())["encoder"])
    assert (EncoderDepths(CrossEntropy(), full=0.5).drawn(made, 0, 400, batch())["encoder"] == 3).all(
        1
    ).float().mean() > 0.4


def test_it_trains_every_depth_with_deep_supervision_of_the_decoder() -> None:
    made = program(f"{JOINT},insert-exits{{stack=decoder}}")
    task = DeepSupervision(stack="decoder")
    depths = {"encoder": torch.tensor([[1, 2]] * 3)}

    def early() -> float:
        with torch.no_grad():
            return float(of_logits(left_early(made, made.fresh(inputs()), depths)["logits"]))

    before = early()
    curve = fit(made, [batch()] * 12, EncoderDepths(task), train="all", rate=3e-3)
    assert early() < before - 0.3
    assert {"final", "exit 1"} <= set(curve[-1].losses)


def test_refusals_say_why() -> None:
    plain = captured()
    with pytest.raises(SpecError, match="no stack with exits is followed by another one"):
        EncoderDepths(CrossEntropy()).check(plain)
    with pytest.raises(SpecError, match=r"full=1.5: a share"):
        EncoderDepths(CrossEntropy(), full=1.5).check(program(JOINT))
    with pytest.raises(SpecError, match="LearnerDistillation cannot be part of another objective"):
        EncoderDepths(LearnerDistillation(plain)).check(program(JOINT))
    with pytest.raises(SpecError, match="EncoderDepths cannot be part of another objective"):
        Together((EncoderDepths(CrossEntropy()),)).check(program(JOINT))
