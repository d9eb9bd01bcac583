"""The tests keep their promise: on losses whose mean is known, they are wrong no more often than they say."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
from numpy.typing import NDArray

from offramp.calibration.costs import Costs
from offramp.calibration.exits import tested as results_of
from offramp.calibration.gates import Fit, leaves
from offramp.calibration.observe import Observed
from offramp.calibration.risk import accepted, least_examples, losses_of, p_value

DRAWS = 400


def most(chance: float, draws: int) -> float:
    """A share that a binomial of this chance exceeds once in 2,000 times."""
    return chance + 3.3 * float(np.sqrt(chance * (1 - chance) / draws))


def losses(random: np.random.Generator, keep: float, full: float, better: float, count: int) -> NDArray[np.float64]:
    """Of exits that are wrong where full depth is right just so often that the mean loss is 0."""
    right = random.random(count) < full
    worse = (better + full * (1 - keep)) / full  # of those that full depth has right
    early = np.where(right, random.random(count) >= worse, random.random(count) < better / (1 - full))
    return losses_of(early, right, keep)


@pytest.mark.parametrize(("keep", "full", "better"), [(0.99, 0.8, 0.0), (0.9, 0.8, 0.05), (0.5, 0.9, 0.0)])
@pytest.mark.parametrize("count", [30, 1000])
def test_p_values_are_super_uniform_where_nothing_is_to_be_found(
    keep: float, full: float, better: float, count: int
) -> None:
    random = np.random.default_rng(int(100 * keep) + count)
    values = np.array([p_value(losses(random, keep, full, better, count), keep) for _ in range(DRAWS)])
    for level in (0.01, 0.05, 0.2, 0.5):
        assert (values <= level).mean() <= most(level, DRAWS)


def test_the_mean_of_these_losses_is_nothing() -> None:
    assert abs(losses(np.random.default_rng(0), 0.9, 0.8, 0.05, 1_000_000).mean()) < 1e-3


def test_more_examples_never_undo_what_is_proven() -> None:
    found = losses_of(np.random.default_rng(1).random(300) < 0.97, np.ones(300), 0.9)
    values = [p_value(found[:count], 0.9) for count in range(300)]
    assert values[0] == 1.0
    assert values == sorted(values, reverse=True)
    assert values[-1] < 0.05


def test_what_hardly_varies_needs_few_examples() -> None:
    """Both keep 0.95 of a quality; Hoeffding's bound would want 1.95 ** 2 * log(20) / (2 * 0.05 ** 2) > 2,000."""
    steady = losses_of(np.full(300, 1.0), np.ones(300), 0.95)
    rough = losses_of(np.random.default_rng(2).random(300) < 0.95, np.random.default_rng(3).random(300) < 0.95, 0.95)
    assert p_value(steady, 0.95) < 0.05 < p_value(rough, 0.95)


def test_how_many_examples_are_needed_at_least() -> None:
    for keep, level in ((0.99, 0.05), (0.9, 0.05), (0.9, 0.01), (0.5, 0.2)):
        least = least_examples(keep, level)
        assert p_value(np.full(least, keep - 1), keep) <= level < p_value(np.full(least - 1, keep - 1), keep)


def test_a_path_ends_at_its_first_failure() -> None:
    asked = []

    def values() -> Iterator[float]:
        for value in (0.01, 0.05, 0.06, 0.0):
            asked.append(value)
            yield value

    assert accepted(values(), 0.05) == 2
    assert asked == [0.01, 0.05, 0.06]
    assert accepted([], 0.05) == 0
    assert accepted([float("nan"), 0.0], 0.05) == 0


# The whole of it: scores, fit, path, test


def world(random: np.random.Generator, count: int) -> Observed:
    """Two exits whose scores tell, not too well, how likely they agree with full depth."""
    scores = random.beta(2, 1, (count, 2)).astype(np.float32)
    agree = random.random((count, 2)) < scores ** np.array([0.5, 0.15])
    quality = np.concatenate([agree, np.ones((count, 1))], 1).astype(np.float64)
    return Observed({"top1": scores}, quality, np.ones(count, np.int64))


COSTS = Costs(0.1, np.array([1.0, 1.0, 1.0]), np.zeros(3), np.full(3, 0.1), {"top1": np.array([False, False])})


@pytest.mark.slow
def test_the_promise_is_broken_no_more_often_than_stated() -> None:
    """On 200 draws of examples, the true quality of what was chosen: that of 200,000 others."""
    keep, confidence, draws = 0.9, 0.9, 200
    everyone = world(np.random.default_rng(0), 200_000)
    broken = passed = 0
    for draw in range(draws):
        random = np.random.default_rng(1000 + draw)
        held = world(random, 400)
        path = Fit(world(random, 150), COSTS, keep, confidence, 400, 40).chosen()
        found = results_of(path, held, keep)
        count = accepted(found.p_values, 1 - confidence)
        if count:
            thresholds, expected = path.settings[count - 1]
            taken = leaves("top1", everyone.scores["top1"], thresholds)
            quality = np.take_along_axis(everyone.quality, taken[:, None], 1).mean()
            passed += 1
            broken += quality < keep
            assert expected < COSTS.full
    assert broken / draws <= most(1 - confidence, draws)
    assert passed > 0.9 * draws  # it is not kept by never leaving


@pytest.mark.slow
def test_looking_at_the_mean_alone_would_break_it() -> None:
    """The test above can fail: without p-values every other promise is broken."""
    keep = 0.9
    everyone = world(np.random.default_rng(0), 200_000)
    broken = 0
    for draw in range(100):
        random = np.random.default_rng(1000 + draw)
        held = world(random, 400)
        path = Fit(world(random, 150), COSTS, keep, 0.9, 400, 40).chosen()
        found = results_of(path, held, keep)
        count = accepted([0.0 if early.mean() >= keep else 1.0 for early in found.early], 0.1)
        if count:
            taken = leaves("top1", everyone.scores["top1"], path.settings[count - 1][0])
            broken += np.take_along_axis(everyone.quality, taken[:, None], 1).mean() < keep
    assert broken / 100 > most(0.1, 100)
