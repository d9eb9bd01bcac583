"""Processes that decode when they are asked: two thread pools in one process would disturb each other.

The lines are JSON both ways: ``{"prompt": [...], "new": 64, "features": null}`` -> the fields of `Answer`.
"""

from __future__ import annotations

import itertools
import json
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True, slots=True)
class Answer:
    """What one prompt took: the first token counts as prefill, the others as decoding.

    ``decode_ms`` is the median of a step, ``mean_ms`` the mean; ``peak_mb`` is the most that was resident in the
    worker so far, MiB.
    """

    tokens: list[int]
    prefill_ms: float
    decode_ms: float
    mean_ms: float
    peak_mb: float


class Worker:
    """A process that has a model loaded and sleeps while it is not asked."""

    def __init__(self, *command: str) -> None:
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self.loaded: dict[str, Any] = self._line()

    def decode(self, prompt: Sequence[int], new: int, features: Path | None = None) -> Answer:
        """``new`` tokens after ``prompt``, greedily; an end token does not end them.

        ``features`` is a .npy file with what Whisper hears, float32 [1, 80, 3000]: encoding it is part of the prefill.
        """
        assert self._process.stdin is not None
        asked = {"prompt": list(map(int, prompt)), "new": new, "features": features and str(features)}
        print(json.dumps(asked), file=self._process.stdin, flush=True)
        return Answer(**self._line())

    def _line(self) -> Any:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise SystemExit(f"a worker ended with {self._process.wait()}; its messages are above")
        return json.loads(line)

    def __enter__(self) -> Worker:
        return self

    def __exit__(self, *_: object) -> None:
        self._process.communicate()


def serve(about: dict[str, Any], decode: Callable[[list[int], int, str | None], tuple[list[int], list[float]]]) -> None:
    """Answer what a `Worker` asks; ``decode`` returns the tokens, and the seconds at the start and after each token."""
    print(json.dumps(about | {"peak_mb": peak()}), flush=True)
    for line in sys.stdin:
        asked = json.loads(line)
        tokens, times = decode(asked["prompt"], asked["new"], asked["features"])
        steps = sorted((after - before) * 1e3 for before, after in itertools.pairwise(times[1:])) or [0.0]
        first = (times[1] - times[0]) * 1e3
        answer = Answer(tokens, first, steps[len(steps) // 2], sum(steps) / len(steps), peak())
        print(json.dumps(asdict(answer)), flush=True)


def peak() -> float:
    """Peak resident memory of this process, MiB."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1]) / 1024
