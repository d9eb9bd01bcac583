"""``offramp calibrate`` and ``offramp report``: files of examples in, a manifest, tables, JSON and a figure out."""

from __future__ import annotations

import builtins
import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import bundles
import numpy as np
import pytest
from test_cli import reading_bundle, refused, run
from test_packaging import run_without_torch

import offramp
from offramp.cli import _data
from offramp.errors import InputError
from offramp.runtime import Never

WORDS = ("w5", "w6", "w7", "w8", "w9")


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return bundles.classifier(tmp_path_factory.mktemp("cli") / "tiny.offramp")


@pytest.fixture
def arrays(tmp_path: Path) -> Path:
    ids = np.random.default_rng(0).integers(0, bundles.WORDS, (400, 3))
    np.savez(tmp_path / "data.npz", ids=ids, labels=bundles.expected(ids, 4).argmax(1))
    return tmp_path / "data.npz"


def sentences(count: int) -> list[str]:
    return [" ".join(row) for row in np.random.default_rng(0).choice(WORDS, (count, 3))]


# calibrate


def test_calibrate(bundle: Path, arrays: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shown = run(capsys, "calibrate", bundle, "--data", arrays, "--keep", "0.5", "--confidence", "0.9", "--seed", "1")
    chain = offramp.load(bundle)
    record = chain.manifest.calibration
    assert record
    assert (record["keep"], record["confidence"], record["seed"], record["examples"]) == (0.5, 0.9, 1, 400)
    assert shown.startswith(f"policy   {chain.policy}\n")
    assert "\nafter  " in shown
    if record["reason"] is None:  # how long its segments take is the machine's affair
        assert "280 test examples; at least 0.5 of it with confidence 0.9 (p = " in shown
    else:
        assert f"because  {record['reason']}" in shown


def test_calibrate_says_why_it_never_leaves(bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    np.savez(tmp_path / "few.npz", ids=np.zeros((10, 3), np.int64))
    shown = run(capsys, "calibrate", bundle, "--data", tmp_path / "few.npz")
    assert shown.startswith("policy   Never()\nbecause  10 examples are too few: keep=0.99 ")
    assert offramp.load(bundle).policy == Never()


def test_calibrate_on_text_without_torch(tmp_path: Path) -> None:
    root = reading_bundle(tmp_path / "reading.offramp")
    (tmp_path / "data.tsv").write_text("sentence\tlabel\n" + "".join(f"{text}\t1\n" for text in sentences(120)))
    argv = ["calibrate", str(root), "--data", str(tmp_path / "data.tsv"), "--keep", "0.5"]
    finished = run_without_torch(
        f"from offramp.cli import main\nassert main({argv!r}) == 0\nassert 'torch' not in sys.modules"
    )
    assert finished.returncode == 0, finished.stderr
    record = offramp.load(root).manifest.calibration
    assert record
    assert (record["examples"], record["quality"]) == (120, "default against labels")


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (("--data", "gone.npz"), "data gone.npz cannot be read"),
        (("--data", "data.csv"), "data data.csv: there are .npz, .tsv, .txt, .jsonl"),
        (("--data", "DATA", "--keep", "2"), "keep=2.0, confidence=0.95: both are between 0 and 1"),
        (("--data", "DATA", "--measure", "luck"), "has the score 'luck'"),
        (("--data", "DATA", "--stack", "decoder"), "'decoder' is no stack"),
        (("--data", "DATA", "--max-new-tokens", "3"), "does not generate"),
    ],
)
def test_calibrate_refuses(
    argv: tuple[str, ...], said: str, bundle: Path, arrays: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    extra = ["--keep", "0.5"] if "--keep" not in argv else []
    assert said in refused(capsys, "calibrate", bundle, *(item.replace("DATA", str(arrays)) for item in argv), *extra)


# report


def test_report_refuses_what_calibrate_refuses(bundle: Path, arrays: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "does not generate" in refused(capsys, "report", bundle, "--data", arrays, "--max-new-tokens", "3")


def test_report(bundle: Path, arrays: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("matplotlib")
    shown = run(capsys, "report", bundle, "--data", arrays, "--figure", tmp_path / "frontier.png")
    sentence, frontier, costs = shown.split("\n\n")
    assert sentence.partition(":")[0] in ("yes", "no", "not with these gates")
    lines = frontier.splitlines()
    assert lines[0].split("  ")[0] == "policy"
    assert lines[1].startswith("full depth ")
    assert lines[-1].startswith("a perfect gate (reckoned) ")
    assert [line.split("  ")[0] for line in costs.splitlines()[1:4]] == ["1 of 4", "2 of 4", "4 of 4"]
    assert costs.splitlines()[-1].startswith("around the stack ")
    assert (tmp_path / "frontier.png").read_bytes().startswith(b"\x89PNG")


def test_report_as_json(bundle: Path, arrays: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (line,) = run(capsys, "report", bundle, "--data", arrays, "--json").splitlines()
    found = json.loads(line)
    assert {"verdict", "full", "frontier", "oracle", "depths", "segments"} <= set(found)
    assert found["full"]["quality"] == 1.0


def test_report_without_examples(bundle: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shown = run(capsys, "report", bundle)
    assert shown.startswith("cannot say without examples: leaving after ")
    assert "saves at most" in shown


def test_figures_need_examples_matplotlib_and_a_place(
    bundle: Path, arrays: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert "examples are needed" in refused(capsys, "report", bundle, "--figure", "x.png")
    argv = ("report", bundle, "--data", arrays, "--figure")
    pytest.importorskip("matplotlib")
    assert "cannot be written" in refused(capsys, *argv, "gone/x.png")
    real = builtins.__import__

    def without(name: str, *args: Any, **kwargs: Any) -> Any:
        if name.partition(".")[0] == "matplotlib":
            raise ModuleNotFoundError("No module named 'matplotlib'", name="matplotlib")
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    assert "--figure needs matplotlib, which is not installed\n  try: pip install matplotlib" in refused(
        capsys, *argv, "x.png"
    )


# Files


def test_text_files(tmp_path: Path) -> None:
    root = reading_bundle(tmp_path / "reading.offramp")
    chain = offramp.load(root)
    contents = {
        "a.txt": "w5 w6\n\nw7\n",
        "b.txt": "\ufefftext\r\nw5\x0cw6\r\nw7\n",
        "a.tsv": "text\tlabel\nw5 w6\t1\nw7\t0\n",
        "b.tsv": "w5 w6\nw7\n",
        "a.jsonl": '{"text": "w5 w6", "label": 1}\n{"input_ids": [7], "text": null}\n',
        "b.jsonl": '{"text": "w5\u2028w6"}\n{"text": "w7"}\n',
    }
    for name, content in contents.items():
        (tmp_path / name).write_text(content, encoding="utf-8", newline="")
        found = _data.read(chain, root, tmp_path / name)
        assert [np.asarray(row["input_ids"]).tolist() for row in found] == [[[5, 6]], [[7]]], name
    assert [row["labels"][0] for row in _data.read(chain, root, tmp_path / "a.tsv")] == [1, 0]
    assert [row.get("labels") for row in _data.read(chain, root, tmp_path / "a.jsonl")] == [[1], None]
    named: Any = SimpleNamespace(manifest=replace(chain.manifest, labels={"logits": ("bad", "good")}), generates=None)
    assert [_data._label(named, name, None).item() for name in ("good", "bad", "1")] == [1, 0, 1]


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("a.tsv", "one\t1\t2\n", "line 1 has 3 columns"),
        ("a.tsv", "w5\tgood\n", "label 'good' is no class id"),
        ("a.jsonl", '{"text": "w5", "label": 0.7}\n', "label 0.7 is no class id"),
        ("a.jsonl", '{"text": "w5", "label": [0.1, 0.9]}\n', "label .0.1, 0.9. is no class id"),
        ("a.jsonl", '{"text": ["w5", "w6"]}\n', "text is .'w5', 'w6'., expected a text"),
        ("a.jsonl", "[1]\n", "line 1 is no object"),
        ("a.jsonl", "{\n", "cannot be read"),
        ("a.jsonl", "\n", "a.jsonl has no examples"),
        ("a.tsv", "sentence\tlabel\n", "a.tsv has no examples"),
        ("a.jsonl", '{"audio": "a.wav"}\n', "does not turn sound into inputs"),
        ("a.jsonl", '{"image": "a.png"}\n', "does not turn images into inputs"),
        ("a.npz", "no zip", "cannot be read"),
    ],
)
def test_files_that_cannot_be_read(name: str, content: str, said: str, tmp_path: Path) -> None:
    root = reading_bundle(tmp_path / "reading.offramp")
    (tmp_path / name).write_text(content)
    with pytest.raises(InputError, match=said):
        _data.read(offramp.load(root), root, tmp_path / name)


def test_text_needs_a_tokenizer(bundle: Path, tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("w5\n")
    with pytest.raises(InputError, match=r"has no tokenizer.json"):
        _data.read(offramp.load(bundle), bundle, tmp_path / "a.txt")


def test_the_others_of_a_stack_that_is_named(bundle: Path, arrays: Path, capsys: pytest.CaptureFixture[str]) -> None:
    said = refused(capsys, "calibrate", bundle, "--data", arrays, "--others", "own")
    assert "--others own: the others of which stack?" in said
    run(capsys, "calibrate", bundle, "--data", arrays, "--keep", "0.5", "--stack", "encoder", "--others", "own")
    record = offramp.load(bundle).manifest.calibration
    assert record
    assert "others" not in record
