"""Weights in fewer bits: what is encoded how, how far it is from fp32, and what is refused."""

from __future__ import annotations

import functools
import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import shared
import tiny
import torch
from test_cli import refused, run
from torch import Tensor, nn

import offramp
from offramp import cli
from offramp.bundle.precision import encodings
from offramp.bundle.whole import divided
from offramp.check import check
from offramp.cli._precision import read
from offramp.errors import BundleError, ExportError, InputError
from offramp.export.agreement import Bounds, changed
from offramp.export.automatic import chosen
from offramp.export.patterns import listed
from offramp.export.quantize import quantized
from offramp.passes import apply
from offramp.runtime.engine import overflow, sessions
from offramp.runtime.result import Result

WIDE = 64


def opened(model: onnx.ModelProto) -> onnxruntime.InferenceSession:
    """The model as a chain would run it."""
    return onnxruntime.InferenceSession(model.SerializeToString(), sessions.session_options())


class Wide(nn.Module):
    """A classifier of two blocks whose weights are most of it."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(500, WIDE)
        layer = nn.TransformerEncoderLayer(WIDE, 4, 4 * WIDE, batch_first=True, dropout=0.0)
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.head = nn.Linear(WIDE, 5)

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(self.encoder(self.embed(ids))[:, 0])  # type: ignore[no-any-return]


class Tied(Wide):
    """A decoder whose head is its table of words."""

    def forward(self, ids: Tensor) -> Tensor:
        mask = nn.Transformer.generate_square_subsequent_mask(ids.shape[1])
        return nn.functional.linear(self.encoder(self.embed(ids), mask, is_causal=True), self.embed.weight)


class Crossed(Wide):
    """A decoder that attends to the encoder, by a weight of which queries take one part, keys and values the other."""

    def __init__(self) -> None:
        super().__init__()
        layer = nn.TransformerDecoderLayer(WIDE, 4, 4 * WIDE, batch_first=True, dropout=0.0)
        self.decoder = nn.TransformerDecoder(layer, 2)

    def forward(self, ids: Tensor, words: Tensor) -> Tensor:  # type: ignore[override]
        mask = nn.Transformer.generate_square_subsequent_mask(words.shape[1])
        x = self.decoder(self.embed(words), self.encoder(self.embed(ids)), mask, tgt_is_causal=True)
        return self.head(x)  # type: ignore[no-any-return]


@pytest.fixture(scope="module")
def program() -> offramp.Program:
    torch.manual_seed(0)
    ids = torch.randint(500, (2, 12))
    return apply(offramp.capture(Wide().eval(), {"ids": ids}), "insert-exits,insert-scores{measure=top1}")


@functools.cache
def captured(make: Callable[[], nn.Module]) -> offramp.Program:
    torch.manual_seed(0)
    inputs = {"ids": torch.randint(500, (2, 12)), "words": torch.randint(500, (2, 9))}
    names = ("ids", "words") if make is Crossed else ("ids",)
    return shared.lent(offramp.capture(make().eval(), {name: inputs[name] for name in names}))


def size(path: Path) -> int:
    return sum(file.stat().st_size for file in path.iterdir())


def operators(path: Path) -> set[str]:
    files = [file for file in path.iterdir() if file.suffix == ".onnx"]
    return {node.op_type for file in files for node in onnx.load(file, load_external_data=False).graph.node}


@pytest.mark.parametrize(
    ("precision", "encodings", "operator", "share", "least"),
    [
        ("int8", {"int8", "int8-dynamic"}, "MatMulInteger", 0.36, 0.9),
        ("int4", {"int8", "int4"}, "MatMulNBits", 0.27, 0.5),
        ({"encoder.1": "int4"}, {"int4", "fp32"}, "MatMulNBits", 0.8, 0.5),
    ],
)
def test_a_model_that_runs_at_once(
    program: offramp.Program,
    tmp_path: Path,
    precision: Any,
    encodings: set[str],
    operator: str,
    share: float,
    least: float,
) -> None:
    offramp.save(program, tmp_path / "whole.offramp")
    figures = offramp.save(program, tmp_path / "m.offramp", precision)
    chain = offramp.load(tmp_path / "m.offramp")
    assert {segment.encoding for segment in chain.manifest.segments.values()} == encodings
    assert operator in operators(tmp_path / "m.offramp")
    assert isinstance(precision, dict) or "Gemm" not in operators(tmp_path / "m.offramp")
    assert size(tmp_path / "m.offramp") < share * size(tmp_path / "whole.offramp")
    assert 0 < figures["encoding"] < 0.2
    assert figures["same answers"] >= least
    assert 0.5 <= figures["same exits"] <= 1
    whole, ids = offramp.load(tmp_path / "whole.offramp"), np.arange(24).reshape(2, 12)
    for policy in (offramp.Never(), offramp.Depth(1)):
        old, new = (each.run({"ids": ids}, policy) for each in (whole, chain))
        (name,) = old.outputs
        assert 0 < np.abs(old.outputs[name] - new.outputs[name]).max() < 0.3 * np.abs(old.outputs[name]).max()
        assert new.exits["encoder"].tolist() == old.exits["encoder"].tolist()


@pytest.mark.parametrize("precision", ["int8", "int4"])
def test_a_model_that_generates(precision: str, decoder: tiny.Captured, tmp_path: Path) -> None:
    made = apply(decoder.program, "insert-exits,insert-scores{measure=top1},insert-cache")
    figures = offramp.save(made, tmp_path / "m.offramp", precision)
    assert figures["cache"] < 1e-4  # of fp32, against torch
    chain = offramp.load(tmp_path / "m.offramp")
    assert {item.encoding for name, item in chain.manifest.segments.items() if name.startswith("decoder.")} == {
        precision
    }
    found = chain.generate({"input_ids": [[1, 2, 3], [4]]}, offramp.Never(), max_new_tokens=8)
    checked = chain.generate({"input_ids": [[1, 2, 3], [4]]}, offramp.Verify(1, 0.05), max_new_tokens=8)
    for one, other in zip(found.tokens, checked.tokens, strict=True):
        assert one.tolist() == other.tolist()  # blocks of a row's own: deferred tokens are what they are one by one


def test_the_same_bytes_lie_there_once(program: offramp.Program, tmp_path: Path) -> None:
    offramp.save(program, tmp_path / "m.offramp", "int8")
    places: dict[tuple[str, str], int] = {}
    for file in (tmp_path / "m.offramp").glob("*.onnx"):
        for item in onnx.load(file, load_external_data=False).graph.initializer:
            if item.data_location == onnx.TensorProto.EXTERNAL:
                where = {entry.key: entry.value for entry in item.external_data}
                places[where["offset"], where["length"]] = int(where["length"])
    weights = (tmp_path / "m.offramp" / "weights.bin").stat().st_size
    assert weights - sum(places.values()) < 64 * len(places)


def test_halves_are_whole_once_they_are_loaded(decoder: tiny.Captured, tmp_path: Path) -> None:
    for name, precision in (("whole", "fp32"), ("m", "fp16")):
        offramp.save(apply(decoder.program, "insert-cache"), tmp_path / name, precision)
    assert (tmp_path / "m" / "weights.bin").stat().st_size < 0.6 * (tmp_path / "whole" / "weights.bin").stat().st_size
    chain = offramp.load(tmp_path / "m")
    assert "fp16 against fp32: 0.00" in repr(chain)
    options = onnxruntime.SessionOptions()
    options.optimized_model_filepath = str(tmp_path / "optimized.onnx")
    for file in {item.file for item in chain.manifest.segments.values()}:
        onnxruntime.InferenceSession(tmp_path / "m" / file, options)
        graph = onnx.load(tmp_path / "optimized.onnx", load_external_data=False).graph
        halves = {item.name for item in graph.initializer if item.data_type == onnx.TensorProto.FLOAT16}
        assert {node.op_type for node in graph.node if halves & set(node.input)} <= {"Gather", "Slice"}
    found = chain.generate({"input_ids": [[1, 2, 3]]}, max_new_tokens=4)
    assert (
        found.tokens[0].tolist()
        == offramp.load(tmp_path / "whole").generate({"input_ids": [[1, 2, 3]]}, max_new_tokens=4).tokens[0].tolist()
    )


@pytest.mark.parametrize("encoding", ["fp16", "int4", "int8", "int8-dynamic"])
def test_a_weight_that_a_segment_gives_stays_as_it_is(encoding: str) -> None:
    model = onnx.parser.parse_model(
        '<ir_version: 10, opset_import: ["": 23]> g (float[N, 64] x) => (float[N, 64] y, float[64, 64] w)'
        "<float[64, 64] w, float[64, 64] v> { y = MatMul(x, v) }"
    )
    made = np.random.default_rng(0).normal(0, 0.1, (2, 64, 64)).astype(np.float32)
    del model.graph.initializer[:]
    model.graph.initializer.extend(onnx.numpy_helper.from_array(made[i], name) for i, name in enumerate("wv"))
    session = opened(quantized(model, encoding, {}))
    found, given = session.run(None, {"x": np.ones((2, 64), np.float32)})
    assert np.array_equal(given, made[0])
    assert np.abs(found - made[1].sum(0)).max() < 0.3


@pytest.mark.parametrize("encoding", ["int4", "int8", "int8-dynamic"])
def test_no_sum_of_products_overflows(encoding: str) -> None:
    """On processors without VNNI pairs of products are added in 16 bits, unless ONNX Runtime is told not to."""
    model = onnx.parser.parse_model(
        '<ir_version: 10, opset_import: ["": 23]> g (float[N, 64] x) => (float[N, 64] y) <float[64, 64] w>'
        "{ y = MatMul(x, w) }"
    )
    del model.graph.initializer[:]
    model.graph.initializer.append(onnx.numpy_helper.from_array(np.ones((64, 64), np.float32), "w"))
    session = opened(quantized(model, encoding, {}))
    for x in (np.ones((3, 64), np.float32), -np.ones((1, 64), np.float32)):
        np.testing.assert_allclose(session.run(None, {"x": x})[0], 64 * x, rtol=0.01)


@pytest.mark.parametrize("wrong", [True, False])
def test_sums_that_cost_time_are_asked_for_only_where_others_overflow(
    wrong: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Session:
        def __init__(self, *_: Any, **__: Any) -> None:
            pass

        def run(self, _: None, given: dict[str, np.ndarray]) -> list[np.ndarray]:
            made = given["a"].astype(np.int32) @ given["b"].astype(np.int32)
            return [np.minimum(made, 64 // 2 * 32767) if wrong else made]

    monkeypatch.setattr(overflow, "_found", None)
    monkeypatch.setattr(onnxruntime, "InferenceSession", Session)
    options = sessions.session_options()
    if wrong:
        assert options.get_session_config_entry(overflow.EXACT) == "1"
    else:
        with pytest.raises(RuntimeError, match=overflow.EXACT):
            options.get_session_config_entry(overflow.EXACT)


class Looped(Wide):
    """One block, run three times; or three that have zero points in common."""

    def __init__(self, blocks: int) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(WIDE, 4, 16 * WIDE, batch_first=True, dropout=0.0)
        self.encoder = nn.TransformerEncoder(layer, blocks, enable_nested_tensor=False)
        if blocks == 1:
            self.encoder.layers = nn.ModuleList([self.encoder.layers[0]] * 3)
            self.encoder.num_layers = 3


@pytest.mark.parametrize(("blocks", "segments"), [(1, 1), (3, 1), (3, 3)])
def test_products_that_read_the_same_open_with_sums_that_do_not_overflow(
    blocks: int, segments: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(overflow, "_found", True)
    program = tiny.captured(functools.partial(Looped, blocks), {"ids": torch.arange(14).reshape(2, 7)}).program
    offramp.save(program, tmp_path / "m", "int8", segments=segments, loss=0.5)
    loaded = offramp.load(tmp_path / "m")
    (stack,) = loaded.manifest.stacks.values()
    assert stack.blocks == 3
    assert stack.whole is not None
    inside = [(tmp_path / "m" / name).stat().st_size for name in loaded.manifest.files if name.endswith(".onnx")]
    assert max(inside) < 4 * 16 * WIDE**2  # no copy of a weight lies in a graph


def test_the_product_that_is_asked_is_what_it_says() -> None:
    model = onnx.load_model_from_string(overflow.PRODUCT)
    (node,) = model.graph.node
    assert (node.op_type, list(node.input), list(node.output)) == ("MatMulInteger", ["a", "b"], ["c"])
    kinds = [value.type.tensor_type.elem_type for value in model.graph.input]
    assert kinds == [onnx.TensorProto.UINT8, onnx.TensorProto.INT8]


@pytest.mark.parametrize("encoding", ["int4", "int8", "int8-dynamic"])
def test_what_is_made_of_a_weight_is_one(encoding: str) -> None:
    model = onnx.parser.parse_model(
        '<ir_version: 10, opset_import: ["": 23]> g (float[N, 64] x) => (float[N, 64] y)'
        "<int64 one = {1}, int64[1] from = {64}, int64[1] to = {128}, int64[1] axis = {0}, int64[2] sizes = {64, 64},"
        "float[128, 64] u, float[128, 64] v, float[2, 64, 64] w>"
        "{ a, b = Split<axis = 0>(u, sizes) c = Transpose<perm = [1, 0]>(b) d = MatMul(x, c)"
        "e = Slice(v, from, to, axis) f = Gemm<transB = 1>(d, e) h = Gather<axis = 0>(w, one) y = MatMul(f, h) }"
    )
    random = np.random.default_rng(0)
    kept = [item for item in model.graph.initializer if item.data_type == onnx.TensorProto.INT64]
    shapes = {"u": (128, 64), "v": (128, 64), "w": (2, 64, 64)}
    made = {name: random.normal(0, 0.1, shape).astype(np.float32) for name, shape in shapes.items()}
    del model.graph.initializer[:]
    model.graph.initializer.extend([*kept, *(onnx.numpy_helper.from_array(made[name], name) for name in made)])
    x = random.normal(0, 1, (5, 64)).astype(np.float32)
    (wanted,) = opened(model).run(None, {"x": x})
    model = quantized(model, encoding, {})
    assert not {"MatMul", "Gemm", "Split", "Slice", "Gather"} & {node.op_type for node in model.graph.node}
    (found,) = opened(model).run(None, {"x": x})
    assert 0 < np.sqrt(np.mean((found - wanted) ** 2) / np.mean(wanted**2)) < 0.3


def test_auto_takes_what_is_fastest_within_the_bound(program: offramp.Program, tmp_path: Path) -> None:
    samples = [{"ids": np.random.default_rng(0).integers(500, size=(8, 12))}]
    figures = offramp.save(program, tmp_path / "m.offramp", "auto", samples=samples, loss=0.02)
    chain = offramp.load(tmp_path / "m.offramp")
    assert figures["encoding"] <= 0.02
    measured = chain.manifest.provenance["precision"]
    for segment in chain.manifest.segments.values():
        if segment.file in measured:
            found = measured[segment.file]
            assert found["encoding"] == segment.encoding
            assert found["milliseconds"].keys() == found["loss"].keys()
            assert all(times["many"] > 0 for times in found["milliseconds"].values())
    assert {"fp32", "int4", "int8-dynamic"} <= measured["encoder.1.onnx"]["loss"].keys()
    assert "auto (" in repr(chain)
    offramp.save(program, tmp_path / "m.offramp", "auto", samples=samples, loss=0)
    assert not encodings(offramp.load(tmp_path / "m.offramp").manifest)


def test_auto_of_a_generator_times_single_tokens(decoder: tiny.Captured, tmp_path: Path) -> None:
    made = apply(decoder.program, "insert-exits{head=own},insert-cache")
    offramp.save(made, tmp_path / "m.offramp", "auto")
    measured = offramp.load(tmp_path / "m.offramp").manifest.provenance["precision"]
    times = {name: found["milliseconds"]["fp32"].keys() for name, found in measured.items() if name[:8] == "decoder."}
    assert times
    assert all("one" in kinds for kinds in times.values())


class Placed(tiny.Short):
    """Takes positions, which a bundle's graph makes itself."""

    def forward(self, input_ids: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:  # type: ignore[override]
        x = self.words(input_ids) + self.places(positions)
        for block in self.blocks:
            x = block(x, None)
        return {"logits": self.head(self.leave(x))}  # type: ignore[return-value]


@pytest.mark.parametrize("kind", [tiny.Short, Placed])
def test_auto_of_a_prompt_that_leaves_no_room(kind: type[tiny.Short], tmp_path: Path) -> None:
    inputs = {"input_ids": tiny.ids(kind.ROOM)}
    if kind is Placed:
        inputs["positions"] = torch.arange(kind.ROOM).expand(2, -1)
    program = apply(offramp.capture(tiny.seeded(kind, 4), inputs), "insert-cache")
    samples = [{name: value.numpy() for name, value in inputs.items()}]
    offramp.save(program, tmp_path / "m.offramp", "auto", samples=samples, loss=1.0)
    measured = offramp.load(tmp_path / "m.offramp").manifest.provenance["precision"]
    assert all("one" in measured[f"decoder.{block}.onnx"]["milliseconds"]["fp32"] for block in range(1, 5))


def test_what_is_hidden_counts_for_nothing_and_what_breaks_is_no_number() -> None:
    def result(*values: float) -> Result:
        return Result({"logits": np.array([values], np.float32)}, {}, {}, ())

    before = [result(3.0, 4.0, -np.inf)]
    assert changed([before], [[result(3.0, 4.5, -np.inf)]])["encoding"] == pytest.approx(0.1)
    assert np.isnan(changed([before], [[result(np.nan, 4.0, -np.inf)]])["encoding"])
    assert Bounds(1.0).broken({"encoding": float("nan")}) == ["loss=1.0"]


def test_a_sample_whose_values_are_near_zero_counts_as_little_as_they_do() -> None:
    def results(*values: float) -> list[Result]:
        return [Result({"logits": np.array([[value]], np.float32)}, {}, {}, ()) for value in values]

    assert changed([results(5.0, 0.001)], [results(5.0, 0.501)])["encoding"] == pytest.approx(0.1, rel=1e-3)
    ways = [results(5.0), results(1.0)], [results(5.0), results(2.0)]
    assert changed(*ways)["encoding"] == pytest.approx(1.0)  # an exit's answers are its own
    zeros = results(0.0, 0.0, 0.0, 0.0)
    assert changed([zeros], [results(0.5, 0.5, 0.5, 0.5)])["encoding"] == pytest.approx(0.5)


def test_the_choice_gives_up_the_least_time() -> None:
    costs = {"a": {"fp32": 9.0, "int8": 3.0, "int4": 2.0}, "b": {"fp32": 9.0, "int8": 2.05, "int4": 2.0}}
    losses = {"a": {"fp32": 0.0, "int8": 0.01, "int4": 0.1}, "b": {"fp32": 0.0, "int8": 0.01, "int4": 0.1}}
    assert chosen(costs, losses, 1.0) == {"a": "int4", "b": "int4"}
    assert chosen(costs, losses, 0.12) == {"a": "int4", "b": "int8"}
    assert chosen(costs, losses, 0.015) == {"a": "int8", "b": "int8"}
    assert chosen(costs, losses, 0.0) == {"a": "fp32", "b": "fp32"}


@pytest.mark.parametrize(
    ("precision", "tokens", "bits"),
    [
        ("int4", None, {8}),
        ("int4", 511, {8}),
        ("int4", 512, {4}),
        ("int8", 512, {8}),
        ({"*tail": "int8", "*": "int4"}, 512, {8}),
        ({"*tail": "fp32", "*": "int4"}, 512, {4}),
    ],
)
def test_a_tied_head_is_stored_once(precision: Any, tokens: int | None, bits: set[int], tmp_path: Path) -> None:
    """In 4 bits where enough tokens say how to round it, and nobody wants more of them."""
    torch.manual_seed(0)
    made = apply(offramp.capture(Tied().eval(), {"ids": torch.randint(500, (2, 12))}), "insert-exits,insert-cache")
    samples = None if tokens is None else [{"ids": np.random.default_rng(0).integers(500, size=(1, tokens))}]
    offramp.save(made, tmp_path / "m.offramp", precision, loss=1, samples=samples)
    readers: dict[str, set[tuple[str, str, int]]] = {}
    for file in (tmp_path / "m.offramp").glob("*.onnx"):
        graph = onnx.load(file, load_external_data=False).graph
        offsets = {
            item.name: entry.value
            for item in graph.initializer
            for entry in item.external_data
            if entry.key == "offset"
        }
        for node in graph.node:
            if node.op_type in ("MatMulNBits", "GatherBlockQuantized"):
                weight = node.input[node.op_type == "MatMulNBits"]
                (own,) = (item.i for item in node.attribute if item.name == "bits")
                if weight in offsets:
                    readers.setdefault(offsets[weight], set()).add((node.op_type, file.name, own))
    (table,) = (found for found in readers.values() if "GatherBlockQuantized" in {kind for kind, *_ in found})
    # one product, since each session packs its own copy of it; rows are read by the first part, and by the whole
    heads = [] if isinstance(precision, dict) and precision["*tail"] == "fp32" else ["MatMulNBits"]
    assert sorted(kind for kind, *_ in table) == ["GatherBlockQuantized", "GatherBlockQuantized", *heads]
    assert {own for *_, own in table} == bits


@pytest.mark.parametrize(("precision", "words", "bits"), [("int4", 4096, 4), ("int4", 4095, 8), ("int8", 4096, 8)])
def test_a_table_of_many_rows_has_4_bits(precision: str, words: int, bits: int, tmp_path: Path) -> None:
    torch.manual_seed(0)
    module = Wide().eval()
    module.embed = nn.Embedding(words, WIDE)
    offramp.save(offramp.capture(module, {"ids": torch.randint(500, (2, 12))}), tmp_path / "m.offramp", precision)
    files = [onnx.load(file, load_external_data=False) for file in (tmp_path / "m.offramp").glob("*.onnx")]
    readers = [node for file in files for node in file.graph.node if node.op_type == "GatherBlockQuantized"]
    assert {item.i for node in readers for item in node.attribute if item.name == "bits"} == {bits}


@pytest.mark.parametrize("precision", ["int8", "int4"])
def test_a_weight_that_is_one_number(precision: str, tmp_path: Path) -> None:
    class Scaled(Wide):
        def __init__(self) -> None:
            super().__init__()
            self.scale = nn.Parameter(torch.tensor(2.0))

        def forward(self, ids: Tensor) -> Tensor:
            return super().forward(ids) * self.scale

    torch.manual_seed(0)
    program = offramp.capture(Scaled().eval(), {"ids": torch.randint(500, (2, 12))})
    assert 0 < offramp.save(program, tmp_path / "m.offramp", precision, loss=1)["encoding"] < 0.2


@pytest.mark.parametrize("precision", ["int8", "int4"])
def test_parts_of_a_weight_are_encoded(precision: str, tmp_path: Path) -> None:
    made = apply(captured(Crossed), "insert-cache")
    figures = offramp.save(made, tmp_path / "m.offramp", precision, loss=1)
    assert 0 < figures["encoding"] < 0.2
    assert not {"MatMul", "Gemm", "Split"} & operators(tmp_path / "m.offramp")


def test_thresholds_are_of_one_precision(program: offramp.Program, tmp_path: Path) -> None:
    for name, precision in (("whole", "fp32"), ("m", "int8")):
        offramp.save(program, tmp_path / f"{name}.offramp", precision)
    examples = {"ids": np.random.default_rng(0).integers(500, size=(40, 12))}
    found = offramp.calibrate(offramp.load(tmp_path / "m.offramp"), examples, keep=0.5, confidence=0.5)
    with pytest.raises(InputError, match=r"chosen for a bundle in int8, int8-dynamic .*; whole.offramp is in fp32"):
        found.write(tmp_path / "whole.offramp")
    found.write(tmp_path / "m.offramp")
    assert offramp.load(tmp_path / "m.offramp").manifest.calibration
    manifest = (tmp_path / "m.offramp" / "manifest.json").read_text()
    (tmp_path / "whole.offramp" / "manifest.json").write_text(
        (tmp_path / "whole.offramp" / "manifest.json")
        .read_text()
        .replace('"calibration": null', f'"calibration": {json.dumps(json.loads(manifest)["calibration"])}')
    )
    with pytest.raises(BundleError, match="calibration: it was made in another precision"):
        offramp.load(tmp_path / "whole.offramp")


def test_too_much_is_an_error_that_leaves_nothing(program: offramp.Program, tmp_path: Path) -> None:
    with pytest.raises(ExportError, match=r"\d% of the answers .* not within loss=0\.0001") as caught:
        offramp.save(program, tmp_path / "m.offramp", "int4", loss=1e-4)
    assert """{"encoder.2": "fp32", "*": "int4"}, or --precision 'encoder.2=fp32,*=int4'""" in str(caught.value.hint)
    assert not any(tmp_path.iterdir())
    with pytest.raises(ExportError, match="not within loss") as caught:
        offramp.save(program, tmp_path / "m.offramp", {"encoder.2": "int8"}, loss=1e-9)
    assert 'precision={"encoder.2": "fp32"}, or' in str(caught.value.hint)
    assert not any(tmp_path.iterdir())
    samples = [{"ids": np.random.default_rng(0).integers(500, size=(40, 12))}]
    with pytest.raises(ExportError, match=r"not within agreement=1\.0"):
        offramp.save(program, tmp_path / "m.offramp", "int4", samples=samples, agreement=1.0)
    figures = offramp.save(program, tmp_path / "m.offramp", "int4", samples=samples)
    assert figures["encoding"] != offramp.save(program, tmp_path / "m.offramp", "int4")["encoding"]
    with pytest.raises(ExportError, match=r"try: other bounds$"):  # auto cannot be said of some segments
        Bounds(1e-9).check(offramp.load(tmp_path / "m.offramp").manifest, "auto")


@pytest.mark.parametrize(
    ("precision", "options", "reason"),
    [
        ("fp8", {}, "precision='fp8': there are fp32, fp16, int8, int4"),
        ({"encoder.1": "bf16"}, {}, "precision='bf16'"),
        ("int8", {"policy": {"name": "never"}}, "thresholds hold for the precision that they were chosen for"),
        (
            {"encoder.*": "int8"},
            {},
            r"tail.onnx .*: encoder.1/tail int8 \(by 'encoder.\*'\); tail fp32 .*\n.*{\"tail\": \"int8\", \"enc",
        ),
        ({"encoder.1/tail": "int8"}, {}, 'try: precision={"tail": "int8", "encoder.1/tail": "int8"}, or'),
        ({"tail": "int8", "*": "int4"}, {}, 'try: precision={"tail": "int4", "[*]": "int4"}, or'),
        (
            {"x.*": "int8", "tail": "int8"},
            {},
            r"matches 'x.\*'; there .*, encoder.1/tail\n.*{\"tail\": .*, \"\*\": ",
        ),
        (
            {"*": "int8", "tail": "fp32"},
            {},
            r"'tail' takes no segment, .* counts: '\*'\n.*{\"tail\": \"fp32\",",
        ),
    ],
)
def test_refusals(
    program: offramp.Program, tmp_path: Path, precision: Any, options: dict[str, Any], reason: str
) -> None:
    with pytest.raises(ExportError, match=reason):
        offramp.save(program, tmp_path / "m.offramp", precision, **options)
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize("segments", [None, 1], ids=repr)
@pytest.mark.parametrize("pipeline", ["", "insert-exits", "insert-exits{head=own}", "insert-adapter", "insert-cache"])
def test_names_are_known_before_anything_is_lowered(pipeline: str, segments: int | None, tmp_path: Path) -> None:
    make = Tied if pipeline == "insert-cache" else Wide
    pipeline = f"insert-exits,{pipeline}" if pipeline in ("insert-adapter", "insert-cache") else pipeline
    made = apply(captured(make), pipeline)
    offramp.save(made, tmp_path / "m.offramp", segments=segments)
    names = divided(offramp.load(tmp_path / "m.offramp").manifest).segments
    seen: list[str] = []
    with pytest.raises(ExportError, match=r"matches 'x\.\*'") as caught:
        offramp.save(
            made,
            tmp_path / "other",
            {"x.*": "int8"},
            segments=segments,
            progress=lambda name, done, total: seen.append(name),
        )
    assert not seen
    shown = str(caught.value.reason).partition("there are ")[2].split(", ")
    assert sorted(shown) == sorted(names)


def test_of_many_names_some_are_listed() -> None:
    assert listed([str(i) for i in range(14)]) == "0, 1, 2, 3, 4, 5, (4 more), 10, 11, 12, 13"


@pytest.mark.parametrize(
    ("text", "precision"), [("int8", "int8"), ("a=int8, *=int4", {"a": "int8", "*": "int4"}), ("auto", "auto")]
)
def test_precision_of_the_command(text: str, precision: Any) -> None:
    assert read(text) == precision


def test_a_precision_of_one_pattern_twice() -> None:
    with pytest.raises(ExportError, match=r"'a\.\*' is there twice\n  try: one precision for each"):
        read("a.*=int8,b=fp32,a.*=int4")


@pytest.mark.parametrize(
    ("text", "example"),
    [
        ("int8,encoder.2=fp32", "encoder.2=fp32,*=int8"),
        ("int8,int4", "encoder.1=fp32,*=int8"),
        ("encoder.2,tail=int4", "tail=int4,*=int8"),
    ],
)
def test_a_precision_without_a_pattern(text: str, example: str) -> None:
    with pytest.raises(ExportError, match=f"{text.partition(',')[0]!r} is not\n  try: --precision '") as caught:
        read(text)
    assert example in str(caught.value.hint)


def test_the_root_logger_stays_as_it_is(program: offramp.Program, tmp_path: Path) -> None:
    root = logging.getLogger()
    before = root.level, list(root.handlers), logging.root.manager.disable
    offramp.save(program, tmp_path / "m.offramp", "int4")
    assert (root.level, list(root.handlers), logging.root.manager.disable) == before


def test_through_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "wide.py").write_text(
        "import sys, torch\nfrom test_encode import Wide\n"
        "def make():\n    return Wide().eval(), {'ids': torch.randint(500, (2, 12))}\n"
    )
    given = ("export", f"{tmp_path / 'wide.py'}:make", "-o", tmp_path / "m.offramp")
    shown = run(capsys, *given, "--precision", "encoder.*=int8")
    assert "encoder.* int8 against fp32: 0.0" in shown
    assert run(capsys, "inspect", tmp_path / "m.offramp") in shown
    assert "of the answers are the same" in shown
    assert "int8" in offramp.load(tmp_path / "m.offramp").manifest.precision
    assert "there are fp32, fp16, int8, int4" in refused(capsys, *given, "--precision", "int2")
    assert cli.main([*map(str, given), "--precision", "int4", "--loss", "0.000001"]) == 1


def test_a_check_in_fewer_bits() -> None:
    torch.manual_seed(0)
    inputs = {"ids": torch.randint(500, (2, 12))}
    report = check(Wide().eval(), inputs, precision="int8", pipeline="insert-exits,insert-scores{measure=top1}")
    assert report.ok, report.reason
    assert 0 < report.max_error["precision"] < 0.05  # type: ignore[operator]
    assert report.agreement.keys() == {"answers", "exits"}
    assert report.bytes["bundle"] < report.bytes["parameters"]  # type: ignore[operator]
    report = check(Wide().eval(), inputs, precision="int8", loss=1e-6, pipeline="")
    assert (report.ok, report.stage) == (False, "precision")
    assert "not within loss=1e-06" in str(report.reason)
    report = check(Wide().eval(), inputs, precision={"x": "int8"}, pipeline="")
    assert "no segment's name matches 'x'; there are before-encoder" in str(report.reason)
    report = check(Wide().eval(), inputs, precision="int3")
    assert "precision='int3': there are" in str(report.reason)
