"""A search over combinations of what several stacks may do, and the path of those that are worth a test.

What every candidate of a stack does alone comes first. Then the search goes on from whatever the tests are likely to
accept, full depth included, to what is bolder in one stack: to the fastest that is expected to be accepted too, else
to what is expected to come nearest to that. The losses that are expected are sums of those alone, the milliseconds are
those of where it goes on from, less what the stack's own costs say. So a candidate that uses up what may be lost does
not hide what several others save for less. Nothing is tried that is nowhere less bold than what loses far too much.
Where nothing faster is left, it looks for the fastest that spares a part of what may be lost, for the tests to start
with.

At most `COMBINATIONS` are tried, each on all fitting examples; of those that do not lose far too much `TIMED` rows or
generations are timed as a whole, in turns with full depth. A path has at most `TESTS` of them, which are timed again.
"""

from __future__ import annotations

import logging
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from operator import attrgetter
from statistics import NormalDist
from typing import Any, NamedTuple, TypeAlias, TypeVar

import numpy as np
from numpy.typing import NDArray

from offramp.calibration.costs import FASTER
from offramp.calibration.examples import Example, Examples, together
from offramp.calibration.observe import answered, traced
from offramp.calibration.quality import graded
from offramp.calibration.risk import losses_of
from offramp.calibration.sequence import Asked
from offramp.runtime import Never, Policy

_logger = logging.getLogger(__name__)

Numbers = NDArray[np.float64]
Combination: TypeAlias = tuple[int, ...]  # the candidate of each stack: 0 is full depth, more is bolder
_Item = TypeVar("_Item")

COMBINATIONS, TESTS, TIMED = 64, 12, 16
_LONG = 4.0
_SPARED = (0.0, 0.25, 0.5, 0.75)  # of what may be lost
_FAR = 3  # standard errors; where so many more than may be is lost, nothing bolder is tried


@dataclass(frozen=True)
class Found:
    """A combination on the fitting examples.

    Attributes:
        losses: For each example, float [examples].
        bound: The mean loss that as many examples as will be tested are likely to show at most.
        milliseconds: Of a row or a whole generation; infinite where far too much is lost.
    """

    losses: Numbers
    bound: float
    milliseconds: float


class _Guess(NamedTuple):
    """What to expect of a combination."""

    combination: Combination
    bound: float
    milliseconds: float


class Search:
    """Combinations of the candidates of each stack, tried on the fitting examples.

    ``saves`` has the milliseconds that each candidate is expected to save, by stack, 0 first; ``policy`` is what a
    combination does, ``tests`` the number of examples that will test what is found.
    """

    def __init__(
        self,
        asked: Asked,
        saves: Sequence[Sequence[float]],
        policy: Callable[[Combination], Policy],
        fitting: Examples,
        tests: int,
    ) -> None:
        self._asked, self._saves, self._policy, self._fitting = asked, saves, policy, fitting
        self._slack = NormalDist().inv_cdf(asked.confidence) / np.sqrt(max(1, tests))
        self._references: list[Any] = list(fitting.labels or [None] * len(fitting))
        self._full = self._graded(Never())  # without labels its answers become the references
        self._timed = fitting.inputs[:TIMED]
        self.found: dict[Combination, Found] = {}
        self._start = (0,) * len(saves)

    @cached_property
    def full_milliseconds(self) -> float:
        """Of full depth with all learners."""
        return milliseconds(self._asked, self._timed, [Never()])[0]

    def run(self) -> None:
        """Try combinations: ``found`` has what came out."""
        self._try(self._start)
        for alone in sorted(self._bolder(self._start), key=sum):
            if not self._hopeless(alone) and len(self.found) < COMBINATIONS:
                self._try(alone)
        for at, share in enumerate(_SPARED):
            room = (COMBINATIONS - len(self.found)) // (len(_SPARED) - at)
            self._descend(min(0.0, share * self.found[self._start].bound), len(self.found) + room)

    def path(self) -> dict[Combination, float]:
        """What is worth a test, from careful to bold, each faster than the one before: timed anew, all in turns."""
        found = list[Combination]()
        for at, one in sorted(self.found.items(), key=lambda item: (item[1].bound, item[1].milliseconds)):
            least = self.found[found[-1]].milliseconds if found else self.full_milliseconds
            if one.losses.mean() <= 0 and one.milliseconds < least:
                found.append(at)
        found = some(found, TESTS)
        full, *times = milliseconds(self._asked, self._timed, [Never(), *map(self._policy, found)])
        path: dict[Combination, float] = {}
        for at, took in zip(found, times, strict=True):
            took *= self.full_milliseconds / full
            if took <= FASTER * min(path.values(), default=self.full_milliseconds):
                path[at] = took
        return path

    def _descend(self, most: float, tries: int) -> None:
        """Look for the fastest whose bound is at most ``most``, until so many have been tried."""
        while len(self.found) < tries:
            promising = [at for at, one in self.found.items() if at == self._start or one.bound <= most]
            fastest = min(self.found[at].milliseconds for at in promising)
            guessed = [guess for at in promising for guess in self._guesses(at) if guess.milliseconds < fastest]
            likely = [guess for guess in guessed if guess.bound <= most]
            if not guessed:
                return
            best = min(likely or guessed, key=attrgetter("milliseconds" if likely else "bound"))
            self._try(best.combination)

    def _guesses(self, at: Combination) -> Iterator[_Guess]:
        """Of all that is bolder in one stack and has not been tried."""
        one = self.found[at]
        for bolder in self._bolder(at):
            place = next(place for place, old in enumerate(at) if old != bolder[place])
            then, now = (self.found.get(self._alone(place, each[place])) for each in (bolder, at))
            if then is None or now is None or bolder in self.found or self._hopeless(bolder):
                continue
            saved = self._saves[place][bolder[place]] - self._saves[place][at[place]]
            bound = self._bound(one.losses + then.losses - now.losses)
            yield _Guess(bolder, bound, one.milliseconds - saved)

    def _alone(self, place: int, candidate: int) -> Combination:
        return (*self._start[:place], candidate, *self._start[place + 1 :])

    def _bolder(self, combination: Combination) -> list[Combination]:
        """All that is bolder in one stack."""
        return [
            (*combination[:place], bolder, *combination[place + 1 :])
            for place, at in enumerate(combination)
            for bolder in range(at + 1, len(self._saves[place]))
        ]

    def _bound(self, losses: Numbers) -> float:
        return float(losses.mean() + self._slack * losses.std())

    def _hopeless(self, combination: Combination) -> bool:
        """Whether something that is nowhere bolder loses far too much."""
        return any(
            np.isinf(one.milliseconds) and all(np.less_equal(other, combination)) for other, one in self.found.items()
        )

    def _try(self, combination: Combination) -> None:
        asked, policy = self._asked, self._policy(combination)
        losses = losses_of(self._graded(policy), self._full, asked.keep)
        took = np.inf
        if losses.mean() <= _FAR * losses.std() / np.sqrt(losses.size):
            first, this = milliseconds(asked, self._timed, [Never(), policy])
            took = self.full_milliseconds * this / first
        found = self.found[combination] = Found(losses, self._bound(losses), took)
        _logger.info("%s: %.2f ms, mean loss %.4f, likely below %.4f", policy, took, losses.mean(), found.bound)

    def _graded(self, policy: Policy) -> Numbers:
        """The quality of each fitting example."""
        asked, grades = self._asked, np.zeros(len(self._fitting))
        for rows, inputs in together(asked.chain, self._fitting.inputs):
            answers, _ = answered(asked.chain, inputs, policy, asked.options)
            for row, answer in zip(rows, answers, strict=True):
                if self._references[row] is None:
                    self._references[row] = answer
                grades[row] = graded(asked.quality, answer, self._references[row])
        return grades


def milliseconds(asked: Asked, examples: Sequence[Example], policies: Sequence[Policy]) -> list[float]:
    """Of a row or a whole generation, one at a time, the policies in turns: what segments and the host's work take.

    A segment that is interrupted by other work on the machine counts for no more than `_LONG` times its median; one
    that makes several tokens takes as long as these.
    """
    for policy in policies:
        traced(asked.chain, examples[0], policy, asked.options)
    runs = [[traced(asked.chain, example, policy, asked.options) for policy in policies] for example in examples]
    beside = [(wall - sum(item.milliseconds for item in trace)) / len(trace) for run in runs for trace, wall in run]
    host = np.quantile(beside, 0.1)  # of a segment: the same whatever runs, so what is more is other work
    several = {part.steps for stack in asked.chain.manifest.stacks.values() for part in stack.runs}
    found = []
    for at in range(len(policies)):
        times = defaultdict(list)
        for trace, _ in (run[at] for run in runs):
            for item in trace:
                times[item.segment].append(item.milliseconds)
        in_all = 0.0
        for name, each in times.items():
            cut = each if name in several else np.minimum(each, _LONG * np.median(each))
            in_all += sum(cut) + host * len(each)
        found.append(float(in_all) / len(examples))
    return found


def some(items: Sequence[_Item], most: int) -> list[_Item]:
    """At most so many of them, evenly, the first and the last among them."""
    places = np.linspace(0, len(items) - 1, min(most, len(items))).round().astype(int)
    return [items[at] for at in places]
