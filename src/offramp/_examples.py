"""Example inputs of models of the transformers library, made from their configuration and forward."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, TypeVar

import torch
import transformers
from torch import Tensor

from offramp.models import PretrainedModelError

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel

T = TypeVar("T")

BATCH, TOKENS, DECODER_TOKENS = 2, 9, 7
SAMPLES = 4000  # of a waveform: a quarter of a second at 16 kHz
FRAMES = 100  # of a spectrogram without a fixed length
PADDING = 2  # tokens at the end of the last row, where a model only encodes


def example_inputs(model: PreTrainedModel) -> dict[str, Tensor]:
    """Seeded random inputs by parameter name: token ids ``[2, 9]``, images, a waveform or a spectrogram.

    An encoder-decoder also gets ``decoder_input_ids [2, 7]``, a model of two modalities its images. Raises
    `PretrainedModelError` where the model's main input is of another kind.
    """
    config = model.config
    accepted = inspect.signature(model.forward).parameters
    random = torch.Generator().manual_seed(0)
    main = model.main_input_name
    if main not in _MAKERS:
        raise PretrainedModelError(
            f"no example is known for {main!r}, the main input of {type(model).__name__}",
            hint="a file.py:factory that returns (module, example_inputs)",
        )
    inputs = {main: _MAKERS[main](config, random)}
    if main == "input_ids" and "attention_mask" in accepted:
        mask = torch.ones(BATCH, TOKENS, dtype=torch.int64)
        if not model.can_generate():
            mask[-1, -PADDING:] = 0
            inputs["input_ids"] = inputs["input_ids"].masked_fill(mask == 0, setting(config, "pad_token_id", 0))
        inputs["attention_mask"] = mask
    if "pixel_values" in accepted and setting(config, "image_size", 0):
        inputs.setdefault("pixel_values", _images(config, random))
    if config.is_encoder_decoder and "decoder_input_ids" in accepted:
        inputs["decoder_input_ids"] = _token_ids(config, random, DECODER_TOKENS)
    return inputs


def _token_ids(config: PretrainedConfig, random: torch.Generator, count: int = TOKENS) -> Tensor:
    """``[2, count]`` int64 without the special tokens that the configuration names."""
    special: set[object] = set()
    for part in configs(config):
        for kind in ("pad", "bos", "eos", "sep", "cls", "mask", "decoder_start"):
            value = getattr(part, f"{kind}_token_id", None)
            special.update(value if isinstance(value, list) else [value])
    vocabulary = setting(config, "decoder_vocab_size", 0) or setting(config, "vocab_size", 0)
    ordinary = torch.tensor([token for token in range(vocabulary) if token not in special])
    return ordinary[torch.randint(len(ordinary), (BATCH, count), generator=random)]


def _images(config: PretrainedConfig, random: torch.Generator) -> Tensor:
    """``[2, channels, height, width]`` float32."""
    size: Any = setting(config, "image_size", 224)
    height, width = size if isinstance(size, (list, tuple)) else (size, size)
    return torch.randn(BATCH, setting(config, "num_channels", 3), height, width, generator=random)


def _waveform(config: PretrainedConfig, random: torch.Generator) -> Tensor:
    """``[2, 4000]`` float32; or, which some models take under this name, ``[2, frames, bins]``."""
    bins = setting(config, "num_mel_bins", 0)
    shape = (BATCH, setting(config, "max_length", FRAMES), bins) if bins else (BATCH, SAMPLES)
    return torch.randn(shape, generator=random)


def _spectrogram(config: PretrainedConfig, random: torch.Generator) -> Tensor:
    """``[2, bins, frames]`` float32 of the one length that the positions allow, or ``[2, frames, bins]``."""
    bins = setting(config, "num_mel_bins", 0)
    if bins:
        return torch.randn(BATCH, bins, 2 * setting(config, "max_source_positions", FRAMES), generator=random)
    width = setting(config, "input_feat_per_channel", 0) or setting(config, "feature_projection_input_dim", 80)
    return torch.randn(BATCH, FRAMES, width, generator=random)


_MAKERS: dict[str, Callable[[PretrainedConfig, torch.Generator], Tensor]] = {
    "input_ids": _token_ids,
    "pixel_values": _images,
    "input_values": _waveform,
    "input_features": _spectrogram,
}


def configs(config: PretrainedConfig) -> Iterator[PretrainedConfig]:
    """The configuration and those inside it."""
    yield config
    for value in vars(config).values():
        if isinstance(value, transformers.PretrainedConfig):
            yield from configs(value)


def setting(config: PretrainedConfig, name: str, default: T) -> T:
    """The first value that this configuration or one inside it has for the name."""
    return next((value for part in configs(config) if (value := getattr(part, name, None)) is not None), default)
