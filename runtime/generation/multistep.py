"""Several tokens of one row in one run (`Part.steps`): all but the last have left at the first exit, or none has."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from offramp.bundle.manifest import STEPS, in_steps, least_of
from offramp.bundle.schedule import Branch
from offramp.runtime.engine.memory import every
from offramp.runtime.generation.batching import Index, SlotRunner, Values
from offramp.runtime.generation.chunk_spans import ChunkSpan
from offramp.runtime.generation.decision import Asked
from offramp.runtime.generation.groups import Group
from offramp.runtime.generation.results import RowResult
from offramp.runtime.policies.base import Bound
from offramp.runtime.policies.stack_policy import StackPolicy

MOST = 16  # tokens of a run: a stream has none of them before all are there
CACHES = 1 << 20  # bytes that a part keeps of a row: the loop copies them for each token, 25 us


class Several(NamedTuple):
    """Tokens of the row in ``slot`` behind a span: its values of each, [tokens, ...], and the token that follows."""

    slot: int
    span: ChunkSpan
    branch: Branch
    values: Values
    picks: Sequence[int]

    @property
    def left(self) -> Values:
        """The values of those that have left."""
        return {name: array[:-1] for name, array in self.values.items()}

    def last(self) -> Group:
        """The last one, which is on its way."""
        values = {name: array[None, -1:] for name, array in self.values.items()}
        return Group(np.array([self.slot]), values, np.ones(1, np.int64))

    def results(self, asked: tuple[StackPolicy, Sequence[str]] | None, row: int) -> list[RowResult]:
        """What those have left with, which are of this ``row`` of the batch; the policy is notified that was asked."""
        count, after = len(self.picks) - 1, self.branch.after
        exits = {self.span.stack or "": after}
        if asked is None:
            return [RowResult(self.slot, {}, exits, {}, {}, pick) for pick in self.picks[:-1]]
        policy, measures = asked
        scores = {measure: self.values[self.branch.scores[measure]][:-1] for measure in measures}
        policy.notify(after, row, count, scores)
        found = []
        columns = [array.tolist() for array in scores.values()]
        for pick, *said in zip(self.picks[:-1], *columns, strict=True):
            named = dict(zip(scores, said, strict=True))
            found.append(RowResult(self.slot, {}, exits, named, {after: Asked(named, pick, None)}, pick))
        return found


def several(
    span: ChunkSpan, branch: Branch, runner: SlotRunner, seen: Index, group: Group, bound: Bound, most: int
) -> Several:
    """Run a span for one row's token, and for those that its exit picks, until one scores less than the bound."""
    assert span.steps is not None
    given: Values = {**group.values, STEPS: np.array(most, np.int64)}
    if span.asked is not None:
        given[span.asked] = every(1, 1)
    for measure in () if branch.full else branch.free:
        given[least_of(measure)] = np.array(bound.least if measure == bound.measure else -np.inf, np.float32)
    made = runner.run(span.steps, seen, group.slots, given, group.counts)
    picks = made[branch.next].reshape(-1)
    values = {
        name: made[in_steps(name)].reshape(picks.size, *made[in_steps(name)].shape[3:])
        for name in span.leaves
        if in_steps(name) in made
    }
    for name, array in group.values.items():
        values[name] = np.concatenate([array[0], picks[:-1].astype(array.dtype)])
    return Several(int(group.slots[0]), span, branch, values, picks.tolist())
