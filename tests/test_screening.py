"""prediction-screened: the greatest class by 8-bit products with a bound, and exact ones of those that may be it."""

# mypy: disable-error-code="no-any-return"
from __future__ import annotations

import subprocess
import sys
from dataclasses import fields
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx.parser
import onnx_ir as ir
import onnxruntime as ort
import pytest
import tiny
import torch
from breadth import slow_but
from hypothesis import given
from hypothesis import strategies as st
from onnx import helper, numpy_helper
from test_short_scores import FORMS, Compared, Tailed
from torch import Tensor, nn

import offramp
from offramp.bundle.measures import SCREENED
from offramp.errors import SpecError
from offramp.export import quantize, save, screening
from offramp.export.partition import partition
from offramp.export.quantize import packed_rows
from offramp.passes import apply
from offramp.program import Program
from offramp.program.graph import results
from offramp.runtime.engine.sessions import session_options

TEXT = f"insert-scores{{measure={SCREENED}}}"


@pytest.fixture
def screened(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let small heads be screened."""
    monkeypatch.setattr(screening, "_LEAST", 1)


# Bounds


def _coarse(x: np.ndarray, blocks: np.ndarray, scales: np.ndarray) -> np.ndarray:
    """What ONNX Runtime makes of ``x`` and weights in 8 bits."""
    rows, count, block = blocks.shape
    node = helper.make_node(
        "MatMulNBits",
        ["x", "blocks", "scales"],
        ["y"],
        domain="com.microsoft",
        K=count * block,
        N=rows,
        bits=8,
        block_size=block,
        accuracy_level=4,
    )
    kind = onnx.TensorProto.FLOAT
    graph = helper.make_graph(
        [node],
        "coarse",
        [helper.make_tensor_value_info("x", kind, [None, count * block])],
        [helper.make_tensor_value_info("y", kind, [None, rows])],
        [numpy_helper.from_array(blocks, "blocks"), numpy_helper.from_array(scales, "scales")],
    )
    opsets = [helper.make_opsetid("", 23), helper.make_opsetid("com.microsoft", 1)]
    model = helper.make_model(graph, opset_imports=opsets, ir_version=10)
    return _opened(model).run(None, {"x": x})[0]


@given(
    seed=st.integers(0, 2**32 - 1),
    features=st.sampled_from([16, 48, 64, 192, 320]),
    classes=st.sampled_from([5, 64, 301]),
    tail=st.floats(1.0, 30.0),
    scale=st.sampled_from([1e-3, 1.0, 50.0]),
)
def test_products_in_8_bits_lie_within_the_bounds(
    seed: int, features: int, classes: int, tail: float, scale: float
) -> None:
    """Of states and weights with and without outliers, against products in float64."""
    random = np.random.default_rng(seed)
    weight = (random.standard_normal((classes, features)) ** 3 * scale).astype(np.float32)
    x = random.standard_normal((3, features)).astype(np.float32)
    x[:, random.integers(features)] *= np.float32(tail)
    made = screening.Screen.of(weight)
    parts = x.reshape(3, -1, made.blocks.shape[-1])
    known = np.concatenate([np.linalg.norm(parts, axis=-1), np.abs(parts).max(-1)], 1)
    off = np.abs(x.astype(np.float64) @ weight.T.astype(np.float64) - _coarse(x, made.blocks, made.scales))
    assert (off <= known @ made.bounds).all()
    assert (known @ made.bounds <= 40 * off.mean() + 1e-6).mean() > 0.5  # and these say something


def test_weights_are_packed_as_their_bytes_say() -> None:
    weight = np.random.default_rng(0).standard_normal((7, 64)).astype(np.float32)
    blocks, scales = packed_rows(weight)
    whole = ((blocks.astype(np.float32) - 128) * scales[..., None]).reshape(weight.shape)
    assert np.abs(whole - weight).max() <= np.abs(weight).max() / 254 * 1.01


# Graphs


def _captured(form: str = "tied") -> tiny.Captured:
    return tiny.captured(partial(Tailed, form), {"input_ids": tiny.ids()})


def _operators(bundle: Path) -> dict[str, set[str]]:
    files = {path.stem: onnx.load(path, load_external_data=False) for path in bundle.glob("*.onnx")}
    return {name: {node.op_type for node in model.graph.node} for name, model in files.items()}


@pytest.mark.parametrize("form", slow_but(["tied", "capped"], FORMS))
@pytest.mark.usefixtures("screened")
def test_every_form_of_a_head(tmp_path: Path, form: str) -> None:
    """Heads that cannot be screened make all products; the answer is the same."""
    captured = _captured(form)
    program = apply(captured.program, f"insert-exits{{after=2}},{TEXT}")
    found = tiny.outputs(program.module, captured.inputs)
    for item in program.exits:
        logits = found[item.outputs["logits"]]
        assert found[item.scores[SCREENED]].equal(logits.argmax(-1))
    save(program, tmp_path / "made.offramp")
    inputs = {name: value.numpy() for name, value in captured.inputs.items()}
    result = offramp.load(tmp_path / "made.offramp").run(inputs, offramp.Never())
    np.testing.assert_allclose(result.outputs["logits"], found["logits"].numpy(), rtol=1e-4, atol=1e-5)


Arrays = dict[str, np.ndarray]


def _model(body: str, arrays: Arrays) -> onnx.ModelProto:
    """A state [rows, tokens, 64] and the greatest of its classes."""
    text = f"""<ir_version: 10, opset_import: ["": 23, "com.microsoft": 1]>
        head (float[rows, tokens, 64] x) => (int64[rows, tokens] y) {{ {body} }}"""
    model = onnx.parser.parse_model(text)
    model.graph.initializer.extend(numpy_helper.from_array(array, name) for name, array in arrays.items())
    return model


def _heads(model: onnx.ModelProto) -> tuple[ir.Model, list[screening.Head]]:
    made = ir.from_proto(model)
    return made, list(screening.heads(made.graph.outputs))


def _inserted(model: onnx.ModelProto, weight: np.ndarray, **wrong: Any) -> ort.InferenceSession:
    """The model with its one head screened; ``wrong`` arrays in the place of what is known of the weight."""
    made, (head,) = _heads(model)
    known = {}
    for item in fields(screening.Screen):
        array = wrong.get(item.name, getattr(screening.Screen.of(weight), item.name))
        known[item.name] = ir.Value(name=item.name, const_value=ir.tensor(array, name=item.name))
        known[item.name].shape, known[item.name].type = ir.Shape(array.shape), ir.TensorType(ir.tensor(array).dtype)
        made.graph.register_initializer(known[item.name])
    screening.insert(made, head, known)
    return _opened(ir.to_proto(made))


def _opened(model: onnx.ModelProto) -> ort.InferenceSession:
    return ort.InferenceSession(model.SerializeToString(), session_options())


def _arrays(seed: int = 0, classes: int = 300) -> Arrays:
    random = np.random.default_rng(seed)
    weight, bias = random.standard_normal((classes, 64)), random.standard_normal(classes) * 5
    constants = {"cap": np.float32(64), "minus": np.float32(-2), "b": bias.astype(np.float32)}
    return {"w": weight.astype(np.float32), **{name: np.asarray(value) for name, value in constants.items()}}


LINEAR = "t = Transpose <perm = [1, 0]> (w) m = MatMul (x, t) "
GREATEST = "y = ArgMax <axis = -1, keepdims = 0> (m)"
BODIES = {
    "plain": LINEAR + GREATEST,
    "bias": LINEAR.replace(" m = ", " p = ") + "m = Add (p, b) " + GREATEST,
    "capped": LINEAR.replace(" m = ", " p = ") + "q = Div (p, cap) r = Tanh (q) m = Mul (r, cap) " + GREATEST,
    "bias, then scaled": LINEAR.replace(" m = ", " p = ") + "q = Add (p, b) m = Mul (q, cap) " + GREATEST,
}
OTHERS = {
    "scaled, then biased": LINEAR.replace(" m = ", " p = ") + "q = Mul (p, cap) m = Add (q, b) " + GREATEST,
    "turned round": LINEAR.replace(" m = ", " p = ") + "m = Mul (p, minus) " + GREATEST,
    "of each class its own": LINEAR.replace(" m = ", " p = ") + "m = Mul (p, b) " + GREATEST,
    "of one number": LINEAR.replace(" m = ", " p = ") + "m = Add (p, cap) " + GREATEST,
    "along the tokens": LINEAR + "a = ArgMax <axis = 1, keepdims = 0> (m) y = Slice (a, b)",
    "the product is read": LINEAR + "z = Relu (m) " + GREATEST,
    "of a product": "t = Transpose <perm = [1, 0]> (x) m = MatMul (x, t) " + GREATEST,
}


@pytest.mark.parametrize("body", BODIES)
@pytest.mark.parametrize("shape", [(1, 1), (2, 3), (2, 0), (0, 1)])
@pytest.mark.usefixtures("screened")
def test_the_greatest_class_is_that_of_all_products(body: str, shape: tuple[int, int]) -> None:
    """In torch's words: the first of those that are equal, for any number of states, none too."""
    arrays = _arrays()
    arrays["w"][250], arrays["b"][250] = arrays["w"][3], arrays["b"][3]
    model = _model(BODIES[body], arrays)
    plain, session = _opened(model), _inserted(model, arrays["w"])
    random = np.random.default_rng(1)
    for _ in range(20):
        x = random.standard_normal((*shape, 64)).astype(np.float32)
        x += arrays["w"][3] * random.integers(3)
        (found,), (expected,) = (each.run(None, {"x": x}) for each in (session, plain))
        assert found.shape == shape
        assert found.dtype == np.int64
        np.testing.assert_array_equal(found, expected)


@given(seed=st.integers(0, 2**32 - 1), near=st.floats(0, 0.05))
def test_classes_that_are_nearly_equal(seed: int, near: float) -> None:
    """Products in 8 bits do not tell them apart, the exact ones do."""
    random, weight = np.random.default_rng(seed), _arrays(seed)["w"]
    weight[:] = weight[0] + near * weight
    model = _model(BODIES["plain"], {"w": weight})
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(screening, "_LEAST", 1)
        session = _inserted(model, weight)
    x = random.standard_normal((4, 1, 64)).astype(np.float32)
    products = x.astype(np.float64) @ weight.T.astype(np.float64)
    first, second = np.sort(products, -1)[..., -1], np.sort(products, -1)[..., -2]
    sure = first - second > 1e-5 * np.abs(first)  # what float32 cannot tell, no head can
    np.testing.assert_array_equal(session.run(None, {"x": x})[0][sure], products.argmax(-1)[sure])


@pytest.mark.parametrize("body", OTHERS)
@pytest.mark.usefixtures("screened")
def test_other_heads_stay(body: str) -> None:
    assert not _heads(_model(OTHERS[body], _arrays()))[1]


def test_small_heads_stay() -> None:
    assert not _heads(_model(BODIES["plain"], _arrays()))[1]


@pytest.mark.parametrize("name", ["scales", "bounds"])
@pytest.mark.usefixtures("screened")
def test_a_product_outside_of_its_bounds_is_no_answer(name: str) -> None:
    """As on a machine whose kernel rounds in another way."""
    arrays = _arrays()
    known = screening.Screen.of(arrays["w"])
    wrong = {"scales": known.scales * np.float32(1.1), "bounds": known.bounds / 1000}
    session = _inserted(_model(BODIES["plain"], arrays), arrays["w"], **{name: wrong[name]})
    x = np.random.default_rng(1).standard_normal((1, 1, 64)).astype(np.float32)
    assert session.run(None, {"x": x})[0].tolist() == [[-1]]


@pytest.mark.parametrize("value", [np.nan, np.inf])
@pytest.mark.usefixtures("screened")
def test_a_state_that_is_no_number_has_no_answer(value: float) -> None:
    arrays = _arrays()
    session = _inserted(_model(BODIES["plain"], arrays), arrays["w"])
    x = np.random.default_rng(1).standard_normal((1, 1, 64)).astype(np.float32)
    x[..., 3] = value
    assert session.run(None, {"x": x})[0].tolist() == [[-1]]


def test_a_state_that_says_nothing_has_no_answer() -> None:
    """All classes may be the greatest: their exact products would take more than the whole head."""
    arrays = _arrays(classes=9000)
    session = _inserted(_model(BODIES["plain"], arrays), arrays["w"])
    x = np.zeros((1, 2, 64), np.float32)
    assert session.run(None, {"x": x})[0].tolist() == [[-1, -1]]
    assert session.run(None, {"x": x + 1})[0].min() >= 0


# The pass


def test_full_depth_has_it_without_any_exit(decoder: tiny.Captured) -> None:
    program = apply(decoder.program, TEXT)
    (full,) = program.exits
    assert (full.after, tuple(full.scores)) == (tiny.BLOCKS, (SCREENED,))
    tiny.assert_same(tiny.outputs(program.module, decoder.inputs), decoder.program.example_outputs, rtol=0, atol=0)
    assert apply(program, TEXT).graph.nodes.__len__() == program.graph.nodes.__len__()


def test_exits_have_it_too(decoder: tiny.Captured) -> None:
    program = apply(decoder.program, f"insert-exits,{TEXT}")
    (stack,) = partition(program).stacks
    returned, blocks = results(program.graph), dict(stack.blocks)
    assert [item.after for item in program.exits] == [1, 2, 3, tiny.BLOCKS]
    for item in program.exits:
        assert {returned[name] for name in item.scores.values()} <= set(blocks[item.after].outputs)
        assert not {returned[name] for name in item.outputs.values()} & set(blocks[item.after].nodes)


def test_refusals(encoder: tiny.Captured, decoder: tiny.Captured) -> None:
    with pytest.raises(SpecError, match="candidates and ids belong to measure=top1-short"):
        apply(decoder.program, f"insert-scores{{measure={SCREENED},candidates=5}}")
    with pytest.raises(SpecError, match="one product with a weight"):
        apply(_captured_of(Squared).program, TEXT)


class Squared(tiny.Talker):
    """Logits that are no product."""

    def forward(self, input_ids: Tensor) -> Tensor:  # type: ignore[override]
        made = super().forward(input_ids)
        return made @ made.transpose(-1, -2).softmax(-1) @ made


def _captured_of(make: Any) -> tiny.Captured:
    return tiny.captured(make, {"input_ids": tiny.ids()}, seed=4)


# Precision


@pytest.mark.parametrize("precision", ["fp32", "fp16", "int8", "int4", "auto"])
@pytest.mark.usefixtures("screened")
def test_bounds_hold_in_any_precision(tmp_path: Path, precision: str) -> None:
    """They stay in fp32; a file is called by what its other weights are. Products of 8 bits are not screened."""
    program = apply(_captured_of(tiny.Talker).program, f"{TEXT},insert-cache")
    path = tmp_path / "talker.offramp"
    save(program, path, precision, loss=10.0)
    chain = offramp.load(path)
    screening_ = [name for name, found in _operators(path).items() if "NonZero" in found]
    assert len(screening_) == (2 if precision in ("fp32", "fp16") else 0)  # the last part, and the whole
    for name in screening_:
        model = onnx.load(path / f"{name}.onnx", load_external_data=False)
        bounds = {item.name: item.data_type for item in model.graph.initializer if "_bounds" in item.name}
        assert list(bounds.values()) == [onnx.TensorProto.FLOAT]
        (reader,) = [node for node in model.graph.node if set(node.input) & set(bounds)]
        assert reader.op_type == "MatMul"
        assert {segment.encoding for segment in chain.manifest.segments.values()} <= {precision, "fp32"}
    assert _tails(chain, offramp.Never(), PROMPTS) == {False}
    assert len(_said(chain, offramp.Never(), PROMPTS)) == 2


MIXED = [("fp32", "int4", True), ("fp16", "int8", True), ("int4", "fp32", False)]


class Wordy(tiny.Talker):
    """As many words as a head in fewer bits confuses."""

    def __init__(self) -> None:
        super().__init__()
        self.words, self.head = nn.Embedding(300, tiny.WIDTH), nn.Linear(tiny.WIDTH, 300)


class Tied(Wordy):
    def __init__(self) -> None:
        super().__init__()
        self.head.weight = self.words.weight


@pytest.mark.parametrize("kind", [Wordy, pytest.param(Tied, marks=pytest.mark.slow)])
@pytest.mark.parametrize(("tail", "blocks", "large"), MIXED)
def test_a_head_has_the_precision_of_the_tail(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tail: str, blocks: str, kind: type[Wordy], large: bool
) -> None:
    """At full depth and at an exit, whatever the blocks have, tokens are those of the logits."""
    monkeypatch.setattr(screening, "_LEAST", 1 if large else 1 << 30)
    scores = f"insert-scores{{measure=top1-short,candidates=5}},{TEXT}"
    program = apply(_captured_of(kind).program, f"insert-exits{{after=2}},{scores},insert-cache")
    save(program, tmp_path / "m", {"*tail": tail, "*": blocks}, loss=10.0)
    chain = offramp.load(tmp_path / "m")
    assert {
        item.encoding for name, item in chain.manifest.segments.items() if name[:7] == "decoder" and "tail" not in name
    } == {blocks}
    prompts = [[at, 2 * at, 3] for at in range(1, 9)]
    for policy in (offramp.Never(), offramp.Confidence(0.0, measure="top1-short")):
        assert _tails(chain, policy, prompts[:1]) == {False}
        by_logits = _said(chain, policy, prompts, processors=(lambda tokens, logits: logits,))
        assert _said(chain, policy, prompts) == by_logits


@pytest.mark.usefixtures("screened")
def test_a_bias_of_half_the_bytes_is_that_of_the_logits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(quantize, "_LEAST", 1)
    save(apply(_captured_of(Wordy).program, f"{TEXT},insert-cache"), tmp_path / "m", "fp16", loss=10.0)
    for path in (tmp_path / "m").glob("*.onnx"):
        weights = onnx.load(path, load_external_data=False).graph.initializer
        whole = [item.name for item in weights if item.data_type == onnx.TensorProto.FLOAT]
        assert all("_scales" in name or "_bounds" in name for name in whole), whole


def test_a_screened_exit_with_a_head_and_an_adapter_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """They are one file, in whatever precision."""
    monkeypatch.setattr(screening, "_LEAST", 1)
    passes = f"insert-exits{{after=2,head=own}},insert-adapter{{kind=mlp}},{TEXT},insert-cache"
    save(apply(_captured_of(Wordy).program, passes), tmp_path / "m", {"*.2": "int8", "*": "fp32"}, loss=10.0)
    chain = offramp.load(tmp_path / "m")
    for policy in (offramp.Never(), offramp.Depth({"decoder": 2})):
        by_logits = _said(chain, policy, [[1, 2, 3]], processors=(lambda tokens, logits: logits,))
        assert _said(chain, policy, [[1, 2, 3]]) == by_logits


# Generation


@pytest.fixture(scope="module")
def talker(tmp_path_factory: pytest.TempPathFactory) -> tuple[Program, offramp.Chain]:
    """A talker that leaves after two blocks by top1-short, and a screened head there and at full depth."""
    scores = f"insert-scores{{measure=top1-short,candidates=5}},{TEXT}"
    scored = apply(_captured_of(tiny.Talker).program, f"insert-exits{{after=2}},{scores}")
    path = tmp_path_factory.mktemp("screened") / "talker.offramp"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(screening, "_LEAST", 1)
        save(apply(scored, "insert-cache"), path)
    assert sum("NonZero" in found for found in _operators(path).values()) == 3  # the exit's, full depth's, the whole's
    return scored, offramp.load(path)


PROMPTS = [[3, 1, 4], [5]]


def _said(chain: offramp.Chain, policy: offramp.Policy, prompts: list[list[int]], **options: Any) -> list[Any]:
    made = chain.generate({"input_ids": prompts}, policy, max_new_tokens=16, **options)
    return [row.tolist() for row in made.tokens]


def _tails(chain: offramp.Chain, policy: offramp.Policy, prompts: list[list[int]], **options: Any) -> set[bool]:
    steps = chain.stream({"input_ids": prompts}, policy, max_new_tokens=16, **options)
    return {any("tail" in ran.segment for ran in step.trace) for step in steps}


def test_greedy_generation_runs_no_other_head(talker: tuple[Program, offramp.Chain]) -> None:
    """For prompts, alone and in a batch, at full depth and early; the tokens are those of the logits."""
    scored, chain = talker
    for policy in (offramp.Never(), offramp.Confidence(0.5, measure="top1-short")):
        for prompts in ([PROMPTS[0]], PROMPTS):
            assert _tails(chain, policy, prompts) == {False}
            by_logits = _said(chain, policy, prompts, processors=(lambda tokens, logits: logits,))
            assert _said(chain, policy, prompts) == by_logits
    words = list(PROMPTS[0])
    for _ in range(16):
        words.append(int(tiny.outputs(scored.module, {"input_ids": torch.tensor([words])})["output"][0, -1].argmax()))
    assert _said(chain, offramp.Never(), PROMPTS[:1]) == [words[3:]]


def test_whoever_needs_logits_gets_them(talker: tuple[Program, offramp.Chain]) -> None:
    chain, never = talker[1], offramp.Never()
    as_they_are = (lambda tokens, logits: logits,)
    for options in ({"temperature": 1.0}, {"processors": as_they_are}):
        assert True in _tails(chain, never, PROMPTS[:1], **options)
    beams = _said(chain, never, PROMPTS, beams=2)
    assert beams == _said(chain, never, PROMPTS, beams=2, processors=as_they_are)
    said = _said(chain, never, PROMPTS[:1])[0]
    assert True in _tails(chain, never, PROMPTS[:1], suppress=said)
    assert not set(said) & set(_said(chain, never, PROMPTS[:1], suppress=said)[0])
    generator = chain.generator({"input_ids": PROMPTS[:1]}, never)
    (token,) = generator.next()
    generator.rewind(3)
    assert generator.logits()[0].argmax() == token.token == said[0]
    verify = offramp.Verify(2, 0.4, "top1-short", drafts=2)
    assert _said(chain, verify, PROMPTS) == _said(chain, never, PROMPTS)


def test_a_token_that_will_not_do_gets_its_logits_from_the_same_run(
    talker: tuple[Program, offramp.Chain], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("offramp.runtime.generation.session.CACHES", 0)  # token by token, as with large caches
    chain, never = talker[1], offramp.Never()
    first = _said(chain, never, [[5]])[0]
    steps = chain.stream({"input_ids": [[5]]}, never, max_new_tokens=4, suppress=first[:1])
    runs = [[ran.segment for ran in step.trace] for step in steps]
    assert ["decoder-whole", "tail"] in runs
    assert all(names.count("decoder-whole") == 1 for names in runs)


def test_exits_are_compared_with_it(talker: tuple[Program, offramp.Chain]) -> None:
    """FREE learns from full depth's tokens; no logits are made for it."""
    scored, chain = talker
    policy = Compared(2.0)
    steps = list(chain.stream({"input_ids": [[3, 1]]}, policy, max_new_tokens=25))
    assert not any("tail" in ran.segment for step in steps for ran in step.trace)
    text = torch.tensor([[3, 1, *(step.token for step in steps)]])
    made = tiny.outputs(scored.module, {"input_ids": text})
    early, deep = (made[item.scores[SCREENED]][0] for item in scored.exits)
    places = [slice(at - 2, at + 1) for at in range(4, 26, 3)]
    assert policy.agreed == [bool(same) for at in places for same in (early == deep)[at]]


def test_a_head_that_does_not_know_is_asked_by_logits(
    talker: tuple[Program, offramp.Chain], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where a product lies outside of its bounds (here there are none), the tail runs, and the tokens are the same."""
    monkeypatch.setattr(screening, "_LEAST", 1)
    path = tmp_path / "talker.offramp"
    save(apply(talker[0], "insert-cache"), path)
    models = [onnx.load(file, load_external_data=False) for file in path.glob("decoder*.onnx")]
    with (path / "weights.bin").open("r+b") as weights:
        for item in (item for model in models for item in model.graph.initializer if "_bounds" in item.name):
            place = {entry.key: int(entry.value) for entry in item.external_data if entry.key != "location"}
            weights.seek(place["offset"])
            weights.write(bytes(place["length"]))
    chain = offramp.load(path, verify=False)
    for policy in (offramp.Never(), offramp.Confidence(0.5, measure="top1-short"), Compared(2.0)):
        assert _tails(chain, policy, PROMPTS) == {True}
        assert _said(chain, policy, PROMPTS) == _said(talker[1], policy, PROMPTS)


def test_the_root_logger_stays_as_it_is() -> None:
    """ONNX Runtime's quantizer sets it when it is imported."""
    code = (
        "import logging, numpy; from offramp.export.quantize import packed_rows; "
        "packed_rows(numpy.ones((2, 32), 'f4')); print(logging.root.handlers, logging.root.level)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "[] 30\n"
