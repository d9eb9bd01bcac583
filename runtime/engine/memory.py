"""Where tensors live between segments: numpy arrays on the host, or ONNX Runtime's values on a device.

Both kinds offer the same functions; a run does not know which it has. An environment maps names of
values to tensors.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Protocol, TypeAlias

import numpy as np
import onnxruntime as ort
from numpy.typing import NDArray

from offramp.bundle.manifest import Manifest, Segment, Value
from offramp.runtime.engine.sessions import Providers

Tensor: TypeAlias = Any
Env: TypeAlias = dict[str, Tensor]
Array: TypeAlias = NDArray[Any]
Index: TypeAlias = NDArray[np.int64]

# Providers whose segments are run with inputs and outputs in device memory, and what ONNX Runtime calls it.
DEVICES: Mapping[str, str] = {"CUDAExecutionProvider": "cuda", "TensorrtExecutionProvider": "cuda"}


class Memory(Protocol):
    """What a run asks of the place where its tensors live."""

    def prepare(self, segment: Segment, session: ort.InferenceSession) -> Callable[[Env], None]:
        """A function that runs the segment: it reads its inputs from the environment and adds its outputs."""

    def take(self, env: Env, names: Iterable[str], items: Index | None, axis: str | None = None) -> Env:
        """A new environment with these values only; of those with ``axis`` (None: rows) these items (None: all)."""

    def put(self, name: str, array: Array) -> Tensor:
        """A tensor of this memory, for the value of that name."""

    def get(self, tensor: Tensor | Array) -> Array:
        """A numpy array."""


def places(items: Index, factor: int) -> Index:
    """Where items of an axis lie along a dimension, of which each takes ``factor`` places."""
    return items if factor == 1 else (items[:, None] * factor + np.arange(factor)).reshape(-1)


def every(rows: int, width: int) -> Index:
    """The places of so many tokens in each of so many rows: int64 [rows, width]."""
    places = np.arange(width)[None]
    return places if rows == 1 else np.repeat(places, rows, 0)


def silent_options() -> ort.RunOptions:
    """Options of a run whose failure is an exception, and not a line on stderr too."""
    options = ort.RunOptions()
    options.log_severity_level = 4
    # No graph capture. ONNX Runtime looks for this entry at each run, and is slow where there is none.
    options.add_run_config_entry("gpu_graph_id", "-1")
    return options


class Host:
    """Tensors are numpy arrays; a segment's outputs are ONNX Runtime's own memory, not copies."""

    def __init__(self, values: Mapping[str, Value], batch: str | None) -> None:
        self._values, self._batch = values, batch
        self._options = silent_options()

    def prepare(self, segment: Segment, session: ort.InferenceSession) -> Callable[[Env], None]:
        run, options = session.run, self._options
        inputs, fetch = tuple(segment.inputs.items()), list(segment.outputs)
        made = tuple(segment.outputs.values())

        def call(env: Env) -> None:
            found = run(fetch, {name: env[value] for name, value in inputs}, options)
            env.update(zip(made, found, strict=True))

        return call

    def take(self, env: Env, names: Iterable[str], items: Index | None, axis: str | None = None) -> Env:
        if items is None:
            return {name: env[name] for name in names}
        return {name: self._items(name, env[name], items, axis) for name in names}

    def put(self, name: str, array: Array) -> Tensor:
        return array

    def get(self, tensor: Tensor) -> Array:
        array: Array = tensor
        return array

    def _items(self, name: str, array: Array, items: Index, axis: str | None) -> Array:
        place = self._values[name].place(axis or self._batch)
        return array if place is None else array.take(places(items, place[1]), axis=place[0])


class Device:
    """Tensors stay on a device, all but those that ``to_host`` names, which segments put out to the host.

    ``takers`` are the sessions of ``Manifest.take``; items of a value that has none go over the host.
    """

    def __init__(
        self,
        values: Mapping[str, Value],
        batch: str | None,
        device: tuple[str, int],
        to_host: frozenset[str],
        takers: Mapping[str, ort.InferenceSession],
    ) -> None:
        self._values, self._batch, self._device, self._to_host = values, batch, device, to_host
        self._host = Host(values, batch)
        self._options = silent_options()
        self._lock = threading.Lock()
        self._takers = {
            key: self._bound(session, {"data": "data", "indices": "indices"}, {"taken": "taken"}, frozenset())
            for key, session in takers.items()
        }

    def prepare(self, segment: Segment, session: ort.InferenceSession) -> Callable[[Env], None]:
        return self._bound(session, segment.inputs, segment.outputs, self._to_host)

    def take(self, env: Env, names: Iterable[str], items: Index | None, axis: str | None = None) -> Env:
        if items is None:
            return {name: env[name] for name in names}
        return {name: self._items(name, env[name], items, axis) for name in names}

    def put(self, name: str, array: Array) -> Tensor:
        return array if name in self._to_host else self._copy(array)

    def get(self, tensor: Tensor) -> Array:
        if isinstance(tensor, np.ndarray):
            return tensor
        array: Array = tensor.numpy()
        return array.copy() if self._device[0] == "cpu" else array  # there it lies in memory that the value holds

    def _items(self, name: str, tensor: Tensor, items: Index, axis: str | None) -> Tensor:
        value = self._values[name]
        place = value.place(axis or self._batch)
        if place is None:
            return tensor
        taker = self._takers.get(f"{value.dtype}/{place[0]}")
        if name in self._to_host or taker is None:
            host = self._host.take({name: self.get(tensor)}, (name,), items, axis)
            return self.put(name, host[name])
        env = {"data": tensor, "indices": self._copy(places(items, place[1]))}
        taker(env)
        return env["taken"]

    def _copy(self, array: Array) -> Tensor:
        return ort.OrtValue.ortvalue_from_numpy(array, *self._device)

    def _bound(
        self,
        session: ort.InferenceSession,
        inputs: Mapping[str, str],
        outputs: Mapping[str, str],
        to_host: frozenset[str],
    ) -> Callable[[Env], None]:
        binding, lock, options = session.io_binding(), self._lock, self._options
        devices = {name: ("cpu", 0) if made in to_host else self._device for name, made in outputs.items()}

        def call(env: Env) -> None:
            with lock:
                for name, value in inputs.items():
                    binding.bind_ortvalue_input(name, env[value])
                # A later run writes into an output that stays bound, so each run binds new ones.
                for name, device in devices.items():
                    binding.bind_output(name, *device)
                session.run_with_iobinding(binding, options)
                found = binding.get_outputs()
                binding.clear_binding_inputs()
                binding.clear_binding_outputs()
            env.update(zip(outputs.values(), found, strict=True))

        return call


def device_of(providers: Providers | None) -> tuple[str, int] | None:
    """The device whose memory the first provider works in: ("cuda", its id); None for the host."""
    if not providers:
        return None
    first = providers[0]
    name, options = (first, {}) if isinstance(first, str) else first
    return (DEVICES[name], int(options.get("device_id", 0))) if name in DEVICES else None


def read_back(manifest: Manifest) -> frozenset[str]:
    """The values that only the host needs: scores and outputs that no segment reads."""
    exits = [exit_ for stack in manifest.stacks.values() for exit_ in stack.exits]
    found = set(manifest.outputs.values())
    for exit_ in exits:
        found.update(exit_.scores.values(), exit_.outputs.values())
    return frozenset(found).difference(*(segment.inputs.values() for segment in manifest.segments.values()))
