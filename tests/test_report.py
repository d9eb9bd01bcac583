"""The report: what it measures, what the oracle bounds, and what it says."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import bundles
import numpy as np
import pytest
import talkers
from numpy.typing import NDArray

import offramp
from offramp.calibration import reporting
from offramp.calibration.costs import Costs
from offramp.calibration.reporting import Report, report
from offramp.calibration.verdicts import Point, verdict
from offramp.errors import InputError
from offramp.runtime import Chain

ALL = {1: 0.5, 4: 0.5}
FULL = Point("Never()", 0.8, 10.0, 1.0, {4: 1.0})


def ids(count: int) -> NDArray[np.int64]:
    return np.random.default_rng(0).integers(0, bundles.WORDS, (count, 3))


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return bundles.classifier(tmp_path / "tiny.offramp", policy={"name": "confidence", "threshold": 0.9})


@pytest.fixture
def found(root: Path, monkeypatch: pytest.MonkeyPatch) -> Report:
    free = dict.fromkeys(("top1", "entropy"), np.array([False, False]))
    steady = Costs(0.5, np.array([1.0, 1.0, 2.0]), np.zeros(3), np.full(3, 0.1), free)
    monkeypatch.setattr(reporting, "time_rows", lambda *_: steady)
    return report(offramp.load(root), {"ids": ids(200)})


def test_what_is_measured(found: Report) -> None:
    assert (found.step, found.stack, found.blocks) == ("row", "encoder", 4)
    assert found.full
    assert (found.full.quality, found.full.speedup, found.full.exits) == (1.0, 1.0, {4: 1.0})
    assert found.full.milliseconds > 0
    for point in found.frontier:
        assert 0 <= point.quality <= 1
        assert point.speedup == pytest.approx(found.full.milliseconds / point.milliseconds)
        assert sum(point.exits.values()) == pytest.approx(1)
        assert set(point.exits) <= {1, 2, 4}
    assert found.frontier[-1].policy == "the bundle's own policy"
    assert found.frontier[0].quality >= found.frontier[-2].quality


def test_what_the_oracle_is(found: Report) -> None:
    """Every row leaves at the first exit that agrees with full depth; its time is that of the segments."""
    assert found.full
    assert found.oracle
    rows = ids(200)[np.random.default_rng(0).permutation(200)[60:]]
    answers = np.stack([bundles.expected(rows, after).argmax(1) for after in (1, 2, 4)], 1)
    taken = (answers == answers[:, -1:]).argmax(1)
    assert found.oracle.quality == 1.0
    assert found.oracle.exits == {
        after: pytest.approx((taken == at).mean()) for at, after in enumerate((1, 2, 4)) if (taken == at).any()
    }
    milliseconds = 0.5 + np.array([1.1, 2.1, 4.1])[taken].mean()
    assert found.oracle.speedup == pytest.approx(4.6 / milliseconds)
    assert found.depths == {1: pytest.approx(3 / 4.6), 2: pytest.approx(2 / 4.6)}
    assert found.segments[1] == {"blocks": 1.0, "leave": 0.1, "gate top1": 0.1, "gate entropy": 0.1}
    assert found.segments[0] == {"around": 0.5}


def test_json(found: Report) -> None:
    data = json.loads(json.dumps(found.to_dict()))
    assert data["verdict"] == found.verdict
    assert len(data["frontier"]) == len(found.frontier)


@pytest.mark.parametrize(
    ("frontier", "oracle", "said"),
    [
        ([(0.8, 2.0)], 3.0, "yes: some policy saves 50% of the time (2.00x) at 100.0% of the quality; a perfect gate "),
        ([(0.82, 1.5), (0.7, 3.0)], 3.0, "yes: some policy saves 33% of the time (1.50x) at 102.5% of the quality"),
        ([(0.7, 3.0)], 2.0, "not with these gates: a perfect gate would save 50%, but no setting that keeps 99%"),
        ([(0.8, 1.02)], 2.0, "not with these gates"),
        ([], 1.06, "no: a perfect gate would save 6%; "),
        ([(0.8, 1.3)], 0.9, "no: a perfect gate would save 0%; "),
    ],
)
def test_the_sentence(frontier: list[tuple[float, float]], oracle: float, said: str, root: Path) -> None:
    points = [Point("some policy", quality, 10 / speed, speed, ALL) for quality, speed in frontier]
    perfect = replace(FULL, milliseconds=10 / oracle, speedup=oracle)
    stack = offramp.load(root).stacks["encoder"]
    assert verdict(FULL, points, perfect, {1: 0.7}, stack).startswith(said)


def test_a_width_pays_where_no_gate_would(root: Path) -> None:
    """What a perfect gate saves bounds what exits do, not what learners do."""
    points = [Point("a confidence", 0.8, 2.0, 5.0, ALL), Point("a width", 0.8, 5.0, 2.0, ALL, 0.4)]
    perfect, stack = replace(FULL, milliseconds=9.6, speedup=1.04), offramp.load(root).stacks["encoder"]
    said = "yes: a width saves 50% of the time (2.00x) at 100.0% of the quality; of exits a perfect gate would save 4%"
    assert verdict(FULL, points, perfect, {1: 0.7}, stack) == said
    worse = replace(points[1], quality=0.7)
    assert verdict(FULL, [worse], perfect, {1: 0.7}, stack).startswith("no: a perfect gate would save 4%")


def test_without_examples_only_times(root: Path) -> None:
    found = report(offramp.load(root), {"ids": ids(4)}, judge=False)
    assert found.verdict.startswith("cannot say without examples: leaving after ")
    assert (found.full, found.oracle, list(found.frontier)) == (None, None, [])
    assert set(found.segments) == {0, 1, 2, 4}


def test_texts_of_one_token_say_nothing(tmp_path: Path) -> None:
    chain: Chain = talkers.talker(tmp_path / "talker")
    for judge in (True, False):
        with pytest.raises(InputError, match=r"no text is longer than one token.*\n  try: max_new_tokens=2 or more"):
            report(chain, {"input_ids": np.ones((10, 2), np.int64)}, judge=judge, max_new_tokens=1)


def test_tokens(tmp_path: Path) -> None:
    chain: Chain = talkers.talker(tmp_path / "talker")
    prompts = np.random.default_rng(0).integers(0, 9, (10, 2))
    found = report(chain, {"input_ids": prompts}, max_new_tokens=10)
    assert found.step == "token"
    assert found.full
    assert found.oracle
    assert found.full.quality == found.oracle.quality == 1.0
    assert set(found.depths) == {1, 2, 3}
    assert "gate margin" in found.segments[1]
    assert found.segments[1]["blocks"] > 0


@pytest.mark.parametrize(
    ("labels", "said"),
    [
        (bundles.expected(ids(30), 4).argmin(1), "quality is 0 in all of 30 examples.*is compared with the label"),
        (["good"] * 30, "a label is 'good'; it is compared with the class ids"),
    ],
)
def test_labels_that_never_match_say_nothing(root: Path, labels: object, said: str) -> None:
    with pytest.raises(InputError, match=said):
        report(offramp.load(root), {"ids": ids(30), "labels": labels})


def test_no_answer_to_judge(tmp_path: Path) -> None:
    root = bundles.translator(tmp_path / "b")
    chain = offramp.load(root)
    assert report(chain, {"source": ids(40), "target": ids(40)}).stack == "decoder"
    with pytest.raises(InputError, match="no examples"):
        report(chain, [])
