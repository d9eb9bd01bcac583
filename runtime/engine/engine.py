"""Stages, run on a batch: segments one after the other, stacks as loops that rows leave."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from time import perf_counter

import numpy as np
import onnxruntime as ort

from offramp.bundle.manifest import Manifest, Stack
from offramp.bundle.schedule import Schedule, Step
from offramp.runtime.engine.binding import bind
from offramp.runtime.engine.loop import Asked, Loop, depths, joined
from offramp.runtime.engine.memory import Env, Index, Memory
from offramp.runtime.engine.widths import Sites, Widths
from offramp.runtime.policies.group_policy import StackLike
from offramp.runtime.policies.stack_policy import Record
from offramp.runtime.result import Timing


@dataclass
class Ran:
    """What stages have left behind: values by name, where each row left each stack, what was scored, and what ran."""

    values: Env
    widths: Widths
    exits: dict[str, Index] = field(default_factory=dict)
    scores: dict[str, Record] = field(default_factory=dict)
    trace: list[Timing] = field(default_factory=list)


class Engine:
    """A bundle's schedule, with its segments bound to sessions.

    Raises:
        BundleError: a segment's bindings do not fit its file.
    """

    def __init__(self, manifest: Manifest, sessions: Mapping[str, ort.InferenceSession], memory: Memory) -> None:
        self._manifest, self.memory = manifest, memory
        self.schedule = Schedule.of(manifest)
        self._calls = bind(manifest, sessions, memory)
        self._sites = Sites(manifest)

    def run(self, values: Env, batch: int, policies: Mapping[str, StackLike], when: str | None = None) -> Ran:
        """Run the stages of that ``when``, and keep every value; or (None) all of them, for the outputs alone.

        ``values`` are this engine's memory's, and left as they are.
        """
        ran = Ran(dict(values), Widths(self._sites))
        for step in self.schedule.steps:
            if when is None:
                self._step(step, ran, batch, policies)
                ran.values = self.memory.take(ran.values, step.live, None)
            elif step.stage.when == when:
                self._step(step, ran, batch, policies)
        return ran

    def _asked(self, stack: Stack, values: Env) -> Asked | None:
        """The value that says which of all tokens the stack's exits score."""
        cache = self._manifest.cache
        if stack.asked is None or cache is None:
            return None
        name = cache.tokens[0]
        axis = self._manifest.values[name].shape.index(cache.chunk)
        return Asked(stack.asked, self.memory.get(values[name]).shape[axis])

    def _step(self, step: Step, ran: Ran, batch: int, policies: Mapping[str, StackLike]) -> None:
        loop, rows = Loop(self._calls, self.memory, ran.trace, ran.widths), np.arange(batch)
        if step.stack is None:
            loop.segments(step.segments, ran.values, rows)
            return
        name = step.stack.name
        started = perf_counter()
        inside = self.memory.take(ran.values, step.reads, None)
        left = loop.stack(step.spans, inside, rows, policies[name], self._asked(step.stack, ran.values))
        found = depths(left, batch)
        ran.exits |= policies[name].exits(found)
        ran.scores |= policies[name].records()
        policies[name].report(found, (perf_counter() - started) * 1e3)
        ran.values |= joined(left, self._manifest.values, self._manifest.batch, batch, self.memory)
