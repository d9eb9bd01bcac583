"""Capture: the graph computes what eager computes, shares its weights, and refusals say why."""

# mypy: disable-error-code="no-any-return"
from __future__ import annotations

import logging
from collections import namedtuple
from collections.abc import Callable
from typing import Any

import pytest
import tiny
import torch
from torch import Tensor, fx, nn
from torch._subclasses import fake_tensor
from torch.nn.attention.flex_attention import flex_attention

from offramp.errors import CaptureError, StructureError
from offramp.program import capture
from offramp.program.graph import results
from offramp.program.program import Program


class Layer(nn.Module):
    """Base of the modules below: one linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 4)
        self.register_buffer("seen", torch.zeros(()))
        self.seen: Tensor


X = torch.randn(3, 4, generator=torch.Generator().manual_seed(0))

# What is captured


@pytest.mark.parametrize("name", ["encoder", "labeller", "decoder", "two_stacks", "time_first", "mixing"])
def test_the_graph_computes_what_eager_computes(name: str, request: pytest.FixtureRequest) -> None:
    captured: tiny.Captured = request.getfixturevalue(name)
    eager = captured.eager()
    assert tuple(eager) == captured.program.outputs
    tiny.assert_same(captured.program.example_outputs, eager, rtol=0, atol=0)
    tiny.assert_same(tiny.outputs(captured.program.module, captured.inputs), eager)


def test_a_program_takes_the_forwards_parameters_by_name(two_stacks: tiny.Captured) -> None:
    assert two_stacks.program.inputs == ("source_ids", "source_mask", "input_ids")


def test_an_output_is_called_like_no_other_node() -> None:
    """Objectives ask for nodes and for outputs by name."""

    class Named(Layer):
        def forward(self, x: Tensor) -> dict[str, Tensor]:
            return {"relu": self.layer(x.relu()) + 1, "linear": x - 1, "x": x * 2}

    model = Named()
    program = capture(model, {"x": X})
    returned = results(program.graph)
    assert {name: program.nodes[name] for name in returned if name in program.nodes and name != "x"} == {}
    for name, value in program.module(x=X).items():
        torch.testing.assert_close(value, model(X)[name])


def test_weights_are_those_of_the_model(decoder: tiny.Captured) -> None:
    own = dict(decoder.model.named_parameters(remove_duplicate=False))
    shared = dict(decoder.program.module.named_parameters())
    assert len(shared) == len(list(decoder.model.parameters()))
    assert all(weight is own[name] for name, weight in shared.items())


def test_weights_that_are_not_trained_stay_so() -> None:
    model = Plain()
    model.layer.bias.requires_grad_(False)
    trained = {name: weight.requires_grad for name, weight in capture(model, X).module.named_parameters()}
    assert trained == {"layer.weight": True, "layer.bias": False}


class Plain(Layer):
    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x)


def test_example_inputs_in_any_form() -> None:
    model = Plain()
    for example in (X, (X,), [X], {"x": X}):
        program = capture(model, example)
        assert program.inputs == ("x",)
        tiny.assert_same(program.module(x=X), {"output": model(X)})


class Structured(Layer):
    kind = namedtuple("kind", ["first", "second"])

    def forward(self, x: Tensor) -> dict[str, Any]:
        y = self.layer(x)
        pair = self.kind(y, y + 1)
        return {"a": y, "pair": pair, "none": None, "deep": {"list": [y * 2, (y.sum(1),)]}, "x": x}


def test_nested_outputs_are_named_by_their_place() -> None:
    program = capture(Structured(), X)
    names = ("a", "pair.first", "pair.second", "deep.list.0", "deep.list.1.0", "x")
    assert program.outputs == names
    found = program.module(x=X)
    torch.testing.assert_close(found["pair.second"], found["a"] + 1)
    torch.testing.assert_close(found["deep.list.1.0"], found["a"].sum(1))
    torch.testing.assert_close(found["x"], X)


class Positional(Layer):
    def forward(self, x: Tensor) -> tuple[Tensor, None, Tensor]:
        return self.layer(x), None, self.layer.weight


def test_outputs_of_a_tuple_are_numbered() -> None:
    program = capture(Positional(), X)
    assert program.outputs == ("output0", "output2")
    assert program.module(x=X)["output2"] is program.module.get_parameter("layer.weight")


class Optional(Layer):
    def forward(self, x: Tensor, scale: Tensor | None = None, flag: bool = True) -> Tensor:
        return self.layer(x) if scale is None else self.layer(x) * scale


def test_optional_parameters_may_be_left_out() -> None:
    assert capture(Optional(), X).inputs == ("x",)
    program = capture(Optional(), {"scale": torch.tensor(2.0), "x": X})
    assert set(program.inputs) == {"x", "scale"}
    tiny.assert_same(program.module(x=X, scale=torch.tensor(3.0)), {"output": 3 * _linear(program, X)})


def _linear(program: Program, x: Tensor) -> Tensor:
    module = program.module
    return nn.functional.linear(x, module.get_parameter("layer.weight"), module.get_parameter("layer.bias"))


class Unused(Layer):
    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        return self.layer(x)


def test_an_input_that_is_not_used_stays_an_input() -> None:
    program = capture(Unused(), {"x": X, "mask": torch.ones(3, 5)})
    assert program.inputs == ("x", "mask")
    assert program.module(x=X, mask=torch.ones(3, 9))["output"].shape == (3, 4)


class Variadic(Layer):
    def forward(self, x: Tensor, **more: Tensor) -> Tensor:
        return self.layer(x) + more["added"]


def test_inputs_of_a_variadic_forward_need_names() -> None:
    with pytest.raises(CaptureError, match=r"no parameter \['added'\]"):
        capture(Variadic(), {"x": X, "added": X + 1})


def test_inputs_by_position_of_a_forward_that_takes_anything_need_names() -> None:
    class Anything(Layer):
        def __init__(self) -> None:
            super().__init__()
            self.other = nn.Identity()

        def forward(self, *args: Tensor, **named: Tensor) -> Tensor:
            return self.layer(named["x"])

    assert capture(Anything(), {"x": X}).inputs == ("x",)
    with pytest.raises(CaptureError, match=r"(?s)with parameters \[\].*try: a mapping from names to tensors"):
        capture(Anything(), (X,))


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
def test_flex_attention_is_refused_by_name() -> None:
    class Flex(Layer):
        def forward(self, x: Tensor) -> Tensor:
            x = self.layer(x)[:, None, None]
            return flex_attention(x, x, x)

    with pytest.raises(CaptureError, match="try: attention by scaled_dot_product_attention"):
        capture(Flex(), X)


def test_a_model_made_in_inference_mode_is_refused_by_name() -> None:
    with torch.inference_mode():
        model = Plain()
    with pytest.raises(CaptureError, match=r"try: make or load the model outside of torch\.inference_mode\(\)"):
        capture(model, X)


def test_attention_inside_of_an_operator_of_ones_own_is_not_seen() -> None:
    @torch.library.custom_op("offramp_test::attend", mutates_args=())
    def attend(x: Tensor) -> Tensor:
        return nn.functional.scaled_dot_product_attention(x, x, x)

    attend.register_fake(torch.empty_like)

    class Hidden(Layer):
        def forward(self, x: Tensor) -> Tensor:
            out: Tensor = attend(self.layer(x))
            return out

    program = capture(Hidden(), X)
    with pytest.raises(
        StructureError, match=r"operators offramp_test.attend.default is not\n  try: the same by operators"
    ):
        program.require_stacks()


def test_a_graph_module_without_class_of_its_own(encoder: tiny.Captured) -> None:
    traced = fx.symbolic_trace(tiny.seeded(tiny.Encoder))
    program = capture(traced, encoder.inputs)
    tiny.assert_same(tiny.outputs(program.module, encoder.inputs), encoder.eager())
    (stack,) = program.stacks.values()
    assert stack.blocks == tiny.BLOCKS


def test_a_captured_program_can_be_captured_again(encoder: tiny.Captured) -> None:
    program = capture(encoder.program.module, encoder.inputs)
    assert program.outputs == encoder.program.outputs
    assert [stack.blocks for stack in program.stacks.values()] == [tiny.BLOCKS]


# The model is left as it was


class Dropping(Layer):
    def __init__(self) -> None:
        super().__init__()
        self.drop, self.frozen = nn.Dropout(0.5), nn.Dropout(0.5)

    def forward(self, x: Tensor) -> Tensor:
        return self.frozen(self.drop(self.layer(x)))


def test_modes_are_restored() -> None:
    model = Dropping().train()
    model.frozen.eval()
    program = capture(model, X)
    assert (model.training, model.drop.training, model.frozen.training) == (True, True, False)
    tiny.assert_same(program.module(x=X), {"output": model.layer(X)})


def test_the_mode_is_restored_after_a_failure() -> None:
    model = Branching().train()
    with pytest.raises(CaptureError):
        capture(model, X)
    assert model.training


def test_example_inputs_are_not_changed() -> None:
    x = X.clone().requires_grad_()
    program = capture(Plain(), x)
    torch.testing.assert_close(x.detach(), X)
    assert not program.example_inputs["x"].requires_grad


def test_the_fast_path_of_attention_is_switched_on_again() -> None:
    assert torch.backends.mha.get_fastpath_enabled()
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True).eval()
    x = torch.randn(2, 5, 8)
    program = capture(layer, {"src": x})
    assert torch.backends.mha.get_fastpath_enabled()
    assert "_transformer_encoder_layer_fwd.default" not in tiny.operators(program)
    tiny.assert_same(program.module(src=x), {"output": layer(x)}, atol=1e-5)


class Masked(nn.Module):
    """torch looks into the mask for whether it is the causal one."""

    def __init__(self) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
        self.layers = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layers(x, mask=nn.Transformer.generate_square_subsequent_mask(x.shape[1]))


def test_a_causal_mask_is_not_looked_into() -> None:
    detect = torch.nn.modules.transformer._detect_is_causal_mask
    model, x = tiny.seeded(Masked), torch.randn(2, 5, 8)
    program = capture(model, {"x": x})
    assert torch.nn.modules.transformer._detect_is_causal_mask is detect
    assert [stack.role for stack in program.stacks.values()] == ["decoder"]
    tiny.assert_same(program.module(x=x), {"output": model(x)}, atol=1e-5)


# One row


def test_a_batch_of_one_row_is_captured_as_two() -> None:
    captured = tiny.captured(tiny.Encoder, tiny.text(rows=1))
    assert captured.program.example_inputs["input_ids"].shape == (2, tiny.TOKENS)
    assert captured.program.axes.batch is not None
    tiny.assert_same(tiny.outputs(captured.program.module, tiny.text()), captured.eager(tiny.text()))


class OneRow(Layer):
    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x) + self.layer.bias.expand(1, 4).view(x.shape[0], 4)


def test_a_model_that_takes_one_row_only_is_captured_with_one(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "offramp.program.forward"):
        program = capture(OneRow(), X[:1])
    assert program.example_inputs["x"].shape == (1, 4)
    assert "a batch of two rows does not run" in caplog.text


@pytest.mark.parametrize(
    "squeeze", [lambda x: x.squeeze(), lambda x: x.squeeze(0).squeeze(-1), lambda x: x.squeeze((0, -1))]
)
def test_squeeze_takes_away_no_axis_that_varies(squeeze: Callable[[Tensor], Tensor]) -> None:
    """Where the only row's axis went away, rows could not be put together, and ONNX would refuse all others."""

    class Squeezed(Layer):
        def forward(self, x: Tensor) -> Tensor:
            return squeeze(self.layer(x)[..., None, None][..., 0])

    model = Squeezed()
    program = capture(model, X)
    made = [program.module(x=X[:rows])["output"] for rows in (1, 2)]
    assert [list(value.shape) for value in made] == [[1, 4], [2, 4]]
    torch.testing.assert_close(made[1], model(X[:2]))
    torch.testing.assert_close(made[0], model(X[:2])[:1])
    fixed = capture(model, X[:1], dynamic={})
    assert list(fixed.example_outputs["output"].shape) == [4]


def test_a_model_that_gives_nan_is_said_to(caplog: pytest.LogCaptureFixture) -> None:
    broken = Plain()
    with torch.no_grad():
        broken.layer.weight[0, 0] = torch.nan
    for model in (Plain(), broken):
        capture(model, X)
    said = [record.getMessage() for record in caplog.records if record.name.startswith("offramp")]
    assert said == ["for the example inputs the model gives NaN: output"]


def test_autocast_around_a_capture_is_not_captured() -> None:
    model = Plain()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        program = capture(model, X)
    assert program.example_outputs["output"].dtype == torch.float32
    torch.testing.assert_close(program.module(x=X)["output"], model(X))


# Names of axes


def test_dynamic_names_the_axes_and_fixes_all_others() -> None:
    axes = {0: "rows", 1: "words"}
    program = tiny.captured(tiny.Encoder, tiny.text(), dynamic={"input_ids": axes, "attention_mask": axes}).program
    assert set(program.axes.names.values()) == {"rows", "words"}
    assert program.axes.names[program.axes.batch] == "rows"
    fixed = tiny.captured(
        tiny.Encoder, tiny.text(), dynamic={"input_ids": {0: "rows"}, "attention_mask": {0: "rows"}}
    ).program
    assert list(fixed.axes.names.values()) == ["rows"]


def test_dynamic_counts_from_the_end_too() -> None:
    axes = {0: "rows", -1: "words"}
    program = tiny.captured(tiny.Encoder, tiny.text(), dynamic={"input_ids": axes, "attention_mask": axes}).program
    assert set(program.axes.names.values()) == {"rows", "words"}


def test_one_name_is_not_given_to_axes_of_different_sizes() -> None:
    axes = {0: "rows", 1: "words"}  # of 12 and of 7 words
    with pytest.raises(CaptureError, match="words"):
        tiny.captured(
            tiny.TwoStacks,
            tiny.two_texts(),
            dynamic={"source_ids": axes, "source_mask": axes, "input_ids": axes},
        )


class Choosing(Layer):
    """One of two tables by its input, written over a buffer at each call; it keeps one that it was not made with."""

    def forward(self, x: Tensor) -> Tensor:
        if getattr(self, "table", None) is None:
            self.table = torch.tensor(2.0)
        self.seen.copy_(torch.where(x.max() > 100, self.table, 1.0))
        return self.layer(x) * self.seen


def test_a_buffer_that_is_written_before_it_is_read_is_no_state() -> None:
    model = tiny.seeded(Choosing)
    program = capture(model, X)
    assert not hasattr(model, "table")  # that of the trace has no contents
    for x in (X, 1000 * X.abs(), X):
        torch.testing.assert_close(program.module(x=x)["output"], model(x))


class Ordered(Layer):
    """Places in an order that only numbers of the forward's own decide: windows that do not fill their grid."""

    def forward(self, x: Tensor) -> Tensor:
        places = torch.nn.functional.pad(torch.arange(6).reshape(2, 3), (0, 1), value=-1).T
        order = places[places != -1]
        each = torch.repeat_interleave(torch.tensor([1.0, 3.0]), torch.tensor([4, 2]))
        return self.layer(x[:, order] * each[:, None])


def test_what_constants_select_is_a_constant() -> None:
    model, x = tiny.seeded(Ordered), torch.randn(2, 6, 4)
    program = capture(model, x)
    assert not {"repeat_interleave.self_Tensor", "ne.Scalar"} & {*tiny.operators(program)}
    torch.testing.assert_close(program.module(x=x)["output"], model(x))


class Conditional(Layer):
    """Rows of a table in an order that is known, of one of two tables."""

    def forward(self, x: Tensor) -> Tensor:
        table = torch.cond(self.seen > 0, lambda rows: rows + 1, lambda rows: rows - 1, (self.layer.weight.detach(),))
        return self.layer(x) + table[torch.tensor([2, 0, 3, 1])].sum(0)


def test_what_a_condition_selects_is_no_constant() -> None:
    model = tiny.seeded(Conditional)
    program = capture(model, X)
    tiny.assert_same(program.module(x=X), {"output": model(X)})
    assert str(program).startswith("program  25 parameters")


@pytest.mark.parametrize(
    "count",
    [
        lambda: torch.arange(0, 12, step=2),
        lambda: torch.arange(0, end=6),
        lambda: torch.arange(end=6),
        lambda: torch.arange(1, step=2, end=13),
        lambda: torch.arange(start=11, end=-1, step=-2),
        lambda: torch.arange(6, dtype=torch.int32),
        lambda: torch.cat([torch.arange(0), torch.arange(6)]),
    ],
)
def test_numbers_are_counted_as_torch_counts_them(count: Callable[[], Tensor]) -> None:
    """Where they decide which of them there are, so that torch.export has to know them."""

    class Counted(Layer):
        def forward(self, x: Tensor) -> Tensor:
            counted = count()
            for piece in counted.split(counted[counted > 1].shape[0]):
                x = x + torch.tensor(piece.tolist()).sum()
            return self.layer(x)

    model = tiny.seeded(Counted)
    tiny.assert_same(capture(model, X).module(x=X), {"output": model(X)})


# Refusals


class Branching(Layer):
    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x) if x.sum() > 0 else x


class Counting(Layer):
    def forward(self, x: Tensor) -> Tensor:
        self.seen.add_(1)
        return self.layer(x)


class InPlace(Layer):
    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x.add_(1))


class Texting(Layer):
    def forward(self, x: Tensor) -> dict[str, Any]:
        return {"a": {"y": self.layer(x), "b": {"text"}}}


class Ambiguous(Layer):
    def forward(self, x: Tensor) -> dict[str, Any]:
        return {"a.b": self.layer(x), "a": {"b": x + 1}}


REFUSED: dict[str, tuple[type[nn.Module], Any, dict[str, Any], str]] = {
    "unknown input": (Plain, {"x": X, "y": X}, {}, r"no parameter \['y'\]; its parameters are \['x'\]"),
    "too many inputs": (Plain, (X, X), {}, r"2 example inputs for a forward with parameters \['x'\]"),
    "missing input": (Unused, {"x": X}, {}, r"Unused does not run on the example inputs .*missing .*mask"),
    "no inputs": (Plain, {}, {}, "must be tensors, found none"),
    "no tensor": (Plain, {"x": [1, 2]}, {}, "must be tensors, found {'x': 'list'}"),
    "branch on data": (Branching, X, {}, "cannot capture Branching: .*data-dependent.* in forward"),
    "buffer changed": (Counting, X, {}, r"changes its own state or inputs: \['seen'\]"),
    "input changed": (InPlace, X, {}, r"changes its own state or inputs: \['x'\]"),
    "output no tensor": (Texting, X, {}, "outputs that are not tensors: a.b is a set"),
    "outputs of one name": (Ambiguous, X, {}, "a.b"),
    "dynamic input unknown": (Plain, X, {"dynamic": {"y": {0: "b"}}}, r"dynamic names inputs \['y'\]"),
    "dynamic axis fixed": (Plain, X, {"dynamic": {"x": {1: "b"}}}, r"axis 1 of x \(b\) is fixed at 4"),
    "dynamic axis unknown": (Plain, X, {"dynamic": {"x": {2: "b"}}}, r"x has no axis 2|axis 2 of x"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_refusals_say_why(name: str) -> None:
    make, example, options, reason = REFUSED[name]
    model = make()
    state = {key: value.clone() for key, value in model.state_dict().items()}
    with pytest.raises(CaptureError, match=reason) as caught:
        capture(model, example, **options)
    assert caught.value.stage == ("model" if name == "missing input" else "capture")
    if name != "buffer changed":
        torch.testing.assert_close(model.state_dict(), state)


class Placed(nn.Module):
    """Patches at their places in an image, whose height and width are an input (as of some vision-language models)."""

    def forward(self, x: Tensor, grid: Tensor, ids: Tensor) -> Tensor:
        places = [torch.linspace(0, 1, high)[:, None] + torch.linspace(0, 1, wide) for high, wide in grid.tolist()]
        return (x + torch.stack([of_row.flatten() for of_row in places])[..., None]).sum((1, 2)) + ids.sum(1)


class Written(Placed):
    def forward(self, x: Tensor, ids: Tensor) -> Tensor:  # type: ignore[override]
        return super().forward(x, torch.tensor([[2, 3], [3, 2]]), ids)


def test_sizes_among_the_inputs_are_named_and_may_be_written_down() -> None:
    x, ids = torch.randn(2, 6, 4), torch.arange(10).reshape(2, 5)
    with pytest.raises(CaptureError, match=r"try: where the numbers in grid decide sizes, a wrapper around the model"):
        capture(Placed(), {"x": x, "grid": torch.tensor([[2, 3], [3, 2]]), "ids": ids})
    assert set(capture(Written(), {"x": x, "ids": ids}).inputs) == {"x", "ids"}


class Asking(nn.Module):
    """It looks whether there is padding among the ids, and not at the token that the other side starts with."""

    def forward(self, ids: Tensor, start: Tensor) -> Tensor:
        return (ids + 1 if (ids == 0).any() else ids) + start


def test_numbers_that_may_not_be_what_decides_are_not_the_only_hint() -> None:
    given = {"ids": torch.arange(10).reshape(2, 5), "start": torch.ones(2, 1, dtype=torch.int64)}
    with pytest.raises(CaptureError, match=r"try: where the numbers in start decide .*; where anything else decides"):
        capture(Asking(), given)


def test_the_cause_of_a_failed_export_is_kept() -> None:
    with pytest.raises(CaptureError) as caught:
        capture(Branching(), X)
    assert caught.value.__cause__ is not None
    assert "tests/test_capture.py" in str(caught.value)


# Training


def test_the_module_trains_the_captured_model() -> None:
    model = tiny.seeded(tiny.Encoder)
    captured = tiny.Captured(model, tiny.text(), capture(model, tiny.text(), dynamic={}))
    before = {name: weight.clone() for name, weight in captured.model.named_parameters()}
    optimizer = torch.optim.SGD(captured.program.module.parameters(), lr=0.1)
    target = torch.tensor([1, 2])

    def loss() -> Tensor:
        return nn.functional.cross_entropy(captured.program.module(**captured.inputs)["logits"], target)

    start = loss()
    start.backward()
    optimizer.step()
    assert loss() < start
    changed = [name for name, weight in captured.model.named_parameters() if not weight.equal(before[name])]
    assert set(before) == set(changed)
    tiny.assert_same(tiny.outputs(captured.program.module, captured.inputs), captured.eager())


class _Data(nn.Module):
    """``.data``, of what is computed and of what is kept, where the sizes are free."""

    def __init__(self) -> None:
        super().__init__()
        self.words, self.head = nn.Embedding(tiny.WORDS, tiny.WIDTH), nn.Linear(tiny.WIDTH, tiny.WORDS)
        self.register_buffer("places", torch.randn(1, 40, tiny.WIDTH))

    def forward(self, ids: Tensor) -> Tensor:
        mask = (ids != 0).unsqueeze(-2)
        mask = mask & torch.ones(1, ids.size(1), ids.size(1)).tril().type_as(mask.data)
        x = self.words(ids) + self.get_buffer("places")[:, : ids.size(1)].data + self.head.bias.data[0]
        return self.head(nn.functional.scaled_dot_product_attention(x, x, x, mask) + x)


def test_data_of_a_tensor() -> None:
    captured = tiny.captured(_Data, {"ids": tiny.ids()})
    for ids in (tiny.ids(), tiny.ids(4, 3)):
        tiny.assert_same(tiny.outputs(captured.program.module, {"ids": ids}), captured.eager({"ids": ids}))


class Pieces(nn.Module):
    """Windows whose sizes are computed from a grid that the forward writes down."""

    def forward(self, x: Tensor) -> Tensor:
        grid = torch.tensor([[1, 2, 2], [1, 1, 3]])
        ends = torch.nn.functional.pad(grid.prod(1).cumsum(0), (1, 0))
        found = []
        for piece in torch.split(x, (ends[1:] - ends[:-1]).tolist(), 1):
            found.append(piece - piece.mean(1, keepdim=True))
        return torch.cat(found, 1)


def test_what_a_forward_writes_down_may_decide_what_it_does() -> None:
    x = torch.randn(2, 7, 3)
    program = capture(Pieces(), {"x": x})
    (name,) = program.outputs
    longer = torch.randn(3, 7, 3)
    torch.testing.assert_close(program.module(x=longer)[name], Pieces()(longer))
    assert fake_tensor.CONSTANT_NUMEL_LIMIT == 1
