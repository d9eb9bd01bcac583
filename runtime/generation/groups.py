"""Rows of a generation that go through spans together, and parts of them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np

from offramp.runtime.generation.batching import Index, Values, greatest, padded


class Group(NamedTuple):
    """Values ``[slots, chunk, ...]``, of which each row has ``counts`` tokens.

    Functions that take some of them are told which values lie ``along`` the chunk's tokens. Scores lie there too, or
    are of the last token alone, or of none.
    """

    slots: Index
    values: Values
    counts: Index

    def rows(self, rows: Index, along: frozenset[str]) -> Group:
        """Some rows, no wider than their tokens."""
        counts = self.counts[rows]
        widest = greatest(counts)
        values = {name: array[rows, :widest] if name in along else array[rows] for name, array in self.values.items()}
        return Group(self.slots[rows], values, counts)

    def last(self, wanted: Index) -> Group:
        """Only the last ``wanted`` tokens of each row."""
        if np.array_equal(self.counts, wanted):
            return self
        pairs = list(enumerate(zip(self.counts.tolist(), wanted.tolist(), strict=True)))
        values = {
            name: padded([array[row, count - want : count] for row, (count, want) in pairs])
            if array.shape[1] > 1
            else array
            for name, array in self.values.items()
        }
        return Group(self.slots, values, wanted)

    def last_tokens(self, along: frozenset[str], rows: Index | None = None) -> Values:
        """The last token of each of ``rows``, which are in order (None: of all): [rows, 1, ...]."""
        if rows is None or rows.size == self.counts.size:  # all, as in most steps
            if greatest(self.counts) == 1:
                return self.values
            rows = np.arange(self.counts.size)
        at = self.counts[rows] - 1
        return {
            name: array[rows, at][:, None] if name in along and array.shape[1] > 1 else array[rows]
            for name, array in self.values.items()
        }


def joined(groups: Sequence[Group], reads: Iterable[str]) -> Group:
    """Rows that come in groups as one, in the order of their slots, with the values in ``reads``."""
    if len(groups) == 1:
        return groups[0]
    slots, counts = (np.concatenate(parts) for parts in zip(*((g.slots, g.counts) for g in groups), strict=True))
    order = np.argsort(slots)
    values = {}
    for name in reads:
        arrays = [row[:count] for g in groups for row, count in zip(g.values[name], g.counts, strict=True)]
        values[name] = padded([arrays[place] for place in order])
    return Group(slots[order], values, counts[order])
