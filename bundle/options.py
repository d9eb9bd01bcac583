"""The options of a generation: which there are, and what values they may have."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from difflib import get_close_matches
from typing import Any, NamedTuple, TypeAlias

import numpy as np
from numpy.typing import NDArray

from offramp.errors import InputError


class _Kind(NamedTuple):
    """``plain`` makes a value the one form that others read, or returns None where it does not fit."""

    expected: str
    plain: Callable[[Any], Any]


def _whole(least: int) -> _Kind:
    return _Kind(f"at least {least}, a whole number", lambda value: _int(value, least))


def _number(expected: str, fits: Callable[[float], bool]) -> _Kind:
    def plain(value: Any) -> float | None:
        if isinstance(value, bool | np.bool_) or not isinstance(value, int | float | np.integer | np.floating):
            return None
        try:
            number = float(value)
        except OverflowError:
            return None
        return number if fits(number) else None

    return _Kind(expected, plain)


def _int(value: Any, least: int) -> int | None:
    if isinstance(value, bool | np.bool_) or not isinstance(value, int | np.integer) or value < least:
        return None
    return int(value)


def _several(value: Any, one: Callable[[Any], Any]) -> tuple[Any, ...] | None:
    if isinstance(value, np.ndarray) and value.ndim == 1:
        value = value.tolist()
    if not isinstance(value, list | tuple):
        return None
    found = tuple(map(one, value))
    return None if None in found else found


def _ids(value: Any) -> tuple[int, ...] | None:
    return _several(value, lambda item: _int(item, 0))


def _text(value: Any) -> str | None:
    return value if isinstance(value, str) and value else None


def _word(value: Any) -> tuple[int, ...] | None:
    return _ids(value) or None


def _early(value: Any) -> bool | str | None:
    if isinstance(value, bool | np.bool_):
        return bool(value)
    return "never" if isinstance(value, str) and value == "never" else None


def _functions(value: Any) -> tuple[Any, ...] | None:
    return _several(value, lambda item: item if callable(item) else None)


_IDS = _Kind("a tuple of token ids, which are at least 0", _ids)
_SHARE = _number("more than 0 and at most 1", lambda value: 0 < value <= 1)

#: What becomes of the deeper blocks of tokens that leave early.
PROPAGATE = ("defer", "hidden", "kv")

OPTIONS: Mapping[str, _Kind] = {
    "prompt": _IDS,
    "stop": _Kind("a tuple of token ids, which are at least 0 (texts: stop_strings)", _ids),
    "stop_strings": _Kind("a tuple of texts", lambda value: _several(value, _text)),
    "suppress": _IDS,
    "suppress_first": _IDS,
    "forced_first": _Kind("a token id, at least 0", lambda value: _int(value, 0)),
    "forced_last": _IDS,
    "bad_words": _Kind("a tuple of tuples of token ids", lambda value: _several(value, _word)),
    "min_length": _whole(0),
    "min_new_tokens": _whole(0),
    "max_length": _whole(0),
    "max_new_tokens": _whole(0),
    "repetition_penalty": _number("from 1e-6 to 1e6", lambda value: 1e-6 <= value <= 1e6),
    "no_repeat_ngram_size": _whole(0),
    "temperature": _number("0 (greedy) or a positive number", lambda value: 0 <= value < math.inf),
    "top_k": _whole(1),
    "top_p": _SHARE,
    "min_p": _number("from 0 to 1", lambda value: 0 <= value <= 1),
    "seed": _whole(0),
    "processors": _Kind("a tuple of functions", _functions),
    "beams": _whole(1),
    "length_penalty": _number("from -10 to 10", lambda value: abs(value) <= 10),
    "early_stopping": _Kind('True, False or "never"', _early),
    "max_pending": _whole(1),
    "pad": _Kind("a token id, at least 0", lambda value: _int(value, 0)),
}


_ELSEWHERE = {  # names that transformers and others give them
    "num_beams": "beams",
    "do_sample": "temperature (0 is greedy)",
    "eos_token_id": "stop",
    "stop_token_ids": "stop",
    "stop_sequences": "stop_strings",
    "max_tokens": "max_new_tokens",
    "min_tokens": "min_new_tokens",
    "bad_words_ids": "bad_words",
    "suppress_tokens": "suppress",
    "begin_suppress_tokens": "suppress_first",
    "forced_bos_token_id": "forced_first",
    "forced_eos_token_id": "forced_last",
    "logits_processor": "processors",
    "random_seed": "seed",
    "pad_token_id": "nothing: rows end by themselves, and are not padded",
    "attention_mask": "nothing: prompts are rows of any lengths, without padding",
    "use_cache": "nothing: generation always does",
    "decoder_start_token_id": "a prompt of that token among the inputs",
    "bos_token_id": "a prompt of that token among the inputs",
    "num_return_sequences": "a batch of the same prompt, with temperature",
    "input_ids": "inputs={'input_ids': ...}",
}


def instead(unknown: Sequence[str], known: Sequence[str]) -> str | None:
    """What to write in place of options that do not exist; None where that cannot be guessed."""
    near = {name: get_close_matches(name, known, 1) for name in unknown}
    found = {name: _ELSEWHERE.get(name) or "".join(near[name]) for name in unknown}
    return "; ".join(f"for {name}, {other}" for name, other in found.items() if other) or None


def read(name: str, value: Any) -> Any:
    """An option's value in the form that is worked with: Python's numbers, and tuples for sequences.

    Raises:
        InputError: the value does not fit.
    """
    plain = OPTIONS[name].plain(value)
    if plain is None:
        raise InputError(f"{name} is {value!r}, expected {OPTIONS[name].expected}")
    return plain


LogitProcessor: TypeAlias = Callable[[NDArray[np.int64], NDArray[np.float32]], NDArray[np.float32]]
"""``(tokens, logits) -> logits``: prompt and emitted tokens so far, int64 [n]; logits float32 [vocabulary], its own
copy. Minus infinity bans a token."""


@dataclass(frozen=True, slots=True)
class Sampling:
    """How tokens are chosen: the options of `Chain.stream` and `Chain.generate`. None stands for a default.

    What changes logits comes in this order: ``repetition_penalty``, ``processors``, ``no_repeat_ngram_size``,
    ``bad_words``, lengths before ``stop``, ``forced_first``, ``forced_last``, ``suppress``, ``suppress_first``; then,
    for draws, ``temperature``, ``top_k``, ``top_p``, ``min_p``. That is transformers' order, but for ``processors``,
    which come last there.

    Attributes:
        temperature: Divides the logits; 0 is greedy: the highest logit, the first of equals.
        top_k: Draw from the k highest logits only (and whatever equals the k-th); greedy takes no notice.
        top_p: Draw from the smallest set of tokens whose probabilities reach it (nucleus sampling, arXiv
            1904.09751, 3.1); greedy takes no notice.
        seed: The same seed draws the same tokens for the same row of a batch; None draws others each time.
        stop: The token ids that end a row.
        suppress: Token ids that are never chosen.
        suppress_first: Token ids that are not chosen as a row's first, or as the one after ``forced_first``.
        min_new_tokens: How many tokens a row has before ``stop`` may be chosen.
        max_new_tokens: How many tokens a row has at most; None leaves it to ``max_length``, else to the room in the
            caches, or where these have no limit to 256.
        processors: Functions that change the logits, one after the other.
        min_p: Draw from tokens at least so likely as this times the likeliest (arXiv 2407.01082).
        stop_strings: Texts that end a row once its tokens spell one, which only a tokenizer can tell.
        forced_first: The first new token, where prompts are one token long.
        forced_last: Token ids, of which one is chosen where ``max_new_tokens`` or ``max_length`` leave one place.
        bad_words: Sequences of token ids that are never completed; single tokens of ``stop`` do not count.
        min_length: As ``min_new_tokens``, with the tokens of the longest prompt; that one comes before it.
        max_length: As ``max_new_tokens``, with the tokens of the longest prompt; that one comes before it.
        repetition_penalty: Divides positive logits of tokens that prompt or text have already, multiplies others.
        no_repeat_ngram_size: No sequence of so many tokens comes twice in prompt and text; 0 allows all.
        beams: How many texts of each row beam search keeps; 1 is no beam search.
        length_penalty: A text's score is its log-probability over the number of its tokens to this power.
        early_stopping: When beam search ends for a row with as many ended texts as beams: at once (True), when the best
            beam is no better at its length (False), or when it cannot become better ("never").

    Raises:
        InputError: values that make no sense. All problems are in one message.
    """

    temperature: float = 0.0
    top_k: int | None = None
    top_p: float | None = None
    seed: int | None = None
    stop: tuple[int, ...] = ()
    suppress: tuple[int, ...] = ()
    suppress_first: tuple[int, ...] = ()
    min_new_tokens: int = 0
    max_new_tokens: int | None = None
    processors: tuple[LogitProcessor, ...] = ()
    min_p: float | None = None
    stop_strings: tuple[str, ...] = ()
    forced_first: int | None = None
    forced_last: tuple[int, ...] = ()
    bad_words: tuple[tuple[int, ...], ...] = ()
    min_length: int | None = None
    max_length: int | None = None
    repetition_penalty: float = 1.0
    no_repeat_ngram_size: int = 0
    beams: int = 1
    length_penalty: float = 1.0
    early_stopping: bool | str = False

    def __post_init__(self) -> None:
        problems = []
        for field in fields(self):
            value = getattr(self, field.name)
            try:
                plain = field.default if value is None else read(field.name, value)
                object.__setattr__(self, field.name, plain)
            except InputError as error:
                problems.append(str(error))
        if not problems and self.max_new_tokens is not None and self.min_new_tokens > self.max_new_tokens:
            problems = [f"min_new_tokens is {self.min_new_tokens}, more than max_new_tokens, {self.max_new_tokens}"]
        if problems:
            raise InputError("\n  ".join(problems))


def token_lists(sampling: Sampling) -> dict[str, tuple[int, ...]]:
    """All token ids that the options name, by option."""
    names = ("stop", "suppress", "suppress_first", "forced_last")
    lists: dict[str, tuple[int, ...]] = {name: getattr(sampling, name) for name in names}
    lists["forced_first"] = () if sampling.forced_first is None else (sampling.forced_first,)
    lists["bad_words"] = tuple(id_ for word in sampling.bad_words for id_ in word)
    return lists
