"""What benchmarks count with: small functions whose mistakes a table would not show."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent.parent))  # benchmarks are no part of the package
speech = pytest.importorskip("benchmarks.speech")
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
