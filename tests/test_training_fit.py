"""The training loop: what it changes, what it does not, and what happens when it is cut off."""

from __future__ import annotations

import copy
import dataclasses
import functools
import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from safetensors.torch import load_file
from test_dropout import Dropping
from torch import Tensor

import offramp
from offramp.errors import SpecError, TrainingError
from offramp.training.fitting import CurvePoint, fit
from offramp.training.objective_module import ObjectiveModule, remember
from offramp.training.objectives import CrossEntropy, DeepSupervision, LearnedGates, SelfDistillation
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


@pytest.mark.parametrize(
    ("options", "match"),
    [
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
    script = tmp_path / "shared.py"
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
