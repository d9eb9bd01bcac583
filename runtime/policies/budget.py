"""A threshold that holds a mean depth, or a time a token."""

from __future__ import annotations

import threading
from collections.abc import Mapping
from dataclasses import KW_ONLY, dataclass, field, replace
from typing import Any

import numpy as np

from offramp.bundle.manifest import Exit, Stack
from offramp.errors import PolicyError
from offramp.runtime.policies.base import Agreement, Cost, Rows, State, listing, make_plain, only, options
from offramp.runtime.policies.thresholds import END, Learner, check_learner, position_of, threshold_at

_MOST = 4.0  # a step that takes more than so many budgets too long was disturbed; it counts as that


@dataclass(repr=False)
class Budget(Learner):
    """A row leaves if it scores above a threshold that moves until a mean depth, or time, is held.

    Integral control: behind each step the logit of the threshold falls by ``gain`` times what was spent too much:
    ``(depth - blocks) / all blocks``, averaged over the rows, or ``milliseconds / budget - 1``. So the logit is what
    has been saved or spent so far, and it stays near where thresholds are; hence over T steps the mean depth is off by
    at most ``(28 + 2 * gain) * all blocks / (gain * T)``, whatever the data, if the exits can hold it at all. A budget
    below the first exit ends with everything leaving there. It says nothing of quality.

    Depth is where a token left; a millisecond counts whatever it was spent on, deeper blocks of earlier tokens too.
    A copy (`copy.deepcopy`, `pickle`: another process's) goes on from what has been learned, by itself.

    Attributes:
        blocks: The mean number of blocks after which rows shall leave; this or ``milliseconds``.
        milliseconds: The mean wall time of a step (of the stack, where nothing is generated), which rows share.
        measure: The score, from 0 (unsure) to 1; all exits that have it share the threshold.
        threshold: The threshold to start with; `now` is what it has become.
        gain: How far an excess of 1 moves the threshold's logit. An excess of depth is at most 1; one of time counts as
            4 at most.
    """

    blocks: float | None = None
    milliseconds: float | None = None
    _: KW_ONLY
    measure: str = "top1"
    threshold: float = 0.9
    gain: float = 0.5
    _position: float = field(init=False, compare=False)
    _steps: int = field(default=0, init=False, compare=False)
    _spent: float = field(default=0.0, init=False, compare=False)

    def __post_init__(self) -> None:
        make_plain(self)
        check_learner(self, self.measure, self.threshold)
        given = [budget for budget in (self.blocks, self.milliseconds) if budget is not None]
        if len(given) != 1 or not all(number > 0 for number in (*given, self.gain)):
            raise PolicyError(f"{self!r} needs blocks or milliseconds, not both, and all of its numbers above 0")
        self._position = position_of(self.threshold)
        self._lock = threading.Lock()

    @property
    def now(self) -> float:
        """The threshold as it is."""
        return threshold_at(self._position)

    @property
    def spent(self) -> float:
        """The mean of what steps have taken so far, in blocks or milliseconds; NaN before the first."""
        with self._lock:
            return self._spent / self._steps if self._steps else float("nan")

    @property
    def observes(self) -> frozenset[type[Agreement | Cost]]:
        return frozenset({Cost})

    def measures(self, stack: str, exit_: Exit) -> tuple[str, ...] | None:
        return (self.measure,) if self.measure in exit_.scores else None

    def leave(self, state: State) -> Rows:
        return np.greater(state.scores[self.measure], self.now)

    def check(self, stacks: Mapping[str, Stack]) -> None:
        stack = only(stacks, self.measure, self)
        first = min(exit_.after for exit_ in stack.asking if self.measure in exit_.scores)
        if self.blocks is not None and not first <= self.blocks <= stack.blocks:
            raise PolicyError(
                f"a mean of {self.blocks} blocks cannot be held by exits with the score {self.measure!r} after "
                f"{first} blocks and more:\n{listing({stack.name: stack})}",
                hint=f"blocks={first} to {stack.blocks}",
            )

    def observe(self, seen: Agreement | Cost) -> None:
        if not isinstance(seen, Cost) or not seen.depths.size:
            return
        if self.milliseconds is None:
            spent = float(seen.depths.mean())
            excess = (spent - (self.blocks or 0.0)) / seen.blocks
        else:
            spent = seen.milliseconds
            excess = min(spent / self.milliseconds - 1, _MOST)
        with self._lock:
            self._steps += 1
            self._spent += spent
            end = (
                END + self.gain * _MOST
            )  # one step behind the end is not cut off, or what it stands for were forgotten
            self._position = min(end, max(-end, self._position - self.gain * excess))

    def state(self) -> dict[str, Any]:
        """What it has learned, as JSON has it."""
        with self._lock:
            return {"position": self._position, "steps": self._steps, "spent": self._spent}

    def restored(self, state: Mapping[str, Any]) -> Budget:
        """A policy with these options that has learned what `state` says; PolicyError where it is none of those."""
        made = replace(self)
        try:
            made._position, made._steps = float(state["position"]), int(state["steps"])
            made._spent = float(state["spent"])
        except (KeyError, TypeError, ValueError) as error:
            raise PolicyError(f"this is no state of {self!r}: {error}") from error
        return made

    def to_dict(self) -> dict[str, Any]:
        return options(self)

    def __repr__(self) -> str:
        shown = ", ".join(f"{name}={value!r}" for name, value in options(self).items() if name != "name")
        return f"Budget({shown})"
