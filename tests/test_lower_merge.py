"""Products of one state as one, norms as one operator: which are, and that a bundle has every weight once."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import decoders
import onnx
import pytest
import torch
from architectures import BLOCKS, WIDTH, Factory
from torch import Tensor, fx, nn

import offramp
from offramp.export.lowering.layouts import cancel_layout
from offramp.export.lowering.lower import lower
from offramp.export.lowering.merged_products import merged
from offramp.export.lowering.rms_norm import fuse_norms
from offramp.export.partition import partition
from offramp.export.prepare import prepared
from offramp.program import Program
from offramp.program.graph import aten, results


class _Tied(decoders._Attention):
    """Keys and values are one product's."""

    def __init__(self) -> None:
        super().__init__(decoders._flagged)
        self.v = self.k


class _Unbiased(decoders._Attention):
    def __init__(self) -> None:
        super().__init__(decoders._flagged)
        self.k = nn.Linear(WIDTH, WIDTH, bias=False)


class _TwoStates(decoders._Attention):
    def __init__(self) -> None:
        super().__init__(decoders._flagged)

    def _reads(self, x: Tensor, memory: Tensor) -> list[tuple[nn.Module, Tensor]]:
        return [(self.q, x), (self.k, memory), (self.v, 2 * memory)]


class _ReadElsewhere(decoders._Attention):
    """What makes the queries is used for the output too."""

    def __init__(self) -> None:
        super().__init__(decoders._flagged)
        self.out = self.q


class _Computed(decoders._Attention):
    """The queries' weight is computed from one."""

    def __init__(self) -> None:
        super().__init__(decoders._flagged)

    def _reads(self, x: Tensor, memory: Tensor) -> list[tuple[Any, Tensor]]:
        def query(state: Tensor) -> Tensor:
            return nn.functional.linear(state, self.q.weight * 2, self.q.bias)

        return [(query, x), (self.k, memory), (self.v, memory)]


def _of(attention: Callable[[], nn.Module]) -> Factory:
    def make() -> nn.Module:
        block = decoders._Block()
        block.attention = attention()  # type: ignore[assignment]
        return block

    return decoders._by_hand(lambda: decoders._Decoder(make))


FACTORIES: dict[str, Factory] = {
    **{name: decoders.REQUIRED[name] for name in ("llama", "qwen2", "gpt2")},
    "looped": decoders.OTHERS["looped_decoder"],
    "tied": _of(_Tied),
    "unbiased": _of(_Unbiased),
    "two_states": _of(_TwoStates),
    "read_elsewhere": _of(_ReadElsewhere),
    "computed": _of(_Computed),
}

Get = Callable[[str], Program]


@pytest.fixture(scope="module")
def cached() -> Get:
    """Programs with caches by the names above."""
    return decoders.with_caches(FACTORIES)


def laid_together(program: Program) -> list[fx.Node]:
    return [node for node in program.graph.nodes if len(merged(node)) > 1]


# Products


@pytest.mark.parametrize("name", ["llama", pytest.param("qwen2", marks=pytest.mark.slow), "looped"])
def test_queries_keys_and_values_are_one_product(cached: Get, name: str) -> None:
    program = cached(name)
    made = prepared(program)
    each = 1 if name == "llama" else 2  # weights, and biases
    assert [len(merged(node)) for node in laid_together(made)] == [3] * each * BLOCKS
    before, after = (
        len(item.graph.find_nodes(op="call_function", target=aten.linear.default)) for item in (program, made)
    )
    assert after == before - 2 * BLOCKS
    with torch.no_grad():
        wanted, returned = program.module(**program.example_inputs), made.module(**made.example_inputs)
    for key in results(program.graph):
        torch.testing.assert_close(returned[key], wanted[key], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ["tied", "unbiased", "two_states", "read_elsewhere", "computed", "gpt2"])
def test_others_stay_apart(cached: Get, name: str) -> None:
    assert not laid_together(prepared(cached(name)))


def test_weights_together_are_one_weight_of_a_piece(cached: Get) -> None:
    plan = partition(prepared(cached("qwen2")))
    functions = [lower(piece) for _, piece in plan.stacks[0].blocks[1:]]  # the first one embeds the tokens too
    assert len({function.key for function in functions}) == 1
    assert sum(len(merged(node)) == 3 for node in functions[0].weights) == 2
    assert all(merged(node) for node in functions[0].weights)


@pytest.mark.parametrize("name", ["looped", "read_elsewhere", "gpt2"])
def test_a_bundle_has_every_weight_once(cached: Get, name: str, tmp_path: Path) -> None:
    program = cached(name)
    figures = offramp.save(program, tmp_path / "made", segments=2)
    assert max(figures["chain"], figures["segments"], figures["cache"]) < 1e-5
    unique = {p.data_ptr(): p for p in program.graph_module.parameters()}.values()
    wanted = sum(p.numel() * p.element_size() for p in unique)
    slack = 64 * len(list(program.graph_module.parameters())) + 4096  # every weight starts at a multiple of 64
    assert wanted - 256 <= (tmp_path / "made" / "weights.bin").stat().st_size <= wanted + slack
    for path in tmp_path.glob("made/decoder*.onnx"):
        graph = onnx.load(path, load_external_data=False).graph
        bodies = [item.g for node in graph.node for item in node.attribute if item.name == "body"]  # of several tokens
        nodes = [node for each in (graph, *bodies) for node in each.node]
        packed = [node.input[1:3] for node in nodes if node.op_type == "GroupQueryAttention"]
        if name in ("looped", "gpt2"):
            assert packed
            assert all(list(item) == ["", ""] for item in packed)


# Norms and layout


def _graph(call: Callable[[Tensor, Tensor, Tensor], Any]) -> fx.Graph:
    given = (torch.randn(2, 3, 8), torch.randn(2, 3, 8), torch.randn(8))

    class Module(nn.Module):
        def forward(self, x: Tensor, y: Tensor, w: Tensor) -> Any:
            return call(x, y, w)

    exported = torch.export.export(Module(), given, strict=False)
    graph = exported.graph
    assert isinstance(graph, fx.Graph)
    return graph


def _root(x: Tensor, epsilon: float = 1e-6) -> Tensor:
    return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + epsilon)


def targets(graph: fx.Graph) -> list[Any]:
    return [node.target for node in graph.nodes if node.op == "call_function"]


@pytest.mark.parametrize(
    "norm",
    [
        lambda x, y, w: w * _root(x),
        lambda x, y, w: _root(x) * w,
        lambda x, y, w: torch.rsqrt((x * x).mean(-1, keepdim=True) + 1e-6) * x * w,
    ],
)
def test_norms_are_one_operator(norm: Any) -> None:
    graph = _graph(norm)
    given = torch.randn(2, 3, 8), torch.randn(2, 3, 8), torch.randn(8)
    wanted = fx.GraphModule({}, graph)(*given)
    fuse_norms(graph)
    assert targets(graph) == [aten.rms_norm.default]
    torch.testing.assert_close(fx.GraphModule({}, graph)(*given), wanted)


@pytest.mark.parametrize(
    "norm",
    [
        lambda x, y, w: _root(x),
        lambda x, y, w: y * _root(x),
        lambda x, y, w: w * (x * torch.rsqrt(y.pow(2).mean(-1, keepdim=True) + 1e-6)),
        lambda x, y, w: w * (x * torch.rsqrt(x.pow(3).mean(-1, keepdim=True) + 1e-6)),
        lambda x, y, w: w * (x * torch.rsqrt(x.pow(2).mean(1, keepdim=True) + 1e-6)),
        lambda x, y, w: w * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True))),
    ],
)
def test_others_are_no_norms(norm: Any) -> None:
    graph = _graph(norm)
    before = targets(graph)
    fuse_norms(graph)
    assert targets(graph) == before


def test_layout_that_is_undone_vanishes() -> None:
    def call(x: Tensor, y: Tensor, w: Tensor) -> Tensor:
        apart = x.reshape(2, 3, 2, 4).transpose(1, 2)
        return apart.transpose(2, 1).reshape(2, 3, -1) + y

    graph = _graph(call)
    cancel_layout(graph)
    assert targets(graph) == [aten.add.Tensor]
    graph = _graph(lambda x, y, w: x.reshape(2, 3, 2, 4).transpose(1, 2).transpose(2, 3).reshape(6, 8))
    before = targets(graph)
    cancel_layout(graph)
    assert targets(graph) == before
