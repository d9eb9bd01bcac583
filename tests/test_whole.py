"""All parts of a stack in one file (`Stack.whole`), against the same bundle part by part."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx.parser
import onnx_ir as ir
import onnxruntime
import pytest
import tiny
from hypothesis import given
from hypothesis import strategies as st

import offramp
from offramp.bundle.json_text import from_json, to_json
from offramp.bundle.manifest import Part, Segment
from offramp.bundle.whole import divided
from offramp.errors import BundleError
from offramp.export import whole
from offramp.passes import apply
from offramp.runtime import Chain
from offramp.runtime.engine.sessions import session_options

EXITS = "insert-exits{after=1|2},insert-scores{measure=top1}"
SHORT = "insert-scores{measure=top1-short|prediction-short,ids=1|3|6|8}"
SCREENED = "insert-cache,insert-exits{stack=decoder,after=1},insert-scores{stack=decoder,measure=prediction-screened}"


def files_of(chain: Chain) -> set[str]:
    """The files that have sessions."""
    return set(chain._loader._sessions)


def by_parts(chain: Chain) -> Chain:
    return Chain(divided(chain.manifest), chain._root)


def ran(trace: Any) -> list[str]:
    return [item.segment for item in trace]


@pytest.fixture(scope="module")
def classifier(encoder: tiny.Captured, tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("whole") / "classifier"
    offramp.save(apply(encoder.program, EXITS), root)
    return root


@pytest.fixture(scope="module")
def generator(decoder: tiny.Captured, tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("whole") / "generator"
    offramp.save(apply(decoder.program, f"insert-cache,{EXITS},{SHORT}"), root)
    return root


@pytest.fixture(scope="module")
def translator(two_stacks: tiny.Captured, tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("whole") / "translator"
    offramp.save(apply(two_stacks.program, SCREENED), root)
    return root


def test_a_run_that_nobody_may_leave_is_one_session_s(classifier: Path) -> None:
    chain = offramp.load(classifier)
    inputs = {name: array.numpy() for name, array in tiny.text().items()}
    (stack,) = chain.manifest.stacks.values()
    full, early = chain.run(inputs), chain.run(inputs, offramp.Confidence(2.0))
    assert ran(full.trace) == ["encoder-whole"]
    assert "encoder-whole" not in ran(early.trace)
    assert {name for part in stack.parts for name in part.segments} < set(ran(early.trace))
    for name, array in full.outputs.items():
        np.testing.assert_allclose(array, early.outputs[name], rtol=1e-5, atol=1e-6)
    assert full.exits["encoder"].tolist() == early.exits["encoder"].tolist() == [stack.blocks] * tiny.ROWS


@given(st.lists(st.lists(st.integers(0, 8), min_size=1, max_size=6), min_size=1, max_size=3), st.booleans())
def test_generations_are_the_same(generator: Path, prompts: list[list[int]], beams: bool) -> None:
    chain = _loaded(generator)
    options: dict[str, Any] = {"max_new_tokens": 5, "beams": 2 if beams else 1}
    once, parts = (c.generate({"input_ids": prompts}, **options) for c in (chain, by_parts(chain)))
    assert [row.tolist() for row in once.tokens] == [row.tolist() for row in parts.tokens]
    assert [row.tolist() for row in once.exits] == [row.tolist() for row in parts.exits]


_chains: dict[Path, Chain] = {}


def _loaded(root: Path) -> Chain:
    return _chains.setdefault(root, offramp.load(root))


def test_nobody_is_asked_about_a_short_list(generator: Path) -> None:
    """A token of one may be taken at full depth where a policy says so: that runs by parts."""
    chain = offramp.load(generator)
    prompt = {"input_ids": [[3]]}
    looked_at = chain.stream(prompt, max_new_tokens=4, repetition_penalty=1.5)
    for steps, expected in (
        (looked_at, {"decoder-whole", "tail"}),
        (chain.stream(prompt, max_new_tokens=4), {"decoder-whole-steps"}),
    ):
        assert {name for step in steps for name in ran(step.trace)} == expected
    short = next(chain.stream(prompt, offramp.Confidence(0.0, measure="top1-short", thresholds={1: 2.0, 2: 2.0})))
    assert "decoder-whole" not in ran(short.trace)


def test_the_token_that_is_exact_is_full_depth_s(translator: Path) -> None:
    chain = offramp.load(translator)
    steps = list(chain.stream({name: array.numpy() for name, array in tiny.two_texts().items()}, max_new_tokens=4))
    decoding = [name for step in steps for name in ran(step.trace)]
    assert decoding.count("decoder-whole") == len(steps)
    assert decoding.count("tail") < len(steps)
    parts = by_parts(chain).stream({k: v.numpy() for k, v in tiny.two_texts().items()}, max_new_tokens=4)
    assert [step.token for step in steps] == [step.token for step in parts]


#: Each part calls a size ``n`` that is its own, here also of a value inside, as ONNX Runtime's quantizer leaves them.
PARTS = (
    """<ir_version: 10, opset_import: ["": 21]> part (float[n, 2] x) => (float[1, 2] total) <float[n, 2] h>
    { h = Neg(x) g = Exp(h) total = ReduceSum(g) }""",
    """<ir_version: 10, opset_import: ["": 21]> part (float[1, 2] total, int64[2] to) => (float[n, 2] y)
    <float[n, 2] h, float[n, 2] g> { h = Expand(total, to) g = Neg(h) y = Exp(g) }""",
)


def test_sizes_of_one_name_in_two_parts_are_two() -> None:
    parts = [
        (Segment("a", "", {"x": "x"}, {"total": "total"}), ir.from_proto(onnx.parser.parse_model(PARTS[0]))),
        (
            Segment("b", "", {"total": "total", "to": "to"}, {"y": "y"}),
            ir.from_proto(onnx.parser.parse_model(PARTS[1])),
        ),
    ]
    model = ir.to_proto(whole.joined(parts, ["y"]))
    session = onnxruntime.InferenceSession(model.SerializeToString(), session_options())
    (found,) = session.run(None, {"x": np.zeros((1, 2), np.float32), "to": np.array([5, 2])})
    np.testing.assert_allclose(found, np.full((5, 2), np.exp(-2)), rtol=1e-6)


def test_sessions_are_opened_for_what_runs(classifier: Path, encoder: tiny.Captured, tmp_path: Path) -> None:
    inputs = {name: array.numpy() for name, array in tiny.text().items()}
    chain = offramp.load(classifier)
    parts = {segment.file for segment in divided(chain.manifest).segments.values()}
    assert files_of(chain) == parts
    chain.run(inputs, offramp.Confidence(0.5))
    assert files_of(chain) == parts
    chain.run(inputs)
    assert files_of(chain) == parts | {"encoder-whole.onnx"}
    never = tmp_path / "never"
    offramp.save(apply(encoder.program, EXITS), never, policy={"name": "never"})
    plain = tmp_path / "plain"
    offramp.save(encoder.program, plain)
    for root in (never, plain):
        assert files_of(offramp.load(root)) == {"encoder-whole.onnx"}


def test_weights_lie_in_the_bundle_once(classifier: Path, encoder: tiny.Captured, tmp_path: Path) -> None:
    offramp.save(apply(encoder.program, EXITS), tmp_path / "one", segments=1)
    sizes = [(root / "weights.bin").stat().st_size for root in (classifier, tmp_path / "one")]
    assert sizes[0] == sizes[1]


def test_one_part_is_whole_already(decoder: tiny.Captured, tmp_path: Path) -> None:
    offramp.save(apply(decoder.program, "insert-cache"), tmp_path / "m", segments=1)
    assert offramp.load(tmp_path / "m").manifest.stacks["decoder"].whole is None


def test_a_model_captured_at_its_full_length_has_one(tmp_path: Path) -> None:
    program = offramp.capture(tiny.seeded(tiny.Short, 4), {"input_ids": tiny.ids(tiny.Short.ROOM)})
    offramp.save(apply(program, "insert-exits{after=2},insert-cache"), tmp_path / "m")
    manifest = offramp.load(tmp_path / "m").manifest
    assert manifest.cache is not None
    assert manifest.cache.limit == tiny.Short.ROOM
    assert manifest.stacks["decoder"].whole is not None


def test_parts_of_several_encodings_have_none(encoder: tiny.Captured, tmp_path: Path) -> None:
    program = apply(encoder.program, EXITS)
    offramp.save(program, tmp_path / "m", precision={"encoder.1": "int8"}, loss=1.0)
    assert offramp.load(tmp_path / "m").manifest.stacks["encoder"].whole is None
    offramp.save(program, tmp_path / "m", precision="int8", loss=1.0)
    manifest = offramp.load(tmp_path / "m").manifest
    assert manifest.segments["encoder-whole"].encoding == manifest.segments["encoder.1"].encoding != "fp32"


def test_large_stacks_that_may_be_left_have_none(
    encoder: tiny.Captured, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two packed copies of their weights would be in memory."""
    monkeypatch.setattr(whole, "LARGEST", 100)
    for passes, expected in ((EXITS, None), ("", Part(4, ("encoder-whole",), "encoder.4"))):
        offramp.save(apply(encoder.program, passes), tmp_path / "m")
        assert offramp.load(tmp_path / "m").manifest.stacks["encoder"].whole == expected


def test_what_differs_is_not_kept(
    encoder: tiny.Captured, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    answers = whole._answers

    def other(chain: Chain, inputs: Mapping[str, Any]) -> list[Any]:
        found = answers(chain, inputs)
        return [array * 1.01 for array in found] if "encoder-whole" in chain.manifest.segments else found

    monkeypatch.setattr(whole, "_answers", other)
    offramp.save(encoder.program, tmp_path / "m")
    assert offramp.load(tmp_path / "m").manifest.stacks["encoder"].whole is None
    assert not list((tmp_path / "m").glob("*whole*"))
    assert "do not give what they give one by one" in caplog.text


def test_files_that_are_gone_leave_the_parts(
    classifier: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    shutil.copytree(classifier, tmp_path / "m")
    chain = offramp.load(tmp_path / "m")
    shutil.rmtree(tmp_path / "m")
    inputs = {name: array.numpy() for name, array in tiny.text().items()}
    with caplog.at_level(logging.WARNING):
        assert "encoder-whole" not in ran(chain.run(inputs).trace)
    assert "full depth runs by parts" in caplog.text


def test_files_that_were_replaced_are_not_mixed_with_those_loaded(
    classifier: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    shutil.copytree(classifier, tmp_path / "m")
    chain, inputs = offramp.load(tmp_path / "m"), {name: array.numpy() for name, array in tiny.text().items()}
    (tmp_path / "m").rename(tmp_path / "old")
    shutil.copytree(
        tmp_path / "old", tmp_path / "m", copy_function=shutil.copy
    )  # written now, not when the others were
    with caplog.at_level(logging.WARNING):
        assert "encoder-whole" not in ran(chain.run(inputs).trace)
    assert "has gone or changed since the bundle was loaded: full depth runs by parts" in caplog.text


@pytest.mark.parametrize(
    ("part", "message"),
    [
        (Part(4, ("nowhere",), "encoder.4"), "there is no segment 'nowhere'"),
        (Part(4, ("tail",), "encoder.4"), "at full depth, as a whole"),
        (Part(4, ("encoder-whole", "tail"), "encoder.4"), "whole: it has to be one segment of all 4 blocks"),
        (Part(3, ("encoder-whole",), "encoder.4"), "whole: it has to be one segment of all 4 blocks"),
    ],
)
def test_a_whole_that_is_none_is_an_error(classifier: Path, part: Part, message: str) -> None:
    manifest = offramp.load(classifier).manifest
    stack = replace(manifest.stacks["encoder"], whole=part)
    with pytest.raises(BundleError, match=message):
        from_json(to_json(replace(manifest, stacks={"encoder": stack})))
