"""A tokenizer of transformers as a file and settings of a bundle; how a model takes padding is tried on the model."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Collection, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import tokenizers
import torch
import transformers
from torch import Tensor
from transformers.utils import cached_file

from offramp.bundle.preprocessing import Text
from offramp.pretrained.example_inputs import embedded, setting
from offramp.program.unwrap import unchanged

if TYPE_CHECKING:
    from transformers import PreTrainedModel

TOKENS, MASK, TYPES = "input_ids", "attention_mask", "token_type_ids"
PROCESSORS = ("preprocessor_config.json", "processor_config.json")
_FILES = ("tokenizer.json", "tokenizer_config.json", "vocab.json", "vocab.txt", "spiece.model", "tokenizer.model")
_SENTENCE_MODELS = ("bert", "roberta", "distilbert", "camembert", "albert", "xlm-roberta", "xlnet")
_PADDING = 3
_TOLERANCE = 2e-5  # of an output's greatest value: rounding, and less than what tokens that are read do
_UNLIMITED = 10**9  # what tokenizers say that know no limit is far beyond
_SAMPLES = ("A small test, isn't it?", "42 Bäume\n und  mehr", "x")
MARK_OF_TEXT = "OFFRAMPTEXT"


def load(source: str) -> Any | None:
    """The tokenizer of a directory or hub id; None where there is none.

    Raises:
        ValueError: there is one, and transformers cannot load it.
    """
    found = loaded(transformers.AutoTokenizer, source, _FILES)
    if found is None:
        return None
    known = set(found.get_vocab().values()) - set(found.all_special_ids)
    if not known:
        return None  # without files some classes make one that knows no word
    if length := _sentences(source):
        found.model_max_length = length
    return found


def _sentences(source: str) -> int | None:
    """After how many tokens sentence-transformers cuts a text off, where it wrote the directory."""
    names = [f"sentence_{kind}_config.json" for kind in _SENTENCE_MODELS[: None if Path(source).is_dir() else 1]]
    settings: dict[str, Any] = next(filter(None, (read_json(source, name) for name in names)), {})
    options = settings.get("processor_kwargs") or settings.get("tokenizer_args") or {}
    length = settings.get("max_seq_length") or options.get("model_max_length")
    return length if isinstance(length, int) and length > 0 else None


def read_json(source: str, name: str) -> Any:
    """What a file of a directory or hub id holds; None where it has none, or is neither."""
    found = Path(source, name) if Path(source).is_dir() else _downloaded(source, name)
    return json.loads(found.read_text(encoding="utf-8")) if found and found.is_file() else None


@functools.cache
def _downloaded(source: str, name: str) -> Path | None:
    """A file of a hub id; asked for once, since a machine that does not reach the hub tries for long."""
    try:
        return Path(cached_file(source, name))
    except OSError:
        return None


def loaded(loader: Any, source: str, files: Collection[str], **options: Any) -> Any | None:
    """What ``loader.from_pretrained`` makes of a directory with one of the files, or of a hub id; else None.

    Raises:
        ValueError: there are files, and transformers cannot load them.
    """
    folder = Path(source)
    if folder.is_dir() and not any((folder / name).is_file() for name in files):
        return None
    try:
        return loader.from_pretrained(source, trust_remote_code=False, **options)
    except Exception as error:
        if not folder.is_dir() and isinstance(error, (OSError, ValueError)):
            return None
        raise ValueError(f"transformers cannot load it: {reason(error)}") from error


def reason(error: Exception) -> str:
    """The first line of an error's message, its kind where it has none."""
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__


def as_json(tokenizer: Any) -> str:
    """The text of a ``tokenizer.json`` that encodes as the tokenizer does, or, of CTC, decodes as it does.

    Raises:
        ValueError: there is no such file for its class.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None and getattr(tokenizer, "word_delimiter_token", None) is not None:
        return _ctc(tokenizer)
    if backend is None:
        raise ValueError(f"{type(tokenizer).__name__} has no form that the package tokenizers reads")
    made = tokenizers.Tokenizer.from_str(backend.to_str())
    made.no_padding()
    made.no_truncation()
    for text in _SAMPLES:
        expected = tokenizer(text)[TOKENS]
        found = made.encode(text).ids
        if found != list(expected):
            raise ValueError(
                f"{type(tokenizer).__name__} encodes {text!r} as {expected}, its tokenizer.json as {found}"
            )
    return str(made.to_str())


def _ctc(tokenizer: Any) -> str:
    """Characters, whose decoder leaves repetitions and blanks out."""
    vocabulary = dict(tokenizer.get_vocab())
    made = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, tokenizer.unk_token or ""))
    between, space = tokenizer.word_delimiter_token, getattr(tokenizer, "replace_word_delimiter_char", " ")
    changes = [(between, space)]
    if getattr(tokenizer, "do_lower_case", False):
        changes += [(sign, sign.lower()) for sign in vocabulary if len(sign) == 1 and sign != sign.lower()]
    parts: list[Any] = [tokenizers.decoders.CTC(tokenizer.pad_token, between, cleanup=False)]
    parts += [tokenizers.decoders.Replace(*change) for change in changes]
    made.decoder = tokenizers.decoders.Sequence(parts)
    return str(made.to_str())


def template(tokenizer: Any) -> str | None:
    """The chat template around one message of a user, with ``{text}`` for that; None where there is no template.

    Raises:
        ValueError: the template fails, or what comes out does not have the message once.
    """
    if not getattr(tokenizer, "chat_template", None):
        return None
    problem = ""
    for content in (MARK_OF_TEXT, [{"type": "text", "text": MARK_OF_TEXT}]):
        try:
            text = tokenizer.apply_chat_template(
                [{"role": "user", "content": content}], tokenize=False, add_generation_prompt=True
            )
        except Exception as error:  # noqa: BLE001 - a template is a program of somebody
            problem = problem or f"it fails: {reason(error)}"
            continue
        if text.count(MARK_OF_TEXT) == 1 and "{text}" not in text:
            return str(text.replace(MARK_OF_TEXT, "{text}"))
        problem = problem or f"it has a user's message {text.count(MARK_OF_TEXT)} times"
    raise ValueError(problem)


def note_day(processor: Any, note: Callable[[str], object]) -> None:
    """Say where a chat template asks what day it is."""
    if "strftime_now" in str(processor.chat_template):
        note("the chat template writes the day: texts of the bundle have today's")


def text_settings(tokenizer: Any, model: PreTrainedModel, inputs: Mapping[str, Tensor]) -> Text:
    """How rows of text become one batch for the model.

    ``inputs`` are example inputs with token ids ``[batch, tokens]``.
    """
    side = getattr(tokenizer, "padding_side", "right")
    types = int(getattr(tokenizer, "pad_token_type_id", 0) or 0)
    sides = (side, *({"right", "left"} - {side}))
    ways = ((pad, way) for way in sides for pad in _pads(tokenizer, model))
    fitting = next(((pad, way) for pad, way in ways if _is_neutral(model, inputs, pad, way, types)), None)
    pad, side = fitting or (None, "right")
    bare = {name: value for name, value in inputs.items() if name != MASK}
    return Text(
        pad=pad,
        pad_side=side,
        needs_mask=pad is None or not _is_neutral(model, bare, pad, side, types),
        pad_type=types,
        limit=_limit(tokenizer, model),
        cut_side=getattr(tokenizer, "truncation_side", "right"),
    )


def _pads(tokenizer: Any, model: PreTrainedModel) -> Iterator[int]:
    """Ids that may be padding: the model's own, the tokenizer's, an end, any."""
    config = model.config
    ends = setting(config, "eos_token_id", None)
    found = (
        setting(config, "pad_token_id", None),
        getattr(tokenizer, "pad_token_id", None),
        ends[0] if isinstance(ends, (list, tuple)) and ends else ends,
        0,
    )
    size = embedded(model) or setting(config, "vocab_size", 0)
    yield from dict.fromkeys(pad for pad in found if isinstance(pad, int) and 0 <= pad < size)


def _is_neutral(model: PreTrainedModel, inputs: Mapping[str, Tensor], pad: int, side: str, types: int) -> bool:
    """Whether a row gives with padding what it gives alone."""
    row = {name: value[:1] for name, value in inputs.items()}
    tokens = row.get(TOKENS)
    if tokens is None or tokens.ndim != 2:
        return False
    fillers = {TOKENS: pad, MASK: 0, TYPES: types}
    row |= {MASK: torch.ones_like(tokens)} if MASK in row else {}
    if unknown := [name for name in row if name not in fillers and row[name].shape == tokens.shape]:
        return not unknown  # positions, for example: what padding they want is not known
    around = (0, _PADDING) if side == "right" else (_PADDING, 0)
    padded = {
        name: torch.nn.functional.pad(value, around, value=fillers[name]) if name in fillers else value
        for name, value in row.items()
    }
    try:
        with torch.no_grad(), unchanged(model):
            alone, together = list(_tensors(model(**row))), list(_tensors(model(**padded)))
    except Exception:  # noqa: BLE001 - a model that takes no padding may fail in any way
        return False
    return len(alone) == len(together) and all(
        _agree(one, other, side) for one, other in zip(alone, together, strict=True)
    )


def _tensors(value: Any) -> Iterator[Tensor]:
    """The floats in a model's output."""
    if isinstance(value, Tensor):
        if value.is_floating_point():
            yield value
    elif isinstance(value, Mapping):
        for item in value.values():
            yield from _tensors(item)
    elif isinstance(value, (tuple, list)):
        for item in value:
            yield from _tensors(item)


def _agree(alone: Tensor, together: Tensor, side: str) -> bool:
    """Whether two outputs are the same but for places of padding, along any axes."""
    if alone.ndim != together.ndim:
        return False
    for axis, size in enumerate(alone.shape):
        if together.shape[axis] == size + _PADDING:
            together = together.narrow(axis, 0 if side == "right" else _PADDING, size)
    if alone.shape != together.shape:
        return False
    if not alone.numel():
        return True
    return bool((alone - together).abs().max() <= _TOLERANCE * alone.abs().max())


def _limit(tokenizer: Any, model: PreTrainedModel) -> int | None:
    """Tokens that the model takes at most, by its table of positions and its tokenizer."""
    found = []
    length = int(getattr(tokenizer, "model_max_length", 0) or 0)
    if 0 < length < _UNLIMITED:
        found.append(length)
    positions = setting(model.config, "max_position_embeddings", None)
    if isinstance(positions, int) and positions > 0:
        found.append(positions - _reserved(model, positions))
    return min(found, default=None)


def _reserved(model: PreTrainedModel, positions: int) -> int:
    """Places of a table of positions that no token has: those up to the one of padding."""
    for module in model.modules():
        if isinstance(module, torch.nn.Embedding) and module.num_embeddings == positions and module.padding_idx:
            return int(module.padding_idx) + 1
    return 0
