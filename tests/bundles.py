"""Small bundles made of ONNX text, and the same computation in numpy.

A tiny model: token ids become ``hidden``; each block adds ``tanh(hidden @ W + context + table)``, where
``context`` differs by row and ``table`` does not; the tail pools over the tokens and gives ``logits``.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from onnx import TensorProto, parser

from offramp.bundle import manifest as m
from offramp.bundle.json_text import to_json

LAYOUTS = ("first", "second", "folded", "none")
LONGEST = 6
WORDS = 11
_WIDTH, _CLASSES = 8, 5


def _weights() -> dict[str, NDArray[np.float32]]:
    random = np.random.default_rng(7)
    shapes: dict[str, tuple[int, ...]] = {
        "words": (WORDS, _WIDTH),
        "targets": (WORDS, _WIDTH),
        "places": (LONGEST, _WIDTH),
        "head": (_WIDTH, _CLASSES),
    }
    shapes |= {f"block{i}": (_WIDTH, _WIDTH) for i in range(1, 5)}
    shapes |= {f"adapter{i}": (_WIDTH,) for i in range(1, 5)}
    return {name: random.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()}


WEIGHTS = _weights()


class Writer:
    """Collects the files, values and segments of a bundle, and writes it."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.values: dict[str, m.Value] = {}
        self.segments: dict[str, m.Segment] = {}
        self._data = b"".join(array.tobytes() for array in WEIGHTS.values())
        sizes = np.cumsum([0, *(array.nbytes for array in WEIGHTS.values())])
        self._at = dict(zip(WEIGHTS, map(int, sizes), strict=False))
        root.mkdir(parents=True, exist_ok=True)
        (root / m.WEIGHTS_FILE).write_bytes(self._data)

    def value(self, name: str, dtype: str, *shape: int | str) -> str:
        self.values[name] = m.Value(dtype, shape)
        return name

    def file(self, name: str, graph: str, *weights: str) -> str:
        """Write an ONNX file: a graph as text, and the weights that it takes from weights.bin."""
        model = parser.parse_model(f'<ir_version: 10, opset_import: ["" : 18]> g {graph}')
        for weight in weights:
            tensor = model.graph.initializer.add(name=weight, data_type=TensorProto.FLOAT)
            tensor.dims.extend(WEIGHTS[weight].shape)
            tensor.data_location = TensorProto.EXTERNAL
            where = {"location": m.WEIGHTS_FILE, "offset": self._at[weight], "length": WEIGHTS[weight].nbytes}
            for key, item in where.items():
                tensor.external_data.add(key=key, value=str(item))
        (self.root / name).write_bytes(model.SerializeToString())
        return name

    def segment(self, name: str, file: str, inputs: Mapping[str, str], outputs: Mapping[str, str]) -> str:
        self.segments[name] = m.Segment(name, file, inputs, outputs)
        return name

    def takers(self) -> dict[str, str]:
        for axis in (0, 1):
            text = f"Gather <axis = {axis}> (data, indices)"
            graph = f"(float[a, b, c] data, int64[n] indices) => (float[d, e, f] taken) {{ taken = {text} }}"
            self.file(f"take{axis}.onnx", graph)
        return {f"float32/{axis}": f"take{axis}.onnx" for axis in (0, 1)}

    def finish(self, **fields: Any) -> Path:
        common = {
            "batch": "batch",
            "axes": {"batch": (1, None), "tokens": (1, LONGEST)},
            "take": self.takers(),
        }
        found = m.Manifest(
            model="tiny",
            values=self.values,
            segments=self.segments,
            files=listed(self.root),
            **(common | fields),
        )
        (self.root / m.MANIFEST_FILE).write_text(to_json(found), encoding="utf-8")
        return self.root


def listed(root: Path) -> dict[str, m.File]:
    """All files of a bundle but the manifest, as a manifest lists them."""
    files = sorted(path for path in root.iterdir() if path.is_file() and path.name != m.MANIFEST_FILE)
    return {path.name: listed_file(path) for path in files}


def listed_file(path: Path) -> m.File:
    content = path.read_bytes()
    return m.File(len(content), hashlib.sha256(content).hexdigest())


def classifier(
    root: Path,
    *,
    layout: str = "first",
    exits: Sequence[int] = (1, 2, 4),
    scores: str = "tail",
    adapters: bool = False,
    shared: bool = False,
    policy: Mapping[str, Any] | None = None,
) -> Path:
    """Four blocks, an exit after each of ``exits``.

    ``layout`` is where rows lie in the hidden state: on the "first" axis, the "second", "folded" thrice
    ("3*batch"), or nowhere (a model of one row, "none"). ``scores`` come from the "tail", or one from the
    "block"; ``shared`` blocks have the same weights, hence one file.
    """
    w = Writer(root)
    rows: int | str = 1 if layout == "none" else "batch"

    def hidden(name: str, tokens: int | str = "tokens") -> str:
        lead = {"folded": ("3*batch", tokens), "second": (tokens, "batch")}.get(layout, (rows, tokens))
        return w.value(name, "float32", *lead, _WIDTH)

    _prologue(w, layout)
    w.value("ids", "int64", *((rows, 3, "tokens") if layout == "folded" else (rows, "tokens")))
    w.value("table", "float32", *(("tokens", 1, _WIDTH) if layout == "second" else ("tokens", _WIDTH)))
    made = {"hidden": hidden("hidden0"), "context": hidden("context", 1), "table": "table"}
    w.segment("prologue", "prologue.onnx", {"ids": "ids"}, made)
    _tail(w, layout)
    ways = []
    for i in range(1, 5):
        weight = "block1" if shared else f"block{i}"
        inputs = {"hidden": f"hidden{i - 1}", "context": "context", "table": "table"}
        outputs = {"out": hidden(f"hidden{i}")}
        if scores == "block":
            outputs["calm"] = w.value(f"calm{i}", "float32", rows)
        w.segment(f"block{i}", _block(w, weight, layout), inputs, outputs)
        if i in (*exits, 4):
            state = hidden(f"adapted{i}") if adapters and i < 4 else f"hidden{i}"
            names = () if scores == "block" else ("top1", "entropy", "prediction")
            found = {n: w.value(f"{n}{i}", "int64" if n == "prediction" else "float32", rows) for n in names}
            logits = {"logits": w.value(f"logits{i}", "float32", rows, _CLASSES)}
            pieces = [w.segment(f"exit{i}.tail", "tail.onnx", {"hidden": state}, logits | found)]
            if state.startswith("adapted"):
                pieces.insert(
                    0, w.segment(f"exit{i}.adapter", _adapter(w, i), {"hidden": f"hidden{i}"}, {"out": state})
                )
            found = found or {"calm": f"calm{i}"}
            ways.append(m.Exit(i, tuple(pieces), state, logits, found))
    parts = tuple(m.Part(i, (f"block{i}",), f"hidden{i}") for i in range(1, 5))
    stack = m.Stack("encoder", "encoder", 4, "hidden0", "hidden4", parts, tuple(ways))
    return w.finish(
        inputs=("ids",),
        outputs={"logits": "logits4"},
        stacks={"encoder": stack},
        stages=(m.Stage(segment="prologue"), m.Stage(stack="encoder")),
        policy=policy,
        **({"batch": None, "axes": {"tokens": (1, LONGEST)}} if layout == "none" else {}),
    )


def translator(root: Path) -> Path:
    """Two stacks: an encoder of two blocks, a bridge, and a decoder of two blocks with inputs of its own.

    The encoder's pooled output is the decoder's context; the pooled output of the bridge is an output too.
    """
    w = Writer(root)
    lead = ("batch", "tokens")
    for name in ("source", "target"):
        w.value(name, "int64", *lead)
    for name in ("hidden0", "hidden1", "hidden2", "adapted1", "encoded", "state0", "state1", "state2"):
        w.value(name, "float32", *lead, _WIDTH)
    for name in ("context", "memory"):
        w.value(name, "float32", "batch", 1, _WIDTH)
    for name in ("table", "places"):
        w.value(name, "float32", "tokens", _WIDTH)
    _prologue(w, "first")
    w.segment(
        "read",
        "prologue.onnx",
        {"ids": "source"},
        {"hidden": "hidden0", "context": "context", "table": "table"},
    )
    _tail(w, "first")
    _block(w, "block1", "first"), _block(w, "block2", "first")
    around = {"context": "context", "table": "table"}
    w.segment("encoder1", "block1.onnx", {"hidden": "hidden0", **around}, {"out": "hidden1"})
    w.segment("encoder2", "block2.onnx", {"hidden": "hidden1", **around}, {"out": "hidden2"})
    w.segment("adapt1", _adapter(w, 1), {"hidden": "hidden1"}, {"out": "adapted1"})
    w.file(
        "bridge.onnx",
        """(float[b, t, 8] hidden, int64[b, t] ids)
        => (float[b, one, 8] memory, float[b, t, 8] out, float[t, 8] table) {
            axis = Constant <value_ints = [1]> ()
            memory = ReduceMean (hidden, axis)
            out = Gather (targets, ids)
            zero = Constant <value_ints = [0]> ()
            length = Shape <start = 1> (ids)
            sliced = Slice (words, zero, length)
            table = Tanh (sliced)
        }""",
        "targets",
        "words",
    )
    w.segment(
        "bridge",
        "bridge.onnx",
        {"hidden": "encoded", "ids": "target"},
        {"memory": "memory", "out": "state0", "table": "places"},
    )
    around = {"context": "memory", "table": "places"}
    ways = []
    for i in (1, 2):
        w.segment(f"decoder{i}", f"block{i}.onnx", {"hidden": f"state{i - 1}", **around}, {"out": f"state{i}"})
        w.value(f"logits{i}", "float32", "batch", _CLASSES)
        w.value(f"top1.{i}", "float32", "batch")
        outputs = {"logits": f"logits{i}", "top1": f"top1.{i}"}
        w.segment(f"exit{i}", "tail.onnx", {"hidden": f"state{i}"}, outputs)
        ways.append(m.Exit(i, (f"exit{i}",), f"state{i}", {"logits": f"logits{i}"}, {"top1": f"top1.{i}"}))
    leave = (m.Exit(1, ("adapt1",), "adapted1", {}, {}), m.Exit(2, (), "hidden2", {}, {}))
    parts = tuple(m.Part(i, (f"encoder{i}",), f"hidden{i}") for i in (1, 2))
    encoder = m.Stack("encoder", "encoder", 2, "hidden0", "encoded", parts, leave)
    parts = tuple(m.Part(i, (f"decoder{i}",), f"state{i}") for i in (1, 2))
    decoder = m.Stack("decoder", "decoder", 2, "state0", "state2", parts, tuple(ways))
    return w.finish(
        inputs=("source", "target"),
        outputs={"logits": "logits2", "memory": "memory"},
        stacks={"encoder": encoder, "decoder": decoder},
        stages=(
            m.Stage(segment="read"),
            m.Stage(stack="encoder"),
            m.Stage(segment="bridge"),
            m.Stage(stack="decoder"),
        ),
    )


def _prologue(w: Writer, layout: str) -> None:
    rank = "[b, three, t]" if layout == "folded" else "[b, t]"
    ids = {
        "folded": "flat = Concat <axis = 0> (minus, length) rows = Reshape (ids, flat)",
        "second": "rows = Transpose <perm = [1, 0]> (ids)",
    }.get(layout, "rows = Identity (ids)")
    shape = "[t, one, 8]" if layout == "second" else "[t, 8]"
    placed = "Unsqueeze (sliced, one)" if layout == "second" else "Identity (sliced)"
    w.file(
        "prologue.onnx",
        f"""(int64{rank} ids) => (float[r, s, 8] hidden, float[r, s, 8] context, float{shape} table) {{
            zero = Constant <value_ints = [0]> ()
            one = Constant <value_ints = [1]> ()
            minus = Constant <value_ints = [-1]> ()
            length = Shape <start = -1> (ids)
            {ids}
            hidden = Gather (words, rows)
            context = ReduceMean (hidden, {"zero" if layout == "second" else "one"})
            sliced = Slice (places, zero, length)
            table = {placed}
        }}""",
        "words",
        "places",
    )


def _block(w: Writer, weight: str, layout: str) -> str:
    """Puts out ``calm`` too, a score: how little the block's own change is."""
    axes = "[0, 2]" if layout == "second" else "[1, 2]"
    shape = "[-1, 3]" if layout == "folded" else "[-1, 1]"
    return w.file(
        f"{weight}.onnx",
        f"""(float[b, t, 8] hidden, float[b, one, 8] context, float table)
        => (float[b, t, 8] out, float[r] calm) {{
            mixed = MatMul (hidden, {weight})
            moved = Add (mixed, context)
            placed = Add (moved, table)
            change = Tanh (placed)
            out = Add (hidden, change)
            axes = Constant <value_ints = {axes}> ()
            shape = Constant <value_ints = {shape}> ()
            last = Constant <value_ints = [1]> ()
            mean = ReduceMean <keepdims = 0> (change, axes)
            grouped = Reshape (mean, shape)
            calm = ReduceMean <keepdims = 0> (grouped, last)
        }}""",
        weight,
    )


def _adapter(w: Writer, i: int) -> str:
    graph = f"(float[b, t, 8] hidden) => (float[b, t, 8] out) {{ out = Mul (hidden, adapter{i}) }}"
    return w.file(f"adapter{i}.onnx", graph, f"adapter{i}")


def _tail(w: Writer, layout: str) -> None:
    axis = 0 if layout == "second" else 1
    w.file(
        "tail.onnx",
        f"""(float[b, t, 8] hidden)
        => (float[r, 5] logits, float[r] top1, float[r] entropy, int64[r] prediction) {{
            axis = Constant <value_ints = [{axis}]> ()
            shape = Constant <value_ints = [-1, {3 if layout == "folded" else 1}, 8]> ()
            one = Constant <value_ints = [1]> ()
            pooled = ReduceMean <keepdims = 0> (hidden, axis)
            grouped = Reshape (pooled, shape)
            mean = ReduceMean <keepdims = 0> (grouped, one)
            logits = MatMul (mean, head)
            chances = Softmax <axis = -1> (logits)
            top1 = ReduceMax <keepdims = 0> (chances, one)
            logs = LogSoftmax <axis = -1> (logits)
            products = Mul (chances, logs)
            sum = ReduceSum <keepdims = 0> (products, one)
            entropy = Neg (sum)
            prediction = ArgMax <axis = 1, keepdims = 0> (logits)
        }}""",
        "head",
    )


def expected(
    ids: NDArray[np.int64], after: int, *, adapters: bool = False, shared: bool = False
) -> NDArray[np.float32]:
    """Logits of a `classifier` whose rows all leave after so many blocks: float32 [rows, 5]."""
    folded = ids.reshape(-1, ids.shape[-1])
    hidden = WEIGHTS["words"][folded]
    context = hidden.mean(1, keepdims=True)
    for i in range(1, after + 1):
        weight = WEIGHTS["block1" if shared else f"block{i}"]
        hidden = hidden + np.tanh(hidden @ weight + context + WEIGHTS["places"][: ids.shape[-1]])
    if adapters and after < 4:
        hidden = hidden * WEIGHTS[f"adapter{after}"]
    pooled = hidden.mean(1).reshape(len(ids), -1, _WIDTH).mean(1)
    logits: NDArray[np.float32] = pooled @ WEIGHTS["head"]
    return logits
