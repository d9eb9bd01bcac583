"""What values the options of a generation may have; each is read into one plain form, or refused in the same words."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np

from offramp.runtime.errors import InputError


class _Kind(NamedTuple):
    """``plain`` makes a value the one form that others read, or returns None where it does not fit."""

    expected: str
    plain: Callable[[Any], Any]


def _whole(least: int) -> _Kind:
    return _Kind(f"a whole number, at least {least}", lambda value: _int(value, least))


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

OPTIONS: Mapping[str, _Kind] = {
    "prompt": _IDS,
    "stop": _IDS,
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
    "repetition_penalty": _number("more than 0", lambda value: 0 < value < math.inf),
    "no_repeat_ngram_size": _whole(0),
    "temperature": _number("0 (greedy) or a positive number", lambda value: 0 <= value < math.inf),
    "top_k": _whole(1),
    "top_p": _SHARE,
    "min_p": _number("from 0 to 1", lambda value: 0 <= value <= 1),
    "seed": _whole(0),
    "processors": _Kind("a tuple of functions", _functions),
    "beams": _whole(1),
    "length_penalty": _number("a finite number", math.isfinite),
    "early_stopping": _Kind('True, False or "never"', _early),
    "pad": _Kind("a token id, at least 0", lambda value: _int(value, 0)),
}


def read(name: str, value: Any) -> Any:
    """An option's value in the form that is worked with: Python's numbers, and tuples for sequences.

    Raises:
        InputError: the value does not fit.
    """
    plain = OPTIONS[name].plain(value)
    if plain is None:
        raise InputError(f"{name} is {value!r}, expected {OPTIONS[name].expected}")
    return plain
