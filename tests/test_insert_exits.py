"""insert-exits: every exit computes what the model cut there computes, and the model's outputs stay."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import tiny
import torch
from hypothesis import given
from hypothesis import strategies as st
from test_stacks import HiddenToo, OnesLike
from torch import nn

from offramp.errors import PassError, SpecError
from offramp.passes import InsertExits, PassResult, Truncate, apply
from offramp.passes.infra.contract import Pass
from offramp.program import Exit, Program, capture
from offramp.program.graph import results

NAMES = ["encoder", "labeller", "decoder", "time_first", "mixing"]


@pytest.fixture
def captured(request: pytest.FixtureRequest) -> tiny.Captured:
    found: tiny.Captured = request.getfixturevalue(request.param)
    return found


def _exit(program: Program, after: int) -> Exit:
    return next(item for item in program.exits if item.after == after)


def _outputs(program: Program, item: Exit, captured: tiny.Captured) -> dict[str, torch.Tensor]:
    found = tiny.outputs(program.module, captured.inputs)
    return {output: found[key] for output, key in item.outputs.items()}


# Fires


@pytest.mark.parametrize("captured", NAMES, indirect=True)
@pytest.mark.parametrize("head", ["shared", "own"])
def test_every_exit_computes_what_the_cut_model_computes(captured: tiny.Captured, head: str) -> None:
    program = apply(captured.program, f"insert-exits{{head={head}}}")
    blocks = captured.program.stacks[captured.stack].blocks
    assert [item.after for item in program.exits_of(captured.stack)] == list(range(1, blocks))
    for item in program.exits:
        tiny.assert_same(_outputs(program, item, captured), captured.truncated(item.after))
    tiny.assert_same(tiny.outputs(program.module, captured.inputs), captured.program.example_outputs, 0, 0)


def test_the_record_of_an_exit(encoder: tiny.Captured) -> None:
    result = InsertExits(after=2).run(encoder.program)
    (item,) = result.program.exits
    assert (item.stack, item.after, item.head, item.adapter, item.scores) == ("encoder", 2, "shared", "identity", {})
    assert item.hidden == encoder.program.stacks["encoder"].cuts[2]
    assert item.outputs == {"logits": "encoder.2/logits"}
    assert result.modified
    assert result.edits["inserted"] == len(tiny.added(encoder.program, result.program))
    assert result.program.history == ("insert-exits{after=2}",)
    assert result.program.outputs == ("logits",)


def test_the_given_program_stays_as_it_was(encoder: tiny.Captured) -> None:
    before = str(encoder.program.graph)
    apply(encoder.program, "insert-exits{head=own}")
    assert str(encoder.program.graph) == before
    assert (encoder.program.exits, encoder.program.history) == ((), ())
    assert not any("exits." in name for name in encoder.program.module.state_dict())


def test_all_exits_at_other_sizes(encoder: tiny.Captured) -> None:
    program = apply(encoder.program, "insert-exits")
    inputs = {"input_ids": tiny.ids(4, 3), "attention_mask": tiny.padding(4, 3)}
    found = tiny.outputs(program.module, inputs)
    for item in program.exits:
        expected = encoder.truncated(item.after, inputs=inputs)
        torch.testing.assert_close(found[item.outputs["logits"]], expected["logits"], rtol=1e-5, atol=1e-6)


@given(after=st.sets(st.integers(1, tiny.BLOCKS - 1), min_size=1), head=st.sampled_from(["shared", "own"]))
def test_any_subset_of_exits(encoder: tiny.Captured, after: set[int], head: str) -> None:
    program = apply(encoder.program, f"insert-exits{{after={'|'.join(map(str, after))},head={head}}}")
    assert {item.after for item in program.exits} == after
    for item in program.exits:
        truncated = apply(program, [Truncate(after=item.after)])
        tiny.assert_same(tiny.outputs(truncated.module, encoder.inputs), _outputs(program, item, encoder), 0, 0)
        tiny.assert_same(_outputs(program, item, encoder), encoder.truncated(item.after))


def test_outputs_that_leave_the_stack_bare_and_outputs_beside_it() -> None:
    captured = tiny.captured(HiddenToo, tiny.text(), dynamic={})
    program = apply(captured.program, "insert-exits{after=2}")
    (item,) = program.exits
    assert item.outputs == {"logits": "encoder.2/logits", "hidden": "encoder.2/hidden"}
    assert results(program.graph)["encoder.2/hidden"].name == item.state
    expected = captured.truncated(2)
    tiny.assert_same(_outputs(program, item, captured), {name: expected[name] for name in item.outputs})


def test_a_tail_that_makes_a_tensor_like_the_hidden_state() -> None:
    captured = tiny.captured(OnesLike, tiny.text(), dynamic={})
    program = apply(captured.program, "insert-exits{after=2}")
    (item,) = program.exits
    tiny.assert_same(_outputs(program, item, captured), captured.truncated(2))


def test_exits_of_a_stack_that_another_one_follows(two_stacks: tiny.Captured) -> None:
    program = apply(two_stacks.program, "insert-exits{stack=encoder},insert-exits{stack=decoder}")
    assert [item.outputs for item in program.exits_of("encoder")] == [{}] * (tiny.BLOCKS - 1)
    for item in program.exits_of("encoder"):
        short = apply(program, [Truncate("encoder", item.after)])
        earlier = [("encoder", after) for after in range(1, item.after)]
        assert [(e.stack, e.after) for e in short.exits] == [*earlier, ("decoder", 1), ("decoder", 2)]
        expected = two_stacks.truncated(item.after, "encoder.blocks")
        tiny.assert_same(tiny.outputs(short.module, two_stacks.inputs), expected)
    for item in program.exits_of("decoder"):
        expected = two_stacks.truncated(item.after, "decoder.blocks")
        tiny.assert_same(_outputs(program, item, two_stacks), expected)


# Own heads


def test_weights_of_an_own_head(decoder: tiny.Captured) -> None:
    program = apply(decoder.program, "insert-exits{after=2,head=own}")
    weights = dict(program.module.named_parameters())
    own = {name: weight for name, weight in weights.items() if name.startswith("exits.")}
    assert set(own) == {
        "exits.decoder.2.words.weight",  # the head, which is tied to the table of words
        "exits.decoder.2.leave.weight",
        "exits.decoder.2.leave.bias",
    }
    for name, weight in own.items():
        original = weights[name.removeprefix("exits.decoder.2.")]
        assert weight is not original
        assert weight.equal(original)
        assert weight.untyped_storage().data_ptr() != original.untyped_storage().data_ptr()
    assert _exit(program, 2).head == "own"


def test_training_own_heads_leaves_the_models_head_alone() -> None:
    captured = tiny.captured(partial(tiny.Encoder, "post"), tiny.text(), dynamic={})
    program = apply(captured.program, "insert-exits{head=own}")
    module, target = program.module, torch.tensor([0, 2])
    heads = {name: weight for name, weight in module.named_parameters() if name.startswith("exits.")}
    kept = {name: weight.clone() for name, weight in captured.model.named_parameters()}
    optimizer = torch.optim.SGD(heads.values(), lr=0.1)

    def losses() -> torch.Tensor:
        found = module(**captured.inputs)
        keys = [item.outputs["logits"] for item in program.exits]
        return torch.stack([nn.functional.cross_entropy(found[key], target) for key in keys])

    start = losses()
    start.sum().backward()
    optimizer.step()
    assert bool((losses() < start).all())
    torch.testing.assert_close(dict(captured.model.named_parameters()), kept, rtol=0, atol=0)
    tiny.assert_same(tiny.outputs(module, captured.inputs), captured.program.example_outputs)


def test_training_all_exits_trains_the_captured_model() -> None:
    model = tiny.seeded(tiny.Encoder)
    captured = tiny.Captured(model, tiny.text(), capture(model, tiny.text(), dynamic={}))
    program = apply(captured.program, "insert-exits{head=own}")
    module, target = program.module, torch.tensor([0, 2])
    before = {name: weight.clone() for name, weight in captured.model.named_parameters()}
    optimizer = torch.optim.SGD(module.parameters(), lr=0.05)

    def loss() -> torch.Tensor:
        found = module(**captured.inputs)
        keys = ["logits", *(item.outputs["logits"] for item in program.exits)]
        return torch.stack([nn.functional.cross_entropy(found[key], target) for key in keys]).sum()

    start = loss()
    start.backward()
    optimizer.step()
    assert loss() < start
    assert not [name for name, weight in captured.model.named_parameters() if weight.equal(before[name])]
    heads = [captured.model.get_parameter("head.weight")]
    heads += [module.get_parameter(f"exits.encoder.{item.after}.head.weight") for item in program.exits]
    assert len({tuple(head.flatten().tolist()) for head in heads}) == len(heads)
    tiny.assert_same(tiny.outputs(module, captured.inputs), captured.eager())


# Refusals


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"stack": "middle"}, r"unknown stack 'middle'; the program has \['encoder', 'decoder'\]"),
        ({}, r"the program has the stacks \['encoder', 'decoder'\]: say which one"),
        ({"stack": "encoder", "after": 0}, "after=0 is no place for an exit: stack 'encoder' has 4 blocks"),
        ({"stack": "encoder", "after": tiny.BLOCKS}, "after=4 is no place"),
        ({"stack": "decoder", "after": (1, 3, 7)}, r"after=3\|7 is no place"),
        ({"stack": "decoder", "after": -1}, "after=-1 is no place"),
        ({"stack": "decoder", "after": ()}, "is no place"),
        ({"stack": "decoder", "after": ("two",)}, "after=two is no place"),
        ({"stack": "decoder", "head": "none"}, "head='none': there are shared and own"),
        ({"stack": "encoder", "head": "own"}, "stack 'encoder' ends in stack 'decoder', not in a head"),
    ],
)
def test_refusals(two_stacks: tiny.Captured, options: dict[str, object], reason: str) -> None:
    with pytest.raises(SpecError, match=reason):
        apply(two_stacks.program, InsertExits(**options))  # type: ignore[arg-type]


# Contract


def test_a_result_that_lacks_an_exit_breaks_the_contract(encoder: tiny.Captured) -> None:
    step: Pass = InsertExits(after=(1, 2))
    result = step.run(encoder.program)
    step.ensures(encoder.program, result)
    short = PassResult(replace(result.program, records=result.program.exits[:1]))
    with pytest.raises(PassError, match=r"left out the exits after \[2\]"):
        step.ensures(encoder.program, short)


def test_a_second_run_adds_nothing(encoder: tiny.Captured) -> None:
    step = InsertExits(after=(1, 3))
    once = step.run(encoder.program).program
    again = step.run(once)
    assert not again.modified
    assert again.program is once
    assert [note for note in again.notes if "already" in note] == [
        "stack encoder has an exit after block 1 already",
        "stack encoder has an exit after block 3 already",
    ]


def test_only_what_is_missing_is_added(encoder: tiny.Captured) -> None:
    some = apply(encoder.program, "insert-exits{after=2,head=own}")
    result = InsertExits().run(some)
    assert len(result.notes) == 1
    assert [(item.after, item.head) for item in result.program.exits_of("encoder")] == [
        (1, "shared"),
        (2, "own"),
        (3, "shared"),
    ]


@pytest.mark.parametrize("head", ["shared", "own"])
def test_provenance(encoder: tiny.Captured, head: str) -> None:
    text = f"insert-exits{{head={head}}}" if head == "own" else "insert-exits"
    program = apply(encoder.program, text)
    tiny.assert_provenance(encoder.program, program, text)
    state = program.nodes[_exit(program, 2).state]
    assert state.meta["provenance"]["from"] == _exit(program, 2).hidden


def test_counts_of_numpy_are_counts(encoder: tiny.Captured) -> None:
    program = InsertExits(after=np.int64(2)).run(encoder.program).program  # type: ignore[arg-type]
    assert [item.after for item in program.exits] == [2]
