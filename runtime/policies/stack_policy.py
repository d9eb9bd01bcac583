"""A policy at one stack in one run: which exits it is asked at, what its scores were there, what it decided."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from offramp.bundle.manifest import Stack
from offramp.bundle.measures import PICK, measure_named
from offramp.errors import ExecutionError, PolicyError
from offramp.runtime.policies.base import Bound, Cost, Policy, Rows, Scores, State, bound_of, listing

#: Scores by ``after`` and measure, [rows of the batch].
Record: TypeAlias = dict[int, dict[str, NDArray[Any]]]


class StackPolicy:
    """A policy at one stack in one run: it is asked at the exits, and the scores are kept.

    ``record`` holds them by ``after`` and measure, [rows of the batch]: NaN (or -1) for rows that had left.
    """

    def __init__(self, policy: Policy, stack: Stack, batch: int) -> None:
        self._policy, self._stack, self._batch = policy, stack, batch
        self._history: dict[int, Scores] = {}
        self.record: Record = {}
        self.steps: NDArray[np.int64] | None = None  # by place in the batch
        self.wanted = {exit_.after: policy.measures(stack.name, exit_) for exit_ in stack.exits[:-1]}
        # what a stack takes where nothing is decided is none of its policy's doing
        self._costs = Cost in policy.observes and any(names is not None for names in self.wanted.values())
        if PICK in stack.exits[-1].scores:
            self.wanted[stack.blocks] = policy.picks(stack.name, stack.exits[-1])
        for exit_ in stack.asking:
            if isinstance(names := self.wanted[exit_.after], str):
                raise PolicyError(f"the policy asks for the scores {names!r}", hint=f"names of scores: ({names!r},)")
            missing = set(self.wanted[exit_.after] or ()) - exit_.scores.keys()
            if missing:
                raise PolicyError(
                    f"the exit of {stack.name!r} after {exit_.after} blocks does not have the scores "
                    f"{', '.join(sorted(missing))}; there are:\n{listing({stack.name: stack})}",
                    hint=f"insert-scores{{measure={min(missing)}}}",
                )

    def leave(self, after: int, rows: NDArray[np.int64], found: Scores) -> Rows:
        """Which of ``rows`` leave; ``found`` has the wanted scores of these rows."""
        scores = {measure: self._score(after, measure, rows.size, array) for measure, array in found.items()}
        leave = self.decide(after, rows, scores)
        self._history[after] = scores
        self.record[after] = {measure: self._whole(rows, score) for measure, score in scores.items()}
        return leave

    def decide(
        self,
        after: int,
        rows: NDArray[np.int64],
        scores: Scores,
        *,
        history: bool = True,
        steps: NDArray[np.int64] | None = None,
    ) -> Rows:
        """What the policy says of ``rows`` with these scores, of which nothing is kept.

        A row may come repeatedly: without ``history`` then, which is of the last token of each, and with ``steps`` if
        those are not of the last one.
        """
        if steps is None and self.steps is not None:
            steps = self.steps[rows]
        known = dict(self._history) if history else {}
        state = State(self._stack.name, after, self._stack.blocks, scores, rows, known, steps)
        leave = self._policy.leave(state)
        if not isinstance(leave, np.ndarray) or leave.dtype != np.bool_ or leave.shape != rows.shape:
            shown = f"{leave.dtype} {list(leave.shape)}" if isinstance(leave, np.ndarray) else repr(leave)
            raise PolicyError(
                f"the policy has to return bool [{rows.size}] after {after} blocks of {state.stack!r}, "
                f"one per row that is still there; it returned {shown}"
            )
        return leave

    def bound(self, after: int) -> Bound | None:
        """What the policy comes to at an exit: see `bound_of`; None where it learns from what each token took."""
        return None if self._costs else bound_of(self._policy, self._stack.name, after)

    def notify(self, after: int, row: int, tokens: int, scores: Scores) -> None:
        """Let the policy know of tokens of a row that left one after the other by its `bound`; scores [tokens]."""
        steps = None if self.steps is None else self.steps[row] + np.arange(tokens)
        self.decide(after, np.full(tokens, row), scores, history=False, steps=steps)
        if self.steps is not None:
            self.steps[row] += tokens

    def records(self) -> dict[str, Record]:
        """The scores by the stack's name."""
        return {self._stack.name: self.record}

    def exits(self, depths: NDArray[np.int64]) -> dict[str, NDArray[np.int64]]:
        """Where rows left that left the stack after ``depths`` blocks, by the stack's name."""
        return {self._stack.name: depths}

    def report(self, depths: Sequence[int] | NDArray[np.int64], milliseconds: float) -> None:
        """Tell the policy what the stack took, if it wants to know."""
        if self._costs:
            took = np.array(depths, np.int64)
            self._policy.observe(Cost(self._stack.name, took, milliseconds, self._stack.blocks))

    def restart(self, steps: NDArray[np.int64]) -> None:
        """Forget all scores: the rows' next tokens enter the stack; ``steps`` by place in the batch."""
        self.steps = steps
        self._history = {}
        self.record = {}

    def keep(self, stay: NDArray[np.int64]) -> None:
        """Forget the rows that left; ``stay`` says which of the last rows did not."""
        self._history = {
            after: {measure: score[stay] for measure, score in scores.items()}
            for after, scores in self._history.items()
        }

    def _score(self, after: int, measure: str, rows: int, array: NDArray[Any]) -> NDArray[Any]:
        if self._stack.role == "decoder" and array.ndim == 2:  # by token: the least sure one, or what follows the text
            known = measure_named(measure)
            if not known.gates:
                array = array[:, -1]
            else:
                array = array.max(1) if known.surer == "less" else array.min(1)
        if array.size != rows:
            raise ExecutionError(
                f"the score {measure!r} after {after} blocks of {self._stack.name!r} has the shape "
                f"{list(array.shape)}, expected [{rows}]"
            )
        kind = np.float32 if array.dtype.kind == "f" else np.int64
        return array.reshape(rows).astype(kind, copy=False)

    def _whole(self, rows: NDArray[np.int64], score: NDArray[Any]) -> NDArray[Any]:
        if rows.size == self._batch:
            return score
        whole = np.full(self._batch, np.nan if score.dtype.kind == "f" else -1, score.dtype)
        whole[rows] = score
        return whole
