"""Segments on some rows of a generation: neighbours together, others with idle slots between them, or one by one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from time import perf_counter
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from offramp.errors import ExecutionError
from offramp.runtime.engine.memory import every
from offramp.runtime.generation.buffers import ChunkSegment, Store
from offramp.runtime.result import Timing

Array: TypeAlias = NDArray[Any]
Index: TypeAlias = NDArray[np.int64]
Values: TypeAlias = dict[str, Array]


@dataclass
class SlotRunner:
    """Runs segments on slots of a store, and traces them."""

    store: Store
    _trace: list[Timing] = field(default_factory=list)

    def trace(self) -> tuple[Timing, ...]:
        """What ran since this was asked last."""
        found, self._trace = tuple(self._trace), []
        return found

    def run(self, call: ChunkSegment, seen: Index, slots: Index, values: Values, counts: Index) -> Values:
        """Run a segment on rows of which ``seen[slot]`` tokens were run before, and ``counts`` tokens of ``values``.

        What it returns may be overwritten by the next run on the same slots.
        """
        started = perf_counter()
        if slots.size == 1 and self.store.device is None:  # which most steps have
            low = int(slots[0]) if call.by_slot else 0
            made = self.store.run(call, low, low + 1, values, seen[slots])
        else:
            made = self._together(call, seen, slots, values, counts)
        self._trace.append(Timing(call.segment.name, (perf_counter() - started) * 1e3, slots.size))
        return made

    def _together(self, call: ChunkSegment, seen: Index, slots: Index, values: Values, counts: Index) -> Values:
        """Run it in as few runs as can be."""
        given = {name: values[name] for _, name in call.chunk}
        widest = greatest(counts)
        low, high = int(slots.min()), greatest(slots) + 1
        if self.store.device is not None and call.by_slot:
            low, high = 0, self.store.slots
        rowwise = self.store.cache.rowwise and bool(call.buffers) and widest > 1
        room = not call.buffers or greatest(seen[low:high]) + widest <= self.store.capacity
        if not call.by_slot:
            return self.store.run(call, 0, slots.size, given, seen[slots])
        if slots.size == high - low and room and not (rowwise and slots.size > 1):
            return self.store.run(call, low, high, given, seen[low:high])
        if room and not rowwise:
            return self._with_idle(call, low, high, seen, slots, given)
        if self.store.device is not None and not rowwise:
            return self._in_parts(call, low, high, seen, slots, given, counts)
        return self._apart(call, seen, slots, given, counts)

    def _with_idle(self, call: ChunkSegment, low: int, high: int, seen: Index, slots: Index, given: Values) -> Values:
        """Run slots in between too: what they append lies behind their length, and is not read.

        Those that have no room for it get back what it has overwritten.
        """
        places, width = slots - low, max((array.shape[1] for array in given.values()), default=1)
        lengths = np.minimum(seen[low:high], self.store.capacity - width)
        full = low + np.flatnonzero(lengths < seen[low:high])
        restore = self.store.saved([name for _, name in call.buffers], full) if full.size else None
        wide = {}
        for name, array in given.items():
            wide[name] = np.zeros((high - low, *array.shape[1:]), array.dtype)
            wide[name][places] = array
        made = {name: array[places] for name, array in self.store.run(call, low, high, wide, lengths).items()}
        if restore is not None:
            restore()
        return made

    def _in_parts(
        self, call: ChunkSegment, low: int, high: int, seen: Index, slots: Index, given: Values, counts: Index
    ) -> Values:
        """Run narrower chunks one after the other, of the rows that have tokens left, so that these have room."""
        rows: list[dict[str, list[Array]]] = [{} for _ in slots]
        done = 0
        while (going := np.flatnonzero(counts > done)).size:
            width = min(int(counts.max()) - done, self.store.capacity - int(seen[slots[going]].max()) - done)
            some = {name: array[going, done : done + width] for name, array in given.items()}
            if call.asked is not None:  # all of a part, or nothing
                some[call.asked] = every(going.size, width if given[call.asked].size else 0)
            shifted = seen.copy()
            shifted[slots] += np.minimum(counts, done)
            for name, array in self._with_idle(call, low, high, shifted, slots[going], some).items():
                for row, values in zip(going, array, strict=True):
                    rows[row].setdefault(name, []).append(values)
            done += width
        whole = [{name: np.concatenate(parts) for name, parts in row.items()} for row in rows]
        return {name: padded([row[name] for row in whole]) for name in whole[0]}

    def _apart(self, call: ChunkSegment, seen: Index, slots: Index, given: Values, counts: Index) -> Values:
        """One row after the other, each with just its tokens."""
        if self.store.device is not None:
            raise ExecutionError(
                f"segment {call.segment.name!r} takes one row at a time, but on a device all rows run together",
                hint='one row at a time, or a bundle with target="portable"',
            )
        rows: dict[str, list[Array]] = {}
        for row, slot in enumerate(slots):
            one = {name: array[row : row + 1, : counts[row]] for name, array in given.items()}
            made = self.store.run(call, int(slot), int(slot) + 1, one, seen[slot : slot + 1])
            for name, array in made.items():
                rows.setdefault(name, []).append(array[0].copy())
        return {name: padded(arrays) for name, arrays in rows.items()}


def greatest(array: Index) -> int:
    """The greatest of some numbers: of one, which most steps have, numpy's reduction takes twenty times as long."""
    return int(array[0]) if array.size == 1 else int(array.max())


def padded(rows: Sequence[Array], filler: int = 0) -> Array:
    """Rows of different numbers of tokens as one array, filled up behind the shorter ones; no copy of a single one."""
    if len(rows) == 1:
        return rows[0][None]
    widest = max(len(row) for row in rows)
    whole = np.full((len(rows), widest, *rows[0].shape[1:]), filler, rows[0].dtype)
    for row, array in zip(whole, rows, strict=True):
        row[: len(array)] = array
    return whole
