"""Every error that offramp raises on purpose.

::

    OfframpError
    ├── ModelError          a model's name leads nowhere, or what it leads to is no model (also a ValueError)
    ├── CaptureError        torch.export could not capture the model, or what it captured differs
    │   └── ForwardError    the model itself does not run on the example inputs
    ├── StructureError      the captured graph has no stack that an exit could leave
    ├── SpecError           a pipeline text, or a pass's options, name something that is not there
    ├── PassError           a pass could not apply, or broke its contract
    ├── TrainingError       training met a loss or a gradient that is not finite
    ├── ExportError         a segment could not be lowered, or does not compute what torch computes
    ├── BundleError         a bundle is missing something, altered, unsafe or too new
    ├── InputError          the inputs of a run do not fit the bundle (also a ValueError)
    ├── PolicyError         a policy asks for exits or scores that the bundle does not have
    └── ExecutionError      ONNX Runtime failed in a segment, or is not set up as asked
"""

from __future__ import annotations


class OfframpError(Exception):
    """Base of all: ``str(error)`` says what failed, where, what was expected and found, and what to try.

    ``hint`` is the part that says what to try; it is appended to the message.
    """

    stage = "run"

    def __init__(self, message: str, *, hint: str | None = None) -> None:
        super().__init__(message if hint is None else f"{message}\n  try: {hint}")
        self.reason = message
        self.hint = hint


class ModelError(OfframpError, ValueError):
    """A model's name leads nowhere; base of the errors of `resolve`."""

    stage = "model"


class ModelNameError(ModelError):
    """The name has none of the four forms."""


class FactoryMissingError(ModelError):
    """There is no such file, module, or function in it."""


class FactoryResultError(ModelError):
    """A factory returned something else than a module and its example inputs."""


class PretrainedModelError(ModelError):
    """A directory or hub id could not be loaded, or it takes an input that no example is known for."""


class CaptureError(OfframpError):
    """torch.export could not capture the model, or the captured graph differs from eager."""

    stage = "capture"


class ForwardError(CaptureError):
    """The model does not run on the example inputs, whoever calls it; the cause is the model's own error."""

    stage = "model"


class StructureError(OfframpError):
    """The captured graph has no stack of transformer blocks that an exit could leave."""

    stage = "structure"


class SpecError(OfframpError):
    """A pipeline text, or a pass's options, name a pass, option, stack or block that is not there."""

    stage = "rewrite"


class PassError(OfframpError):
    """A pass could not apply, or its result broke a check of the verifier."""

    stage = "rewrite"


class TrainingError(OfframpError):
    """Training met a loss or a gradient that is not finite."""

    stage = "train"


class ExportError(OfframpError):
    """A segment could not be lowered to ONNX, or does not compute what torch computes."""

    stage = "export"


class BundleError(OfframpError):
    """A bundle is missing something, altered, unsafe or written by a newer version."""

    stage = "load"


class InputError(OfframpError, ValueError):
    """The inputs of a run do not fit the bundle: name, dtype, rank, size, or an empty batch."""


class PolicyError(OfframpError):
    """A policy asks for an exit or a score that the bundle does not have."""


class ExecutionError(OfframpError):
    """ONNX Runtime failed in a segment, or could not be set up as asked."""
