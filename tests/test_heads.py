"""Fused attention over fewer or more than four axes: what torch computes, and an ONNX form."""

# mypy: disable-error-code="no-any-return"
from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
import talkers
import tiny
import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F

import offramp
from offramp.export.lowering.lower import lower, translate
from offramp.export.subgraph import Subgraph
from offramp.program import capture
from offramp.program.canonical.simplify import canonicalize
from offramp.program.graph import aten, attribute, results, shape
from offramp.runtime.engine.sessions import session_options

attention: Callable[..., Tensor] = F.scaled_dot_product_attention
Core = Callable[[Tensor, Tensor], Tensor]  # of x [rows, tokens, features] and ones where there is no padding


def heads(x: Tensor, *sizes: int) -> Tensor:
    """[rows, tokens, features] as [rows, *sizes, tokens, features]."""
    return x.unflatten(-1, (*sizes, -1)).movedim(1, -2)


def triangle(x: Tensor) -> Tensor:
    return torch.ones(x.shape[1], x.shape[1], dtype=torch.bool).tril()


def unequal(x: Tensor) -> Tensor:
    """A mask of each row: what it sees grows with the first feature."""
    return -(x[..., :1] - x[:, None, :, 0]).abs()


FORMS: dict[str, Core] = {
    "single head": lambda x, mask: attention(x, x, x),
    "causal": lambda x, mask: attention(x, x, x, is_causal=True, scale=0.5),
    "mask of places": lambda x, mask: attention(x, x, x, triangle(x)),
    "mask of rows": lambda x, mask: attention(x, x, x, attn_mask=mask.bool()[:, None]),
    "mask of rows and places": lambda x, mask: attention(x, x, x, unequal(x)),
    "mask of one axis": lambda x, mask: attention(x, x, x, triangle(x)[-1]),
    "two axes": lambda x, mask: attention(x[0], x[1], x[1], triangle(x)) + x,
    "other features": lambda x, mask: attention(x, x, x[..., :3]),
    "learned queries": lambda x, mask: attention(x[:1, :3], x, x, mask.bool()[:, None]),
    "shared memory": lambda x, mask: attention(x, x[0], x[1]),
    "rows of heads": lambda x, mask: attention(*[heads(x, 2).flatten(0, 1)] * 3, is_causal=True),
    "one row of heads": lambda x, mask: attention(heads(x[:1], 2), heads(x, 2), heads(x, 2)),
    "five axes": lambda x, mask: attention(*[heads(x, 2, 2)] * 3, is_causal=True),
    "five axes, mask of rows": lambda x, mask: attention(*[heads(x, 2, 2)] * 3, mask.bool()[:, None, None, None]),
    "five axes, mask of places": lambda x, mask: attention(*[heads(x, 2, 2)] * 3, triangle(x)),
    "axes of sizes": lambda x, mask: attention(*[x[:, None, None].expand(-1, x.shape[1], 2, -1, -1)] * 3),
}


class Form(nn.Module):
    def __init__(self, core: Core) -> None:
        super().__init__()
        self.core, self.layer = core, nn.Linear(8, 8)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        return self.core(self.layer(x), mask).sin()


def given(rows: int, tokens: int) -> tiny.Inputs:
    random = torch.Generator().manual_seed(rows)
    return {"x": torch.randn(rows, tokens, 8, generator=random), "mask": tiny.padding(tokens, rows)}


@pytest.mark.parametrize("name", FORMS)
def test_any_axes(name: str) -> None:
    model = tiny.seeded(lambda: Form(FORMS[name]))
    program = capture(model, given(2, 7))
    assert canonicalize(program.graph_module) == 0
    (node,) = program.graph.find_nodes(op="call_function", target=aten.scaled_dot_product_attention.default)
    assert [len(shape(arg)) for arg in node.args[:3] if isinstance(arg, fx.Node)] == [4, 4, 4]
    inner = [item for item in program.graph.nodes if item.op == "call_function"]
    used = [item for item in program.graph.find_nodes(op="placeholder") if item.users]
    function = lower(Subgraph("whole", tuple(used), (results(program.graph)["output"],), tuple(inner)))
    session = onnxruntime.InferenceSession(translate(function, "whole").SerializeToString(), session_options())
    weights = {
        f"w{i}": attribute(program.module, str(w.target)).detach().numpy() for i, w in enumerate(function.weights)
    }
    for inputs in (given(2, 7), given(3, 5)):
        expected = tiny.outputs(model, inputs)
        tiny.assert_same(tiny.outputs(program.module, inputs), expected)
        feed = {f"in{i}": inputs[str(node.target)].numpy() for i, node in enumerate(function.inputs)}
        made = session.run(["out0"], feed | weights)
        np.testing.assert_allclose(made[0], expected["output"].numpy(), rtol=1e-4, atol=1e-5)


class Attention(nn.Module):
    """As people write it by hand: one head, three axes."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(tiny.WIDTH, 3 * tiny.WIDTH), nn.Linear(tiny.WIDTH, tiny.WIDTH)

    def forward(self, x: Tensor, *_: object) -> Tensor:
        q, k, v = self.qkv(x).chunk(3, -1)
        return self.out(attention(q, k, v, is_causal=True))


class Talker(tiny.Talker):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = self.blocks[:2]
        for block in self.blocks:
            block.attention = Attention()


@pytest.mark.parametrize("target", ["ort", "portable"])
def test_one_head_generates(target: talkers.Target, tmp_path: Path) -> None:
    chain = talkers.written(tmp_path / "talker", Talker, "insert-cache,insert-exits", target)
    model, ids = tiny.seeded(Talker, 4), tiny.ids(5)
    found = chain.generate({"input_ids": ids.numpy()}, offramp.Never(), max_new_tokens=8)
    for _ in range(8):
        with torch.no_grad():
            ids = torch.cat([ids, model(ids)[:, -1:].argmax(-1)], 1)
    assert [list(row) for row in found.tokens] == ids[:, 5:].tolist()
