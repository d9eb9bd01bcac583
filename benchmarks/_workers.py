"""Processes that decode when they are asked: two thread pools in one process would disturb each other.

The lines are JSON both ways: ``{"prompt": [...], "new": 64, "features": null}`` -> the fields of `Answer`, and
``{"text": [...]}`` -> a number.
"""

from __future__ import annotations

import itertools
import json
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True, slots=True)
class Answer:
    """What one prompt took: the first token counts as prefill, the others as decoding.

    ``decode_ms`` is the median of a step, ``mean_ms`` the mean, ``total_ms`` the whole; ``peak_mb`` is the most that
    was resident in the worker so far, MiB.
    """

    tokens: list[int]
    prefill_ms: float
    decode_ms: float
    mean_ms: float
    total_ms: float
    peak_mb: float


def python(*packages: str) -> str | None:
    """The Python that has an engine's packages: ``$OFFRAMP_PEERS_PYTHON``, else this one; None where it lacks some."""
    named = os.environ.get("OFFRAMP_PEERS_PYTHON", sys.executable)
    code = f"from importlib.util import find_spec; raise SystemExit(not all(map(find_spec, {packages})))"
    return None if subprocess.run([named, "-c", code]).returncode else named


class Worker:
    """A process that has a model loaded and sleeps while it is not asked."""

    def __init__(self, *command: str) -> None:
        # compiled once, as the modules of an installed package are: not anew in every process that starts
        env = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=env)
        self.loaded: dict[str, Any] = self._line()

    def decode(self, prompt: Sequence[int], new: int | None, features: Path | None = None) -> Answer:
        """``new`` tokens after ``prompt``, greedily; an end token does not end them. None: as the model generates.

        ``features`` is a .npy file with what Whisper hears, float32 [1, 80, 3000], or a .npz file of inputs by name:
        encoding them is part of the prefill.
        """
        return Answer(**self._asked(prompt=list(map(int, prompt)), new=new, features=features and str(features)))

    def loss(self, text: Sequence[int]) -> float:
        """The mean negative log-likelihood, in nats, of the tokens of ``text`` after the first."""
        return float(self._asked(text=list(map(int, text))))

    def _asked(self, **what: Any) -> Any:
        assert self._process.stdin is not None
        print(json.dumps(what), file=self._process.stdin, flush=True)
        return self._line()

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


Decode: TypeAlias = Callable[[list[int], int | None, str | None], tuple[list[int], list[float]]]
Logits: TypeAlias = Callable[[list[int]], NDArray[np.float32]]


def serve(about: dict[str, Any], decode: Decode, logits: Logits | None = None) -> None:
    """Answer what a `Worker` asks.

    ``decode`` returns the tokens, and the seconds at the start and after each token, or after some; ``logits`` those of
    each next token of a text, [tokens, vocabulary].
    """
    print(json.dumps(about | {"peak_mb": peak()}), flush=True)
    for line in sys.stdin:
        asked = json.loads(line)
        if text := asked.get("text"):
            assert logits is not None
            print(nats(logits(text), text), flush=True)
            continue
        tokens, times = decode(asked["prompt"], asked["new"], asked["features"])
        steps = sorted((after - before) * 1e3 for before, after in itertools.pairwise(times[1:])) or [0.0]
        first, total = (times[1] - times[0]) * 1e3, (times[-1] - times[0]) * 1e3
        answer = Answer(tokens, first, steps[len(steps) // 2], sum(steps) / len(steps), total, peak())
        print(json.dumps(asdict(answer)), flush=True)


def nats(logits: NDArray[np.float32], text: Sequence[int]) -> float:
    """The mean negative log-likelihood of the tokens of a text after the first; ``logits`` [tokens, vocabulary]."""
    before = logits[:-1].astype(np.float64)
    before -= before.max(-1, keepdims=True)
    said = before[np.arange(len(before)), text[1:]]
    return float(np.mean(np.log(np.exp(before).sum(-1)) - said))


def peak() -> float:
    """Peak resident memory of this process, MiB."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1]) / 1024
