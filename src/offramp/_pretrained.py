"""Models of the transformers library, from a directory or by their id."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import transformers
from torch import Tensor

from offramp._examples import configs, example_inputs, listed
from offramp.models import PretrainedModelError

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def load(source: str) -> tuple[PreTrainedModel, dict[str, Tensor]]:
    """The model of a directory or hub id, float32, in evaluation mode, without caches; and inputs of batch 2.

    The class is the one that the configuration names, else the bare ``AutoModel``. Code that comes with a
    checkpoint is not run. Raises `PretrainedModelError`.
    """
    try:
        config = transformers.AutoConfig.from_pretrained(source, trust_remote_code=False)
        for part in configs(config):
            part.return_dict = True
            for name in ("use_cache", "output_hidden_states", "output_attentions"):
                if getattr(part, name, False):
                    setattr(part, name, False)
        names = config.architectures or []
        model_class = next((getattr(transformers, name) for name in names if hasattr(transformers, name)), None)
        model = (model_class or transformers.AutoModel).from_pretrained(source, config=config, dtype=torch.float32)
    except (OSError, ValueError, ImportError) as error:
        raise PretrainedModelError(
            f"hf:{source} could not be loaded: {str(error).strip().splitlines()[0]}",
            hint="a directory with config.json and weights, or an id of the hub that this machine reaches",
        ) from error
    model.eval()
    return model, example_inputs(model, listed(source))
