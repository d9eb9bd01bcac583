"""Writing a bundle's files: every weight once in one file, ONNX models that refer to it."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from onnx import TensorProto, helper

from offramp.bundle.manifest import WEIGHTS_FILE, File
from offramp.errors import ExportError
from offramp.export.lowering.exporter import OPSET
from offramp.export.lowering.merged_products import merged
from offramp.export.lowering.outline import Computation
from offramp.export.translations import translated
from offramp.program.graph import attribute, storage_key

_ALIGNMENT = 64
_INLINE = 64  # bytes of whole numbers: ONNX Runtime reads axes and sizes only where they stand in the file itself

_ELEMENTS: dict[torch.dtype, int] = {
    torch.float32: TensorProto.FLOAT,
    torch.float64: TensorProto.DOUBLE,
    torch.int64: TensorProto.INT64,
    torch.int32: TensorProto.INT32,
    torch.int16: TensorProto.INT16,
    torch.int8: TensorProto.INT8,
    torch.uint8: TensorProto.UINT8,
    torch.bool: TensorProto.BOOL,
}


class Writer:
    """Writes ONNX files and the weights file into a directory.

    A computation that was translated once is not translated again: another use of the same structure gets a copy
    with its own weights bound, and the very same weights get the very same file.
    """

    def __init__(self, directory: Path, module: torch.nn.Module) -> None:
        self.directory = directory
        self.module = module
        self.translations = 0
        self._weights = (directory / WEIGHTS_FILE).open("wb")
        self._placed: dict[Any, tuple[int, int]] = {}
        self._models: dict[str, onnx.ModelProto] = {}
        self._files: dict[Any, str] = {}
        self._operators: dict[str, set[str]] = {}

    def segment(self, computation: Computation, name: str) -> str:
        """Write the ONNX file of a computation, if there is none yet; returns the file's name."""
        tensors = [[attribute(self.module, str(part.target)) for part in merged(node)] for node in computation.weights]
        places = [self._place(parts) for parts in tensors]
        identity = (computation.key, tuple(places))
        if identity not in self._files:
            if computation.key not in self._models:
                self._models[computation.key] = translated(computation, name)
                self.translations += 1
            model = onnx.ModelProto()
            model.CopyFrom(self._models[computation.key])
            _bind(model, tensors, places)
            self._files[identity] = f"{name.replace('/', '-')}.onnx"
            self._operators[self._files[identity]] = {node.op_type for node in model.graph.node}
            (self.directory / self._files[identity]).write_bytes(model.SerializeToString(deterministic=True))
        return self._files[identity]

    def operators(self, file: str) -> set[str]:
        """The operators of a segment's file."""
        return self._operators[file]

    def take(self, dtype: str, axis: int) -> str:
        """Write the ONNX file that gathers rows of a tensor along ``axis``; returns the file's name."""
        name = f"take-{dtype}-{axis}.onnx"
        element = helper.np_dtype_to_tensor_dtype(np.dtype(dtype))
        graph = helper.make_graph(
            [helper.make_node("Gather", ["data", "indices"], ["taken"], axis=axis)],
            "take",
            [
                helper.make_tensor_value_info("data", element, None),
                helper.make_tensor_value_info("indices", TensorProto.INT64, [None]),
            ],
            [helper.make_tensor_value_info("taken", element, None)],
        )
        model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", OPSET)], ir_version=10)
        (self.directory / name).write_bytes(model.SerializeToString(deterministic=True))
        return name

    def close(self) -> dict[str, File]:
        """Finish, and return size and hash of every file in the directory."""
        self._weights.close()
        return {path.name: hashed(path) for path in sorted(self.directory.iterdir())}

    def abandon(self) -> None:
        """Let go of the weights file."""
        self._weights.close()

    def _place(self, parts: Sequence[torch.Tensor]) -> tuple[int, int]:
        """Offset and size in bytes of a weight in the weights file; it is written when first asked for.

        Several lie one behind the other: along their first axis they are one.
        """
        key = tuple(map(storage_key, parts))
        if key not in self._placed:
            offset = -self._weights.tell() % _ALIGNMENT + self._weights.tell()
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


def _bind(model: onnx.ModelProto, tensors: Sequence[Sequence[torch.Tensor]], places: Sequence[tuple[int, int]]) -> None:
    """Turn the parameters ``w0...`` into initializers that lie in the weights file."""
    kept = [value for value in model.graph.input if not value.name.startswith("w")]
    del model.graph.input[:]
    model.graph.input.extend(kept)
    for i, ((tensor, *others), (offset, size)) in enumerate(zip(tensors, places, strict=True)):
        dims = (
            [tensor.shape[0] + sum(other.shape[0] for other in others), *tensor.shape[1:]] if others else tensor.shape
        )
        proto = model.graph.initializer.add(name=f"w{i}", data_type=_ELEMENTS[tensor.dtype], dims=dims)
        if size == 0 or (size <= _INLINE and not tensor.is_floating_point() and not others):
            proto.raw_data = tensor.detach().cpu().contiguous().numpy().tobytes()
            continue
        proto.data_location = TensorProto.EXTERNAL
        for key, value in (("location", WEIGHTS_FILE), ("offset", offset), ("length", size)):
            proto.external_data.add(key=key, value=str(value))


def hashed(path: Path) -> File:
    """Size and sha256 of a file."""
    with path.open("rb") as stream:
        return File(path.stat().st_size, hashlib.file_digest(stream, "sha256").hexdigest())
