"""How large the inputs of products are, feature by feature, where a bundle in fp32 runs samples."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import helper

from offramp.bundle.manifest import Manifest
from offramp.export.agreement import answers
from offramp.export.quantize import PARTS
from offramp.export.ranges import Array, Sizes
from offramp.runtime.chain import Chain
from offramp.runtime.engine.sessions import open_sessions

_OBSERVED = "observed-"


def observed(manifest: Manifest, directory: Path, samples: Sequence[Mapping[str, Any]]) -> Sizes:
    """Of every product of a weight, where the bundle at ``directory`` runs samples; padding counts as what it is."""
    copies = {segment.file: f"{_OBSERVED}{segment.file}" for segment in manifest.segments.values()}
    named = {}
    try:
        for file, copy in copies.items():
            model = onnx.load(directory / file, load_external_data=False)
            named[file] = _with_squares(model)
            (directory / copy).write_bytes(model.SerializeToString())
        sessions = open_sessions(directory, copies.values(), None, None)
    finally:
        for copy in copies.values():
            (directory / copy).unlink(missing_ok=True)
    observing = {file: _Observing(sessions[copy], named[file]) for file, copy in copies.items()}
    answers(Chain(manifest, directory, _sessions=observing), samples)
    return {file: session.sums for file, session in observing.items()}


def _with_squares(model: onnx.ModelProto) -> dict[str, str]:
    """Let a model give the sums of squares of what its weights meet; their names, by that of what is read."""
    graph = model.graph
    weights = {item.name for item in graph.initializer}
    found: dict[str, str] = {}
    for node in graph.node:
        if node.op_type in (*PARTS, "Transpose") and weights.issuperset(node.input):
            weights.update(node.output)
        elif node.op_type in ("MatMul", "Gemm") and node.input[1] in weights and node.input[0] not in weights:
            found[node.input[0]] = f"{_OBSERVED}{node.input[0]}"
    for name, made in found.items():
        graph.node.extend(
            [
                helper.make_node("Shape", [name], [f"{made}/shape"], end=-1),
                helper.make_node("Size", [f"{made}/shape"], [f"{made}/rank"]),
                helper.make_node("Range", [f"{made}/zero", f"{made}/rank", f"{made}/one"], [f"{made}/axes"]),
                helper.make_node("ReduceSumSquare", [name, f"{made}/axes"], [made], keepdims=0),
            ]
        )
        for word, number in (("zero", 0), ("one", 1)):
            graph.initializer.append(helper.make_tensor(f"{made}/{word}", onnx.TensorProto.INT64, [], [number]))
        graph.output.append(helper.make_empty_tensor_value_info(made))
    return found


class _Observing:
    """A session that adds up what it gives beside the outputs that are asked for."""

    def __init__(self, session: Any, named: Mapping[str, str]) -> None:
        self._session, self._named = session, named
        self.sums: dict[str, Array] = {}

    def __getattr__(self, name: str) -> Any:
        return getattr(self._session, name)

    def run(self, wanted: Sequence[str], given: Mapping[str, Any], options: Any = None) -> list[Any]:
        """As the session's own."""
        found = self._session.run([*wanted, *self._named.values()], given, options)
        for name, squares in zip(self._named, found[len(wanted) :], strict=True):
            self.sums[name] = self.sums.get(name, np.float32(0)) + squares
        return list(found[: len(wanted)])
