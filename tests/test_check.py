"""``offramp check``: one line of JSON for whatever model it gets."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import tiny

import offramp.check as checking
from offramp import cli
from offramp.check import Check, Report, check

MODELS = """
import tiny
from architectures import REFUSED

def encoder():
    print("a model that talks")
    return tiny.cut(tiny.seeded(tiny.Encoder), 2), tiny.text()

def two_stacks():
    return tiny.seeded(tiny.TwoStacks), tiny.two_texts()

def broken():
    raise KeyError("x")

globals().update(REFUSED)
"""
KEYS = {
    "model": None,
    "ok": None,
    "stage": None,
    "reason": None,
    "stacks": None,
    "segments": None,
    "exits": None,
    "max_error": ["graph", "chain", "exits", "cache", "other_shapes"],
    "seconds": ["capture", "rewrite", "export", "run"],
    "bytes": ["parameters", "bundle"],
}


@pytest.fixture
def models(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "my_models.py").write_text(MODELS)
    monkeypatch.chdir(tmp_path)


def checked(capfd: pytest.CaptureFixture[str], factory: str, *options: str) -> tuple[int, dict[str, Any]]:
    """Status and report; stdout holds the report's line and nothing else."""
    status = cli.main(["check", f"my_models.py:{factory}", "--json", *options])
    (line,) = capfd.readouterr().out.splitlines()
    report: dict[str, Any] = json.loads(line)
    assert list(report) == list(KEYS)
    assert all(list(report[key]) == inner for key, inner in KEYS.items() if inner)
    assert report["model"] == f"my_models.py:{factory}"
    assert status == (0 if report["ok"] else 1)
    return status, report


def test_a_model_that_works(models: None, capfd: pytest.CaptureFixture[str]) -> None:
    status, report = checked(capfd, "encoder")
    assert status == 0
    assert (report["stage"], report["reason"]) == (None, None)
    assert report["stacks"] == [{"name": "encoder", "role": "encoder", "blocks": 2, "cached": False}]
    assert report["exits"] == 1
    assert report["segments"] == 5  # prologue, 2 blocks, 2 uses of the tail
    errors = report["max_error"]
    assert errors.pop("cache") is None
    assert all(0 <= error < 1e-5 for error in errors.values())
    assert all(seconds >= 0 for seconds in report["seconds"].values())
    assert 0 < report["bytes"]["parameters"] < report["bytes"]["bundle"]


def test_a_factory_that_raises(models: None, capfd: pytest.CaptureFixture[str]) -> None:
    _, report = checked(capfd, "broken")
    assert (report["stage"], report["reason"]) == ("model", "the model's own code failed: KeyError: 'x'")
    assert set(report["seconds"].values()) == {None}


def test_a_name_that_leads_nowhere(models: None, capfd: pytest.CaptureFixture[str]) -> None:
    _, report = checked(capfd, "gone")
    assert report["stage"] == "model"
    assert "has no function gone; try: one of " in report["reason"]


def test_a_fault_of_offramp_has_its_stage(
    models: None, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    def fail(*_: object) -> None:
        raise ZeroDivisionError("oops")

    monkeypatch.setattr(checking, "capture", fail)
    _, report = checked(capfd, "encoder")
    assert (report["stage"], report["reason"]) == ("capture", "internal error: ZeroDivisionError: oops")
    assert report["bytes"]["parameters"] > 0
    with pytest.raises(ZeroDivisionError):
        check(tiny.seeded(tiny.Encoder), tiny.text())


def test_errors_in_json_are_rounded_and_finite() -> None:
    report = Report("x")
    report.max_error |= {"graph": 1.23456e-7, "chain": float("inf"), "exits": float("nan")}
    errors = json.loads(report.to_json())["max_error"]
    assert errors == {"graph": 1.2e-7, "chain": None, "exits": None, "cache": None, "other_shapes": None}


def test_text_for_people(models: None, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["check", "my_models.py:broken"]) == 1
    assert capsys.readouterr().out == "my_models.py:broken: model: the model's own code failed: KeyError: 'x'\n"


@pytest.mark.parametrize(
    ("factory", "stage", "reason"),
    [
        ("mlp", "structure", "no attention"),
        pytest.param("mamba", "structure", "no attention", marks=pytest.mark.slow),
        ("one_block", "structure", "one attention"),
        ("states_out", "structure", "returns values from between its blocks"),
        ("data_dependent_loop", "capture", "data-dependent"),
        pytest.param(
            "non_tensor_output", "capture", "outputs that are not tensors: names is a set", marks=pytest.mark.slow
        ),
    ],
)
def test_models_that_are_refused(
    models: None, factory: str, stage: str, reason: str, capfd: pytest.CaptureFixture[str]
) -> None:
    _, report = checked(capfd, factory)
    assert report["stage"] == stage
    assert reason in report["reason"]
    assert "; try: " in report["reason"]
    assert report["segments"] is None


@pytest.mark.slow
def test_two_stacks_and_a_module_given_as_such(capsys: pytest.CaptureFixture[str]) -> None:
    module = tiny.seeded(tiny.TwoStacks).train()
    seen: list[tuple[str, int, int]] = []
    report = check(module, tiny.two_texts(), progress=lambda *item: seen.append(item))
    assert report.ok, report.reason
    assert module.training
    assert report.model == "TwoStacks"
    assert [(stack.name, stack.role, stack.blocks) for stack in report.stacks] == [
        ("encoder", "encoder", 4),
        ("decoder", "decoder", 3),
    ]
    assert report.exits == 5
    assert seen
    assert capsys.readouterr().out == ""


def test_a_pipeline_of_ones_own(models: None, capfd: pytest.CaptureFixture[str]) -> None:
    _, report = checked(capfd, "encoder", "-p", "insert-exits{after=1,head=own},insert-scores{measure=top1}")
    assert report["ok"], report["reason"]
    assert report["exits"] == 1
    _, report = checked(capfd, "encoder", "-p", "insert-exit")
    assert (report["ok"], report["stage"]) == (False, "rewrite")


@pytest.mark.parametrize(
    ("passes", "why"), [("insert-acm{sites=output}", "projections, .* change"), ("truncate{after=2}", "truncate has")]
)
def test_passes_that_change_the_model_on_purpose(passes: str, why: str) -> None:
    report = Check(tiny.seeded(tiny.Encoder), tiny.text(), pipeline=passes).run()
    assert report.ok, report.reason
    assert re.search(
        f"{why}.*the model, by .* of its scale: the chain is compared with the program", report.reason or ""
    )
    assert report.max_error["graph"] == 0
    assert (report.max_error["chain"] or 1) < 1e-4


def test_a_figure_above_the_tolerance_is_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    errors = iter([0.0, 0.5])
    monkeypatch.setattr(checking, "worst", lambda *_: next(errors, 1e-6))
    checker = Check(tiny.seeded(tiny.Encoder), tiny.text())
    report = checker.run()
    assert (report.ok, report.stage) == (False, "run")
    assert report.reason == "the chain at full depth differs from torch: relative error 5.0e-01, allowed 1e-04"
    exits = report.max_error.pop("exits")  # these are compared before the bundle gets its name
    assert exits is not None
    assert 0 <= exits < 1e-5
    assert report.max_error == {"graph": 0.0, "chain": 0.5, "cache": None, "other_shapes": 1e-6}


def test_fewer_bits_are_those_of_the_parts(caplog: pytest.LogCaptureFixture) -> None:
    """What `save` makes of files that stay, all parts in one and several tokens in one run, is not encoded."""
    report = check(tiny.seeded(tiny.Talker, 4), {"input_ids": tiny.ids()}, precision="int8", loss=1.0)
    assert report.ok
    assert report.max_error["precision"] is not None
    assert not [record for record in caplog.records if "full depth" in record.getMessage()]
