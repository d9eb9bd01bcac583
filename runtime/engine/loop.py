"""The hot loop: through a stack's parts, with fewer rows after each exit that some of them take."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from time import perf_counter
from typing import NamedTuple

import numpy as np

from offramp.bundle.manifest import Value
from offramp.errors import ExecutionError
from offramp.runtime.engine.memory import Env, Index, Memory, places
from offramp.runtime.engine.steps import Call, ReadyExit, ReadyStack
from offramp.runtime.policies.base import Asker, Rows
from offramp.runtime.result import Timing


class Left(NamedTuple):
    """Rows that left a stack together, and what they left with, under the names of full depth."""

    after: int
    rows: Index
    values: Env


def walk(stack: ReadyStack, env: Env, rows: Index, asker: Asker, memory: Memory, trace: list[Timing]) -> list[Left]:
    """Run a stack on ``rows`` until all have left. ``env`` has what the stack reads, and is changed."""
    left: list[Left] = []
    for part in stack.parts:
        execute(part.calls, env, rows.size, trace)
        stay: Index | None = None
        if part.exit is not None and part.exit.full:
            execute(part.exit.calls, env, rows.size, trace)
            left.append(Left(part.exit.after, rows, {full: env[here] for full, here in part.exit.results.items()}))
            break
        if part.exit is not None:
            leave, ran = _ask(part.exit, env, rows, asker, memory, trace)
            if leave is not None and leave.any():
                go, stay = np.flatnonzero(leave), np.flatnonzero(~leave)
                wanted = part.exit.results.values() if ran else part.exit.reads
                found = memory.take(env, wanted, go if stay.size else None)
                if not ran:
                    execute(part.exit.calls, found, go.size, trace)
                values = {full: found[here] for full, here in part.exit.results.items()}
                left.append(Left(part.exit.after, rows[go], values))
                if not stay.size:
                    break
                rows = rows[stay]
                asker.keep(stay)
        env = memory.take(env, part.live, stay)
    return left


def _ask(
    exit_: ReadyExit, env: Env, rows: Index, asker: Asker, memory: Memory, trace: list[Timing]
) -> tuple[Rows | None, bool]:
    """Which rows leave (None: no one was asked), and whether the exit's calls ran for that, on all rows."""
    wanted = asker.wanted[exit_.after]
    if wanted is None:
        return None, False
    ran = not exit_.free.issuperset(wanted)
    if ran:
        execute(exit_.calls, env, rows.size, trace)
    found = {measure: memory.get(env[exit_.scores[measure]]) for measure in wanted}
    return asker.ask(exit_.after, rows, found), ran


def execute(calls: Sequence[Call], env: Env, rows: int, trace: list[Timing]) -> None:
    """Run segments one after the other on ``rows`` rows; ExecutionError names the one that failed."""
    for call in calls:
        start = perf_counter()
        try:
            call.run(env)
        except Exception as error:
            shapes = ", ".join(f"{name} {_shape(env[name])}" for name in call.inputs)
            raise ExecutionError(f"segment {call.name!r} failed with {shapes}: {error}") from error
        trace.append(Timing(call.name, (perf_counter() - start) * 1e3, rows))


def join(left: list[Left], values: Mapping[str, Value], batch: int, memory: Memory) -> Env:
    """What the rows of a whole batch left with, in the batch's order; no copy where all left together."""
    if len(left) == 1:
        return left[0].values
    whole: Env = {}
    for name, last in left[-1].values.items():
        axis = values[name].batch_axis
        if axis is None:
            whole[name] = last
            continue
        pieces = [memory.get(group.values[name]) for group in left]
        shapes = [piece.shape[:axis] + piece.shape[axis + 1 :] for piece in pieces]
        if len(set(shapes)) > 1:
            raise ExecutionError(f"{name!r} has different shapes at different exits: {shapes}")
        shape = (*pieces[0].shape[:axis], batch * values[name].batch_factor, *pieces[0].shape[axis + 1 :])
        array = np.empty(shape, pieces[0].dtype)
        for group, piece in zip(left, pieces, strict=True):
            array[(slice(None),) * axis + (places(values[name], group.rows),)] = piece
        whole[name] = memory.put(name, array)
    return whole


def depths(left: list[Left], batch: int) -> Index:
    """After how many blocks each row left: int64 [batch]."""
    found = np.empty(batch, np.int64)
    for group in left:
        found[group.rows] = group.after
    return found


def _shape(tensor: object) -> list[int]:
    shape = getattr(tensor, "shape", ())
    return list(shape() if callable(shape) else shape)
