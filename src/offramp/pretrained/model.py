"""Models of the transformers library, from a directory or by their id, and adapters of peft on them."""

from __future__ import annotations

import contextlib
import inspect
import json
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import transformers
from safetensors import safe_open
from torch import Tensor

from offramp.errors import PretrainedModelError
from offramp.pretrained import image_processor, sentences, tokenization
from offramp.pretrained.example_inputs import FACTORY, Listed, configs, example_inputs, image_size, left_out

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_ADAPTER = "adapter_config.json"
_ADAPTED = "base_model.model."  # before the names of weights of the base, in an adapter's file
_TASKS = {  # of adapters that bring a head of their own; the class of others is what the base's configuration says
    "SEQ_CLS": "AutoModelForSequenceClassification",
    "TOKEN_CLS": "AutoModelForTokenClassification",
    "QUESTION_ANS": "AutoModelForQuestionAnswering",
}
_SOURCE = "a directory with config.json and weights, or an id of the hub that this machine reaches"


def load(source: str, note: Callable[[str], None]) -> tuple[PreTrainedModel, dict[str, Tensor]]:
    """The model of a directory or hub id, float32, in evaluation mode, without caches; and inputs of batch 2.

    The class is the one that the configuration names, else the bare ``AutoModel``. What sentence-transformers puts
    behind the model of a directory that it wrote, pooling say, is part of it. A directory that only holds an adapter of
    peft is merged into its base, where that is found. Code that comes with a checkpoint is not run.
    ``note`` gets which weights are missing there, and random therefore, and whether images or sounds are left out.
    Raises `PretrainedModelError`.
    """
    adapter = _adapter(source)
    model, missing = _load(source) if adapter is None else _merged(source, adapter)
    whole = sentences.read(source, note)
    if whole is not None:
        if (kind := sentences.kind_of(whole)) != type(model).__name__:
            model, missing = _load(source, kind)
        model, missing = sentences.joined(model, whole), [each for each in missing if not each.startswith("pooler.")]
    if missing:
        few = ", ".join(missing[:3]) + (f" and {len(missing) - 3} more" if len(missing) > 3 else "")
        note(f"hf:{source} has no weights for {few} of {type(model).__name__}: they are random until they are trained")
    if whole is None and (further := sentences.parts(source)[1:]):
        note(
            f"hf:{source}: behind {type(model).__name__} modules.json has {', '.join(further)}, left out of what "
            f"follows; for all of it, {sentences.to_try(source)}"
        )
    model.eval()
    inputs = example_inputs(model, _listed(processors(source), model))
    if whole is not None:
        sentences.compare(source, model, whole, inputs)
    if missed := left_out(model, inputs):
        note(
            f"hf:{source}: {type(model).__name__} takes {', '.join(missed)} too, for which no example is known: what "
            f"follows is its text alone; for all of it, {FACTORY}"
        )
    return model, inputs


def processors(source: str) -> str:
    """Where the tokenizer and the like of a directory are: there, or with the base of an adapter that has none."""
    adapter = _adapter(source)
    if adapter is None or any(Path(source).glob("tokenizer*")):
        return source
    return str(adapter["base_model_name_or_path"])


def _load(source: str, kind: str | None = None, classes: int | None = None) -> tuple[PreTrainedModel, list[str]]:
    """The model, of the class ``kind`` and with so many ``classes`` if that is said; names of weights not there."""
    try:
        config = transformers.AutoConfig.from_pretrained(source, trust_remote_code=False)
        if classes is not None:
            config.num_labels = classes
        for part in configs(config):
            part.return_dict = True
            for name in ("use_cache", "output_hidden_states", "output_attentions"):
                if getattr(part, name, False):
                    setattr(part, name, False)
        names = [kind] if kind else config.architectures or []
        model_class = next((getattr(transformers, name) for name in names if hasattr(transformers, name)), None)
        model, info = (model_class or transformers.AutoModel).from_pretrained(
            source, config=config, dtype=torch.float32, output_loading_info=True
        )
        return model, sorted(info["missing_keys"])
    except (OSError, ValueError, ImportError) as error:
        raise PretrainedModelError(
            f"hf:{source} could not be loaded: {str(error).strip().splitlines()[0]}", hint=_to_try(source, error)
        ) from error


def _to_try(source: str, error: Exception) -> str:
    """What to give instead of a directory that does not load."""
    if "trust_remote_code" in str(error):
        return "code that comes with a checkpoint is not run: load it in a file.py:factory"
    folder = Path(source)
    written = folder / "config.json"
    if written.is_file() and "quantization_config" in written.read_text(encoding="utf-8", errors="replace"):
        return "its weights are quantized, and a bundle is made from float32 weights: the model before that"
    inside = [] if written.is_file() else sorted(str(file.parent) for file in folder.glob("*/config.json"))
    if inside:
        return f"a directory inside of it: {', '.join(f'hf:{name}' for name in inside)}"
    if packed := sorted(file.name for file in (*folder.glob("*.gguf"), folder) if file.suffix == ".gguf"):
        return (
            f"AutoModelForCausalLM.from_pretrained(FOLDER, gguf_file={packed[0]!r}).save_pretrained(DIRECTORY), and "
            "the tokenizer likewise; then hf:DIRECTORY"
        )
    return _SOURCE


def _adapter(source: str) -> dict[str, Any] | None:
    """The settings of a directory that holds an adapter and no model of its own."""
    folder = Path(source)
    if not (folder / _ADAPTER).is_file() or (folder / "config.json").is_file():
        return None
    settings: dict[str, Any] = json.loads((folder / _ADAPTER).read_text(encoding="utf-8"))
    return settings


def _merged(source: str, adapter: dict[str, Any]) -> tuple[PreTrainedModel, list[str]]:
    """The base with the adapter in its weights, and the names of weights that neither has."""
    base = adapter.get("base_model_name_or_path")
    what = f"hf:{source} is an adapter ({adapter.get('peft_type')}) of {base!r}, not a model"
    hint = (
        "merge the two: PeftModel.from_pretrained(base, adapter).merge_and_unload().save_pretrained(DIRECTORY), then "
        "hf:DIRECTORY"
    )
    try:
        import peft
    except ModuleNotFoundError as error:
        raise PretrainedModelError(f"{what}; peft, which reads it, is not installed", hint=hint) from error
    try:
        model, missing = _as_large(source, str(base), _TASKS.get(str(adapter.get("task_type"))))
        own = {*(adapter.get("modules_to_save") or ())}
        merged = peft.PeftModel.from_pretrained(model, source).merge_and_unload()
        return merged, [name for name in missing if not own & {*name.split(".")}]
    except PretrainedModelError as error:
        raise PretrainedModelError(f"{what}, and {error.reason}", hint=hint) from error
    except AttributeError as error:
        raise PretrainedModelError(f"{what}, and its kind cannot be merged", hint=FACTORY) from error
    except (OSError, ValueError, RuntimeError) as error:
        lines = [line.strip() for line in str(error).strip().splitlines()]
        raise PretrainedModelError(
            f"{what}, and does not fit it: {' '.join(lines[:2])}", hint="the base that the adapter was made for"
        ) from error


def _as_large(source: str, base: str, kind: str | None) -> tuple[PreTrainedModel, list[str]]:
    """The base of an adapter, with as many classes and words as the adapter's own head and table of words have."""
    model, missing = _load(base, kind)
    weights = Path(source) / "adapter_model.safetensors"
    if not weights.is_file():
        return model, missing
    with safe_open(weights, "pt") as file:
        names = {key.removeprefix(_ADAPTED).replace(".base_layer.", "."): key for key in file.keys()}  # noqa: SIM118
        sizes = {name: file.get_slice(key).get_shape() for name, key in names.items()}
    others = {
        name: own
        for name, own in model.named_parameters(remove_duplicate=False)
        if name in sizes and sizes[name] != list(own.shape) and sizes[name][1:] == list(own.shape[1:])
    }
    tables = [part.weight for part in (model.get_input_embeddings(), model.get_output_embeddings()) if part is not None]
    words = {sizes[name][0] for name, own in others.items() if any(own is table for table in tables)}
    classes = {sizes[name][0] for name, own in others.items() if len(own) == model.config.num_labels}
    if len(words) == 1:
        model.resize_token_embeddings(words.pop(), mean_resizing=False)
    elif len(classes) == 1:
        return _load(base, kind, classes.pop())
    return model, missing


def _listed(source: str, model: PreTrainedModel) -> Listed:
    """What the tokenizer and the like of a directory or hub id make."""
    names: frozenset[str] | None = None
    masked = False
    with contextlib.suppress(ValueError):  # one that does not load: the configuration has to do
        tokenizer = tokenization.load(source)
        names = None if tokenizer is None else frozenset(tokenizer.model_input_names)
    with contextlib.suppress(ValueError):
        extractor = tokenization.loaded(transformers.AutoFeatureExtractor, source, tokenization.PROCESSORS)
        masked = bool(getattr(extractor, "return_attention_mask", False))
    images = "pixel_values" in inspect.signature(model.forward).parameters
    return Listed(names, masked, _image_size(source, image_size(model.config) is not None) if images else None)


def _image_size(source: str, known: bool) -> tuple[int, int] | None:
    """Height and width of all images that a directory's processor makes; None where they differ, or it has none.

    Where the model's are not ``known`` square ones say them.
    """
    with contextlib.suppress(ValueError):
        processor = tokenization.loaded(transformers.AutoImageProcessor, source, tokenization.PROCESSORS)
        if processor is not None:
            alike = image_processor.size(processor)
            return alike if alike or known else image_processor.size(processor, image_processor.SQUARES)
    return None
