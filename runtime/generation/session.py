"""One generation: what ran once for its inputs, its rows in their slots, and steps that bring them forward."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from time import perf_counter
from typing import Any

import numpy as np
from numpy.typing import NDArray

from offramp.bundle.manifest import FREELY
from offramp.bundle.options import OPTIONS, PROPAGATE, Sampling
from offramp.errors import InputError
from offramp.runtime.engine.engine import Ran
from offramp.runtime.engine.memory import places
from offramp.runtime.generation.batching import greatest, padded
from offramp.runtime.generation.decision import Wanted
from offramp.runtime.generation.decoder import NOTHING, Decoder
from offramp.runtime.generation.feedback import Feedback
from offramp.runtime.generation.multistep import CACHES
from offramp.runtime.generation.plan import GenerationPlan, Prompts
from offramp.runtime.generation.results import RowResult, StepResult
from offramp.runtime.generation.sampling import Chooser
from offramp.runtime.generation.stopping import Ends
from offramp.runtime.policies.base import Agreement, Policy
from offramp.runtime.policies.stack_policy import StackPolicy
from offramp.runtime.result import Timing

_FIRST_CAPACITY = 64


class Session:
    """One generation: its decoder, and its rows, of which each has a slot.

    Attributes:
        prompts: Token ids that the rows start with, int64 [n] each.
        rows: For each slot the row that it holds; rows that have ended have none.
        ahead: How many places for features stand in front of each prompt.
        exits, scores, trace: Of what ran once for the inputs.
    """

    def __init__(
        self,
        plan: GenerationPlan,
        inputs: Mapping[str, Any],
        prompts: Prompts,
        policy: Policy,
        sampling: Sampling,
        ends: Ends,
        width: Mapping[str, NDArray[np.float32]],
        *,
        propagate: str = "defer",
        max_pending: int | None = None,
    ) -> None:
        _check(policy, propagate, max_pending)
        self.plan, self.policy, self.sampling, self.ends, self.prompts = plan, policy, sampling, ends, prompts
        slots = len(prompts) * sampling.beams
        self._limit, self.ahead = plan.cache.limit, plan.ahead(inputs)
        self._once: Ran = plan.once(inputs, prompts, policy, width)
        capacity = self._capacity(_FIRST_CAPACITY, max(row.size for row in prompts) + self.ahead + 1)
        self.decoder = Decoder(plan, plan.store(slots, capacity), propagate, max_pending)
        self.decoder.widths.include(self._once.widths)
        self._read_tables()
        self.rows = list(range(len(prompts)))
        self.policies = {name: StackPolicy(policy, plan.manifest.stacks[name], slots) for name in plan.stacks}
        self._given = np.array([row.size for row in prompts], np.int64) + self.ahead
        self._steps = np.zeros(slots, np.int64)
        self._short = 0  # the greatest capacity with which one row runs on by itself
        self._ended = False
        self._feedback: Feedback | None = None
        if Agreement in policy.observes:
            self._feedback = Feedback(policy, self.decoder, plan.stacks[-1], plan.output)

    @property
    def together(self) -> bool:
        """Whether prompts are of several tokens, which go to full depth together; of the first row, that is."""
        return self.prompts[0].size + self.ahead > 1

    @property
    def exits(self) -> Mapping[str, NDArray[np.int64]]:
        """After how many blocks each row left the stacks that run once, int64 [rows]; [rows, tokens] alone."""
        return self._once.exits

    @property
    def scores(self) -> Mapping[str, Mapping[int, Mapping[str, NDArray[Any]]]]:
        """What their exits scored that were asked, by stack, ``after`` and measure."""
        return self._once.scores

    @property
    def trace(self) -> tuple[Timing, ...]:
        """The segments that ran once."""
        return tuple(self._once.trace)

    def step(
        self,
        tokens: Sequence[NDArray[np.int64]],
        policies: Mapping[str, StackPolicy] | None = None,
        wanted: Wanted = NOTHING,
        most: int = 1,
    ) -> StepResult:
        """Run new tokens of every row that is still there, in the order of slots.

        Rows with one new token leave where ``policies`` (None: the session's own) say so, and the policy is told what
        that took; those with several, a prompt's, go to full depth. One row alone may run on by itself, for ``most``
        tokens in all, to one that is not to be followed `freely`.
        """
        started = perf_counter()
        if self._ended:
            raise InputError("this generation was ended, or has failed: it has no memory any more", hint="a new one")
        policies = self.policies if policies is None else policies
        count = len(tokens)
        lengths = self.decoder.seen[0, :count]
        if self.plan.cache.prompt is not None and self.sampling.beams == 1:
            for row, new, seen in zip(self.rows, tokens, lengths, strict=True):
                self.check_prompt(row, max(0, int(seen) - self.ahead), new)
        if self.ahead:
            tokens = [self._with_places(row) if not seen else row for row, seen in zip(tokens, lengths, strict=True)]
        counts = np.array([row.size for row in tokens], np.int64)
        self.reserve(greatest(lengths + counts), greatest(lengths) + greatest(counts))
        name, slots = self.plan.cache.tokens[0], np.arange(count)
        chunk = padded(tokens).astype(self.plan.manifest.values[name].dtype, copy=False)
        results: list[RowResult] = []
        caught_up, alone = 0, slots
        if greatest(counts) > 1:  # apart, so that each row gets what it gets alone
            alone, several = slots[counts == 1], slots[counts > 1]
            last = Wanted(accepts=wanted.accepts, deep=wanted.deep)
            results = self.decoder.step(several, {name: chunk[several]}, counts[several], None, last)
            caught_up = self.decoder.caught_up
        if alone.size:
            rows = self.decoder.rows[:count]
            self._steps[rows] = lengths + counts - self._given[rows]
            for policy in policies.values():
                policy.restart(self._steps)
            if wanted.whole is None and self._feedback is not None:
                wanted = replace(wanted, whole=self._feedback.wants)
            if alone.size < count:
                chunk, counts = chunk[alone, :1], counts[alone]
            room = self.decoder.store.capacity - int(lengths[0])
            most = min(most, room) if count == 1 and self.decoder.store.capacity <= self._short else 1
            asked = self.decoder.step(alone, {name: chunk}, counts, policies, wanted, most)
            caught_up += self.decoder.caught_up
            results = asked if count == 1 else sorted(results + asked, key=lambda item: item.slot)
            milliseconds = (perf_counter() - started) * 1e3
            for stack, policy in policies.items():
                policy.report([item.exits[stack] for item in asked], milliseconds)
        if self._feedback is not None:
            self._feedback.see(results, [row.size for row in tokens])
        return StepResult(results, self.decoder.runner.trace(), caught_up)

    def _with_places(self, prompt: NDArray[np.int64]) -> NDArray[np.int64]:
        """A prompt with the places in front of it."""
        assert self.plan.cache.prompt is not None
        return np.concatenate([np.full(self.ahead, self.plan.cache.prompt.filler, np.int64), prompt])

    def freely(self, chooser: Chooser) -> None:
        """Let one row run on by itself in a `step`, behind tokens that ``chooser`` needs no look at."""
        store, steps = self.decoder.store, self.decoder.spans[0].steps
        if steps is None or store.device is not None or self.ends.stop is None:
            return
        free = chooser.free(self.ends.stop)
        if free is not None:
            caches = sum(store.buffer(name).nbytes for _, name in steps.buffers)
            self._short = CACHES * store.capacity // max(1, caches)
            store.keep({FREELY: np.append(free, np.False_)})

    def end(self, *, reused: bool = True) -> None:
        """Leave this generation's memory to others, if it is to be ``reused``; it cannot go on."""
        if reused and not self._ended:
            self.plan.release(self.decoder.store)
        self._ended = True

    def rearrange(self, sources: Sequence[int]) -> None:
        """Slot ``i`` gets what slot ``sources[i]`` had."""
        self.decoder.rearrange(sources)
        if self._feedback is not None:
            self._feedback.rearrange(sources)

    def check_prompt(self, row: int, place: int, tokens: NDArray[np.int64]) -> None:
        """Raise where tables made of a row's prompt, an image in it say, would be read for other tokens than it had."""
        given = self.prompts[row][place : place + tokens.size]
        if self.plan.cache.prompt is not None and not np.array_equal(tokens[: given.size], given):
            raise InputError(
                f"row {row} has {tokens[: given.size].tolist()} at token {place} of its prompt, which is more than its "
                f"tokens and had {given.tolist()} there",
                hint="after a rewind into it append those, or make a generator of the other prompt",
            )

    def rollback(self, slot: int, length: int) -> None:
        """Forget a row's tokens behind its first ``length``."""
        self.decoder.rollback(slot, length + self.ahead)
        if self._feedback is not None:
            self._feedback.rollback(slot)

    def drop(self, slots: Sequence[int]) -> None:
        """Take rows out: the last ones move into their slots."""
        if not slots or self._ended:
            return
        count = len(self.rows)
        sources = list(range(count))
        for slot in sorted(slots, reverse=True):
            count -= 1
            sources[slot] = sources[count]
            self.rows[slot] = self.rows[count]
        self.rows = self.rows[:count]
        self.rearrange(sources[:count])

    def reserve(self, needed: int, wanted: int = 0) -> None:
        """Make room for ``needed`` tokens in each row, and for ``wanted`` if the model's limit allows."""
        store = self.decoder.store
        if self._limit is not None and needed > self._limit:
            tokens = needed - self.ahead, self._limit - self.ahead
            raise InputError(f"a row has {tokens[0]} tokens; the model takes {tokens[1]}")
        wanted = max(needed, wanted if self._limit is None else min(wanted, self._limit))
        if wanted > store.capacity:
            store.grow(self._capacity(store.capacity * 2, wanted))
            self._read_tables()

    def _capacity(self, first: int, needed: int) -> int:
        while first < needed:
            first *= 2
        return first if self._limit is None else min(first, self._limit)

    def _read_tables(self) -> None:
        """Let chunks read what they do not change; of what belongs to rows, each slot that of the row it holds."""
        store, known, held = self.decoder.store, self.plan.manifest.values, self.decoder.rows % len(self.prompts)
        as_given = np.array_equal(held, np.arange(len(self.prompts)))
        tables = self.plan.tables(self._once, store.capacity)
        for name, value in tables.items():
            place = known[name].place(self.plan.manifest.batch)
            if place is not None and not as_given:
                tables[name] = value.take(places(held, place[1]), place[0])
        store.keep(tables)


def _check(policy: Policy, propagate: str, max_pending: int | None) -> None:
    if not isinstance(propagate, str) or propagate not in PROPAGATE:
        raise InputError(f"propagate={propagate!r}: there are {', '.join(PROPAGATE)}")
    if max_pending is not None and OPTIONS["max_pending"].plain(max_pending) is None:
        raise InputError(f"max_pending={max_pending!r}: {OPTIONS['max_pending'].expected}")
    if propagate != "defer" and Agreement in policy.observes:
        raise InputError(f"propagate={propagate!r}: {policy!r} learns from what full depth says of earlier tokens")
