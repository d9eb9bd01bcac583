"""Bundles that are incomplete, altered or malicious: each is refused with its own message."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
from pathlib import Path
from typing import Any

import bundles
import numpy as np
import onnx
import pytest

import offramp
from offramp.bundle import directory
from offramp.bundle.manifest import MANIFEST_FILE
from offramp.errors import BundleError
from offramp.runtime import chain


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return bundles.classifier(tmp_path_factory.mktemp("bundle") / "b")


@pytest.fixture
def root(whole: Path, tmp_path: Path) -> Path:
    shutil.copytree(whole, tmp_path / "b")
    return tmp_path / "b"


def _change(root: Path, change: Any, *, listed: bool = False) -> None:
    data = json.loads((root / MANIFEST_FILE).read_text())
    change(data)
    if listed:
        data["files"] = {name: dataclasses.asdict(file) for name, file in bundles.listed(root).items()}
    (root / MANIFEST_FILE).write_text(json.dumps(data))


def _refused(root: Path, *, verify: bool = True) -> str:
    with pytest.raises(BundleError) as caught:
        offramp.load(root, verify=verify)
    return str(caught.value)


def test_a_whole_bundle_is_read(root: Path) -> None:
    (root / "notes.txt").write_text("not listed, not looked at")
    (root / "link").symlink_to("/")
    manifest, found = directory.read(root)
    assert (manifest.model, found) == ("tiny", root.resolve())


def test_the_directory_itself_may_be_a_link(root: Path, tmp_path: Path) -> None:
    (tmp_path / "alias").symlink_to(root, target_is_directory=True)
    assert directory.read(str(tmp_path / "alias"))[1] == root.resolve()


def test_no_bundle(tmp_path: Path, root: Path) -> None:
    assert "is not a directory" in _refused(tmp_path / "nothing")
    assert "is not a directory" in _refused(root / "tail.onnx")
    nothing: Any = None
    assert "a NoneType is no path of a bundle" in _refused(nothing)
    (tmp_path / "empty").mkdir()
    assert "manifest.json is missing" in _refused(tmp_path / "empty")


def test_manifest_of_other_encodings_or_kinds(root: Path) -> None:
    (root / MANIFEST_FILE).write_bytes(b'{"format": "\xff"}')
    assert "not UTF-8" in _refused(root)
    (root / MANIFEST_FILE).unlink()
    (root / MANIFEST_FILE).mkdir()
    assert "manifest.json is not a file" in _refused(root)


def test_a_missing_file(root: Path) -> None:
    (root / "tail.onnx").unlink()
    (root / "block1.onnx").unlink()
    text = _refused(root)
    assert "tail.onnx is missing" in text
    assert "block1.onnx is missing" in text


def test_a_truncated_file(root: Path) -> None:
    data = (root / "weights.bin").read_bytes()
    (root / "weights.bin").write_bytes(data[:-4])
    expected = f"weights.bin is truncated: it has {len(data) - 4} bytes, the manifest says {len(data)}"
    assert expected in _refused(root, verify=False)
    (root / "weights.bin").write_bytes(data + b"....")
    assert "weights.bin is too long" in _refused(root)


def test_an_altered_file(root: Path) -> None:
    data = bytearray((root / "weights.bin").read_bytes())
    data[5] ^= 1
    (root / "weights.bin").write_bytes(data)
    assert "weights.bin was altered: sha256" in _refused(root)
    offramp.load(root, verify=False)


@pytest.mark.parametrize("opens", [True, False])
def test_an_altered_file_of_many_weights(root: Path, monkeypatch: pytest.MonkeyPatch, opens: bool) -> None:
    """They are verified while sessions open, and whatever goes wrong there, the file is what is named."""
    monkeypatch.setattr(chain, "_LARGE", 1)
    offramp.load(root)
    data = bytearray((root / "weights.bin").read_bytes())
    data[5] ^= 1
    (root / "weights.bin").write_bytes(data)
    threads = None if opens else 0
    with pytest.raises(BundleError, match=r"weights\.bin was altered: sha256"):
        offramp.load(root, threads=threads)


@pytest.mark.parametrize(
    "name",
    [
        "../outside",
        "/etc/passwd",
        "a/../../outside",
        "./tail.onnx",
        "a//b",
        "",
        ".",
        "..",
        "C:/x",
        "a\\b",
        "nul\0",
    ],
)
def test_unsafe_names(root: Path, name: str) -> None:
    (root.parent / "outside").write_bytes(b"")
    _change(root, lambda data: data["files"].update({name: {"bytes": 0, "sha256": "0"}}))
    assert f"unsafe file name {name!r}" in _refused(root)


def test_links(root: Path, tmp_path: Path) -> None:
    shutil.move(root / "tail.onnx", tmp_path / "tail.onnx")
    (root / "tail.onnx").symlink_to(tmp_path / "tail.onnx")
    assert "tail.onnx is a link" in _refused(root)
    (root / "tail.onnx").unlink()
    shutil.move(tmp_path / "tail.onnx", root / "tail.onnx")
    shutil.move(root / MANIFEST_FILE, tmp_path / "m.json")
    (root / MANIFEST_FILE).symlink_to("../m.json")
    assert "manifest.json is a link" in _refused(root)


def test_folders_are_fine_and_linked_folders_are_not(root: Path, tmp_path: Path) -> None:
    (root / "tokenizer").mkdir()
    (root / "tokenizer/vocab").write_bytes(b"")
    empty = {"bytes": 0, "sha256": "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855"}
    _change(root, lambda data: data["files"].update({"tokenizer/vocab": empty}))
    directory.read(root)
    shutil.move(root / "tokenizer", tmp_path / "tokenizer")
    (root / "tokenizer").symlink_to(tmp_path / "tokenizer", target_is_directory=True)
    assert "tokenizer is a link" in _refused(root)
    (root / "tokenizer").unlink()
    (root / "tokenizer").write_bytes(b"")
    assert "tokenizer is not a folder" in _refused(root)
    (root / "tokenizer").unlink()
    os.mkfifo(root / "tokenizer")
    _change(root, lambda data: data["files"].update({"tokenizer": empty}))
    assert "tokenizer is not a file" in _refused(root)


@pytest.mark.parametrize("location", ["../outside", "{outside}", "link", "folder/outside"])
def test_weights_outside_of_the_bundle(root: Path, location: str) -> None:
    outside = root.parent / "outside"
    shutil.copy(root / "weights.bin", outside)
    (root / "link").symlink_to("../outside")
    (root / "folder").symlink_to("..", target_is_directory=True)
    model = onnx.load(root / "block2.onnx", load_external_data=False)
    for initializer in model.graph.initializer:
        for entry in initializer.external_data:
            if entry.key == "location":
                entry.value = location.format(outside=outside)
    (root / "block2.onnx").write_bytes(model.SerializeToString())
    file = dataclasses.asdict(bundles.listed_file(root / "block2.onnx"))
    _change(root, lambda data: data["files"].update({"block2.onnx": file}))
    assert "cannot load block2.onnx" in _refused(root)


def test_files_that_are_no_models(root: Path) -> None:
    (root / "tail.onnx").write_bytes(b"no model")
    _change(root, lambda data: None, listed=True)
    assert "cannot load tail.onnx" in _refused(root)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda s: s["inputs"].pop("hidden"),
            "segment 'exit1.tail' (tail.onnx) does not bind the input 'hidden'",
        ),
        (
            lambda s: s["inputs"].update(more="hidden1"),
            "segment 'exit1.tail' (tail.onnx) has no input 'more'",
        ),
        (
            lambda s: s["outputs"].update(LOGITS=s["outputs"].pop("logits")),
            "(tail.onnx) has no output 'LOGITS'",
        ),
        (
            lambda s: s["outputs"].update(top1=s["outputs"].pop("prediction"), prediction=s["outputs"].pop("top1")),
            "output 'top1' is tensor(float), but its value is tensor(int64)",
        ),
    ],
)
def test_bindings_that_do_not_fit_the_file(root: Path, change: Any, message: str) -> None:
    _change(root, lambda data: change(data["segments"]["exit1.tail"]))
    assert message in _refused(root)


def test_a_policy_that_does_not_fit(root: Path) -> None:
    for policy, message in [
        ({"name": "luck"}, "no policy 'luck'"),
        ({"name": "depth", "depth": 3}, "has no exit after 3"),
        ({"name": "confidence", "threshold": "high"}, "cannot have the options"),
    ]:
        _change(root, lambda data, policy=policy: data.update(policy=policy))
        with pytest.raises(offramp.OfframpError, match=message):
            offramp.load(root)


def test_weights_are_where_they_belong(root: Path) -> None:
    ids = np.zeros((2, 3), np.int64)
    found = offramp.load(root).run({"ids": ids}).outputs["logits"]
    np.testing.assert_allclose(found, bundles.expected(ids, 4), atol=1e-4)
