"""Other sizes: programs compute what eager computes for every batch and length that the model takes."""

from __future__ import annotations

from typing import Any

import pytest
import tiny
import torch
from hypothesis import given
from hypothesis import strategies as st
from test_axes import Limited
from torch import Tensor, nn

from offramp.program import Program, capture
from offramp.program.graph import expression, placeholders, shape
from offramp.program.sizes import other_sizes, resized

NAMES = ["encoder", "labeller", "decoder", "two_stacks", "time_first", "mixing"]


def _symbols(program: Program) -> dict[str, Any]:
    return {name: symbol for symbol, name in program.axes.names.items()}


@pytest.mark.parametrize("name", NAMES)
def test_other_sizes_are_other_and_compute_the_same(name: str, request: pytest.FixtureRequest) -> None:
    captured: tiny.Captured = request.getfixturevalue(name)
    example = {name: value.shape for name, value in captured.program.example_inputs.items()}
    seen = []
    for inputs in other_sizes(captured.program):
        sizes = {name: value.shape for name, value in inputs.items()}
        assert sizes != example
        assert sizes not in seen
        seen.append(sizes)
        tiny.assert_same(tiny.outputs(captured.program.module, inputs), captured.eager(inputs))
    assert len(seen) == 2


def test_other_sizes_of_rows_and_tokens(encoder: tiny.Captured) -> None:
    sizes = [tuple(inputs["input_ids"].shape) for inputs in other_sizes(encoder.program)]
    rows, tokens = tiny.ROWS, tiny.TOKENS
    assert sizes == [(1, tokens + tokens // 2 + 1), (rows + 1, tokens * 2 // 3)]


def test_other_sizes_stay_within_the_limits() -> None:
    program = capture(Limited(), torch.randn(3, 7, 4))
    assert max(inputs["x"].shape[1] for inputs in other_sizes(program)) == 8


def test_a_program_of_fixed_sizes_has_no_others() -> None:
    program = capture(Limited(), torch.randn(3, 7, 4), dynamic={})
    assert other_sizes(program) == []


def test_resized_crops_and_repeats(encoder: tiny.Captured) -> None:
    axes = _symbols(encoder.program)
    found = resized(encoder.program, {axes["batch"]: 5, axes["tokens"]: 3})
    ids = encoder.inputs["input_ids"]
    torch.testing.assert_close(found["input_ids"], ids[[0, 1, 1, 0, 0], :3])
    longer = resized(encoder.program, {axes["tokens"]: 9})
    torch.testing.assert_close(longer["input_ids"], torch.cat([ids, ids[:, [-1, -2]]], 1))


def test_resized_to_the_same_sizes_is_the_example(two_stacks: tiny.Captured) -> None:
    program = two_stacks.program
    sizes = {
        expression(size): program.example_inputs[name].shape[axis]
        for name, node in placeholders(program.graph).items()
        for axis, size in enumerate(shape(node))
    }
    for name, value in resized(program, sizes).items():
        assert value.equal(program.example_inputs[name])


@given(rows=st.integers(1, 4), tokens=st.integers(1, 15))
def test_an_encoder_of_any_size(encoder: tiny.Captured, rows: int, tokens: int) -> None:
    axes = _symbols(encoder.program)
    inputs = resized(encoder.program, {axes["batch"]: rows, axes["tokens"]: tokens})
    tiny.assert_same(tiny.outputs(encoder.program.module, inputs), encoder.eager(inputs))


@given(rows=st.integers(1, 3), tokens=st.integers(1, 9), sources=st.integers(1, 14))
def test_two_stacks_of_any_sizes(two_stacks: tiny.Captured, rows: int, tokens: int, sources: int) -> None:
    program = two_stacks.program
    ids, source_ids = (placeholders(program.graph)[name] for name in ("input_ids", "source_ids"))
    sizes = dict(zip(map(expression, shape(ids)), (rows, tokens), strict=True))
    inputs = resized(program, sizes | {expression(shape(source_ids)[1]): sources})
    assert inputs["source_mask"].shape == (rows, sources)
    tiny.assert_same(tiny.outputs(program.module, inputs), two_stacks.eager(inputs))


class Sampled(tiny.Encoder):
    """Samples become frames, and so does their mask, by a number of frames that is none of torch's (Moonshine)."""

    def __init__(self) -> None:
        super().__init__()
        self.frames = nn.Conv1d(1, tiny.WIDTH, 3, stride=2)

    def forward(self, signal: Tensor, attention_mask: Tensor | None = None) -> dict[str, Tensor]:
        x = self.frames(signal[:, None]).transpose(1, 2)
        mask = torch.ones(x.shape[:2], dtype=torch.bool)
        if attention_mask is not None:
            count = int((attention_mask.shape[1] - 3) / 2 + 1)
            mask = attention_mask[:, ::2][:, :count].bool()
        return {"logits": self.head(self.run(x, mask[:, None, None]))}


def test_a_length_that_became_a_number_is_fixed_and_said(caplog: pytest.LogCaptureFixture) -> None:
    signal = torch.randn(2, 40, generator=torch.Generator().manual_seed(0))
    module = tiny.seeded(Sampled)
    free = capture(module, {"signal": signal})
    sizes = {name: free.axes.ranges[symbol] for name, symbol in _symbols(free).items()}
    assert all(high != 40 for _, high in sizes.values())
    assert "alone" not in caplog.text
    fixed = capture(module, {"signal": signal, "attention_mask": torch.ones(2, 40, dtype=torch.int64)})
    symbol = expression(shape(placeholders(fixed.graph)["signal"])[1])
    assert fixed.axes.ranges[symbol] == (40, 40)
    assert "'signal' is for 40 places on axis 1 alone" in caplog.text


class Odd(tiny.Encoder):
    """Odd lengths are computed another way; others than multiples of four are filled up, which changes nothing."""

    filled = False

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> dict[str, Tensor]:
        if self.filled and (lacking := -input_ids.shape[1] % 4):
            input_ids, attention_mask = (
                nn.functional.pad(value, (0, lacking)) for value in (input_ids, attention_mask)
            )
        outputs = super().forward(input_ids, attention_mask)
        if not self.filled and input_ids.shape[1] // 2 * 2 < input_ids.shape[1]:
            outputs = {name: value * 2 for name, value in outputs.items()}
        return outputs


class Filled(Odd):
    filled = True


@pytest.mark.parametrize(("module", "tokens", "other"), [(Odd, 6, 7), (Odd, 7, 8), (Filled, 8, None)])
def test_a_length_has_the_models_other_way_nowhere(
    module: type[nn.Module], tokens: int, other: int | None, caplog: pytest.LogCaptureFixture
) -> None:
    program = capture(tiny.seeded(module), tiny.text(tokens))
    symbol = expression(shape(placeholders(program.graph)["input_ids"])[1])
    assert (program.axes.ranges[symbol] == (tokens, tokens)) == (other is not None)
    said = f"'input_ids' is for {tokens} places on axis 1 alone: at {other} the model's code takes another way"
    assert (said in caplog.text) == (other is not None)
