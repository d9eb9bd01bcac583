"""``torch.cond`` while a model is traced: both branches and a choice, since passes and segments are of one graph."""

from __future__ import annotations

import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from unittest import mock

import torch
from torch.utils._pytree import tree_leaves, tree_map

from offramp.errors import CaptureError


@contextmanager
def choosing() -> Iterator[None]:
    """Let ``torch.cond`` compute both branches. They are pure, so that what one makes does not depend on the other."""
    with mock.patch.object(torch, "cond", _both):
        yield


def _both(
    pred: object, true_fn: Callable[..., object], false_fn: Callable[..., object], operands: Sequence[object] = ()
) -> object:
    """What ``torch.cond`` gives. A condition by sizes is an ``if``: limits of axes say where it holds."""
    if not isinstance(pred, torch.Tensor):
        return (true_fn if pred else false_fn)(*operands)
    given = [value for value in tree_leaves(operands) if isinstance(value, torch.Tensor)]
    before = [value._version for value in given]
    made = [branch(*operands) for branch in (true_fn, false_fn)]
    if [value._version for value in given] != before:
        raise CaptureError(f"a branch of torch.cond ({_caller()}) changes what it is given", hint="return what is new")
    taken, other = (", ".join(map(_described, tree_leaves(each))) for each in made)
    if taken != other:
        raise CaptureError(
            f"the branches of torch.cond ({_caller()}) make {taken} and {other}", hint="the same shapes and dtypes"
        )
    return tree_map(lambda *values: torch.where(pred.reshape(()), *values), *made)


def _caller() -> str:
    """The line that called the function which asks."""
    frame = traceback.extract_stack(limit=3)[0]
    return f"{frame.filename}:{frame.lineno}"


def _described(value: object) -> str:
    if not isinstance(value, torch.Tensor):
        return str(value)
    return f"[{', '.join(map(str, value.shape))}] {str(value.dtype).removeprefix('torch.')}"
