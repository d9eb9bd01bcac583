"""Values and their axes: items of any axis are taken out of values, and put together again."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from offramp.bundle.expressions import multiple
from offramp.bundle.manifest import Value
from offramp.runtime.engine.loop import Departure, joined
from offramp.runtime.engine.memory import Device, Host

SHAPES: list[tuple[int | str, ...]] = [
    ("batch", "tokens", 4),
    ("tokens", "batch", 4),
    ("batch", 2, "3*tokens"),
    ("2*batch", "tokens + 1"),
    (4,),
]


@pytest.mark.parametrize(
    ("size", "axis", "found"),
    [("batch", "batch", 1), ("7*batch", "batch", 7), ("batch*7", "batch", 7), ("batch + 1", "batch", None),
     ("batch*tokens", "batch", None), ("tokens", "batch", None), (4, "batch", None), ("-batch", "batch", None),
     ("batch*batch", "batch", None), ("batch // 0", "batch", None), ("2*batch - batch", "batch", 1)],
)  # fmt: skip
def test_multiples_of_an_axis(size: int | str, axis: str, found: int | None) -> None:
    assert multiple(size, axis) == found


def test_where_axes_lie() -> None:
    places = [(Value("float32", shape).place("batch"), Value("float32", shape).place("tokens")) for shape in SHAPES]
    assert places == [((0, 1), (1, 1)), ((1, 1), (0, 1)), ((0, 1), (2, 3)), ((0, 2), None), (None, None)]
    assert Value("float32", ("batch",)).place(None) is None


@pytest.mark.parametrize("device", [False, True])
@given(
    axis=st.sampled_from(["batch", "tokens"]),
    sizes=st.tuples(st.integers(1, 4), st.integers(1, 4)),
    group=st.lists(st.integers(0, 2), min_size=4, max_size=4),
)
def test_items_of_any_axis_leave_in_groups_and_come_back(
    device: bool, axis: str, sizes: tuple[int, int], group: list[int]
) -> None:
    lengths = dict(zip(("batch", "tokens"), sizes, strict=True))
    values = {f"v{i}": Value("float32", shape) for i, shape in enumerate(SHAPES)}
    memory: Any = Device(values, "batch", ("cpu", 0), frozenset(), {}) if device else Host(values, "batch")
    random = np.random.default_rng(0)
    whole = {}
    for name, value in values.items():
        dims = [size if isinstance(size, int) else eval(size, {}, lengths) for size in value.shape]
        whole[name] = random.random(dims, np.float32)
    env = {name: memory.put(name, array) for name, array in whole.items()}
    labels = np.array(group[: lengths[axis]])
    left = []
    for label in sorted(set(labels.tolist())):
        items = np.flatnonzero(labels == label)
        left.append(Departure(label, items, memory.take(env, values, items, axis)))
    found = joined(left, values, axis, lengths[axis], memory)
    for name, array in whole.items():
        np.testing.assert_array_equal(memory.get(found[name]), array)
