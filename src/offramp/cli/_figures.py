"""Figures: matplotlib, only where one is asked for."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from offramp.errors import InputError

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def need_matplotlib() -> None:
    """Raise `InputError` where it is not installed, before anything is run for a figure."""
    try:
        import matplotlib
    except ModuleNotFoundError as error:
        raise InputError("--figure needs matplotlib, which is not installed", hint="pip install matplotlib") from error
    matplotlib.use("Agg")


def save(figure: Figure, file: Path) -> None:
    """Write a figure; its format is that of the file's name.

    Raises:
        InputError: the file cannot be written.
    """
    try:
        figure.savefig(file, dpi=150)
    except (OSError, ValueError) as error:
        raise InputError(f"the figure {file} cannot be written: {error}", hint="--figure FILE.png") from error
