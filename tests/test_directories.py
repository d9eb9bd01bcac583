"""Saved directories as they are, by the command line's defaults: checked, exported, run, and equal to transformers."""

from __future__ import annotations

import json
from pathlib import Path

import directories
import pytest
from breadth import slow_but
from directory_cases import Case, exported, generated, run_error

import offramp
import offramp.check as checking
from offramp.cli import main

WRITERS = [name for name, directory in directories.DIRECTORIES.items() if directory.generates]
OTHERS = [name for name in directories.DIRECTORIES if name not in WRITERS]
#: One of each kind; the others are breadth.
KINDS = ("bert_classifier", "vit_classifier", "llama_chat", "marian_translator")
SETTINGS = ((1, None), (3, None), (1, 3), (3, 3))  # rows, beams


@pytest.fixture(scope="module")
def case(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Case:
    """The directory, exported with the command line's defaults."""
    return exported(request.param, tmp_path_factory.mktemp(request.param))


@pytest.mark.parametrize("case", slow_but(KINDS, [*OTHERS, *WRITERS]), indirect=True)
def test_it_is_checked(case: Case, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the graph that was captured for the export, since the weights are the same."""
    monkeypatch.setattr(checking, "capture", lambda *_: case.program)
    monkeypatch.setattr(checking, "with_caches", lambda _: case.cached)
    status = main(["check", f"hf:{case.folder}", "--json"])
    report = json.loads(capsys.readouterr().out)
    assert (status, report["ok"], report["reason"] if case.directory.generates else None) == (0, True, None)
    assert {stack["name"]: stack["blocks"] for stack in report["stacks"]} == case.directory.stacks
    assert report["exits"] == sum(blocks - 1 for blocks in case.directory.stacks.values())
    assert any(stack["cached"] for stack in report["stacks"]) == case.directory.generates


@pytest.mark.parametrize("case", slow_but(KINDS, OTHERS), indirect=True)
def test_it_runs_from_the_command_line(case: Case, tmp_path: Path) -> None:
    for rows in case.directory.rows:
        assert run_error(case, rows, tmp_path / str(rows)) <= 1e-4


@pytest.mark.parametrize("case", slow_but(KINDS, WRITERS), indirect=True)
def test_it_generates_what_transformers_does(case: Case, capsys: pytest.CaptureFixture[str]) -> None:
    chain = offramp.load(case.bundle)
    for rows, beams in SETTINGS:
        made, expected = generated(case, chain, rows, beams)
        assert made == expected, (rows, beams)
    made, expected = generated(case, chain, 1, None)
    capsys.readouterr()
    flags = [
        part for name, value in case.directory.asked.items() for part in (f"--{name.replace('_', '-')}", str(value))
    ]
    assert main(["run", str(case.bundle), *case.arguments(1), *flags]) == 0
    text = case.tokenizer.decode(expected[0], skip_special_tokens=True)
    assert capsys.readouterr().out.strip() == text.strip()
