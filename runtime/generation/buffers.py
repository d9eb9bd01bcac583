"""Memory of one generation: caches and what it reads again and again, bound to segments once.

A segment that is run on some rows has a binding for each small size of a chunk, and one for all larger ones, with
arrays for what changes at each run; caches are bound to both sides of it, so that ONNX Runtime appends in place. On a
device the caches stay there, and what changes is copied from and to the host, where it is bound: it is bound anew at
each run. A generation that ends leaves all this to the next one of its size.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import onnxruntime as ort
from numpy.typing import NDArray

from offramp.bundle.expressions import evaluate, names
from offramp.bundle.manifest import Manifest, Segment, Value
from offramp.errors import InputError
from offramp.runtime.engine.memory import silent_options
from offramp.runtime.engine.sessions import failed
from offramp.runtime.generation.cache_memory import axis_of, empty

Array = NDArray[Any]
Index = NDArray[np.int64]

_SMALL = 16  # tokens: chunks of up to so many keep their bindings, since arrays of many sizes would fill memory


@dataclass(frozen=True, slots=True)
class ChunkSegment:
    """A segment that runs on chunks: its inputs by what they are, as pairs of the file's name and the value's.

    ``sized`` is a value with an axis of a chunk's tokens, and that axis; ``asked`` the one that says which of them are
    scored.
    """

    segment: Segment
    session: ort.InferenceSession
    chunk: tuple[tuple[str, str], ...]
    kept: tuple[tuple[str, str], ...]
    buffers: tuple[tuple[str, str], ...]
    lengths: str | None
    made: tuple[tuple[str, str], ...]
    appended: tuple[tuple[str, str], ...]
    sized: tuple[str, int] | None
    asked: str | None

    @property
    def by_slot(self) -> bool:
        """Whether it reads something that belongs to slots."""
        return bool(self.kept or self.buffers)


def chunk_segment(
    manifest: Manifest, segment: Segment, session: ort.InferenceSession, kept: frozenset[str]
) -> ChunkSegment:
    """The segment made ready; ``kept`` are the values that stay as they are from chunk to chunk."""
    cache = manifest.cache
    assert cache is not None
    inputs, outputs = segment.inputs.items(), segment.outputs.items()
    of = {new: old for old, new in cache.buffers.items()}
    apart = kept | cache.buffers.keys() | {cache.lengths}
    chunk = tuple((key, name) for key, name in inputs if name not in apart)
    axes = [(name, axis_of(manifest.values[name], cache.chunk)) for _, name in chunk]
    return ChunkSegment(
        segment,
        session,
        chunk,
        tuple((key, name) for key, name in inputs if name in kept),
        tuple((key, name) for key, name in inputs if name in cache.buffers),
        next((key for key, name in inputs if name == cache.lengths), None),
        tuple((key, name) for key, name in outputs if name not in of),
        tuple((key, of[name]) for key, name in outputs if name in of),
        next(((name, axis) for name, axis in axes if axis >= 0), None),
        next((name for _, name in chunk if name in {stack.asked for stack in manifest.stacks.values()}), None),
    )


@dataclass(slots=True)
class _Bound:
    """A binding of a segment to some slots, and its arrays for the last sizes: of a chunk, and of what is asked there.

    ONNX Runtime keeps no hold of numpy's memory: ``sized`` does, and the store. ``kept`` says which of its values are
    bound now. ``inputs`` lie on the host and change in place. ``fetched`` are outputs of sizes that only a run tells:
    their place among all, and their names.
    """

    binding: Any
    counts: Array
    kept: int = -1
    sizes: tuple[int, int] = (0, 0)
    inputs: dict[str, ort.OrtValue] = field(default_factory=dict)
    sized: list[ort.OrtValue] = field(default_factory=list)
    given: list[tuple[str, Array]] = field(default_factory=list)
    made: dict[str, Array] = field(default_factory=dict)
    fetched: list[tuple[int, str, str]] = field(default_factory=list)


class Store:
    """Caches and kept values of a generation, for ``slots`` rows.

    ``device`` is None for the host, where runs of neighbouring slots are bound without a copy; on a device all
    slots run together. ``copied`` says that ONNX Runtime copies inputs on the host when they are bound, as it does for
    every provider whose memory is another.
    """

    def __init__(
        self, manifest: Manifest, slots: int, capacity: int, device: tuple[str, int] | None, copied: bool = False
    ) -> None:
        assert manifest.cache is not None
        self.manifest, self.cache, self.slots, self.device = manifest, manifest.cache, slots, device
        self._copied = copied
        self.capacity = capacity
        self._arrays: dict[str, Array] = {}
        self._on_device: dict[str, ort.OrtValue] = {}
        self._slices: dict[tuple[str, int, int], ort.OrtValue] = {}
        self._bound: dict[tuple[str, int, int, int, int], _Bound] = {}
        self._kept = 0  # how often values were replaced
        self._options = silent_options()
        stacks = [stack.asked for stack in manifest.stacks.values() if stack.asked is not None]
        self._asked = {str(manifest.values[name].shape[1]) for name in stacks}
        sizes = self._sizes(slots)
        for name in self.cache.buffers:
            self._arrays[name] = empty(manifest.values[name], sizes)
        self._settle(self.cache.buffers)

    def _sizes(self, rows: int, chunk: int = 1, asked: int = 0) -> dict[str, int]:
        known = {self.manifest.batch or "": rows, self.cache.capacity: self.capacity, self.cache.chunk: chunk}
        return dict.fromkeys(self.manifest.axes, 1) | known | dict.fromkeys(self._asked, asked)

    def keep(self, values: Mapping[str, Array]) -> None:
        """Values that chunks read and do not change; they replace those of the same names."""
        self._arrays |= {name: np.array(value, order="C") for name, value in values.items()}
        self._settle(values)
        self._kept += 1

    def _settle(self, names: Any) -> None:
        if self.device is not None:
            for name in names:
                self._on_device[name] = ort.OrtValue.ortvalue_from_numpy(self._arrays.pop(name), *self.device)

    def grow(self, capacity: int) -> None:
        """Make room for more tokens; what the caches hold stays."""
        old, self.capacity = self.capacity, capacity
        sizes = self._sizes(self.slots)
        for name in self.cache.buffers:
            value = self.manifest.values[name]
            larger = empty(value, sizes)
            place = (slice(None),) * axis_of(value, self.cache.capacity) + (slice(0, old),)
            larger[place] = self._array(name)
            self._arrays[name] = larger
        self._settle(self.cache.buffers)
        self._forget()

    def _array(self, name: str) -> Array:
        found: Array = self._on_device[name].numpy() if name in self._on_device else self._arrays[name]
        return found

    def buffer(self, name: str) -> Array:
        """The contents of a cache."""
        return self._array(name)

    def rearrange(self, sources: Sequence[int]) -> None:
        """Slot ``i`` gets what slot ``sources[i]`` had, for as many slots as are named."""
        moved = [(to, at) for to, at in enumerate(sources) if to != at]
        if not moved:
            return
        into, out = (np.array(places) for places in zip(*moved, strict=True))
        for name in (*self._arrays, *self._on_device):
            if self._place(name) is not None:
                self._put(name, into, self._taken(name, out))
        # Parts that are not on the first axis, and what was copied when it was bound, do not see the change.
        self._kept += self._copied or any((self._place(name) or (0, 1))[0] for name in self._arrays)

    def copy(self, source: str, target: str, slot: int, tokens: slice) -> None:
        """Give a cache what one of the same shape has of a row's tokens."""
        row = np.array([slot])
        values, held = self._taken(source, row), self._taken(target, row)
        along = values.ndim - self._array(source).ndim + axis_of(self.manifest.values[source], self.cache.capacity)
        place = (slice(None),) * along + (tokens,)
        held[place] = values[place]
        self._put(target, row, held)

    def saved(self, names: Sequence[str], slots: Index) -> Callable[[], None]:
        """What brings back the contents that caches have in these slots now."""
        held = {name: self._taken(name, slots) for name in names}

        def restore() -> None:
            for name, values in held.items():
                self._put(name, slots, values)

        return restore

    def _taken(self, name: str, slots: Index) -> Array:
        """A copy of what a value has in these slots."""
        split, places = self._by_slot(name, self._array(name), slots)
        found: Array = split[places]
        return found

    def _put(self, name: str, slots: Index, values: Array) -> None:
        array = self._array(name)
        if name in self._on_device:
            array = array.copy()  # where the device is the CPU, it lies in memory that the old value holds
        split, places = self._by_slot(name, array, slots)
        split[places] = values
        if name in self._on_device:
            self._arrays[name] = array
            self._settle([name])
            self._forget()

    def _forget(self) -> None:
        """Let go of all bindings: what they are bound to has been replaced."""
        self._bound.clear()
        self._slices.clear()

    def _by_slot(self, name: str, array: Array, slots: Index) -> tuple[Array, tuple[Any, ...]]:
        """A view of an array with an axis of slots, and an index of some of them."""
        axis, factor = self._place(name) or (0, 1)
        split = array.reshape(*array.shape[:axis], -1, factor, *array.shape[axis + 1 :])
        return split, (*(slice(None),) * axis, slots)

    def run(
        self, segment: ChunkSegment, low: int, high: int, values: Mapping[str, Array], lengths: Array
    ) -> dict[str, Array]:
        """Run a segment on the slots from ``low`` up to ``high``: values [high - low, chunk, ...] by name.

        What it returns may be overwritten by the next run.
        """
        chunk = 1 if segment.sized is None else values[segment.sized[0]].shape[segment.sized[1]]
        asked = 0 if segment.asked is None else values[segment.asked].shape[1]
        key = (segment.segment.name, low, high, min(chunk, _SMALL + 1), min(asked, _SMALL + 1))
        bound = self._bound.get(key)
        if bound is None:
            bound = self._bound[key] = self._bind(segment, low, high)
        if bound.kept != self._kept:
            bound.kept = self._kept
            for file_name, name in segment.kept:
                if name in self._on_device:
                    bound.binding.bind_ortvalue_input(file_name, self._on_device[name])
                else:
                    bound.binding.bind_cpu_input(file_name, self._rows(name, low, high))
        if bound.sizes != (chunk, asked):
            bound.sizes = chunk, asked
            self._size(bound, segment, self._sizes(high - low, chunk, asked))
        for name, array in bound.given:
            array[...] = values[name]
        bound.counts[...] = lengths
        if self._copied:
            for file_name, value in bound.inputs.items():
                bound.binding.bind_ortvalue_input(file_name, value)
        try:
            segment.session.run_with_iobinding(bound.binding, self._options)
        except Exception as error:
            shapes = ", ".join(f"{wanted} {list(array.shape)}" for wanted, array in bound.given)
            raise failed(segment.segment.name, shapes, error) from error
        if bound.fetched:
            outputs = bound.binding.get_outputs()
            bound.made.update({wanted: outputs[at].numpy() for at, _, wanted in bound.fetched})
            for _, file_name, _ in bound.fetched:  # ONNX Runtime would expect the next one to have this one's sizes
                bound.binding.bind_output(file_name)
        return bound.made

    def _bind(self, segment: ChunkSegment, low: int, high: int) -> _Bound:
        """A binding of what is the same for chunks of any size."""
        bound = _Bound(segment.session.io_binding(), np.zeros(high - low, np.int64))
        if segment.lengths is not None:
            self._bind_input(bound, segment.lengths, ort.OrtValue.ortvalue_from_numpy(bound.counts))
        for key, name in segment.buffers:
            self._bind_input(bound, key, self._slice(name, low, high))
        for key, name in segment.appended:
            bound.binding.bind_ortvalue_output(key, self._slice(name, low, high))
        return bound

    @staticmethod
    def _bind_input(bound: _Bound, file_name: str, value: ort.OrtValue) -> None:
        bound.binding.bind_ortvalue_input(file_name, value)
        if value.device_name() == "cpu":
            bound.inputs[file_name] = value

    def _size(self, bound: _Bound, segment: ChunkSegment, sizes: Mapping[str, int]) -> None:
        """Bind arrays of these sizes in the place of those of the last ones."""
        values = self.manifest.values
        bound.given, bound.made, bound.fetched, bound.sized = [], {}, [], []

        def array_of(name: str) -> tuple[Array, ort.OrtValue]:
            array = np.zeros([evaluate(size, sizes) for size in values[name].shape], values[name].dtype)
            bound.sized.append(ort.OrtValue.ortvalue_from_numpy(array))
            return array, bound.sized[-1]

        for key, name in segment.chunk:
            array, value = array_of(name)
            self._bind_input(bound, key, value)
            bound.given.append((name, array))
        for at, (key, name) in enumerate(segment.made, len(segment.appended)):
            if self._known(values[name]):
                bound.made[name], value = array_of(name)
                bound.binding.bind_ortvalue_output(key, value)
            else:
                bound.binding.bind_output(key)
                bound.fetched.append((at, key, name))

    def _known(self, value: Value) -> bool:
        """Whether the sizes of a value follow from slots, chunk, what is asked, and capacity."""
        known = {self.manifest.batch, self.cache.chunk, self.cache.capacity, *self._asked}
        return all(names(size) <= known for size in value.shape)

    def _place(self, name: str) -> tuple[int, int] | None:
        return self.manifest.values[name].place(self.manifest.batch)

    def _slice(self, name: str, low: int, high: int) -> ort.OrtValue:
        """A cache's part that belongs to these slots, as ONNX Runtime's value, made once."""
        if name in self._on_device:
            return self._on_device[name]
        if (name, low, high) not in self._slices:
            self._slices[name, low, high] = ort.OrtValue.ortvalue_from_numpy(self._rows(name, low, high))
        return self._slices[name, low, high]

    def _rows(self, name: str, low: int, high: int) -> Array:
        """A value's part that belongs to these slots: a view, where it lies in one piece."""
        place, array = self._place(name), self._arrays[name]
        if place is None or (low == 0 and high == self.slots):
            return array
        axis, factor = place
        array = array[(slice(None),) * axis + (slice(low * factor, high * factor),)]
        if not array.flags.c_contiguous:
            if name in self.cache.buffers:
                raise InputError(f"the cache {name!r} does not have rows on its first axis")
            array = np.ascontiguousarray(array)
        return array
