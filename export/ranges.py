"""The range of each block of weights of 4 bits, by what its errors do: to features that are large, more.

Sixteen steps that reach to the greatest weight are wide for all others. Where a block's range ends earlier, the weights
beyond are further off, and the others nearer. What an error adds to a product is the weight's times the feature's, so
squares of errors count by the features' sizes on samples, the roots of their mean squares (the search is that of AWQ
for clipping, arXiv 2306.00978; to count by the squares themselves trusts few samples too much).
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from functools import partial

import numpy as np
import torch
from numpy.typing import NDArray

Array = NDArray[np.float32]
#: By file, and by the name of a product's input in it: the sums of its features' squares over all tokens of samples.
Sizes = Mapping[str, Mapping[str, Array]]

#: The weight [features, n] of a product within its ranges: of the name of what the product reads, weight and block.
Within = Callable[[str, Array, int], Array]

_SHARES = torch.linspace(1, 0.5, 11).tolist()  # of the greatest weight: where a range may end
_COLUMNS = 512  # at a time


class Ranges:
    """Weights within their blocks' ranges: those where they come first, so that equal weights stay one array."""

    def __init__(self, sizes: Sizes) -> None:
        self._sizes = sizes
        self._known = dict[tuple[bytes, tuple[int, ...], int], Array | None]()

    def of(self, file: str) -> Within:
        """Of a file's products."""
        return partial(self._within, self._sizes.get(file, {}))

    def _within(self, sizes: Mapping[str, Array], read: str, weight: Array, block: int) -> Array:
        key = hashlib.sha256(np.ascontiguousarray(weight).data).digest(), weight.shape, block
        if key not in self._known:
            size = sizes.get(read, np.zeros(0, np.float32))
            usable = size.shape == weight.shape[:1] and np.isfinite(size).all() and size.any()
            self._known[key] = limits(weight, np.sqrt(size), block) if usable else None
        ends = self._known[key]
        return weight if ends is None else within(weight, ends, block)


def _blocks_of(array: Array, block: int) -> torch.Tensor:
    """Rows of blocks: [n, blocks, block], of [features, n]."""
    columns = torch.from_numpy(array.T.copy())
    return torch.nn.functional.pad(columns, (0, -columns.shape[1] % block)).reshape(len(columns), -1, block)


def _columns(weight: Array) -> list[slice]:
    return [slice(start, start + _COLUMNS) for start in range(0, weight.shape[1], _COLUMNS)]


def limits(weight: Array, sizes: Array, block: int) -> Array:
    """Where the range of each block ends, float32 [n, blocks]: of some places that where errors do least.

    Args:
        weight: float32 [features, n].
        sizes: how much the square of an error counts, float32 [features].
        block: how many weights of a column share a range, one behind the other.
    """
    counts = _blocks_of(sizes[:, None], block)
    found = [_limits(_blocks_of(weight[:, some], block), counts) for some in _columns(weight)]
    array: Array = torch.cat(found).numpy()
    return array


def _limits(rows: torch.Tensor, counts: torch.Tensor) -> torch.Tensor:
    greatest = rows.abs().amax(-1, keepdim=True)
    top = rows.gather(-1, rows.abs().argmax(-1, keepdim=True))
    least, found = torch.full_like(top, torch.inf), greatest.clone()
    for share in _SHARES:
        step = torch.where(top == 0, 1.0, -share * top / 8)  # the greatest weight is -8 steps, as the quantizer has it
        error = (rows / step).round_().clamp_(-8, 7).mul_(step).sub_(rows).square_().mul_(counts).sum(-1, keepdim=True)
        found = torch.where(error < least, share * greatest, found)
        least = torch.minimum(least, error)
    return found[..., 0]


def within(weight: Array, ends: Array, block: int) -> Array:
    """The weight [features, n] within the ranges of its blocks, which go one step less far on the other side."""
    found = np.empty_like(weight)
    for some in _columns(weight):
        rows, far = _blocks_of(weight[:, some], block), torch.from_numpy(ends[some])[..., None]
        up = rows.gather(-1, rows.abs().argmax(-1, keepdim=True)) > 0
        high, low = torch.where(up, far, far * 7 / 8), torch.where(up, -far * 7 / 8, -far)
        kept = torch.minimum(torch.maximum(rows, low), high)
        found[:, some] = kept.reshape(len(kept), -1)[:, : len(weight)].numpy().T
    return found
