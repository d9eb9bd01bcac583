"""The work of a bundle in order, derived from its manifest: what runs between two places to leave, what is kept.

The loop, the decoder and the cost model all follow this one. It knows names alone, neither files nor tensors.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeAlias

from offramp.bundle.manifest import NEXT, Exit, Manifest, Segment, Stack, Stage, in_steps
from offramp.bundle.measures import PICK, SCREENED

Names: TypeAlias = frozenset[str]


@dataclass(frozen=True, slots=True)
class Branch:
    """An exit: ``segments`` make ``results`` and the scores that are not ``free`` out of ``reads``.

    ``results`` maps what a stack gives to its surroundings, under the names of full depth, to this exit's values: the
    model's outputs where it ``ends`` there, or the stack's output where other stages follow. ``pick`` is the value that
    holds a row's next token where the exit has one without running anything, ``exact`` whether all classes were asked.
    """

    after: int
    segments: tuple[str, ...]
    reads: Names
    results: Mapping[str, str]
    scores: Mapping[str, str]
    free: Names
    full: bool
    ends: bool
    pick: str | None
    exact: bool

    @property
    def next(self) -> str:
        """The value of each next token, where one run makes several (`Part.steps`)."""
        return in_steps(self.pick) if self.pick and (self.exact or not self.full) else NEXT


@dataclass(frozen=True, slots=True)
class Span:
    """Segments that run without a place to leave between, then perhaps an exit.

    ``reads`` are the values that this span or a later one of its stage needs from before, ``live`` those that the later
    ones need from behind it, ``state`` the hidden state that it makes. ``dead`` has the values, for each segment, that
    nothing reads any more once it has run.
    """

    segments: tuple[str, ...]
    dead: tuple[Names, ...]
    reads: Names
    live: Names
    state: str | None = None
    branch: Branch | None = None


@dataclass(frozen=True, slots=True)
class Step:
    """A stage: ``spans`` of a stack, or the one of a segment.

    ``reads`` are the values that it takes, ``makes`` those that it gives, ``live`` those that are needed behind it, of
    which it leaves ``passing`` as they are.
    """

    stage: Stage
    stack: Stack | None
    spans: tuple[Span, ...]
    reads: Names
    makes: Names
    live: Names

    @property
    def passing(self) -> Names:
        """What is needed behind it and was made before it."""
        return self.live - self.makes

    @property
    def segments(self) -> tuple[str, ...]:
        """All segments that may run in it, those of exits behind those of blocks."""
        blocks = tuple(name for span in self.spans for name in span.segments)
        return blocks + tuple(name for span in self.spans if span.branch for name in span.branch.segments)


@dataclass(frozen=True, slots=True)
class Schedule:
    """A bundle's steps, in an order in which they can run."""

    steps: tuple[Step, ...]

    @classmethod
    def of(cls, manifest: Manifest, when: Collection[str] | None = None, outputs: Collection[str] = ()) -> Schedule:
        """The steps of the stages that run ``when`` (None: all), for the sake of these outputs (empty: all)."""
        stages = [stage for stage in manifest.stages if when is None or stage.when in when]
        wanted = {name: value for name, value in manifest.outputs.items() if not outputs or name in outputs}
        live = frozenset(wanted.values())
        steps: list[Step] = []
        for stage in reversed(stages):
            step = _step(manifest, stage, live, wanted)
            steps.append(step)
            live = step.reads | step.passing
        return cls(tuple(reversed(steps)))

    def of_stack(self, name: str) -> Step:
        """The step that runs this stack."""
        return next(step for step in self.steps if step.stack is not None and step.stack.name == name)

    def after(self, step: Step) -> tuple[Step, ...]:
        """The steps of which it reads what they make."""
        return tuple(other for other in self.steps if not step.reads.isdisjoint(other.makes))


def _step(manifest: Manifest, stage: Stage, live: Names, outputs: Mapping[str, str]) -> Step:
    if stage.stack is None:
        segment = manifest.segments[stage.segment or ""]
        reads = needed(live, [segment])
        own = frozenset(segment.inputs.values())
        span = Span((segment.name,), (reads - live,), reads, live)
        return Step(stage, None, (span,), own, frozenset(segment.outputs.values()), live)
    stack = manifest.stacks[stage.stack]
    spans = _spans(manifest, stack, outputs)
    makes = frozenset(name for span in spans if span.branch for name in span.branch.results)
    return Step(stage, stack, spans, spans[0].reads, makes, live)


def _spans(manifest: Manifest, stack: Stack, outputs: Mapping[str, str]) -> tuple[Span, ...]:
    """A stack's parts, cut at its exits alone."""
    exits = {exit_.after: exit_ for exit_ in stack.exits}
    groups: list[tuple[list[str], str, Exit]] = []
    names: list[str] = []
    for part in stack.parts:
        names.extend(part.segments)
        if part.depth in exits:
            groups.append((names, part.output, exits[part.depth]))
            names = []
    spans: list[Span] = []
    live: Names = frozenset()
    for names, state, exit_ in reversed(groups):
        branch = _branch(manifest, stack, exit_, outputs)
        behind = live | branch.reads | {branch.scores[measure] for measure in branch.free}
        segments, dead = [manifest.segments[name] for name in names], []
        for segment in reversed(segments):
            before = needed(behind, [segment]) - {stack.places, stack.asked}
            dead.append((before | set(segment.outputs.values())) - behind)
            behind = before
        spans.append(Span(tuple(names), tuple(reversed(dead)), behind, live, state, branch))
        live = behind
    return tuple(reversed(spans))


def _branch(manifest: Manifest, stack: Stack, exit_: Exit, outputs: Mapping[str, str]) -> Branch:
    results = {full: exit_.outputs[name] for name, full in outputs.items() if name in exit_.outputs}
    ends = bool(results)
    results = results or {stack.output: exit_.state}
    wanted = {*results.values(), *exit_.scores.values()}
    segments = _making([manifest.segments[name] for name in exit_.segments], wanted)
    made = {value for segment in segments for value in segment.outputs.values()}
    free = frozenset(measure for measure, value in exit_.scores.items() if value not in made)
    pick = next((measure for measure in (SCREENED, PICK) if measure in free and ends), None)
    return Branch(
        exit_.after,
        tuple(segment.name for segment in segments),
        needed(frozenset(results.values()), segments),
        results,
        exit_.scores,
        free,
        full=exit_.after == stack.blocks,
        ends=ends,
        pick=exit_.scores[pick] if pick else None,
        exact=pick == SCREENED,
    )


def _making(segments: Sequence[Segment], wanted: set[str]) -> list[Segment]:
    """Those that make ``wanted`` values, and what these need."""
    found: list[Segment] = []
    for segment in reversed(segments):
        if not wanted.isdisjoint(segment.outputs.values()):
            found.insert(0, segment)
            wanted = wanted | set(segment.inputs.values())
    return found


def needed(after: Names, segments: Iterable[Segment]) -> Names:
    """The values that have to be there before ``segments`` run, for those in ``after`` to be there then."""
    for segment in reversed(list(segments)):
        after = (after - set(segment.outputs.values())) | set(segment.inputs.values())
    return after
