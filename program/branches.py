"""``torch.cond`` while a model is traced: both branches and a choice, since passes and segments are of one graph."""

from __future__ import annotations

import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves, tree_map

from offramp.errors import CaptureError


class _Reading(TorchFunctionMode):
    """What is read that was there before: operands, and what a function has from around it."""

    def __init__(self) -> None:
        super().__init__()
        self._versions = dict[int, tuple[torch.Tensor, int]]()
        self._made = dict[int, torch.Tensor]()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        for value in tree_leaves((args, kwargs or {})):
            if isinstance(value, torch.Tensor) and id(value) not in self._made:
                self._versions.setdefault(id(value), (value, value._version))
        found = func(*args, **(kwargs or {}))
        self._made |= {id(value): value for value in tree_leaves(found) if isinstance(value, torch.Tensor)}
        return found

    def changed(self) -> bool:
        """Whether something of it is not as it was, by a view of it too."""
        return any(value._version != before for value, before in self._versions.values())


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
    with _Reading() as reading:
        made = [branch(*operands) for branch in (true_fn, false_fn)]
    if reading.changed():
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
