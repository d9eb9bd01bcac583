"""What is calibrated on: examples, one row each, with or without labels."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from offramp.bundle.implied import ImpliedInputs
from offramp.errors import InputError
from offramp.runtime import Chain

LABELS = "labels"
FIT_SHARE = 0.3  # of the examples; the test needs the others more
_TOGETHER = 32  # rows of equal shapes that run in one batch where time does not matter

Example = Mapping[str, Any]


@dataclass(frozen=True)
class Examples:
    """Inputs of one row each, as ``chain.run`` or ``chain.generate`` takes them, and a label each or none."""

    inputs: Sequence[Example]
    labels: Sequence[Any] | None

    def __len__(self) -> int:
        return len(self.inputs)

    @property
    def sha256(self) -> str:
        """Fingerprint of names, dtypes, shapes and contents, in order."""
        digest = hashlib.sha256()
        for row, example in enumerate(self.inputs):
            named = {**example, **({LABELS: self.labels[row]} if self.labels is not None else {})}
            for name in sorted(named):
                value = named[name]
                array = np.asarray(value if not isinstance(value, str) else value.encode())
                digest.update(f"{name} {array.dtype.str} {array.shape}\n".encode())
                digest.update(np.ascontiguousarray(array).tobytes())
        return digest.hexdigest()

    def some(self, rows: Sequence[int] | NDArray[np.int64]) -> Examples:
        """The examples at ``rows``, in that order."""
        labels = None if self.labels is None else [self.labels[row] for row in rows]
        return Examples([self.inputs[row] for row in rows], labels)

    def split(self, seed: int) -> tuple[Examples, Examples]:
        """At random: what is fitted on, and what is tested on; both in random order."""
        order = np.random.default_rng(seed).permutation(len(self))
        cut = round(FIT_SHARE * len(self))
        return self.some(order[:cut]), self.some(order[cut:])


def read(chain: Chain, data: Mapping[str, Any] | Sequence[Mapping[str, Any]]) -> Examples:
    """The examples in ``data``: a batch as ``chain.run`` takes it, with "labels" or without, or several batches.

    A generator's token ids may be rows of different lengths, and its labels anything that its quality takes.

    Raises:
        InputError: there are none, it is something else, names or numbers of rows do not fit, or only some batches
            have labels.
    """
    batches: list[Any] = [data] if isinstance(data, Mapping) or not hasattr(data, "__iter__") else list(data)
    inputs: list[Example] = []
    labels: list[Any] = []
    for batch in batches:
        if not isinstance(batch, Mapping):
            raise InputError(
                f"data has a {type(batch).__name__}; a mapping of arrays by input name is needed, or several",
                hint="{" + ", ".join(f"{name!r}: ..." for name in chain.inputs) + f", {LABELS!r}: ...}}",
            )
        batch = {name: value for name, value in batch.items() if value is not None or name == LABELS}
        if LABELS in batch and not np.iterable(batch[LABELS]):
            raise InputError(f"the labels are {batch[LABELS]!r}; one for each row is needed", hint="or leave them out")
        rows = _rows(chain, {name: value for name, value in batch.items() if name != LABELS})
        if LABELS in batch and len(batch[LABELS]) != len(rows):
            raise InputError(f"there are {len(batch[LABELS])} labels for {len(rows)} rows")
        inputs += rows
        labels += list(batch.get(LABELS, ()))
    if not inputs:
        raise InputError("there are no examples", hint="a mapping of arrays by input name, perhaps with labels")
    if labels and len(labels) != len(inputs):
        raise InputError(f"{len(labels)} of {len(inputs)} examples have labels: label all or none")
    return Examples(inputs, labels or None)


def _rows(chain: Chain, batch: Mapping[str, Any]) -> list[Example]:
    """A batch as one example a row."""
    batch = _without_padding(chain, batch)
    unknown = sorted(batch.keys() - chain.inputs.keys())
    if unknown or not batch:
        raise InputError(f"data has {unknown or 'no inputs'}; this bundle takes {sorted(chain.inputs)} and {LABELS!r}")
    if chain.manifest.batch is None:
        return [batch]
    counts = {name: _count(chain, name, value) for name, value in batch.items() if chain.rows_of(name) is not None}
    if len(set(counts.values())) != 1:
        raise InputError(f"the data's inputs have different numbers of rows: {counts}")
    (count,) = set(counts.values())
    return [{name: _row(chain, name, value, row) for name, value in batch.items()} for row in range(count)]


def _without_padding(chain: Chain, batch: Mapping[str, Any]) -> Mapping[str, Any]:
    """A generator's batch without inputs that its graph makes itself: rows lose what a mask among them hides."""
    cache, ids = chain.manifest.cache, chain.generates
    if cache is None or ids is None or not np.iterable(batch.get(ids)) or cache.implied.keys().isdisjoint(batch):
        return batch
    kept = ImpliedInputs(chain.manifest).kept(batch, [_array(ids, row, "int64") for row in batch[ids]])
    return {name: value for name, value in batch.items() if name not in cache.implied} | {ids: kept}


def _count(chain: Chain, name: str, value: Any) -> int:
    if name == chain.generates and np.iterable(value):
        return len([*value])
    axis, factor = chain.rows_of(name) or (0, 1)
    try:
        shape = np.shape(value)
    except ValueError as error:
        raise InputError(
            f"{name!r} has rows of different lengths", hint="several batches, one for each length"
        ) from error
    if len(shape) <= axis:
        raise InputError(f"{name!r} has shape {list(shape)}, and no axis of rows: {chain.inputs[name]} is needed")
    return int(shape[axis]) // factor


def _row(chain: Chain, name: str, value: Any, row: int) -> Any:
    if name == chain.generates:
        return [_array(name, value[row], "int64")]
    axis, factor = chain.rows_of(name) or (None, 1)
    array = value if isinstance(value, np.ndarray) else _array(name, value, chain.inputs[name].dtype)
    return array if axis is None else array.take(range(row * factor, (row + 1) * factor), axis)


def _array(name: str, value: Any, dtype: str) -> NDArray[Any]:
    """Lists and numbers in the dtype of an input; what would lose something by that is left for a run to refuse."""
    try:
        found = np.asarray(value)
        exact = not found.size or np.can_cast(found.dtype, dtype, "same_kind")
        return np.asarray(value, dtype) if exact else found
    except (TypeError, ValueError, OverflowError) as error:
        raise InputError(f"{name!r} has a row that cannot be an array of {dtype}: {error}") from error


def together(chain: Chain, examples: Sequence[Example]) -> Iterator[tuple[list[int], Example]]:
    """All examples in batches of equal shapes: which ones, and their inputs."""
    groups: dict[object, list[int]] = {}
    for row, example in enumerate(examples):
        alone = row if chain.manifest.batch is None else None
        groups.setdefault((alone, *((name, np.shape(example[name])) for name in sorted(example))), []).append(row)
    for group in groups.values():
        for start in range(0, len(group), _TOGETHER):
            rows = group[start : start + _TOGETHER]
            yield (
                rows,
                {name: _joined(chain, name, [examples[row][name] for row in rows]) for name in examples[rows[0]]},
            )


def _joined(chain: Chain, name: str, values: Sequence[Any]) -> Any:
    place = chain.rows_of(name)
    return values[0] if place is None or len(values) == 1 else np.concatenate(values, place[0])
