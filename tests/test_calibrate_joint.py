"""Calibration of several stacks at once: fixed depths and thresholds, searched together, proven on other examples."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jsonschema
import numpy as np
import pytest
from numpy.typing import NDArray
from test_calibrate import SCHEMA
from test_calibrate_groups import data, steady  # noqa: F401  # a fixture
from test_cli import refused, run
from test_risk import most
from two_modalities import captured

import offramp
from offramp.bundle.json_text import to_json
from offramp.calibration import combinations
from offramp.calibration.combinations import Combination, Search
from offramp.calibration.examples import Examples
from offramp.calibration.risk import accepted, losses_of, p_value
from offramp.calibration.sequence import Asked
from offramp.errors import InputError
from offramp.runtime import Chain, Depth, Each, Never, Policy
from offramp.runtime.result import Timing

REAL = combinations.milliseconds
BLOCKS = 4
EXITS = "insert-exits{stack=encoder},insert-scores{stack=encoder,measure=cosine}"
GROUPS = ("encoder.image", "encoder.text")
SHARES = {"encoder.image": 6.0, "encoder.text": 1.0}  # milliseconds of all blocks


@pytest.fixture(scope="module")
def classifier(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("bundle") / "classifier.offramp"
    program = captured(blocks=BLOCKS, decodes=False)
    offramp.save(offramp.apply(program, f"split-modalities,{EXITS}"), path)
    return path


@pytest.fixture(scope="module")
def generator(tmp_path_factory: pytest.TempPathFactory) -> Chain:
    """Whose decoder has exits without scores."""
    path = tmp_path_factory.mktemp("bundle") / "generator.offramp"
    pipeline = f"split-modalities,{EXITS},insert-exits{{stack=decoder}},insert-cache"
    offramp.save(offramp.apply(captured(blocks=BLOCKS), pipeline), path)
    return offramp.load(path)


def cost(exits: Mapping[str, NDArray[Any]]) -> float:
    """Milliseconds of a row, on average."""
    return 4 + sum(float(SHARES[name] * exits[name].mean() / BLOCKS) for name in GROUPS)


@pytest.fixture(autouse=True)
def reckoned(monkeypatch: pytest.MonkeyPatch, steady: None) -> None:  # noqa: F811
    """Every block costs its share, so that what is chosen does not depend on the machine."""

    def took(asked: Asked, example: Any, policy: Policy) -> float:
        if asked.chain.generates is None:
            return cost(asked.chain.run(example, policy).exits)
        made = asked.chain.generate(example, policy, **asked.options)
        return cost(made.encoders) + float(np.concatenate(made.exits).mean())

    def milliseconds(asked: Asked, examples: Sequence[Any], policies: Sequence[Policy]) -> list[float]:
        return [float(np.mean([took(asked, example, policy) for example in examples])) for policy in policies]

    monkeypatch.setattr(combinations, "milliseconds", milliseconds)


def losing(chain: Chain, examples: dict[str, NDArray[Any]], lost: dict[tuple[int, int], float]) -> Callable[..., float]:
    """A quality that is 0 for that share of rows where patches and words left after so many blocks, else 1.

    The answer is made of a patch, which words reach a block later: some depths answer alike.
    """
    depths = [(1, 4), (2, 4), (3, 1), (3, 4), (4, 1), (4, 2), (4, 4)]
    logits = [
        chain.run(examples, Each(dict(zip(GROUPS, map(Depth, each), strict=True)))).outputs["logits"] for each in depths
    ]
    known = np.stack(logits, 1)  # [rows, depths, classes]
    chances = np.random.default_rng(5).permutation(len(known)) / len(known)

    def quality(answer: NDArray[np.float32], reference: NDArray[np.float32]) -> float:
        row, at = np.unravel_index(np.abs(known - answer).max(2).argmin(), known.shape[:2])
        return float(chances[row] >= lost.get(depths[at], 0.0))

    return quality


@pytest.mark.slow
def test_what_the_first_stack_uses_up_is_left_to_those_that_make_more_of_it(classifier: Path) -> None:
    """Words may leave after a block, or patches after three, not both; patches save more."""
    chain, examples = offramp.load(classifier), data(400)
    quality = losing(chain, examples, {(1, 4): 0.9, (2, 4): 0.9, (3, 1): 0.6, (3, 4): 0.1, (4, 1): 0.1})
    first = offramp.calibrate(chain, examples, keep=0.8, quality=quality, stack="encoder.text")
    assert isinstance(first.policy, Each)
    assert (chain.run(examples, first.policy).exits["encoder.text"] == 1).mean() > 0.9
    then = offramp.calibrate(chain, examples, keep=0.8, quality=quality, stack="encoder.image", others=first.policy)
    both = offramp.calibrate(chain, examples, keep=0.8, quality=quality, stack=GROUPS)
    assert both.policy == Each({"encoder.image": Depth(3), "encoder.text": Depth(2)})
    assert both.record["milliseconds"] == pytest.approx({"full": 11.0, "expected": 9.0})
    greedy, full = (cost(chain.run(examples, policy).exits) for policy in (then.policy, Never()))
    assert full == 11.0
    assert greedy > both.record["milliseconds"]["expected"] + 0.5


def test_both_leave_where_both_may(classifier: Path) -> None:
    chain, examples = offramp.load(classifier), data(400)
    quality = losing(chain, examples, {(1, 4): 0.6, (2, 4): 0.6, (3, 1): 0.05, (3, 4): 0.05, (4, 1): 0.05})
    found = offramp.calibrate(chain, examples, keep=0.85, quality=quality, stack=GROUPS)
    assert found.policy == Each({"encoder.image": Depth(3), "encoder.text": Depth(1)})


def test_the_record(classifier: Path) -> None:
    found = offramp.calibrate(
        classifier, data(200), keep=0.9, quality=lambda *_: 1.0, stack=GROUPS, measure={"encoder.text": "cosine"}
    )
    chain = offramp.load(classifier)
    assert chain.policy == found.policy == Each({"encoder.image": Depth(1), "encoder.text": Depth(1)})
    assert chain.manifest.calibration == found.record
    jsonschema.validate(json.loads(to_json(chain.manifest)), SCHEMA)
    record = found.record
    assert record["stack"] == list(GROUPS)
    assert record["stacks"]["encoder.text"]["policy"] == {"name": "depth", "depth": 1}
    assert record["stacks"]["encoder.text"]["measure"] == "cosine"
    assert record["settings"]["passed"] >= 1
    assert record["risk"]["early"] == 1.0
    assert 1 < record["combinations"] <= combinations.COMBINATIONS


def test_thresholds_are_candidates_too(classifier: Path) -> None:
    """Rows whose score is high lose nothing early, the others everything: no fixed depth will do."""
    chain, examples = offramp.load(classifier), data(400)
    asking = offramp.Confidence(2.0, "cosine")  # which nothing reaches
    scores = chain.run(examples, Each({"encoder.text": asking})).scores["encoder.text"][1]["cosine"]
    whole = chain.run(examples).outputs["logits"]
    shallow = chain.run(examples, Each({"encoder.text": Depth(1)})).outputs["logits"]
    sure = scores >= np.quantile(scores, 0.5)

    def quality(answer: NDArray[np.float32], reference: NDArray[np.float32]) -> float:
        row = int(np.minimum(np.abs(whole - answer).max(1), np.abs(shallow - answer).max(1)).argmin())
        return float(sure[row] or np.allclose(answer, whole[row], atol=1e-4))

    found = offramp.calibrate(chain, examples, keep=0.9, quality=quality, stack=["encoder.text"])
    assert isinstance(found.policy, Each)
    text = found.policy.stacks["encoder.text"]
    assert isinstance(text, offramp.Confidence)
    left = chain.run(examples, found.policy).exits["encoder.text"]
    assert 0.2 < (left == 1).mean() < 0.7


@pytest.mark.slow
def test_of_a_generator_encoder_and_decoder(generator: Chain) -> None:
    stacks = [*GROUPS, "decoder"]
    found = offramp.calibrate(
        generator, data(90, decodes=True), keep=0.9, quality=lambda *_: 1.0, stack=stacks, max_new_tokens=3
    )
    assert found.policy == Each(dict.fromkeys(stacks, Depth(1)))
    assert found.record["stacks"]["decoder"]["measure"] is None
    assert found.record["step"] == "generation"
    made = generator.generate(data(5, decodes=True), found.policy, max_new_tokens=3)
    assert all((made.encoders[name] == 1).all() for name in GROUPS)
    assert (np.concatenate(made.exits) == 1).all()


def test_beside_others(generator: Chain) -> None:
    others = Each({"decoder": Depth(1)})
    found = offramp.calibrate(
        generator,
        data(90, decodes=True),
        keep=0.9,
        quality=lambda *_: 1.0,
        stack=GROUPS,
        others=others,
        max_new_tokens=2,
    )
    assert found.policy == Each({"decoder": Depth(1), "encoder.image": Depth(1), "encoder.text": Depth(1)})
    assert found.record["others"] == others.to_dict()


def test_where_nothing_is_proven_nothing_leaves(classifier: Path) -> None:
    chain, examples = offramp.load(classifier), data(100)
    everything = dict.fromkeys([(1, 4), (2, 4), (3, 1), (3, 4), (4, 1), (4, 2)], 0.9)
    found = offramp.calibrate(chain, examples, keep=0.9, quality=losing(chain, examples, everything), stack=GROUPS)
    assert found.policy in (Never(), Each({"encoder.text": Depth(3)}))  # which changes no answer
    few = offramp.calibrate(chain, data(10), keep=0.9, stack=GROUPS)
    assert "10 examples are too few" in few.record["reason"]


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"stack": ["encoder.image", "head"]}, r"\['head'\] are no stacks to choose; stacks: \['encoder.image'"),
        ({"stack": []}, "no stack is named"),
        ({"stack": GROUPS, "measure": {"decoder": "top1"}}, "a score's name, or one by stack, of encoder.image"),
        ({"stack": GROUPS, "measure": "luck"}, "no exit of 'encoder.image' has the score 'luck'"),
        ({"stack": GROUPS, "others": Each({"encoder.text": Never()})}, "what stacks other than 'encoder.image', 'enc"),
    ],
)
def test_what_makes_no_sense(classifier: Path, options: dict[str, Any], said: str) -> None:
    with pytest.raises(InputError, match=said):
        offramp.calibrate(offramp.load(classifier), data(100), keep=0.9, quality=lambda *_: 1.0, **options)


def test_stacks_without_exits(tmp_path: Path) -> None:
    offramp.save(captured(blocks=BLOCKS, decodes=False), tmp_path / "whole.offramp")
    with pytest.raises(InputError, match=r"\['encoder'\] have no exit before full depth"):
        offramp.calibrate(offramp.load(tmp_path / "whole.offramp"), data(5), stack=["encoder"])


def test_on_the_command_line(classifier: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    np.savez(tmp_path / "data.npz", **data(200))  # type: ignore[arg-type]
    argv = ("calibrate", classifier, "--data", tmp_path / "data.npz", "--keep", "0.3")
    shown = run(capsys, *argv, "--stack", "encoder.image", "--stack", "encoder.text")
    record = offramp.load(classifier).manifest.calibration
    assert record
    assert record["stack"] == list(GROUPS)
    assert "\nencoder.text " in shown
    assert " ms a row expected" in shown
    said = refused(capsys, *argv, "--stack", "encoder.image", "--stack", "head")
    assert "['head'] are no stacks to choose" in said


# The promise


SAVES = ((0.0, 1.0, 2.0),) * 3


def lost(combination: Combination) -> float:
    """The share of rows that a combination loses: more than all stacks alone do, where all are bold."""
    return float(0.03 * sum(combination) + 0.004 * np.prod(combination))


def test_the_promise_is_broken_no_more_often_than_stated(monkeypatch: pytest.MonkeyPatch) -> None:
    """On 200 draws of examples, the true quality of the combination that was chosen among 27."""
    keep, confidence, draws = 0.9, 0.9, 200
    drawn = np.random.default_rng(0)

    def together(chain: None, examples: Sequence[NDArray[np.float64]]) -> Any:
        yield list(range(len(examples))), examples

    def answered(chain: None, examples: Sequence[NDArray[np.float64]], policy: Any, options: Any) -> Any:
        chance = 0.0 if policy == Never() else lost(policy)
        at = 0 if policy == Never() else int(np.dot(policy, (9, 3, 1)))
        return [float(example[at] >= chance) for example in examples], {}

    def milliseconds(asked: Asked, examples: Any, policies: Sequence[Any]) -> list[float]:
        return [10.0 if policy == Never() else 10.0 - sum(policy) for policy in policies]

    for name, made in {"together": together, "answered": answered, "milliseconds": milliseconds}.items():
        monkeypatch.setattr(combinations, name, made)
    asked = Asked(None, keep, confidence, lambda answer, _: answer, {})  # type: ignore[arg-type]
    broken = passed = 0
    for _ in range(draws):
        fitting = Examples(list(drawn.random((150, 27))), None)
        search = Search(asked, SAVES, lambda at: at, fitting, 400)  # type: ignore[arg-type, return-value]
        search.run()
        path = list(search.path())
        held = drawn.random((400, 27))
        early = [held[:, np.dot(at, (9, 3, 1))] >= lost(at) for at in path]
        count = accepted((p_value(losses_of(each, np.ones(400), keep), keep) for each in early), 1 - confidence)
        passed += count > 0
        broken += count > 0 and 1 - lost(path[count - 1]) < keep
    assert broken / draws <= most(1 - confidence, draws)
    assert passed > 0.9 * draws


def made_up(monkeypatch: pytest.MonkeyPatch, loses: Callable[[Combination], bool]) -> Search:
    """A search over seven candidates of five stacks each, of which the bolder one saves a millisecond more."""

    def answered(chain: None, examples: Sequence[Any], policy: Any, options: Any) -> Any:
        return np.where(policy != Never() and loses(policy), [0.7, 1.0] * 15, 1.0).tolist(), {}

    def milliseconds(asked: Asked, examples: Any, policies: Sequence[Any]) -> list[float]:
        return [100.0 - (0 if policy == Never() else sum(policy)) for policy in policies]

    monkeypatch.setattr(combinations, "together", lambda chain, examples: [(list(range(len(examples))), examples)])
    monkeypatch.setattr(combinations, "answered", answered)
    monkeypatch.setattr(combinations, "milliseconds", milliseconds)
    asked = Asked(None, 0.9, 0.9, lambda answer, _: answer, {})  # type: ignore[arg-type]
    search = Search(asked, [list(range(7))] * 5, lambda at: at, Examples([{}] * 30, None), 100)  # type: ignore[arg-type, return-value]
    search.run()
    return search


def test_a_search_goes_straight_where_nothing_is_lost(monkeypatch: pytest.MonkeyPatch) -> None:
    search = made_up(monkeypatch, lambda at: False)
    assert len(search.found) == 1 + 5 * 6 + 4
    assert len(search.path()) <= combinations.TESTS
    assert list(search.path())[-1] == (6,) * 5


def test_other_work_on_the_machine_counts_for_little(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of sixteen runs one is interrupted in a segment, and another between two."""
    runs = iter([(1.0, 0.0)] * 6 + [(9.0, 0.0)] + [(1.0, 0.0)] * 6 + [(1.0, 30.0)] + [(1.0, 0.0)] * 20)

    def traced(*_: Any) -> tuple[list[Timing], float]:
        first, beside = next(runs)
        return [Timing("first", first, 1), Timing("second", 2.0, 1)], first + 2.0 + 0.5 + beside

    monkeypatch.setattr(combinations, "traced", traced)
    chain: Any = SimpleNamespace(manifest=SimpleNamespace(stacks={}))
    asked = Asked(chain, 0.9, 0.9, lambda answer, _: answer, {})
    (found,) = REAL(asked, [{}] * 16, [Never()])
    assert found == pytest.approx(3.5 + (4.0 - 1.0) / 16)


def test_a_search_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    search = made_up(monkeypatch, lambda at: sum(map(bool, at)) > 1)
    assert len(search.found) == combinations.COMBINATIONS
    assert list(search.path())[-1].count(0) == 4
