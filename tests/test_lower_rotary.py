"""Rotary positions as one operator: which are, which are not and why, and what ONNX Runtime makes of them."""

from __future__ import annotations

import operator
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import decoders
import onnx
import pytest
import shared
import torch
from architectures import BLOCKS, WIDTH, Factory
from decoders import SIZE
from torch import Tensor, fx, nn
from torch.nn import functional as F

import offramp
from offramp.export.lowering.last_axis import part, repeats
from offramp.export.lowering.lower import lower
from offramp.export.lowering.node_builder import Target
from offramp.export.lowering.rotary import ROTARY, fuse_rotary, rotary
from offramp.export.partition import partition
from offramp.export.prepare import prepared
from offramp.passes.infra.editor import Editor
from offramp.program import Program
from offramp.program.graph import aten, results, shape

WIDE = {"head_dim": 16}  # GroupQueryAttention rotates heads of 16 features and more


def _turned(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    half = x.shape[-1] // 2
    return x * cos + torch.cat([-x[..., half:], x[..., :half]], -1) * sin


def _rotated(tables: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]], turn: Any = _turned) -> Factory:
    """A decoder whose attention rotates by ``tables`` of a query and of the angles ``[T, SIZE / 2]``."""

    def core(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        angles = torch.arange(q.shape[2])[:, None] * 0.5 ** torch.arange(SIZE // 2)
        cos, sin = tables(q, angles)
        return F.scaled_dot_product_attention(turn(q, cos, sin), turn(k, cos, sin), v, is_causal=True)

    return decoders._causal(core)


def _twice(_: Tensor, angles: Tensor) -> tuple[Tensor, Tensor]:
    table = torch.cat([angles, angles], -1)
    return table.cos(), table.sin() * 1.5


def _unequal(_: Tensor, angles: Tensor) -> tuple[Tensor, Tensor]:
    table = torch.cat([angles, 2 * angles], -1)
    return table.cos(), table.sin()


def _of_each_head(q: Tensor, angles: Tensor) -> tuple[Tensor, Tensor]:
    table = torch.arange(1, q.shape[1] + 1)[:, None, None] * torch.cat([angles, angles], -1)
    return table.cos(), table.sin()


def _of_contents(q: Tensor, angles: Tensor) -> tuple[Tensor, Tensor]:
    table = q.mean(1, keepdim=True)
    return table.cos(), table.sin()


def _turned_back(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    half = x.shape[-1] // 2
    return x * cos + torch.cat([x[..., half:], -x[..., :half]], -1) * sin


def _added(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    half = x.shape[-1] // 2
    return x * cos + torch.cat([-x[..., half:], x[..., :half]], -1) + sin


FACTORIES: dict[str, Factory] = {
    **{name: decoders.REQUIRED[name] for name in ("llama", "gpt2")},
    **{name: decoders.OTHERS[name] for name in ("gpt_neox", "qwen3", "cohere")},
    "wide": decoders._hf("LlamaForCausalLM", {**decoders._GROUPED, **WIDE}),
    "wide_partial": decoders._hf(
        "PhiForCausalLM", {**decoders._TEXT, "hidden_size": 4 * WIDTH}, partial_rotary_factor=0.5
    ),
    "twice": _rotated(_twice),
    "unequal": _rotated(_unequal),
    "of_each_head": _rotated(_of_each_head),
    "of_contents": _rotated(_of_contents),
    "turned_back": _rotated(_twice, _turned_back),
    "added": _rotated(_twice, _added),
}

Get = Callable[[str], Program]


@pytest.fixture(scope="module")
def cached() -> Get:
    """Programs with caches by the names above."""
    return decoders.with_caches(FACTORIES)


def rotations(program: Program) -> list[fx.Node]:
    return list(program.graph.find_nodes(op="call_function", target=ROTARY))


def block(program: Program, target: Target = "ort") -> Counter[Any]:
    """The operators of the second block as it is lowered."""
    function = lower(partition(prepared(program)).stacks[-1].blocks[1][1], target)
    return Counter(
        node.args[1] if "onnx_symbolic" in str(node.target) else node.target
        for node in function.graph.nodes
        if node.op == "call_function"
    )


# The operator


def test_the_operator_turns_pairs_by_position() -> None:
    lengths = torch.tensor([0, 3])
    x, angles = torch.randn(2, 3, 4, SIZE + 2), torch.randn(9, SIZE // 2)
    found = rotary(x, angles.cos(), angles.sin(), lengths)
    places = lengths[:, None] + torch.arange(4)
    table = torch.cat([angles, angles], -1)[places][:, None]
    expected = torch.cat([_turned(x[..., :SIZE], table.cos(), table.sin()), x[..., SIZE:]], -1)
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(ROTARY(x, angles.cos(), angles.sin(), lengths), expected)


# Fires


@pytest.mark.parametrize("name", ["llama", "gpt_neox", pytest.param("qwen3", marks=pytest.mark.slow), "twice"])
def test_queries_and_keys_are_rotated_by_one_operator(cached: Get, name: str) -> None:
    program = cached(name)
    made = prepared(program)
    found = rotations(made)
    assert len(found) == 2 * BLOCKS
    assert len({node.args[1:] for node in found}) == 1  # all by the same tables
    assert all(node.meta["provenance"]["pass"] == "export" for node in found)
    features = {int(shape(node)[-1]) for node in found}
    turned = {2 * int(shape(node.args[1])[-1]) for node in found}  # type: ignore[arg-type]
    assert features == {SIZE}
    assert turned == {SIZE // 2 if name == "gpt_neox" else SIZE}
    assert not made.graph.find_nodes(op="call_function", target=aten.neg.default)
    assert made.history == program.history
    with torch.no_grad():
        wanted, returned = program.module(**program.example_inputs), made.module(**made.example_inputs)
    for key in results(program.graph):
        torch.testing.assert_close(returned[key], wanted[key], rtol=1e-5, atol=1e-5)


def test_tables_are_made_when_the_capacity_changes(cached: Get) -> None:
    program = prepared(cached("llama"))
    plan = partition(program)
    (tables,) = plan.tables
    assert tables is not None
    assert [tuple(map(str, shape(node)))[1:] for node in tables.outputs] == [(str(SIZE // 2),)] * 2
    assert set(tables.outputs) <= set(plan.stacks[0].blocks[1][1].inputs)


def test_a_second_time_nothing_changes(cached: Get) -> None:
    once = prepared(cached("llama"))
    assert str(prepared(once).graph) == str(once.graph)


def test_programs_without_caches_stay() -> None:
    program = shared.captured(FACTORIES["llama"])
    assert prepared(program) is program


# Does not fire

REFUSED = {
    "unequal": "the two halves of the angles are not known to be equal",
    "of_each_head": "the table has the shape",
    "of_contents": "the angles are not looked up by position",
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_no_rotation_says_why(cached: Get, name: str, caplog: pytest.LogCaptureFixture) -> None:
    editor = Editor(cached(name), "test")
    notes = fuse_rotary(editor)
    assert len(notes) == 2 * BLOCKS
    assert all(REFUSED[name] in note for note in notes)
    assert not any(editor.edits.values())
    with caplog.at_level("DEBUG", "offramp.export"):
        assert not rotations(prepared(cached(name)))
    assert len([record for record in caplog.records if REFUSED[name] in record.getMessage()]) == 2 * BLOCKS


@pytest.mark.parametrize("name", [pytest.param("gpt2", marks=pytest.mark.slow), "cohere", "turned_back", "added"])
def test_other_forms_are_left_alone(cached: Get, name: str) -> None:
    editor = Editor(cached(name), "test")
    assert fuse_rotary(editor) == ()
    assert not any(editor.edits.values())


# Halves


class _Values(nn.Module):
    """Values of which the halves repeat or not, by the order of ``REPEATS``."""

    equal: Tensor
    other: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("equal", torch.arange(3.0).repeat(2))
        self.register_buffer("other", torch.arange(6.0))

    def forward(self, x: Tensor) -> list[Tensor]:
        twice = torch.cat([x, x], -1)  # [5, 6]
        return [
            twice,
            twice.cos() * 2 + x[:, :1],
            twice.unsqueeze(0).transpose(0, 1).permute(1, 0, 2)[:, 1:3],
            twice.reshape(1, 5, 6).expand(2, 5, 6),
            torch.cat([x.cos() * 2, x.cos() * 2], 1),
            x.repeat(1, 2),
            twice * self.equal,
            twice.index_select(0, torch.tensor([3, 1])),
            # not known to
            torch.cat([x, x + 1], -1),
            torch.cat([x, x], 0).transpose(0, 1)[:, :6],
            twice * self.other,
            twice.transpose(0, 1)[:, :4],
            torch.cat([x, x, x, x], -1),
            twice.reshape(15, 2),
            torch.cat([x.cos() * 2, x.cos() * 3], 1),
            x.repeat_interleave(2, -1),
            twice.cumsum(-1),
        ]


def test_halves_repeat_by_how_they_are_made() -> None:
    graph = torch.export.export(_Values(), (torch.randn(5, 3),), strict=False).run_decompositions({}).module()
    assert isinstance(graph, fx.GraphModule)
    (returned,) = graph.graph.output_node().args
    values: Any = returned
    found = [repeats(node, graph) for node in values]
    assert found == [True] * 8 + [False] * 9


def test_parts_of_the_last_axis() -> None:
    graph = fx.Graph()
    x = graph.placeholder("x")
    x.meta["val"] = torch.zeros(2, 8)

    def call(target: Any, *args: Any) -> fx.Node:
        node = graph.call_function(target, args)
        node.meta["val"] = target(*fx.node.map_arg(args, lambda arg: arg.meta["val"]))
        return node

    assert part(call(aten.slice.Tensor, x, 1, 2, 2**63 - 1)) == (x, 2, 8)
    assert part(call(aten.slice.Tensor, x, -1, -3)) == (x, 5, 8)
    assert part(call(aten.slice.Tensor, x, 0, 1)) is None
    assert part(call(aten.slice.Tensor, x, 1, 0, 8, 2)) is None
    split = call(aten.split_with_sizes.default, x, [3, 5], 1)
    assert part(call(operator.getitem, split, 1)) == (x, 3, 8)
    assert part(call(operator.getitem, call(aten.split.Tensor, x, 1), 1)) is None
    assert part(x) is None


# Lowered


@pytest.mark.parametrize("name", ["wide", "wide_partial"])
def test_onnx_runtimes_attention_rotates_itself(cached: Get, name: str) -> None:
    found = block(cached(name))
    assert found["GroupQueryAttention"] == 1
    assert "RotaryEmbedding" not in found
    assert not {aten.transpose.int, aten.reshape.default, aten.cat.default} & set(found)
    # queries, keys and values; output; gate, up, down or two layers
    assert found[aten.linear.default] == (5 if name == "wide" else 4)


@pytest.mark.parametrize(("name", "target"), [("llama", "ort"), ("gpt_neox", "ort"), ("wide", "portable")])
def test_others_get_an_operator_of_their_own(cached: Get, name: str, target: Target) -> None:
    found = block(cached(name), target)
    assert found["RotaryEmbedding"] == 2
    assert found["GroupQueryAttention"] == (target == "ort")


@pytest.mark.parametrize(("name", "target"), [("wide", "ort"), ("wide_partial", "ort"), ("gpt_neox", "portable")])
def test_a_bundle_computes_what_torch_does(cached: Get, name: str, target: Target, tmp_path: Path) -> None:
    program = cached(name)
    figures = offramp.save(program, tmp_path / "made", segments=2, target=target)
    assert figures["chain"] < 1e-5
    assert figures["cache"] < 1e-5
    models = [onnx.load(path, load_external_data=False) for path in tmp_path.glob("made/decoder.*.onnx")]
    rotating = {
        node.op_type
        for model in models
        for node in model.graph.node
        if node.op_type == "RotaryEmbedding" or any(item.name == "do_rotary" for item in node.attribute)
    }
    assert rotating == {"GroupQueryAttention" if target == "ort" and "wide" in name else "RotaryEmbedding"}
