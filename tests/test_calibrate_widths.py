"""`calibrate` on bundles with learners: the width is chosen like a setting of exits, or exits are chosen at a width."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import bundles
import jsonschema
import numpy as np
import pytest
import tiny
import torch
from numpy.typing import NDArray
from test_cli import refused, run
from test_insert_acm import weights
from torch import nn

import offramp
from offramp.bundle.manifest import MANIFEST_FILE
from offramp.calibration import calibrator, exits, report, reporting, sequence, widths
from offramp.calibration.costs import Costs
from offramp.calibration.examples import Examples, read
from offramp.calibration.observe import StepKind
from offramp.calibration.sequence import Asked, Full
from offramp.calibration.verdicts import Point, verdict_of_widths
from offramp.errors import InputError
from offramp.passes import apply
from offramp.program import capture
from offramp.runtime import Chain, Confidence, Entropy, Never, Policy, Width
from offramp.runtime.generation.tokens import Token

ROOT = Path(__file__).resolve().parents[1]
SCHEMA = json.loads((ROOT / "docs" / "manifest.schema.json").read_text())
BOTH = "insert-acm{stack=encoder},insert-acm{stack=decoder},insert-cache"
SCORES = "insert-exits{after=1|2|3},insert-scores{measure=top1}"


def saved(
    captured: tiny.Captured, root: Path, passes: str, idle: int = 12, form: Literal["dense", "grouped"] = "grouped"
) -> Path:
    """A bundle whose last ``idle`` hidden units of 24 write nothing, so that it needs no more than the others."""
    program = apply(captured.program, passes)
    with torch.no_grad():
        for weight in weights(program).values():
            if weight.shape == (tiny.WIDTH, 24):
                weight[:, 24 - idle :] = 0
    offramp.save(program, root, target="portable", learners=form)
    return root


def texts(count: int, seed: int = 5) -> dict[str, NDArray[np.int64]]:
    ids = tiny.ids(tiny.TOKENS, count, seed).numpy()
    return {"input_ids": ids, "attention_mask": np.ones_like(ids)}


def exact(answer: Any, reference: Any) -> float:
    return float(np.allclose(answer, reference, atol=1e-4))


@pytest.fixture(scope="module")
def wide(encoder: tiny.Captured, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four learners, of which two write nothing, and no exits."""
    return saved(encoder, tmp_path_factory.mktemp("widths") / "wide.offramp", "insert-acm")


@pytest.fixture(scope="module")
def both(encoder: tiny.Captured, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same with exits that have scores."""
    return saved(encoder, tmp_path_factory.mktemp("widths") / "both.offramp", f"insert-acm,{SCORES}")


@pytest.fixture(autouse=True)
def steady(monkeypatch: pytest.MonkeyPatch) -> None:
    """Times that are proportional to the width, so that what is chosen does not depend on the machine."""

    def times(chain: object, examples: object, budgets: Sequence[float], *_: object) -> dict[float, float]:
        return {budget: 10 * budget for budget in budgets}

    monkeypatch.setattr(widths, "time_widths", times)
    monkeypatch.setattr(reporting, "time_widths", times)


def costs(wide: float | None) -> Costs:
    return Costs(0.1, np.ones(4), np.zeros(4), np.full(4, 0.1), {"top1": np.zeros(3, np.bool_)}, wide=wide)


def no_write(root: Path, data: Mapping[str, Any], **options: Any) -> calibrator.Calibration:
    return offramp.calibrate(offramp.load(root), data, **options)


# The width


def test_the_boldest_width_that_changes_no_answer(wide: Path, encoder: tiny.Captured, tmp_path: Path) -> None:
    """Untrained gates give each token ``4 * budget`` learners, rounded: 0.4 is two, which is all that write."""
    root = saved(encoder, tmp_path / "m.offramp", "insert-acm")
    found = offramp.calibrate(root, texts(120), keep=0.9, quality=exact)
    assert found.policy == Width(0.4) == offramp.load(root).policy
    data = json.loads((root / MANIFEST_FILE).read_text())
    jsonschema.validate(data, SCHEMA)
    record = data["calibration"]
    assert record == json.loads(json.dumps(found.record))
    assert {"keep": 0.9, "reason": None, "width": 0.4, "executed": 0.5, "examples": 120}.items() <= record.items()
    assert record["budgets"] == [0.95, 0.9, 0.85, 0.8, 0.75, 0.7, 0.65, 0.6, 0.55, 0.5, 0.45, 0.4]
    assert record["settings"] == {"tested": 12, "passed": 12, "of": 12}
    assert record["milliseconds"] == {"full": 10.0, "expected": 4.0}
    assert (record["risk"]["full"], record["risk"]["early"], record["risk"]["examples"]) == (1.0, 1.0, 84)
    assert record["risk"]["p_value"] <= 0.05
    assert list(record["dropped"]) == ["0.35"]
    assert record["dropped"]["0.35"].startswith("it loses too much: it kept 0.0000 of the quality in 36 fitting ")
    assert "stack" not in record
    assert "`Width(budget=0.4" in (root / "README.md").read_text()


@pytest.mark.slow
def test_a_quality_that_falls_at_once(encoder: tiny.Captured, tmp_path: Path) -> None:
    root = saved(encoder, tmp_path / "m.offramp", "insert-acm{learners=24}", idle=0)
    found = offramp.calibrate(root, texts(120), keep=0.9, quality=exact)
    assert found.policy == Never()
    assert found.record["reason"].startswith("no width is worth a test: at 0.95 it loses too much: it kept 0.0000 ")
    assert found.record["settings"] == {"tested": 0, "passed": 0, "of": 0}
    jsonschema.validate(json.loads((root / MANIFEST_FILE).read_text()), SCHEMA)


def test_widths_that_save_no_time(wide: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each has to be faster than the last that is; what is slower than all learners is not tested."""
    times = {1.0: 10.0, 0.95: 10.5, 0.9: 9.0, 0.85: 8.99, 0.8: 5.0}
    monkeypatch.setattr(
        widths, "time_widths", lambda chain, examples, budgets, options: {b: times.get(b, 5.0) for b in budgets}
    )
    found = no_write(wide, texts(120), keep=0.9, quality=exact)
    assert found.record["budgets"] == [0.9, 0.8]
    assert found.record["dropped"]["0.95"] == "it saves nothing: 10.500 ms, 10.000 ms at width 1"
    assert found.record["dropped"]["0.85"] == "it saves nothing: 8.990 ms, 9.000 ms at width 0.9"
    assert found.policy == Width(0.8)
    monkeypatch.setattr(widths, "time_widths", lambda chain, examples, budgets, options: dict.fromkeys(budgets, 3.0))
    never = no_write(wide, texts(120), keep=0.9, quality=exact)
    assert never.policy == Never()
    assert "no width is worth a test: at 0.35 it loses too much" in never.record["reason"]


def test_learners_that_are_all_computed(
    encoder: tiny.Captured, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = saved(encoder, tmp_path / "m.offramp", "insert-acm", form="dense")
    monkeypatch.setattr(widths, "time_widths", lambda chain, examples, budgets, options: dict.fromkeys(budgets, 3.0))
    reason = offramp.calibrate(root, texts(120), keep=0.3).record["reason"]
    assert reason.endswith("learners that run dense are all computed: offramp.save(..., learners='grouped')")


def test_no_width_is_chosen_out_of_noise(encoder: tiny.Captured, tmp_path: Path) -> None:
    """Where all learners run at any width, times that say otherwise are noise."""
    root = saved(encoder, tmp_path / "m.offramp", "insert-acm", form="dense")
    found = offramp.calibrate(root, texts(120), keep=0.3)
    assert found.policy == Never() == offramp.load(root).policy
    assert found.record["milliseconds"] == {"full": 10.0, "expected": 10.0}
    verdict = report(offramp.load(root), texts(12)).verdict
    assert verdict == "no: learners that run dense are all computed, so no width saves time; save them grouped"


def test_a_width_that_is_not_proven(wide: Path) -> None:
    """Nearly good enough on the fitting part; the test needs more."""
    random = np.random.default_rng(0)
    found = no_write(wide, texts(200), keep=0.9, quality=lambda answer, reference: float(random.random() < 0.85))
    assert found.policy == Never()
    assert "even width 0.95 is not proven to keep 0.9" in found.record["reason"]
    assert found.record["settings"]["tested"] == 1
    assert "risk" not in found.record


def test_the_path_ends_at_the_first_failure(wide: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """0.3 changes answers; 0.5 behind it would pass, and is never run."""
    chain = offramp.load(wide)
    asked = Asked(chain, 0.9, 0.95, exact, {})
    ran: list[Policy] = []
    real = sequence.grades

    def grades(asked: Asked, examples: Examples, policy: Policy, compared: Full) -> NDArray[np.float64]:
        ran.append(policy)
        return real(asked, examples, policy, compared)

    monkeypatch.setattr(sequence, "grades", grades)
    found = sequence.tested(asked, read(chain, texts(60)), [Width(0.9), Width(0.3), Width(0.5)])
    assert ran == [Width(0.9), Width(0.3)]
    assert found.p_values[0] <= 0.05 < found.p_values[1]
    assert found.record(0.05, 3)["settings"] == {"tested": 2, "passed": 1, "of": 3}


def test_labels_and_classes(wide: Path) -> None:
    """Without labels, the class at full width is what counts; labels are by row, whatever the batches."""
    data = texts(150)
    classes = offramp.load(wide).run(data).outputs["logits"].argmax(1)
    with_labels = no_write(wide, {**data, "labels": classes}, keep=0.9)
    without = no_write(wide, data, keep=0.9)
    assert with_labels.policy == without.policy
    assert isinstance(without.policy, Width)
    assert without.policy.budget <= 0.4
    assert with_labels.record["risk"] == without.record["risk"]
    wrong = no_write(wide, {**data, "labels": (classes + 1) % 3}, keep=0.9)
    assert wrong.policy == Never()
    assert "the quality is 0 in all of 45 examples" in wrong.record["reason"]
    assert "the first answer is 0, and is compared with the label 1" in wrong.record["reason"]


def test_one_width_is_tested(wide: Path) -> None:
    found = no_write(wide, texts(120), keep=0.9, quality=exact, width=0.5)
    assert found.policy == Width(0.5)
    assert found.record["settings"] == {"tested": 1, "passed": 1, "of": 1}
    assert no_write(wide, texts(120), keep=0.9, quality=exact, width=0.3).policy == Never()


def test_too_few_examples(wide: Path) -> None:
    found = no_write(wide, texts(10))
    assert found.policy == Never()
    assert "10 examples are too few" in found.record["reason"]


def test_widths_are_timed_on_this_machine(wide: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    chain = offramp.load(wide)
    found = widths.time_widths(chain, read(chain, texts(5)).inputs, [1.0, 0.5], {})
    assert list(found) == [1.0, 0.5]
    assert all(0 < value < 1000 for value in found.values())


# Generation


@pytest.mark.slow
def test_generations(decoder: tiny.Captured, tmp_path: Path) -> None:
    root = saved(decoder, tmp_path / "m.offramp", "insert-acm,insert-cache")
    prompts = {"input_ids": [row.tolist() for row in tiny.ids(3, 80, 7).numpy()]}
    found = offramp.calibrate(root, prompts, keep=0.6, max_new_tokens=4, stop=[])
    assert isinstance(found.policy, Width)
    assert found.policy.budget <= 0.4
    assert found.record["quality"] == "default against full depth"
    assert found.record["executed"] <= 0.5
    jsonschema.validate(json.loads((root / MANIFEST_FILE).read_text()), SCHEMA)
    chain: Chain = offramp.load(root)
    assert chain.generate({"input_ids": prompts["input_ids"][:2]}, max_new_tokens=4).width == found.record["executed"]


def test_no_tokens(decoder: tiny.Captured, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    root = saved(decoder, tmp_path / "m.offramp", "insert-acm,insert-cache")
    with pytest.raises(InputError, match="no token is generated"):
        offramp.calibrate(root, {"input_ids": [[1, 2]] * 80}, keep=0.5, max_new_tokens=0)


def test_tokens_are_timed_on_this_machine(
    decoder: tiny.Captured, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.undo()
    chain = offramp.load(saved(decoder, tmp_path / "m.offramp", "insert-acm,insert-cache"))
    for new in (1, 3):
        given = read(chain, {"input_ids": [[1, 2], [3]]}).inputs
        found = widths.time_widths(chain, given, [1.0, 0.5], {"max_new_tokens": new})
        assert all(0 < value < 1000 for value in found.values())


class _Wide(tiny.TwoStacks):
    """What takes long is its encoder's MLPs."""

    def __init__(self) -> None:
        super().__init__()
        for block in self.encoder.blocks:
            up, act, down = nn.Linear(tiny.WIDTH, 2000), nn.GELU(), nn.Linear(2000, tiny.WIDTH)
            block.mlp = nn.Sequential(up, act, down)


def sources(count: int) -> dict[str, NDArray[np.int64]]:
    ids = tiny.ids(60, count, 3).numpy()
    return {"source_ids": ids, "source_mask": np.ones_like(ids), "input_ids": tiny.ids(1, count).numpy()}


@pytest.fixture(scope="module")
def once(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Learners in the encoder, which runs once for a generation, alone."""
    root = tmp_path_factory.mktemp("widths") / "once.offramp"
    program = apply(capture(tiny.seeded(_Wide), tiny.two_texts()), "insert-acm{stack=encoder},insert-cache")
    offramp.save(program, root, target="portable", learners="grouped", segments=1)
    return root


def test_what_runs_once_is_timed_where_its_learners_lie(once: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A run takes what its width says here: how long it really takes is no matter of tests."""
    monkeypatch.undo()
    asked_for, really = list[StepKind](), widths._wall

    def wall(kind: StepKind, chain: Chain, example: Any, policy: Policy, options: Any) -> tuple[float, Sequence[Token]]:
        asked_for.append(kind)
        _, tokens = really(kind, chain, example, policy, options)
        assert isinstance(policy, Width)
        return 8.0 * policy.budget, tokens

    monkeypatch.setattr(widths, "_wall", wall)
    chain = offramp.load(once)
    found = widths.time_widths(chain, read(chain, sources(6)).inputs, [1.0, 0.25], {"max_new_tokens": 4})
    assert found == {1.0: 8.0, 0.25: 2.0}
    asked: dict[str, Any] = {"keep": 0.5, "quality": lambda *_: 1.0, "width": 0.25, "max_new_tokens": 2, "stop": []}
    chosen = offramp.calibrate(chain, sources(120), **asked)
    assert chosen.policy == Width(0.25)
    assert (chosen.record["step"], chosen.record["executed"]) == ("input", 0.25)
    assert chosen.record["milliseconds"] == {"full": 8.0, "expected": 2.0}
    assert set(asked_for) == {"input"}


def test_generations_are_timed_where_learners_lie_in_both(
    two_stacks: tiny.Captured, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What runs once, the prompt, and as many tokens as with all learners."""
    monkeypatch.undo()
    chain = offramp.load(saved(two_stacks, tmp_path / "m.offramp", BOTH))
    assert widths.step_of(chain) == "generation"
    options = {"max_new_tokens": 3, "stop": []}
    found = widths.time_widths(chain, read(chain, sources(3)).inputs, [1.0, 0.5], options)
    assert all(0 < value < 1000 for value in found.values())
    tokens = [Token(0, 1, 3, {}, {}, each, 0, False, ()) for each in (2.0, 4.0, 6.0)]
    kinds: list[StepKind] = ["row", "token", "input", "generation"]
    took = [widths.milliseconds(kind, 20.0, tokens, [*tokens, *tokens]) for kind in kinds]
    assert took == [20.0, 5.0, 8.0, 10.0 + 5 * 5.0]


# Exits


def test_exits_are_chosen_with_all_learners(both: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(exits, "time_rows", lambda *_: costs(None))
    found = no_write(both, texts(300), keep=0.3)
    assert isinstance(found.policy, Confidence | Entropy)
    assert "width" not in found.record


def test_the_width_although_there_are_exits(both: Path) -> None:
    assert no_write(both, texts(120), keep=0.9, quality=exact, width="choose").policy == Width(0.4)


def test_exits_at_a_width(both: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What they are compared with has all learners, in time as in quality; the width alone comes first."""
    monkeypatch.setattr(exits, "time_rows", lambda *_: costs(8.4))
    found = no_write(both, texts(300), keep=0.3, width=0.5)
    assert isinstance(found.policy, Width)
    assert found.policy.budget == found.record["width"] == 0.5
    assert isinstance(found.policy.exits, Confidence)
    assert found.record["milliseconds"]["full"] == 8.4
    assert found.record["risk"]["full"] == 1.0
    alone = no_write(both, texts(300), keep=0.9, quality=exact, width=0.5)
    assert alone.policy == Width(0.5)
    assert (alone.record["thresholds"], alone.record["milliseconds"]["expected"]) == ({}, 4.2)
    ruined = no_write(both, texts(300), keep=0.9, quality=exact, width=0.3)
    assert ruined.policy == Never()
    assert "it kept 0.0000 of the quality" in ruined.record["reason"]


@pytest.mark.parametrize("width", [0.5, None])
def test_exits_at_a_width_are_timed_on_this_machine(both: Path, width: float | None) -> None:
    times = no_write(both, texts(200), keep=0.3, width=width).record["milliseconds"]
    assert 0 < times["expected"] <= times["full"] < 1000


def test_tokens_leave_at_a_width(decoder: tiny.Captured, tmp_path: Path) -> None:
    root = saved(decoder, tmp_path / "m.offramp", f"insert-acm,{SCORES},insert-cache")
    prompts = {"input_ids": [row.tolist() for row in tiny.ids(3, 80, 7).numpy()]}
    found = offramp.calibrate(root, prompts, keep=0.2, max_new_tokens=4, stop=[], width=0.5)
    assert found.record["width"] == 0.5
    assert found.record["stack"] == "decoder"
    assert isinstance(found.policy, Width | Never)  # how long its segments take is the machine's affair


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"width": 1.0}, "width=1.0: 'choose', or a share of the learners"),
        ({"width": -0.1}, "width=-0.1"),
        ({"width": "chosen"}, "width='chosen'"),
        ({"width": "choose", "measure": "top1"}, r"measure='top1': width='choose' chooses no exits"),
        ({"width": "choose", "others": Never()}, r"others=Never\(\): a width is chosen at full depth"),
    ],
)
def test_what_makes_no_sense(options: dict[str, Any], said: str, both: Path) -> None:
    with pytest.raises(InputError, match=said):
        no_write(both, texts(99), keep=0.5, **options)


def test_a_bundle_without_learners(tmp_path: Path) -> None:
    root = bundles.classifier(tmp_path / "b")
    for width in (0.5, "choose"):
        with pytest.raises(InputError, match=r"(?s)this bundle has no learners.*insert-acm"):
            offramp.calibrate(root, {"ids": [[1, 2]]}, width=width)


def test_a_stack_means_exits(wide: Path) -> None:
    with pytest.raises(InputError, match="has no exit before full depth that has a score"):
        no_write(wide, texts(99), stack="encoder")


# The command


def test_the_command(encoder: tiny.Captured, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root = saved(encoder, tmp_path / "m.offramp", "insert-acm")
    data = texts(120)
    np.savez(tmp_path / "data.npz", input_ids=data["input_ids"], attention_mask=data["attention_mask"])
    shown = run(capsys, "calibrate", root, "--data", tmp_path / "data.npz", "--keep", "0.9", "--width", "0.4")
    lines = shown.splitlines()
    assert lines[0] == "policy   Width(budget=0.4, exits=None)"
    assert lines[1] == "width    50.0% of the learners' operations are executed"
    assert lines[2].startswith("quality  1.0000 at this width, 1.0000 at full depth, in 84 test examples; at least 0.9")
    assert lines[3] == "time     4.000 ms a row expected, 10.000 ms at full depth: 2.50x"
    assert lines[5:] == ["width  test", "0.4    passed"]
    assert "width=2.0: 'choose'" in refused(capsys, "calibrate", root, "--data", tmp_path / "data.npz", "--width", "2")
    shown = run(capsys, "calibrate", root, "--data", tmp_path / "data.npz", "--keep", "0.9", "--width", "choose")
    assert "0.95   passed" in shown


# The report


def test_what_widths_save(wide: Path) -> None:
    """Two of four learners do, so that half the width keeps all."""
    chain = offramp.load(wide)
    found = reporting.report(chain, texts(20), quality=exact)
    assert (found.stack, found.blocks, found.oracle, dict(found.segments)) == ("encoder", 4, None, {})
    assert found.full
    assert found.full.quality == 1
    grades = {point.policy: point.quality for point in found.frontier}
    assert grades["width 0.5"] == grades["width 0.9"] == 1
    assert grades["width 0.1"] == 0
    assert found.widths == {width: pytest.approx(1 - width) for width in (0.9, 0.75, 0.6, 0.5, 0.4, 0.3, 0.2, 0.1)}
    assert "width" in found.verdict
    assert json.loads(json.dumps(found.to_dict()))["widths"]["0.5"] == 0.5
    blind = reporting.report(chain, texts(3), judge=False)
    assert blind.verdict == "cannot say without examples: width 0.1 saves 90% of the time"
    assert (blind.full, list(blind.frontier)) == (None, [])


def test_widths_of_what_runs_once(once: Path, two_stacks: tiny.Captured, tmp_path: Path) -> None:
    """Whether the stack is named or not; no token leaves anywhere."""
    options: dict[str, Any] = {"max_new_tokens": 2, "stop": [], "quality": lambda *_: 1.0}
    for stack in (None, "encoder"):
        found = reporting.report(offramp.load(once), sources(6), stack=stack, **options)
        assert (found.stack, found.step, len(found.widths)) == ("encoder", "input", 8)
        assert [point.width for point in found.frontier] == list(found.widths)
        assert all(0 < point.milliseconds < 1000 for point in found.frontier)
        assert "width" in found.verdict
    chain = offramp.load(saved(two_stacks, tmp_path / "m.offramp", BOTH))
    both = reporting.report(chain, sources(3), **options)
    assert (both.stack, both.step, len(both.frontier)) == ("decoder", "generation", 8)
    with pytest.raises(InputError, match="'decoder' has no exit before full depth that has a score"):
        reporting.report(offramp.load(once), sources(3), stack="decoder", **options)


@pytest.mark.parametrize(
    ("points", "said"),
    [
        ([(0.8, 1.25), (0.5, 2.0)], "yes: width saves 20% of the time (1.25x) at 100.0% of the quality"),
        (
            [(0.5, 2.0)],
            "no: no width that keeps 99% of the quality saves 5% of the time; the fastest, width 0.4, saves 60%",
        ),
    ],
)
def test_the_sentence(points: list[tuple[float, float]], said: str) -> None:
    full = Point("Never()", 0.8, 10.0, 1.0, {4: 1.0})
    frontier = [Point("width", quality, 10 / speed, speed, {4: 1.0}) for quality, speed in points]
    assert verdict_of_widths(full, frontier, {0.4: 0.6, 0.1: 0.5}).startswith(said)


def test_exits_and_widths_in_one_report(both: Path) -> None:
    found = reporting.report(offramp.load(both), texts(20), quality=exact)
    policies = [point.policy for point in found.frontier]
    assert any(policy.startswith("top1 ") for policy in policies)
    assert "width 0.5" in policies
    assert [point.width for point in found.frontier if point.width is not None] == list(found.widths)
    assert found.oracle
    assert len(found.widths) == 8
    assert len(reporting.report(offramp.load(both), texts(3), judge=False).widths) == 8


def test_the_report_on_the_command_line(wide: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    given = texts(8)
    np.savez(tmp_path / "texts.npz", input_ids=given["input_ids"], attention_mask=given["attention_mask"])
    picture = tmp_path / "widths.png"
    said = run(capsys, "report", str(wide), "--data", str(tmp_path / "texts.npz"), "--figure", str(picture))
    assert "width 0.5" in said
    assert "saves" in said
    assert picture.stat().st_size > 5000
    assert "cannot say without examples: width" in run(capsys, "report", str(wide))


class _Embedding(tiny.Encoder):
    """Its answers are the states of tokens, and their mean."""

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> dict[str, torch.Tensor]:
        x = self.run(self.embed(input_ids), attention_mask.bool()[:, None, None])
        return {"tokens": x, "pooled": x.mean(1)}


def test_of_several_outputs_a_quality_is_given_all(tmp_path: Path) -> None:
    program = capture(tiny.seeded(_Embedding), tiny.text())
    offramp.save(apply(program, "insert-acm"), tmp_path / "m.offramp", learners="dense")
    with pytest.raises(InputError, match=r"which of the outputs \['tokens', 'pooled'\] .*\n  try: .*quality=function"):
        offramp.calibrate(tmp_path / "m.offramp", texts(4))
    seen = []

    def same(answer: Any, reference: Any) -> float:
        seen.append({name: array.shape for name, array in answer.items()})
        return exact(answer["pooled"], reference["pooled"])

    found = offramp.calibrate(tmp_path / "m.offramp", texts(4), quality=same)
    assert seen == [{"tokens": (tiny.TOKENS, tiny.WIDTH), "pooled": (tiny.WIDTH,)}] * 4
    assert "4 examples are too few" in str(found.record["reason"])
    point = report(offramp.load(tmp_path / "m.offramp"), texts(4), quality=same).full
    assert point is not None
    assert point.quality == 1.0


class _Pooled(_Embedding):
    """Its answer is the mean of the states."""

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"pooled": super().forward(input_ids, attention_mask)["pooled"]}


def test_an_embedding_is_not_judged_by_its_greatest_number(tmp_path: Path) -> None:
    program = capture(tiny.seeded(_Pooled), tiny.text())
    offramp.save(apply(program, "insert-acm"), tmp_path / "m.offramp", learners="dense")
    chain = offramp.load(tmp_path / "m.offramp")
    for judge in (offramp.calibrate, report):
        for labels in ({}, {"labels": np.zeros((4, tiny.WIDTH), np.float32)}):
            with pytest.raises(
                InputError, match=r"'pooled' .* is not said to have classes.*\n  try: .*quality=function"
            ):
                judge(chain, texts(4) | labels)
        judge(chain, texts(4) | {"labels": np.arange(4)}, quality=lambda answer, reference: 1.0)
        with pytest.raises(InputError, match="0 to 15"):
            judge(chain, texts(4) | {"labels": np.full(4, 16)})


class _Unnamed(_Pooled):
    """Its answer has no name."""

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> Any:
        return super().forward(input_ids, attention_mask)["pooled"]


def test_an_output_without_a_name_has_classes_where_exits_score_them_or_labels_are_some(tmp_path: Path) -> None:
    program = capture(tiny.seeded(_Unnamed), tiny.text())
    offramp.save(apply(program, "insert-exits{after=1},insert-scores{measure=cosine}"), tmp_path / "states")
    said = apply(program, "insert-exits{after=1},insert-scores{measure=top1,output=output}")
    offramp.save(said, tmp_path / "classes")
    for judge in (offramp.calibrate, report):
        states, classes = offramp.load(tmp_path / "states"), offramp.load(tmp_path / "classes")
        with pytest.raises(InputError, match=r"'output' .* is not said to have classes"):
            judge(states, texts(4))
        judge(states, texts(4) | {"labels": states.run(texts(4)).outputs["output"].argmax(1)})
        judge(classes, texts(4))


class _Tagger(tiny.Encoder):
    """Its answers are logits of each token."""

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"logits": self.run(self.embed(input_ids), attention_mask.bool()[:, None, None])}


def test_labels_that_are_no_classes_of_the_places(tmp_path: Path) -> None:
    """Numbers for each class are a regression's, and what an input repeats was not shifted to the next token."""
    program = capture(tiny.seeded(_Tagger), tiny.text())
    offramp.save(apply(program, "insert-acm"), tmp_path / "m.offramp", learners="dense")
    chain, data = offramp.load(tmp_path / "m.offramp"), texts(4)
    data["input_ids"] %= tiny.WIDTH
    padded = np.where(np.arange(tiny.TOKENS) < 2, -100, data["input_ids"])
    shifted = np.concatenate([data["input_ids"][:, 1:], np.full((4, 1), -100)], 1)
    for judge in (offramp.calibrate, report):
        for labels in (data["input_ids"], padded):
            with pytest.raises(InputError, match="each label is what 'input_ids' has at the same place") as caught:
                judge(chain, data | {"labels": labels})
            assert "predicts the next token, the one that follows, and -100 at the end" in str(caught.value.hint)
        with pytest.raises(InputError, match=r"a label is \[.*, a number for each class") as caught:
            judge(chain, data | {"labels": np.ones((4, tiny.TOKENS, tiny.WIDTH), np.float32)})
        assert "of a regression" in str(caught.value.hint)
    assert "4 examples are too few" in offramp.calibrate(chain, data | {"labels": shifted}).record["reason"]
