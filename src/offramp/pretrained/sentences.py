"""Models of sentence-transformers: what stands behind the transformer (pooling, say) becomes part of its forward."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from offramp.errors import PretrainedModelError
from offramp.pretrained.example_inputs import FACTORY
from offramp.pretrained.tokenization import read_json, reason

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_OUTPUT = "sentence_embedding"
_LIBRARY, _KIND, _FIRST = "sentence_transformers", "SentenceTransformer", "Transformer"


def parts(source: str) -> list[str]:
    """The kinds of the modules that ``modules.json`` lists, in their order; empty without that file."""
    return [str(part.get("type", "")).rpartition(".")[2] for part in read_json(source, "modules.json") or ()]


def to_try(source: str) -> str:
    """What takes along the modules behind a transformer that `read` did not."""
    return f"pip install {_LIBRARY.replace('_', '-')}" if _readable(source) else FACTORY


def _readable(source: str) -> bool:
    """Whether it is a model of texts' embeddings: a transformer whose files lie at its root, and more behind it."""
    first, *behind = parts(source) or [""]
    if first != _FIRST or not behind or read_json(source, "config.json") is None:
        return False
    config = read_json(source, "config_sentence_transformers.json") or {}
    return bool(config.get("model_type", _KIND) == _KIND)


def read(source: str, note: Callable[[str], None]) -> nn.Module | None:
    """The ``SentenceTransformer`` of a directory or hub id; None where it is something else, or the library missing.

    ``note`` gets what it does to texts and a bundle does not.

    Raises:
        PretrainedModelError: it does not load.
    """
    if not _readable(source) or find_spec(_LIBRARY) is None:
        return None
    from sentence_transformers import SentenceTransformer

    try:
        made: Any = SentenceTransformer(source, device="cpu", trust_remote_code=False).eval().float()
    except Exception as error:  # its modules may be anybody's
        raise PretrainedModelError(f"hf:{source} could not be loaded: {reason(error)}", hint=FACTORY) from error
    if prompt := made.prompts.get(made.default_prompt_name or "", ""):
        note(f"hf:{source}: sentence-transformers puts {prompt!r} before each text; before a bundle's, do so yourself")
    if getattr(made[0], "do_lower_case", False):
        note(f"hf:{source}: sentence-transformers makes texts lower case; make a bundle's so yourself")
    return made  # type: ignore[no-any-return]


def kind_of(sentences: nn.Module) -> str:
    """The class of the transformer's model."""
    return type(next(sentences.children()).auto_model).__name__


def joined(model: PreTrainedModel, sentences: nn.Module) -> PreTrainedModel:
    """The model, which from now on returns ``sentence_embedding`` [batch, features]; it takes what it took."""
    kind: Any = type(model)

    @functools.wraps(kind.forward)
    def forward(self: Any, *args: Any, **inputs: Any) -> dict[str, Tensor]:
        given = inspect.signature(kind.forward).bind(self, *args, **inputs).arguments
        features = {"token_embeddings": kind.forward(self, *args, **inputs)[0]}
        if given.get("attention_mask") is not None:
            features["attention_mask"] = given["attention_mask"]
        return {_OUTPUT: self.behind(features)[_OUTPUT]}

    model.behind = nn.Sequential(*list(sentences.children())[1:])
    model.__class__ = type(kind.__name__, (kind,), {"forward": forward, "__module__": kind.__module__})
    return model


def compare(source: str, model: PreTrainedModel, sentences: nn.Module, inputs: Mapping[str, Tensor]) -> None:
    """Raise a PretrainedModelError where what `joined` made differs from sentence-transformers' own."""
    with torch.no_grad():
        expected, found = sentences(dict(inputs))[_OUTPUT], model(**inputs)[_OUTPUT]
    if expected.shape != found.shape or not torch.allclose(expected, found, rtol=1e-4, atol=1e-5):
        raise PretrainedModelError(
            f"hf:{source}: {', '.join(parts(source)[1:])} behind {type(model).__name__} get something else from "
            "sentence-transformers than what the model returns first",
            hint=FACTORY,
        )
