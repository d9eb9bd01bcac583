"""Two models that read an image of 64x64 pixels and words: encoder-decoder, and one causal stack as in LLaVA.

An image is 64 patches of 8x8 pixels. `VisionLanguage` encodes patches and words together and decodes words that see
both; `CausalCaptioner` puts the patches in the places of `IMAGE` among the words (arXiv 2304.08485). Both have pre-norm
blocks (arXiv 2002.04745) of 128 features and one embedding for words and head (arXiv 1608.05859).
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

SIDE, PATCH = 64, 8  # pixels
PATCHES = (SIDE // PATCH) ** 2
FEATURES, HEADS, INNER, DROPOUT = 128, 4, 512, 0.05
BLOCKS = 6
LONGEST = 32  # words of a text
PAD, BEGIN, END, UNKNOWN, IMAGE = range(5)


def sines(places: Tensor, features: int) -> Tensor:
    """Sines and cosines of places, whose waves are 2 pi long and longer: ``[places, features]`` (arXiv 1706.03762)."""
    angles = places[:, None] / 1e4 ** (torch.arange(0, features, 2) / features)
    return torch.cat([angles.sin(), angles.cos()], 1)


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
    """Self-attention, attention over a memory if there is ``cross``, and a feed-forward layer."""

    def __init__(self, causal: bool, cross: bool = False) -> None:
        super().__init__()
        self.causal = causal
        self.norm, self.attention = nn.LayerNorm(FEATURES), Attention()
        if cross:
            self.cross_norm, self.cross = nn.LayerNorm(FEATURES), Attention()
        self.inner_norm = nn.LayerNorm(FEATURES)
        self.up, self.down = nn.Linear(FEATURES, INNER), nn.Linear(INNER, FEATURES)
        self.drop = nn.Dropout(DROPOUT)

    def forward(self, x: Tensor, visible: Tensor | None = None, memory: Tensor | None = None) -> Tensor:
        """``visible`` is of the memory, or of ``x`` where there is none: ``bool [batch, 1, 1, tokens]``."""
        y = self.norm(x)
        x = x + self.drop(self.attention(y, y, visible if memory is None else None, self.causal))
        if memory is not None:
            x = x + self.drop(self.cross(self.cross_norm(x), memory, visible))
        out: Tensor = x + self.drop(self.down(F.gelu(self.up(self.inner_norm(x)))))
        return out


class Patches(nn.Module):
    """Pixels ``float32 [batch, 3, 64, 64]`` to features ``[batch, 64, 128]``, row by row from the top left."""

    def __init__(self) -> None:
        super().__init__()
        self.project = nn.Linear(3 * PATCH * PATCH, FEATURES)
        side = torch.arange(SIDE // PATCH)
        rows, columns = side.repeat_interleave(len(side)), side.repeat(len(side))
        self.places = nn.Parameter(torch.cat([sines(each, FEATURES // 2) for each in (rows, columns)], 1))

    def forward(self, pixels: Tensor) -> Tensor:
        tiles = pixels.unflatten(3, (-1, PATCH)).unflatten(2, (-1, PATCH))  # batch, colour, row, y, column, x
        out: Tensor = self.project(tiles.permute(0, 2, 4, 1, 3, 5).flatten(3).flatten(1, 2)) + self.places
        return out


class Words(nn.Module):
    """Ids ``int64 [batch, words]`` to features ``[batch, words, 128]``, and features to logits of words."""

    def __init__(self, vocabulary: int, longest: int) -> None:
        super().__init__()
        self.table = nn.Embedding(vocabulary, FEATURES, PAD)
        nn.init.normal_(self.table.weight, std=FEATURES**-0.5)
        self.places = nn.Parameter(sines(torch.arange(longest), FEATURES))

    def forward(self, ids: Tensor) -> Tensor:
        out: Tensor = self.table(ids) * FEATURES**0.5 + self.places[: ids.shape[1]]
        return out

    def logits(self, x: Tensor) -> Tensor:
        return F.linear(x, self.table.weight)


class VisionLanguage(nn.Module):
    """An image, a question and the words of an answer so far to logits of the answer's next word.

    Patches and question are one bidirectional sequence; the decoder attends over all of it but the question's padding.
    """

    def __init__(self, vocabulary: int, blocks: int = BLOCKS) -> None:
        super().__init__()
        self.patches, self.words = Patches(), Words(vocabulary, LONGEST)
        self.kinds = nn.Parameter(torch.randn(2, FEATURES) * 0.02)  # of a patch, of a word
        self.encoder = nn.ModuleList(Block(causal=False) for _ in range(blocks))
        self.encoder_norm = nn.LayerNorm(FEATURES)
        self.decoder = nn.ModuleList(Block(causal=True, cross=True) for _ in range(blocks))
        self.norm = nn.LayerNorm(FEATURES)
        self.drop = nn.Dropout(DROPOUT)

    def forward(
        self, pixel_values: Tensor, input_ids: Tensor, attention_mask: Tensor, decoder_input_ids: Tensor
    ) -> dict[str, Tensor]:
        """Logits ``[batch, words, vocabulary]``; ``attention_mask`` is the question's, 0 where it is padded."""
        patches = self.patches(pixel_values) + self.kinds[0]
        question = self.words(input_ids) + self.kinds[1]
        visible = torch.cat([attention_mask.new_ones(patches.shape[:2]), attention_mask], 1)[:, None, None].bool()
        memory = self.drop(torch.cat([patches, question], 1))
        for block in self.encoder:
            memory = block(memory, visible)
        memory = self.encoder_norm(memory)
        x = self.drop(self.words(decoder_input_ids))
        for block in self.decoder:
            x = block(x, visible, memory)
        return {"logits": self.words.logits(self.norm(x))}


class CausalCaptioner(nn.Module):
    """An image and words, 64 of which are `IMAGE`, to logits of the next word; every word sees what is before it."""

    def __init__(self, vocabulary: int, blocks: int = BLOCKS) -> None:
        super().__init__()
        self.patches, self.words = Patches(), Words(vocabulary, PATCHES + 2 * LONGEST)
        self.project = nn.Linear(FEATURES, FEATURES)
        self.blocks = nn.ModuleList(Block(causal=True) for _ in range(blocks))
        self.norm = nn.LayerNorm(FEATURES)
        self.drop = nn.Dropout(DROPOUT)

    def forward(self, pixel_values: Tensor, input_ids: Tensor) -> dict[str, Tensor]:
        """Logits ``[batch, words, vocabulary]``."""
        patches = self.project(F.gelu(self.patches(pixel_values)))
        words = self.words(input_ids)
        x = self.drop(words.masked_scatter((input_ids == IMAGE)[..., None].expand_as(words), patches))
        for block in self.blocks:
            x = block(x)
        return {"logits": self.words.logits(self.norm(x))}


def example(rows: int = 2, question: int = 9, answer: int = 7) -> dict[str, Tensor]:
    """Inputs of `VisionLanguage`: an image, a question and an answer's first words for each row."""
    return {
        "pixel_values": torch.linspace(-1, 1, rows * 3 * SIDE * SIDE).view(rows, 3, SIDE, SIDE),
        "input_ids": torch.full((rows, question), UNKNOWN),
        "attention_mask": torch.ones(rows, question, dtype=torch.int64),
        "decoder_input_ids": torch.full((rows, answer), UNKNOWN),
    }


def causal_example(rows: int = 2, text: int = 9) -> dict[str, Tensor]:
    """Inputs of `CausalCaptioner`: for each row an image, and its places with a text after them."""
    ids = torch.full((rows, PATCHES + text), UNKNOWN)
    ids[:, :PATCHES] = IMAGE
    return {"pixel_values": example(rows)["pixel_values"], "input_ids": ids}
