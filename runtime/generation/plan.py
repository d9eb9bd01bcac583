"""A bundle with caches, ready to generate: what of it runs when, which values are what, and what a prompt is."""

from __future__ import annotations

import threading
from collections.abc import Mapping
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from offramp.bundle.implied import ImpliedInputs
from offramp.bundle.manifest import FREELY, WIDTH, Manifest
from offramp.bundle.options import Sampling
from offramp.errors import InputError
from offramp.runtime.engine.engine import Engine, Ran
from offramp.runtime.engine.inputs import Ids, Inputs, placeholders_of, shape_of
from offramp.runtime.engine.sessions import CPU
from offramp.runtime.engine.widths import Sites
from offramp.runtime.generation.batching import padded
from offramp.runtime.generation.buffers import Store
from offramp.runtime.generation.cache_memory import axis_of
from offramp.runtime.generation.chunk_spans import ChunkSpan, check_layout, chunk_spans
from offramp.runtime.generation.defaults import merged
from offramp.runtime.policies.base import Policy
from offramp.runtime.policies.group_policy import asked_at
from offramp.runtime.preprocess.image_text import values

Array = NDArray[Any]
Prompts: TypeAlias = list[NDArray[np.int64]]

_KEPT = 32  # combinations of options, which take as long to check as some blocks to run


class GenerationPlan:
    """What all generations of a loaded bundle share.

    Attributes:
        output: The value of the logits that generation reads.
        along: The values that have a chunk's tokens on their second axis, or some of them.
        sites: What has learners, by segment.
        stacks: Names of the stacks that run for each chunk of tokens, in order; tokens leave the last one.
        vocabulary: How many classes the logits have.
    """

    def __init__(
        self, manifest: Manifest, engine: Engine, sessions: Mapping[str, Any], device: tuple[str, int] | None
    ) -> None:
        assert manifest.cache is not None
        self.manifest, self.cache, self._engine, self._device = manifest, manifest.cache, engine, device
        self._copied = device is not None or any(session.get_providers() != [CPU] for session in sessions.values())
        kept = {name for name in manifest.inputs if name not in self.cache.tokens} | {self.cache.places, WIDTH}
        kept |= {FREELY} | ({self.cache.prompt.lengths} if self.cache.prompt else set())
        kept |= {name for step in engine.schedule.steps if step.stage.when != "chunk" for name in step.makes}
        self.spans: tuple[ChunkSpan, ...] = chunk_spans(manifest, sessions, frozenset(kept))
        calls = [call for span in self.spans for call in (*span.calls, *span.branch_calls)]
        self._read = frozenset(name for call in calls for _, name in call.kept)
        once = [stage.stack for stage in manifest.stages if stage.when == "input" and stage.stack]
        self._once = {name: manifest.stacks[name] for name in once}
        sized = [step for step in engine.schedule.steps if step.stage.when == "capacity"]
        made = {name for step in sized for name in step.makes}
        self._grows = bool(sized)
        self._alone = all(step.reads - made <= {self.cache.places} for step in sized)  # whatever the inputs are
        self._tables: dict[int, dict[str, Any]] = {}
        self.along = frozenset(name for name, value in manifest.values.items() if axis_of(value, self.cache.chunk) == 1)
        self.along |= {name for span in self.spans if span.branch for name in span.branch.scores.values()}
        self.sites = Sites(manifest)
        self.stacks = [stage.stack for stage in manifest.stages if stage.when == "chunk" and stage.stack]
        self.output = manifest.outputs[self.cache.logits]
        self.vocabulary = int(manifest.values[self.output].shape[-1])
        self._inputs, self._implied = Inputs(manifest), ImpliedInputs(manifest)
        self._lock = threading.Lock()
        self._spare: Store | None = None
        self._merged: dict[Any, Sampling] = {}  # no lru_cache of a method, which would hold the plan

    def store(self, slots: int, capacity: int) -> Store:
        """Memory for a generation, that of one that has ended where it has the same size."""
        with self._lock:
            spare, self._spare = self._spare, None
        if spare is not None and (spare.slots, spare.capacity) == (slots, capacity):
            return spare
        return Store(self.manifest, slots, capacity, self._device, self._copied)

    def release(self, store: Store) -> None:
        """Leave the memory of a generation to the next one."""
        with self._lock:
            self._spare = store

    def once(self, inputs: Mapping[str, Any], prompts: Prompts, policy: Policy, width: Mapping[str, Array]) -> Ran:
        """Run what runs once for the inputs (an encoder).

        Raises:
            InputError: the inputs do not fit the bundle.
        """
        prompt, ahead = self.cache.prompt, self.ahead(inputs)
        least = max(1, self.manifest.axes[self.cache.chunk][0] - ahead)
        tokens = padded([*prompts, np.zeros(least, np.int64)], prompt.filler if prompt else 0)[:-1]
        name = self.cache.tokens[0]
        others = {key: value for key, value in inputs.items() if key not in self.cache.implied}
        if (settings := self.manifest.preprocessing.image_text) is not None:
            others = {key: [values(row, item) for row in prompts] for key, item in settings.inputs.items()} | others
        for key in prompt.beside if prompt else ():
            filler = prompt.given.get(key, 0) if prompt else 0  # what counts on there is not read
            beside = self._beside if len(self.manifest.values[key].shape) == 2 else self._by_axes
            others[key] = beside(key, others, prompts, filler, least)
        given, rows, sizes = self._inputs.check({**others, name: tokens.astype(self.manifest.values[name].dtype)})
        given |= {self.cache.lengths: np.zeros(rows, np.int64), **width}
        if prompt is not None:
            given[prompt.tokens], given[prompt.lengths] = given[name], np.array([row.size + ahead for row in prompts])
        policies = asked_at(self._once, policy, rows, sizes)
        memory = self._engine.memory
        return self._engine.run({key: memory.put(key, value) for key, value in given.items()}, rows, policies, "input")

    def _beside(self, name: str, inputs: Mapping[str, Any], prompts: Prompts, filler: int, least: int) -> Array:
        """An input over the tokens of prompts, filled up behind the shorter ones, to ``least`` of them."""
        ids, given = self.cache.tokens[0], inputs.get(name)
        if given is None:
            raise InputError(
                f"{name!r} is missing: it has a number for each token of {ids!r}",
                hint="as the model's processor makes it",
            )
        rows = [np.asarray(row) for row in given]
        if [row.shape for row in rows] != [row.shape for row in prompts]:
            sizes = [list(row.shape) for row in rows], [list(row.shape) for row in prompts]
            raise InputError(f"{name!r} has rows of {sizes[0]} numbers; {ids!r} has {sizes[1]} tokens")
        return padded([*rows, np.zeros(least, np.int64)], filler)[:-1].astype(self.manifest.values[name].dtype)

    def _by_axes(self, name: str, inputs: Mapping[str, Any], prompts: Prompts, filler: int, least: int) -> Array:
        """The same of an input that has an array of numbers for each token, on its last axis."""
        ids, longest = self.cache.tokens[0], max(row.size for row in prompts)
        array, value = np.asarray(inputs.get(name, ())), self.manifest.values[name]
        if array.ndim != len(value.shape) or array.shape[-1] != longest:
            raise InputError(
                f"{name!r} ({value}) has the shape {list(array.shape)}; {ids!r} has {longest} tokens a row"
            )
        return np.pad(array, [(0, 0)] * (array.ndim - 1) + [(0, max(0, least - longest))]).astype(value.dtype)

    def tables(self, ran: Ran, capacity: int) -> dict[str, Array]:
        """What chunks read and do not change, where caches have room for so many tokens."""
        memory = self._engine.memory
        sized = self._tables.get(capacity)
        if sized is None:
            places = {self.cache.places: memory.put(self.cache.places, np.arange(capacity))}
            given = places if self._alone else {**ran.values, **places}
            sized = self._engine.run(given, 1, {}, "capacity").values if self._grows else given
            if self._alone:
                self._tables[capacity] = sized
        found = ran.values | sized
        return {name: memory.get(found[name]) for name in self._read if name in found}

    def tokens_input(self) -> str:
        """The input that holds token ids; InputError where a chunk needs more than those."""
        if len(self.cache.tokens) != 1 or not self.manifest.values[self.cache.tokens[0]].dtype.startswith("int"):
            raise InputError(
                f"generation extends one input of token ids; this bundle has {list(self.cache.tokens)}",
                hint="a wrapper around the model whose forward takes the ids, and makes of them what goes along with "
                "each token (a mask of ones, say)",
            )
        check_layout(self.manifest, self.spans)
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
                raise InputError(
                    f"{name!r} is missing, and the bundle has no prompt of its own", hint=self._prompt_hint(name)
                )
            given = [start] * self._rows(inputs)
        prompts = self.known(self._implied.kept(inputs, self.rows_of_ids(given)))
        if not prompts or any(row.size == 0 for row in prompts):
            raise InputError(f"{name!r}: every row needs at least one token")
        if self.manifest.batch is None and len(prompts) > 1:
            raise InputError(
                f"this bundle generates one row at a time, these are {len(prompts)}", hint="a call for each"
            )
        longest = max(row.size for row in prompts)
        limit = self._limit(self.ahead(inputs))
        if limit is not None and longest > limit:
            raise InputError(f"the prompt has {longest} tokens; the model takes {limit}")
        return prompts

    def _rows(self, inputs: Mapping[str, Any]) -> int:
        """How many rows there are where no prompt is given: as many as the first of the other inputs has."""
        for name in self.manifest.inputs:
            place, shape = self.manifest.values[name].place(self.manifest.batch), shape_of(inputs.get(name, ()))
            if name in inputs and place and place[0] < len(shape):
                if shape[place[0]] < place[1]:
                    raise InputError(f"the batch is empty: {name!r} has no rows")
                return shape[place[0]] // place[1]
        return 1

    def rows_of_ids(self, given: Any) -> Prompts:
        """Rows of token ids as arrays; InputError where they are none."""
        name = self.cache.tokens[0]
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
        return [row.astype(np.int64) for row in rows]

    def _prompt_hint(self, name: str) -> str:
        """What a prompt looks like."""
        settings = self.manifest.preprocessing.image_text
        if settings is not None and settings.bare is None:
            return f'a text that says where the image goes: offramp run --text "{settings.mark} ..."'
        return f'rows of token ids, {{{name!r}: [[1, 2, 3]]}}, or offramp run --text "..."'

    def known(self, rows: Prompts) -> Prompts:
        """The rows; InputError where they have ids that the model does not know."""
        name = self.cache.tokens[0]
        known = self._inputs.ids.get(name) or Ids(0, self.vocabulary - 1, placeholders_of(self.manifest, name))
        if rows and (problem := known.problem(name, np.concatenate(rows))):
            raise InputError(problem)
        return rows

    def sampling(self, longest: int, options: Mapping[str, Any], ahead: int = 0) -> Sampling:
        """How tokens are chosen after prompts of at most ``longest``, with places ``ahead`` of them: see `merged`."""
        given = tuple((name, value, type(value)) for name, value in options.items())  # True is no 1
        try:
            known = self._merged.get((longest, ahead, given))
        except TypeError:  # a list among them
            return self._checked(longest, ahead, options)
        if known is None:
            known = self._checked(longest, ahead, options)
            if len(self._merged) >= _KEPT:
                self._merged.clear()
            self._merged[longest, ahead, given] = known
        return known

    def _checked(self, longest: int, ahead: int, options: Mapping[str, Any]) -> Sampling:
        found = merged(self.manifest.generation, options, longest, self.vocabulary, self._limit(ahead))
        if self.manifest.batch is None and found.beams > 1:
            raise InputError(f"beams={found.beams}: this bundle generates one row at a time", hint="beams=1")
        return found

    def ahead(self, inputs: Mapping[str, Any]) -> int:
        """How many places for features stand in front of each text."""
        return self._inputs.ahead(inputs)

    def _limit(self, ahead: int) -> int | None:
        """How many tokens of text the model takes."""
        return None if self.cache.limit is None else self.cache.limit - ahead
