"""The demos: what each is given, when its bundle is made anew, and what it prints."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import bundles
import clock
import pytest
from demos import needs, shown

from offramp import cli, demo, zoo
from offramp.bundle.manifest import MANIFEST_FILE
from offramp.demo import _two_ways, speech
from offramp.errors import InputError


@pytest.mark.parametrize(
    ("words", "name", "given"),
    [
        ([], "sentiment", []),
        (["Lovely."], "sentiment", ["Lovely."]),
        (["sentiment", "speech"], "sentiment", ["speech"]),
        (["speech"], "speech", []),
        (["speech", "x.wav"], "speech", ["x.wav"]),
        (["translation", "Ein Hund."], "translation", ["Ein Hund."]),
    ],
)
def test_the_first_word_names_the_demo(
    words: list[str], name: str, given: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[Any] = []
    fake = SimpleNamespace(
        BUNDLE=tmp_path / "b",
        bundles=lambda path: {path: ("canonicalize",)},
        build=lambda path, progress: calls.append(path),
        show=lambda path, shown: calls.append((path, shown)),
    )
    monkeypatch.setitem(sys.modules, f"offramp.demo.{name}", fake)
    assert cli.main(["demo", *words]) == 0
    assert calls == [tmp_path / "b", (tmp_path / "b", given)]


def test_a_bundle_is_made_anew_where_pipeline_or_version_differ(tmp_path: Path) -> None:
    assert not demo.is_current(tmp_path, ())
    root = bundles.classifier(tmp_path / "b.offramp")
    assert demo.is_current(root, ())
    assert not demo.is_current(root, ("insert-cache",))
    manifest = json.loads((root / MANIFEST_FILE).read_text())
    manifest["provenance"] = {"pipeline": ["insert-cache"], "versions": {"offramp": "0.0.1"}}
    (root / MANIFEST_FILE).write_text(json.dumps(manifest))
    assert not demo.is_current(root, ("insert-cache",))


@pytest.mark.parametrize(
    ("early", "said"),
    [
        ("Fail again. Fail better.", "the same text"),
        ("Fail-again. Fail better.", '"Fail again." became "Fail-again."'),
        ("again. Fail much better.", '"Fail" became ""; "" became "much"'),
    ],
)
def test_difference(early: str, said: str) -> None:
    assert _two_ways.difference("Fail again. Fail better.", early) == said


def test_speech_takes_one_recording(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(InputError, match="one recording at a time, these are 2"):
        speech.show(tmp_path, ["a.wav", "b.wav"])
    monkeypatch.setattr(speech, "_MODULE", "no_such_package")
    with pytest.raises(zoo.PackageMissingError, match=r"pip install --no-deps moonshine-voice==0\.1\.5"):
        speech.recording()


@pytest.mark.slow
def test_sentiment(tmp_path: Path) -> None:
    needs("minilm")
    for _ in range(2):  # the second finds the bundle
        started = clock.of_children()
        found = shown("Lovely [b].", "-o", str(tmp_path / "demo.offramp"))
        seconds = clock.of_children() - started
        assert "Lovely [b]." in found
        assert "of 6 blocks on average" in found
    assert seconds < 30  # of the processor's time


@pytest.mark.slow
def test_translation(tmp_path: Path) -> None:
    """Needs no package and no data: the weights are part of the zoo."""
    found = shown("translation", "Ein Hund bellt.", "-o", str(tmp_path / "demo.offramp"))
    assert "two|2 dogs|2 run|2 through|2 the|2 snow.|2" in found
    assert "Ein Hund bellt." in found
    assert "beach|8" in found, "no token went deep"
    ratio = re.search(r"blocks on average, (\S+)x as fast as full depth", found)
    assert ratio is not None
    assert float(ratio[1]) > 1
