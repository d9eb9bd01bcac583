"""Masks that are made of the tokens themselves (``ids != pad``): what they say of keys is kept as keys are."""

# mypy: disable-error-code="no-any-return"
from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import torch
from breadth import slow_but
from torch import Tensor, nn
from torch.nn import functional as F

import offramp
from offramp.check import check
from offramp.errors import PassError
from offramp.passes import apply
from offramp.passes.caches.chunks import in_chunks
from offramp.passes.caches.fully_masked import comparable_outputs
from offramp.program import Program

PAD, INFINITE = 0, float("-inf")
Core = Callable[[Tensor, Tensor, Tensor, Any], Tensor]


class Attention(tiny.Attention):
    def __init__(self, core: Core) -> None:
        super().__init__()
        self.core = core

    def forward(self, x: Tensor, memory: Tensor, mask: Any, causal: bool = False) -> Tensor:
        q = self.q(x).unflatten(-1, (tiny.HEADS, -1)).transpose(1, 2)
        k, v = self.kv(memory).unflatten(-1, (2, tiny.HEADS, -1)).permute(2, 0, 3, 1, 4).unbind()
        return self.out(self.core(q, k, v, mask).transpose(1, 2).flatten(2))


class Decoder(tiny.Decoder):
    def __init__(self, core: Core, mask: Callable[[Tensor], Any]) -> None:
        super().__init__()
        self.blocks = self.blocks[:2]
        for block in self.blocks:
            block.attention = Attention(core)
        self.mask, self.head = mask, nn.Linear(tiny.WIDTH, tiny.WORDS)

    def forward(self, input_ids: Tensor) -> Any:  # type: ignore[override]
        return {"logits": self.head(self.leave(self.run(self.embed(input_ids), self.mask(input_ids))))}


class Layers(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(tiny.WIDTH, 2, 24, batch_first=True, dropout=0.0)
        self.blocks = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.words, self.head = nn.Embedding(tiny.WORDS, tiny.WIDTH), nn.Linear(tiny.WIDTH, tiny.WORDS)

    def forward(self, input_ids: Tensor) -> dict[str, Tensor]:
        mask = ~past(input_ids)
        return {"logits": self.head(self.blocks(self.words(input_ids), mask, input_ids == PAD))}


class ByHeads(Layers):
    """One mask for each row and head, [rows * heads, tokens, tokens]."""

    def __init__(self, repeated: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.repeated = repeated

    def forward(self, input_ids: Tensor) -> dict[str, Tensor]:
        return {"logits": self.head(self.blocks(self.words(input_ids), self.repeated(~kept(input_ids)[:, 0])))}


def interleaved(mask: Tensor) -> Tensor:
    return mask.repeat_interleave(2, 0)


def numbered(mask: Tensor) -> Tensor:
    rows, tokens, _ = mask.shape
    hidden = mask[:, None].expand(rows, 2, tokens, tokens).reshape(2 * rows, tokens, tokens)
    return torch.zeros_like(hidden, dtype=torch.float32).masked_fill(hidden, INFINITE)


def past(ids: Tensor) -> Tensor:
    return torch.ones(ids.shape[1], ids.shape[1], dtype=torch.bool).tril()


def scores(q: Tensor, k: Tensor) -> Tensor:
    return q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5


def fused(q: Tensor, k: Tensor, v: Tensor, mask: Any) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)


def filled(q: Tensor, k: Tensor, v: Tensor, mask: Any) -> Tensor:
    return scores(q, k).masked_fill(mask == 0, -1e9).softmax(-1) @ v


def added(q: Tensor, k: Tensor, v: Tensor, mask: Any) -> Tensor:
    return (scores(q, k) + mask).softmax(-1) @ v


def apart(q: Tensor, k: Tensor, v: Tensor, mask: Any) -> Tensor:
    found = scores(q, k).masked_fill(torch.ones(q.shape[2], q.shape[2], dtype=torch.bool).triu(1), INFINITE)
    return torch.where(mask, INFINITE, found).softmax(-1) @ v


def kept(ids: Tensor) -> Tensor:
    return (ids != PAD)[:, None, None] & past(ids)


def spread(ids: Tensor) -> Tensor:
    """Expanded to all queries, and of numbers."""
    rows, tokens = ids.shape
    hidden = (ids == PAD)[:, None].expand(rows, tokens, tokens) | ~past(ids)
    return torch.zeros_like(hidden, dtype=torch.float32).masked_fill(hidden, INFINITE)[:, None]


def numbers(ids: Tensor) -> Tensor:
    """What is added to the scores, made of masks as factors."""
    later = torch.zeros(past(ids).shape).masked_fill(~past(ids), INFINITE)
    return (1.0 - (ids != PAD).float()[:, None, None]) * -1e9 + later


def both(ids: Tensor) -> Tensor:
    """Queries that are padding see nothing."""
    return kept(ids) & (ids != PAD)[:, None, :, None]


def queries(ids: Tensor) -> Tensor:
    """Padding sees nothing, and is seen."""
    return (ids != PAD)[:, None, :, None] & past(ids)


def large(ids: Tensor) -> Tensor:
    """All that is hidden has the same large number."""
    return (1.0 - both(ids).float()) * -1e9


def documents(ids: Tensor) -> Tensor:
    """Texts one after the other do not see each other."""
    text = (ids == 1).cumsum(1)
    return (text[:, None, :, None] == text[:, None, None]) & past(ids)


def keys(ids: Tensor) -> Tensor:
    return (ids == PAD)[:, None, None, :]


MODELS: dict[str, Callable[[], nn.Module]] = {
    "fused": partial(Decoder, fused, kept),
    "fused, blind": partial(Decoder, fused, both),
    "fused, spread": partial(Decoder, fused, spread),
    "fused, numbers": partial(Decoder, fused, numbers),
    "documents": partial(Decoder, fused, documents),
    "filled": partial(Decoder, filled, kept),
    "filled, blind": partial(Decoder, filled, both),
    "fused, large": partial(Decoder, fused, large),
    "added": partial(Decoder, added, spread),
    "apart": partial(Decoder, apart, keys),
    "layers": Layers,
    "by heads": partial(ByHeads, interleaved),
    "by heads, numbers": partial(ByHeads, numbered),
}
BLIND = ("filled, blind", "fused, large")  # where padding sees nothing, by a large finite number
Get = Callable[[str], tuple[tiny.Captured, Program]]


def padded() -> Tensor:
    """Padding at the end, and inside."""
    ids = tiny.ids(9, 3).clamp(min=2)
    ids[0, -2:] = ids[1, 3] = PAD
    ids[2, 4:6] = 1
    return ids


@pytest.fixture(scope="module")
def cached() -> Get:
    known: dict[str, tuple[tiny.Captured, Program]] = {}

    def get(name: str) -> tuple[tiny.Captured, Program]:
        if name not in known:
            captured = tiny.captured(MODELS[name], {"input_ids": padded()})
            known[name] = captured, apply(captured.program, "insert-exits{after=1},insert-cache")
        return known[name]

    return get


@pytest.mark.parametrize("name", MODELS)
def test_chunks_give_what_one_pass_gives(cached: Get, name: str) -> None:
    captured, program = cached(name)
    assert program.cache is not None
    assert sum(buffer.startswith("mask") for buffer in program.cache.buffers) == 2  # one of each block
    ids = torch.cat([padded(), padded().flip(0)], 1)
    ids[:, 0] = 3  # torch.nn's layers and infinite masks give NaN where padding comes first
    for seed in range(3):
        found, expected = in_chunks(program, {"input_ids": ids}, seed), captured.eager({"input_ids": ids})
        if name in BLIND:
            expected, found = comparable_outputs(captured.program, {"input_ids": ids}, expected, found)  # type: ignore[misc]
        tiny.assert_same({"logits": found["logits"]}, {"logits": expected["logits"]})


@pytest.mark.parametrize("name", BLIND)
def test_padding_that_sees_nothing_weighs_no_later_place(cached: Get, name: str) -> None:
    """The last token's logits are those of as many tokens, whatever there is room for."""
    captured, program = cached(name)
    assert program.cache is not None
    ids = torch.tensor([[3, 5, 7, PAD], [4, 2, 9, PAD]])
    given = program.fresh({"input_ids": ids}, 9)
    given |= {key: torch.full_like(given[key], 9.0) for key in program.cache.buffers if given[key].is_floating_point()}
    found = tiny.outputs(program.module, given)["logits"][:, -1:]
    tiny.assert_same({"logits": found}, {"logits": captured.eager({"input_ids": ids})["logits"][:, -1:]})


def test_check_of_padding_that_sees_nothing() -> None:
    """Padding at the end; that inside of texts, which check makes up, says nothing of the tokens behind it."""
    ids = padded().clamp(min=1)
    ids[0, -2:] = PAD
    report = check(tiny.seeded(partial(Decoder, filled, queries)), {"input_ids": ids})
    assert (report.ok, report.reason, report.stacks[0].cached) == (True, None, True)


def test_a_mask_of_queries_alone_with_padding_inside() -> None:
    captured = tiny.captured(partial(Decoder, filled, queries), {"input_ids": padded()})
    with pytest.raises(PassError, match=r"some tokens see no key \(padding whose own queries are masked\)") as caught:
        apply(captured.program, "insert-cache")
    assert caught.value.hint is not None
    assert caught.value.hint.startswith("hide padding as keys, (ids != pad)[:, None, None, :]")


def following(model: nn.Module, exits: list[int], prompt: list[int], tokens: list[int]) -> list[int]:
    """What the model cut at each token's exit picks behind the text so far."""
    picked = []
    for at, blocks in enumerate(exits):
        text = torch.tensor([[*prompt, *tokens[:at]]])
        path = "blocks.layers" if isinstance(model, Layers) else "blocks"
        logits = tiny.outputs(tiny.cut(model, blocks, path), {"input_ids": text})["logits"]
        picked.append(int(logits[0, -1].argmax()))
    return picked


@pytest.mark.parametrize(
    ("name", "target"),
    slow_but(
        [("fused, blind", "portable"), ("filled", "ort")],
        [
            ("fused", "ort"),
            ("fused, blind", "portable"),
            ("fused, numbers", "ort"),
            ("filled", "ort"),
            ("filled, blind", "ort"),
        ],
    ),
)
def test_generation_is_the_naive_loop(cached: Get, name: str, target: Any, tmp_path: Path) -> None:
    """Rows of different lengths with padding inside; tokens leave early and are caught up."""
    captured, program = cached(name)
    offramp.save(program, tmp_path / "bundle", target=target)
    chain = offramp.load(tmp_path / "bundle")
    prompts = [[3, PAD, 5, 7], [4], [6, 2, PAD, PAD, 9, 8]]
    random = np.random.default_rng(0)
    made = chain.generate({"input_ids": prompts}, lambda state: random.random(state.rows.size) < 0.5, max_new_tokens=8)
    assert {int(after) for row in made.exits for after in row} == {1, 2}
    for prompt, tokens, exits in zip(prompts, made.tokens, made.exits, strict=True):
        assert following(captured.model, exits.tolist(), prompt, tokens.tolist()) == tokens.tolist()


def open_to(ids: Tensor) -> Tensor:
    """Tokens of one kind see each other, later ones too: none is in the example."""
    kind = ids == 10
    return past(ids) | (kind[:, None, :, None] & kind[:, None, None])


def rolled(ids: Tensor) -> Tensor:
    """Which token is hidden depends on the one before."""
    return (ids != PAD).roll(1, 1)[:, None, None] & past(ids)


def turned(ids: Tensor) -> Tensor:
    both = (ids != PAD)[:, None, :].expand(-1, ids.shape[1], -1)
    return both.flip(2)[:, None] & past(ids)


@pytest.mark.parametrize(
    ("mask", "reason", "hint"),
    [
        (open_to, r"their contents decide which later tokens are seen .*content_masks.py:\d+", "whatever the contents"),
        (rolled, r"aten.roll.default goes over the tokens .*content_masks.py:\d+", "attention is the only"),
        (turned, r"goes through aten.flip.default, after which .*content_masks.py:\d+", "masks of keys"),
    ],
)
def test_refusals(mask: Any, reason: str, hint: str) -> None:
    captured = tiny.captured(partial(Decoder, fused, mask), {"input_ids": padded().clamp(max=9)})
    with pytest.raises(PassError, match=reason) as caught:
        apply(captured.program, "insert-cache")
    assert hint in str(caught.value.hint)
