"""Options as text: by type hints, there and back."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from offramp.errors import SpecError
from offramp.passes.infra import spec
from offramp.passes.infra.contract import Pass
from offramp.passes.infra.option_values import hints, read


@dataclass(frozen=True, repr=False)
class Optioned(Pass):
    """A pass with an option of every type that text can write."""

    name: ClassVar[str] = "optioned"
    flag: bool = False
    maybe: bool | None = None
    count: int = 1
    share: float = 0.5
    either: int | float | None = None
    word: str = "all"
    head: Literal["shared", "own"] = "shared"
    after: tuple[int, ...] | int | Literal["all"] = "all"
    shares: tuple[float, ...] = ()
    measure: tuple[str, ...] | str = "top1"
    mixed: tuple[bool | int, ...] | None = None
    table: Mapping[str, int] | None = None


_WORDS = st.from_regex(r"[a-z0-9_./-]+", fullmatch=True).filter(lambda text: text != "None")
_TEXTS: dict[str, st.SearchStrategy[str]] = {
    "flag": st.sampled_from(["true", "False", "TRUE"]),
    "maybe": st.sampled_from(["None", "true", "false"]),
    "count": st.integers().map(str),
    "share": st.floats(allow_nan=False).map(str) | st.integers(-9, 9).map(str),
    "either": st.sampled_from(["None", "2", "2.0", "-1e-3", "inf"]),
    "word": _WORDS,
    "head": st.sampled_from(["shared", "own"]),
    "after": st.just("all") | st.lists(st.integers(), min_size=1).map(lambda items: "|".join(map(str, items))),
    "shares": st.lists(st.floats(allow_nan=False), min_size=1).map(lambda items: " | ".join(map(str, items))),
    "measure": st.lists(_WORDS, min_size=1).map("|".join),
    "mixed": st.sampled_from(["None", "true|3", "0|false|1"]),
}


@pytest.fixture(autouse=True)
def known(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(spec, "pass_named", {"optioned": Optioned}.__getitem__)


@given(st.fixed_dictionaries({}, optional=_TEXTS))
def test_text_to_a_pass_to_its_repr_to_the_pass(texts: dict[str, str]) -> None:
    written = ",".join(f"{name}={text}" for name, text in texts.items())
    (first,) = spec.parse(f"optioned{{{written}}}")
    assert spec.parse(repr(first)) == [first]
    assert repr(*spec.parse(repr(first))) == repr(first)


@pytest.mark.parametrize(
    ("hint", "text", "value"),
    [
        (float, "3", 3.0),
        (float, "1e-3", 0.001),
        (float, "-inf", -math.inf),
        (int | float, "3", 3),
        (int | float, "3.0", 3.0),
        (bool, "True", True),
        (bool | None, "None", None),
        (str | None, "None", None),
        (str | int, "3", 3),
        (tuple[int, ...] | int, "3", (3,)),
        (int | tuple[int, ...], "3", 3),
        (tuple[int, ...] | str, "words.txt", "words.txt"),
        (tuple[str, ...] | Literal["all"], "all", "all"),
        (tuple[bool, ...], "true | false", (True, False)),
        (Literal[1, 2], "2", 2),
        (Mapping[str, int] | int, "2", 2),
    ],
)
def test_the_hint_says_what_text_means(hint: Any, text: str, value: object) -> None:
    found = read(text, hint)
    assert (found, type(found)) == (value, type(value))


@pytest.mark.parametrize(
    ("hint", "text", "expected"),
    [
        (int, "2.0", "a whole number"),
        (int, "1_000", "a whole number"),
        (int, "", "a whole number"),
        (float, "nan", "a number"),
        (float, "two", "a number"),
        (bool, "1", "true or false"),
        (Literal["shared", "own"], "both", "shared or own"),
        (
            tuple[int, ...] | int | Literal["all"],
            "two",
            r"all or a whole number \(several joined by \|\) or a whole number",
        ),
        (tuple[bool | int, ...], "true|2.0", r"true or false or a whole number \(several joined by \|\)"),
    ],
)
def test_what_is_not_of_the_type_is_refused(hint: Any, text: str, expected: str) -> None:
    with pytest.raises(ValueError, match=f"^{expected}$"):
        read(text, hint)


@pytest.mark.parametrize("hint", [Mapping[str, int], tuple[int, int], list[int], Mapping[str, int] | None, Any])
def test_types_without_a_text_are_refused(hint: Any) -> None:
    with pytest.raises(TypeError):
        read("2", hint)


def test_all_problems_of_a_text_are_told_at_once() -> None:
    with pytest.raises(SpecError) as caught:
        spec.parse("optioned{flag=2,count=1.5,share=x,table=a}")
    assert str(caught.value).split("; ") == [
        "optioned: flag=2 is not true or false",
        "optioned: count=1.5 is not a whole number",
        "optioned: share=x is not a number",
        f"optioned: table cannot be written as text (None or {Mapping[str, int]}): give apply the pass itself",
    ]


def test_hints_that_python_does_not_know() -> None:
    class Strange:
        option: Nowhere  # type: ignore[name-defined]  # noqa: F821

    with pytest.raises(TypeError, match="Nowhere"):
        hints(Strange)
