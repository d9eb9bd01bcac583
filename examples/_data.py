"""Where the recipes find their data."""

from __future__ import annotations

import os
import sys
from pathlib import Path


def data(file: str, about: str) -> Path:
    """A file under ``$OFFRAMP_DATA``, or ``../shared/data`` beside the checkout; without it, a message ``about`` it."""
    named = os.environ.get("OFFRAMP_DATA")
    path = (Path(named) if named else Path(__file__).resolve().parents[2] / "shared" / "data") / file
    if not path.is_file():
        sys.exit(f"no {path}\n  This is {about}.\n  try: OFFRAMP_DATA=DIR, where DIR/{file} is that file")
    return path


def wikitext(split: str) -> Path:
    """A split of WikiText-2."""
    return data(
        f"wikitext2/{split}.txt", "WikiText-2 (Merity et al. 2016), tokens with blanks between, a paragraph a line"
    )
