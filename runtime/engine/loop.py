"""The hot loop: through a stack's spans, with fewer rows after each exit that some of them take."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from time import perf_counter
from typing import NamedTuple

import numpy as np

from offramp.bundle.manifest import Value
from offramp.bundle.schedule import Branch, Span
from offramp.errors import ExecutionError
from offramp.runtime.engine.binding import Call
from offramp.runtime.engine.memory import Env, Index, Memory, every, places
from offramp.runtime.engine.sessions import failed
from offramp.runtime.engine.widths import Widths
from offramp.runtime.policies.base import Rows
from offramp.runtime.policies.group_policy import GroupPolicy, StackLike
from offramp.runtime.result import Timing


class Departure(NamedTuple):
    """Rows that left a stack together, and what they left with, under the names of full depth."""

    after: int
    rows: Index
    values: Env


class Asked(NamedTuple):
    """The value that says which tokens are scored, of so many."""

    value: str
    tokens: int


class Loop:
    """Runs stages on rows of a batch; ``trace`` takes a line for every segment, ``widths`` what tokens took there."""

    def __init__(self, calls: Mapping[str, Call], memory: Memory, trace: list[Timing], widths: Widths) -> None:
        self._calls, self._memory, self._trace, self._widths = calls, memory, trace, widths

    def stack(
        self, spans: Sequence[Span], env: Env, rows: Index, policy: StackLike, asked: Asked | None = None
    ) -> list[Departure]:
        """Run a stack on ``rows`` until all have left. ``env`` has what the stack reads, and is changed."""
        left: list[Departure] = []
        for span in spans:
            if isinstance(policy, GroupPolicy) and self._reads(span, policy.value):
                env[policy.value] = self._memory.put(policy.value, policy.places())
            if asked is not None:
                scored = every(rows.size, asked.tokens if _scored(span.branch, policy) else 0)
                env[asked.value] = self._memory.put(asked.value, scored)
            self.segments(span.segments, env, rows, span.dead)
            branch = span.branch
            assert branch is not None  # only a stage of one segment has none
            leave, ran = self._ask(branch, env, rows, policy)
            if leave is None or not leave.any():
                continue
            go, stay = np.flatnonzero(leave), np.flatnonzero(~leave)
            wanted = branch.results.values() if ran else branch.reads
            found = self._memory.take(env, wanted, go if stay.size else None)
            if not ran:
                self.segments(branch.segments, found, rows[go])
            left.append(Departure(branch.after, rows[go], {full: found[here] for full, here in branch.results.items()}))
            if not stay.size:
                break
            rows = rows[stay]
            policy.keep(stay)
            env = self._memory.take(env, span.live, stay)
        return left

    def _reads(self, span: Span, value: str) -> bool:
        return any(value in self._calls[name].inputs for name in span.segments)

    def _ask(self, branch: Branch, env: Env, rows: Index, policy: StackLike) -> tuple[Rows | None, bool]:
        """Which rows leave (None: no one was asked), and whether the exit's segments ran for that, on all rows."""
        if branch.full:
            return np.ones(rows.size, np.bool_), False
        wanted = policy.wanted[branch.after]
        if wanted is None:
            return None, False
        ran = not branch.free.issuperset(wanted)
        if ran:
            self.segments(branch.segments, env, rows)
        found = {measure: self._memory.get(env[branch.scores[measure]]) for measure in wanted}
        return policy.leave(branch.after, rows, found), ran

    def segments(self, names: Sequence[str], env: Env, rows: Index, dead: Sequence[frozenset[str]] = ()) -> None:
        """Run segments one after the other; what is ``dead`` behind each is let go.

        Raises:
            ExecutionError: one failed; the message names it.
        """
        for at, name in enumerate(names):
            call = self._calls[name]
            start = perf_counter()
            try:
                call.run(env)
            except Exception as error:
                shapes = ", ".join(f"{value} {_shape(env.get(value))}" for value in call.inputs)
                raise failed(name, shapes, error) from error
            self._trace.append(Timing(name, (perf_counter() - start) * 1e3, rows.size))
            self._widths.take(name, rows, env, self._memory)
            for value in dead[at] if dead else ():
                env.pop(value, None)


def _scored(branch: Branch | None, policy: StackLike) -> bool:
    """Whether an exit is asked for scores that its blocks make."""
    wanted = None if branch is None or branch.full else policy.wanted[branch.after]
    return branch is not None and wanted is not None and not branch.free.isdisjoint(wanted)


def joined(
    left: Sequence[Departure], values: Mapping[str, Value], axis: str | None, length: int, memory: Memory
) -> Env:
    """What all items of an axis (rows, as a rule) left with, in its order; no copy where all left together."""
    if len(left) == 1:
        return left[0].values
    whole: Env = {}
    for name, last in left[-1].values.items():
        place = values[name].place(axis)
        if place is None:
            whole[name] = last
            continue
        at, factor = place
        pieces = [memory.get(group.values[name]) for group in left]
        shapes = [piece.shape[:at] + piece.shape[at + 1 :] for piece in pieces]
        if len(set(shapes)) > 1:
            raise ExecutionError(f"{name!r} has different shapes at different exits: {shapes}")
        shape = (*pieces[0].shape[:at], length * factor, *pieces[0].shape[at + 1 :])
        array = np.empty(shape, pieces[0].dtype)
        for group, piece in zip(left, pieces, strict=True):
            array[(slice(None),) * at + (places(group.rows, factor),)] = piece
        whole[name] = memory.put(name, array)
    return whole


def depths(left: Sequence[Departure], batch: int) -> Index:
    """After how many blocks each row left: int64 [batch]."""
    found = np.empty(batch, np.int64)
    for group in left:
        found[group.rows] = group.after
    return found


def _shape(tensor: object) -> list[int] | str:
    """The shape of a value, for a message; of one that is not there, that it is missing."""
    if tensor is None:
        return "missing"
    shape = getattr(tensor, "shape", ())
    return list(shape() if callable(shape) else shape)
