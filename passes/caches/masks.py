"""What a causal mask says, read off its values."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import fx

from offramp.program.graph import ancestors, shape

_LARGEST = 8192  # positions at which a mask is looked at


def plain_window(
    mask: fx.Node, limit: int | None, example: int, visible: Callable[[int], torch.Tensor | None]
) -> int | None:
    """The window of a mask that says nothing else: 0 for plainly causal; None for any other mask.

    ``visible(size)`` gives bool [..., size, size], or None where the mask does more than hide. The mask is looked
    at for more positions than any number in its making, so that a window shows.
    """
    numbers = [example, *(_numbers(mask))]
    size = max(number for number in numbers if number <= _LARGEST) + 3
    if limit is not None:
        size = min(size, limit)
    elif max(numbers) > _LARGEST:
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


def _numbers(mask: fx.Node) -> list[int]:
    """Whole numbers that go into the making of a mask: constants, and sizes of tables."""
    found: list[int] = []
    for node in ancestors([mask]):
        if node.op == "get_attr":
            found += [int(size) for size in shape(node)]
            value = node.meta["val"]
            if value.numel() == 1 and getattr(value, "constant", None) is not None:
                found.append(abs(int(value.constant)))
        for arg in fx.node.map_arg((node.args, node.kwargs), lambda _: None) if node.op == "call_function" else ():
            found += [abs(int(item)) for item in _flat(arg) if 0 < abs(item) < 2**31]
    return found


def _flat(value: object) -> list[float]:
    if isinstance(value, (tuple, list)):
        return [number for item in value for number in _flat(item)]
    if isinstance(value, dict):
        return [number for item in value.values() for number in _flat(item)]
    return [value] if isinstance(value, (int, float)) and not isinstance(value, bool) else []
