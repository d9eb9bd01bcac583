"""canonicalize: tidies what passes leave, and keeps what records name."""

from __future__ import annotations

import pytest
import tiny
import torch

from offramp.passes import Canonicalize, apply
from offramp.passes.infra.editor import Editor
from offramp.program import Program
from offramp.program.graph import aten

FULL = (
    "insert-exits{stack=encoder},insert-adapter{stack=encoder},insert-scores{stack=encoder,measure=cosine},"
    "insert-exits{stack=decoder,head=own},insert-adapter{stack=decoder,kind=block},"
    "insert-scores{stack=decoder,measure=top1|entropy|margin|cosine|learned}"
)


def _untidy(program: Program) -> Program:
    """The program with a clone, an unused node, and a computation made twice."""
    editor = Editor(program, "untidy")
    head = editor.graph.output_node().all_input_nodes[0]
    twice = [editor.call(aten.tanh.default, head, at=head) for _ in range(2)]
    total = editor.call(aten.add.Tensor, *twice, at=twice[0])
    editor.returns({"logits": editor.call(aten.clone.default, total, at=total)}, dropped=["logits"])
    editor.call(aten.sin.default, head, at=head)
    return editor.finish().program


def test_it_tidies(encoder: tiny.Captured) -> None:
    untidy = _untidy(encoder.program)
    result = Canonicalize().run(untidy)
    assert result.modified
    assert result.edits["erased"] == 3
    assert tiny.operators(result.program)[-2:] == ["tanh.default", "add.Tensor"]
    expected = {"logits": 2 * encoder.eager()["logits"].tanh()}
    tiny.assert_same(tiny.outputs(result.program.module, encoder.inputs), expected)
    assert result.program.history == ("untidy", "canonicalize")


@pytest.mark.parametrize("name", ["encoder", "labeller", "decoder", "two_stacks", "time_first", "mixing"])
def test_a_captured_program_is_in_canonical_form(name: str, request: pytest.FixtureRequest) -> None:
    captured: tiny.Captured = request.getfixturevalue(name)
    result = Canonicalize().run(captured.program)
    assert not result.modified
    assert result.program is captured.program


def test_it_keeps_what_records_name(two_stacks: tiny.Captured) -> None:
    program = apply(two_stacks.program, FULL)
    tidy = apply(program, "canonicalize")
    assert (tidy.exits, tidy.stacks, tidy.outputs) == (program.exits, program.stacks, program.outputs)
    named = {name for item in tidy.exits for name in (item.hidden, item.state)}
    assert named <= set(tidy.nodes)
    before, after = (tiny.outputs(p.module, two_stacks.inputs) for p in (program, tidy))
    assert list(before) == list(after)
    torch.testing.assert_close(after, before, rtol=0, atol=0)
    for item in tidy.exits_of("encoder"):
        step = f"truncate{{stack=encoder,after={item.after}}}"
        found, expected = (tiny.outputs(apply(p, step).module, two_stacks.inputs) for p in (tidy, program))
        tiny.assert_same({"output": found["output"]}, {"output": expected["output"]}, rtol=0, atol=0)


def test_own_weights_are_not_merged_with_those_they_were_copied_from(decoder: tiny.Captured) -> None:
    program = apply(decoder.program, "insert-exits{head=own},canonicalize")
    own = [name for name, _ in program.module.named_parameters() if name.startswith("exits.")]
    assert len(own) == 3 * (tiny.BLOCKS - 1)


def test_a_second_run_edits_nothing(two_stacks: tiny.Captured, encoder: tiny.Captured) -> None:
    for program in (apply(two_stacks.program, FULL), _untidy(encoder.program)):
        once = Canonicalize().run(program).program
        again = Canonicalize().run(once)
        assert not again.modified
        assert again.program is once
