"""truncate: the program that always leaves at one place."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import numpy as np
import pytest
import tiny
import torch
from torch import Tensor

import offramp
from offramp.errors import PassError, SpecError
from offramp.export import save
from offramp.passes import PassResult, Truncate, apply
from offramp.runtime.policies.base import Rows, State


@pytest.mark.parametrize("name", ["encoder", "labeller", "decoder", "time_first", "mixing"])
def test_it_computes_what_the_cut_model_computes(name: str, request: pytest.FixtureRequest) -> None:
    captured: tiny.Captured = request.getfixturevalue(name)
    for after in range(1, captured.program.stacks[captured.stack].blocks):
        program = apply(captured.program, [Truncate(after=after)])
        tiny.assert_same(tiny.outputs(program.module, captured.inputs), captured.truncated(after))


def test_what_is_left(encoder: tiny.Captured) -> None:
    result = Truncate(after=2).run(encoder.program)
    program = result.program
    assert result.modified
    assert result.edits["replaced"] > 0
    assert result.edits["erased"] == len(encoder.program.nodes) - len(program.nodes)
    assert tiny.added(encoder.program, program) == []
    assert not {f"blocks.{i}" for i in (2, 3)} & {".".join(n.split(".")[:2]) for n in program.module.state_dict()}
    cuts = encoder.program.stacks["encoder"].cuts
    assert {name: stack.cuts for name, stack in program.stacks.items()} == {"encoder": cuts[:3]}
    assert (program.exits, program.outputs) == ((), ("logits",))
    assert program.history == ("truncate{after=2}",)
    assert cuts[2] in program.nodes
    assert cuts[3] not in program.nodes


def test_it_goes_through_the_exits_adapter_and_head(encoder: tiny.Captured) -> None:
    full = apply(encoder.program, "insert-exits{after=1|2,head=own},insert-adapter{kind=linear}")
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, weight in full.module.named_parameters():
            if name.startswith("exits."):
                weight.add_(torch.randn(weight.shape, generator=generator), alpha=0.25)
    found = tiny.outputs(full.module, encoder.inputs)
    for after in (1, 2):
        program = apply(full, [Truncate(after=after)])
        tiny.assert_same(tiny.outputs(program.module, encoder.inputs), {"logits": found[f"encoder.{after}/logits"]})
        prefixes = {name.split(".")[2] for name in program.module.state_dict() if name.startswith("exits.")}
        assert prefixes == {str(i) for i in range(1, after + 1)}


def test_deeper_exits_go(encoder: tiny.Captured) -> None:
    full = apply(encoder.program, "insert-exits,insert-scores{measure=top1|cosine|learned}")
    program = apply(full, "truncate{after=2}")
    assert [item.after for item in program.exits] == [1]
    found, before = tiny.outputs(program.module, encoder.inputs), tiny.outputs(full.module, encoder.inputs)
    early = {"encoder.1/logits", *program.exits[0].scores.values()}
    assert set(found) == {"logits", *early}
    tiny.assert_same({name: found[name] for name in early}, {name: before[name] for name in early}, rtol=0, atol=0)


ADAPTED = "insert-exits{after=1|3},insert-adapter{kind=norm-linear}"
OWN = "insert-exits{after=1},insert-exits{after=3,head=own}"


@pytest.mark.parametrize(
    ("passes", "steps"),
    [
        ("insert-exits{after=1|3}", "insert-cache,truncate{after=3}"),
        (ADAPTED, "truncate{after=3},insert-cache"),
        (OWN, "insert-cache,truncate{after=3}"),
    ],
)
def test_a_shorter_stack_generates(tmp_path: Path, passes: str, steps: str) -> None:
    """As the whole one does that leaves there at the latest; its early exit is as it was."""
    captured = tiny.captured(tiny.Talker, {"input_ids": tiny.ids()}, seed=4)
    full = apply(captured.program, passes)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, weight in full.module.named_parameters():
            if name.startswith("exits."):
                weight.add_(torch.randn(weight.shape, generator=generator), alpha=0.25)
    save(apply(full, "insert-cache"), tmp_path / "full", target="portable")
    save(apply(full, steps), tmp_path / "short", target="portable")
    whole, short = offramp.load(tmp_path / "full"), offramp.load(tmp_path / "short")
    assert [exit_.after for exit_ in short.stacks["decoder"].exits] == [1, 3]
    for depths in ([3], [1], [1, 1, 3, 1]):
        found, wanted = (
            chain.generate({"input_ids": [[3]]}, partial(_turn, depths), max_new_tokens=12) for chain in (short, whole)
        )
        assert found.tokens[0].tolist() == wanted.tokens[0].tolist()
        assert found.exits[0].tolist() == [depths[i % len(depths)] for i in range(12)]


def _turn(depths: list[int], state: State) -> Rows:
    assert state.steps is not None
    return np.array([depths[step % len(depths)] <= state.after for step in state.steps.tolist()])


def test_one_of_two_stacks(two_stacks: tiny.Captured) -> None:
    exits = "insert-exits{stack=encoder},insert-exits{stack=decoder},insert-scores{stack=decoder}"
    full = apply(two_stacks.program, exits)
    program = apply(full, "truncate{stack=encoder,after=3}")
    assert {name: stack.blocks for name, stack in program.stacks.items()} == {"encoder": 3, "decoder": tiny.BLOCKS - 1}
    assert program.exits == full.exits[:2] + full.exits[tiny.BLOCKS - 1 :]
    found = tiny.outputs(program.module, two_stacks.inputs)
    tiny.assert_same(found, two_stacks.truncated(3, "encoder.blocks"))
    short = apply(program, "truncate{stack=decoder,after=1}")
    both = tiny.cut(tiny.cut(two_stacks.model, 3, "encoder.blocks"), 1, "decoder.blocks")
    tiny.assert_same(tiny.outputs(short.module, two_stacks.inputs), tiny.outputs(both, two_stacks.inputs))
    tiny.assert_same({"output": found["decoder.1/output"]}, tiny.outputs(both, two_stacks.inputs))


def test_the_decoder_alone_keeps_the_exits_of_the_encoder(two_stacks: tiny.Captured) -> None:
    full = apply(two_stacks.program, "insert-exits{stack=encoder,after=2},insert-exits{stack=decoder}")
    program = apply(full, "truncate{stack=decoder,after=2}")
    assert [(item.stack, item.after) for item in program.exits] == [("encoder", 2), ("decoder", 1)]
    assert program.exits[0].state in program.nodes
    expected = two_stacks.truncated(2, "decoder.blocks")
    tiny.assert_same(tiny.outputs(program.module, two_stacks.inputs), expected)
    tiny.assert_same(
        tiny.outputs(apply(program, "truncate{stack=encoder,after=2}").module, two_stacks.inputs),
        tiny.outputs(tiny.cut(tiny.cut(two_stacks.model, 2, "decoder.blocks"), 2, "encoder.blocks"), two_stacks.inputs),
    )


class MemoryToo(tiny.TwoStacks):
    """As the encoder-decoders of transformers do, it returns the encoder's output too."""

    def forward(self, source_ids: Tensor, source_mask: Tensor, input_ids: Tensor) -> dict[str, Tensor]:  # type: ignore[override]
        reach = source_mask.bool()[:, None, None]
        memory = self.encoder.run(self.encoder.embed(source_ids), reach)
        x = self.decoder.embed(input_ids)
        for block in self.decoder.blocks:
            x = block(x, None, memory, reach)
        return {"logits": self.decoder.head(x), "memory": memory}


def test_an_output_that_the_next_stack_reads_too() -> None:
    captured = tiny.captured(MemoryToo, tiny.two_texts())
    program = apply(captured.program, "insert-exits{stack=encoder},insert-exits{stack=decoder}")
    assert [item.outputs for item in program.exits] == [{}] * 3 + [{"logits": f"decoder.{k}/logits"} for k in (1, 2)]
    for stack, path in (("encoder", "encoder.blocks"), ("decoder", "decoder.blocks")):
        short = apply(program, [Truncate(stack, 2)])
        tiny.assert_same(tiny.outputs(short.module, captured.inputs), captured.truncated(2, path))


@pytest.mark.parametrize(
    ("step", "reason"),
    [
        (Truncate(after=1), "say which one"),
        (Truncate("middle"), "unknown stack 'middle'"),
        (Truncate("decoder", 0), "after=0 is no place"),
        (Truncate("decoder", 3), "after=3 is no place"),
        (Truncate("decoder", (1, 2)), "after"),  # type: ignore[arg-type]
        (Truncate("decoder", "all"), "after"),  # type: ignore[arg-type]
        (Truncate("decoder", "two"), "after=two"),  # type: ignore[arg-type]
    ],
    ids=repr,
)
def test_refusals(two_stacks: tiny.Captured, step: Truncate, reason: str) -> None:
    with pytest.raises(SpecError, match=reason):
        apply(two_stacks.program, step)


def test_a_second_truncation_cuts_further(encoder: tiny.Captured) -> None:
    program = apply(encoder.program, "truncate{after=2},truncate{after=1}")
    tiny.assert_same(tiny.outputs(program.module, encoder.inputs), encoder.truncated(1))
    assert program.stacks["encoder"].blocks == 1
    with pytest.raises(SpecError, match="after=1 is no place"):
        apply(program, "truncate{after=1}")


def test_a_result_with_the_deeper_blocks_breaks_the_contract(encoder: tiny.Captured) -> None:
    with pytest.raises(PassError, match="left the stack's output"):
        Truncate(after=2).ensures(encoder.program, PassResult(encoder.program))
