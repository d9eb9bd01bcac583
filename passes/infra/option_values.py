"""Values of passes' options as text, read by the options' type hints.

``None``, booleans (``true``, ``false``), whole and other numbers, text, the choices of a ``Literal``, tuples (items
joined by ``|``), and unions of these. What stands in a pass's ``repr`` reads back as the value that it shows.
"""

from __future__ import annotations

import re
import types
import typing
from collections.abc import Iterable
from typing import Any, Literal, Union, get_args, get_origin

_PATTERNS: dict[Any, re.Pattern[str]] = {
    int: re.compile(r"[+-]?[0-9]+"),
    float: re.compile(r"[+-]?(([0-9]+\.?[0-9]*|\.[0-9]+)(e[+-]?[0-9]+)?|inf)", re.IGNORECASE),
    str: re.compile(r".*"),
}
_BOOLS = {"true": True, "false": False}
_WORDS: dict[Any, str] = {
    types.NoneType: "None",
    bool: "true or false",
    int: "a whole number",
    float: "a number",
    str: "text",
}


def read(text: str, hint: Any) -> Any:
    """The value of type ``hint`` that ``text`` writes.

    Where it writes values of several types of a union, ``None`` and choices come first, then the order of the union,
    and plain text last.

    Raises:
        ValueError: it writes none; the message says what would be read.
        TypeError: values of this type have no text.
    """
    kinds = sorted(_members(hint), key=_rank)
    for kind in filter(_writable, kinds):
        try:
            return _read_one(text, kind)
        except ValueError:
            continue
    if not all(map(_writable, kinds)):
        raise TypeError(" or ".join(map(_word, kinds)))
    raise ValueError(" or ".join(map(_word, kinds)))


def _members(hint: Any) -> Iterable[Any]:
    return get_args(hint) if get_origin(hint) in (Union, types.UnionType) else (hint,)


def _rank(kind: Any) -> int:
    return 0 if kind is types.NoneType or get_origin(kind) is Literal else 2 if kind is str else 1


def _read_one(text: str, kind: Any) -> Any:
    if get_origin(kind) is Literal:
        return {str(choice): choice for choice in get_args(kind)}[_among(text, map(str, get_args(kind)))]
    if _is_tuple(kind):
        return tuple(read(item.strip(), get_args(kind)[0]) for item in text.split("|"))
    if kind is types.NoneType:
        return {"None": None}[_among(text, ["None"])]
    if kind is bool:
        return _BOOLS[_among(text.lower(), _BOOLS)]
    return kind(_matching(text, _PATTERNS[kind]))


def _writable(kind: Any) -> bool:
    if _is_tuple(kind):
        return all(map(_writable, _members(get_args(kind)[0])))
    return get_origin(kind) is Literal or kind in _WORDS


def _is_tuple(kind: Any) -> bool:
    """Whether a type is a tuple of any length."""
    return get_origin(kind) is tuple and get_args(kind)[1:] == (Ellipsis,)


def _among(text: str, known: Iterable[str]) -> str:
    if text not in known:
        raise ValueError(text)
    return text


def _matching(text: str, pattern: re.Pattern[str]) -> str:
    if not pattern.fullmatch(text):
        raise ValueError(text)
    return text


def _word(kind: Any) -> str:
    if get_origin(kind) is Literal:
        return " or ".join(map(str, get_args(kind)))
    if _is_tuple(kind):
        return f"{' or '.join(map(_word, _members(get_args(kind)[0])))} (several joined by |)"
    return _WORDS.get(kind, str(kind))


def hints(kind: type) -> dict[str, Any]:
    """The types of a pass's options by name.

    Raises:
        TypeError: a hint cannot be resolved (its name is imported for type checkers only, say).
    """
    try:
        return typing.get_type_hints(kind)
    except NameError as error:
        raise TypeError(str(error)) from error
