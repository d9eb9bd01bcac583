"""Inputs of a model that follow from how many tokens there are: padding masks and positions."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from offramp.bundle.expressions import evaluate
from offramp.bundle.manifest import DTYPES, Implied, Manifest
from offramp.errors import InputError

GREATEST = float(np.finfo(np.float32).max)
LOWEST = -GREATEST
_HIDDEN = -1e4  # whatever is below hides a key as well: exp(-1e4) is 0 in every dtype
_Rows = list[NDArray[np.int64]]


def fill(implied: Implied, sizes: Sequence[int]) -> NDArray[Any]:
    """What an implied input holds in these sizes; float32 where numpy has no such dtype (bfloat16)."""
    made = np.full(sizes, implied.value, implied.dtype if implied.dtype in DTYPES else "float32")
    if implied.axis is not None:
        steps = np.arange(sizes[implied.axis], dtype=made.dtype)
        made += steps.reshape([-1 if axis == implied.axis else 1 for axis in range(len(sizes))])
    if implied.hidden is not None:
        made[..., np.triu(np.ones(sizes[-2:], bool), 1)] = implied.hidden
    return made


class ImpliedInputs:
    """What a user gives of the inputs that a bundle's graph makes itself: right where it says the same.

    Attributes:
        names: Those of the inputs.
    """

    def __init__(self, manifest: Manifest) -> None:
        cache = manifest.cache
        self._known = dict(cache.implied) if cache else {}
        self._batch, self._chunk = manifest.batch, cache.chunk if cache else ""
        self.names = self._known.keys()

    def check(self, inputs: Mapping[str, Any], sizes: Mapping[str, int]) -> None:
        """Inputs of one pass, given the lengths of axes.

        Raises:
            InputError: one is not what the graph makes.
        """
        for name in self._known.keys() & inputs.keys():
            self._same(name, inputs[name], sizes)

    def kept(self, inputs: Mapping[str, Any], rows: _Rows) -> _Rows:
        """Rows of token ids without what the masks among ``inputs`` say is padding.

        Raises:
            InputError: padding stands between tokens, or another input is not what the graph makes for the others.
        """
        counts = [row.size for row in rows]
        given = {}
        for name in self._known.keys() & inputs.keys():
            if self._by_token(self._known[name]):
                given[name] = self._parts(name, inputs[name], counts)
            else:
                self._same(name, inputs[name], {self._chunk: max(counts, default=0), self._batch or "": len(rows)})
        masks = {name: parts for name, parts in given.items() if self._known[name].padding is not None}
        found = []
        for at, row in enumerate(rows):
            kept = np.ones(row.size, bool)
            for number, (name, parts) in enumerate(masks.items()):
                seen = self._seen(name, parts[at], at)
                if number and (kept != seen).any():
                    raise InputError(f"row {at}: {' and '.join(sorted(masks))} differ in which tokens are padding")
                kept = seen
            for name, parts in given.items():
                self._fits(name, parts[at][kept], at)
            found.append(row[kept])
        return found

    def _by_token(self, item: Implied) -> bool:
        """Whether an input has one number for each token."""
        axes = [size for size in item.shape if size != 1]
        return axes == [self._chunk] or (axes == [self._batch, self._chunk] and item.shape[0] == self._batch)

    def _parts(self, name: str, given: Any, counts: Sequence[int]) -> list[NDArray[np.float64]]:
        """The numbers of each row's tokens."""
        shape = self._known[name].shape
        rows: Sequence[Any] = given if hasattr(given, "__len__") else []
        if self._batch not in shape:
            parts = [_numbers(name, given, len(shape))] * len(counts)
        else:
            parts = [_numbers(name, row, len(shape) - 1) for row in rows]
        if [part.size for part in parts] != list(counts):
            raise InputError(
                f"{name!r} has rows of {[part.size for part in parts]} places; the token ids have {list(counts)}"
            )
        return [part.reshape(-1) for part in parts]

    def _seen(self, name: str, part: NDArray[np.float64], row: int) -> NDArray[np.bool_]:
        """Which tokens of a row a mask does not hide."""
        item = self._known[name]
        seen: NDArray[np.bool_] = part == item.value
        hidden = part == max(item.padding or 0.0, _HIDDEN)
        if not (seen | hidden).all():
            wrong = part[~(seen | hidden)][0]
            raise InputError(
                f"{name!r} is {wrong:g} in row {row}; it is {item.value:g} for a token and {item.padding:g} for padding"
            )
        places = np.flatnonzero(seen)
        if part.size and not places.size:
            raise InputError(f"{name!r} hides all tokens of row {row}")
        if places.size and places[-1] - places[0] + 1 != places.size:
            raise InputError(
                f"{name!r} hides tokens of row {row} between others; padding is at the ends of a row",
                hint="the row without those tokens",
            )
        return seen

    def _fits(self, name: str, part: NDArray[np.float64], row: int) -> None:
        """Check the numbers of a row's tokens, padding left out."""
        item = self._known[name]
        wanted = item.value + (np.arange(part.size) if item.axis is not None else np.zeros(part.size))
        if not np.array_equal(part, np.maximum(wanted, _HIDDEN)):
            raise InputError(
                f"{name!r} is {_short(part)} for the tokens of row {row}; the graph makes {_short(wanted)} itself",
                hint=_hint(name, item),
            )

    def _same(self, name: str, given: Any, sizes: Mapping[str, int]) -> None:
        item = self._known[name]
        array = _numbers(name, given, len(item.shape))
        try:
            shape = [evaluate(size, sizes) for size in item.shape]
        except (KeyError, ValueError) as error:
            raise InputError(f"{name!r} is made by the graph itself", hint=f"leave {name!r} out") from error
        if list(array.shape) != shape:
            raise InputError(f"{name!r} has the shape {list(array.shape)}, expected {shape}")
        wanted = fill(item, shape).astype(np.float64)
        same = array == np.maximum(wanted, _HIDDEN)
        if not same.all():
            place = tuple(np.argwhere(~same)[0].tolist())
            raise InputError(
                f"{name!r} is {array[place]:g} at {list(place)}; the graph makes {wanted[place]:g} there itself",
                hint=_hint(name, item),
            )


def _numbers(name: str, given: Any, rank: int) -> NDArray[np.float64]:
    try:
        array = np.asarray(given)
        if array.dtype.kind not in "biuf":
            raise TypeError(f"dtype {array.dtype}")
    except (ValueError, TypeError) as error:
        raise InputError(f"{name!r} cannot be an array of numbers: {error}") from error
    if array.ndim != rank:
        raise InputError(f"{name!r} has {array.ndim} axes in {_short(array.reshape(-1))}, expected {rank}")
    return np.maximum(array.astype(np.float64), _HIDDEN)


def _hint(name: str, item: Implied) -> str:
    if item.axis is not None:
        return f"leave {name!r} out: positions count the tokens of a row"
    return f"leave {name!r} out, and give rows without padding: those of another length in a call of their own"


def _short(numbers: NDArray[Any]) -> str:
    shown: Iterator[str] = (f"{number:g}" for number in numbers[:8].tolist())
    return f"[{', '.join(shown)}{', ...' if numbers.size > 8 else ''}]"
