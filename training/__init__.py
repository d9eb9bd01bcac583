"""Training: makes rewritten programs good. `fit` and objectives need torch; calibration does not."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from offramp.training.calibration import Calibration, calibrate

_MODULE_OF = {"Calibration": "calibration", "calibrate": "calibration"}

__all__ = ["Calibration", "calibrate"]


if not TYPE_CHECKING:  # lazily, so that a machine that calibrates needs no torch

    def __getattr__(name: str) -> object:
        if name not in _MODULE_OF:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        return getattr(importlib.import_module(f"{__name__}.{_MODULE_OF[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
