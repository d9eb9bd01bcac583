"""What a saved transformers model brings along beside its weights, as arguments of `offramp.save`."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import torch
import transformers

from offramp.pretrained import generation_config, tokenization
from offramp.program.unwrap import unchanged

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel

_SOUND = ("input_features", "input_values")
_LABELLED = "logits"


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
    if generation and not generation_config.is_all(model):
        note(
            f"{type(model).__name__} has a generate of its own; the bundle generates by the generation_config alone, "
            "so its prompt and its ends may be others"
        )
    preprocessing: dict[str, Any] = {}
    refused: dict[str, str] = {}
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

    def audio() -> None:
        from offramp.pretrained.feature_extractor import audio_settings

        extractor = tokenization.loaded(transformers.AutoFeatureExtractor, source, tokenization.PROCESSORS)
        if extractor is not None:
            preprocessing["audio"] = asdict(audio_settings(extractor))

    def image() -> None:
        from offramp.pretrained.image_processor import image_settings

        processor = tokenization.loaded(transformers.AutoImageProcessor, source, tokenization.PROCESSORS, backend="pil")
        if processor is not None:
            preprocessing["image"] = asdict(image_settings(processor))

    read("text", "text", text)
    if any(name in inputs for name in _SOUND):
        read("audio", "sound", audio)
    if "pixel_values" in inputs:
        read("image", "images", image)
    if refused:
        preprocessing["refused"] = refused
    return {
        "generation": generation,
        "preprocessing": preprocessing,
        "labels": _labels(model, inputs),
        "files": files,
    }


def _labels(model: PreTrainedModel, inputs: Mapping[str, Tensor]) -> dict[str, list[str]]:
    """The names of a classifier's classes, where they are not just numbered and exclude each other."""
    config = model.config
    names = {int(place): str(name) for place, name in (getattr(config, "id2label", None) or {}).items()}
    ordinary = all(name == f"LABEL_{place}" for place, name in names.items())
    if ordinary or sorted(names) != list(range(len(names))) or config.problem_type == "multi_label_classification":
        return {}
    with torch.no_grad(), unchanged(model):
        made = model(**inputs)
    logits = made.get(_LABELLED) if isinstance(made, Mapping) else None
    if logits is None or logits.ndim not in (2, 3) or logits.shape[-1] != len(names):
        return {}
    return {_LABELLED: [names[place] for place in range(len(names))]}
