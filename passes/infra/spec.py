"""Pipeline text: ``"insert-exits{stack=encoder,after=2|4},insert-scores{measure=top1}"``."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import fields
from typing import Any

from offramp.errors import SpecError
from offramp.passes.infra.contract import Pass
from offramp.passes.infra.option_values import hints, read
from offramp.passes.infra.registry import pass_named

_ITEM = re.compile(r"\s*([a-z][a-z0-9-]*)\s*(?:\{([^{}]*)\})?\s*(,|$)")


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
        try:
            kind = pass_named(match[1])
        except SpecError as error:
            problems.append(error.reason)
            continue
        options, wrong = _options(kind, match[2] or "")
        problems += wrong
        if not wrong:
            passes.append(kind(**options))
    if problems:
        raise SpecError("; ".join(problems))
    return passes


def _options(kind: type[Pass], text: str) -> tuple[dict[str, Any], list[str]]:
    known = [item.name for item in fields(kind)]
    options: dict[str, Any] = {}
    problems = []
    for part in filter(None, (part.strip() for part in text.split(","))):
        name, sign, value = (piece.strip() for piece in part.partition("="))
        if not sign or name not in known:
            problems.append(f"{kind.name} has no option {name!r}; it has {', '.join(known) or 'none'}")
            continue
        if name in options:
            problems.append(f"{kind.name} has the option {name!r} twice")
        try:
            options[name] = read(value, hints(kind)[name])
        except TypeError as error:
            problems.append(f"{kind.name}: {name} cannot be written as text ({error}): give apply the pass itself")
        except ValueError as error:
            problems.append(f"{kind.name}: {name}={value} is not {error}")
    return options, problems


def as_passes(passes: str | Pass | Sequence[str | Pass]) -> list[Pass]:
    """A pipeline in any of the forms that ``apply`` takes.

    Raises:
        SpecError: something is neither a pass nor text that can be read.
    """
    if isinstance(passes, str):
        return parse(passes)
    if isinstance(passes, Pass):
        return [passes]
    if not isinstance(passes, Sequence):
        hint = f"{passes.__name__}(...)" if isinstance(passes, type) else 'offramp.InsertExits(...), or "insert-exits"'
        raise SpecError(f"{passes!r} is no pass", hint=hint)
    return [found for item in passes for found in as_passes(item)]
