"""How many learners tokens have taken: of a run by token, of a generation in all."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from offramp.bundle.manifest import Learners, Manifest
from offramp.runtime.engine.memory import Env, Index, Memory, places


def kinds(manifest: Manifest) -> Mapping[tuple[str, str, int, str], int]:
    """How many blocks have learners of a kind, by stack, site, number of learners and form."""
    return Counter((item.stack, item.site, item.learners, item.form) for item in manifest.learners.values())


def listing(manifest: Manifest) -> str:
    """A line for each kind of learners, for people."""
    return "\n".join(
        f"  {stack}: {site} of {blocks} blocks in {count} learners, {form}"
        for (stack, site, count, form), blocks in kinds(manifest).items()
    )


class Sites:
    """The sites with learners of each segment that makes their counts."""

    def __init__(self, manifest: Manifest) -> None:
        self.manifest = manifest
        by_count = {item.count: (name, item) for name, item in manifest.learners.items()}
        self.of: dict[str, list[tuple[str, Learners]]] = {
            segment.name: [by_count[value] for value in segment.outputs.values() if value in by_count]
            for segment in manifest.segments.values()
        }


class Widths:
    """What tokens have taken so far."""

    def __init__(self, sites: Sites) -> None:
        self._sites = sites
        self._taken: defaultdict[str, list[tuple[Index, NDArray[np.int64]]]] = defaultdict(list)
        self._executed = self._all = 0

    def include(self, other: Widths) -> None:
        """Count what tokens took elsewhere, too."""
        self._executed += other._executed
        self._all += other._all

    def take(self, segment: str, rows: Index, env: Env, memory: Memory) -> None:
        """Note what the tokens of ``rows`` took in a segment that has run."""
        for name, item in self._sites.of[segment]:
            counts = memory.get(env[item.count])
            self._taken[name].append((rows, counts))
            self.add(item, counts)

    def add(self, item: Learners, counts: NDArray[np.int64]) -> None:
        """Count what tokens took at a site."""
        self._executed += item.flops * int(counts.sum())
        self._all += item.flops * item.learners * counts.size

    @property
    def share(self) -> float | None:
        """The share of the learners' floating-point operations that was executed; None where no token met any."""
        return self._executed / self._all if self._all else None

    def by_row(self, batch: int) -> Mapping[str, NDArray[np.int64]]:
        """By site what each token took, rows in the order of the batch; -1 for those that had left."""
        manifest = self._sites.manifest
        found: dict[str, NDArray[np.int64]] = {}
        for name, parts in self._taken.items():
            axis, factor = manifest.values[manifest.learners[name].count].place(manifest.batch) or (None, 1)
            if axis is None:
                found[name] = parts[0][1]
                continue
            sizes: list[Any] = list(parts[0][1].shape)
            sizes[axis] = batch * factor
            found[name] = np.full(sizes, -1, np.int64)
            for rows, counts in parts:
                found[name][(slice(None),) * axis + (places(rows, factor),)] = counts
        return found
