"""Translations: the ONNX models of a program's subgraphs, each made once, in this process and on disk for all."""

from __future__ import annotations

import hashlib
import json
import logging
import os
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from secrets import token_hex

import onnx
import onnx_ir
import onnxscript
import torch
from google.protobuf.message import DecodeError
from torch import fx

import offramp.passes.infra
import offramp.program
from offramp.export.lowering.lower import lowered, translate
from offramp.export.lowering.node_builder import Target
from offramp.export.lowering.outline import Computation, outline
from offramp.export.lowering.table import lowerings, onnx_functions
from offramp.export.subgraph import Subgraph

_log = logging.getLogger(__name__)
_KEPT = 8000  # files; a model's are a few, of some 10 kB
_ROOMS = (Path(__file__).parent, *(Path(room.__path__[0]) for room in (offramp.program, offramp.passes.infra)))


@dataclass(frozen=True)
class Translation:
    """A subgraph as an ONNX model: inputs ``in0...``, then its weights ``w0...``; outputs ``out0...``.

    Equal computations have equal keys, and the very same model.
    """

    inputs: tuple[fx.Node, ...]
    weights: tuple[fx.Node, ...]
    outputs: tuple[fx.Node, ...]
    key: str
    model: onnx.ModelProto


class Translations:
    """The models of subgraphs for one target.

    They are kept in ``$OFFRAMP_CACHE``, else in ``$XDG_CACHE_HOME/offramp`` or ``~/.cache/offramp``; with
    ``OFFRAMP_CACHE=`` (empty) none are, nor with ``OFFRAMP_DUMP``, which shows how each is made. They go by the
    computation before and after it was lowered, by the code that does that and by the versions of what it uses; what
    functions of a user's own lower or translate is not kept. Processes may share the folder.
    """

    def __init__(self, target: Target = "ort") -> None:
        self._target: Target = target
        self._known: dict[str, tuple[str, onnx.ModelProto]] = {}  # by the computation before it was lowered
        self._models: dict[str, onnx.ModelProto] = {}  # and after

    def __len__(self) -> int:
        return len(self._models)

    def of(self, subgraph: Subgraph) -> Translation:
        """The subgraph's translation.

        Raises:
            ExportError: an operator has no ONNX form; the message names it and its place in the model.
        """
        given = outline(subgraph)
        if given.key not in self._known:
            self._known[given.key] = self._recalled(given) or self._made(given, subgraph.name)
        key, model = self._known[given.key]
        return Translation(given.inputs, given.weights, given.outputs, key, self._models.setdefault(key, model))

    def _recalled(self, given: Computation) -> tuple[str, onnx.ModelProto] | None:
        """The key and the model of an equal computation that was translated before."""
        folder = _folder()
        if folder is None or _foreign(_operators(given)):
            return None
        path = self._path(folder, given)
        try:
            kept = json.loads(path.read_bytes())
            key, operators = str(kept["key"]), [str(name) for name in kept["operators"]]
        except (OSError, ValueError, KeyError, TypeError):
            return None
        model = self._models.get(key) or _read(folder / f"{key}.onnx")
        if model is None or _foreign(operators):
            return None
        _touch(path)
        return key, model

    def _made(self, given: Computation, name: str) -> tuple[str, onnx.ModelProto]:
        """The key and the model of a computation that is lowered here."""
        computation, folder = lowered(given, name, self._target), _folder()
        key, operators = _digest(computation.key), _operators(computation)
        path = None if folder is None or _foreign(operators) else folder / f"{key}.onnx"
        model = self._models.get(key)
        if model is None and path is not None:
            model = _read(path)
        if model is None:
            model = translate(computation, name)
            if path is not None:
                _keep(path, model.SerializeToString(deterministic=True))
        if folder is not None and path is not None and not _foreign(_operators(given)):
            _keep(self._path(folder, given), json.dumps({"key": key, "operators": operators}).encode())
        return key, model

    def _path(self, folder: Path, given: Computation) -> Path:
        return folder / f"{_digest(self._target, given.key)}.json"


def _operators(computation: Computation) -> list[str]:
    """The names of the operators in a computation."""
    return sorted({_name(node.target) for node in computation.graph.nodes if node.op == "call_function"})


def _name(operator: object) -> str:
    return operator.name() if isinstance(operator, torch._ops.OpOverload) else str(operator)


def _foreign(operators: Iterable[str]) -> bool:
    """Whether a function lowers or translates one of them whose source `_lowering` does not know."""
    functions = {_name(operator): function for operator, function in lowerings.items()}
    named = [table[name] for name in operators for table in (functions, onnx_functions) if name in table]
    return any(not getattr(function, "__module__", "").startswith(__package__) for function in named)


def _folder() -> Path | None:
    given = os.environ.get("OFFRAMP_CACHE")
    if os.environ.get("OFFRAMP_DUMP"):
        return None
    if given is not None:
        return Path(given).expanduser() / "translations" if given else None
    root = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return root / "offramp" / "translations"


def _digest(*texts: str) -> str:
    return hashlib.sha256("\0".join((_lowering(), *texts)).encode()).hexdigest()


@cache
def _lowering() -> str:
    """What a translation depends on beside the computation: the sources of the rooms that make it, and versions."""
    versions = [package.__version__ for package in (torch, onnx, onnx_ir, onnxscript)]
    digest = hashlib.sha256(f"{versions}".encode())
    for room in _ROOMS:
        for file in sorted(room.rglob("*.py")):
            digest.update(file.read_bytes())
    return digest.hexdigest()


def _read(path: Path) -> onnx.ModelProto | None:
    """A model that was kept; None where there is none that can be read."""
    model = onnx.ModelProto()
    try:
        model.ParseFromString(path.read_bytes())
    except (OSError, DecodeError):
        return None
    _touch(path)
    return model


def _touch(path: Path) -> None:
    """Say that a file was used: the oldest go first."""
    try:
        os.utime(path)
    except OSError as error:
        _log.debug("%s: %s", path, error)


def _keep(path: Path, content: bytes) -> None:
    """Write a file in one step; a folder that cannot be written to keeps nothing."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        part = path.with_name(f"{path.name}-{token_hex(8)}.part")
        try:
            part.write_bytes(content)
            part.replace(path)
        finally:
            part.unlink(missing_ok=True)
        files = [(file.stat().st_mtime, file) for file in path.parent.iterdir()]
        for _, file in sorted(files)[: max(0, len(files) - _KEPT)]:
            file.unlink(missing_ok=True)
    except OSError as error:
        _log.info("translations are not kept: %s", error)
