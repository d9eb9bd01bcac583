"""A threshold that follows what full depth says of the tokens that are caught up."""

from __future__ import annotations

import threading
from collections.abc import Mapping
from dataclasses import KW_ONLY, dataclass, field, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from offramp.bundle.manifest import Exit, Stack
from offramp.errors import PolicyError
from offramp.runtime.policies.base import Agreement, Bound, Cost, Rows, State, make_plain, only, options
from offramp.runtime.policies.thresholds import END, Learner, check_learner, just_above, position_of, threshold_at

Floats = NDArray[np.float64]

_POSITIONS: Floats = np.linspace(-END, END, 561)
_SCORES: Floats = np.array([threshold_at(float(position)) for position in _POSITIONS])
_LOGS = -np.logaddexp(0, -_POSITIONS), -np.logaddexp(0, _POSITIONS)  # of the score, and of 1 minus the score
_NEAREST = 1e-6  # scores are no nearer to 0 or 1 where Betas are fitted
_SIGMA = 1.645  # bounds hold with 95 %


@dataclass(repr=False)
class Adaptive(Learner):
    """A token leaves after ``after`` blocks if it scores above a threshold that is estimated while running.

    It aims at precision: of the tokens that leave, a share of ``target`` are to be what full depth says. That is
    P(agree | score > threshold), the promise that a user can check and the largest set that keeps it, and not P(agree |
    score = threshold), which FREE (arXiv 2310.05424, sec. 3.3) compares with its constant. What is known of agreement
    comes from generations: where a token goes deep, full depth's tokens are compared with the exit's, for those that
    are caught up and for the one itself. The last ``memory`` of them are kept, so a shift of the data is followed.

    After every ``every`` tokens compared, the threshold moves at most ``step`` on the scale of its logit:

    1. It rises by ``step`` where the tokens above it agree less than ``target`` with 95 % confidence (the Poisson
       bound of the number that do not). So it does where none agree, up to 1, which nothing is above.
    2. Else, with at least ``least`` tokens of both kinds, it moves towards the lowest threshold that reaches ``target``
       in a mixture of two Betas, of the scores that agree and of those that do not: fitted by moments and weighted by
       their number, the prior that FREE leaves out. It does not rise where ``target`` is met with 95 % confidence.
    3. Else, with one kind (almost) missing, there is nothing to fit. It falls by a quarter of ``step`` where some
       threshold below it is met with 95 % confidence; of tokens that all agree that takes ``3 / (1 - target)``.

    It never falls to where the tokens above, as counted, agree less than ``target``.

    Where everything leaves nothing goes deep, and nothing would be learned: so once ``audit`` tokens less one have left
    with none between that went deep, the next one does.

    A copy (`copy.deepcopy`, `pickle`: another process's) goes on from what has been learned, by itself.

    Attributes:
        threshold: The threshold to start with; `now` is what it has become.
        share: In this share of the steps that go deep tokens are compared, which takes the head's time for them, unless
            full depth picks all of them.
        pick: Where full depth picks tokens of a short list, one that scores at least this will do.
    """

    after: int
    threshold: float = 0.9
    measure: str = "margin"
    _: KW_ONLY
    target: float = 0.99
    least: int = 8
    every: int = 16
    memory: int = 1024
    step: float = 0.5
    audit: int = 64
    share: float = 1.0
    pick: float | None = None
    _position: float = field(init=False, compare=False)
    _count: int = field(default=0, init=False, compare=False)
    _turn: float = field(default=0.0, init=False, compare=False)
    _early: int = field(default=0, init=False, compare=False)

    def __post_init__(self) -> None:
        make_plain(self)
        check_learner(self, self.measure, self.threshold)
        if not 0 < self.target < 1 or min(self.least, self.every, self.audit) < 1 or not 0 < self.share <= 1:
            raise PolicyError(f"{self!r}: target and share are between 0 and 1, least, every and audit at least 1")
        if not self.step > 0 or self.memory < 3 / (1 - self.target):
            least = int(3 / (1 - self.target)) + 1
            raise PolicyError(
                f"{self!r}: to know that of {self.memory} tokens {self.target:.4%} agree takes more of them",
                hint=f"memory={least} or more, and a step above 0",
            )
        self._position = position_of(self.threshold)
        self._scores, self._agreed = np.zeros(self.memory), np.zeros(self.memory, np.bool_)
        self._lock = threading.Lock()

    @property
    def now(self) -> float:
        """The threshold as it is."""
        return threshold_at(self._position)

    @property
    def observes(self) -> frozenset[type[Agreement | Cost]]:
        return frozenset({Agreement})

    def measures(self, stack: str, exit_: Exit) -> tuple[str, ...] | None:
        return (self.measure,) if exit_.after == self.after and self.measure in exit_.scores else None

    def picks(self, stack: str, exit_: Exit) -> tuple[str, ...] | None:
        return (self.measure,) if self.pick is not None and self.measure in exit_.scores else None

    def leave(self, state: State) -> Rows:
        if state.after == state.blocks and self.pick is not None:
            return np.greater_equal(state.scores[self.measure], self.pick)
        leaving = np.greater(state.scores[self.measure], self.now)
        if state.steps is not None:
            with self._lock:
                for row, leaves in enumerate(leaving.tolist()):
                    leaving[row] = leaves and self._early + 1 < self.audit
                    self._early = self._early + 1 if leaving[row] else 0
        return leaving

    def bound(self, stack: str, after: int) -> Bound | None:
        with self._lock:
            return Bound(self.measure, just_above(self.now), self.audit - 1 - self._early)

    def check(self, stacks: Mapping[str, Stack]) -> None:
        only(stacks, self.measure, self, self.after)

    def compares(self, stack: str) -> bool:
        with self._lock:
            self._turn += self.share
            due = self._turn >= 1
            self._turn -= due
        return due

    def observe(self, seen: Agreement | Cost) -> None:
        if not isinstance(seen, Agreement) or seen.after != self.after:
            return
        with self._lock:
            for score, agreed in zip(seen.scores[self.measure].tolist(), seen.agreed.tolist(), strict=True):
                if score != score:  # NaN never leaves
                    continue
                self._scores[self._count % self.memory], self._agreed[self._count % self.memory] = score, agreed
                self._count += 1
                if self._count % self.every == 0:
                    self._position = min(END, max(-END, self._moved()))

    def _moved(self) -> float:
        """Where the threshold goes, by the three rules."""
        known = slice(min(self._count, self.memory))
        scores, agreed, here = self._scores[known], self._agreed[known], self._position
        measured = _Measured(scores, agreed, 1 - self.target)
        if measured.missed(here):
            return here + self.step
        if min(agreed.sum(), (~agreed).sum()) >= self.least:
            goal, step = _goal(scores, agreed, self.target), self.step
        else:
            goal, step = measured.lowest(here), self.step / 4
        if goal > here:
            return here if measured.met(here) else min(goal, here + step)
        lower = max(goal, here - step)
        return lower if measured.reached(lower) else here

    def state(self) -> dict[str, Any]:
        """What it has learned, as JSON has it."""
        with self._lock:
            kept = min(self._count, self.memory)
            return {
                "position": self._position,
                "count": self._count,
                "turn": self._turn,
                "early": self._early,
                "scores": self._scores[:kept].tolist(),
                "agreed": self._agreed[:kept].tolist(),
            }

    def restored(self, state: Mapping[str, Any]) -> Adaptive:
        """A policy with these options that has learned what `state` told; PolicyError where it is none of those."""
        made = replace(self)
        try:
            made._position, made._count = float(state["position"]), int(state["count"])
            made._turn, made._early = float(state["turn"]), int(state["early"])
            kept = min(made._count, self.memory)
            made._scores[:kept], made._agreed[:kept] = state["scores"], state["agreed"]
        except (KeyError, TypeError, ValueError) as error:
            raise PolicyError(f"this is no state of {self!r}: {error}") from error
        return made

    def to_dict(self) -> dict[str, Any]:
        return options(self)

    def __repr__(self) -> str:
        shown = ", ".join(f"{name}={value!r}" for name, value in options(self).items() if name != "name")
        return f"Adaptive({shown})"


class _Measured:
    """How many tokens are above a threshold, and how many of those do not agree: counted, no model."""

    def __init__(self, scores: Floats, agreed: Rows, allowed: float) -> None:
        order = np.argsort(scores)
        self._scores, self._allowed = scores[order], allowed
        self._wrong = np.concatenate([np.cumsum(~agreed[order][::-1])[::-1], [0]])

    def _above(self, threshold: float | Floats) -> tuple[Any, Any]:
        start = np.searchsorted(self._scores, threshold, side="right")
        return self._scores.size - start, self._wrong[start]

    def reached(self, position: float) -> bool:
        """Whether no more than the allowed share of those above do not agree, as counted."""
        count, wrong = self._above(threshold_at(position))
        return bool(wrong <= self._allowed * count)

    def missed(self, position: float) -> bool:
        """Whether more do not, with confidence."""
        count, wrong = self._above(threshold_at(position))
        return bool(_fewest(wrong) > self._allowed * count)

    def met(self, position: float) -> bool:
        """Whether no more do not, with confidence."""
        count, wrong = self._above(threshold_at(position))
        return bool(_most(wrong) <= self._allowed * count)

    def lowest(self, position: float) -> float:
        """The lowest place where that is so, up to ``position``; that itself where there is none."""
        count, wrong = self._above(_SCORES)
        found = _POSITIONS[(_most(wrong) <= self._allowed * count) & (position >= _POSITIONS)]
        return float(found[0]) if found.size else position


def _most(count: Any) -> Any:
    """The greatest mean of a Poisson variable that is seen ``count`` times, with 95 % (Wilson and Hilferty, 1931)."""
    return (count + 1) * (1 - 1 / (9 * (count + 1)) + _SIGMA / (3 * np.sqrt(count + 1))) ** 3


def _fewest(count: Any) -> Any:
    """The least mean, likewise."""
    some = np.maximum(count, 1)
    return np.where(count > 0, some * (1 - 1 / (9 * some) - _SIGMA / (3 * np.sqrt(some))) ** 3, 0.0)


def _goal(scores: Floats, agreed: Rows, target: float) -> float:
    """The lowest place above which a share of ``target`` agrees, in a mixture of two Betas; END where there is none."""
    good, bad = (_above(scores[of]) * of.sum() for of in (agreed, ~agreed))
    reached = good >= target * (good + bad)
    reached[-1] = True
    return float(_POSITIONS[reached.argmax()])


def _above(scores: Floats) -> Floats:
    """Of a Beta with these scores' mean and variance, what is above each place of the scale: 1 to 0."""
    scores = np.clip(scores, _NEAREST, 1 - _NEAREST)
    mean = scores.mean()
    spread = mean * (1 - mean)
    variance = min(max(scores.var(), 1e-6 * spread), 0.99 * spread)
    total = spread / variance - 1
    # by the logit of a score its density has no poles, so summing on the grid is exact enough
    logs = mean * total * _LOGS[0] + (1 - mean) * total * _LOGS[1]
    mass = np.exp(logs - logs.max())
    above: Floats = (np.cumsum(mass[::-1])[::-1] - mass / 2) / mass.sum()
    return above
