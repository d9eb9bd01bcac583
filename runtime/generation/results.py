"""What a step of a generation gives, before a token is chosen."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

from offramp.runtime.generation.batching import Array
from offramp.runtime.generation.decision import Asked
from offramp.runtime.result import Timing


class RowResult(NamedTuple):
    """A row that has left the last stack with the model's outputs for its last token, or only with its next one.

    ``pick`` is that token, where `Wanted.accepts` accepts what the exit picks; ``outputs`` are empty then. ``asked``
    has what the exits of that stack said of the token, by ``after``. Where all tokens that got to full depth in this
    step were wanted, ``deep`` are the next tokens that it picks for them if all will do, else ``whole`` are its
    outputs, [tokens, ...]. ``before`` are the tokens of the row that left in the same run before this one.
    """

    slot: int
    outputs: Mapping[str, Array]
    exits: Mapping[str, int]
    scores: Mapping[str, float]
    asked: Mapping[int, Asked]
    pick: int | None = None
    whole: Mapping[str, Array] | None = None
    deep: Sequence[int] | None = None
    before: Sequence[RowResult] = ()


class StepResult(NamedTuple):
    """What a step has made: rows in the order of slots, what ran, and how many waiting tokens went deeper."""

    rows: list[RowResult]
    trace: tuple[Timing, ...]
    caught_up: int
