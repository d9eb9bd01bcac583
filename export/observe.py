"""What the inputs of products are like, feature by feature and in pairs, where a bundle in fp32 runs samples."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import helper

from offramp.bundle.manifest import Manifest
from offramp.export.agreement import answers
from offramp.export.head_precision import offsets
from offramp.export.quantize import PARTS
from offramp.export.rounding import GROUP, Moments, Seen
from offramp.runtime.chain import Chain
from offramp.runtime.engine.sessions import open_sessions

_OBSERVED = "observed-"
_DOMAIN = "offramp.observe"
_MOMENTS = """
<opset_import: ["" : %d], domain: "%s">
moments (x) => (sums, count) {
    group = Constant <value_ints = [%d]> ()
    any = Constant <value_ints = [-1]> ()
    none = Constant <value_ints = [0, 0, 0]> ()
    features = Shape <start = -1> (x)
    by_token = Concat <axis = 0> (any, features)
    tokens = Reshape (x, by_token)
    count = Shape <end = 1> (tokens)
    less = Neg (features)
    short = Mod (less, group)
    ends = Concat <axis = 0> (none, short)
    padded = Pad (tokens, ends)
    wide = Add (features, short)
    groups = Div (wide, group)
    by_group = Concat <axis = 0> (any, groups, group)
    parts = Reshape (padded, by_group)
    left = Transpose <perm = [1, 2, 0]> (parts)
    right = Transpose <perm = [1, 0, 2]> (parts)
    sums = MatMul (left, right)
}
"""


def observed(manifest: Manifest, directory: Path, samples: Sequence[Mapping[str, Any]]) -> Seen:
    """Of every product of a weight, where the bundle at ``directory`` runs samples; padding counts as what it is."""
    copies = {segment.file: f"{_OBSERVED}{segment.file}" for segment in manifest.segments.values()}
    places = dict[str, dict[str, int | None]]()
    try:
        for file, copy in copies.items():
            model = onnx.load(directory / file, load_external_data=False)
            places[file] = _with_moments(model)
            (directory / copy).write_bytes(model.SerializeToString())
        sessions = open_sessions(directory, copies.values(), None, None)
    finally:
        for copy in copies.values():
            (directory / copy).unlink(missing_ok=True)
    observing = {file: _Observing(sessions[copy], list(places[file])) for file, copy in copies.items()}
    answers(Chain(manifest, directory, _sessions=observing), samples)
    most = dict[int | None, Moments]()  # of what meets a weight: one segment may read a chunk's last token, another all
    for file, session in observing.items():
        for name, moments in session.moments.items():
            place = places[file][name]
            if place is not None and (place not in most or most[place].tokens < moments.tokens):
                most[place] = moments
    return {
        file: {name: most.get(places[file][name], moments) for name, moments in session.moments.items()}
        for file, session in observing.items()
    }


def _with_moments(model: onnx.ModelProto) -> dict[str, int | None]:
    """Let a model give the moments of what its weights meet, two outputs each.

    Returns:
        The names of what is read, each with where its first weight lies that is read whole.
    """
    graph, known = model.graph, offsets(model)
    weights = {item.name: known.get(item.name) for item in graph.initializer}
    found = dict[str, int | None]()
    for node in graph.node:
        if node.op_type in (*PARTS, "Transpose") and weights.keys() >= {*node.input}:
            place = weights[node.input[0]] if node.op_type == "Transpose" else None
            weights.update(dict.fromkeys(node.output, place))
        elif node.op_type in ("MatMul", "Gemm") and node.input[1] in weights and node.input[0] not in weights:
            found.setdefault(node.input[0], weights[node.input[1]])
    for name in found:
        made = [f"{_OBSERVED}{name}/sums", f"{_OBSERVED}{name}/count"]
        graph.node.append(helper.make_node("moments", [name], made, domain=_DOMAIN))
        graph.output.extend(helper.make_empty_tensor_value_info(each) for each in made)
    (opset,) = (item.version for item in model.opset_import if item.domain == "")
    model.functions.append(onnx.parser.parse_function(_MOMENTS % (opset, _DOMAIN, GROUP)))
    model.opset_import.append(helper.make_opsetid(_DOMAIN, 1))
    return found


class _Observing:
    """A session that adds up what it gives behind the outputs of its file."""

    def __init__(self, session: Any, names: Sequence[str]) -> None:
        self._session, self._names = session, names
        self._made = [item.name for item in session.get_outputs()][-2 * len(names) :] if names else []
        self.moments: dict[str, Moments] = {}

    def __getattr__(self, name: str) -> Any:
        return getattr(self._session, name)

    def run(self, wanted: Sequence[str], given: Mapping[str, Any], options: Any = None) -> list[Any]:
        """As the session's own."""
        found = self._session.run([*wanted, *self._made], given, options)
        made = found[len(wanted) :]
        for name, sums, count in zip(self._names, made[::2], made[1::2], strict=True):
            known = self.moments.get(name, Moments(np.zeros_like(sums), 0))
            self.moments[name] = Moments(known.sums + sums, known.tokens + int(count[0]))
        return list(found[: len(wanted)])
