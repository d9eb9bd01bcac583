"""Pieces as ONNX: one translation for equal pieces, sizes of their own inputs, and refusals that say where."""

# mypy: disable-error-code="no-any-return"
from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import architectures
import numpy as np
import onnx
import onnxruntime
import pytest
import shared
import tiny
import torch
from torch import Tensor, fx, nn
from torch.fx.experimental.symbolic_shapes import PendingUnbackedSymbolNotFound

from offramp.errors import ExecutionError, ExportError
from offramp.export import partition, save, translations, write
from offramp.export.lowering import lower as lowering
from offramp.export.lowering.exporter import OPSET
from offramp.export.lowering.lower import lower, translate
from offramp.export.lowering.outline import Computation
from offramp.export.partition import Plan, whole
from offramp.export.subgraph import Subgraph
from offramp.export.translations import Translations
from offramp.program import Program, capture
from offramp.program.graph import aten, attribute, expression, shape
from offramp.program.program import evaluate
from offramp.program.sizes import other_sizes
from offramp.runtime.chain import load
from offramp.runtime.engine.sessions import session_options


def pieces(plan: Plan) -> list[Subgraph]:
    found = [*plan.before, *(block for stack in plan.stacks for _, block in stack.blocks), *plan.tails]
    return [piece for piece in found if piece is not None]


def piece(program: Program, name: str) -> Subgraph:
    (found,) = (piece for piece in pieces(partition(program)) if piece.name == name)
    return found


def assert_translated(
    program: Program, function: Computation, model: onnx.ModelProto, inputs: Mapping[str, Tensor]
) -> None:
    """ONNX Runtime computes from the function's inputs what torch does."""
    wanted = evaluate(program.graph_module, [*function.inputs, *function.weights, *function.outputs], inputs)
    feed = {f"in{i}": wanted[node].detach().numpy() for i, node in enumerate(function.inputs)}
    feed |= {f"w{i}": wanted[node].detach().numpy() for i, node in enumerate(function.weights)}
    session = onnxruntime.InferenceSession(model.SerializeToString(), session_options())
    made = session.run([f"out{i}" for i in range(len(function.outputs))], feed)
    for node, array in zip(function.outputs, made, strict=True):
        np.testing.assert_allclose(array, wanted[node].detach().numpy(), rtol=1e-4, atol=1e-5)


@pytest.fixture(scope="module")
def translated(encoder: tiny.Captured) -> dict[str, tuple[Computation, onnx.ModelProto]]:
    """The three kinds of pieces of a small encoder."""
    names = ("before-encoder", "encoder.2", "tail")
    functions = {name: lower(piece(encoder.program, name)) for name in names}
    return {name: (function, translate(function, name)) for name, function in functions.items()}


# Once for equal pieces


def _translations(program: Program, root: Path) -> int:
    writer, made = write.Writer(root, program.graph_module), Translations()
    for each in pieces(partition(program)):
        writer.segment(made.of(each), each.name)
    writer.close()
    return len(made)


class _Deep(tiny.Encoder):
    def __init__(self, blocks: int) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(tiny.Block() for _ in range(blocks))


def _empty(function: Computation, _: str) -> onnx.ModelProto:
    """A model that takes weights and computes nothing."""
    weights = [onnx.helper.make_tensor_value_info(f"w{i}", 1, None) for i in range(len(function.weights))]
    return onnx.helper.make_model(onnx.helper.make_graph([], "empty", weights, []))


@pytest.mark.parametrize("blocks", [3, 6])
def test_equal_blocks_are_translated_once(blocks: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(translations, "translate", _empty)
    monkeypatch.setenv("OFFRAMP_CACHE", "")
    program = tiny.captured(partial(_Deep, blocks), tiny.text()).program
    assert program.stacks["encoder"].blocks == blocks
    assert _translations(program, tmp_path) == 3  # before, block, tail
    assert len(list(tmp_path.glob("*.onnx"))) == blocks + 2


def test_a_translation_serves_every_equal_block(
    encoder: tiny.Captured, translated: Mapping[str, tuple[Computation, onnx.ModelProto]]
) -> None:
    _, model = translated["encoder.2"]
    for depth in range(1, tiny.BLOCKS + 1):
        assert_translated(encoder.program, lower(piece(encoder.program, f"encoder.{depth}")), model, encoder.inputs)


class _Scaled(tiny.Encoder):
    """Blocks that differ in one constant."""

    def run(self, x: Tensor, mask: Tensor) -> Tensor:
        for depth, block in enumerate(self.blocks, 2):
            x = block(x, mask) / depth
        return x


def test_blocks_that_differ_in_a_constant_are_not_equal() -> None:
    plan = partition(tiny.captured(_Scaled, tiny.text()).program)
    keys = {lower(block).key for _, block in plan.stacks[0].blocks}
    assert len(keys) == tiny.BLOCKS


# Sizes


def test_sizes_are_read_from_own_inputs(encoder: tiny.Captured) -> None:
    for each in pieces(partition(encoder.program)):
        function = lower(each)
        names = [node.name for node in function.graph.find_nodes(op="placeholder")]
        assert names == [f"in{i}" for i in range(len(each.inputs))] + [f"w{i}" for i in range(len(function.weights))]
        assert function.inputs == each.inputs
    block = lower(piece(encoder.program, "encoder.3"))
    read = {node.args[0] for node in block.graph.find_nodes(op="call_function", target=aten.sym_size.int)}
    assert block.graph.find_nodes(op="placeholder", target="in0")[0] in read


class _BySource(tiny.Encoder):
    """Every block scales by the length of a sequence that it does not read."""

    def forward(self, input_ids: Tensor, source_ids: Tensor) -> Tensor:  # type: ignore[override]
        x = self.embed(input_ids) + self.words(source_ids).mean(1, keepdim=True)
        for block in self.blocks:
            x = block(x, None) * (source_ids.shape[1] / 10)
        return self.head(self.leave(x))


def test_a_size_that_no_input_has_brings_its_tensor_along() -> None:
    inputs = {"input_ids": tiny.ids(), "source_ids": tiny.ids(tiny.SOURCES, seed=2)}
    program = tiny.captured(_BySource, inputs).program
    each = piece(program, "encoder.2")
    source = program.nodes["source_ids"]
    assert source not in each.inputs
    function = lower(each)
    assert function.inputs == (*each.inputs, source)
    module = fx.GraphModule({}, function.graph)
    for sizes in [inputs, *other_sizes(program)]:
        values = evaluate(program.graph_module, [*function.inputs, *function.outputs], sizes)
        read = [attribute(program.graph_module, str(node.target)) for node in function.weights]
        with torch.no_grad():
            (made,) = module(*(values[node] for node in function.inputs), *read)
        torch.testing.assert_close(made, values[function.outputs[0]])


@pytest.mark.parametrize("name", ["before-encoder", "encoder.2", "tail"])
def test_a_translation_holds_at_other_sizes(
    encoder: tiny.Captured, translated: Mapping[str, tuple[Computation, onnx.ModelProto]], name: str
) -> None:
    for inputs in [encoder.inputs, *other_sizes(encoder.program)]:
        assert_translated(encoder.program, *translated[name], inputs)


def test_a_mask_of_one_row_gets_a_row_for_every_query(encoder: tiny.Captured, labeller: tiny.Captured) -> None:
    for captured in (encoder, labeller):
        function = lower(piece(captured.program, "encoder.2"))
        (attention,) = function.graph.find_nodes(op="call_function", target=aten.scaled_dot_product_attention.default)
        query, mask = attention.args[0], attention.args[3]
        assert isinstance(query, fx.Node)
        assert isinstance(mask, fx.Node)
        assert mask.target is aten.expand.default
        assert expression(shape(mask)[-2]) == expression(shape(query)[-2])
        (before,) = (node for node in function.inputs if node.meta["val"].dtype == torch.bool)
        assert shape(before)[-2] == 1


class Blind(tiny.Encoder):
    """Padding sees nothing, by float32's lowest number, and counts in the mean."""

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> dict[str, Tensor]:
        seen = attention_mask.bool()
        mask = torch.zeros(1).masked_fill(~(seen[:, None, :, None] & seen[:, None, None, :]), torch.finfo().min)
        return {"logits": self.head(self.leave(self.run(self.embed(input_ids), mask))).mean(1)}


def test_a_query_that_sees_no_key_by_a_finite_number_gets_the_mean_of_all(tmp_path: Path) -> None:
    model, inputs = tiny.seeded(Blind), {**tiny.text(), "attention_mask": torch.ones_like(tiny.ids())}
    save(capture(model, inputs), tmp_path / "m.offramp")
    inputs["attention_mask"] = tiny.padding()
    found = load(tmp_path / "m.offramp").run({name: value.numpy() for name, value in inputs.items()})
    tiny.assert_same({"logits": torch.from_numpy(found.outputs["logits"])}, tiny.outputs(model, inputs))


class Ended(tiny.Encoder):
    """As T5's classifier: a norm that becomes one operator, then the token of each row that a mask selects."""

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> dict[str, Tensor]:
        x = self.run(self.embed(input_ids), attention_mask.bool()[:, None, None])
        x = torch.as_tensor(self.leave.weight) * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6))
        ends = input_ids == 1
        torch._check(torch.unique_consecutive(ends.sum(1)).numel() == 1)
        last = x[ends, :].view(x.shape[0], -1, tiny.WIDTH)[:, -1]
        return {"logits": self.head(last)}


def test_what_a_mask_selects_may_lie_behind_a_norm(tmp_path: Path) -> None:
    model, ids = tiny.seeded(Ended), tiny.ids().clamp(min=2)
    ids[:, -1] = 1
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    save(capture(model, inputs), tmp_path / "m.offramp")
    inputs = {"input_ids": ids[:1, 2:], "attention_mask": torch.ones_like(ids)[:1, 2:]}
    found = load(tmp_path / "m.offramp").run({name: value.numpy() for name, value in inputs.items()})
    tiny.assert_same({"logits": torch.from_numpy(found.outputs["logits"])}, tiny.outputs(model, inputs))


def test_the_order_of_inputs_does_not_matter() -> None:
    """torch gives one size two symbols where it learns late that they are equal."""
    program = shared.captured(architectures.OTHERS["dual_tower"])
    block = piece(program, "encoder.2")
    for order in (block.inputs, block.inputs[::-1]):
        function = lower(replace(block, inputs=order))
        assert_translated(program, function, translate(function, "encoder.2"), dict(program.example_inputs))


# The ONNX model


def test_models_are_plain(translated: Mapping[str, tuple[Computation, onnx.ModelProto]]) -> None:
    assert OPSET >= 23
    for function, model in translated.values():
        onnx.checker.check_model(model)
        assert {opset.domain: opset.version for opset in model.opset_import}[""] == OPSET
        assert [value.name for value in model.graph.input] == [
            *(f"in{i}" for i in range(len(function.inputs))),
            *(f"w{i}" for i in range(len(function.weights))),
        ]
        assert [value.name for value in model.graph.output] == [f"out{i}" for i in range(len(function.outputs))]
        content = model.SerializeToString()
        for word in (b"tiny.py", b"site-packages", b"stack_trace", b"nn_module_stack"):
            assert word not in content


def test_an_attention_stays_one_operator(translated: Mapping[str, tuple[Computation, onnx.ModelProto]]) -> None:
    _, model = translated["encoder.2"]
    operators = [node.op_type for node in model.graph.node]
    assert operators.count("Attention") == 1
    assert operators.count("LayerNormalization") == 2
    assert "Softmax" not in operators


class _Window(tiny.Encoder):
    """The mask does not depend on any input."""

    def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]
        places = torch.arange(x.shape[1])
        return self.head(self.leave(self.run(x, (places[:, None] - places[None, :]).abs() <= 2)))


def test_a_constant_may_cross() -> None:
    inputs = {"x": tiny.signal().transpose(0, 1).contiguous()}
    program = tiny.captured(_Window, inputs, dynamic={"x": {0: "batch"}}).program
    before = piece(program, "before-encoder")
    assert before.inputs == ()
    function = lower(before)
    assert_translated(program, function, translate(function, "before"), inputs)


def test_what_comes_out_as_it_came_in(encoder: tiny.Captured) -> None:
    hidden = encoder.program.nodes[encoder.program.stacks["encoder"].cuts[1]]
    graph = fx.Graph()
    given = graph.placeholder("in0")
    given.meta["val"] = hidden.meta["val"]
    same = graph.call_function(aten.clone.default, (given,))
    same.meta["val"] = hidden.meta["val"]
    graph.output((same,))
    function = Computation(graph, (hidden,), (), (hidden,), "")
    assert_translated(encoder.program, function, translate(function, "same"), encoder.inputs)


class _Smooth(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.mish(x)  # which the exporter has no translation for


class _Decomposed(tiny.Encoder):
    def __init__(self) -> None:
        super().__init__()
        for block in self.blocks:
            block.mlp[1] = _Smooth()


def test_what_is_decomposed_keeps_its_inputs() -> None:
    program = tiny.captured(_Decomposed, tiny.text()).program
    function = lower(piece(program, "encoder.2"))
    assert any(node.target is aten.mish.default for node in function.graph.nodes)
    model = translate(function, "encoder.2")
    assert [value.name for value in model.graph.input][:3] == ["in0", "in1", "w0"]
    assert_translated(program, function, model, tiny.text())


def test_translating_says_nothing(encoder: tiny.Captured, capfd: pytest.CaptureFixture[str]) -> None:
    translate(lower(piece(encoder.program, "tail")), "tail")
    assert capfd.readouterr() == ("", "")


class _Quotients(nn.Module):
    """Quotients of sizes, rounded down where one of the two may be less than nothing and where not."""

    def __init__(self, quotients: Callable[[int], tuple[int, ...]]) -> None:
        super().__init__()
        self.quotients = quotients

    def forward(self, x: Tensor) -> Tensor:
        return x.sum() + torch.cat([torch.arange(size) for size in self.quotients(x.shape[1])])


@pytest.mark.parametrize(
    "quotients",
    [
        lambda size: (-(-size // 4), (size - 9) // 4 + 3, size // 4 + 1),
        lambda size: (-(-7 // size),),
        lambda size: (-(7 // -size),),
        lambda size: (-(size // -4), -(size // (-size - 1))),
    ],
)
def test_quotients_of_sizes_are_rounded_down(quotients: Callable[[int], tuple[int, ...]]) -> None:
    program = capture(_Quotients(quotients), torch.ones(2, 10))
    function = lower(whole(program))
    model = translate(function, "model")
    for tokens in (2, 4, 7, 8, 11):
        assert_translated(program, function, model, {"x": torch.ones(2, tokens)})


# Refusals


@torch.library.custom_op("offramp_tests::twist", mutates_args=())
def twist(x: Tensor) -> Tensor:
    return x.flip(-1)


@twist.register_fake
def _(x: Tensor) -> Tensor:
    return torch.empty_like(x)


class _Twisted(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return twist(x)


class _Odd(tiny.Encoder):
    def __init__(self) -> None:
        super().__init__()
        for block in self.blocks:
            block.mlp[1] = _Twisted()


def test_a_refusal_names_the_operator_and_its_place() -> None:
    program = tiny.captured(_Odd, tiny.text()).program
    with pytest.raises(ExportError) as caught:
        translate(lower(piece(program, "encoder.2")), "encoder.2")
    lines, first = inspect.getsourcelines(_Twisted.forward)
    text = caught.value.reason
    assert text.startswith(f"segment encoder.2: offramp_tests.twist.default cannot be lowered to ONNX opset {OPSET} (")
    assert "blocks.1.mlp.1 (_Twisted)" in text
    assert f"test_lower.py:{first + 1}" in text
    assert "twist" in lines[1]
    assert caught.value.hint is not None


class _Selecting(tiny.Encoder):
    """Rows that are all padding are left out, as SmolVLM leaves out images."""

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> dict[str, Tensor]:
        kept = attention_mask.any(1)
        return super().forward(input_ids[kept], attention_mask[kept])


def test_a_size_that_depends_on_data_is_named_where_it_is_made(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_: object, **__: object) -> None:
        raise PendingUnbackedSymbolNotFound("Pending unbacked symbols {u0}")

    text = tiny.text()
    text["attention_mask"][1] = 0  # a row is dropped
    program = tiny.captured(_Selecting, text).program
    assert "encoder" in str(program)  # though some sizes only a run tells
    monkeypatch.setattr(lowering, "to_onnx", fails)
    with pytest.raises(ExportError) as caught:
        translate(lower(piece(program, "before-encoder")), "before-encoder")
    line = inspect.getsourcelines(_Selecting.forward)[1] + 2
    reason = caught.value.reason
    assert reason.startswith("segment before-encoder: how much aten.index.Tensor gives depends on its data")
    assert f"test_lower.py:{line})" in reason
    assert caught.value.hint is not None


class _Pieces(tiny.Encoder):
    """Of the places of words, the rows alone."""

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> dict[str, Tensor]:
        rows, _ = attention_mask.nonzero(as_tuple=True)
        return super().forward(input_ids[rows], attention_mask[rows])


def test_what_gives_several_results_is_named_and_not_one_of_them(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_: object, **__: object) -> None:
        raise PendingUnbackedSymbolNotFound("Pending unbacked symbols {u0}")

    program = tiny.captured(_Pieces, tiny.text()).program
    monkeypatch.setattr(lowering, "to_onnx", fails)
    with pytest.raises(ExportError, match=r"how much aten\.\S+ gives depends on its data"):
        translate(lower(piece(program, "before-encoder")), "before-encoder")


def test_rows_that_are_all_kept_stay_rows(tmp_path: Path) -> None:
    captured = tiny.captured(_Selecting, tiny.text())
    save(captured.program, tmp_path / "model.offramp")
    chain = load(tmp_path / "model.offramp")
    more = tiny.text(3, 7)
    found = chain.run({name: value.numpy() for name, value in more.items()}).outputs
    tiny.assert_same({name: torch.from_numpy(value) for name, value in found.items()}, captured.eager(more))

    more["attention_mask"][1] = 0  # the model makes two rows of these three
    with pytest.raises(RuntimeError, match="out of bounds"):
        captured.program.module(**more)
    with pytest.raises(ExecutionError, match="invalid index found") as caught:
        chain.run({name: value.numpy() for name, value in more.items()})
    assert "padding images" in str(caught.value.hint)


def _swapped(function: Computation, old: Any, new: Callable[..., Any]) -> Computation:
    """A function with another operator in the place of one."""
    graph = fx.Graph()
    graph.output(graph.graph_copy(function.graph, {}))
    (node,) = graph.find_nodes(op="call_function", target=old)
    node.target = new
    node.args, node.kwargs = node.args[:1], {}
    return replace(function, graph=graph)


def test_an_operator_that_torch_decomposes_first_is_named_too(encoder: tiny.Captured) -> None:
    """special_i1 becomes prims.bessel_i1, which is what the exporter then complains of."""
    function = _swapped(lower(piece(encoder.program, "encoder.2")), aten.gelu.default, aten.special_i1.default)
    with pytest.raises(ExportError) as caught:
        translate(function, "encoder.2")
    assert "_i1" in caught.value.reason
    assert "blocks.1.mlp.1 (GELU)" in caught.value.reason


def test_any_other_failure_is_told_in_plain_words(encoder: tiny.Captured, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_: object, **__: object) -> None:
        raise RuntimeError("Failed to convert.\nmore") from ValueError("no room for a stride")

    monkeypatch.setattr(lowering, "to_onnx", fails)
    with pytest.raises(ExportError) as caught:
        translate(lower(piece(encoder.program, "tail")), "tail")
    text = str(caught.value)
    assert text.startswith(f"segment tail cannot be lowered to ONNX opset {OPSET}: ")
    assert "no room for a stride" in text
    assert "\x1b" not in text
