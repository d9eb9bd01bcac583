"""Translations on disk: made once for all processes, by what they depend on, and never trusted blindly."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import onnx
import pytest
import tiny
import torch
from torch import nn

from offramp.export import partition, translations
from offramp.export.lowering import table
from offramp.export.lowering.lower import lower, lowered, translate
from offramp.export.lowering.outline import Computation
from offramp.export.subgraph import Subgraph
from offramp.export.translations import Translations
from offramp.program import Program, capture


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[str]:
    """What is lowered and what translated for real, with an empty cache in ``tmp_path``."""
    made: list[str] = []

    def recorded(what: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def recording(computation: Computation, name: str, *args: Any) -> Any:
            made.append(f"{what} {name}")
            return function(computation, name, *args)

        return recording

    def translate(computation: Computation, name: str) -> onnx.ModelProto:
        return onnx.ModelProto(producer_name=computation.key)

    monkeypatch.setattr(translations, "lowered", recorded("lower", lowered))
    monkeypatch.setattr(translations, "translate", recorded("translate", translate))
    monkeypatch.setenv("OFFRAMP_CACHE", str(tmp_path))
    return made


@cache
def captured(width: int, rows: int, tokens: int, _again: int) -> Program:
    """A small encoder over inputs of this size, with so many classes; ``_again`` tells captures of the same apart."""
    module = tiny.Encoder().eval()
    module.head = nn.Linear(tiny.WIDTH, width)
    return capture(module, {key: value[:rows, :tokens] for key, value in tiny.text().items()})


def head(name: str = "tail", width: int = 8, rows: int = 2, tokens: int = 5, again: int = 0) -> Subgraph:
    """The tail of a small encoder."""
    (tail,) = partition(captured(width, rows, tokens, again)).tails
    return Subgraph(name, tail.inputs, tail.outputs, tail.nodes)


def made(subgraph: Subgraph) -> onnx.ModelProto:
    """The model that another process gets."""
    return Translations().of(subgraph).model


def both(name: str) -> list[str]:
    return [f"lower {name}", f"translate {name}"]


def test_made_once_for_equal_computations_of_other_captures(calls: list[str], tmp_path: Path) -> None:
    assert made(head("first")) == made(head("second", again=1))
    assert calls == both("first")
    assert sorted(file.suffix for file in (tmp_path / "translations").iterdir()) == [".json", ".onnx"]


def test_made_once_in_a_process_without_a_cache(calls: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OFFRAMP_CACHE", "")
    known, first, second = Translations(), head("first"), head("second")
    one, other = known.of(first), known.of(second)
    assert (one.key, one.model) == (other.key, other.model)
    assert (one.outputs, other.outputs) == (first.outputs, second.outputs)
    assert (calls, len(known)) == (both("first"), 1)


def test_other_weights_are_another_computation(calls: list[str]) -> None:
    made(head("first"))
    made(head("other", width=7))
    assert calls == both("first") + both("other")


def test_other_examples_are_the_same_computation(calls: list[str]) -> None:
    made(head("first"))
    made(head("other", rows=3, tokens=4))
    assert [call for call in calls if call.startswith("translate")] == ["translate first"]


def test_another_target_is_lowered_anew(calls: list[str]) -> None:
    made(head("first"))
    Translations("portable").of(head("other"))
    assert calls[2] == "lower other"


def test_another_version_of_what_lowers_translates_again(calls: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    made(head("first"))
    monkeypatch.setattr(translations, "_lowering", lambda: "changed")
    made(head("second"))
    assert calls == both("first") + both("second")


def test_what_lowers_is_the_whole_room(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "lowering").mkdir()
    file = tmp_path / "lowering" / "step.py"
    monkeypatch.setattr(translations, "_ROOMS", (tmp_path,))
    found = set()
    for text in ("one", "two"):
        file.write_text(text)
        found.add(translations._lowering.__wrapped__())
    assert len(found) == 2


@pytest.mark.parametrize("suffix", [".onnx", ".json"])
@pytest.mark.parametrize("content", [b"\xff" * 20, b"[]", b"{}", None])
def test_a_broken_file_is_made_again(calls: list[str], tmp_path: Path, suffix: str, content: bytes | None) -> None:
    whole = made(head("first"))
    (file,) = (tmp_path / "translations").glob(f"*{suffix}")
    if content is None:
        file.unlink()
    else:
        file.write_bytes(content)
    assert made(head("second")) == whole
    assert made(head("third")) == whole
    assert "lower second" in calls
    assert not any(call.endswith("third") for call in calls)


@pytest.mark.parametrize(("name", "value"), [("OFFRAMP_CACHE", ""), ("OFFRAMP_DUMP", "shown")])
def test_nothing_is_kept_where_that_is_asked_for(
    calls: list[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path, name: str, value: str
) -> None:
    monkeypatch.setenv(name, value and str(tmp_path / value))
    made(head("first"))
    made(head("second"))
    assert calls == both("first") + both("second")


def test_what_functions_of_ones_own_make_is_not_kept(calls: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """They may change from one process to the next, and nothing here would see it."""
    made(head("first"))
    linear = torch.ops.aten.linear.default
    monkeypatch.setitem(table.lowerings, linear, lambda builder, *args: builder.call(linear, *args))
    made(head("second"))
    assert calls[2] == "lower second"
    monkeypatch.undo()


def test_a_folder_that_cannot_be_made_keeps_nothing(
    calls: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("OFFRAMP_CACHE", str(tmp_path / "file"))
    assert made(head("first")).producer_name
    assert calls == both("first")


def test_only_so_many_are_kept(calls: list[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(translations, "_KEPT", 4)
    for width in (5, 6, 7):
        made(head(str(width), width))
    assert len(list((tmp_path / "translations").iterdir())) == 4
    made(head("again", 7))
    assert calls == [*both("5"), *both("6"), *both("7")]


def test_from_disk_it_is_what_was_translated(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OFFRAMP_CACHE", str(tmp_path))
    subgraph = head()
    fresh, kept = made(subgraph), made(subgraph)
    assert kept == fresh == translate(lower(subgraph), "tail")
    assert len(kept.graph.node) > 0
    (file,) = (tmp_path / "translations").glob("*.json")
    assert "aten::linear" in json.loads(file.read_bytes())["operators"]
