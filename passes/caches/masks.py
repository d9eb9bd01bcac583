"""What a causal mask says, read off its values."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import fx

from offramp.program.graph import ancestors, attribute, shape

_LEAST, _LARGEST = 256, 8192  # positions at which a mask is looked at
_FEW = 64  # numbers of a tensor that are looked at


def plain_window(
    mask: fx.Node,
    module: torch.nn.Module,
    limit: int | None,
    example: int,
    visible: Callable[[int], torch.Tensor | None],
) -> int | None:
    """The window of a mask that says nothing else: 0 for plainly causal; None for any other mask.

    ``visible(size)`` gives bool [..., size, size], or None where the mask does more than hide. The mask is looked
    at for more positions than any number in its making, so that a window shows; tensors are those of ``module``.
    """
    size = _reach(mask, module, limit, example) + 3
    if limit is not None:
        size = min(size, limit)
    if size > _LARGEST + 3:
        return None
    found = visible(size)
    if found is None or found.shape[-2] not in (1, size) or found.shape[-1] != size:
        return None
    found = found.reshape(-1, found.shape[-2], size)
    if not bool((found == found[:1]).all()):
        return None
    one = found[0]
    if bool(one.all()):
        return 0
    if one.shape[0] != size:
        return None
    distance = torch.arange(size)[:, None] - torch.arange(size)
    window = int(one[-1].sum())
    if bool((one == ((distance >= 0) & (distance < window))).all()):
        return 0 if window == size else window
    return None


def _reach(mask: fx.Node, module: torch.nn.Module, limit: int | None, example: int) -> int:
    """The greatest distance of two positions that the making of a mask may speak of, below ``limit``."""
    nodes = ancestors([mask])
    found = [number for node in nodes for number in _numbers(node, module) if 0 < number < (limit or 2**31)]
    tables = [int(size) for node in nodes if node.op == "get_attr" for size in shape(node)]
    furthest = max([example, *tables, *(max(number, min(1 / number, 2**31)) for number in found)])
    if any(number < 1 for number in found) or any("div" in str(node.target) for node in nodes):
        furthest **= 2  # a number of parts of the distance
    return max(_LEAST, math.ceil(furthest))


def _numbers(node: fx.Node, module: torch.nn.Module) -> list[float]:
    """How great the numbers are that a node gives: constants among its arguments, those of a small tensor."""
    if node.op == "get_attr":
        few = math.prod(shape(node)) <= _FEW
        return [abs(number) for number in attribute(module, str(node.target)).flatten().tolist()] if few else []
    if node.op != "call_function":
        return []
    return _flat(fx.node.map_arg((node.args, node.kwargs), lambda _: None))


def _flat(value: object) -> list[float]:
    if isinstance(value, (tuple, list)):
        return [number for item in value for number in _flat(item)]
    if isinstance(value, dict):
        return [number for item in value.values() for number in _flat(item)]
    return [abs(value)] if isinstance(value, (int, float)) and not isinstance(value, bool) else []
