"""Records of a package outside: its pass is found by name, and what it adds lives through the other passes."""

from __future__ import annotations

import copy
import importlib
from dataclasses import replace
from pathlib import Path

import pytest
import tiny
import torch
from marks import Mark, MarkBlock

import offramp
from offramp.errors import ExportError, PassError, SpecError
from offramp.export import save
from offramp.export.partition import partition
from offramp.export.prepare import prepared
from offramp.passes import apply
from offramp.passes.infra.spec import parse
from offramp.program import Exit, Program
from offramp.program.graph import aten, results
from offramp.program.record import Record, exchanged


def _install(directory: Path, package: str, **points: str) -> None:
    """A distribution as pip leaves it, with entry points of the group of passes."""
    info = directory / f"{package}-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {package}\nVersion: 1.0\n")
    lines = [f"{name.replace('_', '-')} = {value}" for name, value in points.items()]
    (info / "entry_points.txt").write_text("\n".join(["[offramp.passes]", *lines, ""]))


@pytest.fixture
def packages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.syspath_prepend(tmp_path)
    _install(tmp_path, "marks", mark_block="marks:MarkBlock")
    return tmp_path


def marks(program: Program) -> list[Mark]:
    return [item for item in program.records if isinstance(item, Mark)]


@pytest.mark.usefixtures("packages")
def test_text_finds_a_pass_of_another_package() -> None:
    (found,) = parse("mark-block{after=2,factor=1e-3,returned=true}")
    assert found == MarkBlock(after=2, factor=0.001, returned=True)
    assert repr(found) == "mark-block{after=2,factor=0.001,returned=True}"
    assert parse(repr(found)) == [found]
    with pytest.raises(
        SpecError,
        match=r"unknown pass 'mark'; there are .*, insert-scores, mark-block, remove-exits, "
        r"split-modalities, truncate",
    ):
        parse("mark")


def test_without_the_package_there_is_no_such_pass() -> None:
    with pytest.raises(SpecError, match="unknown pass 'mark-block'"):
        parse("mark-block")


@pytest.mark.parametrize(
    ("points", "text", "reason"),
    [
        (
            {"gone": "no_such_module:Pass"},
            "gone",
            r"'gone' of more \(no_such_module:Pass\) cannot be imported: No module",
        ),
        ({"gone": "marks:Nothing"}, "gone", r"'gone' of more \(marks:Nothing\) cannot be imported: .* 'Nothing'"),
        ({"no_pass": "marks:NoPass"}, "no-pass", "is no offramp.passes.Pass of that name"),
        ({"other": "marks:MarkBlock"}, "other", "is no offramp.passes.Pass of that name"),
        ({"truncate": "marks:MarkBlock"}, "truncate", "several passes named 'truncate', in offramp, more"),
        ({"mark_block": "marks:NoPass"}, "mark-block", "several passes named 'mark-block', in "),
    ],
)
def test_a_pass_that_cannot_be_had(packages: Path, points: dict[str, str], text: str, reason: str) -> None:
    _install(packages, "more", **points)
    importlib.invalidate_caches()
    with pytest.raises(SpecError, match=reason):
        parse(text)
    if text != "mark-block":
        assert parse("insert-exits,mark-block")  # the others are there all the same


@pytest.mark.usefixtures("packages")
@pytest.mark.parametrize("returned", [False, True])
@pytest.mark.parametrize(
    ("model", "then"),
    [
        ("encoder", "canonicalize"),
        ("encoder", "insert-exits,insert-adapter,insert-scores{measure=top1|cosine}"),
        ("encoder", "truncate{after=3}"),
        ("encoder", "insert-exits{head=own},truncate{after=2}"),
        ("decoder", "insert-cache"),
        ("decoder", "insert-exits,insert-cache,canonicalize,truncate{after=3}"),
    ],
)
def test_a_record_lives_through_other_passes(
    model: str, then: str, returned: bool, request: pytest.FixtureRequest
) -> None:
    given: Program = request.getfixturevalue(model).program
    program = apply(given, f"mark-block{{after=1,returned={returned}}},{then}")
    (mark,) = marks(program)
    node = program.nodes[mark.node]
    assert (node.target, node.args[1]) == (aten.mul.Tensor, 0.5)
    assert node.args[0] is program.nodes[program.stacks[mark.stack].cuts[1]]
    assert [name for name, made in results(program.graph).items() if made is node] == [mark.output][: int(returned)]
    assert f"            mark       after block 1: {mark.node}\n" in str(program)
    assert all(f"            exit       after block {item.after}: " in str(program) for item in program.exits)


@pytest.mark.usefixtures("packages")
def test_a_record_goes_with_the_blocks_that_go(encoder: tiny.Captured) -> None:
    text = "mark-block{after=1},mark-block{after=2,returned=true},mark-block{after=3,returned=true}"
    program = apply(encoder.program, f"{text},insert-exits{{after=2}},truncate{{after=2}}")
    assert [item.after for item in marks(program)] == [1, 2]
    assert set(results(program.graph)) == {"logits", "encoder.2/mark"}
    tiny.assert_same(tiny.outputs(program.module, encoder.inputs), encoder.truncated(2))


@pytest.mark.usefixtures("packages")
def test_a_record_of_the_output_follows_what_stands_for_it(encoder: tiny.Captured) -> None:
    end = Mark("encoder", 4, encoder.program.stacks["encoder"].output)
    program = apply(replace(encoder.program, records=(end,)), "truncate{after=2}")
    assert marks(program) == [replace(end, node=program.stacks["encoder"].output)]


def test_a_record_is_refused_where_a_pass_cannot_keep_its_nodes(decoder: tiny.Captured) -> None:
    places = next(node.name for node in decoder.program.graph.nodes if node.target is aten.arange.default)
    program = replace(decoder.program, records=(Mark("decoder", 0, places),))
    with pytest.raises(
        PassError, match=rf"insert-cache: the mark \(after block 0: {places}\) needs the nodes"
    ) as caught:
        apply(program, "insert-cache")
    assert caught.value.hint == "insert-cache first, and the pass that adds the record after it"


def test_dropout_that_goes_is_followed() -> None:
    class Dropping(tiny.Encoder):
        def run(self, x: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
            return super().run(torch.nn.functional.dropout(x, 0.1, self.training), mask)

    program = offramp.capture(tiny.seeded(Dropping), tiny.text(), training=True)
    dropped = next(node for node in program.graph.nodes if "kept_dropout" in node.meta)
    plain = replace(program, records=(Mark("encoder", 0, dropped.name),)).without_dropout()
    assert marks(plain)[0].node == str(dropped.args[0])


@pytest.mark.usefixtures("packages")
def test_a_bundle_has_no_use_for_it(decoder: tiny.Captured, tmp_path: Path) -> None:
    program = apply(decoder.program, "insert-exits{after=2},mark-block{after=2,returned=true},insert-cache")
    assert marks(program)[0].node in prepared(program).nodes
    save(program, tmp_path / "marked")
    chain = offramp.load(tmp_path / "marked")
    assert not any("mark" in name for name in chain.manifest.values)
    found = chain.run({"input_ids": decoder.inputs["input_ids"].numpy()})
    torch.testing.assert_close(
        torch.from_numpy(found.outputs["output"]), decoder.eager()["output"], rtol=1e-4, atol=1e-5
    )


def test_a_bundle_feeds_no_inputs_of_others(encoder: tiny.Captured) -> None:
    program = replace(encoder.program, records=(Mark("encoder", 4, "input_ids", feed="attention_mask"),))
    assert program.inputs == ("input_ids",)
    with pytest.raises(
        ExportError, match=r"the mark \(.*\) has the inputs \['attention_mask'\], and nothing feeds them"
    ):
        partition(program)


def test_a_record_without_nodes_needs_nothing_else() -> None:
    class Note(Record):
        pass

    note = Note()
    assert (note.section, note.pinned_nodes, note.graph_inputs, note.graph_outputs) == (None, (), (), ())
    assert note.renamed({"a": "b"}) is note


def test_a_record_with_nodes_says_how_it_is_renamed() -> None:
    class Pin(Record):
        @property
        def pinned_nodes(self) -> tuple[str, ...]:
            return ("a",)

    with pytest.raises(NotImplementedError, match="Pin pins nodes and does not say how it is renamed"):
        Pin().renamed({"a": "b"})


def test_records_of_one_kind_are_exchanged() -> None:
    one, two = Exit("encoder", 1, "a", "b"), Exit("encoder", 2, "c", "d")
    mark = Mark("encoder", 1, "a")
    assert exchanged((one, mark), Exit, [one, two]) == (one, two, mark)


def test_exits_of_an_encoder_live_through_caches(two_stacks: tiny.Captured) -> None:
    """What nothing in the graph reads, the runtime does."""
    program = apply(two_stacks.program, "insert-exits{stack=encoder},insert-cache")
    assert [item.after for item in program.exits_of("encoder")] == [1, 2, 3]
    assert all(item.state in program.nodes for item in program.exits)


@pytest.mark.parametrize("passes", ["", "insert-exits{after=2},insert-scores{measure=top1}", "insert-acm"])
def test_a_deep_copy_has_weights_of_its_own(encoder: tiny.Captured, passes: str) -> None:
    program = offramp.apply(encoder.program, passes)
    copied = copy.deepcopy(program)
    expected = tiny.outputs(program.module, encoder.inputs)
    tiny.assert_same(tiny.outputs(copied.module, encoder.inputs), expected)
    assert (copied.records, copied.history) == (program.records, program.history)
    with torch.no_grad():
        for weight in copied.module.parameters():
            weight.zero_()
    tiny.assert_same(tiny.outputs(program.module, encoder.inputs), expected)
