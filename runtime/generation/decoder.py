"""Chunks through a bundle with caches: spans run, rows leave at exits, and what they skipped waits for them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from offramp.bundle.schedule import Branch
from offramp.runtime.engine.memory import every
from offramp.runtime.engine.widths import Widths
from offramp.runtime.generation.batching import Index, SlotRunner, Values, greatest
from offramp.runtime.generation.buffers import Store
from offramp.runtime.generation.chunk_spans import ChunkSpan
from offramp.runtime.generation.copied_caches import CopiedCaches
from offramp.runtime.generation.decision import Decision, Notes, Wanted, all_accepted, all_picked, decide, picked
from offramp.runtime.generation.groups import Group, joined
from offramp.runtime.generation.multistep import several
from offramp.runtime.generation.results import RowResult
from offramp.runtime.generation.waiting import Waiting
from offramp.runtime.policies.base import Bound
from offramp.runtime.policies.stack_policy import StackPolicy

if TYPE_CHECKING:
    from offramp.runtime.generation.plan import GenerationPlan

NOTHING = Wanted()
_STAYED = 2  # a run of one token takes longer where it could have been of several


@dataclass
class _Step:
    """What one step is asked for, and what it has found so far; ``new`` and ``notes`` are by slot.

    ``whole`` is what `Wanted.whole` said where rows got to full depth: it is asked once, since it may count. ``most``
    is how many tokens the one row may run for, ``before`` are those that left before the last of them; ``pick`` is what
    follows the last one, where such a run goes to full depth.
    """

    policies: Mapping[str, StackPolicy] | None
    wanted: Wanted
    new: Mapping[int, int]
    notes: Mapping[int, Notes]
    results: list[RowResult]
    whole: bool = False
    most: int = 1
    before: Sequence[RowResult] = ()
    pick: int | None = None


class Decoder:
    """The state of a generation, and the one way to bring it forward.

    ``rows[slot]`` is the place in the batch of what the slot holds, which policies see; ``caught_up`` how many tokens
    that had waited the last `step` computed deeper. With ``max_pending`` a row has at most one less waiting.
    ``propagate`` is "defer" (exact) or "hidden": where a row leaves, its hidden state stands for those of all
    deeper blocks (CALM, arXiv 2207.07061, sec. 3.3), which are then computed from it, when a token goes deep; or "kv":
    its keys and values there stand for theirs (`CopiedCaches`), and nothing waits.
    """

    def __init__(
        self,
        plan: GenerationPlan,
        store: Store,
        propagate: str = "defer",
        max_pending: int | None = None,
    ) -> None:
        self.manifest, self.spans, self.store = plan.manifest, plan.spans, store
        self.propagate, self.max_pending = propagate, max_pending
        self.runner = SlotRunner(store)
        self._sites, self._along = plan.sites, plan.along
        self.widths = Widths(self._sites)
        self.waiting = Waiting([span.reads for span in self.spans], store.slots)
        self.rows: Index = np.arange(store.slots)
        self._caught_up: dict[int, int] = {}
        self._nowhere = np.zeros(store.slots, np.int64)
        self._copied = CopiedCaches(plan.manifest, plan.spans) if propagate == "kv" else None
        only = self.spans[0].branch if len(self.spans) == 1 else None
        self._only = only if only is not None and only.ends and only.pick is not None else None
        self._stayed = 0  # runs of one token that could have been of several, since the last one that left first

    @property
    def seen(self) -> Index:
        """How many tokens each span has computed of each slot, int64 [spans, slots]."""
        return self.waiting.seen

    @property
    def caught_up(self) -> int:
        """How many tokens that had left early the last step computed deeper, over all rows."""
        return sum(self._caught_up.values())

    def step(
        self,
        slots: Index,
        values: Values,
        counts: Index,
        policies: Mapping[str, StackPolicy] | None,
        wanted: Wanted = NOTHING,
        most: int = 1,
    ) -> list[RowResult]:
        """Run new tokens: ``values`` hold ``[slots, chunk, ...]``, of which each row has ``counts`` tokens.

        ``policies`` (by stack) decide where rows leave; None runs all to full depth. One row with one token may run on
        by itself, for ``most`` tokens in all, while they leave at the first exit, or at full depth where nobody is
        asked: see `multistep`.
        """
        self._caught_up = {}
        one = most == 1 and counts.size == counts[0] == 1 and wanted.whole is None
        if one and self._only is not None and wanted.picks(self._only):
            return self._alone(self._only, slots, values, counts, wanted)
        new = dict(zip(slots.tolist(), counts.tolist(), strict=True))
        step = _Step(policies, wanted, new, {slot: Notes() for slot in new}, [], most=most)
        at, groups = 0, [Group(slots, values, counts)]
        while groups:  # a stack after the other, in which all rows are asked together, wherever they left the last
            at, groups = self._stack(step, at, joined(groups, self.spans[at].reads))
        if step.before:
            step.results = [item._replace(before=step.before) for item in step.results]
        return step.results if self.max_pending is None else self._bounded(step.results, slots, wanted.whole)

    def _alone(self, branch: Branch, slots: Index, values: Values, counts: Index, wanted: Wanted) -> list[RowResult]:
        """What `_stack` finds for one token of one row, where a single span gets to full depth and picks the next.

        The shorter way saves 2% of a large model's token: its weights have driven Python out of the processor's caches.
        """
        span, slot = self.spans[0], int(slots[0])
        group = Group(slots, self._run(0, slots, values, counts, every(1, 1)), counts)
        (token,) = picked(branch, group.values, 1)
        if token >= 0 and wanted.accepts is not None and wanted.accepts(slot, token):
            return [RowResult(slot, {}, {span.stack or "": branch.after}, {}, {}, token)]
        step = _Step(None, Wanted(), {slot: 1}, {slot: Notes()}, [])
        decision = Decision(np.ones(1, np.bool_), group.last_tokens(self._along))
        self._leave(1, span, branch, group, decision, np.arange(1), step)
        return step.results

    def _stack(self, step: _Step, at: int, group: Group) -> tuple[int, list[Group]]:
        """Run rows from a span on until all have left its stack; where the next begins, and what goes on there."""
        onward: list[Group] = []
        behind = at
        while at < len(self.spans):
            span = self.spans[at]
            if span.branch is not None and span.branch.full and span.branch.ends:
                step.whole = step.wanted.whole is not None and step.wanted.whole()
            group = (self._ahead(at, group, step) if step.most > 1 else None) or self._span(at, group, step)
            at += 1
            if span.branch is None:
                continue
            behind = self.spans[at - 1].end
            decision = self._decide(span, span.branch, group, step)
            go = np.arange(group.slots.size) if span.branch.full else decision.leave.nonzero()[0]
            if go.size:
                onward += self._leave(at, span, span.branch, group, decision, go, step)
            if go.size == group.slots.size:
                break
            if go.size:
                group = self._staying(span, group, decision, step)
        return behind, onward

    def _span(self, at: int, group: Group, step: _Step) -> Group:
        """Rows with what waited for them, after a span."""
        slots, values, counts = group
        values, total = self.waiting.taken(at, slots, values, counts)
        if total is not counts:
            for slot, count in zip(slots.tolist(), total.tolist(), strict=True):
                self._caught_up[slot] = max(count - step.new.get(slot, 0), self._caught_up.get(slot, 0))
        values = self._run(at, slots, values, total, self._asked(self.spans[at], total, step))
        if self.propagate == "hidden" and self.spans[at].stack is not None:  # what waited went its own way already
            return Group(slots, values, total).last(counts)
        return Group(slots, values, total)

    def _ahead(self, at: int, group: Group, step: _Step) -> Group | None:
        """The last token of a row that runs on by itself, behind a span that those before it have left; None: no row.

        Those wait from then on, unless that is full depth, and are in ``step.before``.
        """
        span, branch, most = self.spans[at], self.spans[at].branch, float(step.most)
        if span.steps is None or branch is None or self._stayed >= _STAYED:
            return None
        asking = self._asking(span, branch, step)
        bound = self._bound(branch, asking, step)
        if bound is None:
            return None
        most = min(most, bound.tokens + 1)
        if self.max_pending is not None and not branch.full:
            most = min(most, self.max_pending - int((self.seen[at] - self.seen[span.end - 1])[group.slots[0]]))
        if most < 2:
            return None
        ran = several(span, branch, self.runner, self.seen[at], group, bound, int(most))
        self._stayed += 1
        if left := len(ran.picks) - 1:
            self._stayed = 0
            self.waiting.advance(at, group.slots, np.array([left]))
            if not branch.full:
                self._skip(at + 1, ran.slot, branch.after, ran.left, left)
            step.before = ran.results(asking, int(self.rows[ran.slot]))
        if branch.full:
            step.pick = ran.picks[-1]
        self.waiting.advance(at, group.slots, group.counts)
        return ran.last()

    def _bound(self, branch: Branch, asking: tuple[StackPolicy, tuple[str, ...]] | None, step: _Step) -> Bound | None:
        """Up to where a row may run on by itself at an exit, which needs no one but the exit's own scores; or None."""
        if branch.full:
            return Bound() if asking is None and step.wanted.accepts is not None and not step.whole else None
        if asking is None or not branch.free.issuperset(asking[1]):
            return None
        bound = asking[0].bound(branch.after)
        return None if bound is None or (bound.measure is not None and bound.measure not in asking[1]) else bound

    def _asked(self, span: ChunkSpan, counts: Index, step: _Step) -> Index | None:
        """Which tokens of each row the span's exit scores, int64 [rows, asked]: the last one, or all; None: no one."""
        if span.asked is None or span.branch is None:
            return None
        if not step.wanted.picks(span.branch):
            asking = self._asking(span, span.branch, step)
            if asking is None or (span.branch.pick is None and span.branch.free.isdisjoint(asking[1])):
                return None
        if span.branch.full and step.whole:
            return every(counts.size, greatest(counts))
        return counts[:, None] - 1

    def _decide(self, span: ChunkSpan, branch: Branch, group: Group, step: _Step) -> Decision:
        """What the policy says of the rows; nobody leaves where it is not asked."""
        if step.pick is not None:
            return Decision(np.ones(1, np.bool_), None, [step.pick])
        if step.wanted.picks(branch):
            made, rows = group.last_tokens(self._along), group.slots.size
            return Decision(np.ones(rows, np.bool_), made, picked(branch, made, rows))
        asking = self._asking(span, branch, step)
        if asking is None:
            return Decision(np.zeros(group.slots.size, np.bool_))
        policy, asked = asking
        made = group.last_tokens(self._along)
        if not branch.free.issuperset(asked):
            made = made | self._through(span, group.slots, made)
        notes = [step.notes[slot] for slot in group.slots.tolist()]
        return decide(branch, policy, asked, made, self.rows[group.slots], notes)

    def _asking(self, span: ChunkSpan, branch: Branch, step: _Step) -> tuple[StackPolicy, tuple[str, ...]] | None:
        """The policy that is asked at an exit, and the scores that it wants; None where nobody is."""
        policy = step.policies[span.stack or ""] if step.policies else None
        if policy is None or (branch.full and (step.wanted.accepts is None or branch.pick is None or branch.exact)):
            return None  # at full depth the question is whether the token that was picked will do
        asked = policy.wanted.get(branch.after)
        return None if asked is None else (policy, asked)

    def _leave(
        self, at: int, span: ChunkSpan, branch: Branch, group: Group, decision: Decision, go: Index, step: _Step
    ) -> list[Group]:
        """Note the rows that leave, with their results, or let them go on to the next stack; the skipped spans wait."""
        for row in go.tolist():
            slot = int(group.slots[row])
            step.notes[slot].exits[span.stack or ""] = branch.after
            if not branch.full:
                self._stayed = 0
                count = int(group.counts[row])
                values = {name: array[row, :count] for name, array in group.values.items()}
                self._skip(at, slot, branch.after, values, count)
        if branch.ends:
            step.results += self._results(span, branch, group, decision, go.tolist(), step)
            return []
        counts = np.array([step.new[slot] for slot in group.slots[go].tolist()])
        return [Group(group.slots[go], self._onward(span, branch, group, go, counts), counts)]

    def _results(
        self, span: ChunkSpan, branch: Branch, group: Group, decision: Decision, go: list[int], step: _Step
    ) -> list[RowResult]:
        """What rows leave the last stack with: a token that was picked, outputs for the last token, or for all."""
        whole = branch.full and step.whole
        deep = self._all_picked(span, branch, group, step) if whole else None
        whole = whole and deep is None
        picked = {} if whole else decision.accepted(group.slots, step.wanted.accepts)
        answered = [row for row in go if row not in picked]
        if whole:
            made = self._of_all(span, branch, group)
        else:
            made = self._of_last(span, branch, group, answered, decision.made)
        found = []
        for row in go:
            slot = int(group.slots[row])
            notes, outputs, all_ = step.notes[slot], {}, None
            if whole:
                all_ = {name: made[value][row, : group.counts[row]] for name, value in branch.results.items()}
                outputs = {name: array[-1:] for name, array in all_.items()}
            elif row not in picked:
                place = answered.index(row)
                outputs = {name: made[value][place] for name, value in branch.results.items()}
            pick, late = picked.get(row), None if deep is None else deep[row]
            found.append(RowResult(slot, outputs, notes.exits, notes.scores, notes.asked, pick, all_, late))
        return found

    def _all_picked(self, span: ChunkSpan, branch: Branch, group: Group, step: _Step) -> list[list[int]] | None:
        if not step.wanted.picks(branch):
            asking = self._asking(span, branch, step)
            rows = self.rows[group.slots]
            if asking is None or not all_accepted(branch, *asking, group.values, rows, group.counts):
                return None
        return all_picked(branch, group.values, group.counts)

    def _staying(self, span: ChunkSpan, group: Group, decision: Decision, step: _Step) -> Group:
        """The rows that have not left."""
        (stay,) = np.nonzero(~decision.leave)
        if step.policies is not None:
            step.policies[span.stack or ""].keep(stay)
        return group.rows(stay, self._along)

    def _of_last(self, span: ChunkSpan, branch: Branch, group: Group, rows: list[int], made: Values | None) -> Values:
        """The exit's values for ``rows``, on their last token."""
        if not rows:
            return {}
        if made is not None and all(value in made for value in branch.results.values()):
            return {name: made[name][rows] for name in branch.results.values()}
        made = self._through(span, group.slots[rows], group.last_tokens(self._along, np.array(rows)))
        return made | {name: made[name].copy() for name in branch.results.values() if name in group.values}

    def _of_all(self, span: ChunkSpan, branch: Branch, group: Group) -> Values:
        """The exit's results for all tokens, [slots, chunk, ...]; a model that takes the last one runs one by one."""
        slots, values, counts = group
        if self._along.issuperset(branch.results.values()):
            return self._through(span, slots, values, counts)
        made: list[Values] = []
        for place in range(greatest(counts)):
            here = {
                name: array[:, place : place + 1] if name in self._along else array for name, array in values.items()
            }
            found = self._through(span, slots, here)
            made.append({value: found[value].reshape(slots.size, -1) for value in branch.results.values()})
        return {value: np.stack([each[value] for each in made], 1) for value in branch.results.values()}

    def _onward(self, span: ChunkSpan, branch: Branch, group: Group, rows: Index, wanted: Index) -> Values:
        """What goes on to the next stages: the last ``wanted`` tokens of rows that left this stack."""
        slots, values, counts = group.rows(rows, self._along).last(wanted)
        values = self._through(span, slots, values, counts)
        return {**values, **{full: values[here] for full, here in branch.results.items()}}

    # what waits

    def _skip(self, at: int, slot: int, after: int, values: Values, count: int) -> None:
        """Let the spans from ``at`` on do without a row's last tokens, which have these values behind the exit."""
        if self._copied is not None:
            self._copy(self._copied, at, slot, after, count)
        else:
            self._wait(at, slot, values)

    def _wait(self, at: int, slot: int, values: Values) -> None:
        """Let a row's values wait at the next span, or at all deeper ones of the stack."""
        ends = self.spans[at].end if self.propagate == "hidden" else at + 1
        here = self.spans[at - 1].state
        for span in range(at, ends):
            there = self.spans[span - 1].state
            names = {name: here if name == there and here else name for name in self.spans[span].reads}
            self.waiting.hold(span, slot, {name: values[source].copy() for name, source in names.items()})

    def _copy(self, copied: CopiedCaches, at: int, slot: int, after: int, count: int) -> None:
        """Let the deeper spans have seen a row's last tokens, by the caches of the block that ran last."""
        seen = int(self.seen[at - 1, slot])
        copied.copy(self.store, self.spans[at - 1].stack or "", after, slot, slice(seen - count, seen))
        self.seen[at : self.spans[at].end, slot] = seen

    def flush(self, slots: Index, start: int, whole: Callable[[], bool] | None = None) -> dict[int, Values]:
        """Compute what waits at the spans from ``start`` on, of these rows, to the end of the stack.

        Returns full depth's outputs for the tokens that got there, by slot, where ``whole`` wants them.
        """
        found: dict[int, Values] = {}
        for slot in slots.tolist():
            group = Group(np.array([slot]), {}, np.zeros(1, np.int64))
            for at in range(start, self.spans[start].end):
                if not self.waiting.count(at, slot) and not group.counts[0]:
                    continue
                values, counts = self.waiting.taken(at, *group)
                self._caught_up[slot] = max(int(counts[0]), self._caught_up.get(slot, 0))
                group = Group(group.slots, self._run(at, group.slots, values, counts), counts)
                span, branch = self.spans[at], self.spans[at].branch
                if whole is not None and branch is not None and branch.full and branch.ends and whole():
                    made = self._of_all(span, branch, group)
                    found[slot] = {name: made[value][0, : counts[0]] for name, value in branch.results.items()}
                if self.propagate == "hidden":
                    group = Group(group.slots, {}, np.zeros(1, np.int64))
        return found

    def _bounded(self, results: list[RowResult], slots: Index, whole: Callable[[], bool] | None) -> list[RowResult]:
        """Flush the rows of which ``max_pending`` tokens wait in a stack."""
        made: dict[int, Values] = {}
        for stack in dict.fromkeys(span.stack for span in self.spans if span.stack is not None):
            inside = [at for at, span in enumerate(self.spans) if span.stack == stack]
            lacking = self.seen[inside[0], slots] - self.seen[inside[-1], slots]
            if (full := slots[lacking >= self.max_pending]).size:
                made |= self.flush(full, inside[0], whole)
        return [item._replace(whole=made[item.slot]) if item.slot in made else item for item in results]

    def rollback(self, slot: int, length: int) -> None:
        """Forget a row's tokens behind its first ``length``."""
        self.waiting.rollback(slot, length)

    def rearrange(self, sources: Sequence[int]) -> None:
        """Slot ``i`` gets what slot ``sources[i]`` had."""
        self.store.rearrange(sources)
        self.waiting.rearrange(sources)
        self.rows[: len(sources)] = self.rows[list(sources)]

    # running

    def _run(self, at: int, slots: Index, values: Values, counts: Index, asked: Index | None = None) -> Values:
        """The chunk's values after a span, [slots, chunk, ...]; what the rows have seen grows."""
        found, span = dict(values), self.spans[at]
        if span.asked is not None:
            found[span.asked] = every(slots.size, 0) if asked is None else asked
        for call in span.calls:
            found |= self.runner.run(call, self.seen[at], slots, found, counts)
            for _, item in self._sites.of[call.segment.name]:
                taken = [row[:count] for row, count in zip(found[item.count], counts.tolist(), strict=True)]
                self.widths.add(item, np.concatenate(taken))
        self.waiting.advance(at, slots, counts)
        return {name: array for name, array in found.items() if name in span.leaves}

    def _through(self, span: ChunkSpan, slots: Index, values: Values, counts: Index | None = None) -> Values:
        """The values with those of the span's exit; of one token a row where ``counts`` are left out."""
        found = dict(values)
        ones = np.ones(slots.size, np.int64) if counts is None else counts
        for call in span.branch_calls:
            made = self.runner.run(call, self._nowhere, slots, found, ones)
            found |= {name: array.copy() for name, array in made.items()}
        return found
