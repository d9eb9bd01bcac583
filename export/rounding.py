"""Weights of 4 bits, rounded so that products change least on samples.

Two things are chosen. Sixteen steps that reach to a block's greatest weight are wide for all others, so its range ends
where the squares of errors are least, each counted by how large its feature is (the search is that of AWQ for clipping,
arXiv 2306.00978; by the roots of mean squares, for squares trust few samples too much). Then weights are rounded one
after the other, and what that does to a product is made up for by those behind, as far as their features go together
(GPTQ, arXiv 2210.17323, section 3): here among neighbours, so that memory grows with features and not their squares,
and with correlations that count by less than one, since samples are few.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from numpy.typing import NDArray

Array = NDArray[np.float32]
#: The weight [features, n] of a product, rounded to 16 steps: of the name of what the product reads, weight and block.
Rounding = Callable[[str, Array, int], Array]

#: How many features, one behind the other, make up for each other's errors: a multiple of any block.
GROUP = 128
_TRUST = 0.7  # of a correlation of many tokens
_DAMPING = 0.01  # of the mean of squares
_SHARES = torch.linspace(1, 0.5, 11).tolist()  # of the greatest weight: where a range may end
_COLUMNS = 2048  # at a time
_LOW, _HIGH = -8, 7


@dataclass(frozen=True)
class Moments:
    """What a product meets on samples.

    ``sums``, float32 [groups, GROUP, GROUP], are of what two features of a group make multiplied, over all ``tokens``;
    features are grouped as they lie, the last ones with zeros.
    """

    sums: Array
    tokens: int


#: By file, and by the name of a product's input in it.
Seen = Mapping[str, Mapping[str, Moments]]


class Roundings:
    """Weights as they are rounded where they come first, so that equal weights stay one array."""

    def __init__(self, seen: Seen) -> None:
        self._seen = seen
        self._known = dict[tuple[bytes, tuple[int, ...], int], Rounded | None]()

    def of(self, file: str) -> Rounding:
        """Of a file's products."""
        return partial(self._rounded, self._seen.get(file, {}))

    def alone(self, weight: Array, block: int) -> Array:
        """A weight that nothing is multiplied with: its range is chosen, all features being alike."""
        groups = -(-len(weight) // GROUP)
        return rounded(weight, Moments(np.tile(np.eye(GROUP, dtype=np.float32), (groups, 1, 1)), 1), block).weight()

    def tokens(self, file: str, read: str) -> int:
        """How many tokens of samples a product has met."""
        found = self._seen.get(file, {}).get(read)
        return 0 if found is None else found.tokens

    def _rounded(self, seen: Mapping[str, Moments], read: str, weight: Array, block: int) -> Array:
        key = hashlib.sha256(np.ascontiguousarray(weight).data).digest(), weight.shape, block
        if key not in self._known:
            found = seen.get(read)
            self._known[key] = rounded(weight, found, block) if found and _usable(found, weight) else None
        made = self._known[key]
        return weight if made is None else made.weight()


def _usable(moments: Moments, weight: Array) -> bool:
    sums = moments.sums
    return len(sums) == -(-len(weight) // GROUP) and bool(np.isfinite(sums).all() and sums.any())


@dataclass(frozen=True)
class Rounded:
    """A weight [features, n]: ``codes``, int8 [features, n] from -8 to 7, and ``steps``, float32 [blocks, n].

    The greatest weight of each block has -8 steps, as ONNX Runtime's quantizer has it, which finds the same steps.
    """

    codes: torch.Tensor
    steps: torch.Tensor
    block: int

    def weight(self) -> Array:
        """What the codes stand for."""
        steps = self.steps.repeat_interleave(self.block, 0)[: len(self.codes)]
        array: Array = (self.codes * steps).numpy()
        return array


def rounded(weight: Array, moments: Moments, block: int) -> Rounded:
    """A weight on its blocks' steps.

    Args:
        weight: float32 [features, n].
        moments: of its features.
        block: how many weights of a column share a step, one behind the other; `GROUP` is a multiple of it.
    """
    sums = torch.tensor(moments.sums)
    sizes = sums.diagonal(dim1=1, dim2=2).sqrt()
    behind = _behind(sums, _TRUST * moments.tokens / (moments.tokens + GROUP))
    parts = [
        _columns(torch.tensor(weight[:, at : at + _COLUMNS]), sizes[..., None], behind, block)
        for at in range(0, weight.shape[1], _COLUMNS)
    ]
    codes, steps = (torch.cat(each, 1) for each in zip(*parts, strict=True))
    return Rounded(codes, steps, block)


def _behind(sums: torch.Tensor, trust: float) -> torch.Tensor:
    """What an error of each feature takes from those behind it, [groups, GROUP, GROUP]: rows of errors."""
    squares = sums.diagonal(dim1=1, dim2=2)
    matrix = trust * sums
    matrix.diagonal(dim1=1, dim2=2).copy_(squares + _DAMPING * squares.mean())
    factor: torch.Tensor = torch.linalg.cholesky(torch.cholesky_inverse(torch.linalg.cholesky(matrix)), upper=True)
    return factor / factor.diagonal(dim1=1, dim2=2)[:, :, None]


def _columns(
    weight: torch.Tensor, sizes: torch.Tensor, behind: torch.Tensor, block: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes [features, n] and steps [blocks, n] of some columns, by features' sizes [groups, GROUP, 1]."""
    rest = torch.nn.functional.pad(weight, (0, 0, 0, -len(weight) % GROUP)).reshape(-1, GROUP, weight.shape[1])
    codes, steps = torch.zeros(rest.shape, dtype=torch.int8), []
    for start in range(0, GROUP, block):
        own = slice(start, start + block)
        step, greatest = _steps(rest[:, own], sizes[:, own])
        errors = torch.zeros_like(rest[:, own])
        for at in range(block):
            place = start + at
            code = (rest[:, place] / step).round_().clamp_(_LOW, _HIGH)
            code = torch.where(greatest == at, _LOW, code).where(step.isfinite(), 0.0)
            codes[:, place] = code
            errors[:, at] = rest[:, place] - torch.where(code == 0, 0.0, code * step)
            rest[:, place + 1 : own.stop] -= errors[:, at, None] * behind[:, place, place + 1 : own.stop, None]
        rest[:, own.stop :] -= behind[:, own, own.stop :].mT @ errors
        steps.append(step.where(step.isfinite(), 0.0))
    return codes.flatten(0, 1)[: len(weight)], torch.stack(steps, 1).flatten(0, 1)[: -(-len(weight) // block)]


def _steps(rows: torch.Tensor, sizes: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The step of each block [groups, block, n], infinite where all is zero, and which weight is the greatest."""
    greatest = rows.abs().argmax(1, keepdim=True)
    top = rows.gather(1, greatest)
    least, found = torch.full_like(top, torch.inf), torch.full_like(top, torch.inf)
    for share in _SHARES:
        step = torch.where(top == 0, torch.inf, share * top / _LOW)
        near = (rows / step).round_().clamp_(_LOW, _HIGH).mul_(step)
        error = near.sub_(rows).square_().mul_(sizes).sum(1, keepdim=True)
        found = torch.where(error < least, step, found)
        least = torch.minimum(least, error)
    return found[:, 0], greatest[:, 0]
