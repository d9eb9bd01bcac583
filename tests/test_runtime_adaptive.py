"""A threshold that learns from agreement: where it goes on scores made up here, and what a generation tells it."""

from __future__ import annotations

import copy
import json
import pickle
import threading
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import talkers
import tiny
import torch
from numpy.typing import NDArray

from offramp.bundle.manifest import Exit, Part, Stack
from offramp.errors import InputError, PolicyError
from offramp.runtime import Chain
from offramp.runtime.policies.adaptive import Adaptive, _above, _fewest, _most
from offramp.runtime.policies.base import Agreement, Cost, Policy, Rows, State
from offramp.runtime.policies.builtin import Each, from_dict

Draw = Callable[[np.random.Generator, int], tuple[NDArray[np.float64], Rows]]


def told(scores: Any, agreed: Any, after: int = 2) -> Agreement:
    return Agreement("decoder", after, {"margin": np.array(scores, np.float32)}, np.array(agreed, np.bool_))


def uniform(chance: Callable[[NDArray[np.float64]], Any]) -> Draw:
    """Scores from 0 to 1, of which those of score s agree with probability ``chance(s)``."""

    def draw(random: np.random.Generator, count: int) -> tuple[NDArray[np.float64], Rows]:
        scores = random.random(count)
        return scores, random.random(count) < chance(scores)

    return draw


def fed(policy: Adaptive, draw: Draw, count: int, seed: int = 0) -> tuple[float, float]:
    """Feed tokens, 8 at a time: the share of them that left, and how many of those agreed, in the second half."""
    random, left, right = np.random.default_rng(seed), 0, 0
    for at in range(0, count, 8):
        scores, agreed = draw(random, 8)
        if at >= count // 2:
            leaving = scores > policy.now
            left += int(leaving.sum())
            right += int((leaving & agreed).sum())
        policy.observe(told(scores, agreed))
    return left / (count / 2), right / max(1, left)


def always(chance: float) -> Draw:
    return uniform(lambda scores: np.full(scores.size, chance))


# Where the threshold goes


@pytest.mark.parametrize(
    ("chance", "target", "best"),
    [
        (lambda s: s, 0.9, 0.8),  # the tail above t has the mean (1 + t) / 2
        (lambda s: s, 0.95, 0.9),
        (lambda s: 0.5 + 0.5 * s, 0.9, 0.6),
        (lambda s: (s > 0.4).astype(float), 0.99, 0.4),
    ],
)
def test_it_finds_the_lowest_threshold_that_keeps_the_precision(chance: Any, target: float, best: float) -> None:
    policy = Adaptive(2, target=target)
    left, precision = fed(policy, uniform(chance), 12000)
    assert precision > target - 0.012
    assert left > 0.7 * (1 - best)
    assert abs(policy.now - best) < 0.1


def test_none_agree_and_it_rises_until_nothing_leaves() -> None:
    policy = Adaptive(2, 0.5)
    policy.observe(told(np.linspace(0.6, 0.9, 16), [False] * 16))
    assert 0.5 < policy.now < 0.65  # one step
    before = policy.now
    for _ in range(60):
        policy.observe(told([1.0] * 16, [False] * 16))
        assert policy.now > before or before == 1.0
        before = policy.now
    assert policy.now == 1.0
    state = State("decoder", 2, 4, {"margin": np.ones(1, np.float32)}, np.arange(1), {})
    assert policy.leave(state).tolist() == [False]


def test_all_agree_and_it_falls_slowly() -> None:
    """Three hundred tokens bound what does not agree by one percent; then a quarter of a step at a time."""
    policy = Adaptive(2, 0.9)
    policy.observe(told(np.linspace(0, 1, 288), [True] * 288))
    assert policy.now == pytest.approx(0.9)
    logits = []
    for _ in range(20):
        policy.observe(told(np.linspace(0, 1, 16), [True] * 16))
        logits.append(policy._position)
    assert np.diff(logits) == pytest.approx(np.full(19, -policy.step / 4))
    bolder = Adaptive(2, 0.9, target=0.9)
    bolder.observe(told(np.linspace(0, 1, 48), [True] * 48))
    assert bolder.now < 0.9


def test_it_comes_down_where_nothing_leaves() -> None:
    """All scores are below the threshold: what went deep by itself is enough."""
    policy = Adaptive(2, 0.99)
    fed(policy, lambda random, count: (0.5 * random.random(count), np.ones(count, np.bool_)), 2000)
    assert policy.now < 0.4


def test_with_one_kind_missing_there_is_no_model() -> None:
    """One token short of ``least`` of the other kind, too few to know, and it stays; with that one it moves."""
    for few in (False, True):
        policy = Adaptive(2, 0.7, target=0.9, least=8, every=1)
        for _ in range(7):
            policy.observe(told([0.2 if few else 0.1], [few]))
        for _ in range(8):  # above the threshold what does not agree would be seen without a model
            policy.observe(told([0.3 if few else 0.9], [not few]))
        assert policy.now == pytest.approx(0.7)
        policy.observe(told([0.2 if few else 0.1], [few]))
        assert policy.now != pytest.approx(0.7)


def test_steps_are_bounded() -> None:
    policy = Adaptive(2, 0.9, step=0.25, target=0.9)
    random = np.random.default_rng(3)
    for _ in range(200):
        before = policy._position
        scores = random.beta(random.integers(1, 9), random.integers(1, 9), 16)
        policy.observe(told(scores, random.random(16) < random.random()))
        assert abs(policy._position - before) <= 0.25 + 1e-9
        assert 0 <= policy.now <= 1


def test_a_shift_of_the_data_is_followed() -> None:
    policy = Adaptive(2, target=0.9)
    easy, hard = uniform(lambda s: 0.5 + 0.5 * s), uniform(lambda s: s**4)
    fed(policy, easy, 6000)
    first = policy.now
    fed(policy, hard, 6000, seed=1)
    second = policy.now
    fed(policy, easy, 6000, seed=2)
    assert first == pytest.approx(0.6, abs=0.15)
    assert second == pytest.approx(0.95, abs=0.05)
    assert policy.now == pytest.approx(0.6, abs=0.15)


def test_the_prior_counts() -> None:
    """The same two distributions of scores, but one token in two does not agree instead of one in ten."""
    random = np.random.default_rng(0)
    found = []
    for share in (0.1, 0.5):
        policy = Adaptive(2, 0.6, target=0.9)
        for _ in range(150):
            agreed = random.random(16) >= share
            policy.observe(told(np.where(agreed, random.beta(4, 2, 16), random.beta(2, 4, 16)), agreed))
        found.append(policy.now)
    assert found[0] + 0.2 < found[1]


def test_the_tail_of_a_beta() -> None:
    random = np.random.default_rng(0)
    for a, b in ((2.0, 5.0), (0.5, 0.3), (40.0, 3.0)):
        scores = random.beta(a, b, 20000)
        places = np.linspace(-14, 14, 561)
        above = _above(scores)
        for at in (200, 280, 330, 400):
            assert above[at] == pytest.approx((scores > 1 / (1 + np.exp(-places[at]))).mean(), abs=0.02)
    assert np.isfinite(_above(np.array([0.5]))).all()
    assert np.isfinite(_above(np.array([0.0, 1.0, 1.0]))).all()


def test_bounds_of_counts() -> None:
    """95 % quantiles of chi-squared, halved."""
    np.testing.assert_allclose(_most(np.array([0, 1, 5, 20])), [2.996, 4.744, 10.513, 29.06], rtol=0.015)
    np.testing.assert_allclose(_fewest(np.array([0, 1, 5, 20])), [0, 0.0513, 1.970, 13.25], rtol=0.2, atol=0.01)


# State


def test_a_saved_state_decides_the_same() -> None:
    draw, random = uniform(lambda s: s**2), np.random.default_rng(5)
    policy = Adaptive(2, target=0.9, memory=64, share=0.3)
    for _ in range(37):
        policy.observe(told(*draw(random, 7)))
        policy.compares("decoder")
    again = policy.restored(json.loads(json.dumps(policy.state())))
    assert again == policy
    assert again.now == policy.now != pytest.approx(0.9)
    for _ in range(100):
        seen = told(*draw(random, 5))
        for one in (policy, again):
            one.observe(seen)
        assert again.now == policy.now
        assert again.compares("decoder") == policy.compares("decoder")
    assert Adaptive(2).restored(Adaptive(2).state()).now == pytest.approx(0.9)
    with pytest.raises(PolicyError, match="no state of Adaptive"):
        policy.restored({"position": 1.0})
    with pytest.raises(PolicyError, match="no state of Adaptive"):
        Adaptive(2, memory=2000).restored({**policy.state(), "count": 500})


def test_memory_is_bounded() -> None:
    policy = Adaptive(2, target=0.9, memory=64)
    fed(policy, uniform(lambda s: s), 4000)
    assert len(policy.state()["scores"]) == 64


def test_threads_lose_nothing() -> None:
    policy = Adaptive(2, every=7)

    def work() -> None:
        for _ in range(300):
            policy.observe(told([0.5, 0.6, 0.7], [True, False, True]))

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert policy.state()["count"] == 4 * 300 * 3


def test_what_it_takes_no_notice_of() -> None:
    policy = Adaptive(2)
    policy.observe(told([0.5] * 30, [False] * 30, after=1))
    policy.observe(told([float("nan")] * 30, [False] * 30))
    policy.observe(Cost("decoder", np.array([1]), 1.0, 4))
    assert policy.state()["count"] == 0


# Options


def stack(name: str, *exits: int) -> Stack:
    found = tuple(Exit(i, (), "s", {"y": "y"}, {"margin": "v"} if i < exits[-1] else {}) for i in exits)
    return Stack(name, name, exits[-1], "x", "s", tuple(Part(i, (), "s") for i in exits), found)


def test_options() -> None:
    policy = Adaptive(2, 0.8, target=0.95, least=5, every=4, memory=500, step=0.1, audit=9, share=0.5)
    assert from_dict(policy.to_dict()) == policy
    assert from_dict({"name": "adaptive", "after": 2}) == Adaptive(2)
    assert from_dict(Each({"decoder": policy}).to_dict()) == Each({"decoder": policy})
    assert Each({"decoder": policy}).observes == {Agreement}
    policy.check({"decoder": stack("decoder", 1, 2, 4)})
    with pytest.raises(PolicyError, match=r"no exit after 3 blocks with the score 'margin'(.*\n)+.*exits after 1, 2"):
        Adaptive(3).check({"decoder": stack("decoder", 1, 2, 4)})
    with pytest.raises(PolicyError, match="learns of one stack") as caught:
        policy.check({"encoder": stack("encoder", 2, 4), "decoder": stack("decoder", 1, 2, 4)})
    assert "Each({'decoder'" in (caught.value.hint or "")
    wrong: list[dict[str, Any]] = [
        {"target": 1.0}, {"target": 0.0}, {"share": 0.0}, {"audit": 0}, {"every": 0}, {"least": 0}, {"step": 0.0},
        {"threshold": 1.5}, {"measure": "entropy"}, {"memory": 100}, {"target": 0.999},
        {"step": float("nan")},
    ]  # fmt: skip
    for options in wrong:
        with pytest.raises(PolicyError, match="Adaptive"):
            Adaptive(2, **options)


@pytest.mark.parametrize("copied", [lambda policy: pickle.loads(pickle.dumps(policy)), copy.deepcopy])
def test_a_copy_goes_on_by_itself(copied: Callable[[Adaptive], Adaptive]) -> None:
    policy = Adaptive(2, 0.5, every=4)
    policy.observe(told([0.6, 0.7, 0.8, 0.9], [False] * 4))
    before = policy.state()
    other = copied(policy)
    assert other == policy
    assert (other.state(), other.now) == (before, policy.now)
    assert policy.now > 0.5
    other.observe(told([0.6, 0.7, 0.8, 0.9], [False] * 4))
    assert (policy.state(), other.state()["count"]) == (before, 8)
    assert other.now > policy.now


def test_every_now_and_then_a_token_goes_deep() -> None:
    """The next one, once three have left in a row, of whatever rows and runs; where nothing is generated, none."""
    policy = Adaptive(2, 0.5, audit=4)
    scores = {"margin": np.array([0.9, 0.9, 0.9, 0.9, 0.5, 0.9, np.nan, 0.9], np.float32)}
    state = State("decoder", 2, 4, scores, np.arange(8), {}, np.zeros(8, np.int64))
    assert policy.leave(state).tolist() == [True, True, True, False, False, True, False, True]
    again = policy.restored(json.loads(json.dumps(policy.state())))
    for one in (policy, again):
        assert one.leave(state).tolist() == [True, True, False, True, False, True, False, True]
    assert policy.leave(State("decoder", 2, 4, scores, np.arange(8), {})).tolist() == (scores["margin"] > 0.5).tolist()


# Generations


class Told(Policy):
    """Leaves by a schedule after ``after`` blocks, and keeps what it is told."""

    def __init__(self, leaves: list[bool], after: int = 1, every: int = 1) -> None:
        self.leaves, self.after, self.every = leaves, after, every
        self.seen: list[Agreement] = []
        self.asked = 0

    @property
    def observes(self) -> frozenset[type[Agreement | Cost]]:
        return frozenset({Agreement})

    def observe(self, seen: Agreement | Cost) -> None:
        assert isinstance(seen, Agreement)
        self.seen.append(seen)

    def pairs(self) -> list[tuple[float, bool]]:
        return [(float(s), bool(a)) for one in self.seen for s, a in zip(one.scores["margin"], one.agreed, strict=True)]

    def compares(self, stack: str) -> bool:
        self.asked += 1
        return self.asked % self.every == 0

    def measures(self, stack: str, exit_: Exit) -> tuple[str, ...] | None:
        return ("margin", "prediction") if exit_.after == self.after else None

    def leave(self, state: State) -> Rows:
        assert state.steps is not None
        return np.array([self.leaves[(step - 1) % len(self.leaves)] for step in state.steps.tolist()], np.bool_)


@pytest.fixture(scope="module")
def chain(tmp_path_factory: pytest.TempPathFactory) -> Chain:
    return talkers.talker(tmp_path_factory.mktemp("adaptive") / "talker")


def expected(text: list[int], start: int, end: int, after: int) -> list[tuple[float, bool]]:
    """Of the tokens at these places what the exit scores, and whether it and full depth agree; by torch."""
    model = tiny.seeded(tiny.Talker, 4)
    found = []
    with torch.no_grad():
        full, early = (tiny.cut(model, blocks)(torch.tensor([text]))[0] for blocks in (4, after))
    for at in range(start, end):
        first, second = early[at].softmax(-1).topk(2).values.tolist()
        found.append((first - second, bool(early[at].argmax() == full[at].argmax())))
    return found


@pytest.mark.parametrize(("bound", "after"), [(None, 1), (None, 2), (3, 2)])
def test_agreement_is_what_torch_says(chain: Chain, bound: int | None, after: int) -> None:
    """Of all tokens that were caught up, and of those that went deep."""
    policy = Told([True, True, True, False, True, False, False], after)
    prompts = [[1, 5], [3]]
    found = chain.generate({"input_ids": prompts}, policy, max_new_tokens=16, max_pending=bound)
    wanted = []
    for prompt, tokens in zip(prompts, found.tokens, strict=True):
        text = [*prompt, *tokens.tolist()]
        first = 0 if len(prompt) == 1 else len(prompt)  # nobody is asked about a prompt of several tokens
        wanted += expected(text, first, len(prompt) + 14, after)  # of 15 the last one waits
    told = policy.pairs()
    assert all(seen.after == after and seen.stack == "decoder" for seen in policy.seen)
    assert sorted(a for _, a in told) == sorted(a for _, a in wanted)
    assert 3 < sum(a for _, a in told) < len(told) - 3
    np.testing.assert_allclose(sorted(told), sorted(wanted), atol=1e-4)


def test_a_share_of_what_goes_deep_is_compared(chain: Chain) -> None:
    policy = Told([True, False], every=3)
    tokens = list(chain.stream({"input_ids": [[1, 1]]}, policy, max_new_tokens=25))
    assert policy.asked == 12
    assert [seen.agreed.size for seen in policy.seen] == [2] * 4
    assert [token.exit for token in tokens] == [4, *[1, 4] * 12]


def test_rows_that_end_and_beams_are_followed(chain: Chain) -> None:
    """Whatever moves between slots, the exit's tokens are compared with full depth's at the same places."""
    policy, prompts = Told([True, True, False]), [[1, 5], [2, 5], [3, 5], [4, 5]]
    found = chain.generate({"input_ids": prompts}, policy, max_new_tokens=30, stop=[5])
    assert len({row.size for row in found.tokens}) > 1
    wanted = []
    for prompt, tokens in zip(prompts, found.tokens, strict=True):
        steps = (tokens.size - 1) // 3 * 3
        wanted += expected([*prompt, *tokens.tolist()], 2, 2 + steps, 1)
    told = policy.pairs()
    np.testing.assert_allclose(sorted(told), sorted(wanted), atol=1e-4)
    policy = Told([True, True, False])
    chain.generate({"input_ids": prompts[:2]}, policy, beams=3, max_new_tokens=10)
    assert {seen.agreed.size for seen in policy.seen} == {18}


@pytest.mark.parametrize("start", [0.5, 0.005])
def test_it_learns_while_it_generates(chain: Chain, start: float) -> None:
    """From above and from below it comes to where nine of ten that leave agree, which three of four of all do."""
    policy = Adaptive(2, start, target=0.9, audit=8)
    for _ in range(4):
        found = chain.generate({"input_ids": [[1], [2], [3]]}, policy, max_new_tokens=60)
    state = policy.state()
    scores, agreed = np.array(state["scores"]), np.array(state["agreed"])
    assert agreed.mean() < 0.8
    assert agreed[scores > policy.now].mean() > 0.87
    assert np.mean([row[1:] == 2 for row in found.exits]) > 0.4


def test_hidden_states_that_stand_for_deeper_ones_are_refused(chain: Chain) -> None:
    with pytest.raises(InputError, match="learns from what full depth says"):
        chain.stream({"input_ids": [[1]]}, Adaptive(1), propagate="hidden")
