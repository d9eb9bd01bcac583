"""ANNalog, which turns a molecule's SMILES into an analogue's: 3 + 3 layers, d=256, 59 tokens (weights MIT).

A transformer in the layout of Vaswani et al. 2017: norm after each part, learned positions, ReLU. Source and target
have the same vocabulary, their embeddings differ.
"""

from __future__ import annotations

import pickle
from pathlib import Path

import torch
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, processors
from torch import Tensor, nn
from torch.nn import functional as F

from offramp.zoo._cache import cached
from offramp.zoo._declare import Generation
from offramp.zoo._package import Package

_WEIGHTS, _VOCABULARY = "ckpt_and_vocab/Lev_extended.pt", "ckpt_and_vocab/stereo_experiment_vocab_ttf.pkl"
LICENCE = "MIT"
WEIGHTS = Package(
    requirement="annalog==1.0.6",
    module="annalog",
    sha256={
        _WEIGHTS: "9e22e755b5d47da3c678bc19073e4f4af12ae061c91a7e5382cea67e30fad97b",
        _VOCABULARY: "4e0330ab3a7e17a99296c69b0cde6132d589ed8d7ce644ea86839705bf00d6ea",
    },
)
UNKNOWN, PAD, START, STOP = range(4)
GENERATION: Generation = {
    "prompt": [START],
    "stop": [STOP],
    "suppress": [UNKNOWN, PAD, START],
    "suppress_first": [STOP],
    "max_length": 102,
}
EXAMPLES = ("CC(=O)Oc1ccccc1C(=O)O", "CN1C=NC2=C1C(=O)N(C)C(=O)N2C")  # aspirin, caffeine
TOKENS = 7  # of the example's targets
LAYERS, WIDTH, INNER, HEADS, WORDS, PLACES = 3, 256, 512, 8, 59, 102
_TOKEN = r"\[[^\]]*\]|%\d\d|Br|Cl|."


class Attention(nn.Module):
    """Scaled dot-product attention of 8 heads."""

    def __init__(self) -> None:
        super().__init__()
        self.fc_q, self.fc_k, self.fc_v, self.fc_o = (nn.Linear(WIDTH, WIDTH) for _ in range(4))

    def forward(self, x: Tensor, memory: Tensor, mask: Tensor | None) -> Tensor:
        """``[B, T, 256]``, ``[B, S, 256]`` and a mask bool (True is seen) of keys; causal without one."""
        q, k, v = (
            linear(y).unflatten(-1, (HEADS, -1)).transpose(1, 2)
            for linear, y in ((self.fc_q, x), (self.fc_k, memory), (self.fc_v, memory))
        )
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None)
        output: Tensor = self.fc_o(y.transpose(1, 2).flatten(2))
        return output


class Block(nn.Module):
    """Self-attention, in the decoder attention to the encoder, and an MLP, a norm behind each."""

    def __init__(self, cross: bool) -> None:
        super().__init__()
        self.self_attention, self.self_attn_layer_norm = Attention(), nn.LayerNorm(WIDTH)
        if cross:
            self.encoder_attention, self.enc_attn_layer_norm = Attention(), nn.LayerNorm(WIDTH)
        mlp = {"fc_1": nn.Linear(WIDTH, INNER), "relu": nn.ReLU(), "fc_2": nn.Linear(INNER, WIDTH)}
        self.positionwise_feedforward = nn.Sequential()
        for name, part in mlp.items():
            self.positionwise_feedforward.add_module(name, part)
        self.ff_layer_norm = nn.LayerNorm(WIDTH)

    def forward(
        self, x: Tensor, mask: Tensor | None, memory: Tensor | None = None, reach: Tensor | None = None
    ) -> Tensor:
        """``[B, T, 256]`` -> the same; ``mask`` as in `Attention`, ``reach`` the one of ``memory``."""
        x = self.self_attn_layer_norm(x + self.self_attention(x, x, mask))
        if memory is not None:
            x = self.enc_attn_layer_norm(x + self.encoder_attention(x, memory, reach))
        output: Tensor = self.ff_layer_norm(x + self.positionwise_feedforward(x))
        return output


class Stack(nn.Module):
    """Embeddings of tokens and places, and the blocks."""

    def __init__(self, cross: bool) -> None:
        super().__init__()
        self.tok_embedding, self.pos_embedding = nn.Embedding(WORDS, WIDTH), nn.Embedding(PLACES, WIDTH)
        self.layers = nn.ModuleList(Block(cross) for _ in range(LAYERS))
        if cross:
            self.fc_out = nn.Linear(WIDTH, WORDS)

    def forward(
        self, ids: Tensor, mask: Tensor | None, memory: Tensor | None = None, reach: Tensor | None = None
    ) -> Tensor:
        """Token ids ``[B, T]`` int64 -> hidden states ``[B, T, 256]``."""
        places = self.pos_embedding(torch.arange(ids.shape[1], device=ids.device))
        x: Tensor = self.tok_embedding(ids) * WIDTH**0.5 + places
        for layer in self.layers:
            x = layer(x, mask, memory, reach)
        return x


class Annalog(nn.Module):
    """The encoder, the decoder, and its head."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder, self.decoder = Stack(cross=False), Stack(cross=True)

    def forward(self, input_ids: Tensor, decoder_input_ids: Tensor) -> dict[str, Tensor]:
        """The molecule ``[B, S]`` and the tokens so far ``[B, T]``, int64 -> ``{"logits": [B, T, 59]}`` float32.

        The molecule is padded on the right with `PAD`; S and T are at most 102.
        """
        reach = (input_ids != PAD)[:, None, None]
        memory = self.encoder(input_ids, reach)
        return {"logits": self.decoder.fc_out(self.decoder(decoder_input_ids, None, memory, reach))}


def build() -> tuple[nn.Module, dict[str, Tensor]]:
    """The model, and two molecules ``[2, S]`` of different length with the beginnings of two others ``[2, 7]``."""
    model = Annalog()
    model.load_state_dict(torch.load(WEIGHTS.file(_WEIGHTS), map_location="cpu", weights_only=True))
    source = encode(*EXAMPLES)
    return model.eval(), {"input_ids": source, "decoder_input_ids": source.flip(0)[:, :TOKENS]}


def tokenizer_file() -> Path:
    """A ``tokenizer.json`` of the packaged vocabulary, in the user's cache folder."""
    return cached("annalog", "tokenizer.json", _tokenizer().to_str())


def encode(*molecules: str) -> Tensor:
    """Token ids of SMILES between start and stop, ``[len(molecules), S]`` int64, padded on the right."""
    tokenizer = _tokenizer()
    tokenizer.enable_padding(pad_id=PAD, pad_token="<pad>")
    return torch.tensor([row.ids for row in tokenizer.encode_batch(list(molecules))])


def decode(ids: Tensor) -> str:
    """The SMILES of token ids ``[T]`` int64, marks left out."""
    return str(_tokenizer().decode(ids.tolist()))


def _tokenizer() -> Tokenizer:
    # nothing but a dict of str, int and lists, and its checksum was compared
    words = pickle.loads(WEIGHTS.file(_VOCABULARY).read_bytes())["itos"]
    tokenizer = Tokenizer(models.WordLevel({word: index for index, word in enumerate(words)}, words[UNKNOWN]))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(_TOKEN), "isolated")
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{words[START]} $A {words[STOP]}", special_tokens=[(words[mark], mark) for mark in (START, STOP)]
    )
    tokenizer.decoder = decoders.Fuse()
    tokenizer.add_special_tokens([AddedToken(words[mark], special=True) for mark in (UNKNOWN, PAD, START, STOP)])
    return tokenizer
