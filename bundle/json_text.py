"""The manifest, and parts of it that a user gives, from JSON and to JSON."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from typing import Any, TypeVar, cast

import numpy as np

from offramp.bundle.checks import generation_problems, problems_of
from offramp.bundle.manifest import FORMAT, MANIFEST_FILE, VERSION, Generation, Manifest
from offramp.bundle.parse import decode
from offramp.bundle.preprocessing import Preprocessing, preprocessing_problems
from offramp.errors import BundleError

Section = TypeVar("Section", Generation, Preprocessing)


def to_json(manifest: Manifest) -> str:
    """The text of ``manifest.json``: fields in the order of the dataclasses, newline at the end."""
    return json.dumps(_plain(manifest), indent=1, ensure_ascii=False, allow_nan=False) + "\n"


def from_json(text: str) -> Manifest:
    """Read and check ``manifest.json``.

    Raises:
        BundleError: the text is no JSON, or of another format or version; else fields are missing, mistyped or
            unknown; else names refer to nothing, or numbers make no sense; else values are made twice, or used where
            they are not there. Of the first of these that applies all problems are in one message, one per line.
    """
    try:
        data = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise BundleError(f"{MANIFEST_FILE} is not JSON: {error}") from error
    if not isinstance(data, dict) or data.get("format") != FORMAT:
        raise BundleError(f'{MANIFEST_FILE} is not one of offramp: it lacks "format": "{FORMAT}"')
    version = data.get("version")
    if isinstance(version, int) and version != VERSION:
        raise BundleError(
            f"the bundle has format version {version}, this offramp reads {VERSION}",
            hint="pip install --upgrade offramp" if version > VERSION else "export the model again",
        )
    problems: list[str] = []
    manifest: Manifest = decode(Manifest, data, "", problems)
    problems = problems or problems_of(manifest)
    if problems:
        raise BundleError(f"{MANIFEST_FILE} is wrong:\n  " + "\n  ".join(problems))
    return manifest


def section(kind: type[Section], data: Mapping[str, Any]) -> Section:
    """A part of the manifest out of a user's mapping, in which tuples, arrays and numpy's numbers may stand for JSON's.

    Raises:
        BundleError: unknown keys, wrong types, or values that make no sense; all problems in one message.
    """
    name = kind.__name__.lower()
    if not isinstance(data, Mapping):
        raise BundleError(f"{name}: expected a mapping, found {data!r}")
    problems: list[str] = []
    made = decode(kind, _plain(data), name, problems)
    if not problems and isinstance(made, Generation):
        problems = list(generation_problems(made))
    if not problems and isinstance(made, Preprocessing):
        problems = list(preprocessing_problems(made))
    if problems:
        hint = f"{name} has the keys {', '.join(f.name for f in fields(kind))}"
        raise BundleError(f"{name} is wrong:\n  " + "\n  ".join(problems), hint=hint)
    return cast("Section", made)


def _plain(value: object) -> object:
    """Dataclasses and mappings as dicts, sequences and arrays as lists, numpy's numbers as Python's: what JSON has."""
    if is_dataclass(value):
        return {f.name: _plain(getattr(value, f.name)) for f in fields(value)}
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, np.generic | np.ndarray):
        return value.tolist()
    return value
