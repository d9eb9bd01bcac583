"""Small models that read images and text: in one encoder, before a decoder or a head."""

from __future__ import annotations

import math
from typing import Any

import shared
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from offramp.program import Program, capture

PATCHES, FEATURES, HEADS, VOCABULARY = 4, 16, 2, 30


class Attention(nn.Module):
    """Attention of one or two inputs; ``written`` out, or torch's fused one."""

    def __init__(self, written: bool = False) -> None:
        super().__init__()
        self.q, self.k, self.v, self.o = (nn.Linear(FEATURES, FEATURES) for _ in range(4))
        self.written = written

    def forward(self, x: Tensor, memory: Tensor, mask: Tensor | None, causal: bool = False) -> Tensor:
        def heads(y: Tensor) -> Tensor:
            return y.view(y.shape[0], y.shape[1], HEADS, -1).transpose(1, 2)

        q, k, v = heads(self.q(x)), heads(self.k(memory)), heads(self.v(memory))
        if self.written:
            scores = q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1])
            scores = scores if mask is None else scores + torch.where(mask, 0.0, -1e9)
            made = scores.softmax(-1) @ v
        else:
            made = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=causal)
        return self.o(made.transpose(1, 2).reshape(x.shape))  # type: ignore[no-any-return]


class Block(nn.Module):
    """A pre- or post-norm block, with cross-attention if it has a memory."""

    def __init__(self, *, written: bool = False, post: bool = False, cross: bool = False) -> None:
        super().__init__()
        self.attention, self.post = Attention(written), post
        self.norm, self.norm2 = nn.LayerNorm(FEATURES), nn.LayerNorm(FEATURES)
        self.cross = Attention() if cross else None
        self.mlp = nn.Sequential(nn.Linear(FEATURES, 32), nn.GELU(), nn.Linear(32, FEATURES))

    def forward(
        self, x: Tensor, mask: Tensor | None, memory: Tensor | None = None, seen: Tensor | None = None
    ) -> Tensor:
        if self.post:
            x = self.norm(x + self.attention(x, x, mask))
            return self.norm2(x + self.mlp(x))  # type: ignore[no-any-return]
        y = self.norm(x)
        x = x + self.attention(y, y, mask, memory is not None)
        if self.cross is not None and memory is not None:
            x = x + self.cross(x, memory, seen)
        return x + self.mlp(self.norm2(x))  # type: ignore[no-any-return]


class Joined(nn.Module):
    """Patches and words in one encoder; then a decoder, or a classifier of the first place."""

    def __init__(
        self, *, blocks: int = 3, decodes: bool = True, first: str = "image", bias: bool = False, **how: bool
    ) -> None:
        super().__init__()
        self.first, self.decodes = first, decodes
        self.patch = nn.Conv2d(3, FEATURES, 4, 4)
        self.token = nn.Parameter(torch.randn(1, 1, FEATURES))
        self.words, self.kinds = nn.Embedding(VOCABULARY, FEATURES), nn.Embedding(2, FEATURES)
        self.table = nn.Parameter(torch.randn(1, HEADS, 64, 64)) if bias else None
        self.encoder = nn.ModuleList(Block(**how) for _ in range(blocks))
        self.norm = nn.LayerNorm(FEATURES)
        self.decoder = nn.ModuleList(Block(cross=True) for _ in range(2 if decodes else 0))
        self.head = nn.Linear(FEATURES, VOCABULARY)

    def forward(
        self, pixel_values: Tensor, input_ids: Tensor, attention_mask: Tensor, decoder_input_ids: Tensor | None = None
    ) -> dict[str, Tensor]:
        image = self.patch(pixel_values).flatten(2).transpose(1, 2)
        image = torch.cat([self.token.expand(image.shape[0], -1, -1), image], 1) + self.kinds.weight[0]
        text = self.words(input_ids) + self.kinds.weight[1]
        seen = torch.ones(image.shape[:2], dtype=torch.bool)
        parts = [(image, seen), (text, attention_mask.bool())]
        parts = parts if self.first == "image" else parts[::-1]
        x = torch.cat([part for part, _ in parts], 1)
        mask: Tensor = torch.cat([seen for _, seen in parts], 1)[:, None, None]
        added: Tensor = mask
        if self.table is not None:
            added = self.table[:, :, : x.shape[1], : x.shape[1]] + torch.where(mask, 0.0, -1e9)
        for block in self.encoder:
            x = block(x, added)
        x = self.norm(x)
        if not self.decodes or decoder_input_ids is None:
            return {"logits": self.head(x[:, 0])}
        y = self.words(decoder_input_ids)
        for block in self.decoder:
            y = block(y, None, x, mask)
        return {"logits": self.head(y)}


def inputs(decodes: bool = True) -> dict[str, Tensor]:
    """Three rows, whose texts have 6, 4 and 5 words."""
    drawn = torch.Generator().manual_seed(1)
    mask = torch.ones(3, 6, dtype=torch.int64)
    mask[1, 4:] = mask[2, 5:] = 0
    found = {
        "pixel_values": torch.randn(3, 3, 8, 8, generator=drawn),
        "input_ids": torch.randint(1, VOCABULARY, (3, 6), generator=drawn),
        "attention_mask": mask,
    }
    if decodes:
        found["decoder_input_ids"] = torch.randint(1, VOCABULARY, (3, 5), generator=drawn)
    return found


def joined(**how: bool | str | int) -> Joined:
    """A model whose blocks move states visibly."""
    torch.manual_seed(0)
    model = Joined(**how).eval()  # type: ignore[arg-type]
    with torch.no_grad():
        for weight in model.encoder.parameters():
            if weight.dim() > 1:
                weight.mul_(2.5)
    return model


def captured(**how: Any) -> Program:
    """The program of such a model, captured once."""

    def fresh() -> Program:
        return shared.lent(capture(joined(**how), inputs(how.get("decodes", True))))

    found: Program = shared.once((Joined, *sorted(how.items())), fresh)
    return found
