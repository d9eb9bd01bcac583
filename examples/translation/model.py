"""A small encoder-decoder that translates German captions into English, and its tokenizer.

Three encoder blocks and eight decoder blocks of 128 features, pre-norm (arXiv 2002.04745), one embedding for source,
target and head (arXiv 1608.05859), sinusoidal positions (arXiv 1706.03762).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

FEATURES, HEADS, INNER, DROPOUT = 128, 4, 512, 0.2
ENCODER_BLOCKS, DECODER_BLOCKS = 3, 8
PAD, BEGIN, END = 0, 1, 2
LONGEST = 128


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

    def __init__(self, vocabulary: int) -> None:
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

    def forward(self, source: Tensor, source_mask: Tensor, target: Tensor) -> dict[str, Tensor]:
        visible = source_mask[:, None, None, :].bool()
        memory = self.embed(source)
        for block in self.encoder:
            memory = block(memory, visible)
        memory = self.encoder_norm(memory)
        x = self.embed(target)
        for block in self.decoder:
            x = block(x, visible, memory)
        return {"logits": F.linear(self.norm(x), self.words.weight)}
