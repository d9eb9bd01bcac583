"""The command line: ``offramp SUBCOMMAND ...``.

Each subcommand is a module of this folder with a docstring (its help), ``arguments(parser)`` and
``run(args) -> int``; its file name is its name. Those modules import nothing heavy before ``run``, so that
help needs neither torch nor numpy.
"""

from __future__ import annotations

import argparse
import importlib
import logging
import os
import sys
import traceback
import warnings
from collections.abc import Sequence
from types import ModuleType

from offramp.runtime.errors import OfframpError

COMMANDS = ("inspect", "check", "export", "run", "bench", "demo")
_WIDTH = 100  # of help pages, so that they do not depend on the terminal


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command line; the exit status is 0 ok, 1 refused or wrong, 2 usage (argparse raises SystemExit)."""
    args = build_parser().parse_args(argv)
    if args.dump:
        os.environ["OFFRAMP_DUMP"] = args.dump
    with warnings.catch_warnings():
        _set_up_logs(args.verbose)
        try:
            status: int = _module(args.command).run(args)
            return status
        except KeyboardInterrupt:
            return 130
        except OfframpError as error:
            return _failed(f"{error.stage}: {error}", args.verbose)
        except ImportError as error:  # of a package that an extra of offramp brings
            return _failed(str(error), args.verbose)
        except Exception as error:  # noqa: BLE001 - the last resort of a program
            text = f"internal error: {type(error).__name__}: {error}\n  try: the same with -v, which shows where"
            return _failed(text, args.verbose)


def build_parser() -> argparse.ArgumentParser:
    """The parser of the whole command line."""
    from offramp import __version__

    parser = argparse.ArgumentParser(
        prog="offramp",
        description="Early exits for transformers: rewrite a PyTorch model, export it, run it under ONNX Runtime.",
        epilog="MODEL is file.py:factory, package.module:factory, hf:DIRECTORY_OR_ID or zoo:NAME; a factory "
        "returns (module, example_inputs).",
        formatter_class=_formatter,
    )
    parser.add_argument("--version", action="version", version=f"offramp {__version__}")
    _shared_options(parser, verbose=False, dump=None)
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    for name in COMMANDS:
        module = _module(name)
        text = (module.__doc__ or "").strip()
        command = commands.add_parser(
            name, help=text.splitlines()[0], description=text, formatter_class=_formatter
        )
        module.arguments(command)
        _shared_options(command, verbose=argparse.SUPPRESS, dump=argparse.SUPPRESS)
    return parser


def _shared_options(parser: argparse.ArgumentParser, verbose: object, dump: object) -> None:
    """Options that may stand before or after the subcommand; the defaults of the latter must not win."""
    parser.add_argument(
        "-v", "--verbose", action="store_true", default=verbose, help="show logs, warnings and tracebacks"
    )
    parser.add_argument(
        "--dump", metavar="DIR", default=dump, help="let every pass write its graph before and after to DIR"
    )


def _formatter(prog: str) -> argparse.HelpFormatter:
    return argparse.RawDescriptionHelpFormatter(prog, width=_WIDTH, max_help_position=28)


def _module(command: str) -> ModuleType:
    return importlib.import_module(f"{__name__}.{command}")


def _set_up_logs(verbose: bool) -> None:
    if verbose:
        logging.basicConfig(level=logging.INFO, format="%(name)s: %(message)s", stream=sys.stderr)
    else:
        warnings.simplefilter("ignore")
        for noisy in ("torch", "transformers"):  # they report on their own insides
            logging.getLogger(noisy).setLevel(logging.CRITICAL)


def _failed(text: str, verbose: bool) -> int:
    if verbose:
        traceback.print_exc()
    print(f"offramp: {text}", file=sys.stderr)
    return 1
