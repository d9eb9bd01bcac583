"""Watch sentences, translations and speech take less than a whole model, and what that saves and changes.

  sentiment [SENTENCE ...]   MiniLM with a sentiment head after each of its 6 blocks (the default)
  translation [TEXT ...]     German captions become English, with a trained exit after 2 of 8 decoder blocks
  speech [FILE.wav]          Whisper base writes down a recording, its vocabulary screened for each token

The first time, a demo exports its bundles (10 seconds to 2 minutes); then it runs them in turns with full depth.
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
        help="sentiment, translation or speech, and then what it is to run on; without one of these words, sentences",
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
    if not all(demo.is_current(path, pipeline) for path, pipeline in module.bundles(output).items()):
        print(f"exporting {output}, once", file=sys.stderr)
        with _common.progress("exporting") as shown:
            module.build(output, shown)
    module.show(output, words)
    return 0
