"""What subcommands share: arguments, a table, a progress bar."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import nn

    from offramp.models import Inputs
    from offramp.passes import Pass
    from offramp.program import Program

PIPELINE = 'for example "insert-exits{after=2|4}"'


def model_argument(parser: argparse.ArgumentParser, or_bundle: str = "") -> None:
    """MODEL."""
    forms = (
        "file.py:factory, package.module:factory, hf:DIRECTORY_OR_ID or zoo:NAME; a factory returns "
        "(module, example_inputs)"
    )
    parser.add_argument("model", metavar="MODEL", help=forms + or_bundle)


def pipeline_argument(parser: argparse.ArgumentParser, default: str) -> None:
    """-p PIPELINE and --dump DIR."""
    parser.add_argument(
        "-p", "--pipeline", metavar="PIPELINE", help=f"passes to apply, {PIPELINE}; {default} if left out"
    )
    parser.add_argument("--dump", metavar="DIR", help="let every pass write its graph before and after to DIR")


def ignore_generation_argument(parser: argparse.ArgumentParser) -> None:
    """--ignore-generation NAME."""
    parser.add_argument(
        "--ignore-generation",
        metavar="NAME",
        action="append",
        default=[],
        help="take no notice of this setting of an hf: model's generation_config; may be repeated",
    )


def loaded(name: str) -> tuple[nn.Module, Inputs]:
    """The model of that name and its example inputs."""
    import offramp
    from offramp import models

    _ = offramp.capture  # before the model: without torch this says what to install
    return models.resolve(name, note)()


def note(text: str) -> None:
    """One line on stderr."""
    print(f"offramp: {text}", file=sys.stderr)


def captured(name: str) -> Program:
    """The program of the model of that name."""
    import offramp
    from offramp import models

    return models.captured(name, *loaded(name), offramp.capture, note)[0]


def passes(pipeline: str | None) -> list[Pass]:
    """The passes of a pipeline text, for before the model is loaded. Raises SpecError."""
    import offramp

    if not pipeline:
        return []
    _ = offramp.apply  # without torch this says what to install
    from offramp.passes.infra.spec import parse

    return parse(pipeline)


def positive(text: str) -> int:
    """A whole number of at least 1, for argparse."""
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{number} is not at least 1")
    return number


def a(step: str) -> str:
    """What is timed, with its article."""
    return f"an {step}" if step == "input" else f"a {step}"


def table(heads: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """Aligned columns: numbers to the right (floats with three digits), all else to the left."""
    items = list(rows)
    cells = [[_cell(value) for value in row] for row in items]
    widths = [max(map(len, column)) for column in zip(heads, *cells, strict=True)]
    right = [bool(items) and all(isinstance(row[i], int | float) for row in items) for i in range(len(heads))]

    def line(row: Sequence[str]) -> str:
        padded = [
            text.rjust(width) if number else text.ljust(width)
            for text, width, number in zip(row, widths, right, strict=True)
        ]
        return "  ".join(padded).rstrip()

    return "\n".join(line(row) for row in [list(heads), *cells])


def _cell(value: object) -> str:
    return f"{value:,.3f}" if isinstance(value, float) else str(value)


@contextmanager
def progress(what: str) -> Iterator[Callable[[str, int, int], None] | None]:
    """A bar on stderr for ``offramp.save``; None where stderr is no terminal."""
    if not sys.stderr.isatty():
        yield None
        return
    from rich.console import Console
    from rich.progress import Progress

    with Progress(console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(what, total=None)
        yield lambda name, done, total: bar.update(task, description=f"{what} {name}", completed=done, total=total)
