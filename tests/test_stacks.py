"""Stacks: found from structure, cut where the model's own blocks end, named by path and role.

The test of a cut is arithmetic: a program truncated after k blocks computes what the eager model computes whose
list of blocks ends after k.
"""

# mypy: disable-error-code="no-any-return"
from __future__ import annotations

from collections.abc import Callable
from functools import cache, partial
from typing import Any

import pytest
import tiny
import torch
from tiny import BLOCKS, CLASSES, WIDTH, Attention, Encoder
from torch import Tensor, nn

from offramp.errors import StructureError
from offramp.passes import Truncate
from offramp.program import Program, capture
from offramp.program.analysis import stacks
from offramp.program.analysis.attention_search import attention_sites
from offramp.program.graph import results
from offramp.program.program import evaluate


class MaskBehind(Encoder):
    def run(self, x: Tensor, mask: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x, mask) * mask[:, 0, 0, :, None]
        return x


class MaskBefore(Encoder):
    def run(self, x: Tensor, mask: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x * mask[:, 0, 0, :, None], mask)
        return x


class MaskAround(Encoder):
    def run(self, x: Tensor, mask: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x * mask[:, 0, 0, :, None], mask).tanh()
        return x


class Between(Encoder):
    """An operation between blocks, but not before the first."""

    def run(self, x: Tensor, mask: Tensor) -> Tensor:
        for number, block in enumerate(self.blocks):
            x = block(x.tanh() if number else x, mask)
        return x


class ScaledEmbedding(Encoder):
    def embed(self, input_ids: Tensor) -> Tensor:
        return super().embed(input_ids) * WIDTH**0.5


class AttentionOnly(Encoder):
    def run(self, x: Tensor, mask: Tensor) -> Tensor:
        for block in self.blocks:
            x = x + block.attend(block.norms[0](x), mask)
        return x


class MLPFirst(Encoder):
    def run(self, x: Tensor, mask: Tensor) -> Tensor:
        for block in self.blocks:
            x = x + block.mlp(block.norms[0](x))
            x = x + block.attend(block.norms[1](x), mask)
        return x


class MixedNorms(Encoder):
    """The norm lies behind the attention and before the MLP."""

    def run(self, x: Tensor, mask: Tensor) -> Tensor:
        for block in self.blocks:
            x = block.norms[0](x + block.attend(x, mask))
            x = x + block.mlp(block.norms[1](x))
        return x


class MaskedWordHead(Encoder):
    """The head has a dense layer of the blocks' width and a norm: a trap for the phase."""

    def __init__(self) -> None:
        super().__init__("post", enter=True, pooled=False)
        self.dense = nn.Linear(WIDTH, WIDTH)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> dict[str, Tensor]:
        x = self.run(self.embed(input_ids), attention_mask.bool()[:, None, None])
        return {"logits": self.head(self.leave(self.dense(x).relu()))}


class AttentionPooling(Encoder):
    def __init__(self) -> None:
        super().__init__()
        self.query, self.pool = nn.Parameter(torch.randn(1, 1, WIDTH)), Attention()

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> dict[str, Tensor]:
        mask = attention_mask.bool()[:, None, None]
        x = self.leave(self.run(self.embed(input_ids), mask))
        return {"logits": self.head(self.pool(self.query.expand(x.shape[0], -1, -1), x, mask)[:, 0])}


class Strided(Encoder):
    """A convolution before the blocks halves the sequence."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv1d(WIDTH, WIDTH, 3, 2, 1)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> dict[str, Tensor]:
        x = self.conv(self.embed(input_ids).mT).mT
        for block in self.blocks:
            x = block(x, None)
        return {"logits": self.head(self.leave(x + self.places(torch.arange(x.shape[1]))).mean(1))}


class Flat(Encoder):
    """Rows and tokens share one axis everywhere but in attention."""

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> dict[str, Tensor]:
        rows, tokens = input_ids.shape
        x, mask = self.embed(input_ids).reshape(rows * tokens, WIDTH), attention_mask.bool()[:, None, None]
        for block in self.blocks:
            y = block.norms[0](x).reshape(rows, tokens, WIDTH)
            x = x + block.attend(y, mask).reshape(rows * tokens, WIDTH)
            x = x + block.mlp(block.norms[1](x))
        return {"logits": self.head(self.leave(x)).reshape(rows, tokens, CLASSES)}


class HiddenToo(Encoder):
    """The hidden state that leaves the stack is an output, and so is something that never was in it."""

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> dict[str, Tensor]:
        x = self.run(self.embed(input_ids), attention_mask.bool()[:, None, None])
        return {"logits": self.head(self.leave(x)), "hidden": x, "lengths": attention_mask.sum(1)}


class OnesLike(Encoder):
    """The tail makes a tensor of the hidden state's shape."""

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> dict[str, Tensor]:
        x = self.leave(self.run(self.embed(input_ids), attention_mask.bool()[:, None, None]))
        weights = torch.ones_like(x) * attention_mask[..., None]
        return {"logits": self.head((x * weights).sum(1) / weights.sum(1))}


MODELS: dict[str, Callable[[], nn.Module]] = {
    "norm before": Encoder,
    "norm before, last norm missing": partial(Encoder, leave=False),
    "norm before, embedding norm": partial(Encoder, enter=True),
    "norm behind": partial(Encoder, "post", leave=False),
    "norm behind, embedding norm": partial(Encoder, "post", enter=True, leave=False),
    "norm behind, last norm": partial(Encoder, "post"),
    "norm behind, embedding and last norm": partial(Encoder, "post", enter=True),
    "sandwich": partial(Encoder, "sandwich", enter=True),
    "parallel": partial(Encoder, "parallel"),
    "norms behind and before": MixedNorms,
    "attention only": AttentionOnly,
    "mlp first": MLPFirst,
    "scaled embedding": ScaledEmbedding,
    "mask behind every block": MaskBehind,
    "mask before every block": MaskBefore,
    "mask before and tanh behind": MaskAround,
    "tanh between": Between,
    "dense layer and norm in the head": MaskedWordHead,
    "attention in the head": AttentionPooling,
    "strided": Strided,
    "rows and tokens on one axis": Flat,
    "hidden state returned": HiddenToo,
    "ones like the hidden state": OnesLike,
}


MOVING = ("strided", "rows and tokens on one axis", "hidden state returned", "ones like the hidden state")


@cache
def _captured(name: str) -> tiny.Captured:
    return tiny.captured(MODELS[name], tiny.text(), dynamic=None if name in MOVING else {})


def _assert_cut_like_the_model(captured: tiny.Captured, stack: str, path: str = "blocks") -> None:
    program = captured.program
    for blocks in range(1, program.stacks[stack].blocks):
        short = Truncate(stack, blocks).run(program).program
        expected = captured.truncated(blocks, path)
        tiny.assert_same(tiny.outputs(short.module, captured.inputs), expected)
        with pytest.raises(AssertionError):
            tiny.assert_same(captured.program.example_outputs, expected)


@pytest.mark.parametrize("name", MODELS)
def test_cuts_lie_between_the_models_blocks(name: str) -> None:
    captured = _captured(name)
    (stack,) = captured.program.stacks.values()
    assert (stack.name, stack.role, stack.blocks, stack.path) == ("encoder", "encoder", BLOCKS, "blocks")
    _assert_cut_like_the_model(captured, stack.name)


def test_the_cuts_of_a_decoder(decoder: tiny.Captured) -> None:
    (stack,) = decoder.program.stacks.values()
    assert (stack.name, stack.role, stack.blocks, stack.path) == ("decoder", "decoder", BLOCKS, "blocks")
    _assert_cut_like_the_model(decoder, "decoder")


def test_the_cuts_where_time_comes_first(time_first: tiny.Captured) -> None:
    _assert_cut_like_the_model(time_first, time_first.stack)


def test_the_cuts_where_rows_mix(mixing: tiny.Captured) -> None:
    _assert_cut_like_the_model(mixing, mixing.stack)


# Two stacks


def test_the_cuts_of_two_stacks(two_stacks: tiny.Captured) -> None:
    stacks = two_stacks.program.stacks
    assert [(s.name, s.role, s.blocks, s.path) for s in stacks.values()] == [
        ("encoder", "encoder", BLOCKS, "encoder.blocks"),
        ("decoder", "decoder", 3, "decoder.blocks"),
    ]
    for name in stacks:
        _assert_cut_like_the_model(two_stacks, name, f"{name}.blocks")


def test_the_next_stack_reads_the_output_of_the_one_before(two_stacks: tiny.Captured) -> None:
    assert two_stacks.program.next_stack("encoder") == "decoder"
    assert two_stacks.program.next_stack("decoder") is None


def test_the_order_of_the_forward_does_not_matter(two_stacks: tiny.Captured) -> None:
    """The decoder's words are embedded first, but its blocks need the encoder's."""
    turned = tiny.captured(partial(tiny.TwoStacks, target_first=True), tiny.two_texts()).program
    assert {name: stack.role for name, stack in turned.stacks.items()} == {
        "encoder": "encoder",
        "decoder": "decoder",
    }
    assert turned.next_stack("encoder") == "decoder"
    assert turned.next_stack("decoder") is None
    tiny.assert_same(turned.example_outputs, two_stacks.program.example_outputs)


class Stages(nn.Module):
    """Three kinds of blocks one after the other, of two widths."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = (Encoder(norm) for norm in ("pre", "post", "parallel"))
        for part in (self.a, self.b, self.c):
            part.blocks = part.blocks[:2]
        self.merge = nn.Linear(2 * WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        for part in (self.a, self.b, self.c):
            for block in part.blocks:
                x = block(x, None)
            x = self.merge(x.unflatten(1, (-1, 2)).flatten(2)) if part is self.a else x
        return self.c.head(x)


def test_of_stages_each_knows_the_next() -> None:
    captured = tiny.captured(Stages, {"x": torch.randn(2, 12, WIDTH)}, dynamic={"x": {0: "batch"}})
    stacks = captured.program.stacks
    assert [(stack.path, stack.blocks) for stack in stacks.values()] == [(f"{n}.blocks", 2) for n in "abc"]
    a, b, c = stacks
    assert [captured.program.next_stack(name) for name in (a, b, c)] == [b, c, None]
    for name, stack in stacks.items():
        _assert_cut_like_the_model(captured, name, stack.path)


class Towers(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.query, self.passage = Encoder(), Encoder("post")

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        parts = [part(input_ids, attention_mask)["logits"] for part in (self.query, self.passage)]
        return parts[0] * parts[1]


def test_two_towers_do_not_follow_each_other() -> None:
    captured = tiny.captured(Towers, tiny.text(), dynamic={})
    program = captured.program
    assert [stack.path for stack in program.stacks.values()] == ["query.blocks", "passage.blocks"]
    assert [program.next_stack(name) for name in program.stacks] == [None, None]
    for name, stack in program.stacks.items():
        _assert_cut_like_the_model(captured, name, stack.path)


# Names


class Plain(Encoder):
    """Blocks are attributes of the model."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.third, self.fourth = self.blocks
        del self.blocks

    def run(self, x: Tensor, mask: Tensor) -> Tensor:
        return self.fourth(self.third(self.second(self.first(x, mask), mask), mask), mask)


def test_blocks_that_are_attributes_have_no_path() -> None:
    captured = tiny.captured(Plain, tiny.text(), dynamic={})
    (stack,) = captured.program.stacks.values()
    assert (stack.name, stack.path, stack.blocks) == ("stack0", "", BLOCKS)
    expected = _captured("norm before").truncated(2)
    model = tiny.outputs(Truncate(after=2).run(captured.program).program.module, captured.inputs)
    assert model["logits"].shape == expected["logits"].shape


class Nameless(nn.Module):
    """Every weight is an attribute of the model with a number, and there are no modules."""

    def __init__(self) -> None:
        super().__init__()
        for index in range(3 * BLOCKS):
            self.register_parameter(f"w{index}", nn.Parameter(torch.randn(WIDTH, WIDTH) / 4))

    def forward(self, x: Tensor) -> Tensor:
        for index in range(0, 3 * BLOCKS, 3):
            x = self.block(x, *(self.get_parameter(f"w{index + i}") for i in range(3)))
        return x.sum(-1)

    @staticmethod
    def block(x: Tensor, q: Tensor, kv: Tensor, mlp: Tensor) -> Tensor:
        x = x + ((x @ q) @ (x @ kv).mT).softmax(-1) @ (x @ kv)
        return x + (x @ mlp).relu()


def test_a_graph_without_any_module() -> None:
    program = capture(tiny.seeded(Nameless), {"x": torch.randn(2, 5, WIDTH)})
    (stack,) = program.stacks.values()
    assert (stack.name, stack.path, stack.blocks, stack.role) == ("stack0", "", BLOCKS, "encoder")
    assert stack.input == "x"


class Looped(Encoder):
    """One block, four times."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks, self.times = self.blocks[:1], BLOCKS

    def run(self, x: Tensor, mask: Tensor) -> Tensor:
        for _ in range(self.times):
            x = self.blocks[0](x, mask)
        return x


def test_a_loop_over_one_block() -> None:
    captured = tiny.captured(Looped, tiny.text(), dynamic={})
    (stack,) = captured.program.stacks.values()
    assert stack.blocks == BLOCKS
    assert isinstance(captured.model, Looped)
    for times in range(1, BLOCKS):
        short = Truncate(after=times).run(captured.program).program
        captured.model.times = times
        tiny.assert_same(tiny.outputs(short.module, captured.inputs), captured.eager())


# Awkward shapes


class LongSkip(Encoder):
    """The embedding goes around all blocks."""

    def run(self, x: Tensor, mask: Tensor) -> Tensor:
        return x + super().run(x, mask)


@pytest.mark.xfail(reason="the first block lies off the chain of joins, and belongs to no stack")
def test_a_skip_around_the_stack() -> None:
    captured = tiny.captured(LongSkip, tiny.text(), dynamic={})
    (stack,) = captured.program.stacks.values()
    assert stack.blocks == BLOCKS
    _assert_cut_like_the_model(captured, stack.name)


class ShortLast(Encoder):
    """The last block has no MLP."""

    def run(self, x: Tensor, mask: Tensor) -> Tensor:
        for block in self.blocks[:-1]:
            x = block(x, mask)
        return x + self.blocks[-1].attend(self.blocks[-1].norms[0](x), mask)


@pytest.mark.xfail(reason="of two phases that cover as much, the later is taken")
def test_a_last_block_that_lacks_its_mlp() -> None:
    captured = tiny.captured(ShortLast, tiny.text(), dynamic={})
    (stack,) = captured.program.stacks.values()
    first = captured.model.get_submodule("blocks.0")
    assert isinstance(captured.model, ShortLast)
    assert stack.blocks == BLOCKS - 1
    with torch.no_grad():
        mask = captured.inputs["attention_mask"].bool()[:, None, None]
        after_one = first(captured.model.embed(captured.inputs["input_ids"]), mask)
        values = _values(captured, stack.cuts[1])
    torch.testing.assert_close(values, after_one)


def _values(captured: tiny.Captured, name: str) -> Tensor:
    node = captured.program.nodes[name]
    return evaluate(captured.program.graph_module, [node], captured.inputs)[node]


class AllHidden(Encoder):
    """Every hidden state is an output: no stack can be left."""

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> dict[str, Tensor]:
        states = [self.embed(input_ids)]
        for block in self.blocks:
            states.append(block(states[-1], attention_mask.bool()[:, None, None]))
        return {"logits": self.head(self.leave(states[-1])), "states": torch.stack(states)}


class OneBlock(Encoder):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = self.blocks[:1]


class NoAttention(Encoder):
    def run(self, x: Tensor, mask: Tensor) -> Tensor:
        for block in self.blocks:
            x = x + block.mlp(block.norms[0](x))
        return x


@pytest.mark.parametrize("make", [AllHidden, OneBlock, NoAttention])
def test_where_there_is_no_stack_the_program_says_why(make: Callable[[], nn.Module]) -> None:
    program = capture(tiny.seeded(make), tiny.text(), dynamic={})
    assert program.stacks == {}
    with pytest.raises(StructureError, match=r"no stack: .+") as caught:
        program.require_stacks()
    assert caught.value.hint


class Classified(Encoder):
    """A class of each row after every block."""

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Any:
        x, made = self.embed(input_ids), []
        for block in self.blocks:
            x = block(x, attention_mask.bool()[:, None, None])
            made.append(self.head(self.leave(x).mean(1)))
        return tuple(made)


def test_the_hint_names_the_output_behind_all_blocks() -> None:
    program = capture(tiny.seeded(Classified), tiny.text(), dynamic={})
    with pytest.raises(StructureError, match=r"the outputs \['output0', 'output1', 'output2'\]") as caught:
        program.require_stacks()
    assert "returns 'output3' only" in str(caught.value.hint)


class Weighted(Encoder):
    """The head reads a sum of the states behind all blocks."""

    def run(self, x: Tensor, mask: Tensor) -> Tensor:
        states = []
        for block in self.blocks:
            x = block(x, mask)
            states.append(x)
        return torch.stack(states).mean(0)


class WeightedNorms(Encoder):
    """The same, where each block ends in a norm."""

    def run(self, x: Tensor, mask: Tensor) -> Tensor:
        states = []
        for block in self.blocks:
            x = nn.functional.layer_norm(block(x, mask), (WIDTH,), block.norms[0].weight)
            states.append(x)
        return torch.stack(states).mean(0)


@pytest.mark.parametrize("make", [Weighted, WeightedNorms])
def test_where_the_head_reads_the_states_between_blocks_the_reason_names_it(make: Callable[[], nn.Module]) -> None:
    program = capture(tiny.seeded(make), tiny.text(), dynamic={})
    reason = r"no stack: 4 blocks repeat, but .* reads states between them, first in stack \(the model .*:\d+\)"
    with pytest.raises(StructureError, match=reason) as caught:
        program.require_stacks()
    assert "the state behind the last block alone" in str(caught.value.hint)


class LongHead(Encoder):
    """Behind the last block come many steps, then the state behind the first one is read."""

    def run(self, x: Tensor, mask: Tensor) -> Tensor:
        first = x = self.blocks[0](x, mask)
        for block in self.blocks[1:]:
            x = block(x, mask)
        for _ in range(20):
            x = torch.tanh(x)
        return x + first


def test_the_reason_is_found_without_a_search_for_each_step_of_the_head(monkeypatch: pytest.MonkeyPatch) -> None:
    program, searches = capture(tiny.seeded(LongHead), tiny.text(), dynamic={}), list[Any]()

    def counted(*args: Any) -> list[stacks.Found]:
        searches.append(args)
        return find(*args)

    find = stacks.find_stacks
    monkeypatch.setattr(stacks, "find_stacks", counted)
    reason, _ = stacks.why_none(program.graph, attention_sites(program.graph))
    assert reason.startswith("no stack: 4 blocks repeat, but the model's head reads states between them, first in add")
    assert len(searches) <= 6


# Blocks and tails


def _names(program: Program, stack: str) -> list[set[str]]:
    found = program.stacks[stack]
    blocks = [{node.name for node in program.block_nodes(found, index)} for index in range(found.blocks)]
    return [*blocks, {node.name for node in program.tail_nodes(found)}]


@pytest.mark.parametrize("name", ["encoder", "labeller", "decoder", "two_stacks", "time_first", "mixing"])
def test_blocks_are_disjoint_and_alike(name: str, request: pytest.FixtureRequest) -> None:
    program: Program = request.getfixturevalue(name).program
    for stack in program.stacks.values():
        *blocks, tail = _names(program, stack.name)
        assert len(set.union(*blocks, tail)) == sum(map(len, [*blocks, tail]))
        operators = [[program.nodes[n].target for n in program.nodes if n in block] for block in blocks]
        assert all(found == operators[0] for found in operators)
        assert all(cut in block for cut, block in zip(stack.cuts[1:], blocks, strict=True))
        assert stack.input not in set.union(*blocks)


def test_the_tail_ends_in_the_outputs_that_read_the_stack() -> None:
    program = _captured("hidden state returned").program
    (stack,) = program.stacks.values()
    tail = [node.name for node in program.tail_nodes(stack)]
    assert stack.output not in tail
    outputs = {name: node.name for name, node in results(program.graph).items()}
    assert outputs["hidden"] == stack.output
    assert outputs["logits"] in tail
    assert outputs["lengths"] not in tail


class _FirstIsOther(tiny.Encoder):
    """As ModernBERT: the first of the list has no norm, and is no block like the others."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks[0] = nn.Linear(tiny.WIDTH, tiny.WIDTH)

    def run(self, x: Tensor, mask: Tensor) -> Tensor:
        first, *others = self.blocks
        x = first(x)
        for block in others:
            x = block(x, mask)
        return x


def test_what_the_first_block_is_called_is_said_where_it_is_not_the_first() -> None:
    shown = str(tiny.captured(_FirstIsOther, tiny.text()).program)
    assert f"{tiny.BLOCKS - 1} blocks (encoder)  blocks (block 1 is blocks.1)" in shown
    assert "block 1" not in str(tiny.captured(tiny.Encoder, tiny.text()).program)
