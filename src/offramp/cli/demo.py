"""Watch sentences leave a real model early, and how much time that saves.

The model is MiniLM with a sentiment head after each of its 6 blocks. The first time, the demo exports the
bundle (about 20 seconds); then it runs it, sentence by sentence.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from offramp.cli import _common


def arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the subcommand's arguments."""
    parser.add_argument("sentence", nargs="*", help="sentences of your own, after the demo's")
    parser.add_argument(
        "-o",
        "--output",
        metavar="DIR",
        type=Path,
        default=Path("build/minilm.offramp"),
        help="where the bundle lies, or is to lie (default build/minilm.offramp)",
    )


def run(args: argparse.Namespace) -> int:
    """Build the bundle unless it is there, then show it at work."""
    from offramp import demo

    if not demo.is_current(args.output):
        print(f"exporting {args.output}, once", file=sys.stderr)
        with _common.progress("exporting") as shown:
            demo.build(args.output, shown)
    demo.show(args.output, [*demo.SENTENCES, *args.sentence])
    return 0
