"""The card in a bundle: readable, true to the manifest, and its Python lines run."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import bundles
import numpy as np
import pytest
import tiny

import offramp
from offramp import models
from offramp.bundle.json_text import from_json
from offramp.bundle.manifest import MANIFEST_FILE
from offramp.runtime.card import CARD_FILE, card

SCORES = "insert-exits{after=1|2},insert-scores{measure=top1|margin}"


@pytest.fixture(scope="module")
def bundles_with_cards(
    encoder: tiny.Captured, decoder: tiny.Captured, two_stacks: tiny.Captured, tmp_path_factory: pytest.TempPathFactory
) -> Mapping[str, Path]:
    root = tmp_path_factory.mktemp("cards")
    how: dict[str, Any] = {"segments": 1, "source": "zoo:tiny", "licence": "MIT"}
    offramp.save(offramp.apply(encoder.program, SCORES), root / "reader.offramp", **how)
    generation = {"prompt": [1], "stop": [3, 4], "repetition_penalty": 1.5, "template": "Q: {text}"}
    offramp.save(
        offramp.apply(decoder.program, "insert-cache"),
        root / "writer.offramp",
        segments=1,
        generation=generation,
        preprocessing={"audio": {"rate": 16000, "mels": 80}},
    )
    offramp.save(offramp.apply(two_stacks.program, "insert-cache"), root / "translator.offramp", segments=1)
    return {path.stem: path for path in root.iterdir()}


def text_of(path: Path) -> str:
    return (path / CARD_FILE).read_text(encoding="utf-8")


def printed(path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> str:
    """What the Python lines of a card print, beside the bundle."""
    monkeypatch.chdir(path.parent)
    (code,) = re.findall(r"```python\n(.*?)```", text_of(path), re.DOTALL)
    exec(compile(code, CARD_FILE, "exec"), {"__name__": "card"})
    return capsys.readouterr().out


def test_of_an_encoder(
    bundles_with_cards: Mapping[str, Path], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path = bundles_with_cards["reader"]
    text = text_of(path)
    assert text.startswith("# reader\n")
    for line in (
        "| made from | zoo:tiny |",
        "| licence | MIT |",
        r"| passes | `insert-exits{after=1\|2}`, `insert-scores{measure=top1\|margin}` |",
        "| stack0 | encoder | 4 | 1, 2 | shared head, identity adapter | top1, margin |",
        "It runs in one pass.",
        "At full depth unless a policy is given. It is not calibrated",
        "## Compared with torch",
        "offramp run reader.offramp --input ",
    ):
        assert line.replace("stack0", next(iter(offramp.load(path).stacks))) in text
    assert "## Generation" not in text
    assert "{'logits': (1, 3)}" in printed(path, monkeypatch, capsys)


@pytest.mark.parametrize("name", ["writer", "translator"])
def test_of_a_generator(
    name: str,
    bundles_with_cards: Mapping[str, Path],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    path = bundles_with_cards[name]
    text = text_of(path)
    assert "Keys and values are cached: it runs token by token." in text
    assert "| licence | not known" in text
    if name == "writer":
        assert "- prompt 1\n- stop 3, 4\n- repetition penalty 1.5\n- template `'Q: {text}'`" in text
        assert "- audio: kind `'log-mel'`, rate 16000, n fft 400" in text
        assert "offramp run writer.offramp --audio FILE.wav" in text
    assert printed(path, monkeypatch, capsys).startswith("(array([")


def test_calibration_writes_it_anew(tmp_path: Path) -> None:
    root = bundles.classifier(tmp_path / "mine.offramp")
    ids = np.random.default_rng(0).integers(0, bundles.WORDS, (200, 3))
    offramp.calibrate(root, {"ids": ids}, keep=0.5).write(root)
    assert text_of(root) == card(from_json((root / MANIFEST_FILE).read_text()), "mine.offramp")
    assert "Calibrated on 200 examples" in text_of(root)
    assert re.search(r"Expected [\d.]+ ms for each row, [\d.]+ at full depth, where it was made\.", text_of(root))
    assert (root / CARD_FILE).stat().st_mode & 0o777 == 0o644


def test_a_users_own_stays(encoder: tiny.Captured, tmp_path: Path) -> None:
    (tmp_path / CARD_FILE).write_text("mine")
    offramp.save(encoder.program, tmp_path / "b.offramp", segments=1, files=[tmp_path / CARD_FILE])
    assert text_of(tmp_path / "b.offramp") == "mine"
    assert CARD_FILE in offramp.load(tmp_path / "b.offramp").manifest.files


@pytest.mark.parametrize(
    ("about", "found"),
    [
        ("---\nlicense: apache-2.0\ntags:\n- x\n---\nlicense: no\n", "apache-2.0"),
        ("---\ntags: []\n---\nlicense: no\n", None),
        ("# A model\n", None),
        (None, None),
    ],
)
def test_the_licence_of_a_saved_directory(about: str | None, found: str | None, tmp_path: Path) -> None:
    if about is not None:
        (tmp_path / "README.md").write_text(about)
    assert models.origin(f"hf:{tmp_path}") == {"source": f"hf:{tmp_path.name}", "licence": found}


def test_where_other_models_came_from() -> None:
    assert models.origin("hf:someone/some-model") == {"source": "hf:someone/some-model", "licence": None}
    assert models.origin("/home/me/models.py:make") == {"source": "models.py:make", "licence": None}
    assert models.origin("zoo:minilm") == {"source": "zoo:minilm", "licence": "Apache-2.0"}
