"""A model's forward by names: its inputs, its outputs, and what it computes."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import inspect
import logging
import traceback
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from offramp.errors import CaptureError, ForwardError
from offramp.program.listed_rows import is_row
from offramp.program.unwrap import signature, takes_anything, unchanged

log = logging.getLogger(__name__)

ExampleInputs = Mapping[str, torch.Tensor] | Sequence[torch.Tensor] | torch.Tensor
_CONSTANTS = (
    bool,
    int,
    float,
    complex,
    str,
    bytes,
    torch.dtype,
    torch.device,
    torch.SymInt,
    torch.SymFloat,
    torch.SymBool,
)


def named_inputs(module: torch.nn.Module, example: ExampleInputs) -> dict[str, torch.Tensor]:
    """The example inputs by the names of the forward's parameters, float32 where they are floating point, on the CPU.

    Raises:
        CaptureError: they are no tensors, or do not fit the parameters.
    """
    parameters = list(signature(module).parameters.values())
    names = [p.name for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)]
    if isinstance(example, torch.Tensor):
        example = (example,)
    if isinstance(example, Mapping):
        given: dict[str, Any] = dict(example)
        names = list(given) if takes_anything(module) else names
    else:
        if len(example) > len(names):
            raise CaptureError(
                f"{len(example)} example inputs for a forward with parameters {names}",
                hint=None if names else "a mapping from names to tensors: the forward is called as module(**inputs)",
            )
        given = dict(zip(names, example, strict=False))
    unknown = sorted(set(given) - set(names))
    if unknown:
        raise CaptureError(
            f"the forward has no parameter {unknown}; its parameters are {names}",
            hint="a wrapper whose forward names them, if the forward takes more as keyword arguments",
        )
    given = {name: value for name, value in given.items() if value is not None}
    wrong = {name: type(value).__name__ for name, value in given.items() if not isinstance(value, torch.Tensor)}
    if wrong or not given:
        arrays = any(hasattr(given[name], "__array__") or _numbers(given[name]) for name in wrong)
        raise CaptureError(
            f"example inputs must be tensors, found {wrong or 'none'}",
            hint='torch.as_tensor makes one of an array or a list; a tokenizer with return_tensors="pt"'
            if arrays
            else "wrap the model in a module whose forward takes tensors only and sets the rest itself",
        )
    return {
        name: value.detach().to("cpu", torch.float32 if value.is_floating_point() else value.dtype)
        for name, value in given.items()
    }


def _numbers(value: Any) -> bool:
    """Whether it is a list of numbers, or of such lists: what one tensor can be made of."""
    return isinstance(value, list) and all(isinstance(item, (int, float)) or _numbers(item) for item in value)


def doubled(module: torch.nn.Module, inputs: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """torch.export fixes an axis of size one, so a batch of one row is captured as two."""
    if any(value.dim() == 0 or value.shape[0] != 1 for value in inputs.values()):
        return inputs
    doubled = {name: value.repeat(2, *[1] * (value.dim() - 1)) for name, value in inputs.items()}
    try:
        with torch.no_grad(), unchanged(module):
            module(**doubled)
    except Exception as error:  # noqa: BLE001 (the model's own; one row is then captured)
        log.info("a batch of two rows does not run (%s): capturing one", error)
        return inputs
    return doubled


@contextlib.contextmanager
def returning_tensors(module: torch.nn.Module, inputs: Mapping[str, torch.Tensor]) -> Iterator[set[str]]:
    """As long as it lasts, the forward returns its tensors by name, as `named_outputs` has them.

    If it takes anything it names ``inputs``. torch.export knows mappings and tuples, but neither dataclasses nor
    texts. It is the instance's forward that changes, so that the paths of submodules, which give names to stacks,
    stay what they are. Gives the names of outputs that are left out: rows in a list, of which a graph knows no number.
    """
    left_out = set[str]()
    forward, own = module.forward, "forward" in vars(module)

    @functools.wraps(forward)
    def named(*args: Any, **inputs: Any) -> dict[str, torch.Tensor]:
        found = named_outputs(forward(*args, **inputs))
        left_out.update(name for name, value in found.items() if is_row(value))
        return {name: value for name, value in found.items() if name not in left_out}

    if takes_anything(module):
        names = [inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY) for name in inputs]
        named.__signature__ = inspect.Signature(names)  # type: ignore[attr-defined]
    module.forward = named
    try:
        yield left_out
    finally:
        if own:
            module.forward = forward
        else:
            del module.forward


def named_outputs(value: Any, name: str = "") -> dict[str, torch.Tensor]:
    """The tensors of a forward's result by name: keys of mappings, fields of dataclasses, ``output0``, ... of tuples.

    None is left out, and so are numbers and texts, which do not depend on the contents of tensors.

    Raises:
        CaptureError: something in it is of another kind.
    """
    if isinstance(value, torch.Tensor):
        return {name or "output": value}
    if value is None or isinstance(value, _CONSTANTS):
        return {}
    found: dict[str, torch.Tensor] = {}
    if isinstance(value, Mapping):
        items = [(str(key), item) for key, item in value.items()]
    elif isinstance(value, tuple) and hasattr(value, "_fields"):
        items = list(zip(value._fields, value, strict=True))
    elif isinstance(value, (tuple, list)):
        items = [(f"output{i}" if not name else str(i), item) for i, item in enumerate(value)]
    elif dataclasses.is_dataclass(value) and not isinstance(value, type):
        items = [(item.name, getattr(value, item.name)) for item in dataclasses.fields(value)]
    else:
        cache = hasattr(value, "get_seq_length")
        raise CaptureError(
            f"the forward returns outputs that are not tensors: {name or 'output'} is a {type(value).__name__}",
            hint="use_cache=False: offramp makes caches of its own (insert-cache)"
            if cache
            else "wrap the model in a module that returns tensors only",
        )
    for key, item in items:
        inner = named_outputs(item, f"{name}.{key}" if name else key)
        if twice := sorted(set(found) & set(inner)):
            raise CaptureError(f"the forward returns several outputs that would be called {twice}", hint="other keys")
        found |= inner
    return found


def eager(module: torch.nn.Module, inputs: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """What the model itself computes; its own error becomes a `ForwardError`."""
    try:
        with torch.no_grad(), unchanged(module):
            return named_outputs(module(**inputs))
    except CaptureError:
        raise
    except Exception as error:
        raise forward_error(module, inputs, error) from error


def forward_error(
    module: torch.nn.Module, inputs: Mapping[str, torch.Tensor], error: Exception, call: str = "module(**inputs)"
) -> ForwardError:
    """What a model's own error becomes, which says where it comes from; ``call`` is how the model was called."""
    shapes = ", ".join(f"{name} {list(value.shape)}" for name, value in inputs.items())
    others = (str(Path(torch.__file__).parent), str(Path(__file__).parent))
    frames = [item for item in traceback.extract_tb(error.__traceback__) if not item.filename.startswith(others)]
    place = f" at {frames[-1].filename}:{frames[-1].lineno}" if frames else ""
    return ForwardError(
        f"{type(module).__name__} does not run on the example inputs ({shapes}): "
        f"{type(error).__name__}: {error}{place}",
        hint=f"example inputs that the model takes when it is called as {call}",
    )
