"""Example inputs of models of the transformers library, made from their forward, configuration and processors."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, TypeVar

import torch
import transformers
from torch import Tensor

from offramp.errors import PretrainedModelError
from offramp.program.unwrap import unchanged

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel

T = TypeVar("T")
Inputs = dict[str, Tensor]

BATCH, TOKENS, DECODER_TOKENS = 2, 9, 7
SAMPLES = 4000  # of a waveform: a quarter of a second at 16 kHz
FRAMES = 100  # of a spectrogram without a fixed length
PADDING = 2  # tokens at the end of the last row, where the model does not continue the text
PAGE = 100  # boxes of words lie on a page of this size
FACTORY = "a file.py:factory that returns (module, example_inputs)"  # what takes any model: a hint


@dataclass(frozen=True)
class Listed:
    """What the directory's processors make.

    That is names by its tokenizer (None: it has none), a mask of sounds, and images of one height and width, which may
    be others than those that the configuration names.
    """

    text: frozenset[str] | None = None
    sound_mask: bool = False
    image: tuple[int, int] | None = None


def example_inputs(model: PreTrainedModel, beside: Listed | None = None) -> Inputs:
    """Seeded random inputs by parameter name, on which the model was seen to run.

    Token ids are ``[2, 9]``, with their mask, types and boxes as the forward and the tokenizer have them; images,
    waveforms and spectrograms are ``[2, ...]``; the tokens of an image or sound stand before the text where the model
    joins the two. A model that generates from a source gets ``decoder_input_ids [2, 7]``, another only where
    it cannot do without. A model that takes one row at a time gets one.

    Raises:
        PretrainedModelError: the main input is of another kind, or the model does not run on what was made.
    """
    maker = _Maker(model, beside or Listed())
    inputs = maker.inputs()
    first: Exception | None = None
    for candidate in _candidates(maker, inputs):
        try:
            with torch.no_grad(), unchanged(model):
                model(**candidate)
        except Exception as error:  # noqa: BLE001 - whatever the model raises; the first is reported below
            first = first or error
        else:
            return candidate
    shapes = ", ".join(f"{name} {list(value.shape)}" for name, value in inputs.items())
    missing = " and ".join(left_out(model, inputs))
    raise PretrainedModelError(
        f"{type(model).__name__} does not run on the inputs that were made up for it "
        f"({shapes}{missing and f'; none is known for {missing}'}): {type(first).__name__}: {first}",
        hint=f"{FACTORY}, with {missing or 'inputs that the model takes'}",
    ) from first


def _candidates(maker: _Maker, inputs: Inputs) -> Iterator[Inputs]:
    """The inputs and what else may do: a decoder's too, one row, or images as large as the configuration says."""
    found = [inputs]
    if "decoder_input_ids" in maker.accepted and "decoder_input_ids" not in inputs:
        found.append(inputs | {"decoder_input_ids": maker.tokens(DECODER_TOKENS, decoder=True)})
    yield from found
    yield from ({name: value[:1] for name, value in rows.items()} for rows in found)
    if maker.beside.image is not None and image_size(maker.config) is not None:
        other = _Maker(maker.model, replace(maker.beside, image=None))
        yield from _candidates(other, other.inputs())


def image_size(config: PretrainedConfig) -> Any:
    """The size of images that a configuration has, None where it has none."""
    return setting(config, "image_size", None) or setting(config, "input_size", None)


def left_out(model: PreTrainedModel, inputs: Inputs) -> list[str]:
    """Images and sounds that the model's forward takes beside its text, and that the inputs do without."""
    accepted = inspect.signature(model.forward).parameters
    return [
        name
        for name in (*_SIGNALS, "visual_embeds")
        if name in accepted and name not in inputs and "input_ids" in inputs
    ]


def placeholder(model: PreTrainedModel, inputs: Mapping[str, Tensor]) -> tuple[int, int] | None:
    """The id that stands for an image in a row of the inputs, and how often; None where none does."""
    token = _mark(model.config)
    if token is None or "input_ids" not in inputs:
        return None
    count = int((inputs["input_ids"][0] == token).sum())
    return (token, count) if count else None


def _mark(config: PretrainedConfig) -> int | None:
    found = next((value for name in _MARKS if (value := setting(config, name, None)) is not None), None)
    return None if found is None else int(found)


class _Maker:
    """Makes the inputs of one model."""

    def __init__(self, model: PreTrainedModel, beside: Listed) -> None:
        self.model, self.config, self.beside = model, model.config, beside
        self.accepted = inspect.signature(model.forward).parameters
        self.random = torch.Generator().manual_seed(0)
        self.continues = model.can_generate() and not self.config.is_encoder_decoder

    def inputs(self) -> Inputs:
        """Everything that the forward is to be given."""
        main = self._main()
        signals = {main: _SIGNALS[main](self)} if main in _SIGNALS else {}
        inputs: Inputs = {}
        if main == "input_ids" or (main == "pixel_values" and "input_ids" in self.accepted):
            if "pixel_values" in self.accepted and (image_size(self.config) or self.beside.image) is not None:
                signals.setdefault("pixel_values", self.images())
            inputs = self._text(signals)
        elif "attention_mask" in self.accepted and self.beside.sound_mask:
            axis = 2 if main == "input_features" and _fixed_frames(self.config) else 1
            inputs["attention_mask"] = torch.ones(BATCH, signals[main].shape[axis], dtype=torch.int64)
        inputs |= signals
        if self.config.is_encoder_decoder and self.model.can_generate() and "decoder_input_ids" in self.accepted:
            inputs["decoder_input_ids"] = self.tokens(DECODER_TOKENS, decoder=True)
        return {name: inputs[name] for name in self.accepted if name in inputs}

    def _main(self) -> str:
        """The name of the main input; of a model made of two, the one of its encoder."""
        names = [self.model.main_input_name, getattr(getattr(self.model, "encoder", None), "main_input_name", None)]
        known = [name for name in names if name in self.accepted and (name == "input_ids" or name in _SIGNALS)]
        if known:
            return str(known[0])
        raise PretrainedModelError(
            f"no example is known for {names[0]!r}, the main input of {type(self.model).__name__}",
            hint=FACTORY,
        )

    def _text(self, signals: Inputs) -> Inputs:
        """Token ids, and what goes with them."""
        ids = self.tokens(TOKENS)
        mask = torch.ones(BATCH, TOKENS, dtype=torch.int64)
        if not self.continues:
            mask[-1, -PADDING:] = 0
            if (end := self._special("eos_token_id")) is not None:
                ids[torch.arange(BATCH), mask.sum(1) - 1] = end
            ids = ids.masked_fill(mask == 0, self._special("pad_token_id") or 0)
        joined, mask = self._joined(signals, ids, mask)
        prompt = joined is not ids  # of an image and a text, whose types say what sees what
        ids = joined
        inputs = {"input_ids": ids}
        named = self.beside.text
        if "attention_mask" in self.accepted and (named is None or "attention_mask" in named):
            inputs["attention_mask"] = mask
        types = None if prompt else self._types(ids)
        if prompt and "token_type_ids" in self.accepted:
            types = self._seen_together({**signals, **inputs, "input_ids": ids}, ids.shape[1] - TOKENS)
        if "token_type_ids" in self.accepted and types is not None:
            inputs["token_type_ids"] = types
        if "bbox" in self.accepted:
            corner = torch.randint(PAGE, (*ids.shape, 2), generator=self.random)
            inputs["bbox"] = torch.cat([corner, corner + torch.randint(PAGE, corner.shape, generator=self.random)], -1)
        return inputs

    def _types(self, ids: Tensor) -> Tensor | None:
        """Types of the tokens, 0 and then 1, ``[2, tokens]``; of a model of several kinds ``[2, tokens, kinds]``."""
        kinds = getattr(self.config, "type_vocab_sizes", None)
        if kinds:
            return torch.stack([torch.randint(size, ids.shape, generator=self.random) for size in kinds], -1)
        count = getattr(self.config, "type_vocab_size", None)
        named = (count or 1) > 1 if self.beside.text is None else "token_type_ids" in self.beside.text
        if self.continues or not named:
            return None
        second = torch.arange(ids.shape[1]) >= ids.shape[1] // 2
        return (second & (count is None or count > 1)).to(torch.int64).expand(ids.shape).contiguous()

    def _seen_together(self, inputs: Inputs, count: int) -> Tensor:
        """Types of an image's ``count`` tokens, which may see each other, and of text, which sees no later token."""
        ids = inputs["input_ids"]
        other = ids.clone()
        other[:, -1] = ids[:, -2]
        for text in (0, 1):
            types = torch.full_like(ids, text)
            with torch.no_grad(), unchanged(self.model):
                one, two = (
                    self.model(**{**inputs, "input_ids": given, "token_type_ids": types}).logits[:, :-1]
                    for given in (ids, other)
                )
            if torch.equal(one, two):
                types[:, :count] = 1 - text
                return types
        return torch.zeros_like(ids)

    def _joined(self, signals: Inputs, ids: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        """The text behind as many tokens of images as the model has features of one."""
        mark = _mark(self.config)
        if mark is None or "pixel_values" not in signals or not hasattr(self.model, "get_image_features"):
            return ids, mask
        try:
            with torch.no_grad():
                features = self.model.get_image_features(pixel_values=signals["pixel_values"])
        except Exception:  # noqa: BLE001 - it wants more than the image: running the model will say so
            return ids, mask
        features = getattr(features, "pooler_output", features)
        count = sum(part.numel() // part.shape[-1] for part in features) // BATCH
        images = torch.full((BATCH, count), mark)
        return torch.cat([images, ids], 1), torch.cat([torch.ones_like(images), mask], 1)

    def tokens(self, count: int, *, decoder: bool = False) -> Tensor:
        """``[2, count]`` int64 without the special tokens that the configuration names."""
        special: set[object] = set()
        for part in configs(self.config):
            for name, value in vars(part).items():
                if name.endswith(("_token_id", "_token_index")):
                    special.update(value if isinstance(value, list) else [value])
        ordinary = torch.tensor([token for token in range(self._vocabulary(decoder)) if token not in special])
        return ordinary[torch.randint(len(ordinary), (BATCH, count), generator=self.random)]

    def _special(self, name: str) -> int | None:
        """The token of that name, or the first of several; None where the vocabulary does not have it."""
        value: Any = setting(self.config, name, None)
        token = value[0] if isinstance(value, (list, tuple)) else value
        return token if token is not None and 0 <= token < self._vocabulary(decoder=False) else None

    def _vocabulary(self, decoder: bool) -> int:
        try:
            part = self.config.get_text_config(decoder=decoder, encoder=not decoder)
        except ValueError:  # several: any will do
            part = self.config
        own: int | None = getattr(part, "decoder_vocab_size", None) if decoder else None
        known = own or setting(part, "vocab_size", 0) or setting(self.config, "vocab_size", CHARACTERS)
        table = embedded(self.model)
        return known if decoder or table is None else min(known, table)  # some configurations say more than there is

    def images(self) -> Tensor:
        """``[2, channels, height, width]`` float32; of a model of videos ``[2, frames, channels, height, width]``."""
        size = self.beside.image or image_size(self.config) or 224
        if isinstance(size, dict):
            size = size["height"], size["width"]
        height, width = size if isinstance(size, (list, tuple)) else (size, size)
        frames = getattr(self.config, "num_frames", None)
        shape = (BATCH, *([frames] if frames else []), setting(self.config, "num_channels", 3), height, width)
        return torch.randn(shape, generator=self.random)

    def waveform(self) -> Tensor:
        """``[2, 4000]`` float32; or, which some models take under this name, ``[2, frames, bins]``."""
        bins = setting(self.config, "num_mel_bins", 0)
        if not bins or getattr(self.config, "conv_stride", None):  # a waveform, where convolutions make the features
            return torch.randn(BATCH, SAMPLES, generator=self.random)
        return torch.randn(BATCH, setting(self.config, "max_length", FRAMES), bins, generator=self.random)

    def spectrogram(self) -> Tensor:
        """``[2, bins, frames]`` float32 of the one length that the positions allow, or ``[2, frames, bins]``."""
        if _fixed_frames(self.config):
            bins, frames = (setting(self.config, name, FRAMES) for name in ("num_mel_bins", "max_source_positions"))
            return torch.randn(BATCH, bins, 2 * frames, generator=self.random)
        names = ("input_feat_per_channel", "feature_projection_input_dim", "num_mel_bins")
        width = next((size for name in names if (size := setting(self.config, name, 0))), 80)
        return torch.randn(BATCH, FRAMES, width, generator=self.random)


CHARACTERS = 256  # where the configuration has no vocabulary: of models that read characters
_MARKS = ("image_token_id", "image_token_index")
_SIGNALS: dict[str, Callable[[_Maker], Tensor]] = {
    "pixel_values": _Maker.images,
    "input_values": _Maker.waveform,
    "input_features": _Maker.spectrogram,
}


def _fixed_frames(config: PretrainedConfig) -> bool:
    """Whether spectrograms are ``[bins, frames]``, with one number of frames that the positions fix."""
    return bool(setting(config, "num_mel_bins", 0)) and bool(setting(config, "max_source_positions", 0))


def configs(config: PretrainedConfig) -> Iterator[PretrainedConfig]:
    """The configuration and those inside it."""
    yield config
    for value in vars(config).values():
        if isinstance(value, transformers.PretrainedConfig):
            yield from configs(value)


def setting(config: PretrainedConfig, name: str, default: T) -> T:
    """The first value that this configuration or one inside it has for the name."""
    return next((value for part in configs(config) if (value := getattr(part, name, None)) is not None), default)


def embedded(model: PreTrainedModel) -> int | None:
    """How many token ids a model embeds; None where it does not say (one of two towers, say)."""
    try:
        found: int | None = getattr(model.get_input_embeddings(), "num_embeddings", None)
    except NotImplementedError:
        found = None
    return found
