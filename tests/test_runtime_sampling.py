"""Greedy and drawn tokens, bans, processors: each branch, what never happens, and whether the odds are right."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from offramp.errors import ExecutionError, InputError
from offramp.runtime.generation.sampling import Chooser, Sampling, log_probabilities

Logits = NDArray[np.float32]
TOKENS = np.array([7, 8], np.int64)
SIZE = 6


def _logits(*values: float) -> Logits:
    return np.array(values, np.float32)


def _choose(sampling: Sampling, logits: Logits, emitted: int = 0, row: int = 0) -> int:
    return Chooser(sampling, logits.size).choose(row, TOKENS, logits, emitted)


def _draws(sampling: Sampling, logits: Logits, count: int, row: int = 0) -> list[int]:
    chooser = Chooser(sampling, logits.size)
    return [chooser.choose(row, TOKENS, logits, i) for i in range(count)]


ROWS = st.lists(st.floats(-8, 8, width=32), min_size=SIZE, max_size=SIZE).map(lambda row: _logits(*row))


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"temperature": -0.1}, "temperature is -0.1"),
        ({"temperature": math.nan}, "temperature is nan"),
        ({"temperature": math.inf}, "temperature is inf"),
        ({"top_k": 0}, "top_k is 0, expected at least 1"),
        ({"top_p": 0.0}, "top_p is 0.0"),
        ({"top_p": 1.1}, "top_p is 1.1"),
        ({"top_p": math.nan}, "top_p is nan"),
        ({"seed": -1}, "seed is -1"),
        ({"stop": (-1,)}, r"stop is \(-1,\)"),
        ({"stop": 2}, "stop is 2, expected a tuple"),
        ({"suppress": {2}}, r"suppress is \{2\}, expected a tuple"),
        ({"suppress_first": (3, -3)}, "suppress_first is"),
        ({"min_new_tokens": -1}, "min_new_tokens is -1"),
        ({"max_new_tokens": -1}, "max_new_tokens is -1, expected at least 0"),
        ({"min_new_tokens": 3, "max_new_tokens": 2}, "min_new_tokens is 3, more than max_new_tokens, 2"),
        ({"processors": len}, "processors is <built-in function len>"),
    ],
)
def test_values_that_make_no_sense(options: dict[str, Any], said: str) -> None:
    with pytest.raises(InputError, match=said):
        Sampling(**options)


def test_problems_are_collected() -> None:
    with pytest.raises(InputError, match=r"(?s)temperature.*top_k.*stop"):
        Sampling(temperature=-1, top_k=-1, stop=(-1,))
    Sampling(max_new_tokens=0, top_p=1.0, top_k=1, seed=0, temperature=0.0)


def test_ids_outside_the_vocabulary() -> None:
    with pytest.raises(InputError, match=r"(?s)stop has 6; token ids end at 5.*suppress_first has 9"):
        Chooser(Sampling(stop=(5, 6), suppress=(0, 5), suppress_first=(9,)), SIZE)


def test_everything_banned() -> None:
    with pytest.raises(InputError, match="all 3 tokens are banned"):
        Chooser(Sampling(stop=(0,), suppress=(1,), suppress_first=(2,), min_new_tokens=1), 3)
    Chooser(Sampling(stop=(0,), suppress=(1,), suppress_first=(2,)), 3)


def test_greedy_takes_the_first_of_equals() -> None:
    assert _choose(Sampling(), _logits(0, 3, 1, 3)) == 1
    assert _choose(Sampling(top_k=1, top_p=0.1), _logits(0, 3, 1, 3)) == 1
    found = Chooser(Sampling(), 3).choose_all(np.stack([_logits(2, 2, 2), _logits(0, 1, 1)]), np.zeros(2, np.int64))
    assert found.dtype == np.int64
    assert found.tolist() == [0, 1]


def test_bans() -> None:
    logits = _logits(5, 4, 3, 2)
    sampling = Sampling(suppress=(0, 0), suppress_first=(1,), stop=(2,), min_new_tokens=2)
    assert [_choose(sampling, logits, emitted) for emitted in range(4)] == [3, 1, 1, 1]
    found = Chooser(sampling, 4).choose_all(np.tile(logits, (4, 1)), np.arange(4))
    assert found.tolist() == [3, 1, 1, 1]
    assert _choose(Sampling(stop=(0,), min_new_tokens=1), logits, 0) == 1
    assert _choose(Sampling(stop=(0,), min_new_tokens=1), logits, 1) == 0
    assert logits.tolist() == [5, 4, 3, 2]


def test_choose_all_is_for_greedy_without_processors() -> None:
    for sampling in (Sampling(temperature=1), Sampling(processors=(lambda tokens, logits: logits,))):
        chooser = Chooser(sampling, 2)
        assert not chooser.batched
        with pytest.raises(InputError, match="choose_all is greedy"):
            chooser.choose_all(np.zeros((1, 2), np.float32), np.zeros(1, np.int64))
    assert Chooser(Sampling(), 2).batched


def test_processors_see_the_tokens_and_a_copy() -> None:
    seen: list[Any] = []

    def count(tokens: NDArray[np.int64], logits: Logits) -> Logits:
        seen.append(tokens)
        logits[0] = -np.inf
        return logits

    logits = _logits(5, 4, 3)

    def lift(tokens: NDArray[np.int64], logits: Logits) -> Logits:
        return np.where(np.isinf(logits), np.float32(9), logits)

    assert _choose(Sampling(processors=(count, lift)), logits) == 0
    assert _choose(Sampling(processors=(count,), suppress=(1,)), logits) == 2
    assert seen[0] is TOKENS
    assert logits.tolist() == [5, 4, 3]


def test_bans_hold_whatever_a_processor_says() -> None:
    assert (
        _choose(Sampling(processors=(lambda tokens, x: x + _logits(99, 0, 0),), suppress=(0,)), _logits(0, 1, 2)) == 2
    )


def test_processor_may_return_float64() -> None:
    def negative(tokens: NDArray[np.int64], logits: Logits) -> Any:
        return -logits.astype(np.float64)

    assert _choose(Sampling(1.0, top_k=1, processors=(negative,)), _logits(0, 1)) == 0


@pytest.mark.parametrize(
    ("returned", "said"),
    [
        (None, "the processor wrong returned None, expected float32"),
        (np.zeros((1, 2), np.float32), r"returned float32 \[1, 2\], expected float32 \[2\]"),
        (np.zeros(3, np.float32), r"returned float32 \[3\]"),
        (np.zeros(2, np.int64), r"returned int64 \[2\]"),
        (_logits(-np.inf, -np.inf), "banned every token"),
        (_logits(0, np.nan), "NaN"),
        (_logits(0, np.inf), "infinity"),
    ],
)
def test_processor_returns_nonsense(returned: Any, said: str) -> None:
    def wrong(tokens: NDArray[np.int64], logits: Logits) -> Any:
        return returned

    with pytest.raises(InputError, match=said):
        _choose(Sampling(processors=(wrong,)), _logits(0, 1))


@pytest.mark.parametrize("logits", [_logits(0, np.nan), _logits(np.inf, 0), _logits(-np.inf, -np.inf)])
def test_the_model_returns_nonsense(logits: Logits) -> None:
    same = Sampling(processors=(lambda tokens, logits: logits,))  # which is not to blame
    for sampling in (Sampling(), Sampling(temperature=1), same):
        with pytest.raises(ExecutionError, match="the model's logits"):
            _choose(sampling, logits)
    with pytest.raises(ExecutionError, match="the model's logits"):
        Chooser(Sampling(), 2).choose_all(np.stack([_logits(0, 1), logits]), np.zeros(2, np.int64))


def test_bans_leave_nothing() -> None:
    with pytest.raises(ExecutionError, match="all that is not banned"):
        _choose(Sampling(suppress=(1,)), _logits(-np.inf, 0))


def test_shapes() -> None:
    with pytest.raises(ExecutionError, match=r"shape \[3\], expected \[2\]"):
        Chooser(Sampling(), 2).choose(0, TOKENS, _logits(1, 2, 3), 0)
    with pytest.raises(ExecutionError, match=r"shape \[1, 2\], expected \[2, 2\]"):
        Chooser(Sampling(), 2).choose_all(np.zeros((1, 2), np.float32), np.zeros(2, np.int64))


def test_top_p_is_the_smallest_set() -> None:
    logits = np.log(_logits(0.2, 0.5, 0.3))
    kept = {p: set(_draws(Sampling(1.0, top_p=p, seed=1), logits, 200)) for p in (0.01, 0.45, 0.55, 0.75, 0.85, 1.0)}
    assert kept == {0.01: {1}, 0.45: {1}, 0.55: {1, 2}, 0.75: {1, 2}, 0.85: {0, 1, 2}, 1.0: {0, 1, 2}}


def test_order_of_temperature_top_k_and_top_p() -> None:
    logits = np.log(_logits(0.4, 0.3, 0.2, 0.1))
    # of the two highest, the first has 4/7 > 0.5; of all four it has 0.4
    assert set(_draws(Sampling(1.0, top_k=2, top_p=0.5, seed=0), logits, 100)) == {0}
    assert set(_draws(Sampling(1.0, top_p=0.5, seed=0), logits, 100)) == {0, 1}
    # squared odds: 16/30 > 0.5
    assert set(_draws(Sampling(0.5, top_p=0.5, seed=0), logits, 100)) == {0}


def test_top_k_of_more_than_there_are() -> None:
    assert set(_draws(Sampling(1.0, top_k=99, seed=0), _logits(0, 0, -np.inf), 50)) == {0, 1}


def test_temperatures_at_the_ends() -> None:
    logits = _logits(1, 3, 2.999)
    assert set(_draws(Sampling(5e-324, seed=0), logits, 50)) == {1}
    assert set(_draws(Sampling(1e300, seed=0), logits, 100)) == {0, 1, 2}


def test_no_seed_draws_others_each_time() -> None:
    assert _draws(Sampling(1.0), np.zeros(1000, np.float32), 20) != _draws(
        Sampling(1.0), np.zeros(1000, np.float32), 20
    )


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, (0.1, 0.2, 0.3, 0.4)),
        ({"temperature": 0.5}, (1 / 30, 4 / 30, 9 / 30, 16 / 30)),
        ({"top_k": 3}, (0, 2 / 9, 3 / 9, 4 / 9)),
        ({"top_p": 0.6}, (0, 0, 3 / 7, 4 / 7)),
        ({"suppress": (3,)}, (1 / 6, 2 / 6, 3 / 6, 0)),
    ],
)
def test_chi_squared(options: dict[str, Any], expected: tuple[float, ...]) -> None:
    count = 4000
    found = _draws(Sampling(**{"temperature": 1.0, "seed": 3} | options), np.log(_logits(0.1, 0.2, 0.3, 0.4)), count)
    seen, odds = np.bincount(found, minlength=4), np.array(expected)
    assert not seen[odds == 0].any()
    wanted = count * odds[odds > 0]
    statistic = ((seen[odds > 0] - wanted) ** 2 / wanted).sum()
    assert statistic < {2: 10.83, 3: 13.82, 4: 16.27}[wanted.size]  # p = 0.001 with one degree of freedom less


@given(ROWS, st.integers(1, SIZE), st.floats(0.05, 4), st.integers(0, 99))
def test_never_outside_the_top_k(logits: Logits, top_k: int, temperature: float, seed: int) -> None:
    token = _choose(Sampling(temperature, top_k=top_k, seed=seed), logits)
    assert (logits > logits[token]).sum() < top_k


@given(ROWS, st.floats(0.01, 1), st.integers(0, 99))
def test_never_outside_the_nucleus(logits: Logits, top_p: float, seed: int) -> None:
    token = _choose(Sampling(1.0, top_p=top_p, seed=seed), logits)
    probabilities = np.exp(logits - np.logaddexp.reduce(logits.astype(np.float64)))
    assert probabilities[logits > logits[token]].sum() < top_p + 1e-6


@given(ROWS, st.sets(st.integers(0, SIZE - 1), max_size=SIZE - 1), st.sampled_from([0.0, 1.0]), st.integers(0, 99))
def test_never_what_is_suppressed(logits: Logits, banned: set[int], temperature: float, seed: int) -> None:
    assert _choose(Sampling(temperature, suppress=tuple(banned), seed=seed), logits) not in banned


@given(st.lists(ROWS, min_size=1, max_size=4), st.integers(0, 2**70), st.data())
def test_a_row_draws_what_it_draws_alone(steps: list[Logits], seed: int, data: st.DataObject) -> None:
    sampling = Sampling(1.0, seed=seed)
    together = Chooser(sampling, SIZE)
    found: dict[int, list[int]] = {row: [] for row in range(3)}
    for emitted, logits in enumerate(steps):
        for row in data.draw(st.permutations(range(3))):
            found[row].append(together.choose(row, TOKENS, logits, emitted))
    for row, tokens in found.items():
        alone = Chooser(sampling, SIZE)
        assert tokens == [alone.choose(row, TOKENS, logits, emitted) for emitted, logits in enumerate(steps)]


def test_rows_draw_by_themselves() -> None:
    flat = np.zeros(1000, np.float32)
    assert _draws(Sampling(1.0, seed=5), flat, 20, row=0) != _draws(Sampling(1.0, seed=5), flat, 20, row=1)


@given(st.lists(ROWS, min_size=1, max_size=4), st.sets(st.integers(0, SIZE - 1), max_size=2), st.data())
def test_choose_all_is_choose(rows: list[Logits], stop: set[int], data: st.DataObject) -> None:
    sampling = Sampling(stop=tuple(stop), min_new_tokens=2, suppress=(0,), suppress_first=(1,))
    emitted = np.array([data.draw(st.integers(0, 3)) for _ in rows])
    chooser = Chooser(sampling, SIZE)
    one_by_one = [chooser.choose(i, TOKENS, row, int(emitted[i])) for i, row in enumerate(rows)]
    assert chooser.choose_all(np.stack(rows), emitted).tolist() == one_by_one


def test_log_probabilities() -> None:
    logits = np.stack([_logits(1000, 1000, -np.inf), _logits(-1e4, -1e4, -1e4)])
    found = log_probabilities(logits)
    assert found.dtype == np.float32
    np.testing.assert_allclose(np.exp(found), [[0.5, 0.5, 0], [1 / 3] * 3], rtol=1e-6)
    assert found[0, 2] == -np.inf


@given(ROWS)
def test_log_probabilities_sum_to_one(logits: Logits) -> None:
    np.testing.assert_allclose(np.exp(log_probabilities(logits)).sum(), 1, rtol=1e-5)
