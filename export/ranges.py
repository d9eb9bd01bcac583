"""The range of each block of weights of 4 bits, by what its errors do: to features that are large, more.

Sixteen steps that reach to the greatest weight are wide for all others. Where a block's range ends earlier, the weights
beyond are further off, and the others nearer. What an error adds to a product is the weight's times the feature's, so
squares of errors count by the features' sizes on samples (as in AWQ's search for ranges, arXiv 2306.00978, 4.2).
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from numpy.typing import NDArray
from onnx import helper

from offramp.bundle.manifest import Manifest
from offramp.export.agreement import answers
from offramp.runtime.chain import Chain
from offramp.runtime.engine.sessions import open_sessions
from offramp.runtime.result import Result

Array = NDArray[np.float32]
#: By file, and by the name of a product's input in it: the sums of its features' squares over all tokens of samples.
Sizes = Mapping[str, Mapping[str, Array]]

#: The weight [features, n] of a product within its ranges: of the name of what the product reads, weight and block.
Within = Callable[[str, Array, int], Array]

_SHARES = torch.linspace(1, 0.5, 11).tolist()  # of the greatest weight: where a range may end
_ROWS = 512  # at a time
_OBSERVED = "observed-"


def observed(manifest: Manifest, directory: Path, samples: Sequence[Mapping[str, Any]]) -> tuple[Sizes, list[Result]]:
    """How large the inputs of products are where the bundle at ``directory`` runs samples, and its `answers`."""
    files = list(dict.fromkeys(segment.file for segment in manifest.segments.values()))
    named = {}
    try:
        for file in files:
            model = onnx.load(directory / file, load_external_data=False)
            named[file] = _with_squares(model)
            (directory / f"{_OBSERVED}{file}").write_bytes(model.SerializeToString())
        sessions = open_sessions(directory, [f"{_OBSERVED}{file}" for file in files], None, None)
    finally:
        for file in files:
            (directory / f"{_OBSERVED}{file}").unlink(missing_ok=True)
    observing = {file: _Observing(sessions[f"{_OBSERVED}{file}"], named[file]) for file in files}
    found = answers(Chain(manifest, directory, _sessions=observing), samples)
    return {file: session.sums for file, session in observing.items()}, found


def _with_squares(model: onnx.ModelProto) -> dict[str, str]:
    """Let a model give the sums of squares of what its products read; their names, by that of what is read."""
    graph = model.graph
    given = {item.name for item in graph.initializer}
    read = dict.fromkeys(node.input[0] for node in graph.node if node.op_type in ("MatMul", "Gemm"))
    found = {name: f"{_OBSERVED}{name}" for name in read if name not in given}
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
        self._session, self._named = session, list(named.values())
        self._values = list(named)
        self.sums: dict[str, Array] = {}

    def __getattr__(self, name: str) -> Any:
        return getattr(self._session, name)

    def run(self, wanted: Sequence[str], given: Mapping[str, Any], options: Any = None) -> list[Any]:
        """As the session's own."""
        found = self._session.run([*wanted, *self._named], given, options)
        for name, squares in zip(self._values, found[len(wanted) :], strict=True):
            self.sums[name] = self.sums.get(name, np.float32(0)) + squares
        return list(found[: len(wanted)])


class Ranges:
    """Weights within their blocks' ranges. The same weights get the same ones wherever they are, and stay one array."""

    def __init__(self, sizes: Sizes) -> None:
        self._sizes, self._known = sizes, dict[bytes, Array]()

    def of(self, file: str) -> Within:
        """Of a file's products."""
        return partial(self._within, self._sizes.get(file, {}))

    def _within(self, sizes: Mapping[str, Array], read: str, weight: Array, block: int) -> Array:
        key = hashlib.sha256(weight.tobytes()).digest()
        if key not in self._known:
            size = sizes.get(read)
            if size is None or size.shape != weight.shape[:1] or not np.isfinite(size).all() or not size.any():
                return weight
            self._known[key] = limits(weight, np.sqrt(size), block)
        return within(weight, self._known[key], block)


def _blocks_of(array: Array, block: int) -> torch.Tensor:
    """Rows of blocks: [n, blocks, block], of [features, n]."""
    columns = torch.from_numpy(array.T.copy())
    return torch.nn.functional.pad(columns, (0, -columns.shape[1] % block)).reshape(len(columns), -1, block)


def limits(weight: Array, sizes: Array, block: int) -> Array:
    """Where the range of each block ends, float32 [n, blocks]: of some places that where errors do least.

    Args:
        weight: float32 [features, n].
        sizes: how much the square of an error counts, float32 [features].
        block: how many weights of a column share a range, one behind the other.
    """
    counts = _blocks_of(sizes[:, None], block)
    found = [_limits(rows, counts) for rows in _blocks_of(weight, block).split(_ROWS)]
    array: Array = torch.cat(found).numpy()
    return array


def _limits(rows: torch.Tensor, counts: torch.Tensor) -> torch.Tensor:
    greatest = rows.abs().amax(-1, keepdim=True)
    top = rows.gather(-1, rows.abs().argmax(-1, keepdim=True))
    least, found = torch.full_like(top, torch.inf), greatest.clone()
    for share in _SHARES:
        step = torch.where(top == 0, 1.0, -share * top / 8)  # the greatest weight is -8 steps, as the quantizer has it
        error = (rows / step).round_().clamp_(-8, 7).mul_(step).sub_(rows).square_().mul_(counts).sum(-1, keepdim=True)
        found = torch.where(error < least, share * greatest, found)
        least = torch.minimum(least, error)
    return found[..., 0]


def within(weight: Array, ends: Array, block: int) -> Array:
    """The weight [features, n] within the ranges of its blocks, which go one step less far on the other side."""
    rows, far = _blocks_of(weight, block), torch.from_numpy(ends)[..., None]
    up = rows.gather(-1, rows.abs().argmax(-1, keepdim=True)) > 0
    high, low = torch.where(up, far, far * 7 / 8), torch.where(up, -far * 7 / 8, -far)
    kept = torch.minimum(torch.maximum(rows, low), high).reshape(weight.shape[1], -1)[:, : len(weight)]
    array: Array = np.ascontiguousarray(kept.numpy().T)
    return array
