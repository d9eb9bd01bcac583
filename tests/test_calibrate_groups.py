"""Calibration of groups of tokens, and of stacks that run once for a generation, beside what others do."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import jsonschema
import numpy as np
import pytest
from numpy.typing import NDArray
from test_calibrate import SCHEMA
from two_modalities import VOCABULARY, captured

import offramp
from offramp.bundle.json_text import to_json
from offramp.calibration import exits
from offramp.calibration.costs import Costs
from offramp.calibration.observe import Observed, observe_tokens, time_rows
from offramp.errors import InputError
from offramp.runtime import Chain, Confidence, Each, Never

EXITS = "insert-exits{stack=encoder},insert-scores{stack=encoder,measure=cosine}"
IMAGE = Each({"encoder.image": Confidence(measure="cosine", thresholds={1: -1.0})})


@pytest.fixture(scope="module")
def classifier(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("bundle") / "classifier.offramp"
    program = captured(decodes=False)
    offramp.save(offramp.apply(program, f"split-modalities,{EXITS}"), path)
    return path


@pytest.fixture(scope="module")
def generator(tmp_path_factory: pytest.TempPathFactory) -> Chain:
    path = tmp_path_factory.mktemp("bundle") / "generator.offramp"
    pipeline = f"split-modalities,{EXITS},insert-exits{{stack=decoder}},insert-scores{{stack=decoder}},insert-cache"
    offramp.save(offramp.apply(captured(), pipeline), path)
    return offramp.load(path)


@pytest.fixture(autouse=True)
def steady(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each block costs a millisecond, so that what is chosen does not depend on the machine."""

    def costs(chain: Chain, stack: Any, examples: Any, beside: Any = None) -> Costs:
        ways = [float(at + 1) for at in range(len(stack.exits))]
        return Costs.of_ways(ways, None if beside is None else ways[-1] + 1, stack)

    def tokens(chain: Chain, stack: Any, *rest: Any) -> tuple[Observed, Costs]:
        return observe_tokens(chain, stack, *rest)[0], costs(chain, stack, None, rest[-1])

    monkeypatch.setattr(exits, "time_rows", costs)
    monkeypatch.setattr(exits, "observe_tokens", tokens)


def data(count: int, decodes: bool = False) -> dict[str, NDArray[Any]]:
    drawn = np.random.default_rng(0)
    found: dict[str, NDArray[Any]] = {
        "pixel_values": drawn.standard_normal((count, 3, 8, 8), np.float32),
        "input_ids": drawn.integers(1, VOCABULARY, (count, 6)),
        "attention_mask": np.ones((count, 6), np.int64),
    }
    return found | ({"decoder_input_ids": np.ones((count, 1), np.int64)} if decodes else {})


def always(answer: Any, reference: Any) -> float:
    return 1.0


def test_one_group_after_the_other(classifier: Path) -> None:
    image = offramp.calibrate(classifier, data(100), keep=0.9, quality=always, stack="encoder.image")
    assert isinstance(image.policy, Each)
    assert list(image.policy.stacks) == ["encoder.image"]
    both = offramp.calibrate(classifier, data(100), keep=0.9, quality=always, stack="encoder.text", others=image.policy)
    assert isinstance(both.policy, Each)
    assert list(both.policy.stacks) == ["encoder.image", "encoder.text"]
    assert both.policy.stacks["encoder.image"] == image.policy.stacks["encoder.image"]
    assert both.record["others"] == image.policy.to_dict()
    chain = offramp.load(classifier)
    assert chain.policy == both.policy
    jsonschema.validate(json.loads(to_json(chain.manifest)), SCHEMA)
    result = chain.run(data(20))
    assert (result.exits["encoder.image"] < 3).any()
    assert (result.exits["encoder.text"] < 3).any()


def test_others_stay_where_nothing_is_proven(classifier: Path) -> None:
    image = offramp.calibrate(classifier, data(100), keep=0.9, quality=always, stack="encoder.image")

    def worse(answer: NDArray[Any], reference: NDArray[Any]) -> float:
        return float(np.array_equal(answer, reference))

    assert isinstance(image.policy, Each)
    text = offramp.calibrate(classifier, data(100), keep=0.9, quality=worse, stack="encoder.text", others=image.policy)
    assert text.record["reason"]
    assert offramp.load(classifier).policy == image.policy


@pytest.mark.parametrize("policy", [offramp.Verify(1), offramp.Budget(1.5)])
def test_others_are_the_same_in_every_run(generator: Chain, policy: Any) -> None:
    with pytest.raises(InputError, match="is not the same in every run"):
        offramp.calibrate(generator, data(5, decodes=True), stack="encoder.text", others=Each({"decoder": policy}))


def test_what_is_proven_is_proven_of_all_together(classifier: Path) -> None:
    """Answers are compared with those of full depth everywhere, so others that lose them are not overlooked."""

    def equal(answer: NDArray[Any], reference: NDArray[Any]) -> float:
        return float(np.allclose(answer, reference, rtol=1e-3, atol=1e-3))

    found = offramp.calibrate(
        offramp.load(classifier), data(100), keep=0.9, quality=equal, stack="encoder.text", others=IMAGE
    )
    assert found.policy == Never()
    assert "it kept 0.0000 of the quality" in str(found.record["reason"])


def test_an_encoder_of_a_generator_is_judged_by_what_is_generated(generator: Chain) -> None:
    seen = []

    def quality(answer: NDArray[np.int64], reference: NDArray[np.int64]) -> float:
        seen.append(answer)
        return 1.0

    found = offramp.calibrate(
        generator, data(90, decodes=True), keep=0.9, quality=quality, stack="encoder.text", max_new_tokens=3
    )
    assert isinstance(found.policy, Each)
    assert list(found.policy.stacks) == ["encoder.text"]
    assert {answer.shape for answer in seen} == {(3,)}
    made = generator.generate(data(10, decodes=True), found.policy, max_new_tokens=3)
    assert (made.encoders["encoder.text"] < 3).any()
    assert (made.encoders["encoder.image"] == 3).all()
    assert found.record["step"] == "input"
    record = offramp.calibrate(generator, data(90, decodes=True), keep=0.9, max_new_tokens=3).record
    assert (record["stack"], record["step"]) == ("decoder", "token")


def test_a_decoder_beside_an_encoder(generator: Chain) -> None:
    found = offramp.calibrate(
        generator, data(90, decodes=True), keep=0.9, quality=always, others=IMAGE, max_new_tokens=4
    )
    assert isinstance(found.policy, Each)
    assert found.policy.stacks.keys() >= {"encoder.image"}
    made = generator.generate(data(4, decodes=True), found.policy, max_new_tokens=4)
    assert (made.encoders["encoder.image"] == 1).all()


def test_others_that_cannot_be_written_are_refused_before_anything_runs(classifier: Path) -> None:
    own: Any = Each({"encoder.image": lambda state: state.scores["top1"] > 0.9})  # type: ignore[dict-item]
    with pytest.raises(InputError, match="JSON cannot hold it"):
        offramp.calibrate(offramp.load(classifier), data(5), stack="encoder.text", others=own)


@pytest.mark.parametrize("others", [Never(), Each({"encoder.text": Never()})])
def test_others_are_other_stacks(classifier: Path, others: Any) -> None:
    with pytest.raises(InputError, match=r"what stacks other than 'encoder.text' do"):
        offramp.calibrate(offramp.load(classifier), data(5), stack="encoder.text", others=others)


def test_tokens_that_leave_alone_have_no_common_threshold(tmp_path: Path) -> None:
    program = captured(decodes=False)
    offramp.save(offramp.apply(program, f"split-modalities{{tokens=token}},{EXITS}"), tmp_path / "alone.offramp")
    with pytest.raises(InputError, match=r"the tokens of 'encoder.text' leave alone"):
        offramp.calibrate(offramp.load(tmp_path / "alone.offramp"), data(5), stack="encoder.text")


def test_reports_are_of_tokens(generator: Chain) -> None:
    with pytest.raises(InputError, match="runs once for a generation"):
        offramp.calibration.report(generator, data(5, decodes=True), stack="encoder.image")


def test_what_a_group_costs_is_measured(classifier: Path) -> None:
    """Whatever the machine does: the ways are timed in turns, and deeper never costs less than nothing."""
    chain = offramp.load(classifier)
    rows = [{name: value[:1] for name, value in data(3).items()}] * 5
    costs = time_rows(chain, chain.stacks["encoder.image"], rows)
    assert costs.full == pytest.approx(costs.blocks.sum())
    assert (costs.blocks >= 0).all()
    assert costs.blocks[0] > 0
