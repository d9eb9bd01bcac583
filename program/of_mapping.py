"""A forward that takes one mapping, as a training loop has a batch, called by the names of the tensors in it."""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import nn

from offramp.program.forward import forward_error
from offramp.program.unwrap import as_captured, called_by_names, signature, unchanged

_CONSTANTS = bool | int | float | str | None


def by_names(module: nn.Module, example: Any) -> tuple[nn.Module, Any]:
    """A module that is called as ``module({"ids": ids})``, and its inputs, as one that is called ``module(ids=ids)``.

    Where the forward takes something else, both are returned as they are.

    Raises:
        ForwardError: it reads the mapping, and fails on what is in it.
    """
    batch = _mapping(module, example)
    if batch is None or not all(isinstance(item, torch.Tensor | _CONSTANTS) for item in batch.values()):
        return module, example
    tensors = {name: item for name, item in batch.items() if isinstance(item, torch.Tensor)}
    with torch.no_grad(), as_captured(module):
        try:
            with unchanged(module):
                module(dict(batch))
        except Exception as error:
            if not _reads(module, batch):
                return module, example  # inputs that it does not know are an error of `named_inputs`
            raise forward_error(module, tensors, error, "module(inputs)") from error
    return _OfMapping(module, batch), tensors


def _mapping(module: nn.Module, example: Any) -> Mapping[str, Any] | None:
    """The mapping that a forward which needs one argument is to get."""
    kinds = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    known = signature(module).parameters.values()
    needed = [item.name for item in known if item.kind in kinds and item.default is item.empty]
    if len(needed) != 1:
        return None
    if isinstance(example, Mapping):
        batch: Any = example.get(needed[0], example)
    else:
        batch = example[0] if isinstance(example, (tuple, list)) and len(example) == 1 else None
    return batch if isinstance(batch, Mapping) else None


class _Watched(dict[str, Any]):
    """A mapping that knows whether anybody used it as one."""

    used = False

    def __getitem__(self, name: str) -> Any:
        self.used |= isinstance(name, str)
        return super().__getitem__(name)

    def __iter__(self) -> Iterator[str]:  # without it ``**`` would ask for nothing that is defined here
        return super().__iter__()

    def __getattribute__(self, name: str) -> Any:
        if name in ("get", "items", "keys", "pop", "update"):
            self.used = True
        return super().__getattribute__(name)


def _reads(module: nn.Module, batch: Mapping[str, Any]) -> bool:
    """Whether the forward, which fails, reads a mapping by names."""
    watched = _Watched(batch)
    with contextlib.suppress(Exception), unchanged(module):
        module(watched)
    return watched.used


class _OfMapping(nn.Module):
    """A module that takes one mapping, called by the names of the tensors in it; what else is in it stays.

    Of a mapping that it returns, what it was given is left out.
    """

    def __init__(self, module: nn.Module, batch: Mapping[str, Any]) -> None:
        super().__init__()
        self.module = module
        self._rest = {name: value for name, value in batch.items() if not isinstance(value, torch.Tensor)}

        def forward(**inputs: torch.Tensor) -> Any:
            given = {**self._rest, **inputs}
            made = self.module(dict(given))
            if not isinstance(made, Mapping):
                return made
            return {name: value for name, value in made.items() if value is not given.get(name)}  # what it added

        forward.__signature__ = called_by_names(name for name in batch if name not in self._rest)  # type: ignore[attr-defined]
        self.forward = forward
