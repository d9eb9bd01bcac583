"""Running a demo as its user does."""

from __future__ import annotations

import subprocess
import sys

import pytest

from offramp import zoo


def needs(model: str) -> None:
    """Skip where the package that carries the weights is missing."""
    try:
        zoo.tokenizer_files(model)
    except (zoo.PackageMissingError, ModuleNotFoundError) as error:
        pytest.skip(str(error))


def shown(*argv: str) -> str:
    """What a demo prints, in a process of its own."""
    command = [sys.executable, "-c", "from offramp.cli import main; raise SystemExit(main())", "demo", *argv]
    finished = subprocess.run(command, capture_output=True, text=True, check=False)
    assert finished.returncode == 0, finished.stderr
    return finished.stdout
