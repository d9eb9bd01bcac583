"""Checks of what a user gives to a run, so that ONNX Runtime sees only what fits."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from offramp.bundle.expressions import evaluate, names, solve
from offramp.bundle.implied import ImpliedInputs
from offramp.bundle.manifest import Manifest, Value
from offramp.errors import InputError

_SHOWN = 5  # wrong numbers in a message


class Checked(NamedTuple):
    """Inputs that fit, how many rows the batch has (1 for a model without a batch), and the lengths of all axes."""

    arrays: dict[str, NDArray[Any]]
    rows: int
    sizes: dict[str, int]


class Ids(NamedTuple):
    """Which numbers an input holds: from ``least`` to ``greatest``, and ``others``, which stand for features."""

    least: int
    greatest: int
    others: tuple[int, ...] = ()

    def problem(self, name: str, array: NDArray[Any]) -> str | None:
        """What is wrong with the numbers of an input; None where nothing is."""
        if not array.size or (array.min() >= self.least and array.max() <= self.greatest):
            return None
        wrong = array[(array < self.least) | (array > self.greatest)]
        wrong = wrong[~np.isin(wrong, self.others)]
        if not wrong.size:
            return None
        return f"{name!r} has the ids {wrong[:_SHOWN].tolist()}; they go from {self.least} to {self.greatest}"


def placeholders_of(manifest: Manifest, name: str) -> tuple[int, ...]:
    """The ids of an input that stand for other inputs."""
    return tuple(item.token for item in manifest.placeholders if item.input == name)


def present(manifest: Manifest, given: Mapping[str, Any]) -> Mapping[str, Any]:
    """What is given, without None for what may be left out: a tokenizer may say so of what it does not make."""
    if not isinstance(given, Mapping):
        return given
    settings = manifest.preprocessing.image_text
    needed = set(manifest.inputs) - set(settings.inputs if settings else ())  # None is left to `Inputs` to refuse
    return {name: value for name, value in given.items() if value is not None or name in needed}


class Inputs:
    """The inputs that a bundle takes.

    Attributes:
        ids: Which numbers those hold that are looked up in tables.
    """

    def __init__(self, manifest: Manifest) -> None:
        self._values = {name: manifest.values[name] for name in manifest.inputs}
        self._axes, self._batch = manifest.axes, manifest.batch
        self._implied, self._placeholders = ImpliedInputs(manifest), manifest.placeholders
        self.ids = {name: Ids(*limits, placeholders_of(manifest, name)) for name, limits in manifest.ids.items()}
        self._dims = [
            (name, axis, size)
            for name, value in self._values.items()
            for axis, size in enumerate(value.shape)
            if isinstance(size, str)
        ]
        self._prompt = manifest.cache.prompt if manifest.cache else None
        self._over_text: dict[str, float] = {}  # by name what stands in front of the text
        if manifest.cache and self._prompt:
            self._over_text = {manifest.cache.tokens[0]: self._prompt.filler, **self._prompt.given}
            self._over_text |= {name: item.value for name, item in manifest.cache.implied.items() if item.axis is None}
        self._dims.sort(key=lambda dim: (len(names(dim[2])), dim[2] not in manifest.axes))

    def ahead(self, given: Mapping[str, Any]) -> int:
        """How many places for features stand in front of a text, for these inputs; 0 where one is missing."""
        prompt = self._prompt
        if prompt is None or not prompt.ahead:
            return 0
        sizes: dict[str, int] = {}
        for name, axis, size in self._dims:
            unknown = names(size) - sizes.keys()
            found = [] if name in self._over_text or name not in given else shape_of(given[name])
            if len(unknown) == 1 and axis < len(found):
                (new,) = unknown
                sizes[new] = solve(size, new, found[axis], sizes) or 0
        return evaluate(prompt.ahead, sizes) if names(prompt.ahead) <= sizes.keys() else 0

    def _with_places(self, given: Mapping[str, Any]) -> Mapping[str, Any]:
        """The inputs with those places in front of the text; what is no array is left for `check` to refuse."""
        ahead = self.ahead(given)
        if not ahead:
            return given
        found = dict(given)
        for name, filler in self._over_text.items():
            if len(shape_of(given.get(name, ()))) != 2:
                continue
            value = self._values.get(name)
            array = np.asarray(given[name]) if value is None else _array(name, value, given[name])
            found[name] = np.concatenate([np.full((array.shape[0], ahead), filler, array.dtype), array], 1)
        return found

    def check(self, given: Mapping[str, Any]) -> Checked:
        """The inputs as contiguous arrays, with the lengths of their axes.

        Python lists and numbers become arrays of the right dtype. An array has to have it: no values are
        cast behind the user's back, and ONNX Runtime would take some wrong ones for right. Inputs that the graph
        makes itself are left out; they may be given as they would be made.

        Raises:
            InputError: names, dtypes, ranks or sizes do not fit. All problems are in one message.
        """
        expected = ", ".join(f"{name} {value}" for name, value in self._values.items())
        if not isinstance(given, Mapping):
            raise InputError(f"inputs map names to arrays, this is a {type(given).__name__}; names: {expected}")
        given = self._with_places(given)
        problems = [f"{name!r} is missing" for name in self._values if name not in given]
        known = self._values.keys() | self._implied.names
        problems += [f"{name!r} is not an input" for name in given if name not in known]
        arrays: dict[str, NDArray[Any]] = {}
        for name, value in self._values.items():
            if name in given:
                try:
                    arrays[name] = _array(name, value, given[name])
                except InputError as error:
                    problems.append(str(error))
        sizes: dict[str, int] = {}
        if not problems:
            problems = list(self._sizes(arrays, sizes))
        if problems:
            raise InputError("\n  ".join([*problems, f"(this bundle takes: {expected})"]))
        problems = [text for name, known in self.ids.items() if (text := known.problem(name, arrays[name]))]
        problems += self._places(arrays, sizes)
        if problems:
            raise InputError("\n  ".join(problems))
        self._implied.check(given, sizes)
        return Checked(arrays, 1 if self._batch is None else sizes[self._batch], sizes)

    def _places(self, arrays: Mapping[str, NDArray[Any]], sizes: Mapping[str, int]) -> Iterator[str]:
        """What is wrong with the places that texts keep for other inputs."""
        for item in self._placeholders:
            wanted = evaluate(item.count, sizes)
            for row, found in enumerate((arrays[item.input] == item.token).sum(-1).reshape(-1).tolist()):
                if found > wanted or (found < wanted and not item.masks):
                    many = f"at most {wanted}, as {' and '.join(item.masks)} says" if item.masks else wanted
                    yield (
                        f"row {row} of {item.input!r} has the id {item.token} {found} times; it keeps a place for each "
                        f"of {many}"
                    )

    def _sizes(self, arrays: Mapping[str, NDArray[Any]], sizes: dict[str, int]) -> Iterator[str]:
        """Find the length of each axis; yield what contradicts it or its range."""
        source: dict[str, str] = {}
        for name, axis, size in self._dims:
            found = arrays[name].shape[axis]
            if sizes.get(size) == found:  # an axis by its name, as most are
                continue
            unknown = names(size) - sizes.keys()
            if len(unknown) == 1:
                (new,) = unknown
                length = solve(size, new, found, sizes)
                if length is None:
                    yield f"axis {axis} of {name!r} has {found} places, which is no {size}"
                    return
                sizes[new], source[new] = length, name
            elif not unknown and (expected := evaluate(size, sizes)) != found:
                others = ", ".join(f"{a} {sizes[a]} in {source[a]!r}" for a in sorted(names(size)))
                yield f"axis {axis} of {name!r} has {found} places; {size} is {expected} ({others})"
        for axis_name, length in sizes.items():
            low, high = self._axes[axis_name]
            if length == 0 and axis_name == self._batch:
                yield f"the batch is empty: {source[axis_name]!r} has no rows"
            elif length < low or (high is not None and length > high):
                limit = f"at least {low}" if high is None else f"{low} to {high}"
                yield f"{axis_name} is {length} in {source[axis_name]!r}; this bundle is for {limit}"


def shape_of(given: Any) -> Sequence[int]:
    """The shape of what is given, none where it is no array."""
    try:
        return tuple(np.shape(given))
    except ValueError:
        return ()


def _array(name: str, value: Value, given: Any) -> NDArray[Any]:
    wanted = np.dtype(value.dtype)
    if given is None:
        raise InputError(f"{name!r} is None, expected {value}")
    try:
        array = np.asarray(given)
        if isinstance(given, list | tuple | bool | int | float):
            exact = array.size == 0 or np.can_cast(array.dtype, wanted, "same_kind")
            array = np.asarray(given, wanted) if exact else array
    except (ValueError, TypeError, OverflowError, RuntimeError) as error:  # the last: a tensor with a gradient
        raise InputError(f"{name!r} cannot be an array of {wanted}: {error}") from error
    if array.dtype != wanted:
        cast = f": use .astype(np.{wanted})" if array.dtype.kind in "biufc" else ""  # objects and texts are no numbers
        raise InputError(f"{name!r} is {array.dtype}, expected {wanted}{cast}")
    if array.ndim != len(value.shape):
        raise InputError(f"{name!r} has the shape {list(array.shape)}, expected {value}")
    for axis, size in enumerate(value.shape):
        if isinstance(size, int) and array.shape[axis] != size:
            raise InputError(f"axis {axis} of {name!r} has {array.shape[axis]} places, expected {size}")
    return np.asarray(array, order="C")
