"""Pipeline text: ``"insert-exits{stack=encoder,after=2|4},insert-scores{measure=top1}"``."""

from __future__ import annotations

import importlib
import pkgutil
import re
from collections.abc import Sequence
from dataclasses import fields
from functools import cache
from typing import Any

from offramp.errors import SpecError
from offramp.passes.infra.base import Pass

_ITEM = re.compile(r"\s*([a-z][a-z0-9-]*)\s*(?:\{([^{}]*)\})?\s*(,|$)")


@cache
def registry() -> dict[str, type[Pass]]:
    """Every pass by its name: the dataclasses with a ``name`` in the modules of ``offramp.passes``."""
    import offramp.passes as room

    found: dict[str, type[Pass]] = {}
    for module in pkgutil.iter_modules(room.__path__):
        if not module.ispkg:
            for item in vars(importlib.import_module(f"offramp.passes.{module.name}")).values():
                if isinstance(item, type) and issubclass(item, Pass) and "name" in vars(item):
                    found[item.name] = item
    return dict(sorted(found.items()))


def parse(text: str) -> list[Pass]:
    """The passes that a pipeline text names.

    Raises:
        SpecError: naming every unknown pass, unknown option and value that cannot be read.
    """
    passes: list[Pass] = []
    problems: list[str] = []
    at, text = 0, text.strip()
    while at < len(text):
        match = _ITEM.match(text, at)
        if match is None:
            raise SpecError(
                f"cannot read the pipeline at {text[at:]!r}",
                hint='write it like "insert-exits{stack=encoder,after=2|4},insert-scores{measure=top1}"',
            )
        at = match.end()
        kind = registry().get(match[1])
        if kind is None:
            problems.append(f"unknown pass {match[1]!r}; there are {', '.join(registry())}")
            continue
        options, wrong = _options(kind, match[2] or "")
        problems += wrong
        if not wrong:
            passes.append(kind(**options))
    if problems:
        raise SpecError("; ".join(problems))
    return passes


def _options(kind: type[Pass], text: str) -> tuple[dict[str, Any], list[str]]:
    known = {item.name: item for item in fields(kind)}
    options: dict[str, Any] = {}
    problems = []
    for part in filter(None, (part.strip() for part in text.split(","))):
        name, sign, value = part.partition("=")
        if not sign or name.strip() not in known:
            problems.append(f"{kind.name} has no option {name.strip()!r}; it has {', '.join(known) or 'none'}")
            continue
        if name.strip() in options:
            problems.append(f"{kind.name} has the option {name.strip()!r} twice")
        options[name.strip()] = _value(value.strip(), "tuple" in str(known[name.strip()].type))
    return options, problems


def _value(text: str, many: bool) -> Any:
    if many and text != "all":
        return tuple(_scalar(item.strip()) for item in text.split("|"))
    return _scalar(text)


def _scalar(text: str) -> Any:
    if text == "None":
        return None
    return int(text) if re.fullmatch(r"-?\d+", text) else text


def as_passes(passes: str | Pass | Sequence[Pass]) -> list[Pass]:
    """A pipeline in any of the forms that ``apply`` takes."""
    if isinstance(passes, str):
        return parse(passes)
    return [passes] if isinstance(passes, Pass) else list(passes)
