"""offramp gives PyTorch transformers early exits and runs them under ONNX Runtime.

The names below are loaded when first used, so that ``import offramp`` needs numpy and ONNX Runtime only::

    offramp.load, Chain, Result, Token, Generated, Sampling, OfframpError                    runtime
    offramp.Never, Depth, Confidence, Entropy, Patience, Learned, Decay, ShallowDeep, ...    runtime
    offramp.calibrate                                                                        runtime
    offramp.capture, Program, apply, InsertExits, InsertAdapter, ..., save                   offramp[torch]

The rooms (``offramp.program``, ``passes``, ``training``, ``export``, ``bundle``, ``runtime``, ``calibration``) and
``offramp.errors`` are reached the same way.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from offramp._lazy import names_of

if TYPE_CHECKING:
    from offramp.calibration import calibrate
    from offramp.errors import OfframpError
    from offramp.export import save
    from offramp.passes import (
        Canonicalize,
        InsertAcm,
        InsertAdapter,
        InsertCache,
        InsertExits,
        InsertScores,
        RemoveExits,
        SplitModalities,
        Truncate,
        apply,
    )
    from offramp.program import Program, capture
    from offramp.runtime import (
        Adaptive,
        Budget,
        Chain,
        Confidence,
        Decay,
        Depth,
        Each,
        Entropy,
        Generated,
        Learned,
        Never,
        Patience,
        Policy,
        Result,
        Sampling,
        ShallowDeep,
        State,
        Token,
        Verify,
        Width,
        load,
    )

__version__ = "0.1.0"

__all__ = [
    "Adaptive",
    "Budget",
    "Canonicalize",
    "Chain",
    "Confidence",
    "Decay",
    "Depth",
    "Each",
    "Entropy",
    "Generated",
    "InsertAcm",
    "InsertAdapter",
    "InsertCache",
    "InsertExits",
    "InsertScores",
    "Learned",
    "Never",
    "OfframpError",
    "Patience",
    "Policy",
    "Program",
    "RemoveExits",
    "Result",
    "Sampling",
    "ShallowDeep",
    "SplitModalities",
    "State",
    "Token",
    "Truncate",
    "Verify",
    "Width",
    "apply",
    "calibrate",
    "capture",
    "load",
    "save",
]

_NAMES = {
    "program": ("Program", "capture"),
    "passes": (
        "Canonicalize",
        "InsertAcm",
        "InsertAdapter",
        "InsertCache",
        "InsertExits",
        "InsertScores",
        "RemoveExits",
        "SplitModalities",
        "Truncate",
        "apply",
    ),
    "export": ("save",),
    "runtime": (
        "Adaptive",
        "Budget",
        "Chain",
        "Confidence",
        "Decay",
        "Depth",
        "Each",
        "Entropy",
        "Generated",
        "Learned",
        "Never",
        "Patience",
        "Policy",
        "Result",
        "Sampling",
        "ShallowDeep",
        "State",
        "Token",
        "Verify",
        "Width",
        "load",
    ),
    "calibration": ("calibrate",),
    "errors": ("OfframpError",),
}
_ROOMS = ("program", "passes", "training", "export", "bundle", "runtime", "calibration")

if not TYPE_CHECKING:  # a type checker shall see the imports above, and refuse other names
    __getattr__ = names_of(
        __name__,
        {room: (room, *_NAMES.get(room, ())) for room in (*_ROOMS, "errors")},
        ("torch", "onnx", "onnxscript", "networkx", "safetensors", "rich"),
        "offramp[torch]",
    )


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__, *_ROOMS})
