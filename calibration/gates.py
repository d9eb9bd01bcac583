"""Scores become one scale, thresholds one path; and which measure and which exits pay.

An exit's scores are turned into the chance that leaving there loses nothing, by Platt's fit (temperature and offset
on the logit of the score; monotone). So one number, the risk that is taken, sets the thresholds of all exits, and a
path of settings goes from the most careful one to the boldest. All of this sees the fitting part of the examples only.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from statistics import NormalDist
from typing import Any

import numpy as np
from numpy.typing import NDArray

from offramp.bundle.manifest import Stack
from offramp.bundle.measures import measure_named
from offramp.calibration.costs import Costs
from offramp.calibration.observe import Observed
from offramp.calibration.risk import losses_of
from offramp.runtime import Confidence, Each, Entropy, Policy, Width

Numbers = NDArray[np.float64]
Thresholds = Mapping[int, float]  # by the exit's place in the stack, 0 the first; others are not asked

_CLOSE = 1e-7  # to 0 or 1, nearer than which float32 scores say nothing
_LEAST_SLOPE = 1e-3


@dataclass(frozen=True)
class Scale:
    """``chance = sigmoid(evidence / temperature + offset)``, where evidence is the logit of a score (or -entropy)."""

    temperature: float
    offset: float

    def chance(self, measure: str, scores: NDArray[Any]) -> Numbers:
        """That leaving loses nothing, by score."""
        return _sigmoid(evidence(measure, scores) / self.temperature + self.offset)

    def threshold(self, measure: str, chance: float) -> float:
        """The score from which on there is at least that chance."""
        found = self.temperature * (np.log(chance) - np.log1p(-chance) - self.offset)
        return float(-found if measure_named(measure).surer == "less" else _sigmoid(np.float64(found)))


def _sigmoid(x: Any) -> Numbers:
    chance: Numbers = 1 / (1 + np.exp(-np.clip(x, -30, 30)))
    return chance


def evidence(measure: str, scores: NDArray[Any]) -> Numbers:
    """What grows with how sure a score is, without bounds."""
    if measure_named(measure).surer == "less":
        return -np.asarray(scores, np.float64)
    clipped = np.clip(np.asarray(scores, np.float64), _CLOSE, 1 - _CLOSE)
    return np.log(clipped) - np.log1p(-clipped)


def fit_scale(measure: str, scores: NDArray[Any], good: NDArray[np.bool_]) -> Scale:
    """Maximum likelihood by Newton's method, on Platt's targets, which are short of 0 and 1."""
    x = evidence(measure, scores)
    middle, spread = float(x.mean()), float(x.std()) or 1.0
    design = np.stack([(x - middle) / spread, np.ones(x.size)], 1)
    yes = int(good.sum())
    target = np.where(good, (yes + 1) / (yes + 2), 1 / (x.size - yes + 2))
    weights = np.zeros(2)
    for _ in range(50):
        chance = _sigmoid(design @ weights)
        slope = design.T @ (target - chance) - 1e-3 * weights
        curve = (design * (chance * (1 - chance))[:, None]).T @ design + 1e-3 * np.eye(2)
        step = np.linalg.solve(curve, slope)
        weights = weights + step
        if np.abs(step).max() < 1e-9:
            break
    steep = max(float(weights[0]), _LEAST_SLOPE) / spread  # scores that mislead say nothing
    return Scale(1 / steep, float(weights[1]) - steep * middle)


def leaves(measure: str, scores: NDArray[Any], thresholds: Thresholds) -> NDArray[np.int64]:
    """Which exit each step leaves by, [steps], as the policies decide; full depth is the last."""
    out = np.zeros((scores.shape[0], scores.shape[1] + 1), np.bool_)
    out[:, -1] = True
    reaches = np.less_equal if measure_named(measure).surer == "less" else np.greater_equal
    for at, threshold in thresholds.items():
        out[:, at] = reaches(scores[:, at], threshold)
    taken: NDArray[np.int64] = out.argmax(1)
    return taken


def thresholds_of(stack: Stack, measure: str, thresholds: Thresholds) -> Policy:
    """The policy of one stack that has these thresholds."""
    named = {stack.exits[at].after: threshold for at, threshold in thresholds.items()}
    kind = Entropy if measure_named(measure).surer == "less" else Confidence
    return kind(measure=measure, thresholds=named)


def policy_of(
    stack: Stack, measure: str, thresholds: Thresholds, *, alone: bool, beside: Policy | None = None
) -> Policy:
    """The policy that has these thresholds; ``alone`` where the bundle has no other stack.

    Beside another policy there may be no thresholds.
    """
    if beside is not None and not thresholds:
        return beside
    policy = thresholds_of(stack, measure, thresholds)
    exits = beside.exits if isinstance(beside, Width) else beside
    made = policy if alone else Each({**(exits.stacks if isinstance(exits, Each) else {}), stack.name: policy})
    return Width(beside.budget, made) if isinstance(beside, Width) else made


@dataclass(frozen=True)
class Path:
    """Settings from careful to bold, each expected to be faster than the one before.

    Attributes:
        measure: The score that is compared with thresholds.
        scales: For each exit that is kept, by place.
        settings: Thresholds, and the milliseconds a step expected of them.
        dropped: For each other exit why, by place.
        expected: Milliseconds a step of the setting that the test is likely to end with.
    """

    measure: str
    scales: Mapping[int, Scale]
    settings: Sequence[tuple[Thresholds, float]]
    expected: float
    dropped: Mapping[int, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Fit:
    """What paths are fitted on, and how careful they are.

    ``tests`` is the number of examples that settings will be tested on, ``points`` how many settings a path has.
    """

    observed: Observed
    costs: Costs
    keep: float
    confidence: float
    tests: int
    points: int

    def path(self, measure: str, kept: Sequence[int]) -> Path:
        """The path over these exits."""
        seen = self.observed
        scores = seen.scores[measure]
        scales = {at: fit_scale(measure, scores[:, at], seen.good[:, at]) for at in kept}
        chances = [scales[at].chance(measure, scores[:, at]) for at in kept]
        settings: list[tuple[Thresholds, float]] = []
        least = best = self.costs.whole
        if kept:
            shares = np.linspace(0, 1, self.points + 1)[1:]
            levels = np.unique(np.quantile(np.concatenate(chances), 1 - shares))[::-1]
            alone = [] if self.costs.wide is None else [np.inf]  # what is beside, with no exits, comes first
            for level in (*alone, *np.clip(levels, _CLOSE, 1 - _CLOSE)):
                open_ = {
                    at: scales[at].threshold(measure, level)
                    for at, chance in zip(kept, chances, strict=True)
                    if (chance >= level).any()
                }
                taken = leaves(measure, scores, open_)
                asked = np.isin(np.arange(scores.shape[1]), list(open_))
                expected = self.costs.expected(taken, seen.lengths, measure, asked)
                if expected < least:
                    settings.append((open_, expected))
                    least = expected
                    if self._likely(taken):
                        best = expected
        return Path(measure, scales, settings, best)

    def _likely(self, taken: NDArray[np.int64]) -> bool:
        """Whether as many examples as will be tested would show that the setting keeps enough."""
        seen = self.observed
        early = seen.by_example(np.take_along_axis(seen.quality, taken[:, None], 1)[:, 0])
        losses = losses_of(early, seen.by_example(seen.whole), self.keep)
        slack = NormalDist().inv_cdf(self.confidence) * losses.std() / np.sqrt(max(1, self.tests))
        return bool(losses.mean() + slack <= 0)

    def pruned(self, measure: str) -> Path:
        """The path over the exits that pay: one after the other is dropped as long as that makes it faster."""
        scores = self.observed.scores[measure]
        there = [at for at in range(scores.shape[1]) if not np.isnan(scores[:, at]).any()]
        dropped = {at: f"it has no score {measure!r}" for at in range(scores.shape[1]) if at not in there}
        best = self.path(measure, there)
        while len(best.scales) > 1 and best.expected < self.costs.whole:
            fewer = {at: self.path(measure, [other for other in best.scales if other != at]) for at in best.scales}
            at = min(fewer, key=lambda at: fewer[at].expected)
            if fewer[at].expected > best.expected:
                break
            dropped[at] = f"it saves nothing: {best.expected:.3f} ms with it, {fewer[at].expected:.3f} ms without"
            best = fewer[at]
        return Path(best.measure, best.scales, best.settings, best.expected, dropped)

    def chosen(self, measures: Sequence[str] | None = None) -> Path:
        """Of the measures the one that is expected to be the fastest."""
        paths = [self.pruned(measure) for measure in measures or self.observed.scores]
        return min(paths, key=lambda path: path.expected)
