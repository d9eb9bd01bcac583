"""Tiny encoders with random weights, one factory per architecture: `NAME() -> (module, example_inputs)`.

A factory returns a module in evaluation mode and the keyword arguments of its forward, all tensors. It builds
the same weights every time, large enough that every block changes the output. Sizes differ from one another
where an architecture lets them: batch 2, 9 tokens, width 32, 4 heads of 8, 4 blocks, feed-forward 64,
vocabulary 99.

`REQUIRED` and `OTHERS` capture with `torch.export`. `NOT_CAPTURED` only runs eagerly; its reason is the first
line of what torch.export said, or the guard that binds the exported graph to one batch. `REFUSED` is what
offramp has to turn down. A factory imports transformers when it is called, not before.
"""

# mypy: disable-error-code="no-any-return"
from __future__ import annotations

import importlib
import math
from collections.abc import Callable
from functools import partial
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

Inputs = dict[str, Tensor]
Factory = Callable[[], tuple[nn.Module, Inputs]]

BATCH, TOKENS, WIDTH, HEADS, BLOCKS, INNER, VOCAB, CLASSES = 2, 9, 32, 4, 4, 64, 99, 5


# Inputs


def _ids(tokens: int = TOKENS, vocab: int = VOCAB) -> Tensor:
    return torch.randint(5, vocab, (BATCH, tokens))


def _mask(tokens: int = TOKENS, padding: int = 2) -> Tensor:
    """All ones but for the last `padding` tokens of row 1."""
    mask = torch.ones(BATCH, tokens, dtype=torch.int64)
    mask[1, tokens - padding :] = 0
    return mask


def _text(tokens: int = TOKENS) -> Inputs:
    return {"input_ids": _ids(tokens), "attention_mask": _mask(tokens)}


def _image(size: int = 40) -> Inputs:
    return {"pixel_values": torch.randn(BATCH, 3, size, size)}


def _floats(name: str, *shape: int) -> Callable[[], Inputs]:
    return lambda: {name: torch.randn(BATCH, *shape)}


def _boxes(tokens: int = TOKENS) -> Tensor:
    """Corners (x0, y0, x1, y1) with x0 < x1 and y0 < y1."""
    return torch.cat([torch.randint(0, 30, (BATCH, tokens, 2)), torch.randint(31, 60, (BATCH, tokens, 2))], dim=-1)


_AXES: dict[str, tuple[int, int | None]] = {  # batch axis and token axis where they are not 0 and 1
    "pixel_values": (0, None),
    "pixel_values_videos": (0, None),
    "noise": (0, None),
    "past_values": (0, None),
    "x": (0, None),
    "signal": (0, 2),
    "spectrogram": (0, 3),
}


def axes(name: str, key: str) -> tuple[int, int | None]:
    """Batch axis and token axis of input `key` of architecture `name`; None where its length is fixed."""
    batch, token = (1, 0) if name == "torch_encoder_pre" else _AXES.get(key, (0, 1))
    return batch, None if name in FIXED_LENGTH else token


def resized(name: str, inputs: Inputs, batch: int = 3, longer: bool = True) -> Inputs:
    """Inputs of another batch size and, where the architecture takes it, of more tokens, by repetition."""
    sized = {}
    for key, value in inputs.items():
        batch_axis, token_axis = axes(name, key)
        value = value.index_select(batch_axis, torch.arange(batch) % value.shape[batch_axis])
        if longer and token_axis is not None:
            count = value.shape[token_axis]
            # 32 samples more of a waveform keep its frames odd, as the exported graph of sew wants them
            count += 16 * (count // 100) or max(2, count // 8)
            value = value.index_select(token_axis, torch.arange(count) % value.shape[token_axis])
        sized[key] = value
    return sized


# Weights


@torch.no_grad()
def _randomise(module: nn.Module) -> nn.Module:
    """Matrices of unit gain, biases and norms off their neutral values: no block is near the identity."""
    for name, weight in module.named_parameters():
        if weight.ndim > 1:
            fan_in = weight[0].numel() if weight.shape[0] > 1 else weight.shape[-1]
            weight.normal_(0.0, max(0.1, fan_in**-0.5))
        else:
            weight.normal_(0.0 if name.endswith("bias") else 1.0, 0.1)
    return module


def _build(make: Callable[[], nn.Module], inputs: Callable[[], Inputs]) -> tuple[nn.Module, Inputs]:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return _randomise(make()).eval(), inputs()


def _torch(make: Callable[[], nn.Module], inputs: Callable[[], Inputs] = _text) -> Factory:
    return partial(_build, make, inputs)


# Classes of transformers

_LAYERS = {
    "hidden_size": WIDTH,
    "num_hidden_layers": BLOCKS,
    "num_attention_heads": HEADS,
    "intermediate_size": INNER,
}
_TEXT = {
    **_LAYERS,
    "vocab_size": VOCAB,
    "max_position_embeddings": 64,
    "pad_token_id": 1,
    "num_labels": CLASSES,
}
_GROUPED = {**_TEXT, "num_key_value_heads": 2, "head_dim": WIDTH // HEADS}
_VISION = {**_LAYERS, "image_size": 40, "patch_size": 8, "num_labels": CLASSES}
_SPEECH = {
    **_LAYERS,
    "vocab_size": VOCAB,
    "conv_dim": (12, 16),
    "conv_stride": (4, 2),
    "conv_kernel": (8, 4),
    "num_conv_pos_embeddings": 6,
    "num_conv_pos_embedding_groups": 2,
    "num_feat_extract_layers": 2,
}
_ENCODER = {  # of an encoder-decoder
    "vocab_size": VOCAB,
    "d_model": WIDTH,
    "encoder_layers": BLOCKS,
    "encoder_attention_heads": HEADS,
    "encoder_ffn_dim": INNER,
    "decoder_layers": 1,
    "decoder_attention_heads": HEADS,
    "decoder_ffn_dim": INNER,
    "max_position_embeddings": 64,
    "use_cache": False,
}
_T5 = {
    "vocab_size": VOCAB,
    "d_model": WIDTH,
    "d_kv": WIDTH // HEADS,
    "d_ff": INNER,
    "num_layers": BLOCKS,
    "num_heads": HEADS,
    "use_cache": False,
}
_SERIES = {
    **{name: value for name, value in _ENCODER.items() if name not in ("vocab_size", "max_position_embeddings")},
    "prediction_length": 4,
    "context_length": 24,
    "lags_sequence": [1, 2, 3],
    "num_time_features": 1,
}
_waveform = _floats("input_values", 200)


def _hf(
    model: str,
    sizes: dict[str, Any],
    inputs: Callable[[], Inputs],
    /,
    *,
    part: str | None = None,
    **options: Any,
) -> Factory:
    """A factory of a transformers class: "Name", or "package:Name" where transformers does not export it.

    `options` join the configuration's `sizes`; `part` picks a submodule (the encoder of an encoder-decoder).
    """

    def make() -> nn.Module:
        package, _, name = model.rpartition(":")
        found = getattr(importlib.import_module(f"transformers.{package}" if package else "transformers"), name)
        built: nn.Module = found(found.config_class(**{**sizes, **options}))
        return attrgetter(part)(built) if part else built

    return partial(_build, make, inputs)


# Written by hand

Core = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]  # q, k, v [B, H, S, D] and mask [B, 1, 1, S] -> [B, H, S, D]


def _sdpa(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)


def _weigh(scores: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    return scores.masked_fill(~mask, -1e9).softmax(dim=-1) @ v


def _einsum(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    scores = torch.einsum("bhqd,bhkd->bhqk", q, k) / math.sqrt(q.shape[-1])
    weights = torch.where(mask, scores, torch.finfo(scores.dtype).min).softmax(dim=-1)
    return torch.einsum("bhqk,bhkd->bhqd", weights, v)


def _soft_capped(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    return _weigh(3.0 * torch.tanh(q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1]) / 3.0), v, mask)


def _alibi(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    positions = torch.arange(q.shape[2])
    distance = (positions[:, None] - positions[None, :]).abs()
    slopes = 2.0 ** -torch.arange(1, q.shape[1] + 1)
    return _weigh(q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1]) - slopes[:, None, None] * distance, v, mask)


def _exp_and_sum(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    scores = torch.matmul(q * q.shape[-1] ** -0.5, k.mT)
    powers = torch.exp(scores - scores.amax(dim=-1, keepdim=True)) * mask
    return torch.matmul(powers / powers.sum(dim=-1, keepdim=True), v)


def _cosine(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    return _weigh(10.0 * F.normalize(q, dim=-1) @ F.normalize(k, dim=-1).transpose(-1, -2), v, mask)


def _local(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    positions = torch.arange(q.shape[2])
    return _sdpa(q, k, v, mask & ((positions[:, None] - positions[None, :]).abs() <= 2))


def _talking_heads(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    mix = torch.linspace(-1.0, 1.0, q.shape[1] ** 2).view(q.shape[1], q.shape[1])
    scores = torch.einsum("bhqk,hg->bgqk", q @ k.mT / math.sqrt(q.shape[-1]), mix)
    weights = scores.masked_fill(~mask, -1e9).softmax(dim=-1)
    return torch.einsum("bhqk,hg->bgqk", weights, mix.T) @ v


class _Attention(nn.Module):
    def __init__(self, core: Core = _sdpa, kv_heads: int = HEADS) -> None:
        super().__init__()
        self.core, self.kv_heads, self.size = core, kv_heads, WIDTH // HEADS
        self.q, self.out = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)
        self.k, self.v = nn.Linear(WIDTH, kv_heads * self.size), nn.Linear(WIDTH, kv_heads * self.size)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        q, k, v = (f(x).view(x.shape[0], x.shape[1], -1, self.size).transpose(1, 2) for f in (self.q, self.k, self.v))
        if self.kv_heads < HEADS:
            k, v = (y.repeat_interleave(HEADS // self.kv_heads, dim=1) for y in (k, v))
        return self.out(self.core(q, k, v, mask).transpose(1, 2).flatten(2))


class _Block(nn.Module):
    """One block; `style` places its norms: pre, post, sandwich or parallel (attention beside MLP)."""

    def __init__(self, style: str = "pre", core: Core = _sdpa, kv_heads: int = HEADS) -> None:
        super().__init__()
        self.style, self.attention = style, _Attention(core, kv_heads)
        self.mlp = nn.Sequential(nn.Linear(WIDTH, INNER), nn.GELU(), nn.Linear(INNER, WIDTH))
        self.norms = nn.ModuleList(nn.LayerNorm(WIDTH) for _ in range({"parallel": 1, "sandwich": 4}.get(style, 2)))

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        if self.style == "parallel":
            y = self.norms[0](x)
            return x + self.attention(y, mask) + self.mlp(y)
        if self.style == "sandwich":
            x = x + self.norms[1](self.attention(self.norms[0](x), mask))
            return x + self.norms[3](self.mlp(self.norms[2](x)))
        if self.style == "post":
            x = self.norms[0](x + self.attention(x, mask))
            return self.norms[1](x + self.mlp(x))
        x = x + self.attention(self.norms[0](x), mask)
        return x + self.mlp(self.norms[1](x))


class _Embedding(nn.Module):
    """Token plus learned position."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens, self.positions = nn.Embedding(VOCAB, WIDTH), nn.Embedding(64, WIDTH)

    def forward(self, ids: Tensor) -> Tensor:
        return self.tokens(ids) + self.positions(torch.arange(ids.shape[1]))


class _Encoder(nn.Module):
    """Embedding, blocks, final norm, and a classification of every token or, pooled, of every row."""

    def __init__(self, style: str = "pre", core: Core = _sdpa, kv_heads: int = HEADS, pooled: bool = True) -> None:
        super().__init__()
        self.embedding, self.pooled = _Embedding(), pooled
        self.blocks = nn.ModuleList(_Block(style, core, kv_heads) for _ in range(BLOCKS))
        self.norm, self.head = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, CLASSES)

    def run(self, x: Tensor, mask: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x, mask)
        return x

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        x = self.norm(self.run(self.embedding(input_ids), attention_mask.bool()[:, None, None]))
        if self.pooled:
            x = (x * attention_mask[..., None]).sum(dim=1) / attention_mask.sum(dim=1, keepdim=True)
        return self.head(x)


class _OneBlock(_Encoder):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = self.blocks[:1]


class _AttributeBlocks(_Encoder):
    def __init__(self) -> None:
        super().__init__()
        self.block1, self.block2, self.block3, self.block4 = self.blocks
        del self.blocks

    def run(self, x: Tensor, mask: Tensor) -> Tensor:
        return self.block4(self.block3(self.block2(self.block1(x, mask), mask), mask), mask)


class _LoopedBlock(_OneBlock):
    def run(self, x: Tensor, mask: Tensor) -> Tensor:
        for _ in range(BLOCKS):
            x = self.blocks[0](x, mask)
        return x


class _InputInjection(_Encoder):
    def run(self, x: Tensor, mask: Tensor) -> Tensor:
        h = x
        for block in self.blocks:
            h = block(h + x, mask)
        return h


class _AlternatingWindows(_Encoder):
    """Global and local attention take turns: two block structures."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(_Block(core=core) for core in (_sdpa, _local) * (BLOCKS // 2))


class _ScaledByDepth(_Encoder):
    """Blocks that differ in one constant."""

    def run(self, x: Tensor, mask: Tensor) -> Tensor:
        for depth, block in enumerate(self.blocks, start=1):
            x = x + (block(x, mask) - x) / math.sqrt(depth)
        return x


class _RegisterTokens(_Encoder):
    """Three learned tokens go before the text and are cut off after the last block."""

    def __init__(self) -> None:
        super().__init__()
        self.registers = nn.Parameter(torch.zeros(1, 3, WIDTH))

    def run(self, x: Tensor, mask: Tensor) -> Tensor:
        x = torch.cat([self.registers.expand(x.shape[0], -1, -1), x], dim=1)
        return super().run(x, F.pad(mask, (3, 0), value=True))[:, 3:]


class _BiasedBlock(_Block):
    """With a table, turns the mask into a bias by relative position; returns what the next block takes."""

    def __init__(self, owner: bool) -> None:
        super().__init__()
        self.table = nn.Embedding(17, HEADS) if owner else None

    def forward(self, x: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        if self.table is not None:
            positions = torch.arange(x.shape[1])
            distance = (positions[None, :] - positions[:, None]).clamp(-8, 8) + 8
            mask = self.table(distance).permute(2, 0, 1)[None].masked_fill(~mask, -1e9)
        return super().forward(x, mask), mask


class _FirstBlockBias(_Encoder):
    """As in T5, the first block computes the bias and the others get it."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(_BiasedBlock(owner=index == 0) for index in range(BLOCKS))

    def run(self, x: Tensor, mask: Tensor) -> Tensor:
        for block in self.blocks:
            x, mask = block(x, mask)
        return x


class _Experts(nn.Module):
    """Every expert runs on every token; a softmax over the three weighs them."""

    def __init__(self) -> None:
        super().__init__()
        self.router = nn.Linear(WIDTH, 3)
        self.experts = nn.ModuleList(
            nn.Sequential(nn.Linear(WIDTH, INNER), nn.ReLU(), nn.Linear(INNER, WIDTH)) for _ in range(3)
        )

    def forward(self, x: Tensor) -> Tensor:
        outputs = torch.stack([expert(x) for expert in self.experts], dim=-1)
        return (outputs * self.router(x).softmax(dim=-1).unsqueeze(-2)).sum(dim=-1)


class _MixtureOfExperts(_Encoder):
    def __init__(self) -> None:
        super().__init__()
        for block in self.blocks:
            block.mlp = _Experts()


class _ChannelsFirst(nn.Module):
    """[B, C, S] throughout, 1x1 convolutions for matrices, norms that transpose."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.head = nn.Conv1d(3, WIDTH, 1), nn.Conv1d(WIDTH, CLASSES, 1)
        self.norms = nn.ModuleList(nn.LayerNorm(WIDTH) for _ in range(2 * BLOCKS))
        self.qkv = nn.ModuleList(nn.Conv1d(WIDTH, 3 * WIDTH, 1) for _ in range(BLOCKS))
        self.out = nn.ModuleList(nn.Conv1d(WIDTH, WIDTH, 1) for _ in range(BLOCKS))
        self.mlp = nn.ModuleList(
            nn.Sequential(nn.Conv1d(WIDTH, INNER, 1), nn.SiLU(), nn.Conv1d(INNER, WIDTH, 1)) for _ in range(BLOCKS)
        )

    def norm(self, x: Tensor, index: int) -> Tensor:
        return self.norms[index](x.transpose(1, 2)).transpose(1, 2)

    def forward(self, signal: Tensor) -> Tensor:
        x = self.stem(signal)
        for i in range(BLOCKS):
            qkv = self.qkv[i](self.norm(x, 2 * i)).unflatten(1, (3, HEADS, -1)).unbind(dim=1)
            q, k, v = (y.transpose(-1, -2) for y in qkv)
            x = x + self.out[i](F.scaled_dot_product_attention(q, k, v).transpose(-1, -2).flatten(1, 2))
            x = x + self.mlp[i](self.norm(x, 2 * i + 1))
        return self.head(x)


class _ConvFrontEnd(_Encoder):
    """Two strided convolutions over a one-channel spectrogram; time is the token axis."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Sequential(
            nn.Conv2d(1, 6, 3, stride=2, padding=1),
            nn.GELU(),
            nn.Conv2d(6, 8, 3, stride=2, padding=1),
            nn.GELU(),
        )
        self.embedding = nn.Linear(8 * 3, WIDTH)  # type: ignore[assignment]

    def forward(self, spectrogram: Tensor) -> Tensor:  # type: ignore[override]
        x = self.embedding(self.conv(spectrogram).permute(0, 3, 1, 2).flatten(2))
        mask = torch.ones(x.shape[0], 1, 1, x.shape[1], dtype=torch.bool)
        return self.head(self.norm(self.run(x, mask)).mean(dim=1))


class _ImageText(_Encoder):
    """Patches and words in one sequence; class of the pair from the mean."""

    def __init__(self) -> None:
        super().__init__()
        self.patches, self.places = nn.Conv2d(3, WIDTH, 8, stride=8), nn.Parameter(torch.zeros(1, 25, WIDTH))

    def forward(  # type: ignore[override]
        self, pixel_values: Tensor, input_ids: Tensor, attention_mask: Tensor
    ) -> Tensor:
        patches = self.patches(pixel_values).flatten(2).transpose(1, 2) + self.places
        x = torch.cat([patches, self.embedding(input_ids)], dim=1)
        mask = F.pad(attention_mask.bool(), (25, 0), value=True)[:, None, None]
        return self.head(self.norm(self.run(x, mask)).mean(dim=1))


class _DualTower(nn.Module):
    """Two encoders of unequal depth, each with its own sequence, joined in a head."""

    def __init__(self) -> None:
        super().__init__()
        self.query, self.passage = _Encoder(), _Encoder(style="post")
        self.passage.blocks = self.passage.blocks[:3]
        self.head = nn.Linear(2 * CLASSES, CLASSES)

    def forward(self, query_ids: Tensor, query_mask: Tensor, passage_ids: Tensor, passage_mask: Tensor) -> Tensor:
        return self.head(
            torch.cat([self.query(query_ids, query_mask), self.passage(passage_ids, passage_mask)], dim=-1)
        )


class _MLP(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(*(m for _ in range(BLOCKS) for m in (nn.Linear(WIDTH, WIDTH), nn.ReLU())))

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x)


class _DataDependentLoop(_Encoder):
    def run(self, x: Tensor, mask: Tensor) -> Tensor:
        while x.abs().max() < 20.0:
            x = super().run(x, mask)
        return x


class _StatesOut(_Encoder):
    """What is made of the states between its blocks is returned beside the logits."""

    def run(self, x: Tensor, mask: Tensor) -> Tensor:
        self.means = []
        for block in self.blocks:
            self.means.append(x.mean(1))
            x = block(x, mask)
        return x

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> dict[str, Tensor]:  # type: ignore[override]
        return {"logits": super().forward(input_ids, attention_mask), "means": torch.stack(self.means)}


class _NonTensorOutput(_Encoder):
    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> dict[str, object]:  # type: ignore[override]
        return {"logits": super().forward(input_ids, attention_mask), "names": {"tiny"}}


def _typed() -> Inputs:
    return {**_text(), "token_type_ids": torch.randint(0, 2, (BATCH, TOKENS))}


def _boxed() -> Inputs:
    return {**_text(), "bbox": _boxes()}


def _padded() -> Inputs:
    return {"src": torch.randn(BATCH, TOKENS, WIDTH), "src_key_padding_mask": _mask() == 0}


def _image_and_text() -> Inputs:
    return {**_image(), **_text()}


def _regions() -> Inputs:
    return {
        **_text(),
        "visual_embeds": torch.randn(BATCH, 5, 12),
        "visual_attention_mask": torch.ones(BATCH, 5),
        "visual_token_type_ids": torch.ones(BATCH, 5, dtype=torch.int64),
    }


def _ragged_images() -> Inputs:
    """Patches of a 3x5 and of a 3x4 image."""
    return {
        "pixel_values": torch.randn(BATCH, 15, 192),
        "pixel_attention_mask": _mask(15, 3),
        "spatial_shapes": torch.tensor([[3, 5], [3, 4]]),
    }


def _two_texts() -> Inputs:
    query, passage = _text(), _text(13)
    return {
        "query_ids": query["input_ids"],
        "query_mask": query["attention_mask"],
        "passage_ids": passage["input_ids"],
        "passage_mask": passage["attention_mask"],
    }


def _torch_layers(**options: Any) -> nn.TransformerEncoder:
    layer = nn.TransformerEncoderLayer(WIDTH, HEADS, INNER, **options)
    final = nn.LayerNorm(WIDTH) if options.get("norm_first") else None
    return nn.TransformerEncoder(layer, BLOCKS, norm=final, enable_nested_tensor=False)


# fmt: off
REQUIRED: dict[str, Factory] = {
    "bert": _hf("BertForSequenceClassification", _TEXT, _typed),
    "distilbert": _hf(
        "DistilBertForMaskedLM", _TEXT, _text, dim=WIDTH, n_layers=BLOCKS, n_heads=HEADS, hidden_dim=INNER
    ),
    "roberta": _hf("RobertaForTokenClassification", _TEXT, _text),
    "albert": _hf("AlbertForSequenceClassification", _TEXT, _text, embedding_size=16),
    "vit": _hf("ViTForImageClassification", _VISION, _image),
    "clip_vision": _hf("CLIPVisionModelWithProjection", _VISION, _image, projection_dim=24),
    "wav2vec2": _hf("Wav2Vec2ForCTC", _SPEECH, _waveform),
    "torch_encoder_post": _torch(partial(_torch_layers, batch_first=True), _padded),
    "torch_encoder_pre": _torch(
        partial(_torch_layers, norm_first=True), lambda: {"src": torch.randn(TOKENS, BATCH, WIDTH)}
    ),
    "einsum_encoder": _torch(partial(_Encoder, core=_einsum, pooled=False)),
    "attribute_blocks": _torch(_AttributeBlocks),
    "looped_block": _torch(_LoopedBlock),
    "image_text": _torch(_ImageText, _image_and_text),
}

OTHERS: dict[str, Factory] = {
    # text
    "deberta": _hf(
        "DebertaModel", _TEXT, _text, relative_attention=True, max_relative_positions=16,
        pos_att_type=["c2p", "p2c"]
    ),
    "deberta_v2": _hf(
        "DebertaV2ForSequenceClassification", _TEXT, _text, relative_attention=True, position_buckets=8,
        pos_att_type=["c2p", "p2c"], norm_rel_ebd="layer_norm", share_att_key=True, conv_kernel_size=3
    ),
    "t5_encoder": _hf("T5EncoderModel", _T5, _text),
    "umt5_encoder": _hf("UMT5EncoderModel", _T5, _text),
    "longt5_local": _hf("LongT5EncoderModel", _T5, _text, local_radius=3),
    "longt5_global": _hf(
        "LongT5EncoderModel", _T5, _text, local_radius=3, global_block_size=4,
        encoder_attention_type="transient-global"
    ),
    "udop_encoder": _hf(
        "UdopEncoderModel", _T5, lambda: {**_text(), "bbox": _boxes() / 60}, image_size=40, patch_size=8,
        max_2d_position_embeddings=64
    ),
    "t5gemma_encoder": _hf(
        "T5GemmaEncoderModel", {"encoder": {**_GROUPED, "query_pre_attn_scalar": 8, "sliding_window": 3}},
        _text, is_encoder_decoder=False
    ),
    "bart_encoder": _hf("BartModel", _ENCODER, _text, part="encoder"),
    "m2m100_encoder": _hf("M2M100Model", _ENCODER, _text, part="encoder"),
    "marian_encoder": _hf(
        "MarianModel", _ENCODER, _text, part="encoder", pad_token_id=1, decoder_start_token_id=1
    ),
    "pegasus_x_encoder": _hf(
        "PegasusXModel", _ENCODER, _text, part="encoder", block_size=4, num_global_tokens=3
    ),
    "mpnet": _hf("MPNetModel", _TEXT, _text),
    "xlnet": _hf(
        "XLNetModel",
        {"vocab_size": VOCAB, "d_model": WIDTH, "n_layer": BLOCKS, "n_head": HEADS, "d_inner": INNER}, _text,
        mem_len=None, use_mems_eval=False
    ),
    "electra": _hf("ElectraForTokenClassification", _TEXT, _text, embedding_size=16),
    "esm": _hf(
        "EsmModel", _TEXT, _text, position_embedding_type="rotary", mask_token_id=4, token_dropout=True
    ),
    "esmc": _hf("EsmcModel", _TEXT, _text),
    "modernbert": _hf(
        "ModernBertForSequenceClassification", _TEXT, _text, local_attention=4,
        layer_types=["full_attention", "sliding_attention"] * 2, eos_token_id=2, bos_token_id=0,
        cls_token_id=0, sep_token_id=2
    ),
    "nomic_bert": _hf("NomicBertModel", _TEXT, _text),
    "eurobert": _hf("EuroBertModel", _GROUPED, _text, bos_token_id=0, eos_token_id=2, mask_token_id=4),
    "ultrabert": _hf("UltrabertModel", _GROUPED, _text, sliding_window=4),
    "jina_embeddings_v3": _hf("JinaEmbeddingsV3Model", _TEXT, _text),
    "embedding_gemma2_text": _hf(
        "EmbeddingGemma2TextModel", _GROUPED, _text, sliding_window=3, hidden_size_per_layer_input=6,
        embedding_dim=24
    ),
    "privacy_filter_batched": _hf(
        "OpenAIPrivacyFilterModel", _GROUPED, _text, num_local_experts=3, num_experts_per_tok=2,
        sliding_window=4, eos_token_id=2, experts_implementation="batched_mm"
    ),
    "roformer": _hf("RoFormerModel", _TEXT, _text, embedding_size=16),
    "big_bird": _hf("BigBirdModel", _TEXT, _text, attention_type="original_full"),
    "nystromformer": _hf(
        "NystromformerModel", _TEXT, _text, num_landmarks=16, segment_means_seq_len=16, conv_kernel_size=5
    ),
    "mobilebert": _hf("MobileBertModel", _TEXT, _text, embedding_size=24, intra_bottleneck_size=16),
    "squeezebert": _hf(
        "SqueezeBertModel", _TEXT, _text, embedding_size=WIDTH, q_groups=2, k_groups=2, v_groups=2
    ),
    "convbert": _hf("ConvBertModel", _TEXT, _text, embedding_size=16, conv_kernel_size=3),
    "funnel": _hf(
        "FunnelModel",
        {"vocab_size": VOCAB, "d_model": WIDTH, "n_head": HEADS, "d_head": 8, "d_inner": INNER}, _text,
        block_sizes=[2, 2], num_decoder_layers=2
    ),
    "canine": _hf("CanineModel", _TEXT, lambda: _text(24), local_transformer_stride=8, num_hash_buckets=61),
    "fnet": _hf("FNetModel", _TEXT, lambda: {"input_ids": _ids()}),
    "yoso": _hf("YosoModel", _TEXT, _text),
    "mra": _hf("MraModel", _TEXT, lambda: _text(64), max_position_embeddings=160),
    "camembert": _hf("CamembertForMaskedLM", _TEXT, _text),
    "xlm_roberta_xl": _hf("XLMRobertaXLModel", _TEXT, _text),
    "roberta_prelayernorm": _hf("RobertaPreLayerNormModel", _TEXT, _text),
    "xmod": _hf("XmodModel", _TEXT, _text, default_language="en_XX"),
    "data2vec_text": _hf("Data2VecTextModel", _TEXT, _text),
    "xlm": _hf(
        "XLMModel", {**_TEXT, "emb_dim": WIDTH, "n_layers": BLOCKS, "n_heads": HEADS, "n_words": VOCAB}, _text
    ),
    "megatron_bert": _hf("MegatronBertModel", _TEXT, _text),
    "rembert": _hf("RemBertModel", _TEXT, _text, input_embedding_size=16, output_embedding_size=24),
    "ibert": _hf("IBertModel", _TEXT, _text),
    "ernie": _hf("ErnieModel", _TEXT, _text, use_task_id=True, task_type_vocab_size=3),
    "roc_bert": _hf(
        "RoCBertModel", _TEXT, _text, pronunciation_embed_dim=12, pronunciation_vocab_size=VOCAB,
        shape_embed_dim=20, shape_vocab_size=VOCAB
    ),
    "splinter": _hf(
        "SplinterForQuestionAnswering", _TEXT, lambda: {"input_ids": _ids()}, question_token_id=4
    ),
    "luke": _hf("LukeModel", _TEXT, _text, entity_vocab_size=11, entity_emb_size=16),
    "bert_generation": _hf("BertGenerationEncoder", _TEXT, _text),
    "clip_text": _hf("CLIPTextModelWithProjection", _TEXT, _text, projection_dim=24),
    "siglip_text": _hf("SiglipTextModel", _TEXT, _text, projection_size=24),
    "speecht5_text_encoder": _hf(
        "SpeechT5Model", {**_ENCODER, **_SPEECH},
        lambda: {"hidden_states": torch.randn(BATCH, TOKENS, WIDTH), "attention_mask": _mask()},
        part="encoder.wrapped_encoder", encoder_max_relative_position=6
    ),
    # documents, image and text
    "layoutlm": _hf("LayoutLMModel", _TEXT, _boxed, max_2d_position_embeddings=64),
    "layoutlmv3": _hf(
        "LayoutLMv3Model", _TEXT, lambda: {**_boxed(), **_image()}, max_2d_position_embeddings=64,
        coordinate_size=5, shape_size=6, input_size=40, patch_size=8, rel_pos_bins=8, rel_2d_pos_bins=8
    ),
    "lilt": _hf(
        "LiltModel", _TEXT, _boxed, hidden_size=48, max_2d_position_embeddings=64, channel_shrink_ratio=2
    ),
    "bros": _hf(
        "BrosModel", _TEXT, lambda: {**_text(), "bbox": torch.rand(BATCH, TOKENS, 8)}, hidden_size=64
    ),
    "blip_text": _hf(
        "models.blip.modeling_blip_text:BlipTextModel", _TEXT, _text, is_decoder=False, use_cache=False
    ),
    "visual_bert": _hf("VisualBertModel", _TEXT, _regions, visual_embedding_dim=12),
    "lxmert": _hf(
        "LxmertModel", _TEXT,
        lambda: {**_text(), "visual_feats": torch.randn(BATCH, 5, 12), "visual_pos": torch.rand(BATCH, 5, 4)},
        l_layers=4, r_layers=3, x_layers=3, visual_feat_dim=12
    ),
    "clip": _hf(
        "CLIPModel",
        {"text_config": {**_TEXT, "projection_dim": 24}, "vision_config": {**_VISION, "projection_dim": 24}},
        _image_and_text, projection_dim=24
    ),
    # speech
    "hubert": _hf("HubertModel", _SPEECH, _waveform),
    "wavlm": _hf("WavLMModel", _SPEECH, _waveform, num_buckets=8, max_bucket_distance=16),
    "unispeech": _hf("UniSpeechModel", _SPEECH, _waveform),
    "unispeech_sat_stable": _hf(
        "UniSpeechSatModel", _SPEECH, _waveform, do_stable_layer_norm=True, feat_extract_norm="layer"
    ),
    "data2vec_audio": _hf(
        "Data2VecAudioModel", _SPEECH, _waveform, num_conv_pos_embeddings=2, conv_pos_kernel_size=3
    ),
    "wav2vec2_conformer": _hf(
        "Wav2Vec2ConformerModel", _SPEECH, _waveform, position_embeddings_type="relative",
        max_source_positions=64, conv_depthwise_kernel_size=5
    ),
    "wav2vec2_conformer_rotary": _hf(
        "Wav2Vec2ConformerModel", _SPEECH, _waveform, position_embeddings_type="rotary",
        conv_depthwise_kernel_size=5
    ),
    "wav2vec2_bert": _hf(
        "Wav2Vec2BertModel", _LAYERS, lambda: {"input_features": torch.randn(BATCH, 24, 12)},
        feature_projection_input_dim=12, conv_depthwise_kernel_size=5, left_max_position_embeddings=6,
        right_max_position_embeddings=3
    ),
    "seamless_speech_encoder": _hf(
        "models.seamless_m4t.modeling_seamless_m4t:SeamlessM4TSpeechEncoder",
        {"hidden_size": WIDTH, "vocab_size": VOCAB}, lambda: {"input_features": torch.randn(BATCH, 24, 12)},
        speech_encoder_layers=BLOCKS, speech_encoder_attention_heads=HEADS,
        speech_encoder_intermediate_size=INNER, feature_projection_input_dim=12, conv_depthwise_kernel_size=5,
        max_source_positions=64, adaptor_kernel_size=4, adaptor_stride=4
    ),
    "sew": _hf("SEWModel", _SPEECH, _waveform, squeeze_factor=2),
    "sew_d": _hf(
        "SEWDModel", _SPEECH, _waveform, squeeze_factor=2, position_buckets=8, max_position_embeddings=64
    ),
    "whisper_encoder": _hf(
        "WhisperModel", _ENCODER, _floats("input_features", 12, 30), part="encoder", num_mel_bins=12,
        max_source_positions=15, max_target_positions=16, pad_token_id=1, decoder_start_token_id=0
    ),
    "speech_to_text_encoder": _hf(
        "Speech2TextModel", _ENCODER, _floats("input_features", 40, 12), part="encoder",
        input_feat_per_channel=12, conv_channels=10, max_source_positions=64, max_target_positions=16
    ),
    "moonshine_encoder": _hf(
        "MoonshineModel", {"hidden_size": WIDTH, "intermediate_size": INNER, "vocab_size": VOCAB},
        _floats("input_values", 2400), part="encoder", encoder_num_hidden_layers=BLOCKS,
        encoder_num_attention_heads=HEADS, decoder_num_hidden_layers=1, decoder_num_attention_heads=HEADS,
        use_cache=False
    ),
    "parakeet_encoder": _hf(
        "ParakeetEncoder", _LAYERS, _floats("input_features", 48, 16), num_mel_bins=16, subsampling_factor=4,
        subsampling_conv_channels=6, conv_kernel_size=5, max_position_embeddings=64
    ),
    "lasr_encoder": _hf(
        "LasrEncoder", _LAYERS, _floats("input_features", 48, 16), num_mel_bins=16,
        subsampling_conv_channels=6, conv_kernel_size=5, max_position_embeddings=64
    ),
    "ast": _hf(
        "ASTForAudioClassification", _LAYERS, _floats("input_values", 26, 18), num_labels=CLASSES,
        patch_size=6, frequency_stride=4, time_stride=5, max_length=26, num_mel_bins=18
    ),
    "clap_text": _hf("ClapTextModel", _TEXT, _text),
    # images and video, one resolution
    "deit": _hf("DeiTForImageClassificationWithTeacher", _VISION, _image),
    "beit": _hf("BeitForImageClassification", _VISION, _image, use_relative_position_bias=True),
    "beit_shared_bias": _hf("BeitModel", _VISION, _image, use_shared_relative_position_bias=True),
    "data2vec_vision": _hf("Data2VecVisionModel", _VISION, _image, use_relative_position_bias=True),
    "dinov2": _hf("Dinov2ForImageClassification", _VISION, _image, mlp_ratio=2),
    "dinov2_with_registers": _hf(
        "Dinov2WithRegistersModel", _VISION, _image, mlp_ratio=2, num_register_tokens=3
    ),
    "dinov3_vit": _hf("DINOv3ViTModel", _VISION, _image, num_register_tokens=3, use_gated_mlp=True),
    "siglip_vision": _hf("SiglipVisionModel", _VISION, _image),
    "aimv2_vision": _hf("Aimv2VisionModel", _VISION, _image),
    "ijepa": _hf("IJepaModel", _VISION, _image),
    "pixio": _hf("PixioModel", _VISION, _image, mlp_ratio=2, n_cls_tokens=3),
    "vit_mae": _hf(
        "ViTMAEModel", _VISION, lambda: {**_image(), "noise": torch.rand(BATCH, 25)}, mask_ratio=0.4
    ),
    "vit_msn": _hf("ViTMSNModel", _VISION, _image),
    "yolos": _hf("YolosForObjectDetection", _VISION, _image, image_size=[40, 40], num_detection_tokens=6),
    "vitdet": _hf(
        "VitDetModel", _VISION, _image, mlp_ratio=2, pretrain_image_size=40, window_size=3,
        window_block_indices=[0, 2], use_relative_position_embeddings=True
    ),
    "sam_vision": _hf(
        "SamVisionModel", _VISION, _image, output_channels=12, mlp_dim=INNER, window_size=3,
        global_attn_indexes=[1, 3], num_pos_feats=16
    ),
    "chinese_clip_vision": _hf("ChineseCLIPVisionModel", _VISION, _image),
    "blip_vision": _hf("BlipVisionModel", _VISION, _image),
    "owlvit_vision": _hf("OwlViTVisionModel", _VISION, _image),
    "idefics2_vision": _hf("models.idefics2.modeling_idefics2:Idefics2VisionTransformer", _VISION, _image),
    "videomae": _hf(
        "VideoMAEForVideoClassification", _VISION, _floats("pixel_values", 4, 3, 24, 24), image_size=24,
        num_frames=4, tubelet_size=2
    ),
    "timesformer": _hf(
        "TimesformerModel", _VISION, _floats("pixel_values", 3, 3, 24, 24), image_size=24, num_frames=3
    ),
    "vivit": _hf(
        "VivitModel", _VISION, _floats("pixel_values", 4, 3, 24, 24), image_size=24, num_frames=4,
        tubelet_size=[2, 8, 8]
    ),
    "vjepa2_encoder": _hf(
        "VJEPA2Model", _VISION, _floats("pixel_values_videos", 4, 3, 24, 24), part="encoder", crop_size=24,
        frames_per_clip=4, mlp_ratio=2, pred_hidden_size=12, pred_num_attention_heads=2,
        pred_num_hidden_layers=1
    ),
    # images, several resolutions
    "swin": _hf(
        "SwinForImageClassification", {"num_labels": CLASSES}, _image, image_size=40, patch_size=2,
        embed_dim=16, depths=[2, 2, 2], num_heads=[2, 4, 8], window_size=5, mlp_ratio=2.0
    ),
    "swinv2": _hf(
        "Swinv2Model", {}, _image, image_size=40, patch_size=2, embed_dim=16, depths=[2, 2, 2],
        num_heads=[2, 4, 8], window_size=5, mlp_ratio=2.0
    ),
    "donut_swin": _hf(
        "DonutSwinModel", {}, _image, image_size=40, patch_size=2, embed_dim=16, depths=[2, 4],
        num_heads=[2, 4], window_size=5, mlp_ratio=2.0
    ),
    "segformer": _hf(
        "SegformerForImageClassification", {"num_labels": CLASSES}, lambda: _image(64), num_encoder_blocks=3,
        depths=[2, 2, 2], sr_ratios=[4, 2, 1], hidden_sizes=[16, 24, 32], patch_sizes=[7, 3, 3],
        strides=[4, 2, 2], num_attention_heads=[1, 2, 4], mlp_ratios=[2, 2, 2]
    ),
    "pvt": _hf(
        "PvtForImageClassification", {"num_labels": CLASSES}, lambda: _image(64), image_size=64,
        depths=[2, 2, 2, 2], sequence_reduction_ratios=[4, 2, 1, 1], hidden_sizes=[16, 24, 32, 40],
        num_attention_heads=[1, 2, 4, 5], mlp_ratios=[2, 2, 2, 2]
    ),
    "cvt": _hf(
        "CvtForImageClassification", {"num_labels": CLASSES}, lambda: _image(64), embed_dim=[16, 24, 32],
        num_heads=[1, 2, 4], depth=[2, 2, 4], mlp_ratio=[2.0, 2.0, 2.0]
    ),
    "hiera": _hf(
        "HieraModel", {}, lambda: _image(64), image_size=[64, 64], embed_dim=16, depths=[2, 2, 2],
        num_heads=[1, 2, 4], mlp_ratio=2.0, num_query_pool=2, masked_unit_size=[8, 8],
        masked_unit_attention=[True, True, False]
    ),
    "levit": _hf(
        "LevitForImageClassification", {"num_labels": CLASSES}, lambda: _image(64), image_size=64,
        hidden_sizes=[32, 48, 64], num_attention_heads=[2, 3, 4], depths=[2, 2, 2], key_dim=[8, 8, 8]
    ),
    # series, arrays
    "patchtst": _hf(
        "PatchTSTModel",
        {"d_model": WIDTH, "ffn_dim": INNER, "num_attention_heads": HEADS, "num_hidden_layers": BLOCKS},
        _floats("past_values", 24, 3), num_input_channels=3, context_length=24, patch_length=4, patch_stride=2
    ),
    "patchtst_channel_attention": _hf(
        "PatchTSTForClassification",
        {"d_model": WIDTH, "ffn_dim": INNER, "num_attention_heads": HEADS, "num_hidden_layers": BLOCKS},
        _floats("past_values", 24, 3), num_input_channels=3, context_length=24, patch_length=4,
        patch_stride=2, channel_attention=True, num_targets=CLASSES, use_cls_token=True
    ),
    "time_series_encoder": _hf(
        "TimeSeriesTransformerModel", _SERIES, _floats("inputs_embeds", 24, 6), part="encoder"
    ),
    "informer_full_encoder": _hf(
        "InformerModel", _SERIES, _floats("inputs_embeds", 24, 6), part="encoder", attention_type="full",
        distil=False
    ),
    "perceiver": _hf(
        "PerceiverModel",
        {"num_latents": 6, "d_latents": WIDTH, "d_model": 20, "num_self_attends_per_block": BLOCKS},
        _floats("inputs", TOKENS, 20), num_self_attention_heads=HEADS, num_cross_attention_heads=2
    ),
    # written by hand
    "soft_capped": _torch(partial(_Encoder, core=_soft_capped)),
    "alibi": _torch(partial(_Encoder, core=_alibi, pooled=False)),
    "grouped_query": _torch(partial(_Encoder, kv_heads=2)),
    "parallel_block": _torch(partial(_Encoder, style="parallel")),
    "sandwich_norm": _torch(partial(_Encoder, style="sandwich")),
    "input_injection": _torch(_InputInjection),
    "exp_and_sum": _torch(partial(_Encoder, style="post", core=_exp_and_sum)),
    "first_block_bias": _torch(_FirstBlockBias),
    "cosine_attention": _torch(partial(_Encoder, core=_cosine)),
    "talking_heads": _torch(partial(_Encoder, core=_talking_heads)),
    "alternating_windows": _torch(_AlternatingWindows),
    "scaled_by_depth": _torch(_ScaledByDepth),
    "register_tokens": _torch(_RegisterTokens),
    "mixture_of_experts": _torch(_MixtureOfExperts),
    "channels_first": _torch(_ChannelsFirst, _floats("signal", 3, 11)),
    "conv_front_end": _torch(_ConvFrontEnd, _floats("spectrogram", 1, 12, 40)),
    "dual_tower": _torch(_DualTower, _two_texts),
}

# One token count only: most in their forward, funnel and canine once exported; mra takes multiples of 32.
FIXED_LENGTH = frozenset({
    "whisper_encoder", "ast", "funnel", "canine", "mra", "nystromformer_landmarks", "siglip2_vision"
})

NOT_CAPTURED: dict[str, tuple[Factory, str]] = {
    "longformer": (
        _hf("LongformerModel", _TEXT, _text, attention_window=[4] * BLOCKS),
        "GuardOnDataDependentSymNode: Could not guard on data-dependent expression 4*u1 < 12",
    ),
    "led_encoder": (
        _hf(
            "LEDModel", _ENCODER, _text, part="encoder", attention_window=[4] * BLOCKS,
            max_encoder_position_embeddings=64, max_decoder_position_embeddings=64
        ),
        "GuardOnDataDependentSymNode: Could not guard on data-dependent expression 4*u1 < 12",
    ),
    "privacy_filter": (
        _hf(
            "OpenAIPrivacyFilterModel", _GROUPED, _text, num_local_experts=3, num_experts_per_tok=2,
            sliding_window=4, eos_token_id=2
        ),
        "GuardOnDataDependentSymNode: Could not guard on data-dependent expression Eq(u0, 0)",
    ),
    "vilt": (
        _hf("ViltModel", {**_TEXT, **_VISION}, _image_and_text),
        "GuardOnDataDependentSymNode: Could not guard on data-dependent expression u0 > 1",
    ),
    "switch_encoder": (
        _hf(
            "SwitchTransformersEncoderModel", _T5, _text, num_experts=3, num_sparse_encoder_layers=2,
            num_decoder_layers=1
        ),
        "RuntimeError: _apply(): Couldn't swap Linear.weight",
    ),
    "nystromformer_landmarks": (
        _hf(
            "NystromformerModel", _TEXT, lambda: {"input_ids": _ids()}, num_landmarks=3,
            segment_means_seq_len=9, conv_kernel_size=5
        ),
        "RuntimeError: The size of tensor a (3) must match the size of tensor b (9)",
    ),
    "autoformer_encoder": (
        _hf("AutoformerModel", _SERIES, _floats("inputs_embeds", 24, 6), part="encoder"),
        "RuntimeError: shape '[s59, 4, s29, s29]' is invalid for input of size 32*s29*s59",
    ),
    "informer_encoder": (
        _hf("InformerModel", _SERIES, _floats("inputs_embeds", 24, 6), part="encoder"),
        "ValueError: Attention mask should be of size (s59, 1, 12, 12), but is torch.Size([s59, 1, 24, 24])",
    ),
    "siglip2_vision": (
        _hf("Siglip2VisionModel", _VISION, _ragged_images, num_patches=16),
        "AssertionError: Guard failed: spatial_shapes.size()[0] == 2",
    ),
    "pixtral_vision": (
        _hf("PixtralVisionModel", _VISION, _image),
        "AssertionError: Guard failed: pixel_values.size()[0] == 2",
    ),
}

REFUSED: dict[str, Factory] = {
    "mlp": _torch(_MLP, _floats("x", WIDTH)),
    "mamba": _hf(
        "MambaModel",
        {"vocab_size": VOCAB, "hidden_size": WIDTH, "num_hidden_layers": BLOCKS, "state_size": 6},
        lambda: {"input_ids": _ids()}, use_cache=False
    ),
    "data_dependent_loop": _torch(_DataDependentLoop),
    "one_block": _torch(_OneBlock),
    "non_tensor_output": _torch(_NonTensorOutput),
    "states_out": _torch(_StatesOut),
}
