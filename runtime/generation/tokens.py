"""What a generation gives: tokens with the depth of each."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from offramp.runtime.result import Timing


class Token(NamedTuple):
    """One token of one row.

    Attributes:
        row: The row's place in the batch.
        token: Its id.
        exit: After how many blocks of the last stack it was made.
        exits: The same for every stack that runs for each token.
        scores: What the last exit that was asked scored, by measure.
        milliseconds: Wall time of the step, which all rows share; where one run made several tokens, an equal part.
        caught_up: How many tokens that had left early were computed deeper in this step, over all rows.
        finished: Whether the row ends with it.
        trace: The segments of the step.
    """

    row: int
    token: int
    exit: int
    exits: Mapping[str, int]
    scores: Mapping[str, float]
    milliseconds: float
    caught_up: int
    finished: bool
    trace: tuple[Timing, ...]


@dataclass(frozen=True, slots=True)
class Generated:
    """What `Chain.generate` returns, by row: new token ids int64 [n], and after how many blocks each was made.

    ``width`` is the share of the learners' floating-point operations that was executed, of the generated tokens, the
    prompts and what ran once for the inputs; None without learners.
    ``encoders`` says after how many blocks each row left the stacks that ran once for the inputs, int64 [rows];
    [rows, tokens] where tokens leave alone.
    """

    tokens: tuple[NDArray[np.int64], ...]
    exits: tuple[NDArray[np.int64], ...]
    scores: tuple[float, ...] = ()
    width: float | None = None
    encoders: Mapping[str, NDArray[np.int64]] = field(default_factory=dict)
