"""Weights as products read them: a bundle's weights file holds them turned round, so that nobody turns them at load.

ONNX Runtime turns a weight in each process, beside the one in the file: a sixth of the time in which a session opens,
and holes in the memory of the process that stay open.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import numpy as np
import onnx_ir as ir

from offramp.bundle.manifest import WEIGHTS_FILE


def turn(directory: Path) -> None:
    """Turn the weights round that ``Transpose`` alone reads, in all files of the bundle, each where it lies."""
    models = {path: ir.load(path) for path in sorted(directory.glob("*.onnx"))}
    stored = [(value, kept) for model in models.values() for value, kept in _stored(model)]
    others = {kept.offset for value, kept in stored if not _turns(value)}
    places = {kept.offset: kept for _, kept in stored if kept.offset not in others}
    if not places:
        return
    _rewrite(directory / WEIGHTS_FILE, places.values())
    for path, model in models.items():
        taken = [(value, kept) for value, kept in _stored(model) if kept.offset in places]
        for value, kept in taken:
            for node, _ in tuple(value.uses()):
                ir.convenience.replace_all_uses_with(node.outputs[0], value)
                assert node.graph is not None
                node.graph.remove(node, safe=True)
            dims = ir.Shape(reversed(kept.shape.numpy()))
            value.shape = dims
            value.const_value = ir.ExternalTensor(
                kept.location, kept.offset, kept.length, kept.dtype, shape=dims, name=kept.name, base_dir=directory
            )
        if taken:
            path.write_bytes(ir.to_proto(model).SerializeToString(deterministic=True))


def _stored(model: ir.Model) -> list[tuple[ir.Value, ir.ExternalTensor]]:
    """The weights of a model that lie in the weights file."""
    values = [(value, value.const_value) for value in model.graph.initializers.values()]
    return [(value, kept) for value, kept in values if isinstance(kept, ir.ExternalTensor)]


def _turns(value: ir.Value) -> bool:
    """Whether a weight is a matrix that is turned round wherever it is read."""
    readers = [node for node, _ in value.uses()]
    return (
        bool(readers)
        and value.shape is not None
        and len(value.shape) == 2
        and not value.is_graph_output()
        and all(node.op_type == "Transpose" and not node.outputs[0].is_graph_output() for node in readers)
        and all(tuple(node.attributes.get_ints("perm", (1, 0))) == (1, 0) for node in readers)
    )


def _rewrite(file: Path, places: Iterable[ir.ExternalTensor]) -> None:
    with file.open("r+b") as stream:
        for kept in places:
            assert kept.offset is not None
            stream.seek(kept.offset)
            matrix = np.frombuffer(stream.read(kept.nbytes), kept.dtype.numpy()).reshape(kept.shape.numpy())
            stream.seek(kept.offset)
            stream.write(matrix.T.tobytes())
