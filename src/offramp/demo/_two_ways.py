"""The same generation at full depth and in less time, from a bundle each: both texts, and what they take in turns."""

from __future__ import annotations

import difflib
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from time import perf_counter
from typing import TYPE_CHECKING, Any, NamedTuple

from offramp.cli import _words
from offramp.runtime import Never, load

if TYPE_CHECKING:
    from offramp.runtime import Chain, Policy
    from offramp.runtime.generation.tokens import Token

FULL = ("insert-cache",)  # the pipeline of full depth
_ROUNDS = 7


class Way(NamedTuple):
    """A chain, and when its tokens leave."""

    chain: Chain
    policy: Policy


class Run(NamedTuple):
    """What one way made of an input: its steps, and the median milliseconds of all of them."""

    steps: list[Token]
    milliseconds: float

    @property
    def tokens(self) -> list[int]:
        return [step.token for step in self.steps]

    @property
    def blocks(self) -> float:
        """After how many blocks the tokens were made, on average."""
        return statistics.fmean(step.exit for step in self.steps)


def full_of(path: Path) -> Path:
    """Where the bundle of full depth lies: beside the other, since an exit that nobody takes costs time too."""
    return path.with_name(f"{path.stem}-full{path.suffix}")


def ways(path: Path, policy: Policy) -> tuple[Way, Way]:
    """The quick way and full depth."""
    return Way(load(path), policy), Way(load(full_of(path)), Never())


def in_turns(both: Sequence[Way], inputs: Mapping[str, Any]) -> list[Run]:
    """Run each way on the same input, in turns; what all tokens share, an encoder say, is not counted."""
    steps: list[list[Token]] = [[] for _ in both]
    times: list[list[float]] = [[] for _ in both]
    for _ in range(_ROUNDS + 1):
        for at, way in enumerate(both):
            stream = way.chain.stream(inputs, way.policy)  # by now, an encoder has run
            started = perf_counter()
            steps[at] = list(stream)
            times[at].append((perf_counter() - started) * 1e3)
    return [Run(made, statistics.median(spent[1:])) for made, spent in zip(steps, times, strict=True)]


def painted(run: Run, decode: _words.Decode, paint: _words.Paint) -> str:
    """The text, each token as ``paint`` shows its depth."""
    text = _words.Text(decode)
    return "".join(paint(*text.add(step.token, step.exit, last=step.finished)) for step in run.steps)


def difference(full: str, early: str) -> str:
    """Which words of full depth's text another has otherwise."""
    left, right = full.split(), early.split()
    changes = [
        f'"{" ".join(left[a:b])}" became "{" ".join(right[c:d])}"'
        for kind, a, b, c, d in difflib.SequenceMatcher(None, left, right, autojunk=False).get_opcodes()
        if kind != "equal"
    ]
    return "; ".join(changes) or "the same text"


def summary(pairs: Sequence[tuple[Run, Run]], what: str) -> str:
    """How much quicker than full depth all inputs together were, and how many texts are the same."""
    quick, full = (sum(pair[way].milliseconds for pair in pairs) for way in (0, 1))
    same = sum(pair[0].tokens == pair[1].tokens for pair in pairs)
    return (
        f"{full / quick:.2f}x as fast as full depth ({quick:.1f} ms against {full:.1f} ms, in turns); "
        f"the same text for {same} of {len(pairs)} {what}."
    )
