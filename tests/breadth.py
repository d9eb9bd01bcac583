"""Cases of a test that ``make test`` leaves out, since they are breadth."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import pytest


def slow_but(fast: Iterable[Any], cases: Iterable[Any]) -> list[Any]:
    """The cases of a test or a fixture, slow but for those; tuples are cases of several arguments."""
    kept = list(fast)
    slow = ((each, each if isinstance(each, tuple) else (each,)) for each in cases)
    return [each if each in kept else pytest.param(*values, marks=pytest.mark.slow) for each, values in slow]
