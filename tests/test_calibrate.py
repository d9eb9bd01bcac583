"""Calibration end to end: on bundles of ONNX text, and on one that generates."""

from __future__ import annotations

import hashlib
import itertools
import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import bundles
import jsonschema
import numpy as np
import pytest
import talkers
from numpy.typing import NDArray
from test_packaging import run_without_torch

import offramp
from offramp.bundle.manifest import MANIFEST_FILE
from offramp.calibration import exits, observe
from offramp.calibration.costs import Costs
from offramp.calibration.examples import read
from offramp.calibration.gates import fit_scale
from offramp.calibration.observe import time_rows
from offramp.calibration.quality import graded, same_class, same_tokens
from offramp.errors import InputError, PolicyError
from offramp.runtime import Chain, Confidence, Each, Entropy, Never
from offramp.runtime.card import CARD_FILE

ROOT = Path(__file__).resolve().parents[1]
SCHEMA = json.loads((ROOT / "docs" / "manifest.schema.json").read_text())


def ids(count: int, seed: int = 0) -> NDArray[np.int64]:
    return np.random.default_rng(seed).integers(0, bundles.WORDS, (count, 3))


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return bundles.classifier(tmp_path / "tiny.offramp", exits=(1, 2, 3, 4))


@pytest.fixture(autouse=True)
def steady(monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks that are slow and heads that are not, so that what is chosen does not depend on the machine."""
    monkeypatch.setattr(exits, "time_rows", lambda chain, stack, *_: costs(len(stack.exits)))


def costs(exits: int, dear: float = 0.1) -> Costs:
    """Leaving early costs ``dear`` milliseconds, and so does asking."""
    free = dict.fromkeys(("top1", "margin", "entropy", "calm"), np.zeros(exits - 1, np.bool_))
    return Costs(0.1, np.ones(exits), np.zeros(exits), np.array([dear] * (exits - 1) + [0.1]), free)


def files(root: Path) -> dict[str, str]:
    return {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in root.iterdir()}


# What comes out


def test_a_bundle_gets_a_policy_that_keeps_its_promise(root: Path) -> None:
    before = files(root)
    found = offramp.calibrate(root, {"ids": ids(2000)}, keep=0.9)
    chain = offramp.load(root)
    assert chain.policy == found.policy
    assert isinstance(found.policy, Confidence | Entropy)
    everything = {"ids": np.array(list(itertools.product(range(bundles.WORDS), repeat=3)))}
    early, full = chain.run(everything), chain.run(everything, Never())
    assert (early.exits["encoder"] < 4).mean() > 0.1
    assert (early.outputs["logits"].argmax(1) == full.outputs["logits"].argmax(1)).mean() >= 0.9
    changed = {name for name, digest in files(root).items() if before.get(name) != digest}
    assert changed == {MANIFEST_FILE, CARD_FILE}
    assert set(files(root)) == {*before, CARD_FILE}


def test_the_record(root: Path) -> None:
    found = offramp.calibrate(root, {"ids": ids(2000)}, keep=0.9, confidence=0.9, measure="top1", seed=3)
    data = json.loads((root / MANIFEST_FILE).read_text())
    jsonschema.validate(data, SCHEMA)
    record = data["calibration"]
    assert record == json.loads(json.dumps(found.record))
    assert {"keep": 0.9, "confidence": 0.9, "seed": 3, "examples": 2000, "reason": None}.items() <= record.items()
    assert (record["stack"], record["measure"], record["quality"]) == ("encoder", "top1", "default against full depth")
    assert {int(after): at for after, at in record["thresholds"].items()} == found.policy.thresholds  # type: ignore[attr-defined]
    assert set(record["thresholds"]) | set(record["dropped"]) == {"1", "2", "3"}
    assert record["risk"]["p_value"] <= 0.1
    assert record["risk"]["early"] >= 0.9 * record["risk"]["full"]
    assert record["risk"]["examples"] == 1400
    assert record["milliseconds"]["expected"] < record["milliseconds"]["full"] == pytest.approx(4.2)
    assert set(record["versions"]) == {"offramp", "numpy", "onnxruntime"}


def test_a_loaded_bundle_is_calibrated_without_being_written(root: Path) -> None:
    before = files(root)
    found = offramp.calibrate(offramp.load(root), {"ids": ids(2000)}, keep=0.9)
    assert files(root) == before
    found.write(root)
    assert offramp.load(root).policy == found.policy


def test_labels_say_what_is_right(root: Path) -> None:
    """Where the second block is right and full depth is not, leaving there costs nothing."""
    data = {"ids": ids(2000), "labels": bundles.expected(ids(2000), 2).argmax(1)}
    found = offramp.calibrate(root, data, keep=0.99, measure="top1")
    assert found.record["quality"] == "default against labels"
    assert found.record["risk"]["early"] > found.record["risk"]["full"]
    without = offramp.calibrate(root, {"ids": ids(2000)}, keep=0.99, measure="top1").record
    assert found.record["milliseconds"]["expected"] < without["milliseconds"]["expected"]


def test_segments_are_timed_on_this_machine(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(exits, "time_rows", time_rows)
    times = offramp.calibrate(root, {"ids": ids(400)}, keep=0.5).record["milliseconds"]
    assert 0 < times["expected"] <= times["full"] < 100


def test_exits_that_cost_more_than_they_save_are_dropped(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usual = costs(4)
    first = replace(usual, tails=np.array([5.0, 0.1, 0.1, 0.1]))
    monkeypatch.setattr(exits, "time_rows", lambda chain, stack, *_: first)
    record = offramp.calibrate(root, {"ids": ids(2000)}, keep=0.6, measure="top1").record
    assert "it saves nothing: " in record["dropped"]["1"]
    assert "1" not in record["thresholds"]
    monkeypatch.setattr(exits, "time_rows", lambda chain, stack, *_: costs(4, dear=50.0))
    never = offramp.calibrate(root, {"ids": ids(2000)}, keep=0.6)
    assert never.policy == Never()
    assert "is faster than full depth on this machine" in never.record["reason"]


def test_what_saves_no_more_than_noise_is_not_chosen(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(exits, "time_rows", lambda chain, stack, *_: replace(costs(4), around=1000.0))
    never = offramp.calibrate(root, {"ids": ids(2000)}, keep=0.6, measure="top1")
    assert never.policy == Never()
    assert re.search(r"the boldest setting that passed takes 99\.\d% of full depth's time", never.record["reason"])
    assert never.record["milliseconds"]["expected"] == never.record["milliseconds"]["full"]


# Never, and why


def test_too_few_examples(root: Path) -> None:
    found = offramp.calibrate(root, {"ids": ids(100)}, keep=0.99)
    assert found.policy == Never()
    assert "100 examples are too few: keep=0.99 with confidence 0.95 needs at least " in found.record["reason"]
    assert offramp.load(root).policy == Never()
    assert offramp.load(root).manifest.calibration == json.loads(json.dumps(found.record))


def test_a_bundle_that_lacks_what_was_chosen_stays_as_it_is(root: Path, tmp_path: Path) -> None:
    found = offramp.calibrate(offramp.load(root), {"ids": ids(2000)}, keep=0.9, measure="top1")
    other = bundles.classifier(tmp_path / "other.offramp", exits=(4,))
    before = files(other)
    with pytest.raises(PolicyError, match="there is no exit before full depth"):
        found.write(other)
    assert files(other) == before
    assert offramp.load(other).policy == Never()


def test_as_many_as_it_asks_for_are_enough(root: Path) -> None:
    reason = offramp.calibrate(root, {"ids": ids(1)}, keep=0.9).record["reason"]
    needed = int(reason.partition("needs at least ")[2].partition(",")[0])
    again = offramp.calibrate(root, {"ids": np.zeros((needed, 3), np.int64)}, keep=0.9)
    assert "too few" not in str(again.record["reason"])


def test_exits_that_are_not_good_enough(root: Path) -> None:
    labels = bundles.expected(ids(1000), 4).argmax(1)
    found = offramp.calibrate(root, {"ids": ids(1000), "labels": labels}, keep=0.999, confidence=0.999)
    assert found.policy == Never()
    assert found.record["reason"]


def test_a_quality_that_exits_ruin(root: Path) -> None:
    full = bundles.expected(ids(1000), 4)

    def exact(answer: Any, reference: Any) -> float:
        return float(np.allclose(answer, reference, atol=1e-4))

    found = offramp.calibrate(root, {"ids": ids(1000), "labels": full}, keep=0.99, quality=exact)
    assert found.policy == Never()
    assert "even the most careful setting" in found.record["reason"]
    assert found.record["quality"] == "exact against labels"


def test_labels_that_no_answer_agrees_with_are_said(root: Path) -> None:
    data = {"ids": ids(400), "labels": bundles.expected(ids(400), 4).argmin(1)}
    found = offramp.calibrate(root, data, keep=0.9)
    assert found.policy == Never()
    said = r"quality is 0 in all of 120 examples.* the first answer is [0-4], and is compared with the label [0-4]; do "
    assert re.search(said, found.record["reason"])


def test_a_transcript_is_no_label_of_frames() -> None:
    with pytest.raises(
        InputError, match=r"the shape \[2\], the answers have \[4\]\n  try: .* which a transcript has not"
    ):
        same_class(np.zeros((4, 3)), [1, 2])
    with pytest.raises(InputError, match=r"a label is 'AB'; .*\n  try: .*quality=function of answer and label"):
        same_class(np.zeros((4, 3)), "AB")


def test_places_that_do_not_count_are_left_out() -> None:
    logits = np.eye(3)[[0, 1, 2]]
    assert same_class(logits, [0, 1, -100]) == 1.0
    assert same_class(logits, [0, 2, -100]) == 0.5


def test_what_rounding_adds_to_a_quality_is_cut_off() -> None:
    assert graded(lambda *_: 1 + 2e-7, None, None) == 1.0
    assert graded(lambda *_: -2e-7, None, None) == 0.0
    with pytest.raises(InputError, match=r"the quality function returned 1\.001"):
        graded(lambda *_: 1.001, None, None)


@pytest.mark.parametrize(
    ("data", "options", "said"),
    [
        ({"ids": ids(9)}, {"measure": "luck"}, "no exit of 'encoder' has the score 'luck'; there are ent"),
        ({"ids": ids(9)}, {"measure": "luck", "stack": ["encoder"]}, "no exit of 'encoder' has the score 'luck'"),
        ({"ids": ids(9), "labels": ["good"] * 9}, {}, "a label is 'good'"),
        ({"ids": ids(9), "labels": [0] * 8 + [5]}, {}, "a label has 5"),
        ({"ids": ids(9), "labels": np.zeros((9, 2))}, {}, r"a label has the shape \[2\]"),
        ({"ids": ids(9)}, {"quality": lambda *_: 2.0}, "the quality function returned 2.0"),
        ({"ids": ids(9).astype(float)}, {}, "'ids' is float64, expected int64"),
    ],
)
def test_what_does_not_fit_is_refused_with_too_few_examples_too(
    root: Path, data: Any, options: dict[str, Any], said: str
) -> None:
    with pytest.raises(InputError, match=said):
        offramp.calibrate(root, data, **options)


# Data


def test_the_fingerprint_is_of_the_examples_not_of_their_batches(root: Path) -> None:
    chain, all_ = offramp.load(root), ids(10)
    whole = read(chain, {"ids": all_})
    parts = read(chain, [{"ids": all_[:3]}, {"ids": all_[3:].tolist()}])
    assert read(chain, {"ids": all_, "token_type_ids": None}).sha256 == whole.sha256
    labelled = read(chain, {"ids": all_, "labels": np.arange(10)})
    assert len(whole) == len(parts) == 10
    assert whole.sha256 == parts.sha256
    assert len({whole.sha256, labelled.sha256, read(chain, {"ids": all_[::-1]}).sha256}) == 3


def test_the_split_is_of_the_seed(root: Path) -> None:
    examples = read(offramp.load(root), {"ids": ids(100), "labels": np.arange(100)})
    fit, test = examples.split(1)
    assert (len(fit), len(test)) == (30, 70)
    assert sorted([*(fit.labels or ()), *(test.labels or ())]) == list(range(100))
    assert examples.split(1)[0].sha256 == fit.sha256 != examples.split(2)[0].sha256


@pytest.mark.parametrize("layout", bundles.LAYOUTS)
def test_wherever_rows_lie(layout: str, tmp_path: Path) -> None:
    root = bundles.classifier(tmp_path / "b", layout=layout, scores="block" if layout == "second" else "tail")
    rows = ids(300) if layout != "folded" else ids(900).reshape(300, 3, 3)
    data: Any = [{"ids": row[None]} for row in rows] if layout == "none" else {"ids": rows}
    record = offramp.calibrate(root, data, keep=0.5).record
    assert record["examples"] == 300
    assert record["risk"]["full"] == 1.0


@pytest.mark.parametrize(
    ("data", "options", "said"),
    [
        ({}, {}, "data has no inputs"),
        ([], {}, "there are no examples"),
        ({"words": [[1]]}, {}, r"data has \['words'\]; this bundle takes \['ids'\]"),
        ({"ids": [[1, 2]], "labels": [1, 2]}, {}, "2 labels for 1 rows"),
        ([{"ids": [[1]], "labels": [1]}, {"ids": [[2]]}], {}, "1 of 2 examples have labels"),
        ({"ids": ids(99), "labels": np.zeros((99, 2))}, {"keep": 0.5}, r"a label has the shape \[2\]"),
        (
            {"ids": ids(99), "labels": ["good"] * 99},
            {},
            r"a label is 'good'; it is compared with .* 0 to 4\n  try: class ids",
        ),
        ({"ids": ids(99), "labels": [None] * 99}, {}, "a label is None; it is compared with the class ids"),
        ({"ids": ids(99), "labels": [0] * 98 + [5]}, {}, "a label has 5; it is compared with the class ids .*, 0 to 4"),
        ({"ids": ids(99), "labels": [0.5] * 99}, {}, "a label has 0.5; it is compared"),
        ({"ids": ids(99), "labels": [-100] * 99}, {}, "-100 everywhere, which counts nowhere"),
        ({"ids": ids(99), "labels": None}, {}, "the labels are None; one for each row"),
        ({"ids": ids(99), "labels": 3}, {}, "the labels are 3; one for each row"),
        ({"ids": ids(99), "labels": np.array(3)}, {}, r"the labels are array\(3\); one for each row"),
        ({"ids": [["a", "b"]]}, {}, "'ids' is <U1, expected int64"),
        ({"ids": [[0.5, 1.0]]}, {}, "'ids' is float64, expected int64"),
        (ids(99), {}, r"data has a ndarray; a mapping .*\n  try: \{'ids': ..., 'labels': ...\}"),
        (None, {}, "data has a NoneType"),
        ({"ids": [[1, 2], [3]]}, {}, "'ids' has rows of different lengths"),
        ({"ids": 3}, {}, r"'ids' has shape \[\], and no axis of rows"),
        ({"ids": ids(99)}, {"keep": "0.9"}, "both are between 0 and 1"),
        ({"ids": ids(99)}, {"seed": -1}, "seed=-1: a whole number"),
        ({"ids": ids(99)}, {"stack": 3}, "stack=3: a stack's name"),
        ({"ids": ids(99)}, {"measure": ["top1"]}, r"measure=\['top1'\]: a score's name"),
        ({"ids": ids(99)}, {"quality": "exact"}, "quality='exact': a function"),
        ({"ids": ids(99)}, {"keep": 1.0}, "keep=1.0, confidence=0.95: both are between 0 and 1"),
        ({"ids": ids(99)}, {"confidence": 0.0}, "confidence=0.0"),
        (
            {"ids": ids(99)},
            {"measure": "luck", "keep": 0.5},
            "no exit of 'encoder' has the score 'luck'; there are ent",
        ),
        ({"ids": ids(99)}, {"stack": "decoder"}, "'decoder' is no stack to choose"),
        ({"ids": ids(99)}, {"max_new_tokens": 3}, "this bundle does not generate"),
        (
            {"ids": ids(99)},
            {"quality": lambda answer, reference: 2.0, "keep": 0.5},
            "the quality function returned 2.0",
        ),
    ],
)
def test_what_makes_no_sense(data: Any, options: dict[str, Any], said: str, root: Path) -> None:
    before = files(root)
    with pytest.raises(InputError, match=said):
        offramp.calibrate(root, data, **options)
    assert files(root) == before


def test_exits_without_scores(tmp_path: Path) -> None:
    root = bundles.classifier(tmp_path / "b", exits=(4,))
    with pytest.raises(InputError, match=r"has no exit before full depth that has a score(.*\n)*.*insert-scores"):
        offramp.calibrate(root, {"ids": ids(10)})


def test_of_two_stacks_the_last_with_scores(tmp_path: Path) -> None:
    root = bundles.translator(tmp_path / "b")
    found = offramp.calibrate(root, {"source": ids(500), "target": ids(500, 1)}, keep=0.5)
    assert found.record["stack"] == "decoder"
    assert isinstance(found.policy, Each)
    assert offramp.load(root).policy == found.policy


# Generation


@pytest.fixture(scope="module")
def talker(tmp_path_factory: pytest.TempPathFactory) -> Chain:
    return talkers.talker(tmp_path_factory.mktemp("calibrate") / "talker")


def prompts(count: int) -> list[list[int]]:
    random = np.random.default_rng(0)
    return [random.integers(0, 9, random.integers(1, 4)).tolist() for _ in range(count)]


@pytest.fixture
def steady_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Costs, "of", lambda *_: costs(4))
    monkeypatch.setattr(observe, "_streamed", lambda *_: costs(4).full)


@pytest.mark.usefixtures("steady_tokens")
def test_tokens(talker: Chain) -> None:
    found = offramp.calibrate(talker, {"input_ids": prompts(80)}, keep=0.2, max_new_tokens=6)
    record = found.record
    assert (record["stack"], record["quality"]) == ("decoder", "default against full depth")
    assert record["measure"] in ("top1", "margin")
    assert record["risk"]["p_value"] <= 0.05
    assert record["risk"]["full"] == 1.0
    assert record["milliseconds"]["expected"] < record["milliseconds"]["full"]
    early = talker.generate({"input_ids": prompts(80)[:4]}, found.policy, max_new_tokens=6)
    assert min(min(row) for row in early.exits) < 4


def test_tokens_are_timed_on_this_machine(talker: Chain) -> None:
    record = offramp.calibrate(talker, {"input_ids": prompts(70)}, keep=0.5, max_new_tokens=9).record
    assert 0 < record["milliseconds"]["expected"] <= record["milliseconds"]["full"]
    assert set(record["temperatures"]) | set(record["dropped"]) == {"1", "2", "3"}


@pytest.mark.usefixtures("steady_tokens")
def test_tokens_by_a_quality_of_ones_own(talker: Chain) -> None:
    """A quality that nothing hurts lets every setting pass, up to the fastest."""
    seen: list[int] = []

    def always(tokens: NDArray[np.int64], reference: Any) -> float:
        seen.append(tokens.size)
        assert reference == "anything"
        return 1.0

    data = {"input_ids": prompts(80), "labels": ["anything"] * 80}
    found = offramp.calibrate(talker, data, keep=0.5, quality=always, max_new_tokens=6, measure="margin")
    assert found.record["quality"] == "always against labels"
    assert set(seen) == {6}
    assert found.record["settings"]["passed"] == found.record["settings"]["of"] > 0


def test_one_token_behind_several_never_leaves_early(talker: Chain) -> None:
    data = {"input_ids": [[1, *prompt] for prompt in prompts(80)]}
    record = offramp.calibrate(talker, data, keep=0.5, max_new_tokens=1).record
    assert "no text is longer than one token" in record["reason"]


@pytest.mark.usefixtures("steady_tokens")
def test_one_token_leaves_early_behind_a_prompt_of_one(talker: Chain) -> None:
    data = {"input_ids": [prompt[:1] for prompt in prompts(80)]}
    found = offramp.calibrate(talker, data, keep=0.5, max_new_tokens=1, quality=lambda *_: 1.0, measure="margin")
    assert found.record["settings"]["passed"] == found.record["settings"]["of"] > 0


@pytest.mark.parametrize(
    ("prompt", "said"),
    [("abc", "not rows of whole numbers"), ([1, [2]], "has a row that cannot be an array"), ([0.5], "whole numbers")],
)
def test_prompts_that_are_no_token_ids(talker: Chain, prompt: Any, said: str) -> None:
    with pytest.raises(InputError, match=f"'input_ids' .*{said}"):
        offramp.calibrate(talker, {"input_ids": [prompt]}, max_new_tokens=2)


def test_texts_are_greedy(talker: Chain) -> None:
    with pytest.raises(InputError, match="greedy"):
        offramp.calibrate(talker, {"input_ids": prompts(80)}, temperature=1.0)


# Parts


@pytest.mark.parametrize(
    ("one", "other", "expected"),
    [
        ([], [], 1.0),
        ([1, 2, 3], [1, 2, 3], 1.0),
        ([1, 2, 3], [], 0.0),
        ([1, 2, 3, 4], [1, 3, 4], 0.75),
        ([1, 2, 3], [1, 9, 3], 2 / 3),
        ([2, 3, 4, 5], [1, 2, 3, 4], 0.5),
    ],
)
def test_token_agreement(one: list[int], other: list[int], expected: float) -> None:
    assert same_tokens(np.array(one, np.int64), other) == pytest.approx(expected)
    assert same_tokens(np.array(other, np.int64), one) == pytest.approx(expected)


def test_padding_of_a_text_is_none_of_it() -> None:
    right, longer = np.array([1, 2], np.int64), np.array([1, 2, 9, 9], np.int64)
    assert same_tokens(right, [1, 2, -100, -100, -100]) == 1
    assert same_tokens(longer, [1, 2, -100, -100, -100]) == 0.5
    with pytest.raises(InputError, match="compared with the token ids"):
        same_tokens(right, [1, -1])


def test_class_agreement() -> None:
    logits = np.array([[0.1, 0.9], [0.8, 0.2]], np.float32)
    assert same_class(logits, [1, 1]) == 0.5
    assert same_class(logits, logits) == 1.0
    assert same_class(logits[0], 1) == 1.0


@pytest.mark.parametrize("measure", ["top1", "entropy"])
def test_a_scale_is_monotone_and_finds_the_chance(measure: str) -> None:
    random = np.random.default_rng(0)
    logit = random.normal(1, 2, 20_000)
    good = random.random(logit.size) < 1 / (1 + np.exp(-(logit / 2 + 0.5)))
    scores = -logit if measure == "entropy" else 1 / (1 + np.exp(-logit))
    scale = fit_scale(measure, scores, good)
    assert scale.temperature == pytest.approx(2, rel=0.1)
    assert scale.offset == pytest.approx(0.5, abs=0.1)
    for chance in (0.2, 0.6, 0.9):
        at = scale.threshold(measure, chance)
        assert scale.chance(measure, np.array([at]))[0] == pytest.approx(chance, abs=1e-6)
    best = scale.chance(measure, np.array([0.0 if measure == "entropy" else 1.0]))
    assert best[0] > scale.chance(measure, np.array([0.5]))[0]


@pytest.mark.parametrize("good", [True, False])
def test_a_scale_of_exits_that_are_always_right_or_wrong(good: bool) -> None:
    scores = np.linspace(0.1, 1.0, 50)
    chance = fit_scale("top1", scores, np.full(50, good)).chance("top1", scores)
    assert (chance > 0.9).all() if good else (chance < 0.1).all()


def test_late_computations_are_paid_for() -> None:
    """Three legs: a token that goes deep takes along what waits."""
    none = np.zeros(3)
    found = Costs(0.0, np.array([1.0, 10.0, 100.0]), np.array([0.0, 2.0, 3.0]), none, {})
    lengths = np.array([4, 2])
    #   leaves by exit          0    1        0    2 (2 and 3 wait)            next text: 0    2
    taken = np.array([0, 1, 0, 2, 0, 2])
    deep = 1 + (10 + 2 * 1) + (100 + 3 * 3)
    expected = [1, 1 + 10 + 2 * 1, 1, deep, 1, 1 + (10 + 2 * 1) + (100 + 3 * 1)]
    assert found.expected(taken, lengths) == pytest.approx(np.mean(expected))


def test_gates_are_paid_for_once() -> None:
    found = Costs(1.0, np.full(3, 10.0), np.zeros(3), np.array([2.0, 3.0, 4.0]), {"top1": np.array([False, True])})
    one, asked = np.array([1]), np.array([True, True])
    assert found.full == 35
    assert found.expected(np.array([0]), one, "top1", asked) == 1 + 10 + 2
    assert found.expected(np.array([1]), one, "top1", asked) == 1 + 20 + 2 + 3
    assert found.expected(np.array([2]), one, "top1", asked) == 1 + 30 + 2 + 4
    assert found.expected(np.array([2]), one, "top1", np.array([False, True])) == 35


# Without torch


def test_a_calibration_needs_no_torch(root: Path) -> None:
    finished = run_without_torch(
        "import numpy as np, offramp, offramp.calibration\n"
        f"data = {{'ids': np.arange(900).reshape(300, 3) % {bundles.WORDS}}}\n"
        f"print(offramp.calibrate({str(root)!r}, data, keep=0.5).record['examples'])\n"
        "assert 'torch' not in sys.modules"
    )
    assert (finished.stdout, finished.returncode) == ("300\n", 0), finished.stderr


def test_a_picked_token_costs_no_tail() -> None:
    """Unless the tail was run to ask."""
    free = {"top1-short": np.array([True]), "top1": np.array([False])}
    found = Costs(0.0, np.array([1.0, 4.0]), np.zeros(2), np.array([3.0, 3.0]), free, np.array([True, False]))
    taken, lengths, asked = np.array([0, 1]), np.array([2]), np.array([True])
    assert found.leave.tolist() == [0.0, 3.0]
    assert found.expected(taken, lengths, "top1-short", asked) == (1 + 1 + 4 + 3) / 2
    assert found.expected(taken, lengths, "top1", asked) == (1 + 3 + 1 + 3 + 4 + 3) / 2
