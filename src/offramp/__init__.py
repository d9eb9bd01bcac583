"""offramp gives PyTorch transformers early exits and runs them under ONNX Runtime.

The names below are loaded when first used, so that ``import offramp`` needs numpy and ONNX Runtime only::

    offramp.load, Chain, Result, Token, Generated, Sampling, OfframpError                    runtime
    offramp.Never, Depth, Confidence, Entropy, Patience, Learned, Decay, ShallowDeep, ...    runtime
    offramp.calibrate                                                                        runtime
    offramp.capture, Program, apply, InsertExits, InsertAdapter, ..., save                   offramp[torch]

The rooms (``offramp.program``, ``passes``, ``training``, ``export``, ``runtime``) are reached the same way.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from offramp.export import save
    from offramp.passes import (
        Canonicalize,
        InsertAdapter,
        InsertCache,
        InsertExits,
        InsertScores,
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
        OfframpError,
        Patience,
        Policy,
        Result,
        Sampling,
        ShallowDeep,
        State,
        Token,
        Verify,
        load,
    )
    from offramp.training import calibrate

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
    "Result",
    "Sampling",
    "ShallowDeep",
    "State",
    "Token",
    "Truncate",
    "Verify",
    "apply",
    "calibrate",
    "capture",
    "load",
    "save",
]

_NAMES = {
    "program": ("Program", "capture"),
    "passes": ("Canonicalize", "InsertAdapter", "InsertCache", "InsertExits", "InsertScores", "Truncate", "apply"),
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
        "OfframpError",
        "Patience",
        "Policy",
        "Result",
        "Sampling",
        "ShallowDeep",
        "State",
        "Token",
        "Verify",
        "load",
    ),
    "training": ("calibrate",),
}
_ROOM_OF = {name: room for room, names in _NAMES.items() for name in names}
_TORCH_SIDE = frozenset({"torch", "onnx", "onnxscript", "networkx", "safetensors", "rich"})


if not TYPE_CHECKING:  # a type checker shall see the imports above, and refuse other names

    def __getattr__(name: str) -> object:
        room = name if name in _NAMES else _ROOM_OF.get(name)
        if room is None:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        try:
            module = importlib.import_module(f"{__name__}.{room}")
        except ModuleNotFoundError as error:
            if (error.name or "").partition(".")[0] not in _TORCH_SIDE:
                raise
            raise ImportError(
                f"offramp.{name} needs {error.name}, which is not installed: pip install 'offramp[torch]'"
            ) from error
        return module if name == room else getattr(module, name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__, *_NAMES})
