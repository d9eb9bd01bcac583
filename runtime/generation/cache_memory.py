"""Keys and values of earlier tokens: memory for them, and its growth."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from offramp.bundle.expressions import evaluate
from offramp.bundle.manifest import Manifest, Value

Array = NDArray[Any]


def fresh(manifest: Manifest, inputs: Mapping[str, Array], rows: int, capacity: int | None = None) -> dict[str, Array]:
    """Lengths of 0, and empty caches with room for ``capacity`` tokens (as many as there are inputs, if None)."""
    cache = manifest.cache
    if cache is None:
        return {}
    capacity = capacity or chunk_of(manifest, inputs)
    sizes = {manifest.batch or "": rows, cache.capacity: capacity}
    made: dict[str, Array] = {name: empty(manifest.values[name], sizes) for name in cache.buffers}
    made[cache.lengths] = np.zeros(rows, np.int64)
    made[cache.places] = np.arange(capacity)
    if cache.prompt is not None:  # the tokens are all the prompt's
        made[cache.prompt.tokens] = inputs[cache.tokens[0]]
        made[cache.prompt.lengths] = np.full(rows, chunk_of(manifest, inputs))
    return made


def empty(value: Value, sizes: Mapping[str, int]) -> Array:
    """Zeros: what lies behind a row's length is multiplied by 0, so it must be a number."""
    return np.zeros([evaluate(size, sizes) for size in value.shape], value.dtype)


def chunk_of(manifest: Manifest, inputs: Mapping[str, Array]) -> int:
    """How many tokens the inputs hold in each row."""
    assert manifest.cache is not None
    name = manifest.cache.tokens[0]
    return int(inputs[name].shape[axis_of(manifest.values[name], manifest.cache.chunk)])


def axis_of(value: Value, name: str) -> int:
    """The axis of a value whose size is that of the named axis; -1 where there is none."""
    return value.shape.index(name) if name in value.shape else -1
