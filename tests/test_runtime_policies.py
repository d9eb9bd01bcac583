"""Each policy on scores made up here, and what it refuses."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest

from offramp.runtime.errors import PolicyError
from offramp.runtime.manifest import Exit, Part, Stack
from offramp.runtime.policies import Confidence, Depth, Each, Entropy, Never, Patience, from_dict
from offramp.runtime.policy import Asker, Function, Policy, State


def _stack(name: str, *exits: int, scores: Sequence[str] = ("top1", "entropy", "prediction")) -> Stack:
    found = tuple(Exit(i, (), "s", {"y": "y"}, dict.fromkeys(scores if i < exits[-1] else (), "v")) for i in exits)
    return Stack(name, name, exits[-1], "x", "s", tuple(Part(i, ()) for i in exits), found)


STACKS = {"encoder": _stack("encoder", 1, 2, 4), "decoder": _stack("decoder", 3, 6, scores=("cosine",))}


def _walk(policy: Policy, measure: str, *scores: Sequence[float]) -> list[list[bool]]:
    """What a policy says at exits after 1, 2, ... for rows that never leave."""
    kind = np.int64 if measure == "prediction" else np.float32
    stack = _stack("encoder", *range(1, len(scores) + 2), scores=(measure,))
    policy.check({"encoder": stack})
    asker = Asker(policy, stack, len(scores[0]))
    rows = np.arange(len(scores[0]))
    return [asker.ask(i + 1, rows, {measure: np.array(row, kind)}).tolist() for i, row in enumerate(scores)]


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


def test_history_keeps_the_rows_that_stay() -> None:
    seen: list[State] = []

    def function(state: State) -> Any:
        seen.append(state)
        return state.scores["top1"] > 0.5

    stack = _stack("encoder", 1, 2, 3, 4, scores=("top1",))
    asker = Asker(Function(function), stack, 3)
    asker.ask(1, np.arange(3), {"top1": np.array([0.1, 0.9, 0.2], np.float16)})
    asker.keep(np.array([0, 2]))
    asker.ask(2, np.array([0, 2]), {"top1": np.array([[0.3], [0.8]], np.float64)})
    asker.keep(np.array([0]))
    asker.ask(3, np.array([0]), {"top1": np.array([0.4], np.float32)})
    assert {after: scores["top1"].round(1).tolist() for after, scores in seen[2].history.items()} == {
        1: pytest.approx([0.1]),
        2: pytest.approx([0.3]),
    }
    assert seen[1].history[1]["top1"].dtype == np.float32
    np.testing.assert_allclose(asker.record[2]["top1"], [0.3, np.nan, 0.8], rtol=1e-3)


def test_which_exits_are_asked() -> None:
    def asked(policy: Policy, name: str) -> dict[int, Any]:
        return Asker(policy, STACKS[name], 1).wanted

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
        (Depth(2), "stack 'decoder' has no exit after 2 blocks", "insert-exits{stack=decoder after=2}"),
        (
            Depth({"encoder": 3}),
            "stack 'encoder' has no exit after 3 blocks",
            "insert-exits{stack=encoder after=3}",
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
        Asker(Mine(), STACKS["encoder"], 1)
    with pytest.raises(PolicyError, match="JSON cannot hold it"):
        Mine().to_dict()


def test_options_that_make_no_sense() -> None:
    for make in (
        lambda: Confidence(None),
        lambda: Entropy(math.nan),
        lambda: Confidence(1, thresholds={1: math.nan}),
    ):
        with pytest.raises(PolicyError, match="has no threshold"):
            make()
    with pytest.raises(PolicyError, match="at least 1"):
        Patience(0)
    wrong: list[tuple[dict[str, Any], str]] = [
        ({"name": "luck"}, "no policy 'luck'; there are never, depth"),
        ({}, "no policy None"),
        ({"name": "confidence"}, "has no threshold"),
        ({"name": "patience"}, "'patience' cannot have the options"),
        ({"name": "confidence", "threshold": 1, "colour": 2}, "colour"),
        ({"name": "confidence", "threshold": 1, "thresholds": {"x": 1}}, "cannot have the options"),
        ({"name": "each", "stacks": {"encoder": {"name": "luck"}}}, "no policy 'luck'"),
        ({"name": "each", "stacks": 3}, "cannot have the options"),
    ]
    for data, message in wrong:
        with pytest.raises(PolicyError, match=message):
            from_dict(data)
