"""Batches as users have them: of tensors, arrays or lists, gone through once an epoch, checked against a program."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, TypeAlias

import numpy as np
import torch
from torch import Tensor

from offramp.errors import SpecError
from offramp.program.graph import placeholders, shape, sizes_of
from offramp.program.program import Program

Batch: TypeAlias = Mapping[str, Tensor]
Batches: TypeAlias = Iterable[Mapping[str, Any]] | Callable[[], Iterable[Mapping[str, Any]]]
"""What is gone through once an epoch, or a function that makes it for each."""


def require_batches(batches: Any) -> None:
    """Raise a SpecError where these are no batches.

    Raises:
        SpecError: it is one batch, or nothing that can be gone through.
    """
    if isinstance(batches, Mapping):
        raise SpecError(
            f"batches is one mapping, of {sorted(map(str, batches))}; an iterable of such mappings is needed",
            hint="[batch]",
        )
    if isinstance(batches, Tensor | np.ndarray | str | bytes) or not (
        hasattr(batches, "__iter__") or hasattr(batches, "__getitem__") or callable(batches)
    ):
        raise SpecError(
            f"batches is of type {type(batches).__name__}; an iterable of mappings from names to tensors is needed",
            hint='a list of {"input_ids": ..., "labels": ...}, a DataLoader, or a function that makes one',
        )


def length_of(batches: Batches) -> int:
    """How many batches an epoch has; 0 where nobody knows."""
    try:
        return len(batches)  # type: ignore[arg-type]
    except TypeError:  # also of loaders that have a length for some data only
        return 0


def epoch_of(batches: Batches, epoch: int) -> Iterator[Any]:
    """One pass over the batches."""
    if hasattr(batches, "set_epoch"):
        batches.set_epoch(epoch)
    if not hasattr(batches, "__iter__") and callable(batches):
        batches = batches()
        require_batches(batches)
    return iter(batches)


def once(batches: Batches) -> bool:
    """Whether they can be gone through once only, as what a generator makes."""
    return isinstance(batches, Iterator)


def tensors(program: Program, batch: Any, device: torch.device) -> dict[str, Any]:
    """A batch as tensors on a device, the program's inputs and what is given of its nodes in the dtypes that it takes.

    Arrays, numbers and lists of numbers become tensors. What cannot stays as it is: an objective may read it.

    Raises:
        SpecError: it is no mapping, or inputs of the program are no tensors, or differ in dtype, rank or size. All
            problems are in one message.
    """
    if not isinstance(batch, Mapping):
        listed = ", ".join(f'"{name}": ...' for name in (*program.inputs, "labels"))
        raise SpecError(
            f"a batch is of type {type(batch).__name__}; a mapping from names to tensors is needed",
            hint=f"{{{listed}}}, by the collate_fn of the DataLoader or in a function: "
            f"fit(program, lambda: ({{{listed}}} for ... in loader), ...)",
        )
    found = {name: _tensor(value) for name, value in batch.items()}
    problems = list(_problems(program, found))
    if problems:
        raise SpecError("\n  ".join(problems), hint=_hint(program, found))
    nodes = {name: program.nodes[name] for name in program.pinned if isinstance(found.get(name), Tensor)}
    nodes |= {name: node for name, node in placeholders(program.graph).items() if name in found}
    for name, node in nodes.items():
        wanted = node.meta["val"].dtype
        found[name] = found[name].to(wanted) if found[name].dtype != wanted else found[name]
    return {name: value.to(device) if isinstance(value, Tensor) else value for name, value in found.items()}


def shown(batch: Mapping[str, Any]) -> str:
    """Names, dtypes, shapes and ranges of a batch, in words."""
    return ", ".join(f"{name} {_shown(value)}" for name, value in batch.items())


def _tensor(value: Any) -> Any:
    if isinstance(value, np.ndarray | np.generic):
        return torch.tensor(np.ascontiguousarray(value)) if value.dtype.kind in "biufc" else value
    if isinstance(value, Tensor) and value.is_inference():
        return value.clone()  # which a gradient may need
    if isinstance(value, list | tuple | int | float):
        try:
            return torch.tensor(value)
        except (TypeError, ValueError, RuntimeError):
            return value
    return value


def _problems(program: Program, batch: Mapping[str, Any]) -> Iterator[str]:
    """What of the program's inputs does not fit it."""
    nodes, sizes = placeholders(program.graph), dict[Any, tuple[int, str]]()
    for name in program.inputs:
        if name not in batch:
            continue  # what is computed may not need it
        value, wanted = batch[name], nodes[name].meta["val"]
        sizes_taken = ", ".join(str(program.axes.describe(size)) for size in wanted.shape)
        taken = f"the program takes {_dtype(wanted.dtype)} [{sizes_taken}]"
        if not isinstance(value, Tensor):
            yield f"{name} is {_shown(value)}; {taken}"
        elif not _fits(value.dtype, wanted.dtype) or value.dim() != wanted.dim() or not value.numel():
            yield f"{name} is {_dtype(value.dtype)} {list(value.shape)}; {taken}"
        else:
            yield from _wrong_sizes(program, name, value, sizes)


def _wrong_sizes(program: Program, name: str, value: Tensor, sizes: dict[Any, tuple[int, str]]) -> Iterator[str]:
    """Where an input's axes contradict the program, or ``sizes`` of the inputs before: length, and which input's."""
    node = placeholders(program.graph)[name]
    for axis, (found, size) in enumerate(zip(value.shape, sizes_of(node), strict=True)):
        axes, where = program.axes, f"axis {axis} of {name} is {found} long"
        if size not in axes.names:
            known = {symbol: sizes[symbol][0] for symbol in getattr(size, "free_symbols", ()) if symbol in sizes}
            wanted = size.subs(known) if known else size
            if getattr(wanted, "is_number", True) and int(wanted) != found:
                yield f"{where}; the program takes {axes.describe(size)}"
            continue
        if sizes.setdefault(size, (found, name))[0] != found:
            yield f"{where}; {axes.names[size]} is {sizes[size][0]} in {sizes[size][1]}"
        least, most = axes.ranges.get(size, (1, None))
        if found < least or (most is not None and found > most):
            limit = f"at least {least}" if found < least else f"at most {most}"
            yield f"{where}; the program takes {limit} of {axes.names[size]}"


def _fits(found: torch.dtype, wanted: torch.dtype) -> bool:
    """Whether values of a dtype can stand for those of another. Bytes are no floats: images have to be scaled."""
    if found == torch.uint8 and wanted.is_floating_point:
        return False
    return torch.can_cast(found, wanted) or (wanted == torch.bool and not found.is_floating_point)


def _hint(program: Program, batch: Mapping[str, Any]) -> str:
    values = [batch[name] for name in program.inputs if name in batch]
    nodes = placeholders(program.graph)
    if any(not isinstance(value, Tensor) for value in values):
        return "rows that are padded to one length, as tensors: the collate_fn of the DataLoader does it"
    if any(not value.numel() for value in values):
        return "leave batches without rows or tokens out"
    if any(batch[name].dim() < len(shape(nodes[name])) for name in program.inputs if name in batch):
        return "rows in batches: DataLoader(dataset, batch_size=8)"
    wanted = {name: nodes[name].meta["val"].dtype for name in program.inputs if name in batch}
    if wrong := [name for name, dtype in wanted.items() if not _fits(batch[name].dtype, dtype)]:
        return f"batch[{wrong[0]!r}].to({wanted[wrong[0]]}), if that is what its numbers mean"
    return "inputs like those that the model was captured with; dynamic= of capture says which sizes are free"


def _shown(value: Any) -> str:
    if isinstance(value, Tensor):
        return f"{_dtype(value.dtype)} {list(value.shape)}{_range(value)}"
    if isinstance(value, list | tuple):
        parts = [_shown(part) for part in value[:1]]
        return f"a {type(value).__name__} of {len(value)}" + "".join(f" ({part}, ...)" for part in parts)
    return f"of type {type(value).__name__}"


def _range(value: Tensor) -> str:
    if not value.numel() or value.is_complex() or value.is_meta:
        return ""
    return f" from {value.min().item():.4g} to {value.max().item():.4g}"


def _dtype(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
