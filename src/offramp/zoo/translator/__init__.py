"""A small encoder-decoder that translates German captions into English, with an exit after every decoder block.

Three encoder blocks and eight decoder blocks of 128 features, pre-norm (arXiv 2002.04745), one embedding for source,
target and head (arXiv 1608.05859), sinusoidal positions (arXiv 1706.03762). ``examples/translation`` trained it on
Multi30k; the weights are part of this package. It knows what photographs show, and little else.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional as F

from offramp.passes import apply
from offramp.program import Program, capture
from offramp.zoo._declare import Generation
from offramp.zoo._package import Packages

LICENCE = "Apache-2.0"  # as this package
WEIGHTS = Packages()  # none: the files lie here
EXITS, TOKENS, ENGLISH = (
    Path(__file__).with_name(name) for name in ("exits.safetensors", "tokenizer.json", "english.txt")
)
FEATURES, HEADS, INNER, DROPOUT = 128, 4, 512, 0.2
ENCODER_BLOCKS, DECODER_BLOCKS = 3, 8
PAD, BEGIN, END = 0, 1, 2
LONGEST = 128
VOCABULARY = 6000
GENERATION: Generation = {
    "prompt": [BEGIN],
    "stop": [END],
    "suppress": [],
    "suppress_first": [],
    "max_length": LONGEST,
}


class Attention(nn.Module):
    """Multi-head attention of ``x`` over ``memory``, or over itself."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v, self.o = (nn.Linear(FEATURES, FEATURES) for _ in range(4))

    def forward(self, x: Tensor, memory: Tensor, mask: Tensor | None = None, causal: bool = False) -> Tensor:
        q, k, v = (
            layer(source).unflatten(-1, (HEADS, -1)).transpose(1, 2)
            for layer, source in ((self.q, x), (self.k, memory), (self.v, memory))
        )
        mixed = F.scaled_dot_product_attention(q, k, v, mask, is_causal=causal)
        out: Tensor = self.o(mixed.transpose(1, 2).flatten(2))
        return out


class Block(nn.Module):
    """Self-attention, in a decoder attention over the source, and a feed-forward layer."""

    def __init__(self, decoder: bool) -> None:
        super().__init__()
        self.norm, self.attention = nn.LayerNorm(FEATURES), Attention()
        if decoder:
            self.cross_norm, self.cross = nn.LayerNorm(FEATURES), Attention()
        self.inner_norm = nn.LayerNorm(FEATURES)
        self.up, self.down = nn.Linear(FEATURES, INNER), nn.Linear(INNER, FEATURES)
        self.drop = nn.Dropout(DROPOUT)
        self.decoder = decoder

    def forward(self, x: Tensor, visible: Tensor, memory: Tensor | None = None) -> Tensor:
        y = self.norm(x)
        x = x + self.drop(self.attention(y, y, None if self.decoder else visible, self.decoder))
        if memory is not None:
            x = x + self.drop(self.cross(self.cross_norm(x), memory, visible))
        out: Tensor = x + self.drop(self.down(F.relu(self.up(self.inner_norm(x)))))
        return out


class Translator(nn.Module):
    """Source ids, their padding mask and target ids, ``int64 [batch, tokens]``, to logits of the next target token."""

    def __init__(self, vocabulary: int = VOCABULARY) -> None:
        super().__init__()
        self.words = nn.Embedding(vocabulary, FEATURES, PAD)
        nn.init.normal_(self.words.weight, std=FEATURES**-0.5)
        turns = torch.arange(LONGEST)[:, None] * torch.exp(torch.arange(0, FEATURES, 2) * (-math.log(1e4) / FEATURES))
        self.register_buffer("places", torch.cat([turns.sin(), turns.cos()], 1))
        self.encoder = nn.ModuleList(Block(False) for _ in range(ENCODER_BLOCKS))
        self.encoder_norm = nn.LayerNorm(FEATURES)
        self.decoder = nn.ModuleList(Block(True) for _ in range(DECODER_BLOCKS))
        self.norm = nn.LayerNorm(FEATURES)
        self.drop = nn.Dropout(DROPOUT)

    def embed(self, ids: Tensor) -> Tensor:
        out: Tensor = self.drop(self.words(ids) * math.sqrt(FEATURES) + self.places[: ids.shape[1]])  # type: ignore[index]
        return out

    def forward(self, input_ids: Tensor, attention_mask: Tensor, decoder_input_ids: Tensor) -> dict[str, Tensor]:
        visible = attention_mask[:, None, None, :].bool()
        memory = self.embed(input_ids)
        for block in self.encoder:
            memory = block(memory, visible)
        memory = self.encoder_norm(memory)
        x = self.embed(decoder_input_ids)
        for block in self.decoder:
            x = block(x, visible, memory)
        return {"logits": F.linear(self.norm(x), self.words.weight)}


def build() -> tuple[nn.Module, dict[str, Tensor]]:
    """The trained model, and two rows of 9 source and 7 target tokens."""
    model = Translator()
    state = {name: tensor for name, tensor in load_file(EXITS).items() if not name.startswith("exits.")}
    model.load_state_dict(state | {"places": model.places})
    return model, example()


def example() -> dict[str, Tensor]:
    """Two rows of 9 source and 7 target tokens."""
    return {
        "input_ids": torch.full((2, 9), 5),
        "attention_mask": torch.ones(2, 9, dtype=torch.int64),
        "decoder_input_ids": torch.full((2, 7), 5),
    }


def with_exits(program: Program, after: Sequence[int]) -> Program:
    """A captured translator with exits after some blocks of its decoder, an adapter at each."""
    listed = "|".join(map(str, after))
    return apply(program, f"insert-exits{{stack=decoder,after={listed}}},insert-adapter{{stack=decoder}}")


def trained(after: Sequence[int] = (), deepest: int = DECODER_BLOCKS) -> Program:
    """The translator with trained exits after some blocks; of a ``deepest`` block, with its decoder cut there."""
    from offramp.training.weights import load_weights

    cut = deepest < DECODER_BLOCKS
    program = capture(*build())
    inserted = (*after, deepest) if cut else tuple(after)
    if inserted:
        program = with_exits(program, inserted)
        load_weights(program, EXITS, part=True)
    return apply(program, f"truncate{{stack=decoder,after={deepest}}}") if cut else program


def tokenizer_file() -> Path:
    """The tokenizer: lowercase byte pairs of both languages, with `END` after every text."""
    return TOKENS


def english() -> tuple[int, ...]:
    """The 3,000 tokens of English that are most frequent in the training set, `END` first."""
    return tuple(map(int, ENGLISH.read_text().split()))
