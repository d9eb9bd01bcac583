"""A bundle's weights in fewer bits: each segment through ONNX Runtime's own quantizers, by the tokens that it runs on.

Where a segment runs on one token after the other, reading its weights is what takes time: ``MatMulNBits`` holds them in
blocks of 4 or 8 bits. Where it runs on many at once, products do: dynamic int8 multiplies integers. Tables of words get
as few bits; biases and norms stay as they are. No kernel here is ours.
"""

from __future__ import annotations

import hashlib
import logging
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from fnmatch import fnmatchcase
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, BinaryIO, TypeAlias

import numpy as np
import onnx
from onnx import external_data_helper, helper, numpy_helper

from offramp.bundle.manifest import WEIGHTS_FILE, Manifest, Stage
from offramp.errors import ExportError
from offramp.export.write import ALIGNMENT, hashed
from offramp.runtime.chain import Chain
from offramp.runtime.policies.builtin import Never

#: A precision of all segments, or of those whose names match a pattern; the first that matches counts.
Precision: TypeAlias = str | Mapping[str, str]
PRECISIONS = ("fp32", "int8", "int4")
_BLOCK = 32  # weights that share a scale
_LEAST = 1024  # bytes: smaller arrays stay in their file


def precision_of(precision: Precision, segment: str) -> str:
    """What a segment's weights become.

    Raises:
        ExportError: there is no such precision.
    """
    chosen = precision
    if not isinstance(precision, str):
        chosen = next((item for pattern, item in precision.items() if fnmatchcase(segment, pattern)), "fp32")
    if chosen not in PRECISIONS:
        raise ExportError(
            f"precision={chosen!r}: there are {', '.join(PRECISIONS)}, or one for each pattern of segments",
            hint='precision={"decoder.*": "int4", "tail": "int8"}',
        )
    return str(chosen)


def precisions(precision: Precision) -> set[str]:
    """Those that it names; ExportError where there is no such one."""
    if isinstance(precision, str):
        return {precision_of(precision, "")}
    return {precision_of(item, "") for item in precision.values()} or {"fp32"}


def encoded(manifest: Manifest, source: Path, target: Path, precision: Precision) -> Manifest:
    """Write the segments of the bundle at ``source`` to ``target``, with its weights encoded; the manifest of that.

    Thresholds that were chosen for the bundle do not hold for it, so it has none.

    Raises:
        ExportError: see `precision_of`; or a file is read as two precisions.
    """
    wanted: dict[str, str] = {}
    together = {name for stage in manifest.stages if stage.when != "chunk" for name in _segments(manifest, stage)}
    for name, segment in manifest.segments.items():
        bits = precision_of(precision, name)
        encoding = "int8-dynamic" if bits == "int8" and name in together else bits
        if wanted.setdefault(segment.file, encoding) != encoding:
            raise ExportError(
                f"segments of the file {segment.file} are to be {wanted[segment.file]} and {encoding}",
                hint="one precision for all that share their weights",
            )
    with (target / WEIGHTS_FILE).open("wb") as weights, _quiet():
        writer = _Weights(weights)
        for file, encoding in wanted.items():
            model = onnx.load(source / file)
            (target / file).write_bytes(writer.moved(_ENCODE[encoding](model)).SerializeToString(deterministic=True))
    for file in manifest.take.values():
        shutil.copyfile(source / file, target / file)
    segments = {name: replace(item, encoding=wanted[item.file]) for name, item in manifest.segments.items()}
    files = {path.name: hashed(path) for path in sorted(target.iterdir())}
    others = {name: item for name, item in manifest.files.items() if name not in files}
    for name in others:
        (target / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(source / name, target / name)
    shown = precision if isinstance(precision, str) else ", ".join(f"{key} {item}" for key, item in precision.items())
    return replace(manifest, segments=segments, files=files | others, precision=shown, policy=None, calibration=None)


def _segments(manifest: Manifest, stage: Stage) -> Iterator[str]:
    """The names of a stage's segments, its exits' too."""
    if stage.segment is not None:
        yield stage.segment
    if stage.stack is not None:
        stack = manifest.stacks[stage.stack]
        yield from (name for part in stack.parts for name in part.segments)
        yield from (name for exit_ in stack.exits for name in exit_.segments)


# encodings


def _blocks(model: onnx.ModelProto, bits: int) -> onnx.ModelProto:
    """Weights of so many bits, a scale for each block of them; activations of products are rounded to 8 bits."""
    from onnxruntime.quantization.matmul_nbits_quantizer import DefaultWeightOnlyQuantConfig, MatMulNBitsQuantizer

    config = DefaultWeightOnlyQuantConfig(
        block_size=_BLOCK,
        is_symmetric=True,
        accuracy_level=4,
        op_types_to_quantize=("MatMul", "Gather") if bits == 4 else ("MatMul",),  # of tables it knows 4 bits only
        bits=bits,
    )
    quantizer = MatMulNBitsQuantizer(_folded(model), algo_config=config)
    quantizer.process()
    made: onnx.ModelProto = quantizer.model.model
    return made if bits == 4 else _tables(made)


def _tables(model: onnx.ModelProto) -> onnx.ModelProto:
    """Tables of words in 8 bits, a scale for each row: rows are gathered as they are, and multiplied then."""
    graph = model.graph
    weights = {item.name: item for item in graph.initializer}
    for node in [node for node in graph.node if node.op_type == "Gather" and node.input[0] in weights]:
        table = numpy_helper.to_array(weights[node.input[0]])
        other_axis = any(item.i for item in node.attribute)
        if table.dtype != np.float32 or table.ndim != 2 or table.nbytes < _LEAST or other_axis:
            continue
        scale = np.maximum(np.abs(table).max(1, keepdims=True), np.finfo(np.float32).tiny) / 127
        name, at = node.input[0], list(graph.node).index(node)
        rows, scales = f"{name}_rows", f"{name}_scales"
        if rows not in weights:
            for key, array in ((rows, np.round(table / scale).astype(np.int8)), (scales, scale.astype(np.float32))):
                graph.initializer.append(numpy_helper.from_array(array, key))
                weights[key] = graph.initializer[-1]
        made = node.output[0]
        graph.node.remove(node)
        for more, new in enumerate(
            (
                helper.make_node("Gather", [rows, node.input[1]], [f"{made}_rows"]),
                helper.make_node("Cast", [f"{made}_rows"], [f"{made}_float"], to=onnx.TensorProto.FLOAT),
                helper.make_node("Gather", [scales, node.input[1]], [f"{made}_scale"]),
                helper.make_node("Mul", [f"{made}_float", f"{made}_scale"], [made]),
            )
        ):
            graph.node.insert(at + more, new)
    return _without_unread(model)


def _without_unread(model: onnx.ModelProto) -> onnx.ModelProto:
    """The model without weights that nothing reads."""
    read = {name for node in model.graph.node for name in node.input}
    for item in [item for item in model.graph.initializer if item.name not in read]:
        model.graph.initializer.remove(item)
    return model


def _dynamic(model: onnx.ModelProto) -> onnx.ModelProto:
    """Products of whole numbers: weights of 8 bits, a scale for each column; activations by their own range."""
    from onnxruntime.quantization import QuantType, quantize_dynamic

    with TemporaryDirectory() as folder:
        file = Path(folder) / "model.onnx"
        quantize_dynamic(
            _folded(model),
            file,
            op_types_to_quantize=["MatMul"],
            per_channel=True,
            weight_type=QuantType.QInt8,
            extra_options={"MatMulConstBOnly": True, "DefaultTensorType": onnx.TensorProto.FLOAT},
        )
        return _tables(onnx.load(file))


_ENCODE = {
    "fp32": lambda model: model,
    "int8": lambda model: _blocks(model, 8),
    "int4": lambda model: _blocks(model, 4),
    "int8-dynamic": _dynamic,
}


def _folded(model: onnx.ModelProto) -> onnx.ModelProto:
    """The model, whose products read their weights as they are: a quantizer sees no weight behind a transposition."""
    graph = model.graph
    weights = {item.name: item for item in graph.initializer}
    found = [node for node in graph.node if node.op_type == "Transpose" and node.input[0] in weights]
    for node in found:
        weight = weights[node.input[0]]
        order = next((list(item.ints) for item in node.attribute if item.name == "perm"), None)
        turned = np.ascontiguousarray(np.transpose(numpy_helper.to_array(weight), order))
        graph.initializer.append(numpy_helper.from_array(turned, node.output[0]))
        graph.node.remove(node)
    return _without_unread(model)


class _Weights:
    """The weights file: the same bytes lie in it once."""

    def __init__(self, file: BinaryIO) -> None:
        self._file, self._placed = file, dict[str, int]()

    def moved(self, model: onnx.ModelProto) -> onnx.ModelProto:
        """The model with its larger arrays in the file."""
        for item in model.graph.initializer:
            if not item.HasField("raw_data"):
                item.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(item), item.name))
            if len(item.raw_data) < _LEAST:
                continue
            data = item.raw_data
            external_data_helper.set_external_data(item, WEIGHTS_FILE, self._place(data), len(data))
            item.ClearField("raw_data")
        return model

    def _place(self, data: bytes) -> int:
        key = hashlib.sha256(data).hexdigest()
        if key not in self._placed:
            self._file.write(b"\0" * (-self._file.tell() % ALIGNMENT))
            self._placed[key] = self._file.tell()
            self._file.write(data)
        return self._placed[key]


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep the root logger as it is: the quantizers set it, and tell of each node."""
    root = logging.getLogger()
    level, handlers, disabled = root.level, list(root.handlers), logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        yield
    finally:
        logging.disable(disabled)
        root.setLevel(level)
        root.handlers[:] = handlers


# how far it is from what it was


def compared(before: Chain, after: Chain, samples: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """What encoding changed, over samples.

    ``encoding`` is the worst output's root of the mean square of the differences, over that of its values; ``same
    answers`` the share of places where an output of classes has its greatest value in the same one, 1 without any.
    """
    errors, same = [0.0], list[float]()
    for inputs in samples:
        old, new = (chain.run(inputs, Never()).outputs for chain in (before, after))
        for name, value in old.items():
            if value.dtype.kind != "f" or not value.size:
                continue
            scale = float(np.sqrt(np.mean(np.square(value)))) or 1.0
            errors.append(float(np.sqrt(np.mean(np.square(new[name] - value)))) / scale)
            if value.ndim > 1 and value.shape[-1] > 1:
                same.append(float((new[name].argmax(-1) == value.argmax(-1)).mean()))
    return {"encoding": max(errors), "same answers": float(np.mean(same)) if same else 1.0}
