"""Weights in the file as products read them: which are turned round, which stay, and what a bundle turns at load."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from torch import Tensor, nn

import offramp
from offramp.export.turned import turn
from offramp.runtime.engine.sessions import session_options

WEIGHT = np.arange(24, dtype=np.float32).reshape(4, 6)
X = np.arange(12, dtype=np.float32).reshape(2, 6)
HEAD = '<ir_version: 10, opset_import: ["": 23]> g '
PRODUCT = HEAD + "(float[N, 6] x) => (float[N, 4] y) { t = Transpose <perm = [1, 0]> (w) y = MatMul (x, t) }"


def written(root: Path, **models: str) -> Path:
    """A directory with a weight ``w`` of 4 x 6, and files that read it."""
    (root / "weights.bin").write_bytes(bytes(64) + WEIGHT.tobytes())
    for name, text in models.items():
        model = onnx.parser.parse_model(text)
        item = onnx.TensorProto(name="w", dims=WEIGHT.shape, data_type=onnx.TensorProto.FLOAT)
        item.data_location = onnx.TensorProto.EXTERNAL
        for key, value in (("location", "weights.bin"), ("offset", 64), ("length", WEIGHT.nbytes)):
            item.external_data.append(onnx.StringStringEntryProto(key=key, value=str(value)))
        model.graph.initializer.append(item)
        (root / f"{name}.onnx").write_bytes(model.SerializeToString())
    return root


def contents(root: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in root.iterdir()}


def ran(file: Path, **feed: np.ndarray) -> list[np.ndarray]:
    found: list[np.ndarray] = onnxruntime.InferenceSession(file, session_options()).run(None, feed)
    return found


def test_what_products_alone_read_is_turned_round(tmp_path: Path) -> None:
    twice = HEAD + (
        "(float[N, 6] x) => (float[N, 4] y) { t = Transpose (w) a = MatMul (x, t) "
        "u = Transpose <perm = [1, 0]> (w) b = MatMul (x, u) y = Add (a, b) }"
    )
    turn(written(tmp_path, once=PRODUCT, twice=twice))
    assert (tmp_path / "weights.bin").read_bytes()[64:] == WEIGHT.T.tobytes()
    for name, factor in (("once", 1), ("twice", 2)):
        model = onnx.load(tmp_path / f"{name}.onnx", load_external_data=False)
        assert "Transpose" not in {node.op_type for node in model.graph.node}
        assert list(model.graph.initializer[0].dims) == [6, 4]
        (found,) = ran(tmp_path / f"{name}.onnx", x=X)
        np.testing.assert_array_equal(found, factor * X @ WEIGHT.T)
    before = contents(tmp_path)
    turn(tmp_path)
    assert contents(tmp_path) == before


@pytest.mark.parametrize(
    "other",
    [
        "(int64[N] i) => (float[N, 6] y) { y = Gather (w, i) }",
        "(float[N, 4] x) => (float[N, 6] y) { y = MatMul (x, w) }",
        "(float[N, 6] x) => (float[N, 4] y, float[4, 6] w) { t = Transpose (w) y = MatMul (x, t) }",
        "() => (float[6, 4] y) { y = Transpose (w) }",
        "(float[N, 4] x) => (float[N, 6] y) { t = Transpose <perm = [0, 1]> (w) y = MatMul (x, t) }",
        "(float[N, 6] x) => (float[N, 4] y) { t = Transpose (w) y = MatMul (x, t) s = Shape (w) }",
    ],
)
def test_what_is_read_in_another_way_too_stays(tmp_path: Path, other: str) -> None:
    before = contents(written(tmp_path, product=PRODUCT, other=HEAD + other))
    turn(tmp_path)
    assert contents(tmp_path) == before


class Decoder(nn.Module):
    """Two blocks, whose head is the table of words where it is tied."""

    def __init__(self, tied: bool) -> None:
        super().__init__()
        self.words = nn.Embedding(40, 16)
        layer = nn.TransformerEncoderLayer(16, 2, 48, batch_first=True, dropout=0.0)
        self.decoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.head = nn.Linear(16, 40, bias=False)
        if tied:
            self.head.weight = self.words.weight

    def forward(self, ids: Tensor) -> Tensor:
        mask = nn.Transformer.generate_square_subsequent_mask(ids.shape[1])
        logits: Tensor = self.head(self.decoder(self.words(ids), mask, is_causal=True))
        return logits


@pytest.mark.parametrize("tied", [False, True])
def test_a_bundle_turns_no_weight_at_load_but_a_tied_one(tmp_path: Path, tied: bool) -> None:
    program = offramp.capture(Decoder(tied).eval(), {"ids": torch.randint(40, (2, 5))})
    offramp.save(program, tmp_path / "m")
    turned = []
    for file in (tmp_path / "m").glob("*.onnx"):
        graph = onnx.load(file, load_external_data=False).graph
        weights = {item.name: list(item.dims) for item in graph.initializer}
        read = [node.input[0] for node in graph.node if node.op_type == "Transpose"]
        turned += [weights[name] for name in read if name in weights]
    assert all(dims == [40, 16] for dims in turned)
    assert bool(turned) is tied
