"""A bundle for runs whose rows may leave, and one for full depth, which runs `Stack.whole` in place of the parts."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace

from offramp.bundle.manifest import Exit, Manifest, Part, Segment, Stack, Stage
from offramp.bundle.measures import SCREENED


def divided(manifest: Manifest) -> Manifest:
    """The bundle by its parts, which is all there is to it where no stack has a ``whole``."""
    if all(stack.whole is None for stack in manifest.stacks.values()):
        return manifest
    wholes = {name for stack in manifest.stacks.values() if stack.whole for name in _segments([stack.whole])}
    return replace(
        manifest,
        stacks={name: replace(stack, whole=None) for name, stack in manifest.stacks.items()},
        segments={name: segment for name, segment in manifest.segments.items() if name not in wholes},
    )


def exported(manifest: Manifest) -> Manifest:
    """The bundle as its program was exported: without what is made of other files, `Stack.whole` and `Part.steps`."""
    found = divided(manifest)
    steps = {part.steps for stack in found.stacks.values() for part in stack.parts}
    stacks = {
        name: replace(stack, parts=tuple(replace(part, steps=None) for part in stack.parts))
        for name, stack in found.stacks.items()
    }
    segments = {name: segment for name, segment in found.segments.items() if name not in steps}
    return replace(found, stacks=stacks, segments=segments)


def undivided(manifest: Manifest) -> Manifest:
    """The bundle at full depth: a stack that has a ``whole`` runs it in place of its parts, and has no other exits.

    Neither does run what the whole makes itself: what comes before the parts, and the last exit's segments.
    """
    if all(stack.whole is None for stack in manifest.stacks.values()):
        return manifest
    known = manifest.segments
    stacks = {name: _at_once(stack, known) for name, stack in manifest.stacks.items()}
    read = set(manifest.outputs.values())
    stages: list[Stage] = []
    for stage in reversed(manifest.stages):
        names = [stage.segment] if stage.segment else [*segments(stacks[stage.stack or ""])]
        made = {value for name in names for value in known[name].outputs.values()}
        if stage.stack or not read.isdisjoint(made):
            stages.insert(0, stage)
            read = (read - made) | {value for name in names for value in known[name].inputs.values()}
    used = {stage.segment for stage in stages} | {name for stack in stacks.values() for name in segments(stack)}
    kept = {name: segment for name, segment in known.items() if name in used}
    return replace(manifest, stages=tuple(stages), stacks=stacks, segments=kept)


def segments(stack: Stack) -> Iterator[str]:
    """The names of all segments of a stack."""
    yield from _segments(stack.runs)
    for exit_ in stack.exits:
        yield from exit_.segments


def _segments(parts: Iterable[Part]) -> Iterator[str]:
    for part in parts:
        yield from part.segments
        yield from [part.steps] if part.steps else ()


def last_exit(stack: Stack) -> Exit:
    """Full depth where nobody is asked about it: of its scores that is the token that is exact."""
    last = stack.exits[-1]
    return replace(last, scores={name: value for name, value in last.scores.items() if name == SCREENED})


def _at_once(stack: Stack, known: Mapping[str, Segment]) -> Stack:
    if stack.whole is None:
        return stack
    (name,), last = stack.whole.segments, last_exit(stack)
    whole = known[name]
    wanted = {last.state, *last.outputs.values(), *last.scores.values()} - {*whole.outputs.values()}
    if all(wanted.isdisjoint(known[name].outputs.values()) for name in last.segments):
        last = replace(last, segments=())
    given = (*whole.inputs.values(), None)
    asked = stack.asked if stack.asked in given else None
    enters = stack.input if stack.input in given else given[0] or stack.input
    return replace(stack, whole=None, input=enters, parts=(stack.whole,), exits=(last,), asked=asked)
