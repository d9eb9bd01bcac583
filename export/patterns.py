"""A precision by patterns of segments' names: which pattern takes which segment, and how that is written."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase

from offramp.bundle.manifest import Manifest
from offramp.errors import ExportError

_FIRST, _LAST = 6, 4  # of many names that are listed


def pattern_of(patterns: Mapping[str, str], segment: str) -> str | None:
    """The first pattern that matches a segment's name; None where none does."""
    return next((pattern for pattern in patterns if fnmatchcase(segment, pattern)), None)


def check_patterns(patterns: Mapping[str, str], segments: Sequence[str]) -> None:
    """ExportError where a pattern takes no segment: none has such a name, or patterns before it take them all."""
    wrong = [pattern for pattern in patterns if pattern not in in_use(patterns, segments)]
    if not wrong:
        return
    if unknown := [pattern for pattern in wrong if not any(fnmatchcase(name, pattern) for name in segments)]:
        known = {pattern: item for pattern, item in patterns.items() if pattern not in wrong}
        known.setdefault("*", patterns[unknown[0]])
        raise ExportError(
            f"precision: no segment's name matches {', '.join(map(repr, unknown))}; there are {listed(segments)}",
            hint=f"{written(in_use(known, segments))}, where * is every segment that is left",
        )
    first = {pattern: patterns[pattern] for pattern in wrong}
    before = dict.fromkeys(pattern_of(patterns, name) for name in segments if pattern_of(first, name))
    raise ExportError(
        f"precision: {', '.join(map(repr, wrong))} takes no segment, as the first pattern that matches counts: "
        f"{', '.join(map(repr, before))}",
        hint=written(in_use({**first, **patterns}, segments)),
    )


def raised(precision: str | Mapping[str, str], manifest: Manifest) -> str | None:
    """How to say that precision with one of the bundle's encoded segments in fp32; None where that is all of them.

    Nor can it be said of "auto", which is of a whole bundle.
    """
    files = [item.file for item in manifest.segments.values()]
    alone = [
        name for name, item in manifest.segments.items() if item.encoding != "fp32" and files.count(item.file) == 1
    ]
    if not alone or len(set(files)) == 1 or precision == "auto":
        return None
    given = {"*": precision} if isinstance(precision, str) else precision
    patterns = {alone[-1]: "fp32", **{key: item for key, item in given.items() if key != alone[-1]}}
    return written(in_use(patterns, list(manifest.segments)))


def in_use(patterns: Mapping[str, str], segments: Sequence[str]) -> dict[str, str]:
    """The patterns that take a segment."""
    used = {pattern_of(patterns, name) for name in segments}
    return {pattern: item for pattern, item in patterns.items() if pattern in used}


def written(patterns: Mapping[str, str]) -> str:
    """How patterns are given to ``save``, and to the command line."""
    python = ", ".join(f'"{pattern}": "{item}"' for pattern, item in patterns.items())
    command = ",".join(f"{pattern}={item}" for pattern, item in patterns.items())
    return f"precision={{{python}}}, or --precision '{command}'"


def listed(names: Sequence[str]) -> str:
    """Names, those in the middle left out where there are many."""
    if len(names) <= _FIRST + _LAST:
        return ", ".join(names)
    return ", ".join([*names[:_FIRST], f"({len(names) - _FIRST - _LAST} more)", *names[-_LAST:]])
