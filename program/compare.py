"""The one measure of how far values are from what was expected."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

#: The largest error that is let through, relative to the scale of what is expected (float32).
TOLERANCE = 1e-4
_MASKED = 1e9  # masks hold the dtype's most negative number: it must not hide what is wrong with the rest


def relative_error(found: Tensor, expected: Tensor, least: float = 0.0) -> float:
    """The largest difference, relative to the largest expected magnitude (at least ``least``, 1 where all is 0).

    Infinite where shapes or dtypes differ. Values that are not finite must agree exactly; integers and booleans too.
    """
    found, expected = found.detach(), expected.detach()
    if found.shape != expected.shape or found.dtype != expected.dtype:
        return float("inf")
    if not expected.is_floating_point():
        return 0.0 if torch.equal(found, expected) else float("inf")
    finite = expected.isfinite()
    if not finite.all() or not found.isfinite().all():
        if not torch.equal(finite, found.isfinite()) or not _agree(found[~finite], expected[~finite]):
            return float("inf")
        found, expected = found[finite], expected[finite]
    found, expected = found.double(), expected.double()
    if not expected.numel():
        return 0.0
    sizes = expected.abs()
    usual = sizes < _MASKED
    scale = max(float(torch.where(usual, sizes, 0.0).max()), least) or 1.0
    return float(((found - expected).abs() / torch.where(usual, 0.0, sizes).clamp_min(scale)).max())


def _agree(found: Tensor, expected: Tensor) -> bool:
    return bool(((found == expected) | (found.isnan() & expected.isnan())).all())


def largest_error(found: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> float:
    """The largest error over outputs by name."""
    return max((relative_error(found[name], value) for name, value in expected.items()), default=0.0)


def unlike(
    found: Mapping[str, Tensor], again: Callable[[], Mapping[str, Tensor]], expected: Mapping[str, Tensor]
) -> list[str]:
    """The `differences`; none where what gave ``found`` gives something else ``again``: it draws random numbers."""
    errors = differences(found, expected)
    return [] if errors and differences(found, again()) else errors


def differences(found: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> list[str]:
    """The outputs that differ, and by how much of their greatest value (1, if that is more)."""
    errors = {
        name: relative_error(found[name], value, least=1.0)
        for name, value in expected.items()
        if value.is_floating_point()
    }
    return [f"{name} by {error:.1e}" for name, error in errors.items() if not error <= TOLERANCE]
