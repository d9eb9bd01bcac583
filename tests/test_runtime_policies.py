"""Each policy on scores made up here, and what it refuses."""

from __future__ import annotations

import copy
import json
import math
import pickle
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest

import offramp
from offramp.bundle.manifest import Exit, Part, Stack
from offramp.cli._policy import SPECS, parse
from offramp.errors import PolicyError
from offramp.runtime import policies
from offramp.runtime.policies.base import Function, Policy, State
from offramp.runtime.policies.builtin import (
    NAMED,
    Budget,
    Confidence,
    Decay,
    Depth,
    Each,
    Entropy,
    Learned,
    Never,
    Patience,
    ShallowDeep,
    Verify,
    Width,
    from_dict,
)
from offramp.runtime.policies.stack_policy import StackPolicy


def _stack(name: str, *exits: int, scores: Sequence[str] = ("top1", "entropy", "prediction")) -> Stack:
    found = tuple(Exit(i, (), "s", {"y": "y"}, dict.fromkeys(scores if i < exits[-1] else (), "v")) for i in exits)
    return Stack(name, name, exits[-1], "x", "s", tuple(Part(i, (), "s") for i in exits), found)


STACKS = {"encoder": _stack("encoder", 1, 2, 4), "decoder": _stack("decoder", 3, 6, scores=("cosine",))}


def test_a_policy_hears_nothing_of_stacks_that_it_is_not_asked_about() -> None:
    """An encoder at full depth would else be paid for by the decoder."""
    budget, stacks = Budget(4.0), {"encoder": _stack("encoder", 1, 4, scores=()), "decoder": _stack("decoder", 3, 6)}
    budget.check(stacks)
    for name, took in (("encoder", [4, 4]), ("decoder", [3, 6])):
        StackPolicy(budget, stacks[name], 2).report(took, 1.0)
    assert (budget.state()["steps"], budget.spent) == (1, 4.5)


def _walk(policy: Policy, measure: str, *scores: Sequence[float]) -> list[list[bool]]:
    """What a policy says at exits after 1, 2, ... for rows that never leave."""
    kind = np.int64 if measure == "prediction" else np.float32
    stack = _stack("encoder", *range(1, len(scores) + 2), scores=(measure,))
    policy.check({"encoder": stack})
    asked = StackPolicy(policy, stack, len(scores[0]))
    rows = np.arange(len(scores[0]))
    return [asked.leave(i + 1, rows, {measure: np.array(row, kind)}).tolist() for i, row in enumerate(scores)]


def test_confidence() -> None:
    assert _walk(Confidence(0.5), "top1", [0.4, 0.5, 0.6, math.nan]) == [[False, True, True, False]]
    policy = Confidence(0.5, "cosine", thresholds={2: 0.9})
    assert _walk(policy, "cosine", [0.6], [0.6], [0.6]) == [[True], [False], [True]]


def test_entropy() -> None:
    assert _walk(Entropy(0.5), "entropy", [0.4, 0.5, 0.6, math.nan]) == [[True, True, False, False]]


def test_patience() -> None:
    rows = [[1, 1, 1], [1, 2, 1], [1, 2, 2], [3, 2, 1]]
    f, t = False, True
    assert _walk(Patience(1), "prediction", *rows) == [[f, f, f], [t, f, t], [t, t, f], [f, t, f]]
    assert _walk(Patience(2), "prediction", *rows) == [[f, f, f], [f, f, f], [t, f, f], [f, t, f]]


def _at(
    policy: Policy, measure: str, scores: Sequence[float], steps: Sequence[int] | None, after: int = 2
) -> list[bool]:
    """What a policy says of rows that have generated so many tokens."""
    stack = _stack("decoder", after, after + 2, scores=(measure,))
    policy.check({"decoder": stack})
    asked = StackPolicy(policy, stack, len(scores))
    if steps is not None:
        asked.restart(np.array(steps, np.int64))
    leaving = asked.leave(after, np.arange(len(scores)), {measure: np.array(scores, np.float32)})
    return [bool(one) for one in leaving]


def test_learned() -> None:
    assert _walk(Learned(0.5), "learned", [0.4, 0.5, math.nan]) == [[False, True, False]]
    assert Learned(0.5) != Confidence(0.5, "learned")  # each is written down under its own name


def test_decay_is_equation_5_of_calm() -> None:
    policy = Decay(0.7, tokens=10, beta=0.8, tau=3.0)
    for step in (0, 1, 5, 10, 40):
        threshold = 0.8 * 0.7 + 0.2 * math.exp(-3.0 * step / 10)
        around = [threshold - 1e-5, threshold + 1e-5]
        assert _at(policy, "top1", around, [step, step]) == [False, True]
    assert _at(policy, "top1", [0.7, 0.7, 0.7, math.nan], [0, 5, 10, 10]) == [False, True, True, False]
    assert _at(policy, "top1", [0.75, 0.77], None) == [False, True]  # no text grows: as at the start
    single = Decay(None, thresholds={2: 0.5}, beta=1.0)
    assert _at(single, "top1", [0.49, 0.5], [0, 99]) == [False, True]
    assert _at(Decay(1.0, tokens=4, beta=0.9, tau=0.0), "top1", [1.0], [2]) == [True]  # clipped to 1


def test_decay_lets_nothing_leave_in_the_first_share() -> None:
    policy = Decay(0.5, "cosine", tokens=9, share=1 / 3)
    assert _at(policy, "cosine", [1.0, 1.0, 1.0, 1.0], [0, 2, 3, 9]) == [False, False, True, True]


def test_steps_are_of_the_rows_that_are_asked() -> None:
    seen: list[State] = []

    def function(state: State) -> Any:
        seen.append(state)
        return state.scores["top1"] > 0.5

    asked = StackPolicy(Function(function), _stack("decoder", 1, 2, 3, scores=("top1",)), 3)
    asked.restart(np.array([4, 5, 6]))
    asked.leave(1, np.array([2, 0]), {"top1": np.array([0.1, 0.9], np.float32)})
    asked.keep(np.array([0]))
    asked.leave(2, np.array([2]), {"top1": np.array([0.1], np.float32)})
    assert [state.steps.tolist() for state in seen if state.steps is not None] == [[6, 4], [6]]


def test_shallow_and_deep() -> None:
    """A score that equals the threshold goes deep; no other exit is asked."""
    assert _at(ShallowDeep(2, 0.5), "margin", [0.4, 0.5, 0.6, math.nan], None) == [False, False, True, False]
    assert StackPolicy(ShallowDeep(2, measure="top1"), STACKS["encoder"], 1).wanted == {1: None, 2: ("top1",)}
    assert _at(Verify(2, 0.5), "top1", [0.4, 0.5, 0.6], None) == [False, False, True]


def test_history_keeps_the_rows_that_stay() -> None:
    seen: list[State] = []

    def function(state: State) -> Any:
        seen.append(state)
        return state.scores["top1"] > 0.5

    stack = _stack("encoder", 1, 2, 3, 4, scores=("top1",))
    asked = StackPolicy(Function(function), stack, 3)
    asked.leave(1, np.arange(3), {"top1": np.array([0.1, 0.9, 0.2], np.float16)})
    asked.keep(np.array([0, 2]))
    asked.leave(2, np.array([0, 2]), {"top1": np.array([[0.3], [0.8]], np.float64)})
    asked.keep(np.array([0]))
    asked.leave(3, np.array([0]), {"top1": np.array([0.4], np.float32)})
    assert {after: scores["top1"].round(1).tolist() for after, scores in seen[2].history.items()} == {
        1: pytest.approx([0.1]),
        2: pytest.approx([0.3]),
    }
    assert seen[1].history[1]["top1"].dtype == np.float32
    np.testing.assert_allclose(asked.record[2]["top1"], [0.3, np.nan, 0.8], rtol=1e-3)


def test_which_exits_are_asked() -> None:
    def asked(policy: Policy, name: str) -> dict[int, Any]:
        return StackPolicy(policy, STACKS[name], 1).wanted

    assert asked(Never(), "encoder") == {1: None, 2: None}
    assert asked(Depth(2), "encoder") == {1: None, 2: ()}
    assert asked(Depth({"decoder": 3}), "encoder") == {1: None, 2: None}
    assert asked(Confidence(0.5), "encoder") == {1: ("top1",), 2: ("top1",)}
    assert asked(Confidence(0.5), "decoder") == {3: None}
    assert asked(Confidence(None, thresholds={2: 0.5}), "encoder") == {1: None, 2: ("top1",)}
    assert asked(Patience(2), "encoder") == {1: ("prediction",), 2: ("prediction",)}
    assert asked(Function(lambda state: state), "encoder") == {
        1: ("top1", "entropy", "prediction"),
        2: ("top1", "entropy", "prediction"),
    }
    assert asked(Each({"encoder": Entropy(1.0)}), "encoder") == {1: ("entropy",), 2: ("entropy",)}
    assert asked(Each({"encoder": Entropy(1.0)}), "decoder") == {3: None}


@pytest.mark.parametrize(
    "policy",
    [
        Never(),
        Depth({"encoder": 4, "decoder": 6}),
        Confidence(0.5, "cosine"),
        Confidence(None, thresholds={1: 0.5, 2: 0.7}),
        Each({"encoder": Confidence(0.9), "decoder": Confidence(0.5, "cosine", thresholds={3: 1.0})}),
        Patience(3),
        Decay(0.9, tokens=20, beta=0.5, tau=1.0, share=0.25, thresholds={1: 0.8}),
        Decay(0.9, "cosine"),
        ShallowDeep(2, 0.7, "top1"),
        Verify(1, 0.3, "top1", drafts=7),
        Each({"decoder": ShallowDeep(3, measure="cosine"), "encoder": Verify(2)}),
    ],
)
def test_policies_that_fit_and_can_be_written_down(policy: Policy) -> None:
    policy.check(STACKS)
    assert from_dict(policy.to_dict()) == policy
    assert policy.to_dict()["name"] == type(policy).__name__.lower()


LISTING = """
  encoder: exits after 1, 2, 4 of 4 blocks; scores entropy, prediction, top1
  decoder: exits after 3, 6 of 6 blocks; scores cosine"""


@pytest.mark.parametrize(
    ("policy", "message", "hint"),
    [
        (Depth(2), "stack 'decoder' has no exit after 2 blocks", "insert-exits{stack=decoder,after=2}"),
        (
            Depth({"encoder": 3}),
            "stack 'encoder' has no exit after 3 blocks",
            "insert-exits{stack=encoder,after=3}",
        ),
        (Depth({"other": 1}), "there is no stack 'other'", None),
        (Each({"other": Never()}), "there is no stack 'other'", None),
        (Confidence(0.5, "margin"), "has the score 'margin'", "insert-scores{measure=margin}"),
        (
            Confidence(0.5, thresholds={3: 1.0}),
            "no exit after 3 blocks with the score 'top1'",
            "insert-exits{after=3}",
        ),
        (Confidence(0.5, thresholds={4: 1.0}), "no exit after 4 blocks", "insert-scores{measure=top1}"),
        (Decay(0.5, thresholds={3: 1.0}), "no exit after 3 blocks with the score 'top1'", "insert-exits{after=3}"),
        (Learned(0.5), "has the score 'learned'", "insert-scores{measure=learned}"),
        (ShallowDeep(2), "has the score 'margin'", "insert-scores{measure=margin}"),
        (ShallowDeep(3, measure="top1"), "no exit after 3 blocks with the score 'top1'", "insert-exits{after=3}"),
        (Verify(4), "no exit after 4 blocks with the score 'top1'", "insert-exits{after=4}"),
    ],
)
def test_policies_that_do_not_fit(policy: Policy, message: str, hint: str | None) -> None:
    with pytest.raises(PolicyError) as caught:
        policy.check(STACKS)
    assert message in str(caught.value)
    assert LISTING in str(caught.value)
    assert (hint or "") in (caught.value.hint or "")


def test_a_stack_without_exits() -> None:
    only = {"encoder": _stack("encoder", 4)}
    Never().check(only)
    Depth(4).check(only)
    for policy in (Confidence(0.5), Entropy(0.5), Patience(2)):
        with pytest.raises(PolicyError, match=r"no exit before full depth(.*\n)*.*insert-exits"):
            policy.check(only)


def test_a_policy_of_ones_own_that_asks_for_what_is_not_there() -> None:
    class Mine(Policy):
        def measures(self, stack: str, exit_: Exit) -> tuple[str, ...]:
            return ("luck",)

    with pytest.raises(PolicyError, match=r"after 1 blocks does not have the scores luck(.*\n)*.*measure=luck"):
        StackPolicy(Mine(), STACKS["encoder"], 1)
    with pytest.raises(PolicyError, match="JSON cannot hold it"):
        Mine().to_dict()


def test_options_that_make_no_sense() -> None:
    refused: list[tuple[Callable[[], Policy], str]] = [
        (lambda: Confidence(None), "has no threshold"),
        (lambda: Entropy(math.nan), "has no threshold"),
        (lambda: Confidence(1, thresholds={1: math.nan}), "has no threshold"),
        (lambda: ShallowDeep(1, math.nan), "has no threshold"),
        (lambda: Verify(1, math.nan), "has no threshold"),
        (lambda: Decay(None), "has no threshold"),
        (lambda: Patience(0), "at least 1"),
        (lambda: Verify(1, drafts=0), "at least 1"),
        (lambda: Decay(0.5, tokens=0), "at least 1"),
        (lambda: Decay(1.5), "from 0 to 1"),
        (lambda: Decay(0.5, beta=-1), "from 0 to 1"),
        (lambda: Decay(0.5, thresholds={1: math.inf}), "from 0 to 1"),
    ]
    for make, message in refused:
        with pytest.raises(PolicyError, match=message):
            make()
    wrong: list[tuple[dict[str, Any], str]] = [
        ({"name": "luck"}, "no policy 'luck'; there are never, depth"),
        ({}, "no policy None"),
        ({"name": "confidence"}, "has no threshold"),
        ({"name": "patience"}, "'patience' cannot have the options"),
        ({"name": "confidence", "threshold": 1, "colour": 2}, "colour"),
        ({"name": "confidence", "threshold": 1, "thresholds": {"x": 1}}, "cannot have the options"),
        ({"name": "each", "stacks": {"encoder": {"name": "luck"}}}, "no policy 'luck'"),
        ({"name": "each", "stacks": 3}, "cannot have the options"),
        ({"name": "shallowdeep"}, "missing 1 required positional argument: 'after'"),
    ]
    for data, message in wrong:
        with pytest.raises(PolicyError, match=message):
            from_dict(data)


def test_names() -> None:
    """Every policy is public, and its name is that of its class."""
    for name, kind in NAMED.items():
        assert getattr(offramp, kind.__name__) is kind
        assert name == kind.__name__.lower()


def test_the_commands_examples() -> None:
    for text in SPECS.split(", "):
        assert from_dict(parse(text).to_dict()) == parse(text)
    assert parse("decay:0.9,2=0.8,tokens=64,share=0.25") == Decay(0.9, tokens=64, share=0.25, thresholds={2: 0.8})
    assert parse("verify:2,measure=margin,drafts=3") == Verify(2, measure="margin", drafts=3)
    exits = Confidence(0.9, measure="margin", thresholds={1: 0.5})
    assert parse("width:0.4,confidence:0.9,measure=margin,1=0.5") == Width(0.4, exits)
    assert parse("width:budget=0.4, never") == Width(0.4, Never())
    for text, message in (
        ("width:,patience:2", "width needs a value"),
        ("width:0.4,0.5", "'0.5' is one value too many"),
        ("width:0.4,luck:2", "no policy 'luck'"),
        ("width:0.4,width:0.2", "one width for all stacks"),
        ("width:0.4,colour=2", "colour"),
        ("confidence:0.9,width:0.4", "one value too many"),
    ):
        with pytest.raises(PolicyError, match=message):
            parse(text)
    with pytest.raises(PolicyError, match="verify needs a value"):
        parse("verify")
    with pytest.raises(PolicyError, match="'x' is no number"):
        parse("adaptive:2,target=x")


def test_a_depth_is_a_whole_number() -> None:
    counted: Any = np.int64(2)
    assert Depth(counted) == Depth(2)
    assert type(Depth(counted).depth) is int
    for wrong in (2.0, "2", True, {"encoder": 2.0}):
        with pytest.raises(PolicyError, match=r"numbers of blocks\n  try: Depth\(2\)"):
            Depth(wrong)  # type: ignore[arg-type]


# Options are of their types, and plain

free: Any = offramp  # whose types nobody checks


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: free.Confidence("0.5"), "Confidence: threshold is '0.5', expected a number"),
        (lambda: free.Confidence(True), "Confidence: threshold is True, expected a number"),
        (lambda: free.Confidence(np.array(0.5)), r"Confidence: threshold is array\(0.5\), expected a number"),
        (lambda: free.Confidence(0.5, None), "Confidence: measure is None, expected a text"),
        (lambda: free.Confidence(0.5, thresholds={1.5: 0.5}), r"thresholds is {1.5: 0.5}, expected numbers by numbers"),
        (lambda: free.Confidence(0.5, thresholds={1: "x"}), r"thresholds is {1: 'x'}, expected numbers by numbers"),
        (lambda: free.Confidence(0.5, thresholds=[0.5]), r"thresholds is \[0.5\], expected numbers by numbers"),
        (lambda: free.Entropy("x"), "Entropy: threshold is 'x', expected a number"),
        (lambda: free.Learned("x"), "Learned: threshold is 'x', expected a number"),
        (lambda: free.Decay(0.5, tokens=2.5), "Decay: tokens is 2.5, expected a whole number"),
        (lambda: free.Decay(0.5, tau="4"), "Decay: tau is '4', expected a number"),
        (lambda: free.Patience(1.5), "Patience: patience is 1.5, expected a whole number"),
        (lambda: free.Patience(True), "Patience: patience is True, expected a whole number"),
        (lambda: free.ShallowDeep("2"), "ShallowDeep: after is '2', expected a whole number"),
        (lambda: free.ShallowDeep(2, pick="x"), "ShallowDeep: pick is 'x', expected a number"),
        (lambda: free.ShallowDeep(2, None), "ShallowDeep: threshold is None, expected a number"),
        (lambda: free.Verify(2, drafts=2.5), "Verify: drafts is 2.5, expected a whole number"),
        (lambda: free.Adaptive(2.5), "Adaptive: after is 2.5, expected a whole number"),
        (lambda: free.Adaptive(2, memory=1e3), "Adaptive: memory is 1000.0, expected a whole number"),
        (lambda: free.Budget("3"), "Budget: blocks is '3', expected a number"),
        (lambda: free.Width("0.4"), "Width: budget is '0.4', expected a number"),
        (lambda: free.Width(0.4, 3), "3 is no policy"),
        (lambda: free.Each({"encoder": 3}), "3 is no policy"),
        (lambda: free.Each({"encoder": free.Confidence}), "class .*Confidence'> is no policy"),
        (lambda: free.Each(free.Confidence(0.9)), "policies by the names of stacks, this is Confidence"),
        (lambda: policies.from_dict(free.__name__), "'offramp' is no policy that JSON has"),
    ],
)
def test_options_of_other_types(make: Callable[[], Policy], said: str) -> None:
    with pytest.raises(PolicyError, match=said):
        make()


PLAIN: list[Policy] = [
    free.Confidence(np.float32(0.5), thresholds={np.int64(1): np.float64(0.25)}),
    free.Decay(np.float32(0.5), tokens=np.int32(4)),
    free.Depth({"encoder": np.int64(2)}),
    free.Patience(np.int64(2)),
    free.Verify(np.int8(1), np.float16(0.5), drafts=np.int64(2)),
    free.Adaptive(np.int64(2), np.float32(0.5), memory=np.int64(400)),
    free.Budget(np.float64(2.5)),
    free.Budget(np.int64(2)),
    free.Width(np.float32(0.5), free.Each({"encoder": free.Confidence(np.float32(0.5))})),
]


@pytest.mark.parametrize("policy", PLAIN, ids=repr)
def test_numbers_of_numpy_are_written_down(policy: Policy) -> None:
    assert from_dict(json.loads(json.dumps(policy.to_dict()))) == policy


def test_a_subclass_has_options_of_its_own() -> None:
    @dataclass(frozen=True)
    class Mine(Confidence):
        note: object = None

    mine: Any = Mine

    assert mine(np.float32(0.5), note=[1]).threshold == 0.5
    with pytest.raises(PolicyError, match="Mine: threshold is '1', expected a number"):
        mine("1")


def test_functions_inside_others() -> None:
    """As `run` takes one."""
    stack = {"encoder": STACKS["encoder"]}
    rows = np.arange(2)
    scores = {name: np.array([0.25, 0.75], np.float32) for name in ("top1", "entropy")}
    scores["prediction"] = np.zeros(2, np.int64)
    for policy in (
        free.Each({"encoder": lambda state: state.scores["top1"] > 0.5}),
        free.Width(0.5, lambda state: state.scores["top1"] > 0.5).exits,
    ):
        policy.check(stack)
        assert StackPolicy(policy, stack["encoder"], 2).leave(1, rows, scores).tolist() == [False, True]
        with pytest.raises(PolicyError, match="JSON cannot hold it"):
            policy.to_dict()


def test_a_policy_of_ones_own_that_does_not_say_all() -> None:
    class Silent(Policy):
        def leave(self, state: State) -> Any:
            return np.ones(state.rows.size, np.bool_)

    class Undecided(Policy):
        def measures(self, stack: str, exit_: Exit) -> tuple[str, ...]:
            return ("top1",)

    class Text(Undecided):
        def measures(self, stack: str, exit_: Exit) -> Any:
            return "top1"

    with pytest.raises(PolicyError, match=r"Silent does not say which scores it needs\n  try: a method measures"):
        StackPolicy(Silent(), STACKS["encoder"], 1)
    with pytest.raises(PolicyError, match=r"asks for the scores 'top1'\n  try: names of scores: \('top1',\)"):
        StackPolicy(Text(), STACKS["encoder"], 1)
    with pytest.raises(PolicyError, match=r"Undecided does not say which rows leave\n  try: a method leave"):
        StackPolicy(Undecided(), STACKS["encoder"], 1).leave(1, np.arange(1), {"top1": np.ones(1, np.float32)})


def test_the_documented_name_reads_policies() -> None:
    assert policies.from_dict is from_dict


@pytest.mark.parametrize("policy", [*PLAIN, Never(), Each({"encoder": Budget(2)})], ids=repr)
@pytest.mark.parametrize("copied", [lambda policy: pickle.loads(pickle.dumps(policy)), copy.deepcopy])
def test_policies_are_copied(policy: Policy, copied: Callable[[Policy], Policy]) -> None:
    assert copied(policy) == policy
