"""Attention without caches as ONNX: nothing is turned for it, and ONNX Runtime computes what torch does."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from torch import Tensor, fx, nn
from torch.nn.functional import scaled_dot_product_attention

from offramp.export.lowering.lower import lower, translate
from offramp.export.subgraph import Subgraph
from offramp.runtime.engine.sessions import session_options

Call = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]


class Module(nn.Module):
    def __init__(self, call: Call) -> None:
        super().__init__()
        self.call = call

    def forward(self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor) -> Tensor:
        return self.call(query, key, value, mask)


def apart(x: Tensor, heads: int) -> Tensor:
    return x.reshape(x.shape[0], x.shape[1], heads, -1).transpose(1, 2)


def beside(x: Tensor) -> Tensor:
    return x.transpose(1, 2).reshape(x.shape[0], x.shape[2], -1)


def _attention(heads: int, groups: int, **options: Any) -> Call:
    def call(query: Tensor, key: Tensor, value: Tensor, mask: Tensor) -> Tensor:
        made = scaled_dot_product_attention(apart(query, heads), apart(key, groups), apart(value, groups), **options)
        return beside(made)

    return call


def _masked(query: Tensor, key: Tensor, value: Tensor, mask: Tensor) -> Tensor:
    return beside(scaled_dot_product_attention(apart(query, 2), apart(key, 2), apart(value, 2), mask[:, None]))


def _lowered(call: Call, rows: int, tokens: int, features: tuple[int, int, int], axes: int = 3) -> onnx.ModelProto:
    given = _inputs(rows, tokens, features, axes)
    free: Any = torch.export.Dim.DYNAMIC
    sizes = {name: {0: free, (2 if value.ndim == 4 else 1): free} for name, value in given.items()}
    sizes["mask"] = {0: free, 1: free, 2: free}
    graph = torch.export.export(Module(call), (), given, dynamic_shapes=sizes).graph
    inputs = tuple(node for node in graph.nodes if node.op == "placeholder")
    (output,) = (node for node in graph.nodes if node.op == "output")
    calls = tuple(node for node in graph.nodes if node.op == "call_function")
    assert isinstance(output, fx.Node)
    return translate(lower(Subgraph("attention", inputs, tuple(output.args[0]), calls)), "attention")  # type: ignore[arg-type]


def _inputs(rows: int, tokens: int, features: tuple[int, int, int], axes: int = 3) -> dict[str, Tensor]:
    random = torch.Generator().manual_seed(rows)
    shapes = [(rows, tokens, size) if axes == 3 else (rows, 2, tokens, size // 2) for size in features]
    found = {
        name: torch.randn(sizes, generator=random)
        for name, sizes in zip(("query", "key", "value"), shapes, strict=True)
    }
    seen = torch.rand(rows, tokens, tokens, generator=random) > 0.5
    return found | {"mask": seen | torch.eye(tokens, dtype=torch.bool)}


def _run(model: onnx.ModelProto, inputs: dict[str, Tensor]) -> Any:
    feed = {f"in{i}": value.numpy() for i, value in enumerate(inputs.values())}
    session = onnxruntime.InferenceSession(model.SerializeToString(), session_options())
    return session.run(["out0"], {node.name: feed[node.name] for node in session.get_inputs()})[0]


@pytest.mark.parametrize(
    ("call", "features"),
    [
        (_attention(2, 2), (16, 16, 16)),
        (_attention(2, 2, is_causal=True, scale=0.3), (16, 16, 24)),
        (_attention(4, 2, enable_gqa=True), (32, 16, 16)),
        (_masked, (16, 16, 16)),
    ],
    ids=["plain", "causal", "grouped", "masked"],
)
def test_nothing_is_turned_for_an_attention(call: Call, features: tuple[int, int, int]) -> None:
    model = _lowered(call, 2, 5, features)
    operators = [node.op_type for node in model.graph.node]
    assert operators.count("Attention") == 1
    assert "Transpose" not in operators
    assert "Reshape" not in operators
    for rows, tokens in ((2, 5), (3, 7)):
        inputs = _inputs(rows, tokens, features)
        np.testing.assert_allclose(_run(model, inputs), call(*inputs.values()).numpy(), rtol=1e-4, atol=1e-5)


def test_heads_that_come_apart_stay_apart() -> None:
    """Keys that were turned once for many steps are not turned back at each."""

    def call(query: Tensor, key: Tensor, value: Tensor, mask: Tensor) -> Tensor:
        return beside(scaled_dot_product_attention(apart(beside(query), 2), key, value))

    model = _lowered(call, 2, 5, (16, 16, 16), axes=4)
    (attention,) = (node for node in model.graph.node if node.op_type == "Attention")
    assert not {"q_num_heads", "kv_num_heads"} & {item.name for item in attention.attribute}
    inputs = _inputs(3, 7, (16, 16, 16), axes=4)
    np.testing.assert_allclose(_run(model, inputs), call(*inputs.values()).numpy(), rtol=1e-4, atol=1e-5)
