"""Writing a bundle's files: every weight once in one file, ONNX models that refer to it."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import torch

from offramp.bundle.manifest import WEIGHTS_FILE, File
from offramp.errors import ExportError
from offramp.export.lowering.exporter import OPSET
from offramp.export.lowering.merged_products import merged
from offramp.export.screening import Screen, heads, insert
from offramp.export.translations import Translation
from offramp.export.turned import turn
from offramp.program.graph import attribute, storage_key

ALIGNMENT = 64  # bytes: where an array may begin in the weights file
_INLINE = 64  # bytes of whole numbers: ONNX Runtime reads axes and sizes only where they stand in the file itself

_ELEMENTS: dict[torch.dtype, ir.DataType] = {
    torch.float32: ir.DataType.FLOAT,
    torch.float64: ir.DataType.DOUBLE,
    torch.int64: ir.DataType.INT64,
    torch.int32: ir.DataType.INT32,
    torch.int16: ir.DataType.INT16,
    torch.int8: ir.DataType.INT8,
    torch.uint8: ir.DataType.UINT8,
    torch.bool: ir.DataType.BOOL,
}


class Writer:
    """Writes ONNX files and the weights file into a directory.

    Each use of a translation gets a copy with its own weights bound; the very same weights in the same encoding get
    the very same file.
    """

    def __init__(self, directory: Path, module: torch.nn.Module) -> None:
        self.directory = directory
        self.module = module
        self._weights = (directory / WEIGHTS_FILE).open("wb")
        self._placed: dict[Any, tuple[int, int]] = {}
        self._files: dict[Any, str] = {}
        self._operators: dict[str, set[str]] = {}
        self._screens: dict[Any, Screen] = {}

    def segment(self, translation: Translation, name: str, encoding: str = "fp32", screened: Sequence[int] = ()) -> str:
        """Write the ONNX file of a translation with its weights, if there is none yet; returns the file's name.

        The classes of outputs at the places in ``screened`` are those of `prediction-screened`.
        """
        tensors = [[attribute(self.module, str(part.target)) for part in merged(node)] for node in translation.weights]
        places = [self._place(parts, encoding) for parts in tensors]
        identity = (translation.key, encoding, tuple(places), tuple(screened))
        if identity not in self._files:
            model = ir.from_proto(translation.model)
            _bind(model, tensors, places)
            self._screen(model, [model.graph.outputs[place] for place in screened], tensors)
            self._files[identity] = f"{name.replace('/', '-')}.onnx"
            self._operators[self._files[identity]] = {node.op_type for node in model.graph}
            self._write(self._files[identity], model)
        return self._files[identity]

    def operators(self, file: str) -> set[str]:
        """The operators of a segment's file."""
        return self._operators[file]

    def take(self, dtype: str, axis: int) -> str:
        """Write the ONNX file that gathers rows of a tensor along ``axis``; returns the file's name."""
        name = f"take-{dtype}-{axis}.onnx"
        kind = ir.TensorType(ir.DataType.from_numpy(np.dtype(dtype)))
        data, indices = (
            ir.Value(name="data", type=kind),
            ir.Value(name="indices", type=ir.TensorType(ir.DataType.INT64)),
        )
        taken = ir.Value(name="taken", type=kind)
        indices.shape = ir.Shape([None])
        gather = ir.node("Gather", [data, indices], {"axis": axis}, outputs=[taken])
        graph = ir.Graph([data, indices], [taken], nodes=[gather], opset_imports={"": OPSET}, name="take")
        self._write(name, ir.Model(graph, ir_version=10))
        return name

    def _write(self, name: str, model: ir.Model) -> None:
        (self.directory / name).write_bytes(ir.to_proto(model).SerializeToString(deterministic=True))

    def close(self) -> dict[str, File]:
        """Finish, and return size and hash of every file in the directory."""
        self._weights.close()
        turn(self.directory)
        return {path.name: hashed(path) for path in sorted(self.directory.iterdir())}

    def abandon(self) -> None:
        """Let go of the weights file."""
        self._weights.close()

    def _screen(self, model: ir.Model, outputs: Sequence[ir.Value], tensors: Sequence[Sequence[torch.Tensor]]) -> None:
        """Screen the classes of the model's heads; what that knows of a weight is made once."""
        weights = {f"w{i}": parts[0] for i, parts in enumerate(tensors)}
        for head in heads(outputs):
            weight = weights[str(head.weight.name)]
            key = storage_key(weight)
            if key not in self._screens:
                self._screens[key] = Screen.of(weight.detach().cpu().numpy())
            known = {}
            for item in fields(Screen):
                array = torch.from_numpy(getattr(self._screens[key], item.name))
                known[item.name] = _external(f"{head.weight.name}_{item.name}", [array], self._place([array], "screen"))
                model.graph.register_initializer(known[item.name])
            insert(model, head, known)

    def _place(self, parts: Sequence[torch.Tensor], encoding: str) -> tuple[int, int]:
        """Offset and size in bytes of a weight in the weights file; it is written when first asked for.

        Several lie one behind the other: along their first axis they are one.
        """
        key = (encoding, *map(storage_key, parts))
        if key not in self._placed:
            offset = -self._weights.tell() % ALIGNMENT + self._weights.tell()
            self._weights.write(b"\0" * (offset - self._weights.tell()))
            for tensor in parts:
                if tensor.dtype not in _ELEMENTS:
                    raise ExportError(
                        f"a weight of dtype {tensor.dtype} cannot be exported",
                        hint="module.float() before capture",
                    )
                self._weights.write(tensor.detach().cpu().contiguous().numpy().tobytes())
            self._placed[key] = (offset, self._weights.tell() - offset)
        return self._placed[key]


def _bind(model: ir.Model, tensors: Sequence[Sequence[torch.Tensor]], places: Sequence[tuple[int, int]]) -> None:
    """Turn the parameters ``w0...`` into initializers that lie in the weights file."""
    parameters = {value.name: value for value in model.graph.inputs}
    for i, (parts, (offset, size)) in enumerate(zip(tensors, places, strict=True)):
        tensor, value = parts[0], parameters[f"w{i}"]
        model.graph.inputs.remove(value)
        if size == 0 or (size <= _INLINE and not tensor.is_floating_point() and len(parts) == 1):
            value.const_value = ir.Tensor(tensor.detach().cpu().contiguous().numpy(), name=value.name)
        else:
            value.const_value = _external(f"w{i}", parts, (offset, size)).const_value
        model.graph.register_initializer(value)


def _external(name: str, parts: Sequence[torch.Tensor], place: tuple[int, int]) -> ir.Value:
    """A weight, or several one behind the other, that lies in the weights file."""
    dims = ir.Shape([sum(part.shape[0] for part in parts), *parts[0].shape[1:]] if len(parts) > 1 else parts[0].shape)
    tensor = ir.ExternalTensor(WEIGHTS_FILE, *place, _ELEMENTS[parts[0].dtype], shape=dims, name=name)
    return ir.Value(name=name, shape=dims, type=ir.TensorType(tensor.dtype), const_value=tensor)


def hashed(path: Path) -> File:
    """Size and sha256 of a file."""
    with path.open("rb") as stream:
        return File(path.stat().st_size, hashlib.file_digest(stream, "sha256").hexdigest())
