"""What a saved transformers model brings along beside its weights, as arguments of `offramp.save`."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import torch
import transformers

from offramp.pretrained import generation_config, own_generate, tokenization
from offramp.pretrained.example_inputs import placeholder
from offramp.program.unwrap import unchanged

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel

_SOUND = ("input_features", "input_values")
_LABELLED = "logits"
_SEVERAL = "multi_label_classification"


def settings(
    source: str,
    model: PreTrainedModel,
    inputs: Mapping[str, Tensor],
    ignore_generation: Collection[str],
    note: Callable[[str], None],
) -> dict[str, Any]:
    """The ``generation``, ``preprocessing``, ``labels`` and ``files`` of a directory or hub id.

    What cannot be taken along goes to ``note``, one sentence each, and into ``preprocessing["refused"]``.

    Raises:
        PretrainedModelError: the generation_config asks for what a bundle cannot do.
    """
    generation = generation_config.generation(model, ignore_generation)
    preprocessing: dict[str, Any] = {}
    refused: dict[str, str] = {}
    proven = settled = False
    files: dict[str, bytes] = {}

    def read(kind: str, what: str, take: Callable[[], None]) -> None:
        try:
            take()
        except ValueError as error:
            refused[kind] = str(error)
            note(f"the bundle takes no {what}: {error}")

    def text() -> None:
        tokenizer = tokenization.load(source)
        if tokenizer is None:
            return
        files["tokenizer.json"] = tokenization.as_json(tokenizer).encode()
        if tokenization.TOKENS in inputs:
            preprocessing["text"] = asdict(tokenization.text_settings(tokenizer, model, inputs))
        if not generation:
            return
        try:
            template = tokenization.template(tokenizer)
        except ValueError as error:
            note(f"the bundle has no chat template: {error}")
            return
        generation.update({} if template is None else {"template": template})
        if template is not None:
            tokenization.note_day(tokenizer, note)

    def audio() -> None:
        from offramp.pretrained.feature_extractor import audio_settings

        extractor = tokenization.loaded(transformers.AutoFeatureExtractor, source, tokenization.PROCESSORS)
        if extractor is not None:
            preprocessing["audio"] = asdict(audio_settings(extractor))

    def image() -> None:
        from offramp.pretrained.image_processor import fits, image_settings

        processor = tokenization.loaded(transformers.AutoImageProcessor, source, tokenization.PROCESSORS, backend="pil")
        if processor is not None:
            found = image_settings(processor)
            if some := fits(processor, inputs["pixel_values"].shape[-2:]):
                note(some)
            preprocessing["image"] = asdict(found)

    def together() -> bool:
        """Whether the prompt that a text and an image make was compared with the model's own."""
        from offramp.bundle.preprocessing import ImageText
        from offramp.pretrained import image_text

        processor = image_text.load(source)
        if processor is None:
            return False
        as_json = tokenization.as_json(processor.tokenizer)
        found = image_text.image_text_settings(processor, as_json, model, inputs, note)
        files["tokenizer.json"] = as_json.encode()
        if found != ImageText():
            preprocessing["image_text"] = asdict(found)
        return True

    def start() -> bool:
        """Take the settings of the part that the model's own generate lets generate; whether there is one.

        A prompt without places for the image would be none, so one of an image alone is the model's own.
        """
        keeps = placeholder(model, inputs) is not None and "decoder_input_ids" not in inputs
        template = {key: value for key, value in generation.items() if key == "template"}
        own = None if generation_config.is_all(model) else _started(model, inputs)
        if own is not None and own.part is not None:
            generation.clear()
            generation.update(generation_config.generation(own.part, ignore_generation) | template)
        if keeps:
            generation.pop("prompt", None)
        if own is not None and own.part is not None and "decoder_input_ids" in inputs and own.prompt:
            generation["prompt"] = own.prompt
        if "decoder_input_ids" not in inputs and own is not None and "pixel_values" in inputs:
            alone = _started(model, {"pixel_values": inputs["pixel_values"]})
            generation.update({} if alone is None else {"prompt": alone.ids})
        return own is not None and own.part is not None

    read("text", "text", text)
    if generation and {"pixel_values", tokenization.TOKENS} <= inputs.keys():
        settled = start()
    if {"pixel_values", tokenization.TOKENS} <= inputs.keys() and "tokenizer.json" in files:
        try:
            proven = together()
        except ValueError as error:
            refused["image_text"] = str(error)
            note(f"how the model takes a text with an image is not known, so the text is encoded alone: {error}")
    if generation and not generation_config.is_all(model):
        unknown = [*([] if proven else ["its prompt"]), *([] if settled else ["its ends"])]
        if unknown:
            note(
                f"{type(model).__name__} has a generate of its own; the bundle generates by the generation_config "
                f"alone, so {' and '.join(unknown)} may be others"
            )
    if any(name in inputs for name in _SOUND):
        read("audio", "sound", audio)
    if "pixel_values" in inputs:
        read("image", "images", image)
    if refused:
        preprocessing["refused"] = refused
    if model.config.problem_type == _SEVERAL:
        note(
            f"the classes of {type(model).__name__} do not exclude each other: scores of exits, and calibrate without "
            "a quality= of yours, go by the highest alone"
        )
    return {
        "generation": generation,
        "preprocessing": preprocessing,
        "labels": _labels(model, inputs),
        "files": files,
    }


def _started(model: PreTrainedModel, inputs: Mapping[str, Tensor]) -> own_generate.Started | None:
    """How the model's own generate starts from the first row of inputs; None where it cannot."""
    try:
        return own_generate.started(
            model, {name: value[:1] for name, value in inputs.items() if not name.startswith("decoder_")}
        )
    except ValueError:
        return None


def _labels(model: PreTrainedModel, inputs: Mapping[str, Tensor]) -> dict[str, list[str]]:
    """The names of a classifier's classes, where they are not just numbered and exclude each other: no regression's."""
    config = model.config
    names = {int(place): str(name) for place, name in (getattr(config, "id2label", None) or {}).items()}
    ordinary = all(name == f"LABEL_{place}" for place, name in names.items())
    exclusive = config.problem_type in (None, "single_label_classification") and len(names) > 1
    if ordinary or sorted(names) != list(range(len(names))) or not exclusive:
        return {}
    with torch.no_grad(), unchanged(model):
        made = model(**inputs)
    logits = made.get(_LABELLED) if isinstance(made, Mapping) else None
    if logits is None or logits.ndim not in (2, 3) or logits.shape[-1] != len(names):
        return {}
    return {_LABELLED: [names[place] for place in range(len(names))]}
