"""Memory of one generation: caches and what it reads again and again, bound to segments once.

A segment that is run on some rows and a chunk of some size has a binding of its own, with arrays for what changes
at each run; caches are bound to both sides of it, so that ONNX Runtime appends in place. On a device the caches
stay there, and what changes is copied from and to the host.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnxruntime as ort
from numpy.typing import NDArray

from offramp.runtime.axes import evaluate, names
from offramp.runtime.caches import axis_of, empty
from offramp.runtime.errors import ExecutionError, InputError
from offramp.runtime.manifest import Manifest, Segment, Value
from offramp.runtime.memory import quiet

Array = NDArray[Any]
Index = NDArray[np.int64]
_KEPT_CHUNKS = 8  # bindings of larger chunks are not kept


@dataclass(frozen=True, slots=True)
class Launch:
    """A segment that runs on chunks: its inputs by what they are, as pairs of the file's name and the value's.

    ``sized`` are the values with an axis of a chunk's tokens, and that axis.
    """

    segment: Segment
    session: ort.InferenceSession
    chunk: tuple[tuple[str, str], ...]
    kept: tuple[tuple[str, str], ...]
    buffers: tuple[tuple[str, str], ...]
    lengths: str | None
    made: tuple[tuple[str, str], ...]
    appended: tuple[tuple[str, str], ...]
    sized: tuple[tuple[str, int], ...]

    @property
    def by_slot(self) -> bool:
        """Whether it reads something that belongs to slots."""
        return bool(self.kept or self.buffers)


def launch(manifest: Manifest, segment: Segment, session: ort.InferenceSession, kept: frozenset[str]) -> Launch:
    """The segment made ready; ``kept`` are the values that stay as they are from chunk to chunk."""
    cache = manifest.cache
    assert cache is not None
    inputs, outputs = segment.inputs.items(), segment.outputs.items()
    of = {new: old for old, new in cache.buffers.items()}
    apart = kept | cache.buffers.keys() | {cache.lengths}
    chunk = tuple((key, name) for key, name in inputs if name not in apart)
    axes = [(name, axis_of(manifest.values[name], cache.chunk)) for _, name in chunk]
    return Launch(
        segment,
        session,
        chunk,
        tuple((key, name) for key, name in inputs if name in kept),
        tuple((key, name) for key, name in inputs if name in cache.buffers),
        next((key for key, name in inputs if name == cache.lengths), None),
        tuple((key, name) for key, name in outputs if name not in of),
        tuple((key, of[name]) for key, name in outputs if name in of),
        tuple((name, axis) for name, axis in axes if axis >= 0),
    )


class Store:
    """Caches and kept values of a generation, for ``slots`` rows.

    ``device`` is None for the host, where runs of neighbouring slots are bound without a copy; on a device all
    slots run together.
    """

    def __init__(self, manifest: Manifest, slots: int, capacity: int, device: tuple[str, int] | None) -> None:
        assert manifest.cache is not None
        self.manifest, self.cache, self.slots, self.device = manifest, manifest.cache, slots, device
        self.capacity = capacity
        self._arrays: dict[str, Array] = {}
        self._on_device: dict[str, ort.OrtValue] = {}
        self._bound: dict[Any, Callable[[Mapping[str, Array], Array], dict[str, Array]]] = {}
        self._options = quiet()
        sizes = self._sizes(slots, 1)
        for name in self.cache.buffers:
            self._arrays[name] = empty(manifest.values[name], sizes)
        self._settle(self.cache.buffers)

    def _sizes(self, rows: int, chunk: int) -> dict[str, int]:
        known = {self.manifest.batch or "": rows, self.cache.capacity: self.capacity, self.cache.chunk: chunk}
        return dict.fromkeys(self.manifest.axes, 1) | known

    def keep(self, values: Mapping[str, Array]) -> None:
        """Values that chunks read and do not change; they replace those of the same names."""
        self._arrays |= {name: np.array(value) for name, value in values.items()}
        self._settle(values)
        self._bound.clear()

    def _settle(self, names: Any) -> None:
        if self.device is not None:
            for name in names:
                self._on_device[name] = ort.OrtValue.ortvalue_from_numpy(self._arrays.pop(name), *self.device)

    def grow(self, capacity: int) -> None:
        """Make room for more tokens; what the caches hold stays."""
        old, self.capacity = self.capacity, capacity
        sizes = self._sizes(self.slots, 1)
        for name in self.cache.buffers:
            value = self.manifest.values[name]
            larger = empty(value, sizes)
            place = (slice(None),) * axis_of(value, self.cache.capacity) + (slice(0, old),)
            larger[place] = self._array(name)
            self._arrays[name] = larger
        self._settle(self.cache.buffers)
        self._bound.clear()

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
            if self.manifest.values[name].batch_axis is not None:
                self._put(name, into, self._taken(name, out))

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
            self._bound.clear()

    def _by_slot(self, name: str, array: Array, slots: Index) -> tuple[Array, tuple[Any, ...]]:
        """A view of an array with an axis of slots, and an index of some of them."""
        axis, factor = self.manifest.values[name].batch_axis or 0, self.manifest.values[name].batch_factor
        split = array.reshape(*array.shape[:axis], -1, factor, *array.shape[axis + 1 :])
        return split, (*(slice(None),) * axis, slots)

    def run(self, launch: Launch, low: int, high: int, values: Mapping[str, Array], lengths: Array) -> dict[str, Array]:
        """Run a segment on the slots from ``low`` up to ``high``: values [high - low, chunk, ...] by name.

        What it returns is overwritten by the next run of the same size.
        """
        chunk = max([values[name].shape[axis] for name, axis in launch.sized], default=1)
        key = (launch.segment.name, low, high, chunk)
        call = self._bound.get(key)
        if call is None:
            call = self._bind(launch, low, high, chunk)
            if chunk <= _KEPT_CHUNKS:
                self._bound[key] = call
        return call(values, lengths)

    def _bind(
        self, launch: Launch, low: int, high: int, chunk: int
    ) -> Callable[[Mapping[str, Array], Array], dict[str, Array]]:
        manifest, binding = self.manifest, launch.session.io_binding()
        sizes = self._sizes(high - low, chunk)
        given: list[tuple[str, Array]] = []
        for key, name in launch.chunk:
            array = self._array_of(manifest.values[name], sizes)
            binding.bind_ortvalue_input(key, ort.OrtValue.ortvalue_from_numpy(array))
            given.append((name, array))
        counts = np.zeros(high - low, np.int64)
        if launch.lengths is not None:
            binding.bind_ortvalue_input(launch.lengths, ort.OrtValue.ortvalue_from_numpy(counts))
        holds = []  # ONNX Runtime keeps no hold of numpy's memory
        slices: dict[str, ort.OrtValue] = {}
        for key, name in (*launch.kept, *launch.buffers):
            slices[name] = self._slice(name, low, high)
            binding.bind_ortvalue_input(key, slices[name])
        for key, name in launch.appended:
            binding.bind_ortvalue_output(key, slices.setdefault(name, self._slice(name, low, high)))
        made: dict[str, Array] = {}
        fetched: list[tuple[int, str]] = []
        for at, (key, name) in enumerate(launch.made, len(launch.appended)):
            if self._sized(manifest.values[name]):
                made[name] = self._array_of(manifest.values[name], sizes)
                holds.append(ort.OrtValue.ortvalue_from_numpy(made[name]))
                binding.bind_ortvalue_output(key, holds[-1])
            else:
                binding.bind_output(key)
                fetched.append((at, name))
        run, options, name = launch.session.run_with_iobinding, self._options, launch.segment.name

        def call(values: Mapping[str, Array], lengths: Array) -> dict[str, Array]:
            for wanted, array in given:
                array[...] = values[wanted]
            counts[...] = lengths
            try:
                run(binding, options)
            except Exception as error:
                shapes = ", ".join(f"{wanted} {list(array.shape)}" for wanted, array in given)
                raise ExecutionError(f"segment {name!r} failed with {shapes}: {error}") from error
            if fetched:
                outputs = binding.get_outputs()
                made.update({wanted: outputs[at].numpy() for at, wanted in fetched})
            return made

        call.__dict__["holds"] = (holds, slices, binding)
        return call

    def _sized(self, value: Value) -> bool:
        """Whether the sizes of a value follow from slots, chunk and capacity."""
        known = {self.manifest.batch, self.cache.chunk, self.cache.capacity}
        return all(names(size) <= known for size in value.shape)

    def _array_of(self, value: Value, sizes: Mapping[str, int]) -> Array:
        return np.zeros([evaluate(size, sizes) for size in value.shape], value.dtype)

    def _slice(self, name: str, low: int, high: int) -> ort.OrtValue:
        if name in self._on_device:
            return self._on_device[name]
        value, array = self.manifest.values[name], self._arrays[name]
        if value.batch_axis is not None:
            at = slice(low * value.batch_factor, high * value.batch_factor)
            array = array[(slice(None),) * value.batch_axis + (at,)]
        if not array.flags.c_contiguous:
            if name in self.cache.buffers:
                raise InputError(f"the cache {name!r} does not have rows on its first axis")
            array = np.ascontiguousarray(array)
        return ort.OrtValue.ortvalue_from_numpy(array)
