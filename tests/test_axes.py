"""Axes: which symbol counts rows, which count tokens, their names and limits."""

from __future__ import annotations

from typing import Any

import pytest
import tiny
import torch
from torch import Tensor, nn

from offramp.program import Axes, Program, capture
from offramp.program.graph import placeholders, results, shape


def _sizes(program: Program, name: str) -> list[int | str]:
    """The shape of an input or output in names."""
    nodes = {**placeholders(program.graph), **results(program.graph)}
    return [program.axes.describe(size) for size in shape(nodes[name])]


def _name(axes: Axes, symbol: Any) -> str:
    return axes.names[symbol]


def test_rows_and_tokens_of_an_encoder(encoder: tiny.Captured) -> None:
    axes = encoder.program.axes
    assert _sizes(encoder.program, "input_ids") == ["batch", "tokens"]
    assert _sizes(encoder.program, "attention_mask") == ["batch", "tokens"]
    assert _sizes(encoder.program, "logits") == ["batch", tiny.CLASSES]
    assert (_name(axes, axes.batch), [_name(axes, symbol) for symbol in axes.tokens]) == ("batch", ["tokens"])


def test_rows_on_the_second_axis(time_first: tiny.Captured) -> None:
    axes = time_first.program.axes
    assert _sizes(time_first.program, "x") == ["tokens", "batch", tiny.WIDTH]
    hidden = time_first.program.nodes[time_first.program.stacks[time_first.stack].cuts[1]]
    assert axes.batch_axis(hidden) == (1, 1)
    folded = next(n for n in time_first.program.graph.nodes if n.target is torch.ops.aten.bmm.default)
    assert axes.batch_axis(folded) == (0, tiny.HEADS)


def test_no_axis_counts_rows_where_rows_mix(mixing: tiny.Captured) -> None:
    axes = mixing.program.axes
    assert axes.batch is None
    assert [_name(axes, symbol) for symbol in axes.tokens] == ["tokens"]
    assert axes.batch_axis(results(mixing.program.graph)["logits"]) is None


def test_two_sequences_have_two_token_axes(two_stacks: tiny.Captured) -> None:
    axes = two_stacks.program.axes
    source, target = (_sizes(two_stacks.program, name) for name in ("source_ids", "input_ids"))
    assert source[0] == target[0] == "batch"
    assert source[1] != target[1]
    assert {_name(axes, symbol) for symbol in axes.tokens} == {source[1], target[1]}


class Rows(nn.Module):
    """No attention; ``mode`` says what happens along the first axis."""

    def __init__(self, mode: str) -> None:
        super().__init__()
        self.mode = mode

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        if self.mode == "sum":
            return {"y": x.sum(0)}
        if self.mode == "cumsum":
            return {"y": x.cumsum(0)}
        if self.mode == "flipped":
            return {"y": x.flip(0)}
        if self.mode == "one lost":
            return {"y": x.cos(), "z": x.sum(0)}
        return {"y": x.cos()}


@pytest.mark.parametrize(("mode", "axis"), [("apart", 0), ("sum", 1), ("cumsum", 1), ("flipped", 1), ("one lost", 1)])
def test_the_batch_is_the_first_axis_along_which_nothing_mixes(mode: str, axis: int) -> None:
    program = capture(Rows(mode), torch.randn(3, 5))
    if mode in ("sum", "one lost"):
        pass  # outputs that have lost the first axis still have the second
    assert program.axes.batch is not None
    assert _sizes(program, "x").index("batch") == axis


@pytest.mark.parametrize(
    "value",
    [
        torch.tensor([[True, False], [True, True], [False, False]]),
        torch.tensor([[0, 1], [1, 1], [1, 0]]),
        torch.tensor([[2, 7], [5, 3], [4, 9]]),
        torch.tensor([[0.5, 1.0], [0.0, 2.0], [3.0, 4.0]], dtype=torch.float64),
    ],
    ids=["bool", "mask", "ids", "double"],
)
def test_mixing_is_seen_for_inputs_of_every_kind(value: Tensor) -> None:
    program = capture(Maximum(), value, dynamic={"x": {0: "rows"}})
    assert program.axes.batch is None


class Maximum(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x + x.double().sum(0, keepdim=True)


class Products(nn.Module):
    def forward(self, x: Tensor) -> dict[str, Tensor]:
        flat = x.reshape(-1, 4)
        return {
            "flat": flat,
            "thrice": torch.cat([x, x, x]),
            "longer": torch.cat([x, x[:, :1]], 1),
            "none": torch.zeros(x.shape[1]),
            "square": torch.zeros(x.shape[0], x.shape[0]),
        }


def test_sizes_as_text_and_places_of_rows() -> None:
    names = {0: "batch", 1: "words"}
    program = capture(Products(), torch.randn(3, 5, 4), dynamic={"x": names})
    axes = Axes(program.axes.names, _symbol(program, "batch"))
    returned = results(program.graph)
    assert _sizes(program, "flat")[0] in ("batch*words", "words*batch")
    assert _sizes(program, "thrice") == ["3*batch", "words", 4]
    assert _sizes(program, "longer") == ["batch", "words + 1", 4]
    assert axes.batch_axis(returned["thrice"]) == (0, 3)
    assert axes.batch_axis(returned["longer"]) == (0, 1)
    assert axes.batch_axis(returned["none"]) is None
    for name in ("flat", "square"):
        with pytest.raises(ValueError, match="batch"):
            axes.batch_axis(returned[name])


def _symbol(program: Program, name: str) -> Any:
    return next(symbol for symbol, found in program.axes.names.items() if found == name)


def test_names_that_the_user_gave_stay_and_others_give_way() -> None:
    program = capture(
        tiny.seeded(tiny.TwoStacks),
        tiny.two_texts(),
        dynamic={
            "source_ids": {0: "rows", 1: "tokens"},
            "source_mask": {0: "rows", 1: "tokens"},
            "input_ids": {0: "rows", 1: "batch"},
        },
    )
    assert _sizes(program, "source_ids") == ["rows", "tokens"]
    assert _sizes(program, "input_ids") == ["rows", "batch"]
    assert program.axes.names[program.axes.batch] == "rows"


class Limited(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("table", torch.randn(1, 8, 4))
        self.table: Tensor

    def forward(self, x: Tensor) -> Tensor:
        return x + self.table[:, : x.shape[1]]


def test_ranges_are_what_the_model_takes() -> None:
    program = capture(Limited(), torch.randn(3, 5, 4))
    ranges = {program.axes.names[symbol]: limits for symbol, limits in program.axes.ranges.items()}
    assert ranges == {"batch": (1, None), "x_1": (1, 8)}


class Image(nn.Module):
    def forward(self, pixels: Tensor) -> Tensor:
        return pixels.mean((2, 3))


def test_of_an_image_only_the_rows_are_free() -> None:
    program = capture(Image(), torch.randn(3, 2, 6, 8))
    assert _sizes(program, "pixels") == ["batch", 2, 6, 8]
