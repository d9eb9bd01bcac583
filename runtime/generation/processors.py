"""What a text so far does to the logits of its next token: the rules of transformers' logits processors."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

Tokens = NDArray[np.int64]
Logits = NDArray[np.float32]


def penalised(tokens: Tokens, logits: Logits, penalty: float) -> Logits:
    """Logits [vocabulary], a new array in which those of tokens that the text has are less likely.

    Positive ones are divided by the penalty, others multiplied (CTRL, arXiv 1909.05858, sec. 4.1).
    """
    seen = np.unique(tokens[tokens < logits.size])
    by, before = np.float32(penalty), logits[seen]
    found = logits.copy()
    found[seen] = np.where(before < 0, before * by, before / by)
    return found


def repeating(tokens: Tokens, size: int) -> list[int]:
    """The tokens that would end a sequence of ``size`` tokens that the text has already."""
    if not 0 < size <= tokens.size:
        return []
    windows = np.lib.stride_tricks.sliding_window_view(tokens, size)
    same = (windows[:, :-1] == tokens[tokens.size - size + 1 :]).all(-1)
    return [int(token) for token in np.unique(windows[same, -1])]


def completing(tokens: Tokens, words: Sequence[tuple[int, ...]]) -> list[int]:
    """The last tokens of those words, of at least two tokens, whose others the text ends with."""
    longest = max((len(word) for word in words), default=1)
    tail = tuple(tokens[max(0, tokens.size - longest + 1) :].tolist())
    return [word[-1] for word in words if tail[len(tail) - len(word) + 1 :] == word[:-1] and len(word) <= len(tail) + 1]
