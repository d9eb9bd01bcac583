"""What a comparison with a peer is made of: bundles, turns, a row."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import offramp
from benchmarks._common import BUILD, Row, say, shown
from benchmarks._workers import python

T = TypeVar("T")


def row(
    task: str, precision: str, peer: str, unit: str, times: tuple[Sequence[float], Sequence[float]], quality: str
) -> Row:
    """A comparison, from the milliseconds of bundle and peer for each item; for tokens/s those of a token.

    Means, not medians: where some rows leave early, what counts is what all of them take.
    """
    ours, theirs = (statistics.mean(found) for found in times)
    figures = [1e3 / ms for ms in (ours, theirs)] if unit == "tokens/s" else [ours, theirs]
    return shown(
        {
            "task": task,
            "weights": precision,
            "peer": peer,
            "unit": unit,
            "bundle": figures[0],
            "its": figures[1],
            "times as fast": round(theirs / ours, 3),
            "quality, bundle / peer": quality,
        }
    )


class Took(NamedTuple):
    """The tokens of a run in this process, and its milliseconds."""

    tokens: list[int]
    total_ms: float


def turns(count: int, *runs: Callable[[], T], pause: float = 0.0) -> list[list[T]]:
    """The answers of each, which take turns after one that warms up.

    ``pause`` seconds before each let the threads of another process stop spinning.
    """
    answers: list[list[T]] = []
    for _ in range(count + 1):
        answers.append([])
        for run in runs:
            time.sleep(pause)
            answers[-1].append(run())
    return [list(found) for found in zip(*answers[1:], strict=True)]


def saved(name: str, precision: str, make: Callable[[], offramp.Program], **options: Any) -> Path:
    """A bundle, exported once. How far its outputs are from fp32 is not bounded: quality is in the table."""
    path = BUILD / f"peers-{name}-{precision}.offramp"
    if not (path / "manifest.json").is_file():
        say(f"exporting {path}")
        offramp.save(make(), path, precision=precision, loss=math.inf, **options)
    return path


def installed(package: str) -> bool:
    """Whether the peers' Python has it; says so where it has not."""
    found = python(package) is not None
    if not found:
        say(f"{package} is not installed: its rows are left out")
    return found
