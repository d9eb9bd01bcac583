"""What leaving where costs in milliseconds, gates and late computations included."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from offramp.bundle.manifest import Manifest, Stack
from offramp.bundle.schedule import Schedule

Numbers = NDArray[np.float64]
FASTER = 0.98  # of another time, from which on a time is shorter by more than noise


@dataclass(frozen=True)
class Costs:
    """Milliseconds of a step: a row, or a token after the prompt.

    Attributes:
        around: Of what runs whatever happens, before the stack and behind it.
        blocks: From each exit to the next, [exits], full depth last.
        further: Of each further token that goes along there, [exits]; 0 for rows.
        tails: Of an exit's adapter and tail, [exits].
        free: By measure whether asking for it costs nothing, bool [exits before full depth]: else the exit's adapter
            and tail run for all who are asked.
        picks: Whether an exit picks the token, so that leaving there runs neither, bool [exits]; None where none does.
        wide: Of a step to full depth with all learners, where these are the costs of a step beside less; else None.
        at_once: Of a step to full depth where nobody is asked (`Stack.whole`); None: the sum of the others.
        ahead: What a token takes less that leaves at the first exit, where one run makes several (`Part.steps`).
    """

    around: float
    blocks: Numbers
    further: Numbers
    tails: Numbers
    free: Mapping[str, NDArray[np.bool_]]
    picks: NDArray[np.bool_] | None = None
    wide: float | None = None
    at_once: float | None = None
    ahead: float = 0.0

    @classmethod
    def of(
        cls,
        manifest: Manifest,
        stack: Stack,
        times: Mapping[str, float],
        late: Mapping[str, float] | None = None,
        tokens: int = 1,
    ) -> Costs:
        """From the milliseconds of every segment: of one token, and ``late`` those of so many tokens at once."""

        def spent(names: Iterable[str], in_: Mapping[str, float]) -> float:
            return sum(in_.get(name, 0.0) for name in names)

        when = next(stage.when for stage in manifest.stages if stage.stack == stack.name)
        schedule = Schedule.of(manifest, (when,) if manifest.cache else None)
        own = schedule.of_stack(stack.name)
        branches = [span.branch for span in own.spans if span.branch is not None]
        others = [step for step in schedule.steps if step is not own]
        around = [name for step in others for span in step.spans for name in span.segments]
        around += [name for step in others if (last := step.spans[-1].branch) for name in last.segments]
        blocks = np.array([spent(span.segments, times) for span in own.spans])
        further = blocks.copy()  # where it could not be timed, a token that waited costs as much as any
        if late:
            many = np.array([spent(span.segments, {**times, **late}) for span in own.spans])
            further = np.maximum(many - blocks, 0.0) / (tokens - 1)
        further[0] = 0.0  # nothing waits before the first exit
        early = branches[:-1]
        return cls(
            around=spent(around, times),
            blocks=blocks,
            further=further,
            tails=np.array([spent(branch.segments, times) for branch in branches]),
            picks=np.array([bool(manifest.cache) and b.pick is not None and (b.exact or not b.full) for b in branches]),
            free={
                measure: np.array([measure not in branch.scores or measure in branch.free for branch in early])
                for measure in sorted({measure for branch in early for measure in branch.scores})
            },
        )

    @classmethod
    def of_ways(cls, ways: Sequence[float], wide: float | None, stack: Stack) -> Costs:
        """From the milliseconds of a row that leaves at each exit, where what it takes is no sum of segments."""
        steps = np.maximum(np.diff(ways, prepend=0.0), 0.0)
        none = np.zeros(len(ways))
        measures = {measure for exit_ in stack.exits[:-1] for measure in exit_.scores}
        free = {measure: np.ones(len(ways) - 1, np.bool_) for measure in sorted(measures)}
        return cls(0.0, steps, none, none, free, wide=wide)

    @property
    def full(self) -> float:
        """A step to full depth, where no one is asked."""
        return float(self.around + self.blocks.sum() + self.leave[-1]) if self.at_once is None else self.at_once

    @property
    def whole(self) -> float:
        """What settings are compared with: a step to full depth with all learners."""
        return self.full if self.wide is None else self.wide

    @property
    def leave(self) -> Numbers:
        """What leaving costs where nothing was run to ask, [exits]."""
        return self.tails if self.picks is None else np.where(self.picks, 0.0, self.tails)

    def gates(self, measure: str) -> Numbers:
        """What asking for a measure costs a step that does not leave, [exits before full depth]."""
        return np.where(self.free[measure], 0.0, self.tails[:-1])

    def expected(
        self,
        taken: NDArray[np.int64],
        lengths: NDArray[np.int64],
        measure: str | None = None,
        asked: NDArray[np.bool_] | None = None,
    ) -> float:
        """The mean of all steps.

        Args:
            taken: Which exit each step leaves by, [steps]: 0 is the first.
            lengths: How many steps in a row are of one generation, which late computations are for.
            measure: What is asked for; None for a gate that knows, and costs nothing.
            asked: Where, bool [exits before full depth].
        """
        steps = np.arange(taken.size)
        starts = np.repeat(lengths.cumsum() - lengths, lengths)
        run = np.zeros(len(self.tails), np.bool_)
        if measure is not None:
            run[:-1] = ~self.free[measure]
        total = self.around + np.where(run, self.tails, self.leave)[taken]
        if measure is None or self.free[measure][0]:
            total = total - self.ahead * (taken == 0)
        for leg, (first, further) in enumerate(zip(self.blocks, self.further, strict=True)):
            through = taken >= leg
            total = total + through * first
            if further:
                last = np.maximum.accumulate(np.where(through, steps, -1))
                before = np.maximum(np.concatenate([[-1], last[:-1]]), starts - 1)
                total = total + through * further * (steps - before - 1)
        if measure is not None and asked is not None:
            gates = np.where(asked, self.gates(measure), 0.0)
            total = total + np.concatenate([[0.0], gates.cumsum()])[taken]
        return float(total.mean())
