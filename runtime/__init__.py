"""Bundle to answers: chain, policies, caches, generation (numpy and onnxruntime only)."""

from __future__ import annotations

from typing import TYPE_CHECKING

from offramp._lazy import names_of

if TYPE_CHECKING:
    from offramp.runtime.chain import Chain, load
    from offramp.runtime.generation.generator import Generator
    from offramp.runtime.generation.sampling import Sampling
    from offramp.runtime.generation.tokens import Generated, Token
    from offramp.runtime.policies.base import Agreement, Bound, Cost, Policy, State
    from offramp.runtime.policies.builtin import (
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
        Width,
    )
    from offramp.runtime.result import Result, Timing

_MODULES = {
    "chain": ("Chain", "load"),
    "generation.generator": ("Generator",),
    "generation.tokens": ("Generated", "Token"),
    "policies.builtin": (
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
        "Width",
    ),
    "policies.base": ("Agreement", "Bound", "Cost", "Policy", "State"),
    "result": ("Result", "Timing"),
    "generation.sampling": ("Sampling",),
}

__all__ = [
    "Adaptive",
    "Agreement",
    "Bound",
    "Budget",
    "Chain",
    "Confidence",
    "Cost",
    "Decay",
    "Depth",
    "Each",
    "Entropy",
    "Generated",
    "Generator",
    "Learned",
    "Never",
    "Patience",
    "Policy",
    "Result",
    "Sampling",
    "ShallowDeep",
    "State",
    "Timing",
    "Token",
    "Verify",
    "Width",
    "load",
]

if not TYPE_CHECKING:
    __getattr__ = names_of(__name__, _MODULES)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
