"""What a report says in a sentence, of the ways to run that were measured."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from offramp.bundle.manifest import Stack

KEEP = 0.99  # of the quality, for a setting to count as one that keeps it
_WORTH = 0.05  # of the time; less is not worth an exit
_LITTLE = 0.10  # of the time; where even the oracle saves less, gates are not what is missing


@dataclass(frozen=True)
class Point:
    """One way to run: its quality, and milliseconds a step, wall-clock, beside those of full depth in turns with it.

    ``exits`` has the share of steps that left after so many blocks; ``width`` is the budget of a `Width`, which saves
    what a gate of exits does not bound.
    """

    policy: str
    quality: float
    milliseconds: float
    speedup: float
    exits: Mapping[int, float]
    width: float | None = None


def verdict(
    full: Point | None, frontier: Sequence[Point], oracle: Point | None, depths: Mapping[int, float], stack: Stack
) -> str:
    """Whether exits pay, or widths beside them: "yes: ...", "no: ...", "not with these gates: ...", "cannot say"."""
    if full is None or oracle is None:
        depth, most = max(depths.items(), key=lambda item: item[1])
        return (
            f"cannot say without examples: leaving after {depth} of {stack.blocks} blocks saves {most:.0%} of the time"
        )
    bound = 1 - 1 / oracle.speedup
    if bound < _LITTLE:
        best, saved = _best(full, [point for point in frontier if point.width is not None])
        if saved >= _WORTH:
            return f"{_yes(full, best)}; of exits a perfect gate would save {max(bound, 0):.0%}"
        return f"no: a perfect gate would save {max(bound, 0):.0%}; train the exits, or leave them out"
    best, saved = _best(full, frontier)
    if saved < _WORTH:
        return (
            f"not with these gates: a perfect gate would save {bound:.0%}, but no setting that keeps {KEEP:.0%} of "
            f"the quality saves {_WORTH:.0%}; train the exits, or gates"
        )
    return f"{_yes(full, best)}; a perfect gate would save {bound:.0%}"


def verdict_of_widths(full: Point | None, frontier: Sequence[Point], widths: Mapping[float, float]) -> str:
    """Whether widths pay, in a sentence: "yes: ...", "no: ...", or that nobody can say."""
    if not widths:
        return "no: learners that run dense are all computed, so no width saves time; save them grouped"
    if full is None:
        budget, most = max(widths.items(), key=lambda item: item[1])
        return f"cannot say without examples: width {budget:g} saves {most:.0%} of the time"
    best, saved = _best(full, frontier)
    if saved >= _WORTH:
        return _yes(full, best)
    budget, most = max(widths.items(), key=lambda item: item[1])
    return (
        f"no: no width that keeps {KEEP:.0%} of the quality saves {_WORTH:.0%} of the time; the fastest, "
        f"width {budget:g}, saves {most:.0%}; train learners and gates, or leave them out"
    )


def _best(full: Point, frontier: Sequence[Point]) -> tuple[Point, float]:
    """The fastest that keeps the quality, and the share of the time that it saves."""
    keeping = [point for point in frontier if point.quality >= KEEP * full.quality]
    best = max(keeping, key=lambda point: point.speedup, default=full)
    return best, 1 - 1 / best.speedup


def _yes(full: Point, best: Point) -> str:
    return (
        f"yes: {best.policy} saves {1 - 1 / best.speedup:.0%} of the time ({best.speedup:.2f}x) at "
        f"{best.quality / full.quality:.1%} of the quality"
    )
