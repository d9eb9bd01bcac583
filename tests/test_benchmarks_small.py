"""What benchmarks count and print with: small functions whose mistakes a table would not show."""

from __future__ import annotations

import math
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).parent.parent))  # benchmarks are no part of the package
common = pytest.importorskip("benchmarks._common")
translate = pytest.importorskip("benchmarks._translate")
growth = pytest.importorskip("benchmarks.growth")
speech = pytest.importorskip("benchmarks.speech")
workers = pytest.importorskip("benchmarks._workers")
peers = pytest.importorskip("benchmarks._peers")
recipe = pytest.importorskip("examples.train_speech_adapters")


@pytest.mark.parametrize(
    ("found", "wanted", "edits"),
    [("", "", 0), ("abc", "abc", 0), ("abc", "", 3), ("", "abc", 3), ("kitten", "sitting", 3), ("abcd", "acd", 1)],
)
def test_edit_distance(found: str, wanted: str, edits: int) -> None:
    assert speech.distance(list(found), list(wanted)) == edits
    assert speech.distance(list(wanted), list(found)) == edits


def test_words_are_compared_as_they_are_said() -> None:
    assert speech.word_errors(" The Bible, of about 1455!", "the bible of about fourteen fifty-five") == (0, 5)
    assert speech.word_errors("a kind of ship", "a kinder sheep") == (3, 3)


def test_wikitext_is_printed_as_people_print() -> None:
    found = recipe.printed('It was , he said , " a 0 @.@ 5 cm ( long @-@ term ) one " , wasn \'t it ?')
    assert found == 'It was, he said, "a 0.5 cm (long-term) one", wasn\'t it?'


def test_runs_together_show_their_spread() -> None:
    runs = [[{"way": "a", "saved %": 47.1, "same": "yes"}], [{"way": "a", "saved %": 46.0, "same": "no"}]]
    assert common.spread([*runs, *runs[:1]]) == [{"way": "a", "saved %": "47.1 (46 to 47.1)", "same": "yes / no"}]
    assert common.spread(runs[:1]) == runs[0]


def test_progress_goes_to_stderr(capsys: pytest.CaptureFixture[str]) -> None:
    assert list(common.steps([1, 2], "pairs")) == [1, 2]
    common.shown({"way": "a", "ms": 1.23456})
    out, err = capsys.readouterr()
    assert not out
    assert "pairs: 2 in 0 s" in err
    assert "way a, ms 1.23\n" in err


def test_a_static_truncation_stands_beside_each_exit_policy() -> None:
    rows = [
        {"decoding": "full depth, one session", "blocks": 8.0, "BLEU": 39},
        {"decoding": translate.cut(2), "blocks": 2.0, "BLEU": 38},
        {"decoding": "[99%] DEED", "blocks": 2.4, "BLEU": 39},
    ]
    assert [row["decoding"] for row in translate.beside(rows)] == [
        *(row["decoding"] for row in rows),
        f"  beside it: {translate.cut(2)}",
    ]


def test_perplexity_is_of_the_tokens_after_the_first() -> None:
    logits = np.log(np.array([[1, 2, 5], [4, 4, 2], [9, 9, 9]], np.float32)) + 10
    assert workers.nats(logits, [0, 2, 1]) == pytest.approx(-(math.log(5 / 8) + math.log(0.4)) / 2, rel=1e-4)


def test_a_peer_is_compared_by_what_all_items_take() -> None:
    found = peers.row("a", "int8", "other", "ms", ([1.0, 1.0, 10.0], [8.0, 8.0, 8.0]), "WER")
    assert (found["bundle"], found["its"], found["times as fast"]) == (4.0, 8.0, 2.0)
    found = peers.row("a", "int8", "other", "tokens/s", ([10.0], [20.0]), "WER")
    assert (found["bundle"], found["its"], found["times as fast"]) == (100.0, 50.0, 2.0)


def test_a_peer_that_is_not_installed_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    assert not peers.installed("no_such_engine")
    assert "no_such_engine is not installed: its rows are left out" in capsys.readouterr().err
    assert peers.installed("numpy")


def cost(size: int, **totals: float) -> Any:
    return growth.Cost(size, growth.Case(None, rows=size), {growth.STEP: totals["step"], growth.FIRST: totals["first"]})


def test_slopes_are_between_neighbouring_sizes() -> None:
    found = {"batch": [cost(1, step=2.0, first=4.0), cost(4, step=4.0, first=64.0), cost(8, step=8.0, first=64.0)]}
    rows = list(growth.rows("batch", found["batch"]))
    assert [row["slope"] for row in rows] == ["", 0.5, 1.0]
    assert [row["tokens/s"] for row in rows] == [500, 1000, 1000]
    assert [row["steepest"] for row in rows] == ["", "the prompt 2.00", "a step 1.00"]
    assert growth.verdict(found) == "faster than linearly (slope above 1.1): the prompt from 1 to 4 rows (2.00)"
    assert growth.verdict({"batch": found["batch"][1:]}).endswith(": nothing")
    assert growth.sizes("256,64,64") == (64, 256)
    assert growth.sizes("") == ()


def test_growth_is_measured_and_drawn(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("matplotlib")
    monkeypatch.setattr(growth, "BUILD", tmp_path)
    monkeypatch.setattr(growth, "TURNS", 1)
    monkeypatch.setattr(growth, "SECONDS", 0)
    small = growth.llama(2)
    found = {
        "context": growth.costs("context", {size: replace(small, context=size) for size in (4, 8)}),
        "depth": growth.costs("depth", {2: small}),
    }
    (row,) = growth.rows("depth", found["depth"])
    assert row["bundle MB a block"] == small.bundle / 2e6 > 1
    assert all(row[column] > 0 for column in ("ms a step", "prompt, ms a token", "export s"))
    growth.draw(found, tmp_path / "growth.png")
    assert (tmp_path / "growth.png").read_bytes().startswith(b"\x89PNG")
