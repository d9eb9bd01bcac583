"""Whisper as one function of features and tokens, out of the weights that CTranslate2's packages carry."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from transformers import WhisperConfig, WhisperForConditionalGeneration

from offramp.zoo._ctranslate2 import layers, read_model, whisper_state
from offramp.zoo._declare import Audio
from offramp.zoo._rebuild import rebuild

AUDIO: Audio = {"rate": 16000, "n_fft": 400, "hop": 160, "mels": 80, "seconds": 30}
TOKENS = 7  # of the example


class SpeechToText(nn.Module):
    """A Whisper without its cache: the logits of every next token."""

    def __init__(self, whisper: WhisperForConditionalGeneration) -> None:
        super().__init__()
        self.whisper = whisper

    def forward(self, input_features: Tensor, decoder_input_ids: Tensor) -> dict[str, Tensor]:
        """Log-mel features and the tokens so far -> ``{"logits": [B, T, V]}`` float32.

        ``input_features`` are ``[B, 80, 3000]`` float32 (see `offramp.runtime.preprocess.audio.log_mel`),
        ``decoder_input_ids`` ``[B, T]`` int64, T at most 448.
        """
        output = self.whisper(input_features=input_features, decoder_input_ids=decoder_input_ids, use_cache=False)
        return {"logits": output.logits}


def whisper(data: bytes, start: int, stop: int) -> SpeechToText:
    """The model in a ``model.bin``, float32; ``start`` and ``stop`` are the first and the last token of a text.

    Raises `ZooError` where the bytes are not a Whisper of CTranslate2.
    """
    variables = read_model(data)
    state = whisper_state(variables)
    vocabulary, width = state["model.decoder.embed_tokens.weight"].shape
    heads = int(variables["encoder/num_heads"])
    inner = state["model.encoder.layers.0.fc1.weight"].shape[0]
    config = WhisperConfig(
        vocab_size=vocabulary,
        d_model=width,
        encoder_layers=layers(variables, "encoder"),
        decoder_layers=layers(variables, "decoder"),
        encoder_attention_heads=heads,
        decoder_attention_heads=heads,
        encoder_ffn_dim=inner,
        decoder_ffn_dim=inner,
        decoder_start_token_id=start,
        bos_token_id=stop,
        eos_token_id=stop,
        pad_token_id=stop,
    )
    return SpeechToText(rebuild(WhisperForConditionalGeneration, config, state))


def example(prompt: list[int]) -> dict[str, Tensor]:
    """Features of quiet noise, ``[2, 80, 3000]``, and two rows of 7 tokens that begin with the prompt."""
    random = torch.Generator().manual_seed(0)
    words = torch.randint(1000, 20000, (2, TOKENS - len(prompt)), generator=random)
    features = torch.randn(2, AUDIO["mels"], 3000, generator=random) / 4
    return {"input_features": features, "decoder_input_ids": torch.cat((torch.tensor([prompt] * 2), words), dim=1)}
