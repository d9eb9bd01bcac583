"""Inputs of a model that follow from how many tokens there are: padding masks and positions."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from offramp.runtime.manifest import DTYPES, Implied


def fill(implied: Implied, sizes: Sequence[int]) -> NDArray[Any]:
    """What an implied input holds in these sizes; float32 where numpy has no such dtype (bfloat16)."""
    made = np.full(sizes, implied.value, implied.dtype if implied.dtype in DTYPES else "float32")
    if implied.axis is not None:
        steps = np.arange(sizes[implied.axis], dtype=made.dtype)
        made += steps.reshape([-1 if axis == implied.axis else 1 for axis in range(len(sizes))])
    if implied.hidden is not None:
        made[..., np.triu(np.ones(sizes[-2:], bool), 1)] = implied.hidden
    return made
