"""Translations kept on disk: what one process has translated, none translates again."""

from __future__ import annotations

import hashlib
import logging
import os
import tempfile
from functools import cache
from pathlib import Path

import onnx
import onnx_ir
import onnxscript
import torch
from google.protobuf.message import DecodeError

from offramp.export.lowering.lower import translate
from offramp.export.lowering.outline import Computation
from offramp.export.lowering.table import onnx_functions

_log = logging.getLogger(__name__)
_KEPT = 4000  # files; a model's are a few, of some 10 kB


def translated(computation: Computation, name: str) -> onnx.ModelProto:
    """`translate`, or what it gave for an equal computation before.

    Translations lie in ``$OFFRAMP_CACHE``, else in ``$XDG_CACHE_HOME/offramp`` or ``~/.cache/offramp``; with
    ``OFFRAMP_CACHE=`` (empty) none are kept. They go by the computation's key, by offramp's own lowering and by the
    versions of what it uses; what functions of a user's own translate is not kept. Processes may share the folder.
    Raises as `translate` does.
    """
    folder = _folder()
    if folder is None or _foreign(computation):
        return translate(computation, name)
    path = folder / f"{hashlib.sha256(f'{_lowering()}{computation.key}'.encode()).hexdigest()}.onnx"
    model = onnx.ModelProto()
    try:
        model.ParseFromString(path.read_bytes())
        os.utime(path)  # the oldest go first
    except (OSError, DecodeError):
        model = translate(computation, name)
        _keep(path, model.SerializeToString(deterministic=True))
    return model


def _foreign(computation: Computation) -> bool:
    """Whether a function translates an operator whose source `_lowering` does not know."""
    names = {node.target.name() for node in computation.graph.nodes if isinstance(node.target, torch._ops.OpOverload)}
    return any(not onnx_functions[name].__module__.startswith(__package__) for name in names & onnx_functions.keys())


def _folder() -> Path | None:
    given = os.environ.get("OFFRAMP_CACHE")
    if given is not None:
        return Path(given).expanduser() / "translations" if given else None
    root = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return root / "offramp" / "translations"


@cache
def _lowering() -> str:
    """What a translation depends on beside the computation: the sources of this room, and versions."""
    versions = [package.__version__ for package in (torch, onnx, onnx_ir, onnxscript)]
    digest = hashlib.sha256(f"{versions}".encode())
    for file in sorted(Path(__file__).parent.rglob("*.py")):
        digest.update(file.read_bytes())
    return digest.hexdigest()


def _keep(path: Path, content: bytes) -> None:
    """Write a file in one step; a folder that cannot be written to keeps nothing."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile("wb", dir=path.parent, suffix=".part", delete=False) as stream:
            stream.write(content)
        Path(stream.name).replace(path)
        files = [(file.stat().st_mtime, file) for file in path.parent.iterdir()]
        for _, file in sorted(files)[: max(0, len(files) - _KEPT)]:
            file.unlink(missing_ok=True)
    except OSError as error:
        _log.info("translations are not kept: %s", error)
