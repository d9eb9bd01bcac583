"""Cached attention as ONNX, for both targets: which operators, and that ONNX Runtime computes what torch does."""

from __future__ import annotations

import operator
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from torch import Tensor, fx
from torch._dynamo.source import ConstantSource
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv, StatelessSymbolicContext

from offramp.export.lowering.cleanup import OPSET_OF_CACHES
from offramp.export.lowering.exporter import OPSET
from offramp.export.lowering.lower import lower, translate
from offramp.export.lowering.node_builder import TARGETS
from offramp.export.lowering.outline import Computation
from offramp.export.subgraph import Subgraph
from offramp.program import ops
from offramp.runtime.engine.sessions import session_options

ROWS, CHUNK, CAPACITY, SIZE = 3, 5, 11, 8  # of the example; the first three are symbols
KEY_HEADS = 2
CLOSE: dict[str, Any] = {"rtol": 1e-4, "atol": 1e-5}
Arrays = dict[str, NDArray[Any]]


@dataclass(frozen=True)
class Case:
    """An attention: query heads per key head, features of values, window, bias (of all rows or heads, or of each).

    With ``twice`` its output is the query of a second one, whose keys are the values.
    """

    groups: int = 1
    values: int = SIZE
    window: int = 0
    bias: Literal["", "float", "bool"] = ""
    each_row: bool = False
    each_head: bool = True
    twice: bool = False

    def inputs(self, rows: int, chunk: int, capacity: int, seed: int = 0) -> dict[str, Tensor]:
        """Random values; caches are full of large ones, of which none behind a row's length may be read."""
        random = torch.Generator().manual_seed(seed)

        def normal(*sizes: int) -> Tensor:
            return torch.randn(sizes, generator=random)

        found = {
            "query": normal(rows, KEY_HEADS * self.groups, chunk, SIZE),
            "key": normal(rows, KEY_HEADS, chunk, SIZE),
            "value": normal(rows, KEY_HEADS, chunk, self.values),
            "key_cache": normal(rows, KEY_HEADS, capacity, SIZE),
            "value_cache": normal(rows, KEY_HEADS, capacity, self.values),
            "lengths": torch.zeros(rows, dtype=torch.int64),
        }
        if self.bias:
            heads = KEY_HEADS * self.groups if self.each_head else 1
            table = normal(rows if self.each_row else 1, heads, chunk, capacity)
            found["bias"] = table if self.bias == "float" else table > -0.5
        return found


def symbolic(mode: FakeTensorMode, value: Tensor, name: str) -> Any:
    """A fake tensor whose rows, chunk and capacity are symbols."""
    sizes = [DimDynamic.DUCK if size in (ROWS, CHUNK, CAPACITY) else DimDynamic.STATIC for size in value.shape]
    return mode.from_tensor(value, symbolic_context=StatelessSymbolicContext(sizes), source=ConstantSource(name))


class Piecework:
    """A piece that is made of calls on named inputs."""

    def __init__(self, inputs: dict[str, Tensor]) -> None:
        self.graph, self.mode = fx.Graph(), FakeTensorMode(shape_env=ShapeEnv())
        self.inputs = {}
        for name, value in inputs.items():
            self.inputs[name] = node = self.graph.placeholder(name)
            node.meta["val"] = symbolic(self.mode, value, name)
        self.calls: list[fx.Node] = []

    def call(self, target: Any, *args: Any) -> fx.Node:
        node = self.graph.call_function(target, args)
        with self.mode:
            node.meta["val"] = target(*fx.node.map_arg(args, lambda arg: arg.meta["val"]))
        self.calls.append(node)
        return node

    def piece(self, *outputs: fx.Node) -> Subgraph:
        return Subgraph("attention", tuple(self.inputs.values()), outputs, tuple(self.calls))


def arguments(case: Case, inputs: dict[str, Any]) -> list[Any]:
    names = ("query", "key", "value", "key_cache", "value_cache", "lengths")
    return [*(inputs[name] for name in names), inputs.get("bias"), 0.3, case.window]


def attention(case: Case) -> Subgraph:
    work = Piecework(case.inputs(ROWS, CHUNK, CAPACITY))
    made = work.call(ops.ATTENTION, *arguments(case, work.inputs))
    outputs = [work.call(operator.getitem, made, at) for at in range(3)]
    if case.twice:
        made = work.call(ops.ATTENTION, *arguments(case, swapped(work.inputs, outputs[0])))
        outputs += [work.call(operator.getitem, made, at) for at in range(3)]
    return work.piece(*outputs)


def swapped(inputs: dict[str, Any], query: Any) -> dict[str, Any]:
    key, value, keys, values = (inputs[name] for name in ("key", "value", "key_cache", "value_cache"))
    return {**inputs, "query": query, "key": value, "value": key, "key_cache": values, "value_cache": keys}


def append(axis: int, places: int) -> Subgraph:
    sizes = [places * ROWS, 2, 2]
    sizes[axis] = CAPACITY
    cache, new = torch.zeros(sizes), torch.zeros([CHUNK if i == axis else size for i, size in enumerate(sizes)])
    work = Piecework({"lengths": torch.zeros(ROWS, dtype=torch.int64)})
    for name, value in (("cache", cache), ("new", new)):
        work.inputs[name] = node = work.graph.placeholder(name)
        node.meta["val"] = symbolic(work.mode, value.narrow(0, 0, ROWS), name)
        if places > 1:
            with work.mode:
                node.meta["val"] = node.meta["val"].repeat(places, 1, 1)
    return work.piece(work.call(ops.APPEND, work.inputs["cache"], work.inputs["new"], work.inputs["lengths"], axis))


@dataclass(frozen=True)
class Lowered:
    function: Computation
    model: onnx.ModelProto
    session: onnxruntime.InferenceSession

    @property
    def operators(self) -> list[str]:
        return [node.op_type for node in self.model.graph.node]

    def run(self, inputs: dict[str, Tensor]) -> list[NDArray[Any]]:
        names = [str(node.target) for node in self.function.inputs]
        feed = {f"in{i}": inputs[name].numpy() for i, name in enumerate(names)}
        found: list[NDArray[Any]] = self.session.run([f"out{i}" for i in range(len(self.function.outputs))], feed)
        return found


Get = Callable[..., Lowered]


@pytest.fixture(scope="session")
def lowered() -> Get:
    """Pieces by what they are and the target, translated when first asked for."""
    known: dict[Any, Lowered] = {}

    def get(what: Case | tuple[int, int], target: Any = "ort") -> Lowered:
        if (what, target) not in known:
            function = lower(attention(what) if isinstance(what, Case) else append(*what), target)
            equal = next((made for made in known.values() if made.function.key == function.key), None)
            if equal is not None:
                known[what, target] = equal
                return equal
            model = translate(function, "attention")
            session = onnxruntime.InferenceSession(model.SerializeToString(), session_options())
            known[what, target] = Lowered(function, model, session)
        return known[what, target]

    return get


# Operators


def opset(model: onnx.ModelProto, domain: str = "") -> int | None:
    return next((item.version for item in model.opset_import if item.domain == domain), None)


def test_onnx_runtimes_own_operator(lowered: Get) -> None:
    made = lowered(Case(groups=2, window=3))
    (node,) = (node for node in made.model.graph.node if node.op_type == "GroupQueryAttention")
    assert node.domain == "com.microsoft"
    found = {item.name: onnx.helper.get_attribute_value(item) for item in node.attribute}
    assert (found["num_heads"], found["kv_num_heads"], found["local_window_size"]) == (4, 2, 3)
    assert found["scale"] == pytest.approx(0.3)
    assert "TensorScatter" not in made.operators
    assert "Attention" not in made.operators
    assert (opset(made.model), opset(made.model, "com.microsoft")) == (OPSET, 1)
    assert "local_window_size" not in {
        item.name for node in lowered(Case()).model.graph.node for item in node.attribute
    }


def test_onnxs_own_operators(lowered: Get) -> None:
    made = lowered(Case(groups=2, window=3), "portable")
    assert made.operators.count("TensorScatter") == 2
    assert made.operators.count("Attention") == 1
    assert "GroupQueryAttention" not in made.operators
    assert (opset(made.model), opset(made.model, "com.microsoft")) == (OPSET_OF_CACHES, None)
    onnx.checker.check_model(made.model)


def test_values_of_other_features_take_onnxs_own_operators(lowered: Get) -> None:
    case = Case(groups=2, values=SIZE + 4)
    assert lowered(case, "ort").function.key == lowered(case, "portable").function.key
    assert "GroupQueryAttention" not in lowered(case, "ort").operators
    assert lowered(Case(), "ort").function.key != lowered(Case(), "portable").function.key


@pytest.mark.parametrize("target", TARGETS)
def test_attentions_of_one_piece_share_what_they_make_of_lengths(lowered: Get, target: str) -> None:
    one, two = lowered(Case(), target), lowered(Case(twice=True), target)
    for name in {"ort": ("Add", "ReduceMax", "Sub"), "portable": ("Range", "LessOrEqual")}[target]:
        assert two.operators.count(name) == one.operators.count(name) > 0
    name = {"ort": "GroupQueryAttention", "portable": "Attention"}[target]
    assert (one.operators.count(name), two.operators.count(name)) == (1, 2)
    inputs = Case().inputs(1, 3, 6) | {"lengths": torch.tensor([2])}
    first = ops.ATTENTION(*arguments(Case(), inputs))
    second = ops.ATTENTION(*arguments(Case(), swapped(inputs, first[0])))
    found = two.run(inputs)
    for at, wanted in ((0, first[0]), (3, second[0])):
        np.testing.assert_allclose(found[at], wanted.numpy(), **CLOSE)


def test_nothing_of_offramp_is_left(lowered: Get) -> None:
    for target in TARGETS:
        left = {getattr(node.target, "namespace", "") for node in lowered(Case(), target).function.graph.nodes}
        assert "offramp" not in left


# Numerics

CASES = [
    Case(),
    Case(groups=2, window=3),
    Case(values=SIZE + 4),
    Case(groups=2, bias="float", each_row=True),
    Case(bias="float", window=2, each_head=False),
    Case(bias="bool"),
]


@settings(max_examples=60)
@given(case=st.sampled_from(CASES), target=st.sampled_from(TARGETS), seed=st.integers(0, 99), data=st.data())
def test_onnx_runtime_computes_what_torch_does(lowered: Get, case: Case, target: str, seed: int, data: Any) -> None:
    made = lowered(case, target)
    grouped = "GroupQueryAttention" in made.operators
    rows, chunk = data.draw(st.integers(1, 4)), data.draw(st.integers(1, 5))
    if grouped and chunk > 1:  # it takes several rows of one token, or one row of several
        rows = 1
    lengths = data.draw(st.lists(st.integers(0, 9), min_size=rows, max_size=rows), label="lengths")
    capacity = max(lengths) + chunk + data.draw(st.integers(0, 3), label="room")
    inputs = case.inputs(rows, chunk, capacity, seed) | {"lengths": torch.tensor(lengths)}
    places = torch.arange(capacity)
    behind = (places >= inputs["lengths"][:, None])[:, None, :, None]
    inputs |= {name: inputs[name].masked_fill(behind, 1e3) for name in ("key_cache", "value_cache")}
    if case.bias == "bool":  # every token sees itself
        here = inputs["lengths"][:, None] + torch.arange(chunk)
        inputs["bias"] = inputs["bias"] | (places == here[..., None]).any(0)
    found = made.run(inputs)
    expected = ops.ATTENTION(*arguments(case, inputs))
    np.testing.assert_allclose(found[0], expected[0].numpy(), **CLOSE)
    for cache, wanted in zip(found[1:], expected[1:], strict=True):
        for row, length in enumerate(lengths):
            np.testing.assert_array_equal(cache[row, :, : length + chunk], wanted[row, :, : length + chunk].numpy())


@pytest.mark.parametrize("target", TARGETS)
def test_caches_are_written_in_place(lowered: Get, target: str) -> None:
    """Input and output share memory, step after step, rows at lengths of their own."""
    made, case, rows = lowered(Case(groups=2), target), Case(groups=2), 3
    inputs = case.inputs(rows, 1, CAPACITY)
    inputs["lengths"] = torch.tensor([0, 4, 2])
    shared: Arrays = {name: inputs[name].numpy().copy() for name in ("key_cache", "value_cache")}
    names = [str(node.target) for node in made.function.inputs]
    for step in range(4):
        inputs |= {name: case.inputs(rows, 1, 1, seed=step + 1)[name] for name in ("query", "key", "value")}
        expected = ops.ATTENTION(*arguments(case, inputs))
        binding, held = made.session.io_binding(), []
        for at, name in enumerate(names):
            held.append(onnxruntime.OrtValue.ortvalue_from_numpy(shared.get(name, inputs[name].numpy())))
            binding.bind_ortvalue_input(f"in{at}", held[-1])
        binding.bind_output("out0")
        for at, name in enumerate(shared, 1):
            binding.bind_ortvalue_output(f"out{at}", held[names.index(name)])
        made.session.run_with_iobinding(binding)
        np.testing.assert_allclose(binding.get_outputs()[0].numpy(), expected[0].numpy(), **CLOSE)
        for name, wanted in zip(shared, expected[1:], strict=True):
            for row, length in enumerate(inputs["lengths"].tolist()):
                np.testing.assert_array_equal(shared[name][row, :, : length + 1], wanted[row, :, : length + 1].numpy())
        inputs |= {"key_cache": expected[1], "value_cache": expected[2], "lengths": inputs["lengths"] + 1}


@settings(max_examples=30)
@given(
    axis=st.sampled_from([1, 2]),
    places=st.sampled_from([1, 2]),
    lengths=st.lists(st.integers(0, 6), min_size=1, max_size=4),
    chunk=st.integers(1, 3),
)
def test_append_is_tensor_scatter(lowered: Get, axis: int, places: int, lengths: list[int], chunk: int) -> None:
    made = lowered((axis, places))
    assert made.operators.count("TensorScatter") == 1
    sizes = [places * len(lengths), 2, 2]
    sizes[axis] = max(lengths) + chunk
    random = torch.Generator().manual_seed(chunk)
    cache = torch.randn(sizes, generator=random)
    sizes[axis] = chunk
    new, counts = torch.randn(sizes, generator=random), torch.tensor(lengths)
    (found,) = made.run({"cache": cache, "new": new, "lengths": counts})
    np.testing.assert_array_equal(found, ops.APPEND(cache, new, counts, axis).numpy())
