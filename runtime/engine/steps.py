"""A manifest made ready to run: segments as functions, and which values live on after each step."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
import onnxruntime as ort

from offramp.bundle.manifest import DTYPES, Cache, Exit, Manifest, Part, Segment, Stack
from offramp.errors import BundleError
from offramp.runtime.engine.memory import Env, Memory
from offramp.runtime.engine.sessions import check_bindings

Names: TypeAlias = frozenset[str]


@dataclass(frozen=True, slots=True)
class Call:
    """A segment: ``run`` reads ``inputs`` from an environment and adds the segment's outputs to it."""

    name: str
    inputs: tuple[str, ...]
    run: Callable[[Env], None]


@dataclass(frozen=True, slots=True)
class ReadyExit:
    """An exit: ``calls`` make ``results`` and the scores that are not ``free`` out of ``reads``.

    ``results`` maps what a stack gives to its surroundings, under the names of full depth, to this exit's
    values: the model's outputs, or the stack's output where other stages follow.
    """

    after: int
    calls: tuple[Call, ...]
    reads: Names
    results: Mapping[str, str]
    scores: Mapping[str, str]
    free: Names
    full: bool


@dataclass(frozen=True, slots=True)
class ReadyPart:
    """Calls, then perhaps an exit; ``live`` are the values that the rest of the stack needs."""

    calls: tuple[Call, ...]
    exit: ReadyExit | None
    live: Names


@dataclass(frozen=True, slots=True)
class ReadyStack:
    """A stack; ``reads`` are the values that it takes from outside."""

    stack: Stack
    parts: tuple[ReadyPart, ...]
    reads: Names


@dataclass(frozen=True, slots=True)
class Step:
    """A stage: a segment or a stack; ``live`` are the values that the later stages and the outputs need."""

    run: Call | ReadyStack
    live: Names


def prepare(manifest: Manifest, sessions: Mapping[str, ort.InferenceSession], memory: Memory) -> tuple[Step, ...]:
    """The manifest's stages, ready to run.

    Raises:
        BundleError: a segment's bindings do not fit its file.
    """
    problems: list[str] = []
    calls: dict[str, Call] = {}
    for name, segment in manifest.segments.items():
        session = sessions[segment.file]
        wrong = check_bindings(
            f"segment {name!r} ({segment.file})",
            session,
            {key: DTYPES[manifest.values[value].dtype] for key, value in segment.inputs.items()},
            {key: DTYPES[manifest.values[value].dtype] for key, value in segment.outputs.items()},
        )
        problems += wrong
        if not wrong:
            run = memory.prepare(segment, session)
            if manifest.cache is not None and manifest.cache.rowwise and _keeps(manifest.cache, segment):
                run = _row_by_row(manifest, segment, run, memory)
            calls[name] = Call(name, tuple(segment.inputs.values()), run)
    if problems:
        raise BundleError("segments do not fit their files:\n  " + "\n  ".join(problems))

    live = frozenset(manifest.outputs.values())
    steps: list[Step] = []
    for stage in reversed(manifest.stages):
        if stage.stack is None:
            segment = manifest.segments[stage.segment or ""]
            steps.append(Step(calls[segment.name], live))
            before = _needed(live, [segment])
        else:
            stack = _stack(manifest, manifest.stacks[stage.stack], calls)
            steps.append(Step(stack, live))
            before = stack.reads | live.difference(*(part.exit.results for part in stack.parts if part.exit))
        live = before
    return tuple(reversed(steps))


def _keeps(cache: Cache, segment: Segment) -> bool:
    return not cache.buffers.keys().isdisjoint(segment.inputs.values())


def _row_by_row(
    manifest: Manifest, segment: Segment, run: Callable[[Env], None], memory: Memory
) -> Callable[[Env], None]:
    """The segment for several rows, one after the other."""
    assert manifest.cache is not None
    lengths = manifest.cache.lengths
    values = {name: manifest.values[name] for name in segment.outputs.values()}

    def call(env: Env) -> None:
        rows = memory.get(env[lengths]).shape[0]
        if rows == 1:
            run(env)
            return
        made = []
        for row in range(rows):
            one = memory.take(env, segment.inputs.values(), np.array([row]))
            run(one)
            made.append(one)
        for name, value in values.items():
            parts = [memory.get(one[name]) for one in made]
            whole = parts[0] if value.batch_axis is None else np.concatenate(parts, value.batch_axis)
            env[name] = memory.put(name, whole)

    return call


def ready_takers(manifest: Manifest, sessions: Mapping[str, ort.InferenceSession]) -> dict[str, ort.InferenceSession]:
    """The sessions of ``Manifest.take``, by its keys; BundleError where a file does not fit."""
    problems: list[str] = []
    for key, file in manifest.take.items():
        kind = DTYPES[key.partition("/")[0]]
        inputs = {"data": kind, "indices": DTYPES["int64"]}
        problems += check_bindings(f"take {key!r} ({file})", sessions[file], inputs, {"taken": kind})
    if problems:
        raise BundleError("files that gather rows do not fit:\n  " + "\n  ".join(problems))
    return {key: sessions[file] for key, file in manifest.take.items()}


def _stack(manifest: Manifest, stack: Stack, calls: Mapping[str, Call]) -> ReadyStack:
    exits = {exit_.after: exit_ for exit_ in stack.exits}
    live: Names = frozenset()
    parts: list[ReadyPart] = []
    for part in reversed(stack.parts):
        needed = live
        ready = None
        if part.depth in exits:
            ready = _exit(manifest, stack, exits[part.depth], calls)
            needed |= ready.reads | {ready.scores[measure] for measure in ready.free}
        parts.append(ReadyPart(tuple(calls[name] for name in part.segments), ready, live))
        live = _needed(needed, _segments(manifest, part))
    return ReadyStack(stack, tuple(reversed(parts)), live)


def _exit(manifest: Manifest, stack: Stack, exit_: Exit, calls: Mapping[str, Call]) -> ReadyExit:
    segments = _segments(manifest, exit_)
    made = {value for segment in segments for value in segment.outputs.values()}
    results = {manifest.outputs[name]: value for name, value in exit_.outputs.items()}
    results = results or {stack.output: exit_.state}
    return ReadyExit(
        exit_.after,
        tuple(calls[name] for name in exit_.segments),
        _needed(frozenset(results.values()), segments),
        results,
        exit_.scores,
        frozenset(measure for measure, value in exit_.scores.items() if value not in made),
        full=exit_.after == stack.blocks,
    )


def _segments(manifest: Manifest, piece: Part | Exit) -> list[Segment]:
    return [manifest.segments[name] for name in piece.segments]


def _needed(after: Names, segments: Iterable[Segment]) -> Names:
    """The values that have to be there before ``segments`` run, for those in ``after`` to be there then."""
    for segment in reversed(list(segments)):
        after = (after - set(segment.outputs.values())) | set(segment.inputs.values())
    return after
