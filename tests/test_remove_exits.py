"""remove-exits: what is left is what had been there without them."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import tiny
import torch
from hypothesis import given
from hypothesis import strategies as st

import offramp
from offramp.errors import PassError, SpecError
from offramp.export import save
from offramp.passes import PassResult, RemoveExits, apply

EVERY = range(1, tiny.BLOCKS)
SCORED = "insert-adapter{kind=norm-linear},insert-scores{measure=top1|cosine|learned}"


@given(
    after=st.sets(st.sampled_from(EVERY), min_size=1, max_size=len(EVERY) - 1),
    head=st.sampled_from(["shared", "own"]),
)
@pytest.mark.slow
def test_it_is_as_if_they_had_never_been_there(encoder: tiny.Captured, after: set[int], head: str) -> None:
    full = apply(encoder.program, f"insert-exits{{head={head}}},{SCORED}")
    program = apply(full, [RemoveExits(after=tuple(after))])
    left = "|".join(str(count) for count in EVERY if count not in after)
    expected = apply(encoder.program, f"insert-exits{{after={left},head={head}}},{SCORED}")
    assert [item.after for item in program.exits] == [item.after for item in expected.exits]
    assert program.module.state_dict().keys() == expected.module.state_dict().keys()
    before, found = (tiny.outputs(each.module, encoder.inputs) for each in (full, program))
    assert found.keys() == tiny.outputs(expected.module, encoder.inputs).keys()
    tiny.assert_same(before, found, 0, 0)


def test_the_record(encoder: tiny.Captured) -> None:
    full = apply(encoder.program, "insert-exits")
    result = RemoveExits(after=(1, 3)).run(full)
    assert [item.after for item in result.program.exits] == [2]
    assert result.edits["erased"] == len(full.nodes) - len(result.program.nodes) > 0
    assert result.program.history == ("insert-exits", "remove-exits{after=1|3}")
    assert tiny.added(full, result.program) == []
    assert full.exits[0].state in full.nodes


def test_exits_of_one_stack_of_two(two_stacks: tiny.Captured) -> None:
    full = apply(
        two_stacks.program, "insert-exits{stack=encoder},insert-exits{stack=decoder},insert-scores{stack=decoder}"
    )
    program = apply(full, "remove-exits{stack=encoder}")
    assert program.exits == full.exits[len(EVERY) :]
    program = apply(full, "remove-exits{stack=decoder,after=1}")
    assert program.exits == tuple(item for item in full.exits if (item.stack, item.after) != ("decoder", 1))
    before, found = (tiny.outputs(each.module, two_stacks.inputs) for each in (full, program))
    tiny.assert_same(before, found, 0, 0)


def test_without_exits_nothing_scores(encoder: tiny.Captured) -> None:
    program = apply(encoder.program, f"insert-exits,{SCORED},remove-exits{{after=1|2}}")
    assert program.exits[-1].after == tiny.BLOCKS
    program = apply(program, "remove-exits")
    assert program.exits == ()
    assert tiny.outputs(program.module, encoder.inputs).keys() == {"logits"}


def test_full_depth_keeps_what_it_scores(decoder: tiny.Captured) -> None:
    scores = f"insert-scores{{measure=top1-short|prediction-short,ids=1|2|3,after=2|{tiny.BLOCKS}}}"
    program = apply(decoder.program, f"insert-exits{{after=2}},{scores},remove-exits")
    assert [item.after for item in program.exits] == [tiny.BLOCKS]
    assert list(program.exits[0].scores) == ["top1-short", "prediction-short"]


@pytest.mark.parametrize("steps", ["insert-cache,remove-exits{after=1}", "remove-exits{after=1},insert-cache"])
def test_a_decoder_generates_with_what_is_left(tmp_path: Path, steps: str) -> None:
    captured = tiny.captured(tiny.Talker, {"input_ids": tiny.ids()}, seed=4)
    full = apply(captured.program, "insert-exits{after=1|3},insert-scores{measure=top1}")
    save(apply(full, "insert-cache"), tmp_path / "full", target="portable", segments=1)
    save(apply(full, steps), tmp_path / "fewer", target="portable", segments=1)
    whole, fewer = offramp.load(tmp_path / "full"), offramp.load(tmp_path / "fewer")
    assert [exit_.after for exit_ in fewer.stacks["decoder"].exits[:-1]] == [3]
    parts = [len(chain.stacks["decoder"].parts) for chain in (whole, fewer)]
    assert parts == [3, 2]
    for policy in (offramp.Never(), offramp.Confidence(thresholds={3: 0.2})):
        found, wanted = (chain.generate({"input_ids": [[3]]}, policy, max_new_tokens=12) for chain in (fewer, whole))
        assert found.tokens[0].tolist() == wanted.tokens[0].tolist()
        assert found.exits[0].tolist() == wanted.exits[0].tolist()


@pytest.mark.parametrize(
    ("step", "reason"),
    [
        (RemoveExits(), "say which one"),
        (RemoveExits("middle"), "unknown stack 'middle'"),
        (RemoveExits("decoder", 3), "after=3 is no place"),
        (RemoveExits("decoder", "two"), "after=two"),  # type: ignore[arg-type]
    ],
    ids=repr,
)
def test_refusals(two_stacks: tiny.Captured, step: RemoveExits, reason: str) -> None:
    with pytest.raises(SpecError, match=reason):
        apply(two_stacks.program, step)


def test_where_there_is_none_nothing_changes(encoder: tiny.Captured) -> None:
    once = apply(encoder.program, "insert-exits{after=1|2},remove-exits{after=1}")
    again = RemoveExits(after=(1, 3)).run(once)
    assert again.program is once
    assert again.notes == ("there is no exit after block 1", "there is no exit after block 3")
    assert RemoveExits().run(encoder.program).notes == ("there is no exit",)


def test_a_result_with_an_exit_breaks_the_contract(encoder: tiny.Captured) -> None:
    full = apply(encoder.program, "insert-exits{after=1|2}")
    with pytest.raises(PassError, match=r"left the exits after \[2\]"):
        RemoveExits(after=2).ensures(full, PassResult(replace(full)))


def test_trained_weights_of_other_exits_stay(encoder: tiny.Captured) -> None:
    full = apply(encoder.program, "insert-exits{after=1|2},insert-adapter{kind=linear}")
    with torch.no_grad():
        full.module.get_parameter("exits.encoder.2.adapter.linear.weight").fill_(0.5)
    program = apply(full, "remove-exits{after=1}")
    assert program.module.get_parameter("exits.encoder.2.adapter.linear.weight").detach().unique().tolist() == [0.5]
