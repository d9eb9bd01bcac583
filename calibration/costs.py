"""What leaving where costs in milliseconds, gates and late computations included."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from offramp.bundle.manifest import PICK, Manifest, Stack

Numbers = NDArray[np.float64]


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
    """

    around: float
    blocks: Numbers
    further: Numbers
    tails: Numbers
    free: Mapping[str, NDArray[np.bool_]]
    picks: NDArray[np.bool_] | None = None

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
        legs: list[tuple[str, ...]] = []
        waiting: tuple[str, ...] = ()
        depths = {exit_.after for exit_ in stack.exits}
        for part in stack.parts:
            waiting += part.segments
            if part.depth in depths:
                legs.append(waiting)
                waiting = ()
        own = {name for leg in legs for name in leg} | {name for exit_ in stack.exits for name in exit_.segments}
        chunked = {s.segment for s in manifest.stages if s.segment and (not manifest.cache or s.when == "chunk")}
        for stage in manifest.stages:
            if stage.stack and (not manifest.cache or stage.when == "chunk"):
                other = manifest.stacks[stage.stack]
                chunked |= {name for part in other.parts for name in part.segments} | set(other.exits[-1].segments)
        blocks = np.array([sum(times.get(name, 0.0) for name in leg) for leg in legs])
        further = blocks.copy()  # where it could not be timed, a token that waited costs as much as any
        if late:
            many = np.array([sum(late.get(name, times.get(name, 0.0)) for name in leg) for leg in legs])
            further = np.maximum(many - blocks, 0.0) / (tokens - 1)
        further[0] = 0.0  # nothing waits before the first exit
        made = [
            {value for name in exit_.segments for value in manifest.segments[name].outputs.values()}
            for exit_ in stack.exits[:-1]
        ]
        measures = {measure for exit_ in stack.exits[:-1] for measure in exit_.scores}
        return cls(
            around=sum(times.get(name, 0.0) for name in chunked - own),
            blocks=blocks,
            further=further,
            tails=np.array([sum(times.get(name, 0.0) for name in exit_.segments) for exit_ in stack.exits]),
            picks=np.array([bool(manifest.cache) and PICK in e.scores and e.after < stack.blocks for e in stack.exits]),
            free={
                measure: np.array(
                    [exit_.scores.get(measure) not in values for exit_, values in zip(stack.exits, made, strict=False)]
                )
                for measure in sorted(measures)
            },
        )

    @property
    def full(self) -> float:
        """A step to full depth, where no one is asked."""
        return float(self.around + self.blocks.sum() + self.tails[-1])

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
