"""Objectives compute the formulas of their papers, and gradients go where they should."""

from __future__ import annotations

import copy
import dataclasses
import functools
from typing import Any

import pytest
import tiny
import torch
from torch import Tensor
from torch.nn import functional as F

import offramp
from offramp.errors import SpecError
from offramp.training.losses import IGNORED, aligned
from offramp.training.objective_module import ObjectiveModule
from offramp.training.objectives import (
    CrossEntropy,
    DeepSupervision,
    DepthWeighted,
    LearnedGates,
    Objective,
    SelfDistillation,
    Together,
    _AtExits,
    require_next,
)

PIPELINE = "insert-exits{after=1|2},insert-adapter{kind=linear},insert-scores{measure=learned}"


@functools.cache
def captured(pipeline: str) -> offramp.Program:
    torch.manual_seed(4)
    return offramp.apply(offramp.capture(tiny.Talker(), {"input_ids": tiny.ids()}), pipeline)


def program(pipeline: str = PIPELINE) -> offramp.Program:
    shared = captured(pipeline)
    return dataclasses.replace(shared, graph_module=copy.deepcopy(shared.graph_module))


def batch(*, ignored: int = 2) -> dict[str, Tensor]:
    ids = tiny.ids(seed=5)
    labels = (ids + 1) % tiny.WORDS
    labels[:, :ignored] = IGNORED
    return {"input_ids": ids, "labels": labels}


def losses(made: offramp.Program, objective: Objective, step: int = 0, **changes: Any) -> dict[str, Tensor]:
    found: dict[str, Tensor] = ObjectiveModule(made, objective)({**batch(), **changes}, step)
    return found


def logits(made: offramp.Program) -> dict[int, Tensor]:
    found = made.module(input_ids=batch()["input_ids"])
    return {1: found["decoder.1/output"], 2: found["decoder.2/output"], 4: found["output"]}


def plain(values: Tensor) -> Tensor:
    labels = batch()["labels"]
    return F.cross_entropy(values[:, 2:].flatten(0, 1), labels[:, 2:].flatten())


def test_deep_supervision_is_the_mean_and_the_last_once_more() -> None:
    made = program()
    each = {after: plain(values) for after, values in logits(made).items()}
    expected = sum(each.values()) / 3 + each[4]
    torch.testing.assert_close(sum(losses(made, DeepSupervision()).values()), expected)


def test_drawn_exits_stand_for_all() -> None:
    made = program()
    whole = sum(losses(made, DeepSupervision()).values())
    drawn = [losses(made, DeepSupervision(sample=1), step) for step in range(40)]
    assert {key for found in drawn for key in found} == {"final", "exit 1", "exit 2"}
    assert all(len(found) == 2 for found in drawn)
    totals = {key: sum(f.values()) for f in drawn for key in f if key != "final"}
    torch.testing.assert_close(sum(totals.values()) / 2, whole)


def test_the_same_step_draws_the_same() -> None:
    objective = DeepSupervision(sample=1, seed=3)
    made = program()
    assert [objective.wants(made, step) for step in range(9)] == [objective.wants(made, step) for step in range(9)]
    assert len({tuple(objective.wants(made, step)) for step in range(9)}) == 2


def test_weights_replace_the_mean() -> None:
    made = program()
    each = {after: plain(values) for after, values in logits(made).items()}
    found = losses(made, DeepSupervision(weights={1: 0.5, 4: 2.0}))
    torch.testing.assert_close(sum(found.values()), 0.5 * each[1] + 2 * each[4])


def test_depth_weighted_cross_entropy() -> None:
    made = program()
    each = {after: plain(values) for after, values in logits(made).items()}
    found = losses(made, DepthWeighted(alpha=0.0))
    torch.testing.assert_close(sum(found.values()), (each[1] + 2 * each[2] + 4 * each[4]) / 7)


def test_layers_follow_those_spread_over_the_stack_which_do_not_follow_them() -> None:
    made = program()
    cuts = made.stacks["decoder"].cuts
    hidden = ObjectiveModule(made, Objective()).values(cuts, batch())
    expected = (F.mse_loss(hidden[cuts[1]], hidden[cuts[2]]) + F.mse_loss(hidden[cuts[2]], hidden[cuts[4]])) / 2
    found = losses(made, DepthWeighted(alpha=0.5, align="unif"))["layers"]
    torch.testing.assert_close(found, 0.5 * expected)
    found.backward()
    weights = dict(made.module.named_parameters())
    assert weights["blocks.0.mlp.0.weight"].grad is not None
    assert weights["blocks.3.mlp.0.weight"].grad is None


def test_dynamic_alignment_goes_down_with_both() -> None:
    students = [torch.full((1,), float(value)) for value in (0, 5, 9)]
    teachers = [torch.full((1,), float(value)) for value in (8, 1, 6)]
    pairs = [(int(a), int(b)) for a, b in aligned(students, teachers, "dyna")]
    assert pairs == [(5, 6), (0, 1)]  # the deepest first; what is left for the third lies below nothing
    assert [(int(a), int(b)) for a, b in aligned(students, teachers, "last")] == [(9, 6)]
    assert [(int(a), int(b)) for a, b in aligned(students, teachers, "unif")] == [(0, 8), (5, 1), (9, 6)]


def test_self_distillation_is_the_divergence_and_teaches_exits_only() -> None:
    made = program()
    values = {after: found[:, 2:].flatten(0, 1) for after, found in logits(made).items()}
    teacher = (values[4] / 2).log_softmax(-1)
    expected = sum(
        4 * (teacher.exp() * (teacher - (values[after] / 2).log_softmax(-1))).sum(-1).mean()
        + 0.5 * F.cross_entropy(values[after] / 2, values[4].argmax(-1))
        for after in (1, 2)
    )
    found = losses(made, SelfDistillation(temperature=2.0, hard=0.5))
    torch.testing.assert_close(sum(found.values()), expected / 2)
    sum(found.values()).backward()  # type: ignore[union-attr]
    weights = dict(made.module.named_parameters())
    assert weights["blocks.3.mlp.0.weight"].grad is None
    assert weights["exits.decoder.1.adapter.linear.weight"].grad is not None


def test_self_distillation_needs_no_labels() -> None:
    found = ObjectiveModule(program(), SelfDistillation())({"input_ids": tiny.ids()}, 0)
    assert all(torch.isfinite(loss) for loss in found.values())


def test_gates_weigh_both_answers_the_same() -> None:
    final = F.one_hot(torch.tensor([[1, 2, 3, 4]]), 5).float()
    exit_ = F.one_hot(torch.tensor([[1, 2, 3, 0]]), 5).float()  # one of four is wrong
    score = torch.tensor([[0.9, 0.8, 0.7, 0.4]])
    values = {"output": final} | {
        f"decoder.{after}/{name}": value for after in (1, 2) for name, value in (("output", exit_), ("learned", score))
    }
    found = LearnedGates().losses(captured(PIPELINE), values, {})
    expected = -(score[0, :3].log().mean() + (1 - score[0, 3]).log()) / 2
    torch.testing.assert_close(found["gate 1"], expected / 2)


def test_gates_of_one_answer_only_stay_finite() -> None:
    same = F.one_hot(torch.tensor([[1, 2]]), 5).float()
    values = {"output": same} | {
        f"decoder.{after}/{name}": value
        for after in (1, 2)
        for name, value in (("output", same), ("learned", torch.tensor([[1.0, 0.0]])))
    }
    found = LearnedGates().losses(captured(PIPELINE), values, {})
    assert all(torch.isfinite(loss) for loss in found.values())


def test_objectives_together_add_up() -> None:
    made = program()
    found = losses(made, Together((SelfDistillation(), LearnedGates())))
    apart = [losses(made, SelfDistillation()), losses(made, LearnedGates())]
    torch.testing.assert_close(sum(found.values()), sum(sum(part.values()) for part in apart))
    assert "LearnedGates: gate 1" in found


class Numbers(tiny.Talker):
    """One number for each token, as a regression has, and the logits of before."""

    def forward(self, input_ids: Tensor) -> dict[str, Tensor]:  # type: ignore[override]
        logits = super().forward(input_ids)
        return {"number": logits[..., :1], "rows": logits.mean((1, 2)), "start": logits[..., 0], "logits": logits}


@pytest.fixture(scope="module")
def numbers() -> offramp.Program:
    captured = offramp.capture(tiny.seeded(Numbers), {"input_ids": tiny.ids()})
    return offramp.apply(captured, "insert-exits{after=1},insert-scores{measure=learned}")


def test_two_of_a_kind_are_both_learned(numbers: offramp.Program) -> None:
    """As for the start and the end of a question's answer."""
    given = {"input_ids": tiny.ids()}
    one, other = (ObjectiveModule(numbers, SelfDistillation(output=name))(given, 0) for name in ("start", "logits"))
    both = ObjectiveModule(numbers, Together((SelfDistillation(output="start"), SelfDistillation(output="logits"))))
    found = both(given, 0)
    assert list(found) == ["SelfDistillation 1: exit 1", "SelfDistillation 2: exit 1"]
    torch.testing.assert_close([*found.values()], [one["exit 1"], other["exit 1"]])
    assert one["exit 1"] != other["exit 1"]


@pytest.mark.parametrize(
    ("objective", "match"),
    [
        (DeepSupervision(stack="encoder"), "unknown stack"),
        (DeepSupervision(output="words"), "which output holds logits"),
        (DeepSupervision(sample=0), "at least one"),
        (DeepSupervision(weights={3: 1.0}), r"weights for \[3\]"),
        (DepthWeighted(align="first"), "dyna, unif and last"),  # type: ignore[arg-type]
        (LearnedGates(), "no learned gate"),
        (CrossEntropy("words"), "no output 'words'"),
        (Together((LearnedGates(),)), "no learned gate"),
    ],
)
def test_what_the_program_lacks_is_named(objective: Objective, match: str) -> None:
    with pytest.raises(SpecError, match=match):
        objective.check(program("insert-exits{after=1|2}"))


@pytest.mark.parametrize("output", ["number", "rows"])
@pytest.mark.parametrize("objective", [CrossEntropy, DeepSupervision, DepthWeighted, SelfDistillation, LearnedGates])
def test_what_has_no_classes_teaches_nothing(
    numbers: offramp.Program, objective: type[_AtExits | CrossEntropy], output: str
) -> None:
    """Any two answers of one class agree, and the loss would be 0 from the start."""
    objective(output="logits").check(numbers)
    objective(output="start").check(numbers)
    with pytest.raises(SpecError, match=rf"output '{output}' .*has no classes.*\n  try: an Objective of your own"):
        objective(output=output).check(numbers)


@pytest.mark.parametrize("objective", [CrossEntropy("output"), DeepSupervision(), DepthWeighted()])
def test_a_language_model_is_not_taught_what_it_is_given(objective: Objective) -> None:
    """As where a library shifts labels itself: the loss falls fast, and the model has learned to copy."""
    made = program("insert-exits{after=1|2}")
    ids = tiny.ids(seed=5)
    own, following = ids.clone(), ids.roll(-1, 1)
    own[0, :2], following[:, -1] = IGNORED, IGNORED
    with pytest.raises(SpecError, match=r"tokens of 'input_ids' in their own places.*\n  try: .* = input_ids\[:, 1:\]"):
        losses(made, objective, labels=own)
    assert losses(made, objective, labels=following)
    constant = torch.full_like(ids, 3)
    assert losses(made, objective, input_ids=constant, labels=constant)


def test_a_translator_may_copy_its_source(two_stacks: tiny.Captured) -> None:
    given = tiny.two_texts()
    require_next(two_stacks.program, {**given, "labels": given["source_ids"]})
    with pytest.raises(SpecError, match="tokens of 'input_ids' in their own places"):
        require_next(program(), {"input_ids": given["input_ids"], "labels": given["input_ids"]})


@pytest.mark.parametrize("labels", [None, torch.zeros(2, 3, dtype=torch.int64)])
def test_labels_that_do_not_fit_are_named(labels: Tensor | None) -> None:
    given = {"input_ids": tiny.ids()} | ({} if labels is None else {"labels": labels})
    with pytest.raises(SpecError, match="labels of shape"):
        ObjectiveModule(program(), DeepSupervision())(given, 0)
