"""RXNMapper's ALBERT, a masked language model of chemical reactions (weights MIT).

12 layers that share one set of weights, d=256, 591 tokens: the atoms and bonds of SMILES.
"""

from __future__ import annotations

import re

import torch
from torch import Tensor, nn
from transformers import AlbertConfig, AlbertForMaskedLM

from offramp.zoo._package import Package
from offramp.zoo._rebuild import rebuild

_FOLDER = "models/transformers/albert_heads_8_uspto_all_1310k"
LICENCE = "MIT"
WEIGHTS = Package(
    requirement="rxnmapper==0.4.3",
    module="rxnmapper",
    sha256={
        f"{_FOLDER}/config.json": "ea0f3144af1d13a5d5928cff01abd8e7c14ab831ff7b6d73a14d4162864a876f",
        f"{_FOLDER}/pytorch_model.bin": "8541f3f500dae71abe678d546bd035ca946e2d1c819f6b2cf41a97faedd7e6a2",
        f"{_FOLDER}/vocab.txt": "399868a653e85549ce150af4a1f6cd2776240c6a3d951ced2120565f00f027fd",
    },
)
EXAMPLES = ("CCBr.CN>>CC[MASK]C", "CI.CO>>C[MASK]C")  # nitrogen and oxygen replace a halogen
_TOKEN = re.compile(r"\[[^\]]+\]|Br|Cl|>>|%\d\d|.")


def build() -> tuple[nn.Module, dict[str, Tensor]]:
    """The model, and two reactions of different length with one masked atom each.

    Takes ``input_ids`` and ``attention_mask``, ``[B, T]`` int64; gives ``logits [B, T, 591]`` float32.
    """
    config = AlbertConfig.from_json_file(WEIGHTS.file(f"{_FOLDER}/config.json"))
    state = torch.load(WEIGHTS.file(f"{_FOLDER}/pytorch_model.bin"), map_location="cpu", weights_only=True)
    kept = {name: tensor for name, tensor in state.items() if not name.startswith("albert.pooler.")}
    return rebuild(AlbertForMaskedLM, config, kept), tokenize(*EXAMPLES)


def vocabulary() -> tuple[str, ...]:
    """All tokens, in the order of their ids."""
    return tuple(WEIGHTS.file(f"{_FOLDER}/vocab.txt").read_text(encoding="utf-8").splitlines())


def tokenize(*reactions: str) -> dict[str, Tensor]:
    """Token ids and mask of reaction SMILES, each ``[len(reactions), T]`` int64, padded on the right."""
    ids = {token: index for index, token in enumerate(vocabulary())}
    rows = [
        [ids.get(token, ids["[UNK]"]) for token in ("[CLS]", *_TOKEN.findall(reaction), "[SEP]")]
        for reaction in reactions
    ]
    width = max(len(row) for row in rows)
    return {
        "input_ids": torch.tensor([row + [ids["[PAD]"]] * (width - len(row)) for row in rows]),
        "attention_mask": torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in rows]),
    }
