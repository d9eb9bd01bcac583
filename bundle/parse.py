"""JSON to dataclasses, by their type hints; every problem is collected, with the path to its field."""

from __future__ import annotations

import dataclasses
import functools
import json
import types
from collections.abc import Mapping
from typing import Any, Union, get_args, get_origin, get_type_hints

_WORDS = {bool: "true or false", int: "a whole number", str: "a text", float: "a number", type(None): "null"}


def decode(kind: Any, data: object, where: str, problems: list[str]) -> Any:
    """``data``, as json.loads gives it, as a ``kind``; what does not fit is appended to ``problems``.

    ``kind`` is built of dataclasses, Mapping[str, ...], tuples, unions, int, str, float and Any. A field
    without a default must be there, a field that the dataclass does not have must not. With problems, the
    result is not to be used.
    """
    origin, arguments = get_origin(kind), get_args(kind)
    if kind is Any:
        return data
    if dataclasses.is_dataclass(kind):
        return _record(kind, data, where, problems)
    if origin in (Union, types.UnionType):
        fitting = [option for option in arguments if _fits(option, data)]
        return decode(fitting[0] if fitting else arguments[0], data, where, problems)
    if not _fits(kind, data):
        problems.append(f"{where}: expected {_name(kind)}, found {_show(data)}")
        return None
    if isinstance(data, dict):
        return {key: decode(arguments[1], item, f"{where}.{key}", problems) for key, item in data.items()}
    if isinstance(data, list):
        if arguments[-1] is Ellipsis:
            arguments = (arguments[0],) * len(data)
        if len(arguments) != len(data):
            problems.append(f"{where}: expected {len(arguments)} items, found {len(data)}")
        items = enumerate(zip(arguments, data, strict=False))
        return tuple(decode(option, item, f"{where}[{i}]", problems) for i, (option, item) in items)
    return data


def _record(kind: Any, data: object, where: str, problems: list[str]) -> Any:
    if not isinstance(data, dict):
        problems.append(f"{where or 'the manifest'}: expected an object, found {_show(data)}")
        return None
    hints = _hints(kind)
    dot = f"{where}." if where else ""
    found = {}
    for field in dataclasses.fields(kind):
        if field.name in data:
            found[field.name] = decode(hints[field.name], data[field.name], dot + field.name, problems)
        elif field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING:
            problems.append(f"{dot}{field.name}: missing")
    problems.extend(f"{dot}{key}: unknown field" for key in data if key not in hints)
    return None if problems else kind(**found)


@functools.cache
def _hints(kind: Any) -> dict[str, Any]:
    return get_type_hints(kind)


def _fits(kind: Any, data: object) -> bool:
    """Whether the outermost type of ``data`` is the one that ``kind`` asks for."""
    origin = get_origin(kind)
    if kind is Any:
        return True
    if dataclasses.is_dataclass(kind) or _is_mapping(origin):
        return isinstance(data, dict)
    if origin is tuple:
        return isinstance(data, list)
    if kind is float:
        return isinstance(data, int | float) and not isinstance(data, bool)
    return isinstance(data, kind) and (kind is bool or not isinstance(data, bool))


def _is_mapping(origin: Any) -> bool:
    return isinstance(origin, type) and issubclass(origin, Mapping)


def _name(kind: Any) -> str:
    if get_origin(kind) is tuple:
        return "a list"
    return "an object" if _is_mapping(get_origin(kind)) else _WORDS.get(kind, str(kind))


def _show(data: object) -> str:
    text = json.dumps(data, ensure_ascii=False, default=repr)
    return text if len(text) <= 60 else text[:57] + "..."
