"""What a run gives back."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray


class Timing(NamedTuple):
    """One run of one segment: its name, milliseconds of wall time, and how many rows it ran on."""

    segment: str
    milliseconds: float
    rows: int


@dataclass(frozen=True, slots=True)
class Result:
    """The answers of a run; rows are in the order of the inputs.

    Attributes:
        outputs: The model's outputs by name; those of a row are what the exit that it took made.
        exits: For each stack int64 [rows]: after how many blocks the row left (``blocks`` is full depth); for each
            group of tokens, ``STACK.GROUP``, too, [rows, tokens] of those that leave alone.
        scores: By stack, ``after`` and measure, float32 [rows] (int64 for whole numbers), of the exits where
            the policy was asked: NaN (or -1) for rows that had left before.
        trace: The segments in the order in which they ran.
        learners: How many learners each token took, int64 [rows, tokens] (or [tokens, rows], as the model has them), by
            site (``encoder.3.mlp``); -1 for rows that had left. Empty for bundles without learners.
        width: The share of their floating-point operations that was executed; None without learners.
    """

    outputs: Mapping[str, NDArray[Any]]
    exits: Mapping[str, NDArray[np.int64]]
    scores: Mapping[str, Mapping[int, Mapping[str, NDArray[Any]]]]
    trace: tuple[Timing, ...]
    learners: Mapping[str, NDArray[np.int64]] = field(default_factory=dict)
    width: float | None = None
