"""Memory of a generation: what segments read in their slots, after rows have moved and others have come."""

from __future__ import annotations

import numpy as np
import onnx
import onnxruntime
import pytest

from offramp.bundle.manifest import Cache, Manifest, Segment, Value
from offramp.runtime.engine.sessions import session_options
from offramp.runtime.generation.buffers import Store, chunk_segment

ROWS, WIDTH = 4, 2
TWICE = f"""
<ir_version: 10, opset_import: ["" : 23]>
twice (float[a,b,c] x, float[d,e,{WIDTH}] h) => (float[a,b,c] y, float[d,e,{WIDTH}] z) {{
    y = Add(x, x)
    z = Add(h, h)
}}"""


def store_of(axis: int) -> tuple[Store, Manifest]:
    """A store whose kept value has its rows on an axis."""
    shape: list[int | str] = [3, WIDTH]
    shape.insert(axis, "batch")
    chunk = Value("float32", ("batch", "chunk", WIDTH))
    made = Manifest(
        model="m",
        inputs=(),
        outputs={},
        batch="batch",
        axes={"batch": (1, None), "chunk": (1, None), "capacity": (1, None)},
        values={"x": Value("float32", tuple(shape)), "h": chunk, "z": chunk, "y": Value("float32", ("n",))},
        segments={"twice": Segment("twice", "twice.onnx", {"x": "x", "h": "h"}, {"y": "y", "z": "z"})},
        stacks={},
        stages=(),
        files={},
        take={},
        cache=Cache(("ids",), "lengths", "places", {}, "chunk", "capacity", "", None, False),
    )
    return Store(made, ROWS, 8, None), made


@pytest.mark.parametrize("axis", [0, 1, 2])
def test_segments_read_what_is_in_their_slots(axis: int) -> None:
    """Chunks of any size, before and after rows have moved or were replaced; the first axis is no copy, others are."""
    store, manifest = store_of(axis)
    session = onnxruntime.InferenceSession(onnx.parser.parse_model(TWICE).SerializeToString(), session_options())
    call = chunk_segment(manifest, manifest.segments["twice"], session, frozenset({"x"}))
    random = np.random.default_rng(0)
    kept = random.random((3, WIDTH, ROWS), np.float32)
    values = np.moveaxis(kept, -1, axis)
    store.keep({"x": values})
    rows = list(range(ROWS))
    for move in (None, [0, 3, 2, 1], [3, 1], None):
        if move is None:
            kept = kept + 1
            values, rows = np.moveaxis(kept, -1, axis), list(range(ROWS))
            store.keep({"x": values})
        else:
            store.rearrange(move)
            rows = [rows[source] for source in move] + rows[len(move) :]
        for low, high, chunk in ((0, 1, 1), (1, 2, 3), (0, 2, 1), (1, 2, 1), (1, 2, 40), (1, 2, 20), (1, 2, 3)):
            hidden = random.random((high - low, chunk, WIDTH), np.float32)
            found = store.run(call, low, high, {"h": hidden}, np.zeros(high - low, np.int64))
            np.testing.assert_array_equal(found["z"], 2 * hidden)
            np.testing.assert_array_equal(found["y"], 2 * np.take(values, rows[low:high], axis))
