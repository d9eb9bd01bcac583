"""The pipeline: text and passes are two forms of one thing, and it verifies, dumps and reports."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass, fields
from itertools import pairwise
from pathlib import Path
from typing import Any, ClassVar

import pytest
import tiny
from hypothesis import given
from hypothesis import strategies as st

from offramp.bundle.measures import OF_LOGITS, OF_STATE
from offramp.errors import PassError, SpecError
from offramp.export import save
from offramp.passes import (
    Canonicalize,
    InsertAcm,
    InsertAdapter,
    InsertCache,
    InsertExits,
    InsertScores,
    Pass,
    PassResult,
    RemoveExits,
    SplitModalities,
    Truncate,
    apply,
)
from offramp.passes.infra.editor import Editor
from offramp.passes.infra.registry import registry
from offramp.passes.infra.spec import as_passes, parse
from offramp.passes.insert_adapter import KINDS
from offramp.program import Program

# Text

_stacks = st.none() | st.from_regex(r"[a-z][a-z0-9_]*", fullmatch=True).filter(lambda text: text != "all")
_counts = st.lists(st.integers(1, 60), min_size=1, max_size=4).map(tuple)
_after = st.just("all") | _counts
_passes: dict[type[Pass], st.SearchStrategy[Pass]] = {
    Canonicalize: st.builds(Canonicalize),
    InsertAcm: st.builds(
        InsertAcm,
        _stacks,
        _after,
        st.just("mlp") | st.lists(st.sampled_from(["mlp", "projections", "query"]), min_size=2, unique=True).map(tuple),
        st.integers(2, 9),
        st.none() | st.integers(0, 1),
        st.sampled_from(["activation", "importance", "given"]),
    ),
    InsertAdapter: st.builds(InsertAdapter, _stacks, _after, st.sampled_from(KINDS), st.none() | st.integers(1, 999)),
    InsertCache: st.just(InsertCache()),
    SplitModalities: st.builds(
        SplitModalities,
        _stacks,
        st.sampled_from(["joint", "separate"]),
        st.sampled_from(["group", "token"]),
        st.sampled_from([(), ("image",), ("image", "text")]),
    ),
    InsertExits: st.builds(InsertExits, _stacks, _after, st.sampled_from(["shared", "own"])),
    InsertScores: st.builds(
        InsertScores,
        _stacks,
        st.lists(st.sampled_from(OF_LOGITS + OF_STATE), min_size=2, unique=True).map(tuple) | st.just("top1"),
        _after,
        st.none() | st.sampled_from(["logits", "output", "deep.list.0"]),
    ),
    RemoveExits: st.builds(RemoveExits, _stacks, _after),
    Truncate: st.builds(Truncate, _stacks, st.integers(1, 60)),
}


@given(st.lists(st.one_of(*_passes.values()), max_size=5))
def test_the_text_of_passes_reads_back(passes: list[Pass]) -> None:
    assert parse(",".join(map(repr, passes))) == passes


@given(st.lists(st.one_of(*_passes.values()), min_size=1, max_size=3), st.sampled_from(["", " ", "\n  "]))
def test_spaces_do_not_matter(passes: list[Pass], space: str) -> None:
    text = ",".join(map(repr, passes))
    for sign in ",{}=|":
        text = text.replace(sign, f"{space}{sign}{space}")
    assert parse(text) == passes


def test_every_pass_is_known_by_its_name() -> None:
    assert registry() == {kind.name: kind for kind in _passes}
    assert list(registry()) == sorted(registry())


def test_one_count_or_one_measure_may_stand_alone(encoder: tiny.Captured) -> None:
    for written in ([InsertExits(after=2)], [InsertExits(after=(2,))], "insert-exits{after=2}"):
        assert repr(as_passes(written)) == "[insert-exits{after=2}]"
        assert [item.after for item in apply(encoder.program, written).exits] == [2]
    (step,) = parse("insert-scores{measure=entropy}")
    assert isinstance(step, InsertScores)
    assert step.measures == InsertScores(measure="entropy").measures == ("entropy",)


def test_text_of_defaults_is_the_bare_name() -> None:
    for kind in (Canonicalize, InsertAdapter, InsertExits, InsertScores, Truncate):
        assert repr(kind()) == kind.name
        assert parse(kind.name) == [kind()]


def test_an_empty_pipeline_does_nothing(encoder: tiny.Captured) -> None:
    assert parse("") == parse("  ") == []
    assert apply(encoder.program, "") is encoder.program
    assert apply(encoder.program, []) is encoder.program


@pytest.mark.parametrize(
    ("text", "reasons"),
    [
        ("nothing", ["unknown pass 'nothing'; there are canonicalize, insert-acm"]),
        ("nothing,insert-exits,more{a=1}", ["unknown pass 'nothing'", "unknown pass 'more'"]),
        (
            "insert-exits{block=2,head=own,layer=3},what,truncate{until=1}",
            [
                "insert-exits has no option 'block'; it has stack, after, head",
                "insert-exits has no option 'layer'",
                "unknown pass 'what'",
                "truncate has no option 'until'; it has stack, after",
            ],
        ),
        ("canonicalize{hard=1}", ["canonicalize has no option 'hard'; it has none"]),
        ("insert-exits{after}", ["no option 'after'"]),
        ("insert-exits{after=2", ["cannot read the pipeline at 'insert-exits{after=2'"]),
        ("insert-exits after=2", ["cannot read the pipeline"]),
        ("insert-exits,,truncate", ["cannot read the pipeline at ',truncate'"]),
        ("Truncate", ["cannot read the pipeline at 'Truncate'"]),
        ("truncate{after=two}", ["after=two"]),
        ("truncate{after=1|2}", ["after=1|2"]),
        ("insert-adapter{width=wide,kind=mlp}", ["width=wide"]),
        ("insert-exits{after=1,after=2}", ["after"]),
    ],
)
def test_text_that_cannot_be_read(encoder: tiny.Captured, text: str, reasons: list[str]) -> None:
    """All that is wrong with it is told at once, whether in reading it or before the first edit."""
    with pytest.raises(SpecError) as caught:
        apply(encoder.program, text)
    for reason in reasons:
        assert reason in str(caught.value).replace("='", "=")


# Passes


@pytest.mark.parametrize("kind", _passes, ids=lambda kind: kind.name)
def test_a_pass_is_frozen_data(kind: type[Pass]) -> None:
    step: Any = kind()
    assert hash(step) == hash(kind())
    assert step == kind()
    for item in fields(step):
        with pytest.raises(AttributeError):
            setattr(step, item.name, None)
    text = kind.__doc__ or ""
    assert all(word in text for word in ("Requires:", "Ensures:", "Invalidates:"))


@dataclass(frozen=True, repr=False)
class Doing(Pass):
    """Runs what a test gives it."""

    name: ClassVar[str] = "doing"
    work: Callable[[Program], PassResult] = PassResult
    demand: Callable[[Program], None] = lambda program: None
    promise: Callable[[Program, PassResult], None] = lambda program, result: None

    def requires(self, program: Program) -> None:
        self.demand(program)

    def run(self, program: Program) -> PassResult:
        return self.work(program)

    def ensures(self, before: Program, result: PassResult) -> None:
        self.promise(before, result)

    def __repr__(self) -> str:
        return self.name


def test_a_pass_sees_the_program_before_and_the_result(encoder: tiny.Captured) -> None:
    seen: list[object] = []
    step = Doing(
        demand=seen.append,
        promise=lambda program, result: seen.extend([program, result.modified, result.program]),
    )
    apply(encoder.program, step)
    assert seen == [encoder.program, encoder.program, False, encoder.program]


def test_an_error_of_a_pass_is_told_with_its_cause(encoder: tiny.Captured) -> None:
    def fail(program: Program) -> PassResult:
        raise KeyError("cut")

    with pytest.raises(PassError, match="doing failed: KeyError: 'cut'") as caught:
        apply(encoder.program, [Doing(work=fail)])
    assert isinstance(caught.value.__cause__, KeyError)


def test_an_interrupt_is_not_an_error_of_the_pass(encoder: tiny.Captured) -> None:
    def interrupt(program: Program) -> PassResult:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        apply(encoder.program, [Doing(work=interrupt)])


def test_a_refusal_passes_through_and_leaves_the_program(encoder: tiny.Captured) -> None:
    before = str(encoder.program.graph)
    with pytest.raises(SpecError, match="unknown stack 'other'"):
        apply(encoder.program, "insert-exits,truncate{stack=other}")
    assert str(encoder.program.graph) == before


def test_a_result_that_is_not_sound_is_refused(encoder: tiny.Captured) -> None:
    def spoil(program: Program) -> PassResult:
        editor = Editor(program, "doing")
        editor.returns({}, dropped=["logits"])
        editor.drop_dead()
        return editor.finish()

    with pytest.raises(PassError, match=r"^after doing: outputs-are-there: missing outputs \['logits'\]"):
        apply(encoder.program, [Doing(work=spoil)])


def test_modified_is_derived_from_the_edits(encoder: tiny.Captured) -> None:
    assert not PassResult(encoder.program).modified
    assert not PassResult(encoder.program, {"inserted": 0}).modified
    assert PassResult(encoder.program, {"inserted": 0, "erased": 1}).modified


def test_history_is_the_text_that_made_the_program(encoder: tiny.Captured) -> None:
    text = "insert-exits{after=1|2},insert-adapter{kind=linear},insert-scores{measure=top1|cosine}"
    program = apply(apply(encoder.program, text), "insert-exits{after=1}")
    assert ",".join(program.history) == text
    again = apply(encoder.program, ",".join(program.history))
    assert again.exits == program.exits
    assert str(again.graph) == str(program.graph)


# Watching


def test_the_observer_sees_every_pass(encoder: tiny.Captured) -> None:
    seen: list[tuple[Program, Pass, PassResult]] = []
    steps = [InsertExits(after=1), InsertExits(after=1), InsertScores(after=1)]
    last = apply(encoder.program, steps, observer=lambda *event: seen.append(event))
    assert [step for _, step, _ in seen] == steps
    assert [result.modified for _, _, result in seen] == [True, False, True]
    programs = [encoder.program, *(result.program for _, _, result in seen)]
    assert [id(program) for program, _, _ in seen] == [id(program) for program in programs[:-1]]
    assert programs[-1] is last


def test_a_dump_shows_every_pass(encoder: tiny.Captured, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    directory = tmp_path / "deep" / "dump"
    monkeypatch.setenv("OFFRAMP_DUMP", str(directory))
    text = "insert-exits{after=2},insert-scores{measure=top1},truncate{after=2}"
    program = apply(encoder.program, text)
    stems = ["01-insert-exits", "02-insert-scores", "03-truncate"]
    kinds = ("before", "after", "changes")
    assert {path.name for path in directory.iterdir()} == {f"{s}.{kind}.txt" for s in stems for kind in kinds}
    for earlier, later in pairwise(stems):
        assert (directory / f"{earlier}.after.txt").read_text() == (directory / f"{later}.before.txt").read_text()
    assert (directory / "01-insert-exits.before.txt").read_text() == f"{encoder.program.graph}\n"
    assert (directory / "03-truncate.after.txt").read_text() == f"{program.graph}\n"
    changes = (directory / "01-insert-exits.changes.txt").read_text().splitlines()
    assert changes[0].startswith("# insert-exits{after=2} {'inserted': ")
    added = [line for line in changes if line.startswith("+ ")]
    assert any("aten.alias.default" in line for line in added)
    assert any(line.startswith("- return") for line in changes)


def test_without_the_variable_nothing_is_written(
    encoder: tiny.Captured, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("OFFRAMP_DUMP", raising=False)
    monkeypatch.chdir(tmp_path)
    apply(encoder.program, "insert-exits")
    assert list(tmp_path.iterdir()) == []


def test_edits_and_notes_are_logged(encoder: tiny.Captured, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "offramp"):
        apply(encoder.program, "insert-exits{after=1},insert-exits{after=1}")
    messages = [r.getMessage() for r in caplog.records if r.name == "offramp.passes.infra.pipeline"]
    assert messages[0].startswith("insert-exits{after=1}: {'inserted': ")
    assert messages[1].startswith("insert-exits{after=1}: no edits in ")
    assert messages[2] == "insert-exits{after=1}: stack encoder has an exit after block 1 already"


def test_a_model_is_no_program(tmp_path: Path) -> None:
    module: Any = tiny.Encoder()
    for call in (lambda: apply(module, "insert-exits"), lambda: save(module, tmp_path / "m")):
        with pytest.raises(SpecError, match="a Encoder is no program") as caught:
            call()
        assert "offramp.capture(module, example_inputs)" in str(caught.value)


def test_passes_and_texts_in_one_list() -> None:
    found = as_passes(["insert-exits{after=1}", InsertScores(measure="top1")])
    assert found == [*parse("insert-exits{after=1}"), InsertScores(measure="top1")]


@pytest.mark.parametrize(("given", "hint"), [(InsertExits, "InsertExits(...)"), (3, "offramp.InsertExits")])
def test_what_is_no_pass(encoder: tiny.Captured, given: Any, hint: str) -> None:
    for passes in (given, [given]):
        with pytest.raises(SpecError, match="is no pass") as caught:
            apply(encoder.program, passes)
        assert hint in str(caught.value)
