"""A bundle in fp32 becomes the same one in fewer bits, compared with what it was."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import replace
from numbers import Real
from pathlib import Path
from typing import Any

from offramp.bundle.manifest import Manifest
from offramp.errors import ExportError
from offramp.export.agreement import Bounds, answers, changed
from offramp.export.automatic import automatic
from offramp.export.encode import AUTO, Precision, encoded, encodings_of, precisions, shown
from offramp.export.observe import observed
from offramp.export.patterns import check_patterns
from offramp.export.rounding import Roundings
from offramp.runtime.chain import Chain

#: How far outputs may be from fp32 where nobody says so, of their scale; and where something is int4.
LOSS, LOSS_INT4 = 0.05, 0.3


def in_fewer_bits(
    manifest: Manifest,
    directory: Path,
    precision: Precision,
    samples: Sequence[Mapping[str, Any]],
    loss: float | None = None,
    agreement: float = 0.0,
) -> Manifest:
    """Put the bundle with its weights encoded in the place of that in fp32; its manifest, which is not written.

    Args:
        manifest: of the bundle in fp32.
        directory: where that is, without its manifest.
        precision: as for ``save``.
        samples: as for ``save``.
        loss: as for ``save``.
        agreement: as for ``save``.

    Raises:
        ExportError: outputs are not within the bounds, or a pattern takes no segment; ``directory`` is what it was.
    """
    if not isinstance(precision, str):
        check_patterns(precision, list(manifest.segments))
    for name, value in (("loss", loss), ("agreement", agreement)):
        if value is not None and (isinstance(value, bool) or not isinstance(value, Real)):
            raise ExportError(f"{name}={value!r}: a number", hint=f"{name}=0.05")
    bounds = Bounds(loss if loss is not None else LOSS_INT4 if "int4" in precisions(precision) else LOSS, agreement)
    made = Path(tempfile.mkdtemp(prefix=f"{directory.name}-", dir=directory.parent))
    try:
        before = answers(Chain(manifest, directory), samples)
        four = not precisions(precision).isdisjoint(("int4", AUTO))
        roundings = Roundings(observed(manifest, directory, samples) if four else {})
        if precision == AUTO:
            wanted, about = automatic(manifest, directory, samples, bounds, roundings, before)
            called = f"auto ({', '.join(sorted(set(wanted.values())))})"
            manifest = replace(manifest, provenance={**manifest.provenance, "precision": about})
        else:
            wanted, called = encodings_of(manifest, precision), shown(precision)
        found = encoded(manifest, directory, made, wanted, called, roundings)
        figures = changed(before, answers(Chain(found, made), samples))
        found = replace(found, validation={**manifest.validation, **figures})
        bounds.check(found, precision)
    except BaseException:
        shutil.rmtree(made, ignore_errors=True)
        raise
    shutil.rmtree(directory)
    made.rename(directory)
    return found
