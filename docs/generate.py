"""Write what documentation says of the code: python docs/generate.py.

That is docs/cli.md from the command line's own help, docs/api.md from docstrings, and the picture of the rooms in
docs/design.md from imports.
"""

from __future__ import annotations

import argparse
import ast
import importlib
import inspect
import textwrap
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, ForwardRef

from offramp.cli import build_parser
from offramp.cli._policy import SPECS

PAGE = Path(__file__).with_name("cli.md")
API = Path(__file__).with_name("api.md")
DESIGN = Path(__file__).with_name("design.md")
ROOT = Path(__file__).resolve().parents[1]
_TOP = """# The command line

`python docs/generate.py` writes this page; a test checks that it is current.

| exit status | meaning |
|---|---|
| 0 | ok |
| 1 | refused or wrong; stderr has `offramp: STAGE: what happened`, and perhaps a line that says what to try (`check` \
prints its verdict on stdout) |
| 2 | usage |
| 130 | interrupted |
| 141 | what read stdout has ended, as `head` does |

`hf:` takes a directory that `save_pretrained` wrote, one with an adapter of peft, which is merged into its base (needs
peft), or an id of the hub. `--policy` takes one of these forms; a number before `=` is an exit's blocks:
{policies}

Translations to ONNX are kept in `$OFFRAMP_CACHE`, else in `$XDG_CACHE_HOME/offramp` or `~/.cache/offramp`; with
`OFFRAMP_CACHE=` they are not. Examples and benchmarks read their data in `$OFFRAMP_DATA`, else in `../shared/data`, and
benchmarks run other engines by the Python that `$OFFRAMP_PEERS_PYTHON` names.
"""
_API_TOP = """# Public names

`python docs/generate.py` writes this page from signatures and docstrings; a test checks that it is current.
Errors are in `offramp.errors`, and all are an `OfframpError`.
"""
_MODULES = ("offramp", "offramp.runtime", "offramp.calibration", "offramp.training", "offramp.zoo")
ROOMS = ("program", "passes", "training", "export", "bundle", "runtime", "calibration")
_SHORT = 110  # characters of a signature in one line


def page() -> str:
    """The help of ``offramp`` and of every subcommand, as Markdown."""
    parser = build_parser()
    commands = next(action for action in parser._actions if isinstance(action, argparse._SubParsersAction))
    listed = f"`{'`, `'.join(SPECS.split(', '))}`."
    policies = textwrap.fill(listed, 120, break_long_words=False, break_on_hyphens=False)
    parts = [_TOP.format(policies=policies), _section("offramp", parser)]
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


def design() -> str:
    """docs/design.md with the picture of the rooms as they are now."""
    before, _, rest = DESIGN.read_text(encoding="utf-8").partition("<!-- rooms -->\n")
    _, _, after = rest.partition("<!-- /rooms -->")
    return f"{before}<!-- rooms -->\n{picture()}<!-- /rooms -->{after}"


def picture() -> str:
    """The rooms and their inner rooms as a Mermaid graph; an arrow is an import, what it imports stands below."""
    arrows = sorted({(room_of(a), room_of(b)) for a, b in imports() if room_of(a) != room_of(b)})
    rooms = sorted({room for arrow in arrows for room in arrow})
    lines = ["```mermaid", "graph TD"]
    for outer in dict.fromkeys(room.split("/")[0] for room in rooms):
        inside = [room for room in rooms if room.split("/")[0] == outer]
        lines += [f"  subgraph {outer}", *(f'    {_id(room)}["{room}"]' for room in inside), "  end"]
    return "\n".join([*lines, *(f"  {_id(a)} --> {_id(b)}" for a, b in arrows), "```\n"])


def room_of(file: str) -> str:
    """The room of a file: its folder."""
    return file.rpartition("/")[0]


def imports() -> set[tuple[str, str]]:
    """Which file of the rooms imports which, by their paths from the root; imports inside functions too."""
    files = {
        f"offramp.{path.relative_to(ROOT).with_suffix('').as_posix().replace('/', '.')}": path for path in _files()
    }
    found = set()
    for path in files.values():
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import | ast.ImportFrom) else []
            names += [f"{node.module}.{name}" for name in names] if isinstance(node, ast.ImportFrom) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            here = path.relative_to(ROOT).as_posix()
            found |= {(here, files[name].relative_to(ROOT).as_posix()) for name in names if name in files}
    return found


def _files() -> Iterator[Path]:
    for room in ROOMS:
        yield from (path for path in (ROOT / room).rglob("*.py") if path.name != "__init__.py")


def _id(room: str) -> str:
    return room.replace("/", "_")


class _Text(str):
    """An annotation that is shown as it was written."""

    __repr__ = str.__str__


def _signature(name: str, item: Any) -> str:
    if inspect.isclass(item) and issubclass(item, BaseException | dict):
        return f"class {name}({', '.join(base.__name__ for base in item.__bases__)})"
    found = inspect.signature(item)
    given = [
        one if (written := _written(one.annotation)) is None else one.replace(annotation=_Text(written))
        for one in found.parameters.values()
        if one.name not in ("self", "cls")
    ]
    answer = "" if inspect.isclass(item) or not isinstance(found.return_annotation, str) else found.return_annotation
    ending = f") -> {answer}" if answer else ")"
    short = f"{name}({', '.join(_starred(given))}{ending}"
    return short if len(short) <= _SHORT else "\n".join([f"{name}(", *(f"    {x}," for x in _starred(given)), ending])


def _written(annotation: Any) -> str | None:
    """An annotation as it was written, where that is known; those of a NamedTuple are references to it."""
    found = annotation.__forward_arg__ if isinstance(annotation, ForwardRef) else annotation
    return found if isinstance(found, str) else None


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
    DESIGN.write_text(design(), encoding="utf-8")
