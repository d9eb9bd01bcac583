"""The policies that offramp brings; `offramp.runtime.policy` says what a policy is."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import KW_ONLY, dataclass, field
from typing import Any

import numpy as np

from offramp.runtime.errors import PolicyError
from offramp.runtime.manifest import Exit, Stack
from offramp.runtime.policy import Policy, Rows, State, listing


@dataclass(frozen=True, slots=True)
class Never(Policy):
    """Full depth for every row."""

    def measures(self, stack: str, exit_: Exit) -> tuple[str, ...] | None:
        return None

    def to_dict(self) -> dict[str, Any]:
        return {"name": "never"}


@dataclass(frozen=True, slots=True)
class Depth(Policy):
    """Every row leaves after so many blocks: ``Depth(2)`` in every stack, ``Depth({"encoder": 2})`` in one.

    Stacks that are not named run to full depth. This is how exits are tested.
    """

    depth: int | Mapping[str, int]

    def measures(self, stack: str, exit_: Exit) -> tuple[str, ...] | None:
        depth = self.depth if isinstance(self.depth, int) else self.depth.get(stack)
        return () if depth == exit_.after else None

    def leave(self, state: State) -> Rows:
        return np.ones(state.rows.size, np.bool_)

    def check(self, stacks: Mapping[str, Stack]) -> None:
        depths = dict.fromkeys(stacks, self.depth) if isinstance(self.depth, int) else self.depth
        for name, depth in depths.items():
            _named(stacks, name)
            if depth not in {exit_.after for exit_ in stacks[name].exits}:
                raise PolicyError(
                    f"stack {name!r} has no exit after {depth} blocks; there are:\n{listing(stacks)}",
                    hint=f"insert-exits{{stack={name} after={depth}}}",
                )

    def to_dict(self) -> dict[str, Any]:
        return {"name": "depth", "depth": self.depth if isinstance(self.depth, int) else dict(self.depth)}


@dataclass(frozen=True, slots=True)
class _Threshold(Policy):
    """What `Confidence` and `Entropy` share: a threshold for one measure, or one for each exit."""

    threshold: float | None = None
    measure: str = ""
    _: KW_ONLY
    thresholds: Mapping[int, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        numbers = [*self.thresholds.values(), *(() if self.threshold is None else (self.threshold,))]
        if not numbers or any(math.isnan(number) for number in numbers):
            raise PolicyError(f"{self!r} has no threshold that scores could be compared with")

    def measures(self, stack: str, exit_: Exit) -> tuple[str, ...] | None:
        asked = self.threshold is not None or exit_.after in self.thresholds
        return (self.measure,) if asked and self.measure in exit_.scores else None

    def at(self, after: int) -> float:
        """The threshold that holds after so many blocks."""
        common = math.nan if self.threshold is None else self.threshold
        return self.thresholds.get(after, common)

    def check(self, stacks: Mapping[str, Stack]) -> None:
        early = [exit_ for stack in stacks.values() for exit_ in stack.exits[:-1]]
        _scored(stacks, self.measure)
        missing = self.thresholds.keys() - {exit_.after for exit_ in early if self.measure in exit_.scores}
        if missing:
            listed = ",".join(map(str, sorted(missing)))
            raise PolicyError(
                f"no exit after {listed} blocks with the score {self.measure!r}; there are:\n{listing(stacks)}",
                hint=f"insert-exits{{after={listed}}},insert-scores{{measure={self.measure}}}",
            )

    def to_dict(self) -> dict[str, Any]:
        thresholds = {str(after): number for after, number in self.thresholds.items()}
        found = {"threshold": self.threshold, "measure": self.measure, "thresholds": thresholds}
        return {"name": type(self).__name__.lower()} | {k: v for k, v in found.items() if v not in (None, {})}


@dataclass(frozen=True, slots=True)
class Confidence(_Threshold):
    """A row leaves where its score is at least a threshold; a NaN never is.

    ``measure`` is "top1" (highest softmax probability, as in DEED, arXiv 2311.08623, and CALM, 2207.07061),
    "margin" (the two highest, CALM), "cosine" (this block's hidden state against the one before: MuE,
    2211.11152) or whatever else the bundle scores. ``thresholds`` sets single exits apart, by ``after``;
    without a ``threshold`` only those are asked.
    """

    measure: str = "top1"

    def leave(self, state: State) -> Rows:
        return np.greater_equal(state.scores[self.measure], self.at(state.after))


@dataclass(frozen=True, slots=True)
class Entropy(_Threshold):
    """A row leaves where its entropy, in nats, is at most a threshold (DeeBERT, arXiv 2004.12993)."""

    measure: str = "entropy"

    def leave(self, state: State) -> Rows:
        return np.less_equal(state.scores[self.measure], self.at(state.after))


@dataclass(frozen=True, slots=True)
class Patience(Policy):
    """A row leaves once ``patience`` exits in a row agree with the one before (PABEE, arXiv 2006.04152, 3.2).

    Needs the measure "prediction", int64 [rows], at every exit that is to count.
    """

    patience: int

    def __post_init__(self) -> None:
        if self.patience < 1:
            raise PolicyError(f"{self!r}: a patience is at least 1")

    def measures(self, stack: str, exit_: Exit) -> tuple[str, ...] | None:
        return ("prediction",) if "prediction" in exit_.scores else None

    def leave(self, state: State) -> Rows:
        now = state.scores["prediction"]
        before = [scores["prediction"] for scores in state.history.values()][-self.patience :]
        if len(before) < self.patience:
            return np.zeros(now.size, np.bool_)
        leaving: Rows = np.all([now == one for one in before], axis=0)
        return leaving

    def check(self, stacks: Mapping[str, Stack]) -> None:
        _scored(stacks, "prediction")

    def to_dict(self) -> dict[str, Any]:
        return {"name": "patience", "patience": self.patience}


@dataclass(frozen=True, slots=True)
class Each(Policy):
    """A policy for each stack, Never for the others: ``Each({"encoder": Confidence(0.9)})``."""

    stacks: Mapping[str, Policy]

    def measures(self, stack: str, exit_: Exit) -> tuple[str, ...] | None:
        return self.stacks[stack].measures(stack, exit_) if stack in self.stacks else None

    def leave(self, state: State) -> Rows:
        return self.stacks[state.stack].leave(state)

    def check(self, stacks: Mapping[str, Stack]) -> None:
        for name, policy in self.stacks.items():
            _named(stacks, name)
            policy.check({name: stacks[name]})

    def to_dict(self) -> dict[str, Any]:
        return {"name": "each", "stacks": {name: policy.to_dict() for name, policy in self.stacks.items()}}


NAMED: Mapping[str, type[Policy]] = {
    kind.__name__.lower(): kind for kind in (Never, Depth, Confidence, Entropy, Patience, Each)
}


def from_dict(data: Mapping[str, Any]) -> Policy:
    """The policy that ``Policy.to_dict`` wrote: ``{"name": "confidence", "threshold": 0.9}``.

    Raises:
        PolicyError: there is no policy of that name, or it has no such options.
    """
    options = {key: value for key, value in data.items() if key != "name"}
    kind = NAMED.get(str(data.get("name")))
    if kind is None:
        raise PolicyError(f"no policy {data.get('name')!r}; there are {', '.join(NAMED)}")
    try:
        if "thresholds" in options:
            options["thresholds"] = {int(after): float(at) for after, at in options["thresholds"].items()}
        if kind is Each:
            options["stacks"] = {stack: from_dict(item) for stack, item in options["stacks"].items()}
        return kind(**options)
    except (TypeError, ValueError, AttributeError, KeyError) as error:
        raise PolicyError(f"policy {data['name']!r} cannot have the options {options}: {error}") from error


def _named(stacks: Mapping[str, Stack], name: str) -> None:
    if name not in stacks:
        raise PolicyError(f"there is no stack {name!r}; there are:\n{listing(stacks)}")


def _scored(stacks: Mapping[str, Stack], measure: str) -> None:
    early = [exit_ for stack in stacks.values() for exit_ in stack.exits[:-1]]
    if not early:
        raise PolicyError(f"there is no exit before full depth:\n{listing(stacks)}", hint="insert-exits{after=...}")
    if not any(measure in exit_.scores for exit_ in early):
        raise PolicyError(
            f"no exit before full depth has the score {measure!r}; there are:\n{listing(stacks)}",
            hint=f"insert-scores{{measure={measure}}}",
        )
