"""Several tokens of one row in one run (`Part.steps`), against the same bundle one by one."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import tiny
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import helper

import offramp
from offramp.bundle.json_text import from_json, to_json
from offramp.errors import BundleError, ExecutionError
from offramp.export import multistep
from offramp.passes import apply
from offramp.runtime import Chain
from offramp.runtime.generation.multistep import MOST
from offramp.runtime.policies.base import Bound, Cost, Policy, Rows, State

IDS = "1|3|6|8"  # few, so that a pick is often none of full depth's
SHORT = f"insert-scores{{measure=top1-short|margin-short|prediction-short,ids={IDS}}}"
PASSES = f"insert-cache,insert-exits{{after=1|3}},insert-scores{{measure=top1}},{SHORT}"


def bundle(root: Path, passes: str = PASSES, **options: Any) -> Chain:
    captured = tiny.captured(tiny.Talker, {"input_ids": tiny.ids()}, seed=4)
    offramp.save(apply(captured.program, passes), root, segments=1, **options)
    return offramp.load(root)


def one_by_one(chain: Chain) -> Chain:
    """The same bundle, as if it had no file for several tokens."""
    stacks = {
        name: replace(
            stack,
            parts=tuple(replace(part, steps=None) for part in stack.parts),
            whole=None if stack.whole is None else replace(stack.whole, steps=None),
        )
        for name, stack in chain.manifest.stacks.items()
    }
    return Chain(replace(chain.manifest, stacks=stacks), chain._root)


def steps_of(chain: Chain) -> list[str | None]:
    return [part.steps for part in chain.manifest.stacks["decoder"].parts]


def whole_of(chain: Chain) -> str | None:
    whole = chain.manifest.stacks["decoder"].whole
    assert whole is not None
    return whole.steps


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


def test_full_depth_fires(chain: Chain, tmp_path: Path) -> None:
    """Where nobody is asked, one run makes many tokens; so it is where there is no exit."""
    plain = bundle(tmp_path / "m.offramp", "insert-cache")
    assert (whole_of(chain), steps_of(plain)) == ("decoder-whole-steps", ["decoder.4-steps"])
    for each, name in ((chain, "decoder-whole-steps"), (plain, "decoder.4-steps")):
        found = list(each.stream({"input_ids": [[3]]}, max_new_tokens=MOST + 4))
        assert [[ran.segment for ran in step.trace] for step in found if step.trace] == [[name]] * 2
        assert [at for at, step in enumerate(found) if step.trace] == [0, MOST]
        assert {step.exit for step in found} == {4}


def test_a_token_that_is_not_to_be_has_the_head_asked(chain: Chain, single: Chain) -> None:
    """Each time the run ends with it; it counts as one that does not run on."""
    tokens = [step.token for step in single.stream({"input_ids": [[3]]}, max_new_tokens=12)]
    banned = tokens[3]
    found = list(chain.stream({"input_ids": [[3]]}, max_new_tokens=12, suppress=[banned]))
    assert banned not in [step.token for step in found]
    assert "tail" in {ran.segment for step in found for ran in step.trace}
    assert told(chain, offramp.Never(), max_new_tokens=12, suppress=[banned]) == told(
        single, offramp.Never(), max_new_tokens=12, suppress=[banned]
    )


def test_weights_are_the_bodys_own(chain: Chain) -> None:
    """Those of the graph around a loop are slower to read."""
    for file in ("decoder.1-steps.onnx", "decoder-whole-steps.onnx"):
        graph = onnx.load(chain._root / file, load_external_data=False).graph
        (body,) = (attribute.g for attribute in graph.node[0].attribute if attribute.name == "body")
        stored = {weight.name for weight in body.initializer if weight.external_data}
        assert stored & {name for node in body.node if node.op_type == "MatMul" for name in node.input}
        assert not graph.initializer


class NoNumber(tiny.Talker):
    """Behind word 9 no logit is a number."""

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:  # type: ignore[override]
        logits = super().forward(input_ids)
        return torch.where((input_ids == 9)[..., None], torch.nan, logits)


def test_what_is_no_number_is_no_token(tmp_path: Path) -> None:
    captured = tiny.captured(NoNumber, {"input_ids": tiny.ids()}, seed=4)
    offramp.save(apply(captured.program, "insert-cache"), tmp_path / "m.offramp", segments=1)
    chain = offramp.load(tmp_path / "m.offramp")
    for each in (chain, one_by_one(chain)):
        with pytest.raises(ExecutionError, match="NaN or infinite"):
            list(each.stream({"input_ids": [[9]]}, max_new_tokens=3))


def test_runs_of_one_token_are_none_of_several(chain: Chain) -> None:
    """Where nothing leaves, the file runs twice; once a token has left, it runs again."""
    found = list(chain.stream({"input_ids": [[3]]}, offramp.Confidence(2.0, measure="top1-short"), max_new_tokens=20))
    assert [step.trace[0].segment for step in found] == ["decoder.1-steps"] * 2 + ["decoder.1"] * 18
    decoder = chain.generator({"input_ids": [[3]]}, offramp.Depth({"decoder": 1}))._session.decoder
    assert decoder._stayed == 0


def test_long_caches_are_not_copied_for_each_token(chain: Chain, monkeypatch: pytest.MonkeyPatch) -> None:
    """Up to 64 tokens; each has a key and a value in the first block."""
    monkeypatch.setattr("offramp.runtime.generation.session.CACHES", 64 * 2 * tiny.WIDTH * 4)
    found = list(chain.stream({"input_ids": [[3]]}, offramp.Depth({"decoder": 1}), max_new_tokens=100))
    ran = [segment.segment for step in found for segment in step.trace]
    assert ran == ["decoder.1-steps"] * 4 + ["decoder.1"] * 36


POLICIES: dict[str, Callable[[float], Policy]] = {
    "never": lambda at: offramp.Never(),
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
        "max_new_tokens": data.draw(st.integers(9, 120)),
        "stop": data.draw(st.lists(st.integers(0, 10), max_size=2)),
        "forced_first": data.draw(st.sampled_from([None, None, 7])),
        "suppress_first": data.draw(st.lists(st.integers(0, 10), max_size=2)),
        "suppress": data.draw(st.lists(st.integers(0, 6), max_size=2)),  # not what is forced
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


class Wide(tiny.Talker):
    """A head of more classes than the table has words, as padded ones are."""

    def __init__(self) -> None:
        super().__init__()
        self.head = torch.nn.Linear(tiny.WIDTH, tiny.WORDS + 2)


def test_a_head_of_more_classes_than_words(tmp_path: Path) -> None:
    captured = tiny.captured(Wide, {"input_ids": tiny.ids()}, seed=4)
    offramp.save(apply(captured.program, PASSES), tmp_path / "m.offramp", segments=1)
    chain = offramp.load(tmp_path / "m.offramp")
    policy = offramp.Confidence(0.3, measure="top1-short")
    assert told(chain, policy, max_new_tokens=40) == told(one_by_one(chain), policy, max_new_tokens=40)


def test_tokens_of_one_run_share_its_time(chain: Chain) -> None:
    found = list(chain.stream({"input_ids": [[3]]}, offramp.Depth({"decoder": 1}), max_new_tokens=MOST))
    inside = found[0].trace[0].milliseconds / MOST
    assert all(step.milliseconds >= inside for step in found)


class Costly(offramp.Confidence):
    """It wants to know what each token took."""

    def __init__(self) -> None:
        super().__init__(0.1, measure="top1-short")
        object.__setattr__(self, "seen", [])

    @property
    def observes(self) -> frozenset[Any]:
        return frozenset({Cost})

    def observe(self, seen: Any) -> None:
        self.seen.append(seen.depths.tolist())  # type: ignore[attr-defined]


def test_a_policy_that_is_told_of_costs_is_told_of_each_token(chain: Chain) -> None:
    policy = Costly()
    found = told(chain, policy, max_new_tokens=12)
    assert policy.seen == [[exit_] for _, exit_, _, _ in found]  # type: ignore[attr-defined]


@dataclass(frozen=True)
class Counted(offramp.Depth):
    """It leaves four times, then it goes by how many tokens the row has."""

    heard: list[list[int]] = field(default_factory=list)

    def leave(self, state: State) -> Rows:
        assert state.steps is not None
        self.heard.append(state.steps.tolist())
        return np.array(state.steps % 5 < 4)

    def bound(self, stack: str, after: int) -> Bound | None:
        return Bound(tokens=4 - sum(map(len, self.heard)) % 5)


def test_a_policy_of_a_user_says_how_many_may_leave(chain: Chain, single: Chain) -> None:
    policies = [Counted({"decoder": 1}) for _ in range(2)]
    found, expected = (
        told(each, policy, max_new_tokens=23) for each, policy in zip((chain, single), policies, strict=True)
    )
    assert found == expected
    heard = [[step for steps in policy.heard for step in steps] for policy in policies]
    assert heard[0] == heard[1] == list(range(23))
    assert len(policies[0].heard) < len(policies[1].heard)


def test_several_rows_run_together(chain: Chain, single: Chain) -> None:
    inputs, policy = {"input_ids": [[3], [8, 2], [5]]}, offramp.Confidence(0.3, measure="top1-short")
    found, expected = (each.generate(inputs, policy, max_new_tokens=30) for each in (chain, single))
    assert [row.tolist() for row in found.tokens] == [row.tolist() for row in expected.tokens]
    assert [row.tolist() for row in found.exits] == [row.tolist() for row in expected.exits]


@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_a_generator_does_the_same_by_hand(chain: Chain, single: Chain, data: st.DataObject) -> None:
    """What was computed ahead and not taken is as if it had not been."""
    kind, at = data.draw(st.sampled_from(["never", "confidence", "adaptive"])), data.draw(st.floats(0.1, 0.6))
    pair = [each.generator({"input_ids": [[3]]}, POLICIES[kind](at), max_new_tokens=40) for each in (chain, single)]
    for _ in range(data.draw(st.integers(1, 12))):
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


def test_what_was_computed_ahead_for_nothing_is_not_again(chain: Chain) -> None:
    """Whoever puts in tokens of his own does not wait for those that would have followed."""
    generator = chain.generator({"input_ids": [[3]]})
    runs = []
    for token in ([1], [8]):
        runs += [ran.segment for ran in generator.next()[0].trace]
        generator.append([token])
    runs += [ran.segment for ran in generator.next()[0].trace]
    assert runs == ["decoder-whole-steps"] + ["decoder-whole", "tail"] * 2


@pytest.mark.parametrize("options", [{"target": "portable"}, {"precision": "int8", "loss": 1.0}], ids=repr)
def test_other_bundles(tmp_path: Path, options: dict[str, Any]) -> None:
    chain = bundle(tmp_path / "m.offramp", **options)
    assert None not in (steps_of(chain)[0], whole_of(chain))
    for policy in (offramp.Confidence(0.3, measure="top1-short"), offramp.Never()):
        assert told(chain, policy, max_new_tokens=40) == told(one_by_one(chain), policy, max_new_tokens=40)


@pytest.mark.parametrize(
    "passes",
    [
        PASSES.replace("|prediction-short", ""),
        PASSES.replace("top1-short|margin-short|", "").replace("insert-scores{measure=top1},", ""),
        PASSES.replace("insert-cache,", ""),
    ],
    ids=["no pick", "no score", "no cache"],
)
def test_no_file_where_there_is_nothing_to_feed_back(tmp_path: Path, passes: str) -> None:
    assert set(steps_of(bundle(tmp_path / "m.offramp", passes))) == {None}


def test_no_file_for_a_part_that_takes_its_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(multistep, "LARGEST", 1000)
    chain = bundle(tmp_path / "m.offramp")
    assert {*steps_of(chain), whole_of(chain)} == {None}


def _longer(body: Any) -> None:
    """Each token lies two places behind the one before."""
    next(node for node in body.node if "longer" in node.output).input[1] = "two_more"
    body.initializer.append(helper.make_tensor("two_more", 7, [1], [2]))


def _shorter(body: Any) -> None:
    """ONNX Runtime misses an operator."""
    del body.node[0]


@pytest.mark.parametrize("spoilt", [_longer, _shorter])
def test_no_file_that_says_something_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, spoilt: Callable[[Any], None]
) -> None:
    model = multistep._Loop.model

    def made(self: Any, one: Any) -> Any:
        found = model(self, one)
        spoilt(found.graph.node[0].attribute[0].g)
        return found

    monkeypatch.setattr(multistep._Loop, "model", made)
    chain = bundle(tmp_path / "m.offramp")
    assert "several tokens at once" in caplog.text
    assert {*steps_of(chain), whole_of(chain)} == {None}
    assert not list((tmp_path / "m.offramp").glob("*-steps.onnx"))
    assert len(told(chain, offramp.Depth({"decoder": 1}), max_new_tokens=5)) == 5


def test_a_manifest_whose_file_does_not_fit_is_refused(chain: Chain) -> None:
    manifest = chain.manifest
    steps = manifest.segments["decoder.1-steps"]
    outputs = {key: name for key, name in steps.outputs.items() if name != "steps/decoder.1"}
    wrong = replace(manifest, segments={**manifest.segments, "decoder.1-steps": replace(steps, outputs=outputs)})
    with pytest.raises(BundleError, match=r"'decoder.1-steps' has nothing for steps/decoder.1"):
        from_json(to_json(wrong))
    whole = manifest.segments["decoder-whole-steps"]
    outputs = {key: name for key, name in whole.outputs.items() if name != "steps/next"}
    wrong = replace(manifest, segments={**manifest.segments, "decoder-whole-steps": replace(whole, outputs=outputs)})
    with pytest.raises(BundleError, match=r"whole.steps: 'decoder-whole-steps' has nothing for steps/next"):
        from_json(to_json(wrong))
    parts = tuple(replace(part, steps="gone") for part in manifest.stacks["decoder"].parts)
    stacks = {"decoder": replace(manifest.stacks["decoder"], parts=parts)}
    with pytest.raises(BundleError, match="there is no segment 'gone'"):
        from_json(to_json(replace(manifest, stacks=stacks)))
