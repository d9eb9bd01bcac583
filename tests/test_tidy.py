"""Fewer nodes for each token: reshapes with constant sizes, lookups along one axis; and what has to stay as it is."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest

from offramp.export.lowering.cleanup import tidy
from offramp.runtime.engine.sessions import session_options

HEADER = '<ir_version: 10, opset_import: ["" : 23]>\n'
SIZES = """
    rows = Shape<start = 0, end = 1>(x)
    tokens = Shape<start = 1, end = 2>(x)
"""


def tidied(text: str, **inputs: Any) -> list[str]:
    """The operators that are left; what the model computes is the same before and after."""
    model = onnx.parser.parse_model(HEADER + text)
    inside = ir.serde.deserialize_model(model)
    tidy(inside)
    after = ir.serde.serialize_model(inside)
    onnx.checker.check_model(after, full_check=True)
    wanted, found = (
        onnxruntime.InferenceSession(one.SerializeToString(), session_options()).run(None, inputs)
        for one in (model, after)
    )
    for array, other in zip(wanted, found, strict=True):
        np.testing.assert_array_equal(array, other)
    return [node.op_type for node in after.graph.node if node.op_type != "Constant"]


def numbers(*sizes: int) -> np.ndarray[Any, np.dtype[np.float32]]:
    return np.arange(np.prod(sizes), dtype=np.float32).reshape(sizes)


@pytest.mark.parametrize(
    ("given", "made", "sizes", "left"),
    [
        ("batch,tokens,12", "batch,tokens,4,3", "rows, tokens, four, three", 1),
        ("batch,tokens,12", "batch,4,tokens,3", "rows, four, tokens, three", 1),
        ("batch,tokens,12", "places,3", "places, three", 1),
        ("batch,tokens,12", "tokens,4,batch,3", "tokens, four, rows, three", 4),
    ],
)
def test_sizes_that_stay_in_their_place_are_constant(given: str, made: str, sizes: str, left: int) -> None:
    """0 takes the size from the input, -1 stands for one that is not known; two of those are left alone."""
    text = f"""
        run (float[{given}] x) => (float[{made}] y)
        <int64[1] four = {{4}}, int64[1] three = {{3}}> {{
            {SIZES}
            placed = Mul(rows, tokens)
            places = Mul(placed, four)
            sizes = Concat<axis = 0>({sizes})
            y = Reshape(x, sizes)
        }}"""
    for batch, tokens in ((2, 5), (1, 1), (3, 2)):
        assert len(tidied(text, x=numbers(batch, tokens, 12))) == left


def test_no_tokens_at_all() -> None:
    """A size of the input that is taken over may be 0."""
    text = f"""
        run (float[batch,tokens,12] x) => (float[batch,tokens,4,3] y)
        <int64[1] four = {{4}}, int64[1] three = {{3}}> {{
            {SIZES}
            sizes = Concat<axis = 0>(rows, tokens, four, three)
            y = Reshape<allowzero = 1>(x, sizes)
        }}"""
    assert tidied(text, x=numbers(2, 0, 12)) == ["Reshape"]


@pytest.mark.parametrize(
    ("axis", "attributes", "left"),
    [("-1", "", ["Gather"]), ("2", "", ["Gather"]), ("-1", "<batch_dims = 1>", ["Unsqueeze", "GatherND"])],
)
def test_places_along_one_axis(axis: str, attributes: str, left: list[str]) -> None:
    """Of a table with one row for each place; not where each row looks into a table of its own."""
    text = f"""
        run (float[2,7] x, int64[batch,tokens] at) => (float[batch,tokens,{"" if attributes else "7"}] y)
        <int64[1] axis = {{{axis}}}> {{
            places = Unsqueeze(at, axis)
            y = GatherND{attributes}(x, places)
        }}""".replace(",]", "]")
    assert tidied(text, x=numbers(2, 7), at=np.array([[0, 1, 1], [1, 0, 0]])) == left
