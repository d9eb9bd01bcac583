"""Watch sentences, speech or text leave a real model early, and what that saves and changes.

  sentiment [SENTENCE ...]   MiniLM with a sentiment head after each of its 6 blocks (the default)
  speech [FILE.wav]          Whisper tiny.en writes down a recording, with exits after 2 and 3 of 4 blocks
  text [PROMPT]              SmolLM2-135M answers, with exits after 10, 15, 20 and 25 of 30 blocks

The first time, a demo exports its bundle (20 seconds to 2 minutes); then it runs it, at full depth too.
"""

from __future__ import annotations

import argparse
import importlib
import sys
from pathlib import Path

from offramp.cli import _common


def arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the subcommand's arguments."""
    parser.add_argument(
        "words",
        metavar="DEMO",
        nargs="*",
        help="sentiment, speech or text, and then what it is to run on; without one of these words, sentences",
    )
    parser.add_argument(
        "-o", "--output", metavar="DIR", type=Path, help="where the bundle lies, or is to lie; in build/ if left out"
    )


def run(args: argparse.Namespace) -> int:
    """Build the bundle unless it is there, then show it at work."""
    from offramp import demo

    name, words = "sentiment", args.words
    if words and words[0] in demo.NAMES:
        name, *words = words
    module = importlib.import_module(f"offramp.demo.{name}")
    output = args.output or module.BUNDLE
    if not demo.is_current(output, module.PIPELINE):
        print(f"exporting {output}, once", file=sys.stderr)
        with _common.progress("exporting") as shown:
            module.build(output, shown)
    module.show(output, words)
    return 0
