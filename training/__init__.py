"""Training makes rewritten programs good: `fit`, objectives, weights (torch, and accelerate for `fit`)."""

from __future__ import annotations

from typing import TYPE_CHECKING

from offramp._lazy import names_of

if TYPE_CHECKING:
    from offramp.training.encoder_depths import EncoderDepths
    from offramp.training.fit_options import computes_bf16
    from offramp.training.fitting import fit
    from offramp.training.objective_module import remember
    from offramp.training.objectives import (
        CrossEntropy,
        DeepSupervision,
        DepthWeighted,
        LearnedGates,
        Objective,
        SelfDistillation,
        Together,
    )
    from offramp.training.training_run import CurvePoint
    from offramp.training.weights import load_weights, save_weights
    from offramp.training.width_objectives import GateDistillation, LearnerDistillation, WidthBudget

__all__ = [
    "CrossEntropy",
    "CurvePoint",
    "DeepSupervision",
    "DepthWeighted",
    "EncoderDepths",
    "GateDistillation",
    "LearnedGates",
    "LearnerDistillation",
    "Objective",
    "SelfDistillation",
    "Together",
    "WidthBudget",
    "computes_bf16",
    "fit",
    "load_weights",
    "remember",
    "save_weights",
]

_MODULES = {
    "encoder_depths": ("EncoderDepths",),
    "objective_module": ("remember",),
    "fit_options": ("computes_bf16",),
    "fitting": ("fit",),
    "objectives": (
        "CrossEntropy",
        "DeepSupervision",
        "DepthWeighted",
        "LearnedGates",
        "Objective",
        "SelfDistillation",
        "Together",
    ),
    "training_run": ("CurvePoint",),
    "weights": ("load_weights", "save_weights"),
    "width_objectives": ("GateDistillation", "LearnerDistillation", "WidthBudget"),
}

if not TYPE_CHECKING:
    __getattr__ = names_of(__name__, _MODULES, ("torch", "accelerate", "safetensors"), "offramp[train]")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
