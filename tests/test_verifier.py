"""The verifier: every named check finds the one thing that is wrong."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import tiny
import torch

from offramp.errors import PassError
from offramp.passes import apply
from offramp.passes.infra.editor import Editor
from offramp.passes.infra.verifier import CHECKS, verify
from offramp.program import Exit, Program
from offramp.program.cache import Cache
from offramp.program.graph import aten, results

FULL = "insert-exits,insert-adapter{kind=bottleneck},insert-scores{measure=top1|cosine}"


def _edited(program: Program, edit: Callable[[Editor], None]) -> Program:
    """The program after an edit that no check has seen."""
    editor = Editor(program, "broken")
    edit(editor)
    return replace(program, graph_module=editor.module)


def _lost_weight(program: Program) -> Program:
    def edit(editor: Editor) -> None:
        del editor.module.get_submodule("head").weight

    return _edited(program, edit)


def _wrong_order(program: Program) -> Program:
    def edit(editor: Editor) -> None:
        output, first = (editor[program.stacks["encoder"].cuts[i]] for i in (-1, 1))
        first.prepend(output)

    return _edited(program, edit)


def _no_shape(program: Program) -> Program:
    def edit(editor: Editor) -> None:
        del editor[program.stacks["encoder"].output].meta["val"]

    return _edited(program, edit)


def _lost_output(program: Program) -> Program:
    return _edited(program, lambda editor: editor.returns({}, dropped=["logits"]))


def _unnamed_output(program: Program) -> Program:
    return _edited(program, lambda editor: editor.returns({"more": results(editor.graph)["logits"]}))


def _lost_score(program: Program) -> Program:
    return _edited(program, lambda editor: editor.returns({}, dropped=["encoder.2/top1"]))


def _with_cuts(program: Program, *cuts: str) -> Program:
    stack = program.stacks["encoder"]
    return replace(program, stacks={"encoder": replace(stack, cuts=cuts)}, records=())


def _bare(program: Program) -> Program:
    """Without exits and what they return."""
    keys = [key for item in program.exits for key in item.graph_outputs]
    dropped = set(keys) - set(program.outputs)
    return replace(_edited(program, lambda editor: editor.returns({}, dropped=dropped)), records=())


def _lost_cut(program: Program) -> Program:
    cuts = program.stacks["encoder"].cuts
    return _with_cuts(_bare(program), cuts[0], "gone", cuts[2])


def _cut_inside_a_branch(program: Program) -> Program:
    """The cut is the attention's output: the residual goes around it."""
    cuts = program.stacks["encoder"].cuts
    inside = next(arg for arg in program.nodes[cuts[2]].all_input_nodes if "linear" in arg.name)
    return _with_cuts(_bare(program), cuts[0], inside.name, cuts[-1])


def _a_leak(program: Program) -> Program:
    """The last block reads what the first one made inside."""

    def edit(editor: Editor) -> None:
        cuts = program.stacks["encoder"].cuts
        made = next(arg for arg in editor[cuts[1]].all_input_nodes if "linear" in arg.name)
        last = editor[cuts[-1]]
        last.replace_input_with(last.all_input_nodes[0], made)

    return _edited(_bare(program), edit)


def _with_exit(program: Program, after: int, **changes: str) -> Program:
    def changed(item: Exit) -> Exit:
        return replace(item, **changes) if item.after == after else item  # type: ignore[arg-type]

    return replace(program, records=tuple(map(changed, program.exits)))


def _wrong_place(program: Program) -> Program:
    return _with_exit(program, 2, hidden=program.stacks["encoder"].cuts[1])


def _late_state(program: Program) -> Program:
    return _with_exit(program, 2, state=program.stacks["encoder"].cuts[3])


def _late_output(program: Program) -> Program:
    def edit(editor: Editor) -> None:
        node = editor.call(aten.neg.default, results(editor.graph)["logits"], at=editor.graph.output_node().prev)
        editor.returns({"encoder.2/logits": node}, dropped=["encoder.2/logits"])

    return _edited(program, edit)


def _late_score(program: Program) -> Program:
    def edit(editor: Editor) -> None:
        node = results(editor.graph)["encoder.3/cosine"]
        editor.returns({"encoder.1/cosine": node}, dropped=["encoder.1/cosine"])

    return _edited(program, edit)


def _lost_cache(program: Program) -> Program:
    return replace(program, records=(*program.records, Cache(("input_ids",), "lengths", "places", {}, {})))


def _other_cache(program: Program) -> Program:
    buffers = {"input_ids": "logits"}
    cache = Cache(("input_ids",), "attention_mask", "attention_mask", buffers, {"input_ids": 1})
    return replace(program, records=(*program.records, cache))


def _lost_state(program: Program) -> Program:
    return _with_exit(program, 2, state="gone")


BROKEN: dict[str, tuple[Callable[[Program], Program], str, str]] = {
    "a weight is gone": (_lost_weight, "graph-is-sound", "weight"),
    "a node reads a later one": (_wrong_order, "graph-is-sound", "before it has been defined"),
    "a node has no shape": (_no_shape, "values-have-shapes", r"nodes without a shape: \['add_\d+'\]"),
    "an output is gone": (_lost_output, "outputs-are-there", r"missing outputs \['logits'\]"),
    "an output is not named": (_unnamed_output, "outputs-are-there", r"nothing names \['more'\]"),
    "a score is gone": (_lost_score, "outputs-are-there", r"missing outputs \['encoder.2/top1'\]"),
    "a cut is gone": (_lost_cut, "cuts-are-closed", r"stack encoder has lost the nodes \['gone'\]"),
    "a cut in a branch": (_cut_inside_a_branch, "cuts-are-closed", "in block 0 of stack encoder and used after"),
    "a leak": (_a_leak, "cuts-are-closed", "is made in block 0 of stack encoder and used after"),
    "an exit elsewhere": (_wrong_place, "exits-are-early", "exit encoder.2 does not leave at its block"),
    "a state is gone": (_lost_state, "records-have-their-nodes", r"after block 2: .* lost the nodes \['gone'\]"),
    "a late state": (_late_state, "exits-are-early", r"exit encoder.2 waits for \['add_\d+'\]"),
    "a late output": (_late_output, "exits-are-early", "exit encoder.2 waits for"),
    "a cache is gone": (_lost_cache, "caches-are-there", r"the graph has no inputs \['lengths', 'places'\]"),
    "a cache of another shape": (_other_cache, "caches-are-there", "input_ids is .*, and logits that replaces it is"),
    "a late score": (_late_score, "exits-are-early", "exit encoder.1 waits for"),
}  # fmt: skip


@pytest.fixture(scope="module")
def sound(encoder: tiny.Captured) -> Program:
    return apply(encoder.program, FULL)


@pytest.mark.parametrize("name", BROKEN)
def test_what_is_wrong_is_found(sound: Program, name: str) -> None:
    breaking, check, reason = BROKEN[name]
    broken = breaking(sound)
    with pytest.raises(PassError, match=f"^somewhere: .*{check}: .*{reason}") as caught:
        verify(broken, "somewhere")
    others = set(CHECKS) - {check}
    assert not [other for other in others if f"{other}: " in str(caught.value)]
    assert caught.value.hint


def test_every_check_has_a_negative_test() -> None:
    assert {check for _, check, _ in BROKEN.values()} == set(CHECKS)


@pytest.mark.parametrize("name", ["encoder", "labeller", "decoder", "two_stacks", "time_first", "mixing"])
def test_sound_programs_pass(name: str, request: pytest.FixtureRequest) -> None:
    program: Program = request.getfixturevalue(name).program
    verify(program, "as captured")
    for stack in program.stacks:
        full = FULL if program.next_stack(stack) is None else FULL.replace("top1|", "")
        verify(
            apply(program, full.replace("}", f",stack={stack}}}").replace("exits,", f"exits{{stack={stack}}},")), "full"
        )


def test_all_problems_are_named_at_once(sound: Program) -> None:
    broken = _with_exit(_lost_output(_no_shape(sound)), 2, hidden="elsewhere")
    with pytest.raises(PassError) as caught:
        verify(broken, "somewhere")
    text = str(caught.value)
    assert all(f"{name}: " in text for name in ("values-have-shapes", "outputs-are-there", "exits-are-early"))


def test_a_broken_program_is_refused_before_the_first_pass(sound: Program) -> None:
    with pytest.raises(PassError, match=r"^before the first pass: outputs-are-there"):
        apply(_unnamed_output(sound), "canonicalize")


def test_the_verifier_reads_no_values(sound: Program) -> None:
    with torch.inference_mode():
        verify(sound, "somewhere")
