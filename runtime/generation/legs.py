"""The stages that run for each chunk, cut at the exits."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from offramp.bundle.manifest import PICK, Exit, Manifest, Stack
from offramp.errors import InputError
from offramp.runtime.generation.buffers import Launch, launch
from offramp.runtime.generation.cache_memory import axis_of


@dataclass(frozen=True, slots=True)
class Door:
    """An exit: what it runs on the last token for its logits and scores, and what it stands for.

    ``pick`` is the value that holds a row's next token where the exit has one without running anything.
    """

    after: int
    calls: tuple[Launch, ...]
    reads: frozenset[str]
    scores: Mapping[str, str]
    free: frozenset[str]
    results: Mapping[str, str]
    full: bool
    ends: bool
    pick: str | None


@dataclass(frozen=True, slots=True)
class Leg:
    """Segments that run without a place to leave between.

    ``reads`` are the values of the chunk that this leg or a later one needs from before, ``hidden`` the one that
    this leg of a stack makes of them, ``leaves`` those that are read behind it: by the next leg, and by its exit.
    """

    stack: str | None
    calls: tuple[Launch, ...]
    reads: frozenset[str]
    hidden: str | None
    leaves: frozenset[str]
    door: Door | None = None


def legs_of(manifest: Manifest, sessions: Mapping[str, Any], kept: frozenset[str]) -> tuple[Leg, ...]:
    """The stages that run for each chunk, as legs."""
    ready = {
        name: launch(manifest, segment, sessions[segment.file], kept) for name, segment in manifest.segments.items()
    }
    parts: list[tuple[str | None, tuple[Launch, ...], str | None, Door | None]] = []
    chunked = [stage for stage in manifest.stages if stage.when == "chunk"]
    for stage in chunked:
        if stage.segment is not None:
            parts.append((None, (ready[stage.segment],), None, None))
            continue
        stack = manifest.stacks[stage.stack or ""]
        exits = {exit_.after: exit_ for exit_ in stack.exits}
        calls: tuple[Launch, ...] = ()
        for part in stack.parts:
            calls += tuple(ready[name] for name in part.segments)
            if part.depth in exits:
                ends = stage is chunked[-1]
                made = _door(manifest, stack, exits[part.depth], ready, ends=ends)
                parts.append((stack.name, calls, part.output, made))
                calls = ()
    legs: list[Leg] = []
    later: frozenset[str] = frozenset()
    for stack_name, calls, hidden, door in reversed(parts):
        leaves = later
        if door is not None:
            if door.full and not door.ends:
                later = frozenset(door.results.values()) | (later - set(door.results))
            later |= door.reads | {door.scores[measure] for measure in door.free}
            leaves |= later | frozenset(door.results.values())
        for call in reversed(calls):
            later = (later - {name for _, name in call.made}) | {name for _, name in call.chunk}
        legs.append(Leg(stack_name, calls, later, hidden, leaves, door))
    return tuple(reversed(legs))


def _door(manifest: Manifest, stack: Stack, exit_: Exit, ready: Mapping[str, Launch], *, ends: bool) -> Door:
    assert manifest.cache is not None
    logits = manifest.cache.logits
    results = {logits: exit_.outputs[logits]} if ends else {stack.output: exit_.state}
    calls = _needed([ready[name] for name in exit_.segments], {*results.values(), *exit_.scores.values()})
    made = {name for call in calls for _, name in call.made}
    reads = {name for call in calls for _, name in call.chunk} | {v for v in results.values() if v not in made}
    free = frozenset(measure for measure, value in exit_.scores.items() if value not in made)
    pick = exit_.scores[PICK] if PICK in free and ends else None
    full = exit_.after == stack.blocks
    return Door(exit_.after, calls, frozenset(reads - made), exit_.scores, free, results, full, ends, pick)


def _needed(calls: Sequence[Launch], wanted: set[str]) -> tuple[Launch, ...]:
    """Those of an exit's calls that make ``wanted``: what else a model returns, generation does not read."""
    found: list[Launch] = []
    for call in reversed(calls):
        if wanted.intersection(name for _, name in call.made):
            found.insert(0, call)
            wanted = wanted | {name for _, name in call.chunk}
    return tuple(found)


def check_layout(manifest: Manifest, legs: Sequence[Leg]) -> None:
    """Values of chunks have rows, then tokens, on their first two axes; InputError where one has not."""
    assert manifest.cache is not None
    for leg in legs:
        for name in leg.reads:
            value = manifest.values[name]
            along = axis_of(value, manifest.cache.chunk)
            if (value.batch_axis, value.batch_factor) != (0, 1) or along != 1:
                raise InputError(
                    f"{name!r} of shape {list(value.shape)} does not have rows and tokens on its first two axes, which "
                    "generation needs",
                    hint="run() works; for generation, a model with hidden states [batch, tokens, features]",
                )
