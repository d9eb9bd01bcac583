"""Segments as functions of an environment, bound to their sessions once."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
import onnxruntime as ort

from offramp.bundle.manifest import DTYPES, Cache, Manifest, Segment
from offramp.errors import BundleError
from offramp.runtime.engine.memory import Env, Memory
from offramp.runtime.engine.sessions import check_bindings


@dataclass(frozen=True, slots=True)
class Call:
    """A segment: ``run`` reads ``inputs`` from an environment and adds the segment's outputs to it."""

    name: str
    inputs: tuple[str, ...]
    run: Callable[[Env], None]


def bind(manifest: Manifest, sessions: Mapping[str, ort.InferenceSession], memory: Memory) -> dict[str, Call]:
    """The manifest's segments by name, ready to run.

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
    return calls


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
            place = value.place(manifest.batch)
            whole = parts[0] if place is None else np.concatenate(parts, place[0])
            env[name] = memory.put(name, whole)

    return call


def bind_takers(manifest: Manifest, sessions: Mapping[str, ort.InferenceSession]) -> dict[str, ort.InferenceSession]:
    """The sessions of ``Manifest.take``, by its keys; BundleError where a file does not fit."""
    problems: list[str] = []
    for key, file in manifest.take.items():
        kind = DTYPES[key.partition("/")[0]]
        inputs = {"data": kind, "indices": DTYPES["int64"]}
        problems += check_bindings(f"take {key!r} ({file})", sessions[file], inputs, {"taken": kind})
    if problems:
        raise BundleError("files that gather rows do not fit:\n  " + "\n  ".join(problems))
    return {key: sessions[file] for key, file in manifest.take.items()}
