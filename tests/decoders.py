"""Tiny decoders and encoder-decoders with random weights, one factory each: `NAME() -> (module, example_inputs)`.

As `architectures`, of causal models: batch 2, width 32, 4 heads of 8, 4 blocks, feed-forward 64, vocabulary 99;
9 tokens, windows of 4. Encoder-decoders read 11 tokens with 3 encoder blocks. Nothing is cached, and all give
logits only.

`REQUIRED` and `OTHERS` capture, and have the stacks that `STACKS` tells. `NOT_CAPTURED` only runs eagerly; its
reason is how the refusal begins. `REFUSED` captures too, but cannot run token by token.
"""

# mypy: disable-error-code="no-any-return"
from __future__ import annotations

import importlib
import math
import warnings
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import shared
import torch
from architectures import BATCH, BLOCKS, HEADS, INNER, TOKENS, VOCAB, WIDTH, Factory, Inputs, _build
from torch import Tensor, nn
from torch.nn import functional as F

import offramp

SOURCES, ENCODER_BLOCKS, WINDOW, SIZE, PLACES = 11, 3, 4, WIDTH // HEADS, 64


# Inputs


def _ids(tokens: int = TOKENS) -> Tensor:
    return torch.randint(5, VOCAB, (BATCH, tokens))


def _text() -> Inputs:
    return {"input_ids": _ids()}


def _left_padded() -> Inputs:
    """The first two tokens of row 1 are padding, by their id alone."""
    ids = _ids()
    ids[1, :2] = 1
    return {"input_ids": ids}


def _masked() -> Inputs:
    return {"input_ids": _ids(), "attention_mask": torch.ones(BATCH, TOKENS, dtype=torch.int64)}


def _pair() -> Inputs:
    return {"input_ids": _ids(SOURCES), "decoder_input_ids": _ids()}


def _padded_pair() -> Inputs:
    """The last three source tokens of row 1 are padding."""
    mask = torch.ones(BATCH, SOURCES, dtype=torch.int64)
    mask[1, -3:] = 0
    return {"input_ids": _ids(SOURCES), "attention_mask": mask, "decoder_input_ids": _ids()}


def _beside(name: str, *shape: int) -> Callable[[], Inputs]:
    """An encoder's input of floats, and the decoder's ids."""
    return lambda: {name: torch.randn(BATCH, *shape), "decoder_input_ids": _ids()}


_TOKEN_AXES: dict[str, int | None] = {"pixel_values": None}  # of inputs where it is not 1; None: one length only
FIXED_LENGTH = {"whisper": ("input_features",)}


def resized(name: str, inputs: Inputs, batch: int = 3, longer: bool = True) -> Inputs:
    """Inputs of another batch size and, where the model takes it, of more tokens, by repetition."""
    sized = {}
    for key, value in inputs.items():
        value = value.index_select(0, torch.arange(batch) % value.shape[0])
        axis = None if key in FIXED_LENGTH.get(name, ()) else _TOKEN_AXES.get(key, 1)
        if longer and axis is not None:
            count = value.shape[axis] + max(2, value.shape[axis] // 5)
            value = value.index_select(axis, torch.arange(count) % value.shape[axis])
        sized[key] = value
    return sized


# Classes of transformers


class _Logits(nn.Module):
    """An encoder-decoder that returns its logits only."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        pixel_values: Tensor | None = None,
        input_features: Tensor | None = None,
        input_values: Tensor | None = None,
        decoder_input_ids: Tensor | None = None,
    ) -> Tensor:
        given = {name: value for name, value in locals().items() if isinstance(value, Tensor)}
        return self.model(**given, use_cache=False, return_dict=True).logits


_COMMON = {"vocab_size": VOCAB, "pad_token_id": 1, "bos_token_id": 0, "eos_token_id": 2, "use_cache": False}
_TEXT = {
    **_COMMON,
    "hidden_size": WIDTH,
    "num_hidden_layers": BLOCKS,
    "num_attention_heads": HEADS,
    "intermediate_size": INNER,
    "max_position_embeddings": PLACES,
}
_GROUPED = {**_TEXT, "num_key_value_heads": 2, "head_dim": SIZE}
_GPT = {**_COMMON, "n_embd": WIDTH, "n_layer": BLOCKS, "n_head": HEADS, "n_positions": PLACES, "n_inner": INNER}
_T5 = {
    **_COMMON,
    "d_model": WIDTH,
    "d_kv": SIZE,
    "d_ff": INNER,
    "num_layers": ENCODER_BLOCKS,
    "num_decoder_layers": BLOCKS,
    "num_heads": HEADS,
    "relative_attention_num_buckets": 8,
    "relative_attention_max_distance": 16,
    "decoder_start_token_id": 0,
}
_BART = {
    **_COMMON,
    "d_model": WIDTH,
    "encoder_layers": ENCODER_BLOCKS,
    "encoder_attention_heads": HEADS,
    "encoder_ffn_dim": INNER,
    "decoder_layers": BLOCKS,
    "decoder_attention_heads": HEADS,
    "decoder_ffn_dim": INNER,
    "max_position_embeddings": PLACES,
    "decoder_start_token_id": 0,
}
_VISION = {
    "hidden_size": WIDTH,
    "num_hidden_layers": ENCODER_BLOCKS,
    "num_attention_heads": HEADS,
    "intermediate_size": INNER,
    "image_size": 40,
    "patch_size": 8,
}


def _hf(model: str, sizes: dict[str, Any], inputs: Callable[[], Inputs] = _text, /, **options: Any) -> Factory:
    """A factory of a transformers class; `options` join the configuration's `sizes`."""

    def make() -> nn.Module:
        found = getattr(importlib.import_module("transformers"), model)
        built: nn.Module = found(found.config_class(**{**sizes, **options}))
        return _Logits(built) if "decoder_input_ids" in inputs() else built

    return partial(_build, make, inputs)


def _image_to_text(decoder: str, sizes: dict[str, Any], /, **options: Any) -> Factory:
    """A vision encoder, and a decoder of another model that attends to it."""

    def make() -> nn.Module:
        library = importlib.import_module("transformers")
        reader = getattr(library, decoder)(is_decoder=True, add_cross_attention=True, **{**sizes, **options})
        config = library.VisionEncoderDecoderConfig.from_encoder_decoder_configs(library.ViTConfig(**_VISION), reader)
        return _Logits(library.VisionEncoderDecoderModel(config))

    return partial(_build, make, _beside("pixel_values", 3, 40, 40))


# Written by hand

Core = Callable[[Tensor, Tensor, Tensor], Tensor]  # q, k, v [B, H, T, D] -> [B, H, T, D]


def _flagged(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v, is_causal=True)


def _open(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v)


def _scores(q: Tensor, k: Tensor) -> Tensor:
    return q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1])


def _past(scores: Tensor) -> Tensor:
    """Whether a query may see a key, [T, T]."""
    positions = torch.arange(scores.shape[-1])
    return positions[:, None] >= positions[None, :]


def _filled(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    scores = _scores(q, k)
    hidden = torch.triu(torch.full(scores.shape[-2:], float("-inf")), diagonal=1)
    return (scores + hidden).softmax(dim=-1) @ v


def _einsum(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    scores = torch.einsum("bhqd,bhkd->bhqk", q * q.shape[-1] ** -0.5, k)
    weights = torch.where(_past(scores), scores, torch.finfo(scores.dtype).min).softmax(dim=-1)
    return torch.einsum("bhqk,bhkd->bhqd", weights, v)


def _soft_capped(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    scores = 3.0 * torch.tanh(_scores(q, k) / 3.0)
    return scores.masked_fill(~_past(scores), -1e9).softmax(dim=-1) @ v


def _alibi(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    positions = torch.arange(q.shape[2])
    slopes = 2.0 ** -torch.arange(1, q.shape[1] + 1)
    scores = _scores(q, k) + slopes[:, None, None] * (positions[None, :] - positions[:, None])
    return scores.masked_fill(~_past(scores), -1e9).softmax(dim=-1) @ v


def _windowed(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    positions = torch.arange(q.shape[2])
    distance = positions[:, None] - positions[None, :]
    return F.scaled_dot_product_attention(q, k, v, attn_mask=(distance >= 0) & (distance < WINDOW))


class _Triangle(nn.Module):
    """The triangle is a buffer of the longest text's size."""

    triangle: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("triangle", torch.tril(torch.ones(PLACES, PLACES)).view(1, 1, PLACES, PLACES))

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        scores, tokens = _scores(q, k), q.shape[2]
        return scores.masked_fill(self.triangle[:, :, :tokens, :tokens] == 0, float("-inf")).softmax(dim=-1) @ v


class _Attention(nn.Module):
    def __init__(self, core: Core) -> None:
        super().__init__()
        self.core = core
        self.q, self.k, self.v, self.out = (nn.Linear(WIDTH, WIDTH) for _ in range(4))

    def forward(self, x: Tensor, memory: Tensor) -> Tensor:
        q, k, v = (f(y).unflatten(-1, (HEADS, SIZE)).transpose(1, 2) for f, y in self._reads(x, memory))
        return self.out(self.core(q, k, v).transpose(1, 2).flatten(2))

    def _reads(self, x: Tensor, memory: Tensor) -> list[tuple[nn.Module, Tensor]]:
        return [(self.q, x), (self.k, memory), (self.v, memory)]


class _Block(nn.Module):
    def __init__(self, core: Core = _flagged) -> None:
        super().__init__()
        self.attention = _Attention(core)
        self.mlp: nn.Module = nn.Sequential(nn.Linear(WIDTH, INNER), nn.GELU(), nn.Linear(INNER, WIDTH))
        self.norms = nn.ModuleList(nn.LayerNorm(WIDTH) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        y = self.norms[0](x)
        x = x + self.attention(y, y)
        return x + self.mlp(self.norms[1](x))


class _Embedding(nn.Module):
    """Token plus learned position."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens, self.positions = nn.Embedding(VOCAB, WIDTH), nn.Embedding(PLACES, WIDTH)

    def forward(self, ids: Tensor) -> Tensor:
        return self.tokens(ids) + self.positions(self.places(ids))

    def places(self, ids: Tensor) -> Tensor:
        return torch.arange(ids.shape[1])


class _Counted(_Embedding):
    """Positions count the ids that are not padding, and padding stays at 0."""

    def places(self, ids: Tensor) -> Tensor:
        real = (ids != 1).int()
        return (real.cumsum(dim=1) * real).long()


class _Sinusoidal(nn.Module):
    """Token plus sines and cosines of the position, counted from 2."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens = nn.Embedding(VOCAB, WIDTH)

    def forward(self, ids: Tensor) -> Tensor:
        positions = torch.arange(2, ids.shape[1] + 2)
        rates = torch.exp(torch.arange(0, WIDTH, 2) * (-math.log(1e4) / WIDTH))
        angles = positions[:, None] * rates
        return self.tokens(ids) * math.sqrt(WIDTH) + torch.cat([angles.sin(), angles.cos()], dim=-1)


class _Decoder(nn.Module):
    """Embedding, blocks, final norm, and a head over the vocabulary."""

    def __init__(
        self, block: Callable[[], nn.Module] = _Block, embedding: Callable[[], nn.Module] = _Embedding
    ) -> None:
        super().__init__()
        self.embedding, self.blocks = embedding(), nn.ModuleList(block() for _ in range(BLOCKS))
        self.norm, self.head = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, VOCAB, bias=False)

    def run(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return x

    def forward(self, input_ids: Tensor) -> Tensor:
        return self.head(self.norm(self.run(self.embedding(input_ids))))


class _AlternatingWindows(_Decoder):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(_Block(core) for core in (_flagged, _windowed) * (BLOCKS // 2))


class _LoopedBlock(_Decoder):
    """One block, used four times."""

    def run(self, x: Tensor) -> Tensor:
        for _ in range(BLOCKS):
            x = self.blocks[0](x)
        return x


class _BiasedBlock(_Block):
    """Takes a mask."""

    def forward(self, x: Tensor, bias: Tensor) -> Tensor:  # type: ignore[override]
        self.attention.core = partial(F.scaled_dot_product_attention, attn_mask=bias)
        x = super().forward(x)
        self.attention.core = _open
        return x


class _RelativeBuckets(_Decoder):
    """All blocks share one bias by bucket of the distance, exact to 4 and then by powers of two."""

    def __init__(self) -> None:
        super().__init__(_BiasedBlock)
        self.table = nn.Embedding(8, HEADS)

    def run(self, x: Tensor) -> Tensor:
        positions = torch.arange(x.shape[1])
        distance = (positions[:, None] - positions[None, :]).clamp(min=0)
        far = 4 + (distance.clamp(min=4).float() / 4).log2().floor().long()
        buckets = torch.where(distance < 4, distance, far).clamp(max=7)
        bias = self.table(buckets).permute(2, 0, 1)[None]
        bias = bias.masked_fill(positions[:, None] < positions[None, :], float("-inf"))
        for block in self.blocks:
            x = block(x, bias)
        return x


class _Experts(nn.Module):
    """Three experts run on every token; the two best are weighed by softmax, the other by zero."""

    def __init__(self) -> None:
        super().__init__()
        self.router = nn.Linear(WIDTH, 3)
        self.experts = nn.ModuleList(
            nn.Sequential(nn.Linear(WIDTH, INNER), nn.ReLU(), nn.Linear(INNER, WIDTH)) for _ in range(3)
        )

    def forward(self, x: Tensor) -> Tensor:
        best, chosen = self.router(x).topk(2, dim=-1)
        weights = torch.zeros_like(x[..., :3]).scatter(-1, chosen, best.softmax(dim=-1))
        return (torch.stack([expert(x) for expert in self.experts], dim=-1) * weights.unsqueeze(-2)).sum(dim=-1)


class _MixtureOfExperts(_Decoder):
    def __init__(self) -> None:
        super().__init__()
        for block in self.blocks:
            block.mlp = _Experts()


class _TimeFirstBlock(nn.Module):
    """[T, B, D] throughout, rows and heads together in attention, norms behind."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.mlp = nn.Sequential(nn.Linear(WIDTH, INNER), nn.ReLU(), nn.Linear(INNER, WIDTH))
        self.norms = nn.ModuleList(nn.LayerNorm(WIDTH) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        tokens, rows, _ = x.shape
        q, k, v = (y.reshape(tokens, rows * HEADS, SIZE).transpose(0, 1) for y in self.qkv(x).chunk(3, dim=-1))
        hidden = torch.triu(torch.full((tokens, tokens), float("-inf")), diagonal=1)
        weights = torch.baddbmm(hidden[None], q * SIZE**-0.5, k.transpose(1, 2)).softmax(dim=-1)
        y = torch.bmm(weights, v).transpose(0, 1).reshape(tokens, rows, WIDTH)
        x = self.norms[0](x + self.out(y))
        return self.norms[1](x + self.mlp(x))


class _TimeFirst(_Decoder):
    def __init__(self) -> None:
        super().__init__(_TimeFirstBlock)

    def run(self, x: Tensor) -> Tensor:
        return super().run(x.transpose(0, 1)).transpose(0, 1)


class _ConvolvedBlock(_Block):
    """A causal depthwise convolution before attention."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv1d(WIDTH, WIDTH, 3, groups=WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x + self.conv(F.pad(x.transpose(1, 2), (2, 0))).transpose(1, 2))


class _ShiftedBlock(_Block):
    """Half of every token's features are the token's before."""

    def forward(self, x: Tensor) -> Tensor:
        before = F.pad(x, (0, 0, 1, 0))[:, :-1]
        return super().forward(torch.cat([before[..., : WIDTH // 2], x[..., WIDTH // 2 :]], dim=-1))


class _CrossBlock(nn.Module):
    """Cross-attention, feed-forward, then self-attention."""

    def __init__(self) -> None:
        super().__init__()
        self.cross, self.attention = _Attention(_open), _Attention(_flagged)
        self.mlp = nn.Sequential(nn.Linear(WIDTH, INNER), nn.GELU(), nn.Linear(INNER, WIDTH))
        self.norms = nn.ModuleList(nn.LayerNorm(WIDTH) for _ in range(3))

    def forward(self, x: Tensor, memory: Tensor) -> Tensor:
        x = x + self.cross(self.norms[0](x), memory)
        x = x + self.mlp(self.norms[1](x))
        y = self.norms[2](x)
        return x + self.attention(y, y)


class _CrossFirst(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.encoder, self.decoder = _Decoder(partial(_Block, _open)), _Decoder(_CrossBlock)
        self.encoder.blocks = self.encoder.blocks[:ENCODER_BLOCKS]
        self.encoder.head = nn.Linear(WIDTH, WIDTH)

    def forward(self, input_ids: Tensor, decoder_input_ids: Tensor) -> Tensor:
        memory, x = self.encoder(input_ids), self.decoder.embedding(decoder_input_ids)
        for block in self.decoder.blocks:
            x = block(x, memory)
        return self.decoder.head(self.decoder.norm(x))


class _Transformer(nn.Module):
    """torch.nn.Transformer between embeddings and a head."""

    def __init__(self, **options: Any) -> None:
        super().__init__()
        self.embedding, self.head = _Embedding(), nn.Linear(WIDTH, VOCAB)
        with warnings.catch_warnings():  # of what it cannot speed up
            warnings.simplefilter("ignore", UserWarning)
            self.transformer = nn.Transformer(WIDTH, HEADS, ENCODER_BLOCKS, BLOCKS, INNER, **options)
        self.batch_first = self.transformer.batch_first

    def forward(self, src: Tensor, tgt: Tensor) -> Tensor:
        mask = nn.Transformer.generate_square_subsequent_mask(tgt.shape[1])
        x, y = self.embedding(src), self.embedding(tgt)
        if self.batch_first:
            return self.head(self.transformer(x, y, tgt_mask=mask))
        return self.head(self.transformer(x.transpose(0, 1), y.transpose(0, 1), tgt_mask=mask).transpose(0, 1))


def _source_and_target() -> Inputs:
    return {"src": _ids(SOURCES), "tgt": _ids()}


def _by_hand(make: Callable[[], nn.Module], inputs: Callable[[], Inputs] = _text) -> Factory:
    return partial(_build, make, inputs)


def _causal(core: Core) -> Factory:
    return _by_hand(partial(_Decoder, partial(_Block, core)))


# fmt: off
REQUIRED: dict[str, Factory] = {
    "gpt2": _hf("GPT2LMHeadModel", _GPT),
    "llama": _hf("LlamaForCausalLM", _GROUPED),
    "qwen2": _hf("Qwen2ForCausalLM", _GROUPED),
    "mistral": _hf("MistralForCausalLM", _GROUPED, sliding_window=WINDOW),
    "t5": _hf("T5ForConditionalGeneration", _T5, _pair),
    "t5_gated": _hf(
        "T5ForConditionalGeneration", _T5, _pair, feed_forward_proj="gated-gelu", tie_word_embeddings=False
    ),
    "bart": _hf("BartForConditionalGeneration", _BART, _pair),
    "whisper": _hf(
        "WhisperForConditionalGeneration", _BART, _beside("input_features", 12, 30), num_mel_bins=12,
        max_source_positions=15, max_target_positions=PLACES
    ),
    "vit_gpt2": _image_to_text("GPT2Config", _GPT),
    "torch_transformer": _by_hand(partial(_Transformer, batch_first=True), _source_and_target),
    "triangle": _by_hand(partial(_Decoder, lambda: _Block(_Triangle()))),
    "causal_flag": _causal(_flagged),
}

OTHERS: dict[str, Factory] = {
    # other attention, other inputs
    "gpt2_eager": _hf("GPT2LMHeadModel", _GPT, attn_implementation="eager"),
    "llama_eager": _hf("LlamaForCausalLM", _GROUPED, attn_implementation="eager"),
    "bart_eager": _hf("BartForConditionalGeneration", _BART, _pair, attn_implementation="eager"),
    "t5_eager": _hf("T5ForConditionalGeneration", _T5, _pair, attn_implementation="eager"),
    "gpt2_masked": _hf("GPT2LMHeadModel", _GPT, _masked),
    "llama_masked": _hf("LlamaForCausalLM", _GROUPED, _masked),
    "opt_masked": _hf("OPTForCausalLM", _TEXT, _masked, ffn_dim=INNER, word_embed_proj_dim=WIDTH),
    "t5_masked": _hf("T5ForConditionalGeneration", _T5, _padded_pair),
    "bart_masked": _hf("BartForConditionalGeneration", _BART, _padded_pair),
    # decoders
    "opt": _hf("OPTForCausalLM", _TEXT, ffn_dim=INNER, word_embed_proj_dim=WIDTH),
    "bloom": _hf("BloomForCausalLM", _COMMON, hidden_size=WIDTH, n_layer=BLOCKS, n_head=HEADS),
    "mpt": _hf(
        "MptForCausalLM", _COMMON, d_model=WIDTH, n_heads=HEADS, n_layers=BLOCKS, max_seq_len=PLACES,
        expansion_ratio=2
    ),
    "falcon": _hf("FalconForCausalLM", _TEXT, ffn_hidden_size=INNER),
    "falcon_alibi": _hf("FalconForCausalLM", _TEXT, alibi=True, multi_query=False, parallel_attn=False),
    "falcon_grouped": _hf("FalconForCausalLM", _TEXT, new_decoder_architecture=True, num_kv_heads=2),
    "gptj": _hf("GPTJForCausalLM", _GPT, rotary_dim=4),
    "gpt_neox": _hf("GPTNeoXForCausalLM", _TEXT, rotary_pct=0.5),
    "gpt_neo": _hf(
        "GPTNeoForCausalLM", _TEXT, num_layers=BLOCKS, num_heads=HEADS, window_size=WINDOW,
        attention_types=[[["global", "local"], BLOCKS // 2]]
    ),
    "gpt_bigcode": _hf("GPTBigCodeForCausalLM", _GPT),
    "codegen": _hf("CodeGenForCausalLM", _GPT, n_ctx=PLACES, rotary_dim=4),
    "phi": _hf("PhiForCausalLM", _TEXT, partial_rotary_factor=0.5),
    "phi3": _hf("Phi3ForCausalLM", _GROUPED, sliding_window=WINDOW),
    "phi3_longrope": _hf(
        "Phi3ForCausalLM", _GROUPED, max_position_embeddings=2 * PLACES, original_max_position_embeddings=PLACES,
        rope_parameters={
            "rope_type": "longrope", "rope_theta": 1e4, "short_factor": [1.0] * (SIZE // 2),
            "long_factor": [2.0] * (SIZE // 2),
        }
    ),
    "gemma": _hf("GemmaForCausalLM", _GROUPED),
    "gemma2": _hf(
        "Gemma2ForCausalLM", _GROUPED, sliding_window=WINDOW, query_pre_attn_scalar=SIZE,
        attn_logit_softcapping=3.0, final_logit_softcapping=5.0
    ),
    "gemma3_text": _hf(
        "Gemma3ForCausalLM", _GROUPED, sliding_window=WINDOW, query_pre_attn_scalar=SIZE,
        layer_types=["sliding_attention", "full_attention"] * 2
    ),
    "qwen2_windows": _hf(
        "Qwen2ForCausalLM", _GROUPED, use_sliding_window=True, sliding_window=WINDOW, max_window_layers=2
    ),
    "qwen3": _hf("Qwen3ForCausalLM", _GROUPED),
    "qwen2_moe": _hf(
        "Qwen2MoeForCausalLM", _GROUPED, num_experts=3, num_experts_per_tok=2, moe_intermediate_size=24,
        shared_expert_intermediate_size=40
    ),
    "mixtral": _hf("MixtralForCausalLM", _GROUPED, num_local_experts=3, num_experts_per_tok=2),
    "olmo": _hf("OlmoForCausalLM", _GROUPED),
    "olmo2": _hf("Olmo2ForCausalLM", _GROUPED),
    "cohere": _hf("CohereForCausalLM", _GROUPED, logit_scale=0.5),
    "stablelm": _hf("StableLmForCausalLM", _GROUPED, partial_rotary_factor=0.5),
    "starcoder2": _hf("Starcoder2ForCausalLM", _GROUPED, sliding_window=WINDOW),
    "granite": _hf(
        "GraniteForCausalLM", _GROUPED, embedding_multiplier=2.0, residual_multiplier=0.7,
        attention_multiplier=0.3, logits_scaling=2.0
    ),
    "xglm": _hf(
        "XGLMForCausalLM", _TEXT, d_model=WIDTH, ffn_dim=INNER, num_layers=BLOCKS, attention_heads=HEADS
    ),
    "biogpt": _hf("BioGptForCausalLM", _TEXT),
    "ctrl": _hf("CTRLLMHeadModel", _GPT, dff=INNER),
    "openai_gpt": _hf("OpenAIGPTLMHeadModel", _GPT),
    "smollm3": _hf("SmolLM3ForCausalLM", _GROUPED, no_rope_layers=[1, 1, 1, 0]),
    "gpt_oss": _hf(
        "GptOssForCausalLM", _GROUPED, num_local_experts=3, num_experts_per_tok=2, sliding_window=WINDOW,
        rope_parameters={"rope_type": "default", "rope_theta": 1e4}
    ),
    "deepseek_v3": _hf(
        "DeepseekV3ForCausalLM", _TEXT, num_key_value_heads=HEADS, q_lora_rank=12, kv_lora_rank=16,
        qk_nope_head_dim=8, qk_rope_head_dim=4, v_head_dim=6, n_routed_experts=4, n_group=2, topk_group=1,
        num_experts_per_tok=2, first_k_dense_replace=0, moe_intermediate_size=24
    ),
    "glm4": _hf("Glm4ForCausalLM", _GROUPED, partial_rotary_factor=0.5),
    "nemotron": _hf("NemotronForCausalLM", _GROUPED, partial_rotary_factor=0.5),
    "persimmon": _hf("PersimmonForCausalLM", _TEXT, partial_rotary_factor=0.5),
    # encoder-decoders
    "mt5": _hf("MT5ForConditionalGeneration", _T5, _pair),
    "umt5": _hf("UMT5ForConditionalGeneration", _T5, _pair),
    "longt5": _hf("LongT5ForConditionalGeneration", _T5, _padded_pair, local_radius=3),
    "pegasus": _hf("PegasusForConditionalGeneration", _BART, _pair),
    "marian": _hf("MarianMTModel", _BART, _pair),
    "mbart": _hf("MBartForConditionalGeneration", _BART, _pair),
    "m2m_100": _hf("M2M100ForConditionalGeneration", _BART, _pair),
    "blenderbot": _hf("BlenderbotForConditionalGeneration", _BART, _pair),
    "trocr": _image_to_text(
        "TrOCRConfig", _COMMON, d_model=WIDTH, decoder_layers=BLOCKS, decoder_attention_heads=HEADS,
        decoder_ffn_dim=INNER, max_position_embeddings=PLACES, cross_attention_hidden_size=WIDTH
    ),
    "speech_to_text": _hf(
        "Speech2TextForConditionalGeneration", _BART, _beside("input_features", 40, 12),
        input_feat_per_channel=12, conv_channels=10, max_source_positions=PLACES, max_target_positions=PLACES
    ),
    "moonshine": _hf(
        "MoonshineForConditionalGeneration", _COMMON, _beside("input_values", 2400), hidden_size=WIDTH,
        intermediate_size=INNER, encoder_num_hidden_layers=ENCODER_BLOCKS, encoder_num_attention_heads=HEADS,
        decoder_num_hidden_layers=BLOCKS, decoder_num_attention_heads=HEADS
    ),
    # written by hand
    "triangle_added": _causal(_filled),
    "einsum_decoder": _causal(_einsum),
    "alibi_decoder": _causal(_alibi),
    "soft_capped_decoder": _causal(_soft_capped),
    "window_decoder": _causal(_windowed),
    "alternating_windows": _by_hand(_AlternatingWindows),
    "relative_buckets": _by_hand(_RelativeBuckets),
    "looped_decoder": _by_hand(_LoopedBlock),
    "mixture_of_experts": _by_hand(_MixtureOfExperts),
    "sinusoidal": _by_hand(partial(_Decoder, embedding=_Sinusoidal)),
    "counted_positions": _by_hand(partial(_Decoder, embedding=_Counted), _left_padded),
    "time_first": _by_hand(_TimeFirst),
    "torch_transformer_time_first": _by_hand(partial(_Transformer, norm_first=True), _source_and_target),
    "cross_first": _by_hand(_CrossFirst, _pair),
}

NOT_CAPTURED: dict[str, tuple[Factory, str]] = {
    "led": (
        _hf(
            "LEDForConditionalGeneration", _BART, _pair, attention_window=[4] * ENCODER_BLOCKS,
            max_encoder_position_embeddings=PLACES, max_decoder_position_embeddings=PLACES
        ),
        "Could not guard on data-dependent expression 4*u1 < 12",
    ),
    # their routers convert a weight's type in the forward, then loop over the experts that some token chose
    "switch_transformers": (
        _hf(
            "SwitchTransformersForConditionalGeneration", _T5, _padded_pair, num_experts=3, num_sparse_encoder_layers=1,
            num_sparse_decoder_layers=2
        ),
        "_apply(): Couldn't swap Linear.weight",
    ),
    "nllb_moe": (
        _hf("NllbMoeForConditionalGeneration", _BART, _pair, num_experts=3, expert_capacity=8),
        "_apply(): Couldn't swap Linear.weight",
    ),
}

REFUSED: dict[str, Factory] = {
    "causal_convolution": _by_hand(partial(_Decoder, _ConvolvedBlock)),
    "token_shift": _by_hand(partial(_Decoder, _ShiftedBlock)),
    # a hybrid: a short convolution, then attention
    "lfm2": _hf(
        "Lfm2ForCausalLM", _GROUPED, num_hidden_layers=2 * BLOCKS, layer_types=["conv", "full_attention"] * BLOCKS,
        block_auto_adjust_ff_dim=False
    ),
}

# Name, role and number of blocks of every stack.
_DECODER = {"decoder": ("decoder", BLOCKS)}
_ENCODER_DECODER = {"encoder": ("encoder", ENCODER_BLOCKS), **_DECODER}
_TWO_INPUTS = {
    "t5", "t5_gated", "bart", "whisper", "vit_gpt2", "torch_transformer", "bart_eager", "t5_eager", "t5_masked",
    "bart_masked", "mt5", "umt5", "longt5", "pegasus", "marian", "mbart", "m2m_100", "blenderbot", "trocr",
    "speech_to_text", "moonshine", "torch_transformer_time_first", "cross_first",
}
STACKS: dict[str, dict[str, tuple[str, int]]] = {
    name: _ENCODER_DECODER if name in _TWO_INPUTS else _DECODER for name in (*REQUIRED, *OTHERS, *REFUSED)
}
# fmt: on


def with_caches(factories: Mapping[str, Factory]) -> Callable[[str], offramp.Program]:
    """Programs with caches by name, each captured once."""
    return lambda name: shared.cached(factories[name])
