"""The command line: ``offramp SUBCOMMAND ...``.

Each subcommand is a module of this folder with a docstring (its help), ``arguments(parser)`` and
``run(args) -> int``; its file name is its name. Those modules import nothing heavy before ``run``, so that
help needs neither torch nor numpy.
"""

from __future__ import annotations

import argparse
import errno
import importlib
import logging
import os
import sys
import traceback
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from types import ModuleType
from typing import Any

from offramp.errors import OfframpError

COMMANDS = ("inspect", "check", "export", "calibrate", "report", "run", "bench", "demo")
_EXTRAS = ("torch", "onnx", "onnxscript", "networkx", "safetensors", "rich", "transformers", "tokenizers")
_MACHINE = (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_BARS = "HF_HUB_DISABLE_PROGRESS_BARS"  # read where transformers is imported
_LIBRARY, _TRUE = "transformers.utils.logging", ("1", "ON", "YES", "TRUE")
_PACKAGE, _BELOW_ALL = "offramp", -1  # the name of its loggers; a level that no handler takes
_WIDTH = 100  # of help pages, so that they do not depend on the terminal


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command line; the exit status is 0 ok, 1 refused or wrong, 2 usage (argparse raises SystemExit)."""
    args = build_parser().parse_args(argv)
    if getattr(args, "dump", None):
        os.environ["OFFRAMP_DUMP"] = args.dump
    with _noise(args.verbose):
        try:
            status: int = _module(args.command).run(args)
            sys.stdout.flush()
            return status
        except KeyboardInterrupt:
            return 130
        except BrokenPipeError:  # ``| head`` has had enough
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or Python says it once more as it ends
            return 141
        except OfframpError as error:
            return _failed(f"{error.stage}: {error}", args.verbose)
        except ImportError as error:
            known = (error.name or "").partition(".")[0] in _EXTRAS
            hint = "\n  try: pip install 'offramp[demo]'" if known else ""
            return _failed(f"{error}{hint}", args.verbose)
        except Exception as error:  # noqa: BLE001 - the last resort of a program
            if isinstance(error, OSError) and error.errno in _MACHINE:
                return _failed(f"{error}\n  try: a place that may be read and written, with room", args.verbose)
            text = f"internal error: {type(error).__name__}: {error}\n  try: the same with -v, which shows where"
            return _failed(text, args.verbose)


def build_parser() -> argparse.ArgumentParser:
    """The parser of the whole command line."""
    from offramp import __version__

    parser = argparse.ArgumentParser(
        prog="offramp",
        description="Early exits for transformers: rewrite a PyTorch model, export it, run it under ONNX Runtime.",
        epilog="offramp COMMAND --help tells more.",
        formatter_class=_formatter,
    )
    parser.add_argument("--version", action="version", version=f"offramp {__version__}")
    _verbose(parser, default=False)
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    for name in COMMANDS:
        module = _module(name)
        text = (module.__doc__ or "").strip()
        command = commands.add_parser(name, help=text.splitlines()[0], description=text, formatter_class=_formatter)
        module.arguments(command)
        _verbose(command, default=argparse.SUPPRESS)
    return parser


def _verbose(parser: argparse.ArgumentParser, default: object) -> None:
    """-v, before or after the subcommand: the default of the one must not undo the other."""
    text = "show logs, warnings of other packages too, and tracebacks"
    parser.add_argument("-v", "--verbose", action="store_true", default=default, help=text)


def _formatter(prog: str) -> argparse.HelpFormatter:
    return argparse.RawDescriptionHelpFormatter(prog, width=_WIDTH, max_help_position=28)


def _module(command: str) -> ModuleType:
    return importlib.import_module(f"{__name__}.{command}")


@contextmanager
def _noise(verbose: bool) -> Iterator[None]:
    """Logs and warnings on stderr; or the warnings of this package alone: torch and others report on their insides."""
    if verbose:
        logging.basicConfig(level=logging.INFO, format="%(name)s: %(message)s", stream=sys.stderr)
        yield
        return
    with warnings.catch_warnings(), _no_bars(), _own_logs():
        warnings.simplefilter("ignore")
        yield


@contextmanager
def _own_logs() -> Iterator[None]:
    """Warnings that this package logs as lines on stderr, and no logs of others, whatever handlers these have."""
    make, own = logging.getLogRecordFactory(), logging.getLogger(_PACKAGE)

    def quiet(name: str, *args: Any, **options: Any) -> logging.LogRecord:
        record = make(name, *args, **options)
        if name != _PACKAGE and not name.startswith(f"{_PACKAGE}."):
            record.levelno = _BELOW_ALL
        return record

    shown = logging.StreamHandler(sys.stderr)
    shown.setLevel(logging.WARNING)
    shown.setFormatter(logging.Formatter(f"{_PACKAGE}: %(message)s"))
    own.addHandler(shown)
    logging.setLogRecordFactory(quiet)
    try:
        yield
    finally:
        logging.setLogRecordFactory(make)
        own.removeHandler(shown)


@contextmanager
def _no_bars() -> Iterator[None]:
    """No progress bars of transformers, whether it is imported already or will be."""
    known = os.environ.get(_BARS)
    os.environ[_BARS] = "1"
    library = sys.modules.get(_LIBRARY)
    shown = (known or "").upper() not in _TRUE if library is None else library.is_progress_bar_enabled()
    if library is not None:
        library.disable_progress_bar()
    try:
        yield
    finally:
        library = sys.modules.get(_LIBRARY)
        if library is not None and shown:
            library.enable_progress_bar()
        os.environ.pop(_BARS)
        if known is not None:
            os.environ[_BARS] = known


def _failed(text: str, verbose: bool) -> int:
    if verbose:
        traceback.print_exc()
    print(f"offramp: {text}", file=sys.stderr)
    return 1
