"""What of each row is computed how deep, and the tokens that wait to go deeper.

Since a token that goes deep takes all waiting ones along, the positions that a piece of the stack has seen are always
a prefix of those that the piece before it has seen. So all there is to know is one length for each piece and row, and
the hidden states in between: those wait at the piece's input (deferral: DEED's just-in-time features, arXiv
2311.08623, and FREE's synchronised parallel decoding, 2310.05424, are this).
"""

from __future__ import annotations

from collections.abc import Collection, Sequence

import numpy as np

from offramp.runtime.generation.batching import Array, Index, Values, padded


class Waiting:
    """``seen[span, slot]`` tokens are computed; others wait at spans, of which each reads the values in ``reads``."""

    def __init__(self, reads: Sequence[Collection[str]], slots: int) -> None:
        self.seen: Index = np.zeros((len(reads), slots), np.int64)
        self._reads = reads
        self._held: list[list[list[Values]]] = [[[] for _ in range(slots)] for _ in reads]

    def hold(self, span: int, slot: int, values: Values) -> None:
        """Let tokens of a row wait at a span: values ``[tokens, ...]``, which are kept as they are."""
        self._held[span][slot].append(values)

    def count(self, span: int, slot: int) -> int:
        """How many tokens of a row wait at a span."""
        return sum(len(next(iter(values.values()))) for values in self._held[span][slot])

    def taken(self, span: int, slots: Index, values: Values, counts: Index) -> tuple[Values, Index]:
        """What waited at a span, and waits no more, then what comes in: values ``[slots, tokens, ...]`` and counts."""
        held = [self._held[span][slot] for slot in slots]
        reads = self._reads[span]
        if not any(held):
            return {name: values[name] for name in reads}, counts
        rows: dict[str, list[Array]] = {name: [] for name in reads}
        for row, waits in enumerate(held):
            for name in reads:
                parts = [item[name] for item in waits]
                if counts[row]:
                    parts.append(values[name][row, : counts[row]])
                rows[name].append(np.concatenate(parts) if len(parts) > 1 else parts[0])
        for slot in slots.tolist():
            self._held[span][slot] = []
        total = np.array([len(row) for row in next(iter(rows.values()))], np.int64)
        return {name: padded(arrays) for name, arrays in rows.items()}, total

    def advance(self, span: int, slots: Index, counts: Index) -> None:
        """Count tokens that a span has computed."""
        if slots.size == 1:  # which most steps have; picking rows by an array takes ten times as long
            self.seen[span, slots[0]] += counts[0]
        else:
            self.seen[span, slots] += counts

    def rollback(self, slot: int, length: int) -> None:
        """Forget a row's tokens behind its first ``length``; what lies in caches behind their length is not read."""
        for span, held in enumerate(self._held):
            self.seen[span, slot] = min(self.seen[span, slot], length)
            kept, left = [], length - int(self.seen[span, slot])
            for values in held[slot]:
                if left > 0:
                    kept.append({name: array[:left] for name, array in values.items()})
                    left -= len(next(iter(values.values())))
            held[slot] = kept

    def rearrange(self, sources: Sequence[int]) -> None:
        """Slot ``i`` gets what slot ``sources[i]`` had."""
        count = len(sources)
        self.seen[:, :count] = self.seen[:, list(sources)]
        self.seen[:, count:] = 0
        for held in self._held:
            held[:count] = [list(held[source]) for source in sources]
