"""What a user gives is checked before ONNX Runtime sees it."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from offramp.bundle.expressions import evaluate, names, solve
from offramp.bundle.manifest import Manifest, Value
from offramp.errors import InputError
from offramp.runtime.engine.inputs import Inputs

VALUES = {
    "ids": Value("int64", ("batch", "tokens")),
    "mask": Value("bool", ("batch", "tokens")),
    "audio": Value("float32", ("3*batch", "2*tokens + 1", 4)),
    "offset": Value("int32", ()),
}
AXES = {"batch": (1, None), "tokens": (2, 8)}


def _inputs(batch: str | None = "batch") -> Inputs:
    return Inputs(Manifest("m", tuple(VALUES), {}, batch, AXES, VALUES, {}, {}, (), {}))


def _given(batch: int = 2, tokens: int = 3) -> dict[str, object]:
    return {
        "ids": np.zeros((batch, tokens), np.int64),
        "mask": np.ones((batch, tokens), np.bool_),
        "audio": np.zeros((3 * batch, 2 * tokens + 1, 4), np.float32),
        "offset": np.zeros((), np.int32),
    }


def test_what_fits() -> None:
    given = _given()
    arrays, batch, _ = _inputs().check(given)
    assert batch == 2
    assert all(arrays[name] is given[name] for name in VALUES)
    assert _inputs(None).check(given)[1] == 1


def test_lists_and_numbers_are_converted() -> None:
    given = _given() | {"ids": [[1, 2, 3], (4, 5, 6)], "mask": [[True] * 3] * 2, "offset": 5}
    arrays, _, _ = _inputs().check(given)
    assert [arrays[name].dtype for name in ("ids", "mask", "offset")] == [np.int64, np.bool_, np.int32]
    given["audio"] = np.zeros((6, 7, 4)).tolist()
    assert _inputs().check(given)[0]["audio"].dtype == np.float32


def test_arrays_are_made_contiguous() -> None:
    given = _given() | {"ids": np.zeros((3, 2), np.int64).T}
    assert _inputs().check(given)[0]["ids"].flags.c_contiguous
    assert _inputs().check(given)[0]["offset"].shape == ()


class Graded:
    """As a tensor of torch that requires a gradient."""

    shape = (2, 3)

    def __array__(self, *_: Any, **__: Any) -> Any:
        raise RuntimeError("Can't call numpy() on Tensor that requires grad.")


WRONG = [
    ({"ids": Graded()}, "'ids' cannot be an array of int64: Can't call numpy() on Tensor that requires grad."),
    ({"ids": None}, "'ids' is None, expected int64 [batch, tokens]"),
    ({"ids": np.array([["a", "b"]])}, "'ids' is <U1, expected int64\n"),
    ({"extra": 1}, "'extra' is not an input"),
    ({"ids": np.zeros((2, 3), np.int32)}, "'ids' is int32, expected int64: use .astype(np.int64)"),
    ({"audio": np.zeros((6, 7, 4))}, "'audio' is float64, expected float32: use .astype(np.float32)"),
    ({"audio": np.zeros((6, 7, 4), ">f4")}, "'audio' is >f4, expected float32"),
    ({"ids": [[1.5, 2.0, 3.0]] * 2}, "'ids' is float64, expected int64"),
    ({"ids": [[1, 2], [3]]}, "'ids' cannot be an array of int64"),
    ({"ids": ["a", "b"]}, "expected int64"),
    ({"offset": 2**40}, "'offset' cannot be an array of int32"),
    ({"ids": np.zeros(3, np.int64)}, "'ids' has the shape [3], expected int64 [batch, tokens]"),
    ({"audio": np.zeros((6, 7, 5), np.float32)}, "axis 2 of 'audio' has 5 places, expected 4"),
    ({"mask": np.ones((2, 4), np.bool_)}, "axis 1 of 'mask' has 4 places; tokens is 3 (tokens 3 in 'ids')"),
    ({"mask": np.ones((1, 3), np.bool_)}, "axis 0 of 'mask' has 1 places; batch is 2 (batch 2 in 'ids')"),
    ({"audio": np.zeros((6, 8, 4), np.float32)}, "axis 1 of 'audio' has 8 places; 2*tokens + 1 is 7"),
    (_given(0), "the batch is empty: 'ids' has no rows"),
    (_given(2, 9), "tokens is 9 in 'ids'; this bundle is for 2 to 8"),
    (_given(2, 1), "tokens is 1 in 'ids'; this bundle is for 2 to 8"),
]


@pytest.mark.parametrize(("change", "message"), WRONG)
def test_what_does_not_fit(change: Any, message: str) -> None:
    with pytest.raises(InputError) as caught:
        _inputs().check(_given() | change)
    assert message in str(caught.value)
    assert "ids int64 [batch, tokens], mask bool [batch, tokens]" in str(caught.value)
    assert isinstance(caught.value, ValueError)


def test_all_problems_come_together() -> None:
    with pytest.raises(InputError) as caught:
        _inputs().check({"IDS": 1, "mask": np.ones(3), "offset": 0})
    for message in ("'ids' is missing", "'audio' is missing", "'IDS' is not an input", "'mask' is float64"):
        assert message in str(caught.value)
    with pytest.raises(InputError, match="inputs map names to arrays, this is a ndarray"):
        _inputs().check(np.zeros((2, 3)))  # type: ignore[arg-type]


def test_an_axis_that_only_an_expression_holds() -> None:
    values = {"audio": Value("float32", ("3*batch", "2*tokens + 1"))}
    inputs = Inputs(Manifest("m", ("audio",), {}, "batch", AXES, values, {}, {}, (), {}))
    assert inputs.check({"audio": np.zeros((6, 7), np.float32)})[1] == 2
    with pytest.raises(InputError, match="axis 0 of 'audio' has 7 places, which is no 3\\*batch"):
        inputs.check({"audio": np.zeros((7, 7), np.float32)})
    with pytest.raises(InputError, match="tokens is 9 in 'audio'"):
        inputs.check({"audio": np.zeros((6, 19), np.float32)})


def test_expressions() -> None:
    sizes = {"a": 7, "b": 3}
    for text in ("a", "a+b", "2*a - b", "(a + 1)//b", "-a % b", "max(a, b, 9)", "min(a, b) * 2"):
        assert evaluate(text, sizes) == eval(text, {}, sizes)
    assert evaluate(5, {}) == 5
    assert names("max(a, 2)*b") == {"a", "b"}
    assert names(4) == frozenset()
    assert solve("2*a + b", "a", 17, {"b": 3}) == 7
    assert solve("2*a", "a", 7, {}) is None
    assert solve("a//2", "a", 4, {}) is None
    with pytest.raises(ValueError, match="divides by zero"):
        evaluate("a//(b - 3)", sizes)
    for text in (
        "a.b",
        "a[0]",
        "f(a)",
        "1.5",
        "True",
        "a if b else 1",
        "a;b",
        "",
        "a" * 300,
        "max()",
        "a/b",
        "a**b",
    ):
        with pytest.raises(ValueError, match=r"expression|is not made of|'a / b'"):
            names(text)
