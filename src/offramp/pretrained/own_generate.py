"""A ``generate`` of a model's own: what it gives the part that generates, seen by letting it write one token."""

from __future__ import annotations

from collections.abc import Mapping
from copy import deepcopy
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any
from unittest import mock

import torch
import transformers

from offramp.pretrained import tokenization
from offramp.program.unwrap import unchanged

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel

_ASKED = {"max_new_tokens": 1, "num_beams": 1, "do_sample": False}


@dataclass
class Started:
    """How generation started.

    Attributes:
        ids: The first token ids that a part of the model was given, of the first row.
        part: What stands for the model in `offramp.pretrained.generation_config`: the part that generates, with the
            settings that it was given; None where that is the model itself.
        prompt: The ids that this part was asked to go on from, of the first row; none where it was given no ids.
    """

    ids: list[int] = field(default_factory=list)
    part: Any = None
    prompt: list[int] = field(default_factory=list)


def has_own(model: PreTrainedModel) -> bool:
    """Whether the class has a ``generate`` of its own."""
    return type(model).generate is not transformers.GenerationMixin.generate


def started(model: PreTrainedModel, given: Mapping[str, Tensor]) -> Started:
    """What the model's ``generate`` makes of inputs.

    Raises:
        ValueError: it fails, or gives its parts no ids.
    """
    found = Started()
    generate = transformers.GenerationMixin.generate

    def look(_: Any, args: tuple[Any, ...], options: dict[str, Any]) -> None:
        for value in (options.get(tokenization.TOKENS), *args[:1]):
            if not found.ids and isinstance(value, torch.Tensor) and value.dtype == torch.int64 and value.ndim == 2:
                found.ids = value[0].tolist()

    def called(part: Any, *args: Any, **options: Any) -> Any:
        if found.part is None and part is not model:
            found.part = _with_settings(part, options)
            ids = options.get(tokenization.TOKENS)
            found.prompt = ids[0].tolist() if ids is not None else []
        return generate(part, *args, **options)

    hooks = [part.register_forward_pre_hook(look, with_kwargs=True) for part in model.modules()]
    copies = {name: value.clone() for name, value in given.items()}  # some write into what they are given
    try:
        with torch.no_grad(), unchanged(model), mock.patch.object(transformers.GenerationMixin, "generate", called):
            model.generate(**copies, **_ASKED)
    except Exception as error:
        raise ValueError(f"the generate of {type(model).__name__} fails: {tokenization.reason(error)}") from error
    finally:
        for hook in hooks:
            hook.remove()
    if not found.ids:
        raise ValueError(f"the generate of {type(model).__name__} gives its parts no token ids")
    return found


def _with_settings(part: Any, options: Mapping[str, Any]) -> Any:
    config = deepcopy(part.generation_config)
    for name, value in options.items():
        if hasattr(config, name) and name not in _ASKED:
            setattr(config, name, value)
    return SimpleNamespace(generation_config=config, config=part.config, can_generate=lambda: True)
