"""Chunks through a bundle with caches: how deep each row has been computed, and what waits to go deeper.

Since a token that goes deep takes all waiting ones along, the positions that a piece of the stack has seen are always
a prefix of those that the piece before it has seen. So all there is to know is one length for each piece and row, and
the hidden states in between: those wait at the piece's input (deferral: DEED's just-in-time features, arXiv
2311.08623, and FREE's synchronised parallel decoding, 2310.05424, are this).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from offramp.bundle.manifest import Manifest
from offramp.runtime.generation.batching import Array, Index, Launcher, Values, greatest, padded
from offramp.runtime.generation.buffers import Store
from offramp.runtime.generation.cache_memory import axis_of
from offramp.runtime.generation.legs import Door, Leg
from offramp.runtime.policies.base import Asker


class Asked(NamedTuple):
    """What an exit said of a row's last token.

    That is its scores, the next token where it picks one, and the model's outputs where its scores are made of them.
    """

    scores: Mapping[str, float]
    pick: int | None
    outputs: Mapping[str, Array] | None


class Left(NamedTuple):
    """A row that has left the last stack with the model's outputs for its last token, or only with its next one.

    ``pick`` is that token, where `Decoder.feed` was to take what the exit picks; ``outputs`` are empty then.
    ``asked`` has what the exits of that stack said of the token, by ``after``. Where all tokens that got to full depth
    in this step were wanted, ``deep`` are the next tokens that it picks for them if all will do, else ``whole`` are
    its outputs, [tokens, ...].
    """

    slot: int
    outputs: Mapping[str, Array]
    exits: Mapping[str, int]
    scores: Mapping[str, float]
    asked: Mapping[int, Asked]
    pick: int | None = None
    whole: Mapping[str, Array] | None = None
    deep: Sequence[int] | None = None


class _Answer(NamedTuple):
    """What an exit and the policy say of rows: who leaves, the exit's values, and the tokens that it picks."""

    leave: NDArray[np.bool_]
    made: Values | None = None
    tokens: Sequence[int] = ()


class _Group(NamedTuple):
    """Rows that go through legs together: values ``[slots, chunk, ...]``, of which each row has ``counts`` tokens."""

    slots: Index
    values: Values
    counts: Index


@dataclass(slots=True)
class _Row:
    """A row on its way through the legs: where it left, and what exits said of its last token."""

    exits: dict[str, int] = field(default_factory=dict)
    scores: Mapping[str, float] = field(default_factory=dict)
    asked: dict[int, Asked] = field(default_factory=dict)


@dataclass
class Decoder:
    """The state of a generation: ``seen[leg, slot]`` tokens computed, and per leg and slot the values that wait.

    ``rows[slot]`` is the place in the batch of what the slot holds, which policies see; ``taken[slot]`` how many of
    its tokens that waited went deeper in the last `feed`. With ``max_pending`` a row has at most one less waiting.
    ``propagate`` is "defer" (exact) or "hidden": where a row leaves, its hidden state stands for those of all
    deeper blocks (CALM, arXiv 2207.07061, sec. 3.3), which are then computed from it, when a token goes deep.
    """

    manifest: Manifest
    legs: Sequence[Leg]
    store: Store
    propagate: str = "defer"
    max_pending: int | None = None
    seen: Index = field(init=False)
    rows: Index = field(init=False)
    pending: list[list[list[Values]]] = field(init=False)
    taken: dict[int, int] = field(default_factory=dict)
    launcher: Launcher = field(init=False)

    def __post_init__(self) -> None:
        self.launcher = Launcher(self.store)
        self.seen = np.zeros((len(self.legs), self.store.slots), np.int64)
        self.rows = np.arange(self.store.slots)
        self.pending = [[[] for _ in range(self.store.slots)] for _ in self.legs]

    def feed(
        self,
        slots: Index,
        values: Values,
        counts: Index,
        askers: Mapping[str, Asker] | None,
        whole: Callable[[], bool] | None = None,
        picks: Callable[[int, int], bool] | None = None,
    ) -> list[Left]:
        """Run new tokens: ``values`` hold ``[slots, chunk, ...]``, of which each row has ``counts`` tokens.

        ``askers`` (by stack) decide where rows leave; None runs all to full depth. ``whole`` is asked where rows get
        there, whether all of their tokens are wanted, not the last ones alone; ``picks`` of a slot and the token that
        an exit has picked, whether that will do without outputs (None: never).
        """
        left: list[Left] = []
        entered = slots
        self.taken = {}
        rows = {slot: _Row() for slot in slots.tolist()}
        at, arriving = 0, [_Group(slots, values, counts)]
        new = dict(zip(slots.tolist(), counts.tolist(), strict=True))
        while arriving:  # a stack after the other, in which all rows are asked together, wherever they left the last
            slots, values, counts = self._joined(at, arriving)
            behind, arriving = at, []
            while at < len(self.legs) and slots.size:
                leg = self.legs[at]
                forwarded = counts
                values, counts = self._with_pending(at, slots, values, counts, new)
                values = self._run(leg, at, slots, values, counts)
                if self.propagate == "hidden" and leg.stack is not None:  # what waited went its own way already
                    values, counts = self._last(values, slots, counts, forwarded)
                at += 1
                door = leg.door
                if door is None:
                    continue
                asker = self._asker(door, leg, askers, picks=picks is not None)
                answer = self._ask(door, slots, values, counts, asker, rows)
                leave, deep = answer.leave, None
                wholly = whole is not None and door.full and door.ends and whole()
                if wholly and asker is not None:
                    deep = self._all_picked(door, slots, values, counts, asker)
                    wholly = deep is None
                picked = {} if wholly or picks is None else self._picked(slots, answer, picks)
                if door.full:
                    leave = np.ones(slots.size, np.bool_)
                (go,) = leave.nonzero()
                if not go.size:
                    continue
                answered = [row for row in go.tolist() if row not in picked]
                ending = (
                    self._of_all(door, slots, values, counts)
                    if wholly
                    else self._door(door, slots, values, counts, answered, answer.made)
                )
                for row in go.tolist():
                    slot = int(slots[row])
                    rows[slot].exits[leg.stack or ""] = door.after
                    if not door.full:
                        self._wait(at, slot, values, row, int(counts[row]))
                    if row in picked:
                        gone = rows[slot]
                        made = Left(slot, {}, gone.exits, gone.scores, gone.asked, picked[row])
                    elif door.ends:
                        count = int(counts[row]) if wholly else None
                        made = self._left(slot, rows[slot], door, ending, answered.index(row), count)
                    else:
                        continue
                    left.append(made if deep is None else made._replace(deep=deep[row]))
                if not door.ends:
                    behind = self._behind(at, leg.stack)
                    counted = np.array([new[int(slot)] for slot in slots[go]])
                    onward = self._onward(door, slots[go], values, counts, go, counted)
                    arriving.append(_Group(slots[go], onward, counted))
                if go.size == slots.size:
                    break
                (stay,) = np.nonzero(~leave)
                if askers is not None:
                    askers[leg.stack or ""].keep(stay)
                slots, counts = slots[stay], counts[stay]
                values = self._some(values, stay, counts)
            at = behind
        return left if self.max_pending is None else self._bounded(left, entered, whole)

    def _joined(self, at: int, groups: Sequence[_Group]) -> _Group:
        """Rows that come to a leg in groups as one, in the order of their slots."""
        if len(groups) == 1:
            return groups[0]
        slots, counts = (np.concatenate(parts) for parts in zip(*((g.slots, g.counts) for g in groups), strict=True))
        order = np.argsort(slots)
        values = {}
        for name in self.legs[at].reads:
            arrays = [row[:count] for g in groups for row, count in zip(g.values[name], g.counts, strict=True)]
            values[name] = padded([arrays[place] for place in order])
        return _Group(slots[order], values, counts[order])

    def _behind(self, at: int, stack: str | None) -> int:
        while at < len(self.legs) and self.legs[at].stack == stack:
            at += 1
        return at

    # what waits

    def _wait(self, at: int, slot: int, values: Values, row: int, count: int) -> None:
        """Let a row's values wait at the next leg, or at all deeper ones of the stack."""
        stack = self.legs[at].stack
        ends = self._behind(at, stack) if self.propagate == "hidden" else at + 1
        for leg in range(at, ends):
            wanted = self._translated(values, at - 1, leg)
            self.pending[leg][slot].append({name: array[row, :count].copy() for name, array in wanted.items()})

    def _bounded(self, left: list[Left], slots: Index, whole: Callable[[], bool] | None) -> list[Left]:
        """Flush the rows of which ``max_pending`` tokens wait in a stack."""
        ends = {leg.stack: at for at, leg in enumerate(self.legs) if leg.stack is not None}
        made: dict[int, Values] = {}
        for stack, end in ends.items():
            first = next(at for at, leg in enumerate(self.legs) if leg.stack == stack)
            lacking = self.seen[first, slots] - self.seen[end, slots]
            if (full := slots[lacking >= self.max_pending]).size:
                made |= self.flush(full, first, whole)
        return [item._replace(whole=made[item.slot]) if item.slot in made else item for item in left]

    def _translated(self, values: Values, left: int, leg: int) -> Values:
        """The values of an exit under the names that a deeper leg reads."""
        here, there = self.legs[left].hidden, self.legs[leg - 1].hidden
        return {name: values[here if name == there and here else name] for name in self.legs[leg].reads}

    def waiting(self, leg: int, slot: int) -> int:
        """How many tokens of a row wait at a leg."""
        return sum(len(next(iter(values.values()))) for values in self.pending[leg][slot])

    def flush(self, slots: Index, start: int, whole: Callable[[], bool] | None = None) -> dict[int, Values]:
        """Compute what waits at the legs from ``start`` on, of these rows, to the end of the stack.

        Returns full depth's outputs for the tokens that got there, by slot, where ``whole`` wants them.
        """
        stack = self.legs[start].stack
        found: dict[int, Values] = {}
        for slot in slots.tolist():
            one, counts = np.array([slot]), np.zeros(1, np.int64)
            values: Values = {}
            for at in range(start, self._behind(start, stack)):
                if not self.pending[at][slot] and not counts[0]:
                    continue
                values, counts = self._with_pending(at, one, values, counts, {})
                values = self._run(self.legs[at], at, one, values, counts)
                door = self.legs[at].door
                if whole is not None and door is not None and door.full and door.ends and whole():
                    found[slot] = self._results(door, self._of_all(door, one, values, counts), 0, int(counts[0]))
                if self.propagate == "hidden":
                    values, counts = {}, np.zeros(1, np.int64)
        return found

    def rollback(self, slot: int, length: int) -> None:
        """Forget a row's tokens behind its first ``length``; what lies in caches behind their length is not read."""
        for at, leg in enumerate(self.pending):
            self.seen[at, slot] = min(self.seen[at, slot], length)
            kept, left = [], length - int(self.seen[at, slot])
            for values in leg[slot]:
                if left > 0:
                    kept.append({name: array[:left] for name, array in values.items()})
                    left -= len(next(iter(values.values())))
            leg[slot] = kept

    def _with_pending(
        self, at: int, slots: Index, values: Values, counts: Index, new: Mapping[int, int]
    ) -> tuple[Values, Index]:
        """What waits at a leg, then what comes in, of which so many tokens are new."""
        held = [self.pending[at][slot] for slot in slots]
        reads = self.legs[at].reads
        if not any(held):
            return {name: values[name] for name in reads}, counts
        rows: dict[str, list[Array]] = {name: [] for name in reads}
        for row, waits in enumerate(held):
            for name in reads:
                parts = [item[name] for item in waits]
                if counts[row]:
                    parts.append(values[name][row, : counts[row]])
                rows[name].append(np.concatenate(parts) if len(parts) > 1 else parts[0])
        total = np.array([len(row) for row in next(iter(rows.values()))], np.int64)
        for slot, count in zip(slots.tolist(), total.tolist(), strict=True):
            self.pending[at][slot] = []
            self.taken[slot] = max(count - new.get(slot, 0), self.taken.get(slot, 0))
        return {name: padded(arrays) for name, arrays in rows.items()}, total

    def _some(self, values: Values, rows: Index, counts: Index) -> Values:
        """The values of some rows, no wider than their tokens."""
        widest = greatest(counts) if counts.size else 0
        return {name: array[rows, :widest] if self._along(name) else array[rows] for name, array in values.items()}

    def _last(self, values: Values, slots: Index, counts: Index, wanted: Index) -> tuple[Values, Index]:
        """Only the last ``wanted`` tokens of each row."""
        if np.array_equal(counts, wanted):
            return values, counts
        rows = {
            name: padded(
                [array[row, count - want : count] for row, (count, want) in enumerate(zip(counts, wanted, strict=True))]
            )
            for name, array in values.items()
        }
        return rows, wanted

    # running

    def _run(self, leg: Leg, at: int, slots: Index, values: Values, counts: Index) -> Values:
        """The chunk's values after a leg, [slots, chunk, ...]; what the rows have seen grows."""
        found = dict(values)
        for call in leg.calls:
            found |= self.launcher.launch(call, self.seen[at], slots, found, counts)
        if slots.size == 1:  # which most steps have; picking rows by an array takes ten times as long
            self.seen[at, slots[0]] += counts[0]
        else:
            self.seen[at, slots] += counts
        return {name: array for name, array in found.items() if name in leg.leaves}

    # leaving

    def _asker(self, door: Door, leg: Leg, askers: Mapping[str, Asker] | None, picks: bool) -> Asker | None:
        """Who says which rows leave here, if anybody; at full depth, whether the tokens that were picked will do."""
        asker = askers[leg.stack or ""] if askers else None
        if asker is None or asker.wanted.get(door.after) is None:
            return None
        return None if door.full and not (picks and door.pick is not None) else asker

    def _ask(
        self,
        door: Door,
        slots: Index,
        values: Values,
        counts: Index,
        asker: Asker | None,
        rows: Mapping[int, _Row],
    ) -> _Answer:
        """Let the policy decide; what the exit said is kept in ``rows``."""
        if asker is None:
            return _Answer(np.zeros(slots.size, np.bool_))
        wanted = asker.wanted[door.after] or ()
        made = self._last_tokens(values, counts)
        if not door.free.issuperset(wanted):
            made = made | self._through(door, slots, made)
        found = {measure: made[door.scores[measure]].reshape(slots.size, -1)[:, -1] for measure in wanted}
        leave = asker.ask(door.after, self.rows[slots], found)
        scores = {measure: array.tolist() for measure, array in found.items()}
        tokens = () if door.pick is None else made[door.pick].reshape(slots.size, -1)[:, -1].tolist()
        ready = door.ends and all(value in made for value in door.results.values())
        for place, slot in enumerate(slots.tolist()):
            said = {measure: float(score[place]) for measure, score in scores.items()}
            row = rows[slot]
            row.scores = said or row.scores
            if door.ends:
                outputs = {name: made[value][place] for name, value in door.results.items()} if ready else None
                row.asked[door.after] = Asked(said, tokens[place] if tokens else None, outputs)
        return _Answer(leave, made, tokens)

    def _picked(self, slots: Index, answer: _Answer, picks: Callable[[int, int], bool]) -> dict[int, int]:
        """The tokens that the exit has picked and that will do, of the rows that leave."""
        if not answer.tokens:
            return {}
        places = slots.tolist()
        going = answer.leave.nonzero()[0].tolist()
        return {row: answer.tokens[row] for row in going if picks(places[row], answer.tokens[row])}

    def _all_picked(
        self, door: Door, slots: Index, values: Values, counts: Index, asker: Asker
    ) -> list[list[int]] | None:
        """The tokens that full depth picks for all tokens of each row, if the policy says of all that they will do."""
        assert door.pick is not None
        inside = np.arange(greatest(counts)) < counts[:, None]
        found = {measure: values[door.scores[measure]][inside] for measure in asker.wanted[door.after] or ()}
        repeated = np.repeat(self.rows[slots], counts)
        if not asker.judge(door.after, repeated, found, history=repeated.size == slots.size).all():
            return None
        return [row[:count] for row, count in zip(values[door.pick].tolist(), counts.tolist(), strict=True)]

    def _door(
        self, door: Door, slots: Index, values: Values, counts: Index, rows: list[int], made: Values | None
    ) -> Values:
        """The exit's values for ``rows``, on their last token."""
        if not rows or not door.ends:
            return {}
        if made is not None and all(value in made for value in door.results.values()):
            return {name: made[name][rows] for name in door.results.values()}
        return self._through(door, slots[rows], self._last_tokens(values, counts, np.array(rows)))

    def _left(self, slot: int, row: _Row, door: Door, made: Values, place: int, count: int | None) -> Left:
        """A row that leaves; the exit has ``made`` its values for so many tokens, or (None) for the last one."""
        if count is None:
            outputs = {name: made[value][place] for name, value in door.results.items()}
            return Left(slot, outputs, row.exits, row.scores, row.asked)
        whole = self._results(door, made, place, count)
        last = {name: array[-1:] for name, array in whole.items()}
        return Left(slot, last, row.exits, row.scores, row.asked, None, whole)

    def _results(self, door: Door, made: Values, row: int, count: int) -> Values:
        """The exit's results for all tokens of a row, under the names of the model's outputs."""
        return {name: made[value][row, :count] for name, value in door.results.items()}

    def _of_all(self, door: Door, slots: Index, values: Values, counts: Index) -> Values:
        """The exit's results for all tokens, [slots, chunk, ...]; a model that takes the last one runs one by one."""
        if all(map(self._along, door.results.values())):
            return self._through(door, slots, values, counts)
        made: list[Values] = []
        for place in range(greatest(counts)):
            here = {name: array[:, place : place + 1] if self._along(name) else array for name, array in values.items()}
            found = self._through(door, slots, here)
            made.append({value: found[value].reshape(slots.size, -1) for value in door.results.values()})
        return {value: np.stack([each[value] for each in made], 1) for value in door.results.values()}

    def _through(self, door: Door, slots: Index, values: Values, counts: Index | None = None) -> Values:
        found = dict(values)
        ones = np.ones(slots.size, np.int64) if counts is None else counts
        for call in door.calls:
            made = self.launcher.launch(call, np.zeros(self.store.slots, np.int64), slots, found, ones)
            found |= {name: array.copy() for name, array in made.items()}
        return found

    def _onward(self, door: Door, slots: Index, values: Values, counts: Index, rows: Index, wanted: Index) -> Values:
        """What goes on to the next stages: the last ``wanted`` tokens of rows that left this stack."""
        some = self._some(values, rows, counts[rows])
        some, counted = self._last(some, slots, counts[rows], wanted)
        for call in door.calls:
            some = some | self.launcher.launch(call, np.zeros(self.store.slots, np.int64), slots, some, counted)
        return {**some, **{full: some[here] for full, here in door.results.items()}}

    def _last_tokens(self, values: Values, counts: Index, rows: Index | None = None) -> Values:
        """The last token of each of ``rows`` (None: of all): [rows, 1, ...]."""
        if rows is None:
            if greatest(counts) == 1:
                return values
            rows = np.arange(counts.size)
        at = counts[rows] - 1
        return {name: array[rows, at][:, None] if self._along(name) else array[rows] for name, array in values.items()}

    def _along(self, name: str) -> bool:
        return axis_of(self.manifest.values[name], self.store.cache.chunk) == 1

    def rearrange(self, sources: Sequence[int]) -> None:
        """Slot ``i`` gets what slot ``sources[i]`` had."""
        self.store.rearrange(sources)
        count = len(sources)
        self.seen[:, :count] = self.seen[:, list(sources)]
        self.seen[:, count:] = 0
        self.rows[:count] = self.rows[list(sources)]
        for leg in self.pending:
            leg[:count] = [list(leg[source]) for source in sources]
