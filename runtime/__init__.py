"""Bundle to answers: chain, policies, caches, generation (numpy and onnxruntime only)."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from offramp.runtime.chain import Chain, load
    from offramp.runtime.errors import (
        BundleError,
        CaptureError,
        ExecutionError,
        ExportError,
        InputError,
        OfframpError,
        PassError,
        PolicyError,
        SpecError,
        StructureError,
    )
    from offramp.runtime.policies import Confidence, Depth, Each, Entropy, Never, Patience
    from offramp.runtime.policy import Policy, State
    from offramp.runtime.result import Result, Timing

_MODULES = {
    "chain": ("Chain", "load"),
    "errors": (
        "BundleError",
        "CaptureError",
        "ExecutionError",
        "ExportError",
        "InputError",
        "OfframpError",
        "PassError",
        "PolicyError",
        "SpecError",
        "StructureError",
    ),
    "policies": ("Confidence", "Depth", "Each", "Entropy", "Never", "Patience"),
    "policy": ("Policy", "State"),
    "result": ("Result", "Timing"),
}
_MODULE_OF = {name: module for module, names in _MODULES.items() for name in names}

__all__ = [
    "BundleError",
    "CaptureError",
    "Chain",
    "Confidence",
    "Depth",
    "Each",
    "Entropy",
    "ExecutionError",
    "ExportError",
    "InputError",
    "Never",
    "OfframpError",
    "PassError",
    "Patience",
    "Policy",
    "PolicyError",
    "Result",
    "SpecError",
    "State",
    "StructureError",
    "Timing",
    "load",
]


if not TYPE_CHECKING:  # lazily, so that the other rooms get at errors and manifest without ONNX Runtime

    def __getattr__(name: str) -> object:
        if name not in _MODULE_OF:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        return getattr(importlib.import_module(f"{__name__}.{_MODULE_OF[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
