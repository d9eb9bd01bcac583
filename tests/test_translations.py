"""Translations on disk: made once for all processes, by what they depend on, and never trusted blindly."""

from __future__ import annotations

from pathlib import Path

import onnx
import pytest
import tiny
from torch import nn

from offramp.export import partition, translations
from offramp.export.lowering.lower import lower, translate
from offramp.export.lowering.outline import Computation
from offramp.export.translations import translated
from offramp.program import capture


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[str]:
    """The names of what is translated for real, with an empty cache in ``tmp_path``."""
    made: list[str] = []

    def translate(function: Computation, name: str) -> onnx.ModelProto:
        made.append(name)
        return onnx.ModelProto(producer_name=function.key)

    monkeypatch.setattr(translations, "translate", translate)
    monkeypatch.setenv("OFFRAMP_CACHE", str(tmp_path))
    return made


def head(width: int = 8, rows: int = 2, tokens: int = 5) -> Computation:
    """The tail of a small encoder over inputs of this size."""
    module = tiny.Encoder().eval()
    module.head = nn.Linear(tiny.WIDTH, width)
    inputs = {name: value[:rows, :tokens] for name, value in tiny.text().items()}
    (tail,) = partition(capture(module, inputs)).tails
    return lower(tail)


def test_made_once_for_equal_computations_of_other_captures(calls: list[str], tmp_path: Path) -> None:
    first = translated(head(), "first")
    assert translated(head(), "second") == first
    assert calls == ["first"]
    assert [file.suffix for file in (tmp_path / "translations").iterdir()] == [".onnx"]


def test_other_weights_are_another_computation(calls: list[str]) -> None:
    translated(head(), "first")
    translated(head(width=7), "other")
    assert calls == ["first", "other"]


def test_other_examples_are_the_same_computation(calls: list[str]) -> None:
    translated(head(), "first")
    translated(head(rows=3, tokens=4), "other")
    assert calls == ["first"]


def test_another_version_of_what_lowers_translates_again(calls: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    translated(head(), "first")
    monkeypatch.setattr(translations, "_lowering", lambda: "changed")
    translated(head(), "second")
    assert calls == ["first", "second"]


def test_what_lowers_is_the_whole_room(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "lowering").mkdir()
    file = tmp_path / "lowering" / "step.py"
    monkeypatch.setattr(translations, "__file__", str(tmp_path / "translations.py"))
    found = set()
    for text in ("one", "two"):
        file.write_text(text)
        found.add(translations._lowering.__wrapped__())
    assert len(found) == 2


def test_a_broken_file_is_made_again(calls: list[str], tmp_path: Path) -> None:
    whole = translated(head(), "first")
    (file,) = (tmp_path / "translations").iterdir()
    file.write_bytes(b"\xff" * 20)
    assert translated(head(), "second") == whole
    assert translated(head(), "third") == whole
    assert calls == ["first", "second"]


def test_nothing_is_kept_where_that_is_asked_for(calls: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OFFRAMP_CACHE", "")
    translated(head(), "first")
    translated(head(), "second")
    assert calls == ["first", "second"]


def test_a_folder_that_cannot_be_made_keeps_nothing(
    calls: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("OFFRAMP_CACHE", str(tmp_path / "file"))
    assert translated(head(), "first").producer_name
    assert calls == ["first"]


def test_only_so_many_are_kept(calls: list[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(translations, "_KEPT", 2)
    for width in (5, 6, 7):
        translated(head(width), str(width))
    assert len(list((tmp_path / "translations").iterdir())) == 2
    translated(head(7), "again")
    assert calls == ["5", "6", "7"]


def test_from_disk_it_is_what_was_translated(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OFFRAMP_CACHE", str(tmp_path))
    function = head()
    fresh, kept = translated(function, "tail"), translated(function, "tail")
    assert kept == fresh == translate(function, "tail")
    assert len(kept.graph.node) > 0
