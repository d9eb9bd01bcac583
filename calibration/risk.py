"""Tests with a guarantee: is the quality with exits at least a share of that at full depth?

Learn-then-Test (Angelopoulos et al., arXiv 2110.01052; CALM, 2207.07061, sec. 4): hypotheses "this setting loses too
much" are tested one after the other, from the most careful setting on, and the first that cannot be rejected ends it.
So the chance that any accepted setting loses too much is at most that of a single test (fixed-sequence testing). The
p-value is that of a bet against the hypothesis (Waudby-Smith and Ramdas, 2010.09686, sec. 4), which adapts to
the variance: losses that are nearly always the same need few examples.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np
from numpy.typing import NDArray

Numbers = NDArray[np.float64]

# Shares of the most that may be staked on one example. All are played at once with equal money.
_STAKES = np.array([0.01, 0.02, 0.05, 0.1, 0.2, 0.35, 0.5, 0.7, 0.9, 0.99])


def losses_of(early: NDArray[Any], full: NDArray[Any], keep: float) -> Numbers:
    """``keep * full - early`` for each example: qualities in [0, 1] make losses in [-1, keep].

    Their mean is at most 0 exactly where the quality with exits is at least ``keep`` of that at full depth.
    """
    losses: Numbers = keep * np.asarray(full, np.float64) - np.asarray(early, np.float64)
    return losses


def p_value(losses: NDArray[Any], most: float) -> float:
    """Of the hypothesis that the mean loss is more than 0, for independent losses of at most ``most``.

    Money staked on a loss below 0 multiplies by ``1 - stake * loss`` with each example; under the hypothesis the
    chance of ever having ``1 / p`` times as much as at the start is at most ``p`` (Ville). So examples may come one
    by one, and stop as soon as the value is small enough.

    Args:
        losses: float [examples], in an order that does not depend on them.
        most: The greatest loss that there can be, more than 0.
    """
    stakes = _STAKES[:, None] / most
    gains = np.log1p(-stakes * np.asarray(losses, np.float64)[None]).cumsum(1)
    wealth = np.logaddexp.reduce(gains, 0) - np.log(len(_STAKES))
    return float(np.exp(-max(0.0, wealth.max(initial=0.0))))


def accepted(p_values: Iterable[float], level: float) -> int:
    """How many settings of a path pass, from the first one on; the chance that any wrongly does is ``level``.

    The p-values may be made as they are asked for: none is behind the first failure.
    """
    count = 0
    for value in p_values:
        if not value <= level:
            break
        count += 1
    return count


def least_examples(keep: float, level: float) -> int:
    """How many examples a test needs at least, where no exit ever loses anything: fewer prove nothing."""
    count = 1
    while p_value(np.full(count, keep - 1.0), keep) > level:
        count *= 2
    low, high = count // 2, count
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if p_value(np.full(middle, keep - 1.0), keep) <= level else (middle, high)
    return high
