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
    from offramp.runtime.generate import Generated, Token
    from offramp.runtime.policies import (
        Adaptive,
        Budget,
        Confidence,
        Decay,
        Depth,
        Each,
        Entropy,
        Learned,
        Never,
        Patience,
        ShallowDeep,
        Verify,
    )
    from offramp.runtime.policy import Agreement, Cost, Policy, State
    from offramp.runtime.result import Result, Timing
    from offramp.runtime.sampling import Sampling

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
    "generate": ("Generated", "Token"),
    "policies": (
        "Adaptive",
        "Budget",
        "Confidence",
        "Decay",
        "Depth",
        "Each",
        "Entropy",
        "Learned",
        "Never",
        "Patience",
        "ShallowDeep",
        "Verify",
    ),
    "policy": ("Agreement", "Cost", "Policy", "State"),
    "result": ("Result", "Timing"),
    "sampling": ("Sampling",),
}
_MODULE_OF = {name: module for module, names in _MODULES.items() for name in names}

__all__ = [
    "Adaptive",
    "Agreement",
    "Budget",
    "BundleError",
    "CaptureError",
    "Chain",
    "Confidence",
    "Cost",
    "Decay",
    "Depth",
    "Each",
    "Entropy",
    "ExecutionError",
    "ExportError",
    "Generated",
    "InputError",
    "Learned",
    "Never",
    "OfframpError",
    "PassError",
    "Patience",
    "Policy",
    "PolicyError",
    "Result",
    "Sampling",
    "ShallowDeep",
    "SpecError",
    "State",
    "StructureError",
    "Timing",
    "Token",
    "Verify",
    "load",
]


if not TYPE_CHECKING:  # lazily, so that the other rooms get at errors and manifest without ONNX Runtime

    def __getattr__(name: str) -> object:
        if name not in _MODULE_OF:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        return getattr(importlib.import_module(f"{__name__}.{_MODULE_OF[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
