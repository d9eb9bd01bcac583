"""How good an answer is, in [0, 1]: against a label, or against the answer at full depth."""

from __future__ import annotations

import reprlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from offramp.bundle.measures import measure_named
from offramp.calibration.examples import Examples
from offramp.errors import InputError
from offramp.runtime import Chain

_ROUNDING = 1e-5
IGNORED = -100  # the label of a place that does not count, as in training
_OWN = "offramp.calibrate(..., quality=function of answer and reference)"
Quality: TypeAlias = Callable[[Any, Any], float]
"""``(answer, reference) -> [0, 1]``: a row's logits (where there are none and several outputs, a mapping of these), or
the token ids of a generation; and its label, or where there are no labels the answer at full depth."""


def same_class(logits: NDArray[Any], reference: Any) -> float:
    """The share of places where the highest of the logits [..., classes] is the reference.

    The reference holds class ids [...], or logits of the same shape. Places whose class id is -100 do not count.

    Raises:
        InputError: it has another shape, holds what no class id is, or no place counts.
    """
    expected = np.asarray(reference)
    if expected.dtype.kind == "f" and expected.shape == logits.shape:
        expected = expected.argmax(-1)
    found, classes = logits.argmax(-1), logits.shape[-1]
    if expected.dtype.kind not in "iufb":
        raise InputError(
            f"a label is {short(reference)}; it is compared with the class ids of the answers, 0 to {classes - 1}",
            hint="class ids: [names.index(label) for label in labels]; or quality=function of answer and label",
        )
    if expected.shape != found.shape:
        raise InputError(
            f"a label has the shape {list(expected.shape)}, the answers have {list(found.shape)}",
            hint="a class id for each place of the answers, which a transcript has not; or quality=function of answer "
            "and label",
        )
    counts = expected != IGNORED
    if not counts.any():
        raise InputError(f"a label is {IGNORED} everywhere, which counts nowhere", hint="leave such examples out")
    strange = counts & ~np.isin(expected, np.arange(classes))
    if strange.any():
        raise InputError(
            f"a label has {expected[strange].ravel()[0]}; it is compared with the class ids of the answers, "
            f"0 to {classes - 1}",
            hint=f"the class ids that the model was trained with; {IGNORED} for places that do not count",
        )
    return float((found == expected)[counts].mean())


def same_tokens(tokens: NDArray[Any], reference: Any) -> float:
    """1 less the edit distance (Levenshtein) to the reference's tokens, over the longer one's length.

    What fills a reference up, -100 as in training, is none of them.

    Raises:
        InputError: the reference holds no token ids.
    """
    expected = np.asarray(reference)
    expected = expected[expected != IGNORED] if expected.ndim == 1 else expected
    if expected.ndim != 1 or (expected.size and (expected.dtype.kind not in "iu" or expected.min() < 0)):
        raise InputError(
            f"a label is {short(reference)}; it is compared with the token ids of a generation",
            hint="token ids, as the bundle's tokenizer makes them; or quality=function of answer and label",
        )
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


def short(value: Any) -> str:
    """A value in a few words."""
    return reprlib.repr(value.tolist() if isinstance(value, np.ndarray | np.generic) else value)


def answers_of(chain: Chain) -> str:
    """The output that is the answer: "logits", or the only one.

    Raises:
        InputError: there are several others, for which a quality has to be given.
    """
    names = _names(chain)
    if len(names) == 1:
        return names[0]
    raise InputError(
        f"which of the outputs {names} is the answer?",
        hint=f'{_OWN}, where an answer is a mapping of them; or a model with the output "logits"',
    )


def _names(chain: Chain) -> list[str]:
    """The outputs that an answer is made of."""
    return ["logits"] if "logits" in chain.outputs else list(chain.outputs)


def by_row(chain: Chain, outputs: Mapping[str, NDArray[Any]]) -> list[Any]:
    """What each row is answered: "logits" or the only output, of several others a mapping."""
    names = _names(chain)
    parts, places = dict[str, Any](), {name: chain.rows_of(name) for name in names}
    for name, place in places.items():
        parts[name] = [outputs[name]] if place is None else list(np.moveaxis(outputs[name], place[0], 0))
    if len(names) == 1:
        return list(parts[names[0]])
    rows = max(map(len, parts.values()))
    return [{name: each[row if places[name] else 0] for name, each in parts.items()} for row in range(rows)]


def classes_of(chain: Chain, examples: Examples) -> None:
    """Check that `same_class` makes sense: the answer's last axis has places for classes, and labels are ids of these.

    Logits have such places, and what exits score as classes; of another output (an embedding) labels that are class ids
    say so.

    Raises:
        InputError: it has not, or labels are others.
    """
    name, labels = answers_of(chain), [np.asarray(label) for label in examples.labels or ()]
    value = chain.outputs[name]
    scores = {score for stack in chain.stacks.values() for exit_ in stack.exits for score in exit_.scores}
    named = "logits" in name or any(measure_named(score).of_classes for score in scores)
    named = named or (bool(labels) and labels[0].dtype.kind != "f")
    if not named or not value.shape or (isinstance(value.shape[-1], int) and value.shape[-1] < 2):
        raise InputError(
            f"the output {name!r} ({value}) {'has no' if named else 'is not said to have'} classes, so what a good "
            "answer is has to be said",
            hint=_OWN if named else f"{_OWN}; or labels that are class ids",
        )
    axes = len(value.shape) - (chain.rows_of(name) is not None)
    for label in labels:
        if label.dtype.kind == "f" and label.ndim == axes and label.shape[-1] == value.shape[-1]:
            raise InputError(
                f"a label is {short(label)}, a number for each class; an answer is compared by its greatest alone",
                hint=f"class ids; or, of a regression or of classes that do not exclude each other, {_OWN}",
            )
    if (copied := _copied(examples.inputs, labels)) is not None:
        raise InputError(
            f"each label is what {copied!r} has at the same place, so there is nothing to predict",
            hint=f"where a model predicts the next token, the one that follows, and {IGNORED} at the end; or {_OWN}",
        )


def _copied(inputs: Sequence[Mapping[str, Any]], labels: Sequence[NDArray[Any]]) -> str | None:
    """The input that labels of each place repeat wherever they count; None where there is none."""
    places = [label.ravel() for label in labels if label.ndim]
    if len(places) < len(inputs) or np.setdiff1d(np.concatenate(places), IGNORED).size < 2:
        return None

    def same(name: str) -> bool:
        pairs = [(label, np.ravel(given.get(name, ()))) for label, given in zip(places, inputs, strict=True)]
        return all(label.size == ids.size and ((label == ids) | (label == IGNORED)).all() for label, ids in pairs)

    return next(filter(same, inputs[0]), None)


def graded(quality: Quality, answer: Any, reference: Any) -> float:
    """The quality, checked to be in [0, 1]; what rounding adds (to a cosine in float32, say) is cut off.

    Raises:
        InputError: it is not.
    """
    found = float(quality(answer, reference))
    if not -_ROUNDING <= found <= 1 + _ROUNDING:
        raise InputError(f"the quality function returned {found}, expected a number in [0, 1]")
    return min(max(found, 0.0), 1.0)
