"""The manifest: text and back, what its reader refuses, and its JSON Schema."""

from __future__ import annotations

import copy
import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import bundles
import jsonschema
import numpy as np
import pytest

from offramp.bundle import manifest as m
from offramp.bundle import preprocessing
from offramp.bundle.json_text import from_json, section, to_json
from offramp.errors import BundleError

SCHEMA = json.loads((Path(__file__).resolve().parents[1] / "docs/manifest.schema.json").read_text())


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    root = bundles.classifier(tmp_path_factory.mktemp("bundle") / "b", adapters=True, policy={"name": "never"})
    found: dict[str, Any] = json.loads((root / m.MANIFEST_FILE).read_text())
    return found


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    root = bundles.translator(tmp_path_factory.mktemp("bundle") / "b")
    found: dict[str, Any] = json.loads((root / m.MANIFEST_FILE).read_text())
    return found


def test_text_and_back(data: dict[str, Any], two: dict[str, Any]) -> None:
    for one in (data, two):
        manifest = from_json(json.dumps(one))
        assert from_json(to_json(manifest)) == manifest
        assert json.loads(to_json(manifest)) == one
    assert isinstance(manifest.stages, tuple)
    assert manifest.values["hidden1"] == m.Value("float32", ("batch", "tokens", 8))


def test_the_schema_describes_the_dataclasses(data: dict[str, Any], two: dict[str, Any]) -> None:
    for one in (data, two):
        jsonschema.validate(one, SCHEMA)
    described = {"value": m.Value, "segment": m.Segment, "exit": m.Exit, "part": m.Part, "stack": m.Stack}
    described |= {
        "stage": m.Stage,
        "file": m.File,
        "cache": m.Cache,
        "implied": m.Implied,
        "learners": m.Learners,
        "placeholder": m.Placeholder,
        "prompt": m.Prompt,
        "generation": m.Generation,
        "preprocessing": preprocessing.Preprocessing,
    }
    described |= {"text": preprocessing.Text, "audio": preprocessing.Audio, "image": preprocessing.Image}
    described |= {"image_text": preprocessing.ImageText, "marked": preprocessing.Marked}
    for schema, kind in [
        (SCHEMA, m.Manifest),
        *((SCHEMA["$defs"][name], kind) for name, kind in described.items()),
    ]:
        fields = dataclasses.fields(kind)
        assert set(schema["properties"]) == {field.name for field in fields}
        needed = {
            f.name for f in fields if dataclasses.MISSING is f.default and dataclasses.MISSING is f.default_factory
        }
        if kind is m.Manifest:
            needed |= {"format", "version"}
        assert set(schema.get("required", ())) == needed
    assert SCHEMA["properties"]["version"]["const"] == m.VERSION
    assert set(SCHEMA["$defs"]["value"]["properties"]["dtype"]["enum"]) == set(m.DTYPES)


def _set(path: str, item: object) -> Callable[[dict[str, Any]], None]:
    def change(data: dict[str, Any]) -> None:
        *way, last = [int(key) if key.isdecimal() else key for key in path.split("/")]
        for key in way:
            data = data[key]  # type: ignore[index]
        if item is ...:
            del data[last]  # type: ignore[arg-type]
        else:
            data[last] = item  # type: ignore[index]

    return change


MISTYPED = [
    ("model", 3, "model: expected a text, found 3"),
    ("model", ..., "model: missing"),
    ("batch", ..., "batch: missing"),
    ("colour", 1, "colour: unknown field"),
    ("inputs", "ids", 'inputs: expected a list, found "ids"'),
    ("inputs/0", None, "inputs[0]: expected a text, found null"),
    ("axes/batch", [1], "axes.batch: expected 2 items, found 1"),
    ("axes/batch", [1, "x"], 'axes.batch[1]: expected a whole number, found "x"'),
    ("ids", {"ids": [0]}, "ids.ids: expected 2 items, found 1"),
    ("ids", {"ids": [0, None]}, "ids.ids[1]: expected a whole number, found null"),
    ("values/ids", [], "values.ids: expected an object, found []"),
    ("values/ids/shape/0", 1.5, "values.ids.shape[0]: expected a whole number, found 1.5"),
    ("values/ids/shape/0", True, "values.ids.shape[0]: expected a whole number, found true"),
    (
        "stacks/encoder/exits/1/after",
        "2",
        'stacks.encoder.exits[1].after: expected a whole number, found "2"',
    ),
    ("stacks/encoder/parts/0/segments", ..., "stacks.encoder.parts[0].segments: missing"),
    ("generation/colour", 1, "generation.colour: unknown field"),
    ("generation/stop", 2, "generation.stop: expected a list, found 2"),
    ("generation/bad_words", [[1, "a"]], 'generation.bad_words[0][1]: expected a whole number, found "a"'),
    ("generation/early_stopping", 3, "generation.early_stopping: expected true or false, found 3"),
    ("preprocessing/audio", [], "preprocessing.audio: expected an object, found []"),
    ("preprocessing/text", {"pad": "x"}, 'preprocessing.text.pad: expected a whole number, found "x"'),
    ("preprocessing/image", {"bgr": 1}, "preprocessing.image.bgr: expected true or false, found 1"),
    ("labels", {"logits": "no"}, 'labels.logits: expected a list, found "no"'),
    ("files/tail.onnx/bytes", None, "files.tail.onnx.bytes: expected a whole number, found null"),
]


@pytest.mark.parametrize(("path", "item", "message"), MISTYPED)
def test_missing_and_mistyped_fields_are_named(data: dict[str, Any], path: str, item: Any, message: str) -> None:
    changed = copy.deepcopy(data)
    _set(path, item)(changed)
    with pytest.raises(BundleError) as caught:
        from_json(json.dumps(changed))
    assert message in str(caught.value)
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(changed, SCHEMA)


def test_all_problems_come_together(data: dict[str, Any]) -> None:
    changed = copy.deepcopy(data)
    for path, item, _ in MISTYPED[:2] + MISTYPED[4:5]:
        _set(path, item)(changed)
    with pytest.raises(BundleError) as caught:
        from_json(json.dumps(changed))
    assert len(str(caught.value).splitlines()) == 3
    assert "inputs" in str(caught.value)


NONSENSE = [
    ({"stop": [-1]}, r"generation.stop is \(-1,\), expected a tuple of token ids"),
    ({"top_p": 1.5, "beams": 0}, r"(?s)generation.top_p is 1.5.*generation.beams is 0, expected at least 1"),
    ({"early_stopping": "sometimes"}, 'expected True, False or "never"'),
    ({"eos_token_id": 2}, r"(?s)generation.eos_token_id: unknown field.*generation has the keys prompt, stop, "),
    ({"stop": "ab"}, 'generation.stop: expected a list, found "ab"'),
    ({"max_length": {2}}, r"generation.max_length: expected a whole number, found "),
    ([2], r"generation: expected a mapping, found \[2\]"),
]


@pytest.mark.parametrize(("given", "said"), NONSENSE)
def test_generation_of_a_user(given: Any, said: str) -> None:
    with pytest.raises(BundleError, match=said):
        section(m.Generation, given)


def test_generation_takes_tuples_arrays_and_numbers_of_numpy() -> None:
    given = {"stop": np.array([1, 2]), "bad_words": ((3,), [4, 5]), "max_length": np.int64(9), "early_stopping": False}
    found = section(m.Generation, given)
    assert found == m.Generation(stop=(1, 2), bad_words=((3,), (4, 5)), max_length=9, early_stopping=False)
    assert section(preprocessing.Preprocessing, {"audio": {"rate": np.int32(8)}}).audio == preprocessing.Audio(rate=8)


EXIT1 = "stacks/encoder/exits/0"
CONTRADICTIONS = [
    ("generation/min_p", 2, "generation.min_p is 2, expected from 0 to 1"),
    ("axes/tokens", [5, 4], "axes.tokens: a range from 5 to 4 holds nothing"),
    ("ids", {"words": [0, 10]}, "ids.words: there is no such input"),
    ("ids", {"ids": [5, 4]}, "ids.ids: numbers from 5 to 4"),
    ("ids", {"ids": [0, 2**63]}, f"ids.ids: numbers from 0 to {2**63}"),
    ("batch", "rows", "batch: there is no axis 'rows'"),
    ("values/ids", {"dtype": "int64", "shape": [1, "tokens"]}, "batch: no input has rows"),
    ("values/ids/dtype", "bfloat16", "values.ids.dtype: 'bfloat16' is none of"),
    ("values/ids/shape/1", "words", "values.ids.shape: no such axes: words"),
    ("values/ids/shape/1", "tokens**2", "values.ids.shape: 'tokens ** 2' is not made of axes"),
    ("values/ids/shape/1", "__import__('os')", "values.ids.shape: \"__import__('os')\" is not made of axes"),
    ("values/ids/shape/1", "(" * 90 + "tokens", "is not an expression"),
    ("values/hidden0/shape/0", "batch + 1", "values.hidden0.shape: rows of 'batch' cannot be told apart in"),
    ("values/hidden0/shape/1", "batch", "values.hidden0.shape: rows of 'batch' cannot be told apart in"),
    ("values/hidden0/shape/0", "batch // 0", "values.hidden0.shape: rows of 'batch' cannot be told apart in"),
    ("values/hidden2", ..., "values.hidden2: missing, but segment 'block2' makes it"),
    ("segments/block1/name", "block", "segments.block1.name: is 'block'"),
    ("segments/block1/encoding", "int3", "segments.block1.encoding: 'int3' is none of fp32"),
    ("segments/block1/file", "x.onnx", "segments.block1.file: 'x.onnx' is not in files"),
    ("segments/block1/inputs/hidden", "hidden3", "segments.block1.inputs: 'hidden3' is not made before"),
    ("segments/block1/inputs/hidden", "nothing", "segments.block1.inputs: 'nothing' is no value"),
    (
        "segments/block2/outputs/out",
        "hidden1",
        "values.hidden1: made by segment 'block1' and by segment 'block2'",
    ),
    ("segments/block2/inputs/hidden", "adapted1", "'adapted1' is not made before, where it is seen"),
    ("inputs", ["ids", "ids"], "values.ids: made by the inputs and by the inputs"),
    ("outputs/logits", "logits2", "outputs.logits: is not 'logits4'"),
    ("take", {"float32": "take0.onnx"}, "take.float32: a key looks like"),
    ("take", {"float32/0": "x.onnx"}, "take.float32/0: 'x.onnx' is not in files"),
    ("stages/0", {}, "stages[0]: has to name either a segment or a stack"),
    ("stages/0", {"segment": "x"}, "stages[0].segment: there is no segment 'x'"),
    ("stages/1", {"stack": "x"}, "stages[1].stack: there is no stack 'x'"),
    ("stages/1", {"segment": "block1"}, "stacks.encoder: no stage runs it"),
    ("stages/0", {"segment": "block1"}, "segments.block1: runs at two places"),
    ("stacks/encoder/parts/0/segments", ["x"], "stacks.encoder: there is no segment 'x'"),
    ("stacks/encoder/parts/1/depth", 1, "stacks.encoder.parts: depths have to increase, found [1, 1, 3, 4]"),
    ("stacks/encoder/blocks", 5, "stacks.encoder.parts: the last depth is 4, the stack has 5 blocks"),
    ("stacks/encoder/exits", [], "stacks.encoder.exits: depths have to increase, found []"),
    ("stacks/encoder/parts/0/depth", 0, "stacks.encoder.exits: no part ends at depth 1"),
    ("stacks/encoder/input", "hidden1", "stacks.encoder.input: 'hidden1' is not made before"),
    ("stacks/encoder/output", "hidden2", "stacks.encoder.output: 'hidden2' is not 'hidden4'"),
    (f"{EXIT1}/state", "hidden2", "exit after 1, state: 'hidden2' is not made before"),
    (f"{EXIT1}/outputs", {}, "exit after 1: has no outputs"),
    (f"{EXIT1}/outputs", {"other": "logits1"}, "stacks.encoder.exits: their outputs differ"),
    (f"{EXIT1}/outputs/logits", "top11", "'top11' and 'logits4' differ in dtype, rank or place of rows"),
    (f"{EXIT1}/scores/top1", "logits1", "score top1: 'logits1' is neither [batch] nor with tokens"),
    (f"{EXIT1}/scores/top1", "prediction1", "score top1: 'prediction1' is int64, expected float32"),
    (f"{EXIT1}/scores/top1", "top12", "scores: 'top12' is not made before"),
]


@pytest.mark.parametrize(("path", "item", "message"), CONTRADICTIONS)
def test_contradictions_are_named(data: dict[str, Any], path: str, item: Any, message: str) -> None:
    changed = copy.deepcopy(data)
    _set(path, item)(changed)
    with pytest.raises(BundleError) as caught:
        from_json(json.dumps(changed))
    assert message in str(caught.value)


def test_floats_are_looked_up_in_no_table(data: dict[str, Any]) -> None:
    changed = copy.deepcopy(data)
    _set("ids", {"ids": [0, 10]})(changed)
    assert from_json(json.dumps(changed)).ids == {"ids": (0, 10)}
    _set("values/ids/dtype", "float32")(changed)
    with pytest.raises(BundleError, match=r"ids\.ids: 'ids' is float32, which is looked up in no table"):
        from_json(json.dumps(changed))


def test_what_a_stack_makes_inside_is_not_seen_by_later_stages(two: dict[str, Any]) -> None:
    changed = copy.deepcopy(two)
    _set("segments/bridge/inputs/hidden", "hidden2")(changed)
    with pytest.raises(BundleError, match="'hidden2' is not made before, where it is seen"):
        from_json(json.dumps(changed))
    changed = copy.deepcopy(two)
    _set("stacks/encoder/exits/0/outputs", {"logits": "adapted1"})(changed)
    with pytest.raises(BundleError, match="has outputs, but other stages follow"):
        from_json(json.dumps(changed))


def test_other_texts_are_refused(data: dict[str, Any]) -> None:
    with pytest.raises(BundleError, match="is not JSON"):
        from_json("{")
    with pytest.raises(BundleError, match="is not JSON"):
        from_json("[" * 100_000)
    for text in ("[]", '{"format": "other"}', "null"):
        with pytest.raises(BundleError, match="is not one of offramp"):
            from_json(text)
    with pytest.raises(BundleError, match=rf"format version {m.VERSION + 1}.*(\n.*)*pip install --upgrade offramp"):
        from_json(json.dumps(data | {"version": m.VERSION + 1, "news": 1}))
    with pytest.raises(BundleError, match=rf"format version {m.VERSION - 1}.*(\n.*)*export the model again"):
        from_json(json.dumps(data | {"version": m.VERSION - 1}))
