"""Training: makes rewritten programs good. `fit` and objectives need torch; `calibrate` and `report` do not."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from offramp.training.calibration import Calibration, calibrate
    from offramp.training.judge import Report, report
    from offramp.training.learner import remember
    from offramp.training.loop import Point, fit
    from offramp.training.objectives import (
        CrossEntropy,
        DeepSupervision,
        DepthWeighted,
        LearnedGates,
        Objective,
        SelfDistillation,
        Together,
    )
    from offramp.training.weights import load_weights, save_weights

__all__ = [
    "Calibration",
    "CrossEntropy",
    "DeepSupervision",
    "DepthWeighted",
    "LearnedGates",
    "Objective",
    "Point",
    "Report",
    "SelfDistillation",
    "Together",
    "calibrate",
    "fit",
    "load_weights",
    "remember",
    "report",
    "save_weights",
]

_NAMES = {
    "calibration": ("Calibration", "calibrate"),
    "judge": ("Report", "report"),
    "learner": ("remember",),
    "loop": ("Point", "fit"),
    "objectives": (
        "CrossEntropy",
        "DeepSupervision",
        "DepthWeighted",
        "LearnedGates",
        "Objective",
        "SelfDistillation",
        "Together",
    ),
    "weights": ("load_weights", "save_weights"),
}
_MODULE_OF = {name: module for module, names in _NAMES.items() for name in names}


if not TYPE_CHECKING:  # lazily, so that a machine that calibrates needs no torch

    def __getattr__(name: str) -> object:
        if name not in _MODULE_OF:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        try:
            module = importlib.import_module(f"{__name__}.{_MODULE_OF[name]}")
        except ModuleNotFoundError as error:
            if error.name not in ("torch", "accelerate", "safetensors"):
                raise
            raise ImportError(
                f"offramp.training.{name} needs {error.name}, which is not installed: pip install 'offramp[train]'"
            ) from error
        return getattr(module, name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
