"""Inputs that follow from the number of tokens: masks whatever their values mean, positions, what is all the same."""

# mypy: disable-error-code="no-any-return"
from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import decoders
import pytest
import tiny
import torch
from torch import Tensor, nn

from offramp.bundle.manifest import Implied
from offramp.errors import PassError
from offramp.passes import apply
from offramp.program import Program, capture

WORDS, WIDTH, BLOCKS, TOKENS = 11, 16, 2, 7
NONE = torch.zeros(2, TOKENS, dtype=torch.bool)
PAST = torch.ones(TOKENS, TOKENS, dtype=torch.bool).tril()
INFINITE = float("-inf")


class Layers(nn.Module):
    """torch.nn's layers as a decoder: ids, perhaps positions and types, then blocks that ``call`` masks."""

    def __init__(self, call: Callable[..., dict[str, Any]], **given: Any) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(WIDTH, 2, 24, batch_first=True, dropout=0.0)
        self.blocks = nn.TransformerEncoder(layer, BLOCKS, enable_nested_tensor=False)
        self.words, self.places, self.types = (nn.Embedding(size, WIDTH) for size in (WORDS, 32, 3))
        self.head, self.call = nn.Linear(WIDTH, WORDS), call

    def embed(self, ids: Tensor, position_ids: Tensor | None = None, types: Tensor | None = None) -> Tensor:
        x = self.words(ids) + self.places(torch.arange(ids.shape[1]) if position_ids is None else position_ids)
        return x if types is None else x + self.types(types)


class ByPadding(Layers):
    def forward(self, ids: Tensor, padding: Tensor) -> Tensor:
        return self.head(self.blocks(self.embed(ids), **self.call(ids, padding)))


class ByPositions(Layers):
    def forward(self, ids: Tensor, position_ids: Tensor) -> Tensor:
        return self.head(self.blocks(self.embed(ids, position_ids), **self.call(ids, None)))


class Rotated(Layers):
    """Positions that are computed with, not looked up; and flattened with the rows for that."""

    def forward(self, ids: Tensor, position_ids: Tensor) -> Tensor:
        angles = position_ids.reshape(-1)[:, None] * torch.logspace(0, -2, WIDTH)
        x = self.words(ids) + torch.sin(angles).reshape(*ids.shape, WIDTH)
        return self.head(self.blocks(x, **self.call(ids, None)))


class ByTypes(Layers):
    def forward(self, ids: Tensor, types: Tensor, position_ids: Tensor) -> Tensor:
        return self.head(self.blocks(self.embed(ids, position_ids, types), **self.call(ids, None)))


class Embedded(Layers):
    def forward(self, inputs_embeds: Tensor, attention_mask: Tensor) -> Tensor:
        x = inputs_embeds + self.places(torch.arange(inputs_embeds.shape[1]))
        return self.head(self.blocks(x, **self.call(x, attention_mask)))


def causal(ids: Tensor, like: Any = None) -> Tensor:
    if like is not None and like.dtype == torch.bool:
        return torch.ones(ids.shape[1], ids.shape[1], dtype=torch.bool).triu(1)
    return nn.Transformer.generate_square_subsequent_mask(ids.shape[1])


def plain(ids: Tensor, padding: Any) -> dict[str, Any]:
    return {"mask": causal(ids), "is_causal": True}


def dropped(ids: Tensor, padding: Any) -> dict[str, Any]:
    return {"mask": causal(ids, padding), "src_key_padding_mask": padding, "is_causal": True}


def kept(ids: Tensor, mask: Any) -> dict[str, Any]:
    return {"mask": causal(ids, mask == 0), "src_key_padding_mask": mask == 0}


def biased(ids: Tensor, mask: Any) -> dict[str, Any]:
    return {"mask": causal(ids), "src_key_padding_mask": (1.0 - mask) * -1e9}


def squeezed(ids: Tensor, mask: Any) -> dict[str, Any]:
    return {"mask": causal(ids), "src_key_padding_mask": mask[:, 0, 0]}


def square(ids: Tensor, mask: Any) -> dict[str, Any]:
    return {"mask": mask}


def ids() -> Tensor:
    return tiny.ids(TOKENS)


def some(value: Any, rest: Any, **options: Any) -> Tensor:
    """The last two tokens of the second row differ."""
    found = torch.full((2, TOKENS), rest, **options)
    found[1, -2:] = value
    return found


def infinite(shape: tuple[int, ...]) -> Tensor:
    return torch.zeros(shape).masked_fill(~PAST, INFINITE)


ROWS: tuple[int | str, ...] = ("batch", "tokens")
#: Module, inputs, and what follows from the number of tokens.
CASES: dict[str, tuple[Callable[[], nn.Module], tiny.Inputs, dict[str, Implied]]] = {
    "true is padding": (
        partial(ByPadding, dropped),
        {"padding": NONE},
        {"padding": Implied("bool", ROWS, 0, padding=1)},
    ),
    "left padding": (
        partial(ByPadding, kept),
        {"padding": some(0, 1).flip(1)},
        {"padding": Implied("int64", ROWS, 1, padding=0)},
    ),
    "added": (
        partial(ByPadding, dropped),
        {"padding": some(INFINITE, 0.0)},
        {"padding": Implied("float32", ROWS, 0, padding=INFINITE)},
    ),
    "factors": (
        partial(ByPadding, biased),
        {"padding": some(0.0, 1.0)},
        {"padding": Implied("float32", ROWS, 1, padding=0)},
    ),
    "four axes": (
        partial(ByPadding, squeezed),
        {"padding": some(-1e9, 0.0)[:, None, None]},
        {"padding": Implied("float32", ("batch", 1, 1, "tokens"), 0, padding=-1e9)},
    ),
    "square": (
        partial(ByPadding, square),
        {"padding": infinite((TOKENS, TOKENS))},
        {"padding": Implied("float32", ("tokens", "tokens"), 0, hidden=INFINITE)},
    ),
    "positions alone": (
        partial(ByPositions, plain),
        {"position_ids": torch.arange(TOKENS, dtype=torch.int32)},
        {"position_ids": Implied("int32", ("tokens",), 0, axis=0)},
    ),
    "flat positions": (
        partial(Rotated, plain),
        {"position_ids": torch.arange(TOKENS).repeat(2, 1)},
        {"position_ids": Implied("int64", ROWS, 0, axis=1)},
    ),
    "one type": (
        partial(ByTypes, plain),
        {"types": some(2, 2), "position_ids": torch.arange(TOKENS).repeat(2, 1)},
        {"types": Implied("int64", ROWS, 2), "position_ids": Implied("int64", ROWS, 0, axis=1)},
    ),
    "types": (partial(ByTypes, plain), {"types": some(1, 2), "position_ids": torch.arange(3, TOKENS + 3)[None]}, {
        "position_ids": Implied("int64", (1, "tokens"), 3, axis=1)
    }),
    "embeds": (
        partial(Embedded, kept),
        {"inputs_embeds": torch.randn(2, TOKENS, WIDTH, generator=torch.Generator().manual_seed(1)),
         "attention_mask": some(1, 1)},
        {"attention_mask": Implied("int64", ROWS, 1, padding=0)},
    ),
}  # fmt: skip


@pytest.fixture(scope="module")
def made() -> Callable[[str], tuple[tiny.Captured, Program]]:
    known: dict[str, tuple[tiny.Captured, Program]] = {}

    def get(name: str) -> tuple[tiny.Captured, Program]:
        if name not in known:
            make, inputs, _ = CASES[name]
            first = {} if "inputs_embeds" in inputs else {"ids": ids()}
            captured = tiny.captured(make, {**first, **inputs})
            known[name] = captured, apply(captured.program, "insert-cache")
        return known[name]

    return get


@pytest.mark.parametrize("name", CASES)
def test_what_inputs_mean(made: Any, name: str) -> None:
    """(That chunks then give what one pass gives is part of the pass.)"""
    captured, program = made(name)
    assert dict(program.cache.implied) == CASES[name][2]
    assert set(program.inputs) == set(captured.inputs) - set(CASES[name][2])
    given = {key: value[:, :4] for key, value in captured.inputs.items() if key in program.inputs}
    implied = program.implied(given)
    expected = captured.eager({**given, **implied})
    tiny.assert_same(tiny.outputs(program.module, program.fresh(given)), expected)


def test_ids_that_count_up_are_no_positions() -> None:
    """They are looked up in a table of as many rows as the head has words."""
    inputs = {"ids": torch.arange(TOKENS).repeat(2, 1), "position_ids": torch.arange(TOKENS).repeat(2, 1)}
    program = apply(tiny.captured(partial(ByPositions, plain), inputs).program, "insert-cache")
    assert program.cache is not None
    assert (program.cache.tokens, list(program.cache.implied)) == (("ids",), ["position_ids"])


def test_a_window_that_is_given_is_not_taken_for_a_causal_mask() -> None:
    mask = PAST & ~PAST.tril(-3)
    captured = tiny.captured(partial(ByPadding, square), {"ids": ids(), "padding": ~mask})
    with pytest.raises(PassError, match=r"input padding has shape \['tokens', 'tokens'\]; an input has one axis"):
        apply(captured.program, "insert-cache")


class Signal(Layers):
    """Numbers that are not 0, and what is 0 is padding."""

    def forward(self, signal: Tensor) -> Tensor:
        return self.head(self.blocks(signal[..., None] * self.words.weight[0], **self.call(signal, signal == 0)))


def test_inputs_that_all_look_like_masks() -> None:
    captured = tiny.captured(partial(Signal, dropped), {"signal": some(0.0, 1.0)})
    with pytest.raises(PassError, match=r"the inputs \['signal'\] all look like masks") as caught:
        apply(captured.program, "insert-cache")
    assert caught.value.hint == "example inputs as they occur, token ids that differ"


@pytest.mark.slow
def test_a_mask_that_biases_are_made_of_too() -> None:
    """Bloom's alibi counts the mask: all of its keys stay visible there, whatever the mask hides from the attention."""
    module, inputs = decoders.OTHERS["bloom"]()
    mask = torch.ones_like(inputs["input_ids"])
    program = apply(capture(module, {**inputs, "attention_mask": mask}), "insert-cache")
    assert program.cache is not None
    assert program.cache.implied["attention_mask"] == Implied("int64", ROWS, 1, padding=0)
