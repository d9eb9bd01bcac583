"""A transformers model from a configuration and a state dict that are already in memory."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from offramp.zoo._package import ZooError

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PretrainedConfig, PreTrainedModel


def rebuild(
    model_class: type[PreTrainedModel],
    config: PretrainedConfig,
    state: dict[str, Tensor],
    **options: Any,
) -> PreTrainedModel:
    """The model in evaluation mode with exactly these weights.

    Goes through ``from_pretrained``, which knows the names that older versions of a class gave to its
    weights. Raises `ZooError` where a weight is missing or left over.
    """
    from transformers.utils import logging

    bar = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        model, report = model_class.from_pretrained(
            None, config=config, state_dict=state, output_loading_info=True, **options
        )
    finally:
        if bar:
            logging.enable_progress_bar()
    wrong = {kind: sorted(names) for kind, names in report.items() if names}
    if wrong:
        raise ZooError(f"the weights do not fit {model_class.__name__}: {wrong}", hint="another transformers version")
    return model.eval()
