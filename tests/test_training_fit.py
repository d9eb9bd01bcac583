"""The training loop: what it changes, what it does not, and what happens when it is cut off."""

from __future__ import annotations

import copy
import dataclasses
import functools
import hashlib
import json
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any, Literal

import pytest
import tiny
import torch
from safetensors.torch import load_file
from test_dropout import Dropping
from torch import Tensor

import offramp
from offramp.errors import SpecError, TrainingError
from offramp.training import fit_options
from offramp.training.fit_options import computes_bf16
from offramp.training.fitting import fit
from offramp.training.objective_module import ObjectiveModule, remember
from offramp.training.objectives import (
    CrossEntropy,
    DeepSupervision,
    DepthWeighted,
    LearnedGates,
    Objective,
    SelfDistillation,
    Together,
)
from offramp.training.training_run import CurvePoint
from offramp.training.weights import added, load_weights, save_weights

PIPELINE = "insert-exits{after=1|2},insert-adapter{kind=linear},insert-scores{measure=learned}"
Batch = dict[str, Tensor]


@functools.cache
def captured(pipeline: str, training: bool) -> offramp.Program:
    torch.manual_seed(4)
    model = Dropping(0.2) if training else tiny.Talker()
    return offramp.apply(offramp.capture(model, {"input_ids": tiny.ids()}, training=training), pipeline)


def program(pipeline: str = PIPELINE, *, training: bool = False) -> offramp.Program:
    """A program with weights of its own."""
    shared = captured(pipeline, training)
    return dataclasses.replace(shared, graph_module=copy.deepcopy(shared.graph_module))


def batches(count: int = 6) -> list[Batch]:
    made = []
    for seed in range(count):
        ids = tiny.ids(seed=seed)
        made.append({"input_ids": ids, "labels": (ids + 1) % tiny.WORDS})
    return made


def digest(made: offramp.Program, *, of_added: bool) -> str:
    mine = added(made)
    found = hashlib.sha256()
    for name, weight in sorted(made.graph_module.named_parameters()):
        if (name in mine) == of_added:
            found.update(name.encode() + weight.detach().numpy().tobytes())
    return found.hexdigest()


def weights(made: offramp.Program) -> dict[str, Tensor]:
    return {name: weight.detach().clone() for name, weight in made.graph_module.named_parameters()}


class KilledError(Exception):
    """Stands for a killed process."""


class Cutting(list[Batch]):
    """Batches in an order that torch's random numbers give; cut off after so many."""

    def __init__(self, given: list[Batch], last: int | None = None) -> None:
        super().__init__(given)
        self.left = last

    def __iter__(self) -> Any:
        for at in torch.randperm(len(self)).tolist():
            if self.left is not None:
                self.left -= 1
                if self.left < 0:
                    raise KilledError
            yield self[at]


def test_the_loss_falls() -> None:
    curve = fit(program(), batches(), DeepSupervision(), epochs=10, train="all", rate=1e-2, log_every=10)
    assert [point.step for point in curve] == [10, 20, 30, 40, 50, 60]
    assert curve[-1].loss < 0.5 * curve[0].loss
    assert set(curve[0].losses) == {"final", "exit 1", "exit 2"}
    assert curve[-1].rate == pytest.approx(0.0, abs=1e-6)


def test_a_frozen_model_changes_no_bit() -> None:
    made = program()
    frozen, mine = digest(made, of_added=False), digest(made, of_added=True)
    fit(made, batches(), SelfDistillation(), epochs=2)
    assert digest(made, of_added=False) == frozen
    assert digest(made, of_added=True) != mine
    assert all(weight.requires_grad for weight in made.graph_module.parameters())


def test_what_a_user_has_frozen_is_frozen_afterwards() -> None:
    made = program()
    name, weight = next(iter(made.graph_module.named_parameters()))
    weight.requires_grad_(False)
    fit(made, batches(), SelfDistillation(), epochs=1)
    assert [found for found, one in made.graph_module.named_parameters() if not one.requires_grad] == [name]


def test_added_weights_are_those_of_passes() -> None:
    assert set(added(program())) == {
        f"exits.decoder.{after}.{name}"
        for after in (1, 2)
        for name in ("adapter.linear.weight", "adapter.linear.bias", "gate.weight", "gate.bias")
    }


@pytest.mark.parametrize("cut", [5, 9, 14])
def test_a_run_that_was_cut_off_goes_on_as_if_it_had_not(tmp_path: Path, cut: int) -> None:
    options: dict[str, Any] = {
        "epochs": 3, "train": "all", "rate": 1e-2, "every": 2, "log_every": 2, "seed": 7
    }  # fmt: skip
    whole = program(training=True)
    expected = fit(whole, Cutting(batches()), DeepSupervision(sample=1), folder=tmp_path / "whole", **options)
    first = program(training=True)
    with pytest.raises(KilledError):
        fit(first, Cutting(batches(), cut), DeepSupervision(sample=1), folder=tmp_path / "cut", **options)
    again = program(training=True)
    curve = fit(again, Cutting(batches()), DeepSupervision(sample=1), folder=tmp_path / "cut", **options)
    assert [(p.step, p.loss, p.rate) for p in curve] == [(p.step, p.loss, p.rate) for p in expected]
    for name, weight in weights(whole).items():
        assert torch.equal(weight, weights(again)[name]), name
    written = [CurvePoint(**json.loads(line)) for line in (tmp_path / "cut" / "curve.jsonl").read_text().splitlines()]
    assert tuple(written) == curve
    assert sorted(path.name for path in (tmp_path / "cut").glob("step-*")) == ["step-16", "step-18"]


def test_a_finished_run_is_not_run_again(tmp_path: Path) -> None:
    made = program()
    curve = fit(made, batches(), SelfDistillation(), epochs=1, folder=tmp_path, every=3)
    trained = weights(made)
    other = program()
    assert fit(other, batches(), SelfDistillation(), epochs=1, folder=tmp_path, every=3) == curve
    assert all(torch.equal(weight, trained[name]) for name, weight in weights(other).items())


@pytest.mark.parametrize("every", [2, 3])
def test_the_curve_of_a_resumed_run_is_that_of_a_whole_one(tmp_path: Path, every: int) -> None:
    """Points lie between checkpoints too: each is the mean of what came before it, in both runs."""
    options: dict[str, Any] = {"epochs": 3, "every": every, "log_every": 4}
    whole = fit(program(), Cutting(batches()), SelfDistillation(), **options)
    with pytest.raises(KilledError):
        fit(program(), Cutting(batches(), 7), SelfDistillation(), folder=tmp_path, **options)
    with (tmp_path / "curve.jsonl").open("a") as file:
        file.write('{"step": 8, "ep')  # killed while it wrote
    again = fit(program(), Cutting(batches()), SelfDistillation(), folder=tmp_path, **options)
    assert [(p.step, p.epoch, p.losses) for p in again] == [(p.step, p.epoch, p.losses) for p in whole]


def test_a_loss_that_is_not_finite_stops_with_the_last_checkpoint(tmp_path: Path) -> None:
    given = batches(5)
    made = program("insert-exits{after=2},insert-adapter{kind=linear}")

    class Poisoned(SelfDistillation):
        def losses(self, program: offramp.Program, values: Any, batch: Any) -> dict[str, Tensor]:
            found = super().losses(program, values, batch)
            bad = torch.equal(batch["labels"], given[4]["labels"])
            return {key: loss * float("nan") for key, loss in found.items()} if bad else found

    with pytest.raises(TrainingError, match=r"step 5 \(epoch 0, batch 4\).*not finite") as failure:
        fit(made, given, Poisoned(), folder=tmp_path, every=2)
    assert "step-4" in str(failure.value)
    kept = load_file(tmp_path / "step-4" / "trained.safetensors")
    assert all(torch.isfinite(weight).all() for weight in kept.values())
    assert all(torch.isfinite(weight).all() for weight in made.graph_module.parameters())


def test_accumulated_batches_make_the_step_of_one_large_batch() -> None:
    halves = batches(2)
    one = [{name: torch.cat([half[name] for half in halves]) for name in halves[0]}]
    options: dict[str, Any] = {"train": "all", "clip": 1e9, "optimizer": lambda found: torch.optim.SGD(found, 1e-2)}
    apart, together = program(), program()
    fit(apart, halves, DeepSupervision(), accumulate=2, **options)
    fit(together, one, DeepSupervision(), **options)
    for name, weight in weights(together).items():
        torch.testing.assert_close(weights(apart)[name], weight, atol=1e-6, rtol=1e-5)


def test_exits_that_are_not_drawn_do_not_run() -> None:
    made = program()
    model = ObjectiveModule(made, DeepSupervision(sample=1))
    model(batches(1)[0], 0)
    (part,) = model._parts.values()
    assert len(part.graph.nodes) < len(made.graph.nodes)
    assert len(part.graph.output_node().args[0]) == 2  # type: ignore[arg-type]


def test_remembered_states_train_to_the_same_weights() -> None:
    plain, quick = program(), program()
    fit(plain, batches(), SelfDistillation(), epochs=3, rate=1e-2)
    states = remember(quick, batches(), "decoder")
    assert "input_ids" not in states[0]
    fit(quick, states, SelfDistillation(), epochs=3, rate=1e-2)
    for name, weight in weights(plain).items():
        torch.testing.assert_close(weights(quick)[name], weight, atol=1e-6, rtol=1e-4)


@pytest.mark.slow
def test_gates_learn_where_exits_agree() -> None:
    made = program("insert-exits{after=2},insert-scores{measure=learned}")
    curve = fit(made, batches(20), LearnedGates(), epochs=30, rate=3e-2, log_every=20)
    assert curve[-1].loss < 0.9 * curve[0].loss


def test_progress_hears_every_point() -> None:
    heard: list[CurvePoint] = []
    curve = fit(program(), batches(), SelfDistillation(), epochs=2, log_every=5, progress=heard.append)
    assert tuple(heard) == curve
    assert [point.step for point in heard] == [5, 10, 12]


def test_bf16_trains() -> None:
    curve = fit(
        program(), batches(), DeepSupervision(), epochs=10, train="all", rate=1e-2, precision="bf16", log_every=10
    )
    assert curve[-1].loss < 0.6 * curve[0].loss


@pytest.mark.parametrize(("capable", "wanted"), [(True, "bf16"), (False, "no")])
def test_auto_is_bf16_where_the_processor_gains_by_it(
    capable: bool, wanted: Literal["bf16", "no"], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    seconds = {torch.float32: 1.0, torch.bfloat16: 0.4 if capable else 0.9}
    monkeypatch.setattr(fit_options, "_product_seconds", seconds.get)
    assert computes_bf16("cpu") is capable
    precisions: tuple[Literal["no", "auto", "bf16"], ...] = ("no", "auto", "bf16")
    curves = {
        each: [point.loss for point in fit(program(), batches(), DeepSupervision(), rate=1e-2, precision=each)]
        for each in precisions
    }
    assert curves["auto"] == curves[wanted]
    assert curves["no"] != curves["bf16"]
    assert ('precision="auto" asks first' in caplog.text) is not capable


def changed(**values: Any) -> list[dict[str, Any]]:
    """Two batches with other values, or what functions make of theirs."""
    return [
        {**batch, **{name: value(batch[name]) if callable(value) else value for name, value in values.items()}}
        for batch in batches(2)
    ]


def of_tensors() -> tuple[CurvePoint, ...]:
    return fit(program(), batches(2), DeepSupervision())


@pytest.mark.parametrize(
    "given",
    [
        [{name: value.numpy() for name, value in batch.items()} for batch in batches(2)],
        [{name: value.numpy()[:, ::-1][:, ::-1] for name, value in batch.items()} for batch in batches(2)],
        [{name: value.tolist() for name, value in batch.items()} for batch in batches(2)],
        [{name: value.int() for name, value in batch.items()} for batch in batches(2)],
        [{**batch, "text": ["a", "b"], "more": None} for batch in batches(2)],
        lambda: iter(batches(2)),
    ],
    ids=["arrays", "views", "lists", "int32", "more", "function"],
)
def test_batches_may_be_what_users_have(given: Any) -> None:
    found = fit(program(), given, DeepSupervision(), steps=2)
    assert [point.losses for point in found] == [point.losses for point in of_tensors()]


def test_a_function_makes_the_batches_of_each_epoch() -> None:
    curve = fit(program(), lambda: iter(batches(2)), SelfDistillation(), steps=5, log_every=1)
    assert [(point.step, point.epoch) for point in curve] == [(1, 0), (2, 0), (3, 1), (4, 1), (5, 2)]


def test_data_without_a_length_are_gone_through_until_the_steps_are_done() -> None:
    class Streamed(torch.utils.data.IterableDataset[Batch]):
        def __iter__(self) -> Any:
            return iter(batches(2))

    loader = torch.utils.data.DataLoader(Streamed(), batch_size=None)
    assert fit(program(), loader, SelfDistillation(), steps=3)[-1].step == 3
    with pytest.raises(SpecError, match=r"no length\n  try: say how many steps="):
        fit(program(), loader, SelfDistillation())


def test_what_a_generator_makes_can_be_gone_through_once() -> None:
    made = program()
    assert fit(made, (batch for batch in batches(3)), SelfDistillation(), steps=3)[-1].step == 3
    with pytest.raises(
        SpecError, match=r"ended after 2 of 5 steps, 2 batches: a generator .* once only\n  try: a list"
    ):
        fit(made, (batch for batch in batches(2)), SelfDistillation(), steps=5)
    given = iter(batches(2))
    with pytest.raises(SpecError, match=r"ended after 2 of 5 steps\n  try: a list, or a function"):
        fit(made, lambda: given, SelfDistillation(), steps=5)


def test_a_refused_run_leaves_the_weights_trainable() -> None:
    made = program()
    with pytest.raises(SpecError, match=r"made a int; a torch\.optim\.Optimizer"):
        fit(made, batches(), SelfDistillation(), optimizer=lambda _: 1)  # type: ignore[arg-type,return-value]
    assert all(weight.requires_grad for weight in made.graph_module.parameters())


def test_all_options_that_make_no_sense_are_named_at_once() -> None:
    with pytest.raises(
        SpecError, match=r"rate=nan: a number greater than 0\n  accumulate=0: a whole number, at least 1"
    ):
        fit(program(), batches(), SelfDistillation(), rate=math.nan, accumulate=0)


def test_what_is_frozen_is_not_trained() -> None:
    """As of a model with LoRA."""
    made = program()
    for name, weight in made.graph_module.named_parameters():
        weight.requires_grad_("adapter" in name or name.endswith("bias"))
    before, free = (
        weights(made),
        {name for name, weight in made.graph_module.named_parameters() if weight.requires_grad},
    )
    fit(made, batches(), DeepSupervision(), train="all", rate=1e-2)
    assert {name for name, weight in weights(made).items() if not torch.equal(weight, before[name])} <= free
    assert any("adapter" not in name and not torch.equal(before[name], weights(made)[name]) for name in free)
    made.graph_module.requires_grad_(False)
    with pytest.raises(SpecError, match=r"all weights are frozen.*\n  try: program.module.requires_grad_"):
        fit(made, batches(), DeepSupervision(), train="all")


@pytest.mark.parametrize("around", [torch.no_grad, torch.inference_mode])
def test_it_trains_wherever_it_is_called(around: Any) -> None:
    made = program()
    with around():
        found = fit(made, batches(2), DeepSupervision())
    assert found[-1].losses == of_tensors()[-1].losses


def test_remembered_states_may_be_stored_in_fewer_bits() -> None:
    states = remember(program(), batches(2), "decoder", dtype=torch.bfloat16)
    found = fit(program(), states, DeepSupervision())
    assert found[-1].loss == pytest.approx(of_tensors()[-1].loss, rel=0.05)


class Wanting(Objective):
    """An objective that wants what is not there, or reads what no batch has."""

    def __init__(self, wanted: str) -> None:
        self.wanted = wanted

    def wants(self, program: offramp.Program, step: int) -> list[str]:
        return [self.wanted]

    def losses(self, program: offramp.Program, values: Any, batch: Any) -> dict[str, Tensor]:
        return {"loss": (values[self.wanted] * batch["weights"]).mean()}


class Strange(SelfDistillation):
    """An objective that returns what it was made with."""

    def compute(self, model: ObjectiveModule, batch: Any, step: int) -> Any:
        return batch["made"]


SMALL = {"input_ids": tiny.ids(rows=1)}


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"objective": [SelfDistillation()]}, r"a list is no objective\n  try: Together"),
        ({"objective": SelfDistillation}, r"SelfDistillation is a class.*\n  try: SelfDistillation\(\)"),
        ({"objective": Together((SelfDistillation,))}, "SelfDistillation is a class"),  # type: ignore[arg-type]
        ({"objective": Together(())}, "several objectives are needed"),
        ({"objective": Together(SelfDistillation())}, "several objectives are needed"),  # type: ignore[arg-type]
        ({"objective": SelfDistillation(temperature=0)}, "temperature=0: a number"),
        ({"objective": DeepSupervision(smoothing=2)}, "smoothing=2: a number, from 0 to 1"),
        ({"objective": CrossEntropy("output", smoothing=2)}, "smoothing=2: a number, from 0 to 1"),
        ({"objective": DepthWeighted(alpha=math.nan)}, "alpha=nan: a number"),
        ({"objective": DeepSupervision(weights={1: -1.0})}, r"weights\[1\]=-1.0: a number"),
        ({"objective": DeepSupervision(weights=[1.0])}, r"numbers by how many blocks.*\n  try: weights=\{"),  # type: ignore[arg-type]
        ({"objective": DeepSupervision(sample=1.5)}, "sample=1.5: at least one"),  # type: ignore[arg-type]
        (
            {"objective": CrossEntropy("output")},
            r"nothing that is trained changes the losses \['final'\].*\n  try: train='all'",
        ),
        ({"pipeline": "insert-exits{after=2},insert-scores{measure=learned}"}, "nothing that is trained changes"),
        ({"objective": Objective()}, "Objective does not say wants and losses"),
        ({"objective": Wanting("logits")}, r"no outputs or nodes \['logits'\]; its outputs are \['output', "),
        (
            {"objective": Wanting("output")},
            r"batch 0\): Wanting could not be computed: KeyError: 'weights'\n.*input_ids",
        ),
        ({"objective": Strange(), "batches": [{**SMALL, "made": {}}]}, r"Strange made \{\}: scalar tensors by name"),
        ({"objective": Strange(), "batches": [{**SMALL, "made": torch.ones(())}]}, "Strange made tensor"),
        ({"batches": batches(1)[0]}, r"one mapping, of \['input_ids', 'labels'\].*\n  try: \[batch\]"),
        ({"batches": tiny.ids()}, "batches is of type Tensor"),
        ({"batches": None}, "batches is of type NoneType"),
        (
            {"batches": [(tiny.ids(), tiny.ids())]},
            r"batch is of type tuple.*\n  try: \{\"input_ids\": ...,.*collate_fn",
        ),
        (
            {"batches": changed(input_ids=lambda x: x[0])},
            r"is int64 \[7\]; the program takes int64 \[batch, tokens\]\n.*batch_size",
        ),
        ({"batches": changed(input_ids=lambda x: x[:0])}, r"is int64 \[0, 7\].*\n  try: leave batches without rows"),
        ({"batches": changed(input_ids=lambda x: x.float())}, r"is float32 \[2, 7\].*\n  try: batch\['input_ids'\]"),
        ({"batches": changed(input_ids=[[1, 2], [3]])}, r"input_ids is a list of 2 .*\n  try: rows that are padded"),
        (
            {"batches": changed(input_ids=lambda x: x + 100)},
            r"epoch 0, batch 0\).*IndexError.*\n.*int64 \[2, 7\] from 100 to 1",
        ),
        ({"objective": DeepSupervision(), "batches": changed(labels=lambda x: x + 100)}, r"\[100.*11 classes, 0 to 10"),
        ({"objective": DeepSupervision(), "batches": changed(labels=lambda x: x - 5)}, r"\[-5.*11 classes, 0 to 10"),
        ({"objective": DeepSupervision(), "batches": changed(labels=lambda x: x.float())}, "labels are torch.float32"),
        ({"objective": DeepSupervision(), "batches": changed(labels=["a", "b"])}, "the batch has a list"),
        ({"objective": DeepSupervision(), "batches": changed(labels=None)}, "the batch has none"),
        (
            {"batches": changed(labels=lambda x: x[:, :3])},
            r"labels of shape \[2, 7\] are needed, the batch has \[2, 3\]",
        ),
        ({"batches": changed(labels=lambda x: 0 * x - 100)}, "no place counts"),
        ({"objective": LearnedGates(), "batches": changed(labels=lambda x: 0 * x - 100)}, "no place counts"),
        ({"accumulate": 7}, "accumulate=7: not one step"),
        ({"rate": -1.0}, "rate=-1.0: a number"),
        ({"rate": "1e-3"}, "rate='1e-3': a number"),
        ({"clip": 0}, "clip=0: a number"),
        ({"epochs": math.nan}, "epochs=nan: a number"),
        ({"steps": 0}, "steps=0: a whole number"),
        ({"warmup": -1}, "warmup=-1: a whole number"),
        ({"every": 0}, "every=0: a whole number"),
        ({"log_every": None}, "log_every=None: a whole number"),
        ({"seed": 0.5}, "seed=0.5: a whole number"),
        ({"precision": "bfloat16"}, "precision='bfloat16': there are no, auto, bf16, fp16"),
        ({"folder": __file__}, "it is a file"),
        ({"optimizer": torch.optim.SGD([torch.zeros(1)], 1e-2)}, r"SGD\(...\): a function.*\n  try: optimizer=lambda"),
        ({"train": "some"}, "there are added and all"),
        ({"batches": iter(batches())}, "no length"),
        ({"batches": []}, "no batches"),
        ({"batches": [], "steps": 3}, "no batches"),
        ({"batches": [{"labels": tiny.ids()}]}, "lacks the inputs"),
        ({"pipeline": "insert-exits{after=1}"}, "no weights to train"),
        ({"pipeline": "insert-exits{after=1},insert-adapter,insert-cache"}, "train first"),
        ({"pipeline": "canonicalize"}, "no exits"),
        ({"objective": CrossEntropy()}, "no output 'logits'"),
    ],
)
def test_what_does_not_fit_is_refused(options: dict[str, Any], match: str) -> None:
    given = dict(options)
    made = program(given.pop("pipeline", PIPELINE))
    with pytest.raises(SpecError, match=match):
        fit(made, given.pop("batches", batches()), given.pop("objective", SelfDistillation()), **given)


def test_a_checkpoint_of_another_objective_is_refused(tmp_path: Path) -> None:
    """Where that run had ended, nothing would be trained, and nothing said."""
    fit(program(), batches(), SelfDistillation(), folder=tmp_path, every=3)
    with pytest.raises(SpecError, match=r"of a run for SelfDistillation; this one is for DeepSupervision\n  try"):
        fit(program(), batches(), DeepSupervision(), folder=tmp_path)


def test_a_checkpoint_of_other_weights_is_refused(tmp_path: Path) -> None:
    fit(program(), batches(), SelfDistillation(), folder=tmp_path, every=3)
    with pytest.raises(SpecError, match="trains other weights"):
        fit(program(), batches(), SelfDistillation(), train="all", folder=tmp_path, every=3)


def test_weights_go_through_a_file(tmp_path: Path) -> None:
    trained, other = program(), program()
    fit(trained, batches(), SelfDistillation(), epochs=1)
    save_weights(trained, tmp_path / "added.safetensors")
    load_weights(other, tmp_path / "added.safetensors")
    assert all(torch.equal(weight, weights(trained)[name]) for name, weight in weights(other).items())


def test_what_is_no_program_is_refused() -> None:
    module: Any = tiny.Talker()
    for call in (
        lambda: fit(module, batches(), SelfDistillation()),
        lambda: save_weights(module, "unwritten"),
        lambda: load_weights(module, "unread"),
    ):
        with pytest.raises(SpecError, match=r"a Talker is no program\n  try: offramp.apply"):
            call()


def test_sizes_that_the_program_does_not_take_are_refused() -> None:
    made = offramp.apply(offramp.capture(tiny.Encoder(), tiny.text()), "insert-exits{after=1},insert-adapter")
    mask = torch.ones(2, 6, dtype=torch.int64)
    with pytest.raises(SpecError, match="axis 1 of attention_mask is 6 long; tokens is 7 in input_ids"):
        fit(made, [{"input_ids": tiny.ids(), "attention_mask": mask}], SelfDistillation())


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"which": "both"}, "which='both': there are added and all"),
        ({"dtype": "float16"}, "dtype='float16'"),
        ({"pipeline": "insert-exits{after=1}"}, "have added no weights"),
        ({"path": "none/w.safetensors"}, "cannot be written"),
    ],
)
def test_weights_that_cannot_be_saved_as_asked_are_refused(tmp_path: Path, options: dict[str, Any], match: str) -> None:
    given = dict(options)
    made, path = program(given.pop("pipeline", PIPELINE)), tmp_path / given.pop("path", "w.safetensors")
    with pytest.raises(SpecError, match=match):
        save_weights(made, path, **given)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"stack": "encoder"}, "unknown stack 'encoder'"),
        ({"batches": batches(1)[0]}, "batches is one mapping"),
        ({"keep": "attention_mask"}, r"batch 0: keep=\['attention_mask'\]: the batch has \['input_ids', 'labels'\]"),
        ({"dtype": "bfloat16"}, "dtype='bfloat16'"),
    ],
)
def test_what_cannot_be_remembered_is_refused(options: dict[str, Any], match: str) -> None:
    with pytest.raises(SpecError, match=match):
        remember(program(), **{"batches": batches(1), "stack": "decoder", **options})


def test_states_of_arrays_are_remembered() -> None:
    arrays = [{name: value.numpy() for name, value in batch.items()} for batch in batches(1)]
    (found,), (expected,) = (remember(program(), given, "decoder", "input_ids") for given in (arrays, batches(1)))
    assert found.keys() == expected.keys() >= {"input_ids", "labels"}
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_weights_of_another_pipeline_are_refused_and_change_nothing(tmp_path: Path) -> None:
    save_weights(program("insert-exits{after=2},insert-adapter{kind=mlp}"), tmp_path / "mlp.safetensors")
    other = program()
    before = digest(other, of_added=True)
    with pytest.raises(SpecError, match=r"fc1.*the program: none"):
        load_weights(other, tmp_path / "mlp.safetensors")
    with pytest.raises(SpecError, match="cannot be read"):
        load_weights(other, tmp_path / "none.safetensors")
    assert digest(other, of_added=True) == before


_SHARED = """
import sys
import tiny
import torch
from test_training_fit import batches, program, weights
from offramp.training.fitting import fit
from offramp.training.objectives import DeepSupervision

made = program()
options = {"train": "all", "clip": 1e9, "optimizer": lambda found: torch.optim.SGD(found, 1e-2)}
fit(made, batches(5), DeepSupervision(sample=1), folder=sys.argv[1], every=1, **options)
torch.save(weights(made), f"{sys.argv[1]}/{torch.distributed.get_rank()}.pt")
"""


@pytest.mark.slow
def test_two_processes_share_the_batches(tmp_path: Path) -> None:
    script = tmp_path / "two_processes.py"
    script.write_text(_SHARED)
    launch = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", "--standalone"]
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parent), "ACCELERATE_USE_CPU": "true"}
    environment |= {"OMP_NUM_THREADS": "1"}
    done = subprocess.run([*launch, str(script), str(tmp_path)], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    one, other = (torch.load(tmp_path / f"{rank}.pt") for rank in (0, 1))
    alone, given = program(), batches(5)
    pairs = [
        {name: torch.cat([a[name], b[name]]) for name in a} for a, b in ((given[0], given[1]), (given[2], given[3]))
    ]
    sgd: dict[str, Any] = {"train": "all", "clip": 1e9, "optimizer": lambda found: torch.optim.SGD(found, 1e-2)}
    fit(alone, pairs, DeepSupervision(sample=1), **sgd)
    for name, weight in weights(alone).items():
        assert torch.equal(one[name], other[name]), name
        torch.testing.assert_close(one[name], weight, atol=1e-6, rtol=1e-5)
    assert json.loads((tmp_path / "step-2" / "progress.json").read_text())["step"] == 2
