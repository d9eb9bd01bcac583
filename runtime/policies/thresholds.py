"""Policies that compare a score with a threshold; `offramp.runtime.policies.base` says what a policy is."""

from __future__ import annotations

import math
import threading
from collections.abc import Mapping
from dataclasses import KW_ONLY, dataclass, field
from typing import Any

import numpy as np

from offramp.bundle.manifest import Exit, Stack
from offramp.bundle.measures import measure_named
from offramp.errors import PolicyError
from offramp.runtime.policies.base import Bound, Policy, Rows, State, make_plain, options, scored


@dataclass(frozen=True, slots=True)
class Threshold(Policy):
    """What policies with a threshold for one measure share; ``thresholds`` sets single exits apart, by ``after``."""

    threshold: float | None = None
    measure: str = ""
    _: KW_ONLY
    thresholds: Mapping[int, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        make_plain(self)
        numbers = [*self.thresholds.values(), *(() if self.threshold is None else (self.threshold,))]
        if not numbers or any(math.isnan(number) for number in numbers):
            raise PolicyError(f"{self!r} has no threshold that scores could be compared with")

    def measures(self, stack: str, exit_: Exit) -> tuple[str, ...] | None:
        asked = self.threshold is not None or exit_.after in self.thresholds
        return (self.measure,) if asked and self.measure in exit_.scores else None

    def at(self, after: int) -> float:
        """The threshold that holds after so many blocks."""
        common = math.nan if self.threshold is None else self.threshold
        return float(self.thresholds.get(after, common))  # scores stay float32 beside it, as beside no number of numpy

    def check(self, stacks: Mapping[str, Stack]) -> None:
        scored(stacks, self.measure, self.thresholds)

    def to_dict(self) -> dict[str, Any]:
        return options(self)


@dataclass(frozen=True, slots=True)
class Confidence(Threshold):
    """A row leaves where its score is at least a threshold; a NaN never is.

    ``measure`` is "top1" (highest softmax probability, as in DEED, arXiv 2311.08623, and CALM, 2207.07061),
    "margin" (the two highest, CALM), "cosine" (this block's hidden state against the one before: MuE,
    2211.11152) or whatever else the bundle scores. ``thresholds`` sets single exits apart, by ``after``;
    without a ``threshold`` only those are asked.
    """

    measure: str = "top1"

    def leave(self, state: State) -> Rows:
        return np.greater_equal(state.scores[self.measure], self.at(state.after))

    def bound(self, stack: str, after: int) -> Bound | None:
        return Bound(self.measure, self.at(after))


@dataclass(frozen=True, slots=True)
class Entropy(Threshold):
    """A row leaves where its entropy, in nats, is at most a threshold (DeeBERT, arXiv 2004.12993)."""

    measure: str = "entropy"

    def leave(self, state: State) -> Rows:
        return np.less_equal(state.scores[self.measure], self.at(state.after))


@dataclass(frozen=True, slots=True)
class Learned(Confidence):
    """A row leaves where the exit's gate, a trained sigmoid, is at least a threshold (CALM, arXiv 2207.07061, 3.1)."""

    measure: str = "learned"


@dataclass(frozen=True, slots=True)
class Decay(Threshold):
    """`Confidence` whose threshold falls as a row's text grows, since late mistakes do less harm.

    After t of N tokens the threshold is ``clip(beta * threshold + (1 - beta) * exp(-tau * t / N), 0, 1)`` (CALM,
    arXiv 2207.07061, eq. 5, which has beta 0.9 and tau 4). MuE (2211.11152, sec. 3.2) takes the same for "cosine";
    its code lets nothing leave in the first third: ``share=1/3``. Where nothing is generated, t is 0.

    Attributes:
        tokens: N, the greatest number of new tokens.
        beta: The threshold's weight, 0 to 1; 1 is `Confidence`.
        tau: How fast the rest falls.
        share: In the first so many of N tokens nothing leaves, 0 to 1.

    Raises:
        PolicyError: options outside those bounds, or thresholds outside 0 to 1.
    """

    measure: str = "top1"
    _: KW_ONLY
    tokens: int = 256
    beta: float = 0.9
    tau: float = 4.0
    share: float = 0.0

    def __post_init__(self) -> None:
        Threshold.__post_init__(self)
        numbers = [*self.thresholds.values(), self.threshold or 0.0, self.beta, self.share]
        if not all(0 <= number <= 1 for number in numbers):
            raise PolicyError(f"{self!r}: thresholds, beta and share are from 0 to 1")
        if self.tokens < 1 or not 0 <= self.tau < math.inf:
            raise PolicyError(f"{self!r}: tokens are at least 1, and tau is 0 or more")

    def leave(self, state: State) -> Rows:
        steps = np.zeros(state.rows.size, np.int64) if state.steps is None else state.steps
        falling = (1 - self.beta) * np.exp(-self.tau * steps / self.tokens)
        threshold = np.clip(self.beta * self.at(state.after) + falling, 0.0, 1.0)
        late = steps >= self.share * self.tokens
        leaving: Rows = late & np.greater_equal(state.scores[self.measure], threshold)
        return leaving


@dataclass(frozen=True, slots=True)
class ShallowDeep(Policy):
    """FREE's two depths (arXiv 2310.05424, sec. 3): one exit, and a token leaves there if it scores above a threshold.

    The tokens that left are computed deeper, all at once, when one does not: FREE's synchronised parallel decoding is
    what offramp does with every exit. So this is `Confidence` at one exit, with FREE's measure and comparison: a
    score that equals the threshold goes deep. Where full depth picks tokens of a short list, one that scores at least
    ``pick`` will do; None always runs the head over the whole vocabulary.
    """

    after: int
    threshold: float = 0.9
    measure: str = "margin"
    _: KW_ONLY
    pick: float | None = None

    def __post_init__(self) -> None:
        make_plain(self)
        if math.isnan(self.threshold):
            raise PolicyError(f"{self!r} has no threshold that scores could be compared with")

    def measures(self, stack: str, exit_: Exit) -> tuple[str, ...] | None:
        return (self.measure,) if exit_.after == self.after and self.measure in exit_.scores else None

    def picks(self, stack: str, exit_: Exit) -> tuple[str, ...] | None:
        return (self.measure,) if self.pick is not None and self.measure in exit_.scores else None

    def leave(self, state: State) -> Rows:
        if state.after == state.blocks and self.pick is not None:
            return np.greater_equal(state.scores[self.measure], self.pick)
        return np.greater(state.scores[self.measure], float(self.threshold))

    def bound(self, stack: str, after: int) -> Bound | None:
        return Bound(self.measure, just_above(self.threshold))

    def check(self, stacks: Mapping[str, Stack]) -> None:
        scored(stacks, self.measure, (self.after,))

    def to_dict(self) -> dict[str, Any]:
        return options(self)


@dataclass(frozen=True, slots=True)
class Verify(ShallowDeep):
    """Lossless: tokens that leave early are drafts, which full depth checks when a token goes deep.

    The exit ``after`` so many blocks writes drafts while its score is above ``threshold``, at most ``drafts`` of them;
    then the deeper blocks run on all at once. Full depth's token takes the place of the first draft that differs, and
    what follows that is forgotten. Greedy tokens are those of full depth, near ties aside where weights have fewer bits
    (several tokens at once are rounded otherwise than one by one); drawn ones have its distribution. It is the
    self-speculation of LayerSkip (arXiv 2404.16710) and Kangaroo (2404.18911); drafts that are drawn are checked as in
    2211.17192, sec. 2.3.

    Only for `Chain.stream` and `Chain.generate` without beams; `Each` names it for the last stack.
    """

    threshold: float = 0.5
    measure: str = "top1"
    drafts: int = 4

    def __post_init__(self) -> None:
        ShallowDeep.__post_init__(self)
        if self.drafts < 1 or self.pick is not None:
            raise PolicyError(f"{self!r}: at least 1 draft, and full depth checks with its whole head")


def just_above(threshold: float) -> float:
    """The least score, float32, that is above a threshold."""
    return float(np.nextafter(np.float32(threshold), np.float32(math.inf)))


#: Thresholds that learn move on a scale on which 0.9, 0.99 and 0.999 are about as far apart; its ends are 0 and 1.
END = 14.0


def position_of(threshold: float) -> float:
    """Where a threshold is on the scale from -END to END: its logit."""
    if not 0 < threshold < 1:
        return math.copysign(END, threshold - 0.5)
    return min(END, max(-END, math.log(threshold) - math.log1p(-threshold)))


def threshold_at(position: float) -> float:
    """The threshold at a place on the scale; at the ends it is 0 and 1, which no score is above."""
    if abs(position) >= END:
        return float(position > 0)
    return 1 / (1 + math.exp(-position))


class Learner(Policy):
    """Base of policies that learn. A copy, pickled ones too, goes on from what has been learned, by itself."""

    _lock: threading.Lock

    def __getstate__(self) -> dict[str, Any]:
        with self._lock:
            found = {name: value for name, value in vars(self).items() if name != "_lock"}
            return {name: value.copy() if isinstance(value, np.ndarray) else value for name, value in found.items()}

    def __setstate__(self, state: Mapping[str, Any]) -> None:
        vars(self).update(state)
        self._lock = threading.Lock()


def check_learner(policy: Policy, measure: str, threshold: float) -> None:
    """Raise PolicyError where a threshold that learns cannot start, or a measure is not on its scale."""
    if not measure_named(measure).bounded:
        raise PolicyError(f"{policy!r}: {measure!r} does not go from 0, unsure, to 1", hint="measure=top1 or margin")
    if not 0 <= threshold <= 1:
        raise PolicyError(f"{policy!r}: the threshold to start with is from 0 to 1")
