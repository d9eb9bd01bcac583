"""One generation: a bundle ready to generate, and its rows, fed token by token."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from time import perf_counter
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from offramp.bundle.implied import ImpliedInputs
from offramp.bundle.manifest import Manifest
from offramp.bundle.options import OPTIONS, Sampling
from offramp.errors import InputError
from offramp.runtime.generation.batching import greatest, padded
from offramp.runtime.generation.buffers import Store
from offramp.runtime.generation.decoder import Decoder, Left
from offramp.runtime.generation.defaults import merged
from offramp.runtime.generation.feedback import Watch
from offramp.runtime.generation.legs import Leg, check_layout, legs_of
from offramp.runtime.generation.stopping import Ends
from offramp.runtime.policies.base import Agreement, Asker, Policy

Array = NDArray[Any]
Prompts: TypeAlias = list[NDArray[np.int64]]

_FIRST_CAPACITY = 64


class Plan:
    """A bundle with caches, ready to generate: what of it runs when, and which values are what."""

    def __init__(self, manifest: Manifest, sessions: Mapping[str, Any]) -> None:
        assert manifest.cache is not None
        self.manifest, self.cache = manifest, manifest.cache
        kept = {name for name in manifest.inputs if name not in self.cache.tokens} | {self.cache.places}
        for stage in manifest.stages:
            if stage.when != "chunk" and stage.segment is not None:
                kept |= set(manifest.segments[stage.segment].outputs.values())
            elif stage.when != "chunk":
                kept.add(manifest.stacks[stage.stack or ""].output)
        self.kept = frozenset(kept)
        self.legs: tuple[Leg, ...] = legs_of(manifest, sessions, self.kept)
        self.read = frozenset(name for leg in self.legs for call in leg.calls for _, name in call.kept) | frozenset(
            name for leg in self.legs if leg.door for call in leg.door.calls for _, name in call.kept
        )
        self.stacks = [stage.stack for stage in manifest.stages if stage.when == "chunk" and stage.stack]
        self.output = self.cache.logits
        self.vocabulary = int(manifest.values[manifest.outputs[self.output]].shape[-1])
        self._implied = ImpliedInputs(manifest)
        self._lock = threading.Lock()
        self._spare: Store | None = None

    def store(self, slots: int, capacity: int, device: tuple[str, int] | None) -> Store:
        """Memory for a generation, that of one that has ended where it has the same size."""
        with self._lock:
            spare, self._spare = self._spare, None
        if spare is not None and (spare.slots, spare.capacity, spare.device) == (slots, capacity, device):
            return spare
        return Store(self.manifest, slots, capacity, device)

    def release(self, store: Store) -> None:
        """Leave the memory of a generation to the next one."""
        with self._lock:
            self._spare = store

    def tokens_input(self) -> str:
        """The input that holds token ids; InputError where a chunk needs more than those."""
        if len(self.cache.tokens) != 1 or not self.manifest.values[self.cache.tokens[0]].dtype.startswith("int"):
            raise InputError(f"generation extends one input of token ids; this bundle has {list(self.cache.tokens)}")
        check_layout(self.manifest, self.legs)
        return self.cache.tokens[0]

    def prompts(self, inputs: Mapping[str, Any]) -> Prompts:
        """The prompts of the batch without padding, int64 [n] each; the bundle's own where none is given."""
        name = self.tokens_input()
        if not isinstance(inputs, Mapping):
            raise InputError(
                f"inputs map names to arrays, this is a {type(inputs).__name__}", hint=f"{{{name!r}: [[1, 2, 3]]}}"
            )
        given = inputs.get(name)
        if given is None:
            start = list(self.manifest.generation.prompt)
            if not start:
                raise InputError(f"{name!r} is missing, and the bundle has no prompt of its own")
            given = [start] * max((len(value) for value in inputs.values() if hasattr(value, "__len__")), default=1)
        try:
            if isinstance(given, np.ndarray) and given.dtype.kind not in "iu":
                raise TypeError(f"dtype {given.dtype}")
            rows = [np.asarray(row) for row in given]
            if any(row.ndim != 1 or (row.size and row.dtype.kind not in "iu") for row in rows):
                raise TypeError("not rows of whole numbers")
        except (TypeError, ValueError) as error:
            raise InputError(
                f"{name!r} has to be rows of token ids, of any lengths: {error}", hint="[[1, 2, 3], [4, 5]]"
            ) from error
        prompts = self._implied.kept(inputs, [row.astype(np.int64) for row in rows])
        if not prompts or any(row.size == 0 for row in prompts):
            raise InputError(f"{name!r}: every row needs at least one token")
        known = self.cache.vocabulary or self.vocabulary
        wrong = [int(i) for row in prompts for i in row if not 0 <= i < known]
        if wrong:
            raise InputError(f"{name!r} has the token ids {wrong[:5]}; they go from 0 to {known - 1}")
        longest = max(row.size for row in prompts)
        if self.cache.limit is not None and longest > self.cache.limit:
            raise InputError(f"the prompt has {longest} tokens; the model takes {self.cache.limit}")
        return prompts

    def sampling(self, longest: int, options: Mapping[str, Any]) -> Sampling:
        """How tokens are chosen after prompts of at most ``longest``: see `merged`."""
        return merged(self.manifest.generation, options, longest, self.vocabulary, self.cache.limit)


class Run:
    """One generation: its decoder, its rows and their tokens.

    A prompt goes to full depth, but for one of a single token, which only starts the text: a step like any other.
    ``first`` are asked about the prompts, nobody where none is such a one.
    """

    def __init__(
        self,
        plan: Plan,
        prompts: Prompts,
        kept: Mapping[str, Array],
        tables: Callable[[int], Mapping[str, Array]],
        policy: Policy,
        sampling: Sampling,
        ends: Ends,
        device: tuple[str, int] | None,
        propagate: str,
        max_pending: int | None,
    ) -> None:
        if not isinstance(propagate, str) or propagate not in ("defer", "hidden"):
            raise InputError(f"propagate={propagate!r}: there are defer and hidden")
        if max_pending is not None and OPTIONS["max_pending"].plain(max_pending) is None:
            raise InputError(f"max_pending={max_pending!r}: {OPTIONS['max_pending'].expected}")
        if propagate == "hidden" and Agreement in policy.observes:
            raise InputError(f"propagate='hidden': {policy!r} learns from what full depth says of earlier tokens")
        self.plan, self.policy, self.sampling, self.ends, self._tables = plan, policy, sampling, ends, tables
        slots = len(prompts) * sampling.beams
        stacks = plan.manifest.stacks
        longest = max(row.size for row in prompts)
        self._limit = plan.cache.limit
        capacity = self._capacity(_FIRST_CAPACITY, longest + 1)
        self.decoder = Decoder(plan.manifest, plan.legs, plan.store(slots, capacity, device), propagate, max_pending)
        self._keep(kept)
        self._read_tables()
        self.rows = list(range(len(prompts)))
        self.askers = {name: Asker(policy, stacks[name], slots) for name in plan.stacks}
        self._given = np.array([row.size for row in prompts], np.int64)
        self.first = self.askers if (self._given == 1).any() else None
        self._mixed = self.first is not None and bool((self._given > 1).any())
        self._steps = np.zeros(slots, np.int64)
        self._watch: Watch | None = None
        if Agreement in policy.observes:
            self._watch = Watch(policy, self.decoder, plan.stacks[-1], plan.output)

    def _capacity(self, first: int, needed: int) -> int:
        while first < needed:
            first *= 2
        return first if self._limit is None else min(first, self._limit)

    def _keep(self, values: Mapping[str, Array]) -> None:
        """Let chunks read these values; those of rows are repeated, so that every beam's slot has some."""
        store, known = self.decoder.store, self.plan.manifest.values
        repeated = {}
        for name, value in values.items():
            axis = known[name].batch_axis
            times = 1 if axis is None else store.slots * known[name].batch_factor // value.shape[axis]
            repeated[name] = value if times == 1 else np.concatenate([value] * times, axis)
        store.keep(repeated)

    def _read_tables(self) -> None:
        self._keep(self._tables(self.decoder.store.capacity))

    def feed(
        self,
        tokens: Sequence[NDArray[np.int64]],
        askers: Mapping[str, Asker] | None,
        whole: Callable[[], bool] | None = None,
        picks: Callable[[int, int], bool] | None = None,
    ) -> list[Left]:
        """Run new tokens of every row that is still there, in the order of slots; the policy is told what it took.

        Rows leave where ``askers`` say so; ``whole`` and ``picks`` as in `Decoder.feed`.
        """
        started = perf_counter()
        decoder, count = self.decoder, len(tokens)
        counts = np.array([row.size for row in tokens], np.int64)
        lengths = decoder.seen[0, :count]
        longest, widest = greatest(lengths), greatest(counts)
        self.reserve(greatest(lengths + counts), longest + widest)
        chunk = padded(tokens).astype(self._dtype(), copy=False)
        if askers is not None:
            rows = decoder.rows[:count]
            self._steps[rows] = lengths + counts - self._given[rows]
            for asker in askers.values():
                asker.restart(self._steps)
            if whole is None and self._watch is not None:
                whole = self._watch.wants
        name, slots = self.plan.cache.tokens[0], np.arange(count)
        unasked: list[Left] = []
        new = counts
        if askers is not None and self._mixed:  # apart, so that each row gets what it gets alone
            deep, slots, self._mixed = slots[counts > 1], slots[counts == 1], False
            unasked = decoder.feed(deep, {name: chunk[deep]}, counts[deep], None)
            chunk, new = chunk[slots, :1], counts[slots]
        asked = decoder.feed(slots, {name: chunk}, new, askers, whole, picks)
        left = asked if count == 1 else sorted(unasked + asked, key=lambda item: item.slot)
        if askers is not None:
            if self._watch is not None:
                self._watch.see(left, counts.tolist())
            milliseconds = (perf_counter() - started) * 1e3
            for name, asker in askers.items():
                asker.spent([item.exits[name] for item in asked], milliseconds)
        return left

    def end(self) -> None:
        """Leave this generation's memory to others; it cannot go on."""
        self.plan.release(self.decoder.store)

    def rearrange(self, sources: Sequence[int]) -> None:
        """Slot ``i`` gets what slot ``sources[i]`` had."""
        self.decoder.rearrange(sources)
        if self._watch is not None:
            self._watch.rearrange(sources)

    def reserve(self, needed: int, wanted: int = 0) -> None:
        """Make room for ``needed`` tokens in each row, and for ``wanted`` if the model's limit allows."""
        store = self.decoder.store
        if self._limit is not None and needed > self._limit:
            raise InputError(f"a row has {needed} tokens; the model takes {self._limit}")
        wanted = max(needed, wanted if self._limit is None else min(wanted, self._limit))
        if wanted > store.capacity:
            store.grow(self._capacity(store.capacity * 2, wanted))
            self._read_tables()

    def _dtype(self) -> str:
        return self.plan.manifest.values[self.plan.cache.tokens[0]].dtype

    def drop(self, slots: Sequence[int]) -> None:
        """Take rows out: the last ones move into their slots."""
        if not slots:
            return
        count = len(self.rows)
        sources = list(range(count))
        for slot in sorted(slots, reverse=True):
            count -= 1
            sources[slot] = sources[count]
            self.rows[slot] = self.rows[count]
        self.rows = self.rows[:count]
        self.rearrange(sources[:count])
