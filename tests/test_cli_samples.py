"""``offramp export --samples``: what a file says becomes inputs with all tokens that a model reads and writes."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import tiny
from test_cli import models, refused, run
from test_cli_generate import END, ids, listener, sound, writer

import offramp
from offramp.bundle.precision import ERROR
from offramp.cli import _samples
from offramp.runtime import Never

__all__ = ["listener", "models", "writer"]


def test_samples_are_what_a_bundle_in_fewer_bits_is_compared_on(
    models: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = np.random.default_rng(0).integers(tiny.WORDS, size=(5, 7))
    np.savez(tmp_path / "s.npz", input_ids=rows, attention_mask=np.ones_like(rows))
    argv: list[str | Path] = [
        "export",
        f"{models}:encoder",
        "-o",
        tmp_path / "m.offramp",
        "--precision",
        "int8",
        "--loss",
        "1",
    ]
    run(capsys, *argv)
    captured = offramp.load(tmp_path / "m.offramp").manifest.validation[ERROR]
    run(capsys, *argv, "--samples", tmp_path / "s.npz")
    assert offramp.load(tmp_path / "m.offramp").manifest.validation[ERROR] not in (0.0, captured)


def test_samples_that_cannot_be_had_are_found_before_the_model_is_loaded(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "slow.py").write_text("def factory():\n    raise SystemExit('loaded')")
    argv = ["export", "slow.py:factory", "-o", "x.offramp", "--samples", "s.txt"]
    assert "data s.txt cannot be read" in refused(capsys, *argv, "--precision", "int4")
    assert "--samples: of a bundle in fp32 nothing is rounded or compared" in refused(capsys, *argv)
    (tmp_path / "s.txt").write_text("text\n")
    assert "data s.txt has no examples" in refused(capsys, *argv, "--precision", "int4")


def test_texts_are_read_with_what_is_to_be_written_behind_them(writer: Path, tmp_path: Path) -> None:
    chain = offramp.load(writer)
    (tmp_path / "s.tsv").write_text("ab\té\nb\ta\n")
    made = _samples.reader(tmp_path / "s.tsv")(chain, writer)
    assert [sample["input_ids"][0].tolist() for sample in made] == [ids(writer, "aabbé"), ids(writer, "abba")]
    np.savez(tmp_path / "s.npz", input_ids=[[1, 2], [3, 4]], labels=[[5, 6], [7, -100]])
    padded = _samples.reader(tmp_path / "s.npz")(chain, writer)
    assert [sample["input_ids"][0].tolist() for sample in padded] == [[1, 2, 5, 6], [3, 4, 7]]
    (tmp_path / "s.txt").write_text(f"ab\n{'a' * 200}\n")
    texts = _samples.reader(tmp_path / "s.txt")(chain, writer)
    assert texts[0]["input_ids"][0].tolist() == ids(writer, "aabb")
    cache = chain.manifest.cache
    assert cache is not None
    assert texts[1]["input_ids"][0].size == min(202, cache.limit or 202)
    for sample in made + texts:
        (logits,) = chain.run(sample, Never()).outputs.values()
        assert logits.shape[1] == sample["input_ids"][0].size


def test_a_listener_reads_what_is_said_or_what_it_writes_itself(listener: Path, tmp_path: Path) -> None:
    chain = offramp.load(listener)
    sound(tmp_path / "a.wav", 0.5)
    lines = [{"audio": "a.wav", "label": "ab"}]
    (tmp_path / "said.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (said,) = _samples.reader(tmp_path / "said.jsonl")(chain, listener)
    assert said["input_ids"][0].tolist() == [7, *ids(listener, "ab"), END]
    (tmp_path / "heard.jsonl").write_text(json.dumps({"audio": "a.wav"}))
    (heard,) = _samples.reader(tmp_path / "heard.jsonl")(chain, listener)
    own = chain.generate({"features": heard["features"]}, Never(), temperature=0)
    cache = chain.manifest.cache
    assert cache is not None
    assert heard["input_ids"][0].tolist() == [7, *own.tokens[0].tolist()][: cache.limit]
    (logits,) = chain.run(heard, Never()).outputs.values()
    assert logits.shape[1] == heard["input_ids"][0].size
