"""Files made from what packages carry, kept where a user's caches lie."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

from offramp.zoo._package import ZooError


def cached(model: str, name: str, content: str) -> Path:
    """The path of a text file with exactly this content: ``$XDG_CACHE_HOME/offramp/zoo/MODEL/NAME``.

    Without that variable, under ``~/.cache``. Written in one step, so that another process never reads half of it.
    Raises `ZooError` where the folder cannot be written.
    """
    root = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    path = root / "offramp" / "zoo" / model / name
    if path.is_file() and path.read_bytes() == content.encode():
        return path
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile("wb", dir=path.parent, delete=False) as stream:
            stream.write(content.encode())
        Path(stream.name).replace(path)
    except OSError as error:
        raise ZooError(f"{path} cannot be written: {error.strerror}", hint="set XDG_CACHE_HOME") from error
    return path
