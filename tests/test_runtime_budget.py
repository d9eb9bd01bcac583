"""A threshold that holds a mean depth or a time: on costs made up here, and in runs and generations."""

from __future__ import annotations

import copy
import json
import math
import pickle
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import talkers
from bundles import classifier
from hypothesis import given
from hypothesis import strategies as st

import offramp
from offramp.bundle.manifest import Exit, Part, Stack
from offramp.errors import PolicyError
from offramp.runtime import Chain
from offramp.runtime.policies.base import Agreement, Cost, State
from offramp.runtime.policies.budget import Budget
from offramp.runtime.policies.builtin import Each, from_dict


def depth_of(policy: Budget, score: float) -> int:
    """After how many of 8 blocks a row leaves that scores so much at the one exit, after 2."""
    scores = {policy.measure: np.array([score], np.float32)}
    return 2 if policy.leave(State("decoder", 2, 8, scores, np.arange(1), {})).all() else 8


def spend(policy: Budget, *depths: int, milliseconds: float = 1.0) -> None:
    policy.observe(Cost("decoder", np.array(depths, np.int64), milliseconds, 8))


# Control


@given(blocks=st.floats(2.5, 7.5), seed=st.integers(0, 99), power=st.sampled_from([0.1, 1.0, 10.0]))
def test_the_mean_depth_is_held_within_its_bound(blocks: float, seed: int, power: float) -> None:
    """Whatever the scores: here they change their distribution half way."""
    policy, random, depths = Budget(blocks), np.random.default_rng(seed), []
    for step in range(1200):
        depths.append(depth_of(policy, random.random() ** (power if step < 600 else 1 / power)))
        spend(policy, depths[-1])
    assert abs(np.mean(depths) - blocks) <= (28 + 2 * policy.gain) * 8 / (policy.gain * 1200)
    assert policy.spent == pytest.approx(np.mean(depths))


def test_time_is_held() -> None:
    """A deep token takes 10 ms, an early one 2; every hundredth step is disturbed."""
    policy, random, times = Budget(milliseconds=4.0), np.random.default_rng(0), []
    for step in range(3000):
        times.append(10.0 if depth_of(policy, random.random()) == 8 else 2.0)
        spend(policy, 8, milliseconds=5000.0 if step % 100 == 99 else times[-1])
    assert np.mean(times[300:]) == pytest.approx(4.0, abs=0.3)  # what disturbs is counted as five budgets


def test_what_cannot_be_held_ends_at_the_ends() -> None:
    policy = Budget(2.0)
    for _ in range(400):
        spend(policy, 8, 8)
    assert policy.now == 0.0
    assert depth_of(policy, 1e-6) == 2
    policy = Budget(8.0)
    for _ in range(400):
        spend(policy, 2)
    assert policy.now == 1.0
    assert depth_of(policy, 1.0) == 8
    assert depth_of(policy, math.nan) == 8
    for _ in range(20):  # and comes back soon, however long that was
        spend(policy, 8)
    policy.observe(Cost("decoder", np.array([8]), 1.0, 4))
    assert policy.now == 1.0
    for _ in range(10):
        policy.observe(Cost("decoder", np.array([16]), 1.0, 8))
    assert policy.now < 1.0


def test_steps_are_bounded_and_rows_averaged() -> None:
    policy = Budget(5.0, gain=0.3)
    before = policy._position
    spend(policy, 8, 2)
    assert policy._position == before
    spend(policy, 8, 8)
    assert policy._position == pytest.approx(before - 0.3 * 3 / 8)
    policy = Budget(milliseconds=1.0, gain=0.1)
    before = policy._position
    spend(policy, 8, milliseconds=1e9)
    assert policy._position == pytest.approx(before - 0.4)
    policy.observe(Agreement("decoder", 2, {}, np.ones(3, np.bool_)))
    spend(policy)
    assert policy._position == pytest.approx(before - 0.4)


# State and options


def test_a_saved_state_decides_the_same() -> None:
    policy, random = Budget(4.0), np.random.default_rng(0)
    assert math.isnan(policy.spent)
    for _ in range(50):
        spend(policy, depth_of(policy, random.random()))
    again = policy.restored(json.loads(json.dumps(policy.state())))
    assert again == policy
    for score in random.random(200):
        depths = [depth_of(one, score) for one in (policy, again)]
        for one, depth in zip((policy, again), depths, strict=True):
            spend(one, depth)
        assert depths[0] == depths[1]
        assert (again.now, again.spent) == (policy.now, policy.spent)
    with pytest.raises(PolicyError, match="no state of Budget"):
        policy.restored({})


def test_threads_lose_nothing() -> None:
    policy = Budget(4.0)

    def work() -> None:
        for _ in range(500):
            spend(policy, 6)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert policy.state()["steps"] == 2000
    assert policy.spent == 6.0


def stack(name: str, *exits: int, scores: tuple[str, ...] = ("top1",)) -> Stack:
    found = tuple(Exit(i, (), "s", {"y": "y"}, dict.fromkeys(scores if i < exits[-1] else (), "v")) for i in exits)
    return Stack(name, name, exits[-1], "x", "s", tuple(Part(i, (), "s") for i in exits), found)


def test_options() -> None:
    policy = Budget(4.0, measure="margin", threshold=0.5, gain=0.1)
    assert from_dict(policy.to_dict()) == policy
    assert from_dict({"name": "budget", "milliseconds": 3}) == Budget(milliseconds=3)
    assert Each({"decoder": policy}).observes == {Cost}
    both = {"encoder": stack("encoder", 1, 4), "decoder": stack("decoder", 2, 8)}
    Budget(2.0).check({"decoder": both["decoder"]})
    Budget(milliseconds=1.0).check({"decoder": both["decoder"]})
    Each({"decoder": Budget(5.0)}).check(both)
    wrong: list[tuple[Budget, dict[str, Stack], str]] = [
        (Budget(1.0), {"decoder": both["decoder"]}, r"a mean of 1.0 blocks cannot be held by exits .* after 2 blocks"),
        (Budget(9.0), {"decoder": both["decoder"]}, r"cannot be held(.*\n)+.*exits after 2, 8 of 8 blocks"),
        (Budget(4.0), both, "learns of one stack"),
        (Budget(4.0, measure="margin"), both, "has the score 'margin'"),
    ]
    for one, stacks, message in wrong:
        with pytest.raises(PolicyError, match=message):
            one.check(stacks)
    given: list[dict[str, Any]] = [
        {}, {"blocks": 3.0, "milliseconds": 3.0}, {"blocks": -1.0}, {"milliseconds": 0.0}, {"blocks": 3.0, "gain": 0.0},
        {"blocks": 3.0, "measure": "entropy"}, {"blocks": 3.0, "threshold": -0.1}, {"blocks": math.nan},
        {"milliseconds": math.nan}, {"blocks": 3.0, "gain": math.nan},
    ]  # fmt: skip
    for options in given:
        with pytest.raises(PolicyError, match="Budget"):
            Budget(**options)


@pytest.mark.parametrize("copied", [lambda policy: pickle.loads(pickle.dumps(policy)), copy.deepcopy])
def test_a_copy_goes_on_by_itself(copied: Callable[[Any], Any]) -> None:
    one = Budget(2.0, gain=1.0)
    one.observe(Cost("encoder", np.array([4]), 1.0, 8))
    other = copied(Each({"encoder": one})).stacks["encoder"]
    before = one.state()
    assert other == one
    assert other.state() == before
    assert other.spent == 4.0
    other.observe(Cost("encoder", np.array([8]), 1.0, 8))
    assert (one.state(), other.state()["steps"]) == (before, 2)


def test_each_tells_of_its_own_stack() -> None:
    one, other = Budget(2.0), Budget(milliseconds=3.0)
    policy = Each({"encoder": one, "decoder": other})
    policy.observe(Cost("decoder", np.array([4]), 2.0, 8))
    policy.observe(Cost("more", np.array([4]), 2.0, 8))
    assert (one.state()["steps"], other.state()["steps"]) == (0, 1)


# Runs and generations


@pytest.fixture(scope="module")
def chain(tmp_path_factory: pytest.TempPathFactory) -> Chain:
    return talkers.talker(tmp_path_factory.mktemp("budget") / "talker")


def test_generations_hold_a_mean_depth(chain: Chain) -> None:
    policy = Budget(2.5, gain=0.5)
    depths = []
    for _ in range(3):
        found = chain.generate({"input_ids": [[1, 1], [2, 3]]}, policy, max_new_tokens=100)
        depths += [depth for row in found.exits for depth in row[1:]]
    assert policy.state()["steps"] == 3 * 99
    assert policy.spent == pytest.approx(np.mean(depths))
    assert policy.spent == pytest.approx(2.5, abs=0.3)
    assert len(set(depths)) > 2


def test_generations_tell_the_time(chain: Chain) -> None:
    policy = Budget(milliseconds=1e-3, gain=1.0)
    tokens = list(chain.stream({"input_ids": [[1]]}, policy, max_new_tokens=60))
    assert [token.exit for token in tokens[-20:]] == [1] * 20  # nothing is quick enough
    assert 0 < policy.spent <= np.mean([token.milliseconds for token in tokens])


def test_runs_hold_a_mean_depth(tmp_path: Path) -> None:
    chain, random = offramp.load(classifier(tmp_path / "plain")), np.random.default_rng(0)
    policy, taken = Budget(2.0, gain=0.5), []
    for _ in range(150):
        result = chain.run({"ids": random.integers(0, 11, (4, 5))}, policy)
        taken += result.exits["encoder"].tolist()
    assert policy.spent == pytest.approx(np.mean(taken))
    assert policy.spent == pytest.approx(2.0, abs=0.2)
