"""Show what offramp sees in a model or a bundle: axes, stacks, exits.

Status 1, with the reason, where no stack is found that an exit could leave.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from offramp.cli import _common


def arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the subcommand's arguments."""
    _common.model_argument(parser, or_bundle="; or the directory of a bundle")
    _common.pipeline_argument(parser, default="none")


def run(args: argparse.Namespace) -> int:
    """Capture, rewrite and print; a bundle needs no torch."""
    import offramp

    if Path(args.model).is_dir():
        print(offramp.load(args.model))
        return 0
    passes = _common.passes(args.pipeline)
    program = _common.captured(args.model)
    if passes:
        program = offramp.apply(program, passes)
    print(program)
    program.require_stacks()
    return 0
