"""The spans that run for each chunk of tokens, with their segments ready to run on some rows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from offramp.bundle.manifest import Manifest
from offramp.bundle.schedule import Branch, Names, Schedule
from offramp.errors import InputError
from offramp.runtime.generation.buffers import ChunkSegment, chunk_segment


@dataclass(frozen=True, slots=True)
class ChunkSpan:
    """Segments that run without a place to leave between, then perhaps an exit.

    ``reads`` are the values of the chunk that this span or a later one needs from before, ``state`` the one that this
    span of a stack makes of them, ``leaves`` those that are read behind it: by the next span, and by its exit.
    ``asked`` is the value that says which tokens its exit scores, where those may be some; ``end`` is where the spans
    of its stack end. ``steps`` runs them for several tokens of one row that leave at the exit, if there is that.
    """

    stack: str | None
    calls: tuple[ChunkSegment, ...]
    reads: Names
    state: str | None
    leaves: Names
    branch: Branch | None
    branch_calls: tuple[ChunkSegment, ...]
    asked: str | None
    end: int
    steps: ChunkSegment | None


def chunk_spans(manifest: Manifest, sessions: Mapping[str, Any], kept: Names) -> tuple[ChunkSpan, ...]:
    """The spans of the stages that run for each chunk; ``kept`` are the values that stay as they are meanwhile."""
    cache = manifest.cache
    assert cache is not None
    ready = {
        name: chunk_segment(manifest, segment, sessions[segment.file], kept)
        for name, segment in manifest.segments.items()
    }
    apart = kept | cache.buffers.keys() | {cache.lengths}
    spans: list[ChunkSpan] = []
    for step in Schedule.of(manifest, ("chunk",), (cache.logits,)).steps:
        end = len(spans) + len(step.spans)
        steps = {part.depth: part.steps for part in step.stack.parts if part.steps} if step.stack else {}
        for span in step.spans:
            branch, passing = span.branch, step.passing
            leaves = span.live | passing
            if branch is not None:
                leaves |= branch.reads | set(branch.results.values()) | {branch.scores[name] for name in branch.free}
            spans.append(
                ChunkSpan(
                    step.stack.name if step.stack else None,
                    tuple(ready[name] for name in span.segments),
                    (span.reads | passing) - apart,
                    span.state,
                    leaves - apart,
                    branch,
                    tuple(ready[name] for name in branch.segments) if branch else (),
                    step.stack.asked if step.stack else None,
                    end,
                    ready[steps[branch.after]] if branch is not None and branch.after in steps else None,
                )
            )
    return tuple(spans)


def check_layout(manifest: Manifest, spans: Sequence[ChunkSpan]) -> None:
    """Values of chunks have rows, then tokens, on their first two axes; InputError where one has not.

    Those are all in which tokens wait or leave, and of a batch's chunks all of segments that may run row by row.
    """
    batch = manifest.batch
    for span in spans:
        for name in sorted(span.reads | _laid_apart(manifest, span)):
            value = manifest.values[name]
            rows = value.place(batch) if batch else (0, value.shape[0])  # of one, without a batch axis
            if (rows, _tokens(manifest, name)) != ((0, 1), (1, 1)):
                raise InputError(
                    f"{name!r} of shape {list(value.shape)} does not have rows and tokens on its first two axes, which "
                    "generation needs",
                    hint="run() works; for generation, a model with hidden states [batch, tokens, features]",
                )


def _laid_apart(manifest: Manifest, span: ChunkSpan) -> set[str]:
    """What else of a span has tokens: values that its exit reads, and those of segments that belong to slots."""
    found = set(span.branch.reads & span.leaves) if span.branch else set()
    if manifest.batch:
        calls = (call for call in (*span.calls, *span.branch_calls) if call.by_slot)
        found |= {name for call in calls for _, name in (*call.chunk, *call.made)}
    return {name for name in found if _tokens(manifest, name) is not None}


def _tokens(manifest: Manifest, name: str) -> tuple[int, int] | None:
    assert manifest.cache is not None
    return manifest.values[name].place(manifest.cache.chunk)
