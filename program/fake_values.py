"""What calls would give, as shapes and dtypes: the blocks of a model are alike, so most were asked before."""

from __future__ import annotations

from collections.abc import Hashable
from typing import Any

import torch
from torch import fx
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.fx.experimental.symbolic_shapes import has_free_unbacked_symbols

_SYMBOLIC = (torch.SymInt, torch.SymFloat, torch.SymBool)
_KNOWN = "_offramp_known"  # a mode's attribute: its results hold the mode, and go with it


class _UnknownError(Exception):
    """A value that no key describes."""


def fake_result(mode: FakeTensorMode, target: Any, args: Any, kwargs: Any) -> Any:
    """What a call of ``target`` would give, as shapes and dtypes: nodes among the arguments stand for their values.

    Calls with arguments of the same shapes, strides and dtypes give the very same value.
    """
    values, named = fx.node.map_arg((args, kwargs), lambda arg: arg.meta["val"])
    key = call_shapes(mode, target, values, named)
    known: dict[Hashable, Any] = vars(mode).setdefault(_KNOWN, {})
    if key is not None and key in known:
        return known[key]
    with mode, torch.no_grad():
        made = target(*values, **named)
    if key is not None and _lasting(made):
        known[key] = made
    return made


def call_shapes(mode: FakeTensorMode, target: Any, values: Any, named: Any) -> Hashable | None:
    """Equal for calls whose arguments have the same shapes, strides and dtypes; None where these do not say it all."""
    if not isinstance(target, torch._ops.OpOverload) or target._schema.is_mutable:
        return None
    try:
        return target, _described(mode, values), _described(mode, named)
    except _UnknownError:
        return None


def _described(mode: FakeTensorMode, value: Any) -> Hashable:
    if isinstance(value, torch.Tensor):
        return _tensor(mode, value)
    if isinstance(value, _SYMBOLIC):
        return type(value), value.node.expr
    if isinstance(value, (tuple, list)):
        return tuple(_described(mode, item) for item in value)
    if isinstance(value, dict):
        return tuple((key, _described(mode, item)) for key, item in value.items())
    if value is None or isinstance(value, (bool, int, float, str)):
        return type(value), repr(value)  # 0.0 and -0.0, nan
    if isinstance(value, (torch.dtype, torch.device, torch.layout, torch.memory_format)):
        return value
    raise _UnknownError


def _tensor(mode: FakeTensorMode, value: torch.Tensor) -> Hashable:
    if not isinstance(value, FakeTensor) or value.fake_mode is not mode or value.constant is not None:
        raise _UnknownError
    sizes = (*value.shape, *value.stride(), value.storage_offset())
    known = tuple(size.node.expr if isinstance(size, torch.SymInt) else size for size in sizes)
    return value.dtype, value.device, value.requires_grad, known


def _lasting(made: Any) -> bool:
    """Whether another call would give an equal value: one of a size that only a run tells has its own each time."""
    values = made if isinstance(made, (tuple, list)) else (made,)
    return all(
        isinstance(value, FakeTensor) and value.constant is None and not has_free_unbacked_symbols(value)
        for value in values
    )
