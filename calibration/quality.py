"""How good an answer is, in [0, 1]: against a label, or against the answer at full depth."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from offramp.errors import InputError
from offramp.runtime import Chain

Quality: TypeAlias = Callable[[Any, Any], float]
"""``(answer, reference) -> [0, 1]``: a row's logits, or the token ids of a generation; and its label, or where there
are no labels the answer at full depth."""


def same_class(logits: NDArray[Any], reference: Any) -> float:
    """The share of places where the highest of the logits [..., classes] is the reference.

    The reference holds class ids [...], or logits of the same shape.
    """
    expected = np.asarray(reference)
    if expected.dtype.kind == "f" and expected.shape == logits.shape:
        expected = expected.argmax(-1)
    found = logits.argmax(-1)
    if expected.shape != found.shape:
        raise InputError(
            f"a label has the shape {list(expected.shape)}, the answers have {list(found.shape)}",
            hint="class ids, or quality=...",
        )
    return float((found == expected).mean())


def same_tokens(tokens: NDArray[Any], reference: Any) -> float:
    """1 less the edit distance (Levenshtein) to the reference's tokens, over the longer one's length."""
    expected = np.asarray(reference)
    longest = max(len(tokens), len(expected))
    if not longest:
        return 1.0
    places = np.arange(len(expected) + 1)
    row = places.copy()
    for at, token in enumerate(tokens):
        moved = np.minimum(row[1:] + 1, row[:-1] + (expected != token))
        row = np.concatenate([[at + 1], moved])
        row = np.minimum.accumulate(row - places) + places  # what insertions make of the places before
    return 1.0 - float(row[-1]) / longest


def answers_of(chain: Chain) -> str:
    """The output that is the answer: "logits", or the only one.

    Raises:
        InputError: there are several others, so that a quality has to be given.
    """
    outputs = list(chain.outputs)
    if "logits" in outputs or len(outputs) == 1:
        return "logits" if "logits" in outputs else outputs[0]
    raise InputError(f"which of the outputs {outputs} is the answer?", hint='export a model with the output "logits"')


def classes_of(chain: Chain) -> None:
    """Check that `same_class` makes sense: the answer's last axis has places for classes.

    Raises:
        InputError: it has not.
    """
    value = chain.outputs[answers_of(chain)]
    if not value.shape or (isinstance(value.shape[-1], int) and value.shape[-1] < 2):
        raise InputError(
            f"the output {answers_of(chain)!r} ({value}) has no classes, so what a good answer is has to be said",
            hint="offramp.calibrate(..., quality=function of answer and reference)",
        )


def graded(quality: Quality, answer: Any, reference: Any) -> float:
    """The quality, checked to be in [0, 1]."""
    found = float(quality(answer, reference))
    if not 0.0 <= found <= 1.0:
        raise InputError(f"the quality function returned {found}, expected a number in [0, 1]")
    return found
