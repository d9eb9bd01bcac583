"""The rows of a batch as a list: models make one, to join it again, and a graph has no list of free length.

While a model is traced, each row of such a list is a tensor that only knows which one it stands for. All of them in
their order are the batch; whoever asks one of them for more gets a `RowAloneError`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.utils._pytree import tree_leaves


class RowAloneError(Exception):
    """A row of a list is used by itself."""


class Lists:
    """The lists that a model has made of tensors while it is traced."""

    def __init__(self) -> None:
        self._last: torch.Tensor | None = None
        self._any = False

    def __call__(self, func: Any, args: Any, kwargs: Any) -> Any:
        """What a function of torch gives, where it makes such a list or reads one; else NotImplemented.

        Raises:
            RowAloneError: it reads a part of one.
        """
        last, self._last = self._last, None
        if func is torch.Tensor.unbind and not kwargs and (len(args) < 2 or args[1] == 0) and _has_free_rows(args[0]):
            self._last, self._any = args[0], True
            return _listed(args[0])
        if last is not None and func is torch.Tensor.__len__ and args[0] is last:  # ``list`` asks for it
            return _count(last)
        if not self._any or getattr(func, "__name__", "") == "__get__":
            return NotImplemented
        if func is torch.cat and (whole := _joined(*args, **kwargs)) is not None:
            return whole
        if any(is_row(leaf) for leaf in tree_leaves((args, kwargs))):
            raise RowAloneError(f"{func} of one row of a list")
        return NotImplemented


def is_row(value: Any) -> bool:
    """Whether something stands for a row of a list."""
    return hasattr(value, "_offramp_row")


def _has_free_rows(tensor: torch.Tensor) -> bool:
    return tensor.dim() > 1 and isinstance(tensor.shape[0], torch.SymInt)


def _listed(tensor: torch.Tensor) -> list[torch.Tensor]:
    rows = [tensor.select(0, 0) for _ in range(_count(tensor))]
    for at, row in enumerate(rows):
        row._offramp_row = (tensor, at)  # type: ignore[attr-defined]
    return rows


def _joined(tensors: Any, dim: int = 0, **_: Any) -> torch.Tensor | None:
    """All rows of a list one after the other, from the tensor that they are rows of; None for other tensors."""
    if not isinstance(tensors, (list, tuple)) or not tensors or not all(map(is_row, tensors)) or dim != 0:
        return None
    rows = [tensor._offramp_row for tensor in tensors]
    whole: torch.Tensor = rows[0][0]
    if [at for _, at in rows] != list(range(_count(whole))) or any(of is not whole for of, _ in rows):
        return None
    return whole.flatten(0, 1)


def _count(tensor: torch.Tensor) -> int:
    return int(tensor.shape[0].node.hint)  # type: ignore[attr-defined]
