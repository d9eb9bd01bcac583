"""What ``offramp demo`` shows: a module each, with ``BUNDLE``, ``bundles``, ``build(path, progress)`` and ``show``.

``show(path, words)`` runs the bundle on what the user gave; ``BUNDLE`` is where it lies unless the user says
otherwise, and ``bundles(path)`` maps all that belong to a demo to the passes that make them.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from offramp import __version__

NAMES = ("sentiment", "translation", "speech")


def is_current(path: Path, pipeline: Sequence[str]) -> bool:
    """Whether a bundle that this pipeline makes, by this version of offramp, lies there."""
    from offramp.bundle.directory import read
    from offramp.errors import BundleError

    try:
        manifest, _ = read(path)
    except BundleError:
        return False
    made_by = manifest.provenance.get("versions", {}).get("offramp", __version__)
    return made_by == __version__ and tuple(manifest.provenance.get("pipeline", ())) == tuple(pipeline)
