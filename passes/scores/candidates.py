"""Which few classes a short head has: given, read from a file, or the likeliest of what the model answers."""

from __future__ import annotations

from collections.abc import Sequence
from os import PathLike
from pathlib import Path

import torch

from offramp.errors import SpecError

MANY = 512


def short_list(
    logits: torch.Tensor, count: int | None = None, ids: Sequence[int] | str | PathLike[str] | None = None
) -> tuple[int, ...]:
    """The candidates: the first ``count`` of ``ids``, or of the classes by their probability over all ``logits``.

    Args:
        logits: float[..., V], what the model answers to its example inputs.
        count: how many, of 2 to V - 1; None stands for all ids, and for 512 where there are none.
        ids: classes, most wanted first; or a text file of them, with spaces or line ends between.

    Raises:
        SpecError: the file cannot be read, or these are no 2 to V - 1 different classes.
    """
    classes = logits.shape[-1]
    if ids is None:
        count = MANY if count is None else count
        chances = logits.detach().float().softmax(-1).flatten(0, -2).sum(0)
        found = chances.argsort(descending=True, stable=True).tolist()
    else:
        found = _read(ids) if isinstance(ids, (str, PathLike)) else list(ids)
    if count is not None and (not isinstance(count, int) or not 2 <= count < classes or count > len(found)):
        raise SpecError(
            f"candidates={count}: from 2 to {min(len(found), classes - 1)}, of {classes} classes",
            hint=f"candidates={max(2, min(count, classes // 16))}, or measure=top1 or margin"
            if isinstance(count, int)
            else None,
        )
    found = found[:count]
    wrong = [one for one in found if not isinstance(one, int) or not 0 <= one < classes]
    if wrong or len(set(found)) < len(found) or not 2 <= len(found) < classes:
        raise SpecError(
            f"ids: {len(found)} of them, {len(set(found))} different"
            + (f", {wrong[:5]} not among the classes" if wrong else "")
            + f"; expected 2 or more different classes, not all, from 0 to {classes - 1}"
        )
    return tuple(found)


def _read(path: str | PathLike[str]) -> list[int]:
    try:
        return [int(word) for word in Path(path).read_text(encoding="utf-8").split()]
    except (OSError, ValueError) as error:
        raise SpecError(f"ids={path}: no text file of token ids ({error})", hint="one id a line") from error
