"""Models of libraries whose masks are made of ids inside a wrapper, or are inputs of two stacks: the naive loop."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import torch
import transformers
from torch import Tensor, nn

import offramp
from offramp.bundle.manifest import Implied
from offramp.passes import apply

PAD, WORDS, NEW = 0, 41, 6


class Inside(nn.Module):
    """A causal model, and its padding mask where ids are at hand."""

    def __init__(self, kind: str, attention: str) -> None:
        super().__init__()
        common: dict[str, Any] = {
            "vocab_size": WORDS, "pad_token_id": PAD, "bos_token_id": None, "eos_token_id": None,
            "initializer_range": 0.4, "attn_implementation": attention,
        }  # fmt: skip
        config: Any = transformers.GPT2Config(n_embd=16, n_layer=2, n_head=2, n_positions=64, **common)
        if kind == "llama":
            config = transformers.LlamaConfig(
                hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2,
                num_key_value_heads=1, max_position_embeddings=64, **common,
            )  # fmt: skip
        self.model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation=attention)

    def forward(self, ids: Tensor) -> dict[str, Tensor]:
        return {"logits": self.model(ids, attention_mask=(ids != PAD).long(), use_cache=False).logits}


class Translator(nn.Module):
    """torch.nn.Transformer with the three padding masks that it takes."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks: Any = nn.Transformer(16, 2, 2, 2, 24, dropout=0.0, batch_first=True)
        self.blocks.encoder.use_nested_tensor = False
        self.words, self.places, self.head = nn.Embedding(WORDS, 16), nn.Embedding(40, 16), nn.Linear(16, WORDS)

    def embed(self, ids: Tensor) -> Tensor:
        embedded: Tensor = self.words(ids) * 4 + self.places(torch.arange(ids.shape[1]))
        return embedded

    def forward(
        self, src: Tensor, tgt: Tensor, src_padding: Tensor, tgt_padding: Tensor, memory_padding: Tensor
    ) -> dict[str, Tensor]:
        made = self.blocks(
            self.embed(src),
            self.embed(tgt),
            tgt_mask=torch.ones(tgt.shape[1], tgt.shape[1], dtype=torch.bool).triu(1),
            src_key_padding_mask=src_padding,
            tgt_key_padding_mask=tgt_padding,
            memory_key_padding_mask=memory_padding,
        )
        return {"logits": self.head(made)}


def naive(model: nn.Module, name: str, prompt: list[int], others: Any = lambda size: {}) -> list[int]:
    """What a loop over whole texts picks; ``others`` are the other inputs for texts of a size."""
    text = list(prompt)
    for _ in range(NEW):
        inputs = {name: torch.tensor([text]), **others(len(text))}
        text.append(int(tiny.outputs(model, inputs)["logits"][0, -1].argmax()))
    return text[len(prompt) :]


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "attention"), [("gpt2", "sdpa"), ("llama", "sdpa"), ("llama", "eager")])
def test_a_mask_made_around_a_model_of_transformers(kind: str, attention: str, tmp_path: Path) -> None:
    ids = tiny.ids(9, 3).clamp(min=1)
    ids[0, -2:] = PAD
    captured = tiny.captured(partial(Inside, kind, attention), {"ids": ids})
    offramp.save(apply(captured.program, "insert-exits{after=1},insert-cache"), tmp_path / "bundle")
    chain = offramp.load(tmp_path / "bundle")
    prompts = [[3, 5, 9], [7], [4, 8, PAD, 6, 2]]
    made = chain.generate({"ids": prompts}, offramp.Never(), max_new_tokens=NEW)
    assert [row.tolist() for row in made.tokens] == [naive(captured.model, "ids", prompt) for prompt in prompts]


@pytest.mark.slow
def test_a_translator_with_padding_masks_of_its_own(tmp_path: Path) -> None:
    padding = torch.zeros(2, 8, dtype=torch.bool)
    padding[1, -3:] = True
    src = tiny.ids(8).clamp(min=1)
    inputs = {"src": src, "tgt": tiny.ids(6), "src_padding": padding, "memory_padding": padding}
    captured = tiny.captured(Translator, {**inputs, "tgt_padding": torch.zeros(2, 6, dtype=torch.bool)})
    program = apply(captured.program, "insert-exits{stack=decoder,after=1},insert-cache")
    assert program.cache is not None
    axes = tuple(program.axes.names.values())
    (implied,) = program.cache.implied.values()
    assert implied == Implied("bool", implied.shape, 0, padding=1)
    assert set(implied.shape) <= set(axes)
    offramp.save(program, tmp_path / "bundle")
    chain = offramp.load(tmp_path / "bundle")
    prompts = [[1, 4, 3], [2]]

    def others(row: int, size: int) -> dict[str, Tensor]:
        kept = {name: inputs[name][row : row + 1] for name in ("src", "src_padding", "memory_padding")}
        return {**kept, "tgt_padding": torch.zeros(1, size, dtype=torch.bool)}

    given: dict[str, Any] = {name: inputs[name].numpy() for name in ("src", "src_padding", "memory_padding")}
    expected = [naive(captured.model, "tgt", prompt, partial(others, row)) for row, prompt in enumerate(prompts)]
    found = chain.generate({**given, "tgt": prompts}, offramp.Never(), max_new_tokens=NEW)
    assert [row.tolist() for row in found.tokens] == expected
    padded = np.array([[1, 4, 3], [2, 0, 0]])
    masked = {**given, "tgt": padded, "tgt_padding": np.array([[False] * 3, [False, True, True]])}
    found = chain.generate(masked, offramp.Never(), max_new_tokens=NEW)
    assert [row.tolist() for row in found.tokens] == expected
