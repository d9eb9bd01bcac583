"""Write docs/cli.md from the command line's own help: python docs/generate.py."""

from __future__ import annotations

import argparse
from pathlib import Path

from offramp.cli import build_parser

PAGE = Path(__file__).with_name("cli.md")
_TOP = """# The command line

`python docs/generate.py` writes this page; a test checks that it is current.

| exit status | meaning |
|---|---|
| 0 | ok |
| 1 | refused or wrong; stderr has one line `offramp: STAGE: what happened`, and one that says what to try |
| 2 | usage |
"""


def page() -> str:
    """The help of ``offramp`` and of every subcommand, as Markdown."""
    parser = build_parser()
    commands = next(action for action in parser._actions if isinstance(action, argparse._SubParsersAction))
    parts = [_TOP, _section("offramp", parser)]
    parts += [_section(f"offramp {name}", command) for name, command in commands.choices.items()]
    return "\n".join(parts)


def _section(title: str, parser: argparse.ArgumentParser) -> str:
    return f"## {title}\n\n```text\n{parser.format_help()}```\n"


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
