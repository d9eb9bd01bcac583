"""The table of measures, and that nothing else knows what a measure's name says."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest

from offramp.bundle.measures import (
    MEASURES,
    OF_LOGITS,
    OF_OWN_HEAD,
    OF_SHORT,
    OF_STATE,
    PICK,
    SCREENED,
    measure_named,
    names_from,
)
from offramp.calibration.gates import Scale, evidence, leaves
from offramp.errors import PolicyError
from offramp.runtime.policies.thresholds import Confidence, check_learner

ROOT = Path(__file__).parent.parent
ROOMS = ("bundle", "program", "passes", "training", "export", "runtime", "calibration", "src/offramp/cli")
#: What asks a name for its meaning: comparisons, prefixes and suffixes.
_ASKING = re.compile(rf"""[=!]= *"({"|".join(MEASURES)})"|(starts|ends)with\("(prediction|top1|-short)|"-short"\)""")


def test_every_measure_is_from_one_source() -> None:
    assert (*OF_LOGITS, *OF_STATE, *OF_OWN_HEAD) == tuple(MEASURES)
    assert names_from("short head", "gate") == ("learned", *OF_SHORT)
    assert all(measure.name == name for name, measure in MEASURES.items())


def test_a_score_says_what_or_how_surely() -> None:
    says_what = [name for name, measure in MEASURES.items() if not measure.gates]
    assert says_what == ["prediction", PICK, SCREENED]
    assert [name for name, measure in MEASURES.items() if measure.dtype == "int64"] == says_what
    assert [name for name, measure in MEASURES.items() if measure.gates and not measure.bounded] == ["entropy"]


def test_measures_of_a_bundle_go_from_0_to_1() -> None:
    for name in ("calm", "prediction-of-mine", "entropy-like"):
        measure = measure_named(name)
        assert (measure.name, measure.source, measure.bounded, measure.gates) == (name, "bundle", True, True)


@pytest.mark.parametrize("name", [*MEASURES, "calm"])
def test_calibration_and_policies_ask_the_table(name: str) -> None:
    measure = measure_named(name)
    scores = np.array([[0.2], [0.7]], np.float32)
    assert leaves(name, scores, {0: 0.5}).tolist() == ([0, 1] if measure.surer == "less" else [1, 0])
    sure = evidence(name, np.array([0.2, 0.7]))
    assert (sure[0] > sure[1]) == (measure.surer == "less")
    scale = Scale(0.5, 0.1)
    np.testing.assert_allclose(scale.chance(name, np.array([scale.threshold(name, 0.8)])), [0.8], rtol=1e-6)
    if measure.bounded:
        check_learner(Confidence(0.5), name, 0.5)
        return
    with pytest.raises(PolicyError, match=f"'{name}' does not go from 0, unsure, to 1"):
        check_learner(Confidence(0.5), name, 0.5)


def test_no_module_asks_a_name() -> None:
    found = [
        f"{path.relative_to(ROOT)}: {match[0]}"
        for room in ROOMS
        for path in sorted((ROOT / room).rglob("*.py"))
        if path.name != "measures.py"
        for match in _ASKING.finditer(path.read_text(encoding="utf-8"))
    ]
    assert found == []
