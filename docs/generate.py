"""Write docs/cli.md from the command line's own help, and docs/api.md from docstrings: python docs/generate.py."""

from __future__ import annotations

import argparse
import importlib
import inspect
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from offramp.cli import build_parser

PAGE = Path(__file__).with_name("cli.md")
API = Path(__file__).with_name("api.md")
_TOP = """# The command line

`python docs/generate.py` writes this page; a test checks that it is current.

| exit status | meaning |
|---|---|
| 0 | ok |
| 1 | refused or wrong; stderr has one line `offramp: STAGE: what happened`, and one that says what to try |
| 2 | usage |
"""
_API_TOP = """# Public names

`python docs/generate.py` writes this page from signatures and docstrings; a test checks that it is current.
"""
_MODULES = ("offramp", "offramp.calibration", "offramp.training", "offramp.zoo")
_SHORT = 110  # characters of a signature in one line


def page() -> str:
    """The help of ``offramp`` and of every subcommand, as Markdown."""
    parser = build_parser()
    commands = next(action for action in parser._actions if isinstance(action, argparse._SubParsersAction))
    parts = [_TOP, _section("offramp", parser)]
    parts += [_section(f"offramp {name}", command) for name, command in commands.choices.items()]
    return "\n".join(parts)


def _section(title: str, parser: argparse.ArgumentParser) -> str:
    return f"## {title}\n\n```text\n{parser.format_help()}```\n"


def api() -> str:
    """Every public name with its signature and docstring, each once, as Markdown."""
    seen: set[int] = set()
    parts = [_API_TOP]
    for module in map(importlib.import_module, _MODULES):
        found = {name: getattr(module, name) for name in sorted(module.__all__)}
        parts.append(f"## {module.__name__}\n")
        parts += [_entry(name, item) for name, item in found.items() if id(item) not in seen]
        seen |= set(map(id, found.values()))
    return "\n".join(parts)


def _entry(name: str, item: Any) -> str:
    parts = [f"### {name}\n", _described(name, item)]
    for method, function in _methods(item):
        parts.append(f"**{name}.{method}**\n\n{_described(method, function)}")
    return "\n".join(parts)


def _described(name: str, item: Any) -> str:
    signature = "" if isinstance(item, property) else f"```python\n{_signature(name, item)}\n```\n\n"
    return f"{signature}```text\n{inspect.getdoc(item) or ''}\n```\n"


class _Text(str):
    """An annotation that is shown as it was written."""

    __repr__ = str.__str__


def _signature(name: str, item: Any) -> str:
    if inspect.isclass(item) and issubclass(item, BaseException | dict):
        return f"class {name}({', '.join(base.__name__ for base in item.__bases__)})"
    found = inspect.signature(item)
    given = [
        one.replace(annotation=_Text(one.annotation)) if isinstance(one.annotation, str) else one
        for one in found.parameters.values()
        if one.name not in ("self", "cls")
    ]
    answer = "" if inspect.isclass(item) or not isinstance(found.return_annotation, str) else found.return_annotation
    ending = f") -> {answer}" if answer else ")"
    short = f"{name}({', '.join(_starred(given))}{ending}"
    return short if len(short) <= _SHORT else "\n".join([f"{name}(", *(f"    {x}," for x in _starred(given)), ending])


def _starred(given: Sequence[inspect.Parameter]) -> list[str]:
    """The parameters as text, with the star before those that have to be named."""
    shown = list(map(str, given))
    named = [one.kind is inspect.Parameter.KEYWORD_ONLY for one in given]
    if True in named and not any(one.kind is inspect.Parameter.VAR_POSITIONAL for one in given):
        shown.insert(named.index(True), "*")
    return shown


def _methods(item: Any) -> Iterator[tuple[str, Any]]:
    """Public methods and properties that a class documents itself."""
    if not inspect.isclass(item) or issubclass(item, dict):
        return
    for name, value in vars(item).items():
        function = value.__func__ if isinstance(value, classmethod | staticmethod) else value
        if name[0] != "_" and (inspect.isfunction(function) or isinstance(function, property)) and function.__doc__:
            yield name, function


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
    API.write_text(api(), encoding="utf-8")
