"""Several tokens of one row in one run (`Part.steps`), against the same bundle one by one."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import helper

import offramp
from offramp.bundle.json_text import from_json, to_json
from offramp.errors import BundleError, ExportError
from offramp.export import multistep
from offramp.passes import apply
from offramp.runtime import Chain
from offramp.runtime.generation.multistep import MOST
from offramp.runtime.policies.base import Policy, Rows, State

IDS = "0|1|2|3|4|5|6|7|8|9"
SHORT = f"insert-scores{{measure=top1-short|margin-short|prediction-short,ids={IDS}}}"
PASSES = f"insert-cache,insert-exits{{after=1|3}},insert-scores{{measure=top1}},{SHORT}"


def bundle(root: Path, passes: str = PASSES, **options: Any) -> Chain:
    captured = tiny.captured(tiny.Talker, {"input_ids": tiny.ids()}, seed=4)
    offramp.save(apply(captured.program, passes), root, segments=1, **options)
    return offramp.load(root)


def one_by_one(chain: Chain) -> Chain:
    """The same bundle, as if it had no file for several tokens."""
    stacks = {
        name: replace(stack, parts=tuple(replace(part, steps=None) for part in stack.parts))
        for name, stack in chain.manifest.stacks.items()
    }
    return Chain(replace(chain.manifest, stacks=stacks), chain._root)


def steps_of(chain: Chain) -> list[str | None]:
    return [part.steps for part in chain.manifest.stacks["decoder"].parts]


@pytest.fixture(scope="module")
def chain(tmp_path_factory: pytest.TempPathFactory) -> Chain:
    return bundle(tmp_path_factory.mktemp("steps") / "m.offramp")


@pytest.fixture(scope="module")
def single(chain: Chain) -> Chain:
    return one_by_one(chain)


def told(chain: Chain, policy: Policy, **options: Any) -> list[tuple[Any, ...]]:
    found = chain.stream({"input_ids": [[3]]}, policy, **options)
    return [(step.token, step.exit, step.scores, step.finished) for step in found]


def test_fires(chain: Chain) -> None:
    """One run makes many tokens, of which the first has its trace."""
    assert steps_of(chain) == ["decoder.1-steps", None, None]
    found = list(chain.stream({"input_ids": [[3]]}, offramp.Depth({"decoder": 1}), max_new_tokens=MOST + 4))
    assert [[ran.segment for ran in step.trace] for step in found if step.trace] == [["decoder.1-steps"]] * 2
    assert [at for at, step in enumerate(found) if step.trace] == [0, MOST]


POLICIES: dict[str, Callable[[float], Policy]] = {
    "confidence": lambda at: offramp.Confidence(at, measure="top1-short"),
    "one exit": lambda at: offramp.Confidence(measure="margin-short", thresholds={1: at}),
    "shallow-deep": lambda at: offramp.ShallowDeep(1, at, "top1-short", pick=0.0),
    "head": lambda at: offramp.Confidence(at, measure="top1"),
    "each": lambda at: offramp.Each({"decoder": offramp.Confidence(at, measure="top1-short")}),
    "adaptive": lambda at: offramp.Adaptive(1, at, "top1-short", target=0.8, every=4, least=2, audit=5, pick=0.0),
}


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_tokens_exits_and_scores_are_those_one_by_one(chain: Chain, single: Chain, data: st.DataObject) -> None:
    make = POLICIES[data.draw(st.sampled_from(sorted(POLICIES)))]
    at = data.draw(st.floats(0.05, 0.95))
    options = {
        "max_new_tokens": data.draw(st.integers(9, 60)),
        "stop": data.draw(st.lists(st.integers(0, 10), max_size=2)),
        "suppress": data.draw(st.lists(st.integers(0, 10), max_size=2)),
        "min_new_tokens": data.draw(st.integers(0, 9)),
        "propagate": data.draw(st.sampled_from(["defer", "hidden", "kv"])),
        "max_pending": data.draw(st.sampled_from([None, 2, 5])),
    }
    learns = isinstance(make(at), offramp.Adaptive)
    if learns:
        options["propagate"] = "defer"
    assert told(chain, make(at), **options) == told(single, make(at), **options)


def test_a_learning_policy_learns_the_same(chain: Chain, single: Chain) -> None:
    policies = [POLICIES["adaptive"](0.3) for _ in range(2)]
    for policy, each in zip(policies, (chain, single), strict=True):
        for _ in range(3):
            told(each, policy, max_new_tokens=50)
    assert policies[0].state() == policies[1].state()  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    "options",
    [
        {"temperature": 1.0, "seed": 3},
        {"repetition_penalty": 1.5},
        {"no_repeat_ngram_size": 2},
        {"forced_last": [5]},
        {"forced_first": 7},
        {"bad_words": [[1, 2]]},
        {"processors": [lambda tokens, logits: logits]},
    ],
    ids=lambda options: next(iter(options)),
)
def test_each_token_alone_where_one_needs_a_look(chain: Chain, single: Chain, options: dict[str, Any]) -> None:
    policy = offramp.Depth({"decoder": 1})
    found = list(chain.stream({"input_ids": [[3]]}, policy, max_new_tokens=9, **options))
    assert all(ran.segment != "decoder.1-steps" for step in found for ran in step.trace)
    assert told(chain, policy, max_new_tokens=9, **options) == told(single, policy, max_new_tokens=9, **options)


@dataclass(frozen=True, slots=True)
class Late(offramp.Confidence):
    """It leaves from the fourth token on, which its class's threshold does not say."""

    def leave(self, state: State) -> Rows:
        assert state.steps is not None
        return np.array(state.steps >= 3)


def test_a_policy_that_says_nothing_is_asked_of_each(chain: Chain, single: Chain) -> None:
    for policy in (
        Late(0.1, measure="top1-short"),
        offramp.Decay(0.3, measure="top1-short", tokens=20),
        offramp.Each({"decoder": Late(0.1, measure="top1-short")}),
    ):
        assert told(chain, policy, max_new_tokens=20) == told(single, policy, max_new_tokens=20)


def test_several_rows_run_together(chain: Chain, single: Chain) -> None:
    inputs, policy = {"input_ids": [[3], [8, 2], [5]]}, offramp.Confidence(0.3, measure="top1-short")
    found, expected = (each.generate(inputs, policy, max_new_tokens=30) for each in (chain, single))
    assert [row.tolist() for row in found.tokens] == [row.tolist() for row in expected.tokens]
    assert [row.tolist() for row in found.exits] == [row.tolist() for row in expected.exits]


@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_a_generator_does_the_same_by_hand(chain: Chain, single: Chain, data: st.DataObject) -> None:
    """What was computed ahead and not taken is as if it had not been."""
    policy = offramp.Confidence(data.draw(st.floats(0.1, 0.6)), measure="top1-short")
    pair = [each.generator({"input_ids": [[3]]}, policy, max_new_tokens=40) for each in (chain, single)]
    for _ in range(data.draw(st.integers(1, 8))):
        what = data.draw(st.sampled_from(["next", "next", "append", "rewind", "logits"]))
        if not pair[0].rows:
            break
        if what == "next":
            found, expected = ([(t.token, t.exit, t.scores) for t in each.next()] for each in pair)
            assert found == expected
        elif what == "append":
            new = [data.draw(st.lists(st.integers(0, 10), min_size=1, max_size=3))]
            for each in pair:
                each.append(new)
        elif what == "rewind":
            length = data.draw(st.integers(1, pair[0].tokens(0).size))
            for each in pair:
                each.rewind(length)
        else:
            np.testing.assert_allclose(pair[0].logits(), pair[1].logits(), rtol=1e-5, atol=1e-6)
        assert pair[0].tokens(0).tolist() == pair[1].tokens(0).tolist()


@pytest.mark.parametrize("options", [{"target": "portable"}, {"precision": "int8", "loss": 1.0}], ids=repr)
def test_other_bundles(tmp_path: Path, options: dict[str, Any]) -> None:
    chain = bundle(tmp_path / "m.offramp", **options)
    policy = offramp.Confidence(0.3, measure="top1-short")
    assert steps_of(chain)[0] is not None
    assert told(chain, policy, max_new_tokens=40) == told(one_by_one(chain), policy, max_new_tokens=40)


@pytest.mark.parametrize(
    "passes",
    [
        PASSES.replace("|prediction-short", ""),
        PASSES.replace("top1-short|margin-short|", "").replace("insert-scores{measure=top1},", ""),
        PASSES.replace("insert-cache,", ""),
        "insert-cache",
    ],
    ids=["no pick", "no score", "no cache", "no exit"],
)
def test_no_file_where_there_is_nothing_to_feed_back(tmp_path: Path, passes: str) -> None:
    assert set(steps_of(bundle(tmp_path / "m.offramp", passes))) == {None}


def test_no_file_for_a_part_that_takes_its_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(multistep, "LARGEST", 1000)
    assert set(steps_of(bundle(tmp_path / "m.offramp"))) == {None}


def test_a_file_that_says_something_else_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = multistep._Loop.model

    def wrong(self: Any, one: Any) -> Any:
        made = model(self, one)
        body = made.graph.node[0].attribute[0].g
        next(node for node in body.node if node.op_type == "Add" and "longer" in node.output).input[1] = "two_more"
        body.initializer.append(helper.make_tensor("two_more", 7, [1], [2]))
        return made

    monkeypatch.setattr(multistep._Loop, "model", wrong)
    with pytest.raises(ExportError, match="several tokens at once are not those one by one"):
        bundle(tmp_path / "m.offramp")
    assert not (tmp_path / "m.offramp").exists()


def test_no_file_where_onnx_runtime_does_not_take_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = multistep._Loop.model

    def broken(self: Any, one: Any) -> Any:
        made = model(self, one)
        del made.graph.node[0].attribute[0].g.node[0]
        return made

    monkeypatch.setattr(multistep._Loop, "model", broken)
    chain = bundle(tmp_path / "m.offramp")
    assert set(steps_of(chain)) == {None}
    assert not list((tmp_path / "m.offramp").glob("*-steps.onnx"))
    assert len(told(chain, offramp.Depth({"decoder": 1}), max_new_tokens=5)) == 5


def test_a_manifest_whose_file_does_not_fit_is_refused(chain: Chain) -> None:
    manifest = chain.manifest
    steps = manifest.segments["decoder.1-steps"]
    outputs = {key: name for key, name in steps.outputs.items() if name != "steps/decoder.1"}
    wrong = replace(manifest, segments={**manifest.segments, "decoder.1-steps": replace(steps, outputs=outputs)})
    with pytest.raises(BundleError, match=r"'decoder.1-steps' has nothing for steps/decoder.1"):
        from_json(to_json(wrong))
    parts = tuple(replace(part, steps="gone") for part in manifest.stacks["decoder"].parts)
    stacks = {"decoder": replace(manifest.stacks["decoder"], parts=parts)}
    with pytest.raises(BundleError, match="there is no segment 'gone'"):
        from_json(to_json(replace(manifest, stacks=stacks)))
