"""Pieces of a program: every block once, shared work once, and together what the program computes."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import architectures
import decoders
import pytest
import shared
import tiny
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, fx, nn

from offramp.errors import SpecError, StructureError
from offramp.export import partition, save
from offramp.export.lowering.lower import lower
from offramp.export.lowering.outline import outline
from offramp.export.partition import Plan
from offramp.export.subgraph import Subgraph
from offramp.passes import InsertAdapter, InsertExits, InsertScores, Truncate, apply
from offramp.program import Program
from offramp.program.graph import aten, attribute, results
from offramp.program.sizes import other_sizes


def pieces(plan: Plan) -> Iterator[Subgraph]:
    """Every piece of a plan, in the order in which they can run."""
    for before, stack in zip(plan.before, plan.stacks, strict=True):
        yield from (before,) if before else ()
        for depth, block in stack.blocks:
            yield block
            yield from (stack.adapters[depth],) if depth in stack.adapters else ()
            yield from stack.heads.get(depth, ())
    yield from plan.tails


def run(program: Program, plan: Plan, inputs: Mapping[str, Tensor]) -> dict[fx.Node, Tensor]:
    """Every value that pieces make, each piece as a function of its own inputs and weights only."""
    values = {node: inputs[str(node.target)] for node in program.graph.find_nodes(op="placeholder")}
    for piece in pieces(plan):
        function = outline(piece)
        module = fx.GraphModule({}, function.graph)
        weights = [attribute(program.graph_module, str(node.target)) for node in function.weights]
        with torch.no_grad():
            made = module(*(values[node] for node in function.inputs), *weights)
        values |= dict(zip(function.outputs, made, strict=True))
    return values


def assert_computes(program: Program, plan: Plan, inputs: Mapping[str, Tensor]) -> None:
    """The pieces make everything that the program returns and that is theirs to make."""
    values, returned = run(program, plan, inputs), results(program.graph)
    with torch.no_grad():
        expected = program.module(**inputs)
    for name in program.outputs:
        torch.testing.assert_close(values[returned[name]], expected[name])
    for item in program.exits:  # a shared head runs in the chain only
        own = {*item.outputs.values(), *item.scores.values()} if item.head == "own" else set()
        for key in own | {key for key in item.scores.values() if returned[key] in values}:
            torch.testing.assert_close(values[returned[key]], expected[key])


def weights(piece: Subgraph | None) -> set[str]:
    assert piece is not None
    return {str(node.target) for node in lower(piece).weights}


def made_by(plan: Plan, node: fx.Node) -> list[str]:
    """The names of the pieces that compute ``node``."""
    return [piece.name for piece in pieces(plan) if node in piece.nodes]


# Blocks


def test_every_block_is_a_piece(encoder: tiny.Captured) -> None:
    program = encoder.program
    plan = partition(program)
    (stack,) = plan.stacks
    cuts = [program.nodes[name] for name in stack.stack.cuts]
    assert [depth for depth, _ in stack.blocks] == [1, 2, 3, 4]
    assert [piece.name for piece in pieces(plan)] == [
        "before-encoder", "encoder.1", "encoder.2", "encoder.3", "encoder.4", "tail",
    ]  # fmt: skip
    for depth, block in stack.blocks:
        assert block.outputs == (cuts[depth],)
        assert set(block.inputs) & set(cuts) == {cuts[depth - 1]}
        assert weights(block)
        assert all(name.startswith(f"blocks.{depth - 1}.") for name in weights(block))
    assert not stack.adapters
    assert not stack.heads
    assert_computes(program, plan, encoder.inputs)


def test_equal_blocks_name_their_inputs_in_the_same_order(encoder: tiny.Captured) -> None:
    program = encoder.program
    (stack,) = partition(program).stacks
    hidden = {program.nodes[name] for name in stack.stack.cuts}
    orders = {tuple(node in hidden for node in block.inputs) for _, block in stack.blocks}
    assert len(orders) == 1
    assert len({lower(block).key for _, block in stack.blocks}) == 1


@pytest.fixture(scope="module")
def programs(encoder: tiny.Captured) -> dict[frozenset[int], Program]:
    """The encoder with every choice of exits."""
    choices = [frozenset(c) for n in range(tiny.BLOCKS) for c in itertools.combinations(range(1, tiny.BLOCKS), n)]
    return {c: apply(encoder.program, [InsertExits(after=tuple(c))] if c else []) for c in choices}


@given(segments=st.integers(1, 7), exits=st.frozensets(st.integers(1, tiny.BLOCKS - 1)))
def test_any_number_of_segments_covers_every_block_once(
    encoder: tiny.Captured, programs: dict[frozenset[int], Program], segments: int, exits: frozenset[int]
) -> None:
    program = programs[exits]
    plan = partition(program, segments)
    (stack,) = plan.stacks
    edges = [0, *(depth for depth, _ in stack.blocks)]
    assert edges == sorted(set(edges))
    assert edges[-1] == tiny.BLOCKS
    assert exits <= set(edges)
    assert len(stack.blocks) <= min(segments, tiny.BLOCKS) + len(exits)
    assert len(stack.blocks) >= min(segments, tiny.BLOCKS)
    if not exits:
        sizes = [b - a for a, b in itertools.pairwise(edges)]
        assert len(sizes) == min(segments, tiny.BLOCKS)
        assert max(sizes) - min(sizes) <= 1
    blocks = {depth: program.block_nodes(stack.stack, depth - 1) for depth in range(1, tiny.BLOCKS + 1)}
    for (first, last), (_, piece) in zip(itertools.pairwise(edges), stack.blocks, strict=True):
        inside = {node for depth in range(first + 1, last + 1) for node in blocks[depth]}
        assert inside <= set(piece.nodes)
        assert not set(piece.nodes) & ({node for block in blocks.values() for node in block} - inside)
    assert_computes(program, plan, encoder.inputs)


def test_one_segment_is_the_whole_stack(two_stacks: tiny.Captured) -> None:
    plan = partition(two_stacks.program, 1)
    assert [[depth for depth, _ in stack.blocks] for stack in plan.stacks] == [[4], [3]]
    assert_computes(two_stacks.program, plan, two_stacks.inputs)


def test_what_cannot_be_cut_is_refused(encoder: tiny.Captured) -> None:
    for segments in (0, -1):
        with pytest.raises(SpecError, match=f"segments={segments}: at least one"):
            partition(encoder.program, segments)
    with pytest.raises(StructureError, match="no stack"):
        partition(replace(encoder.program, stacks={}))


# What crosses


def test_a_mask_is_made_once(encoder: tiny.Captured) -> None:
    program = encoder.program
    plan = partition(program)
    (mask,) = {node.args[3] for node in program.graph.nodes if node.target is aten.scaled_dot_product_attention.default}
    assert isinstance(mask, fx.Node)
    assert made_by(plan, mask) == ["before-encoder"]
    for _, block in plan.stacks[0].blocks:
        assert mask in block.inputs


def test_what_only_the_tail_needs_is_made_there(encoder: tiny.Captured) -> None:
    plan = partition(encoder.program)
    (tail,) = plan.tails
    pooled = encoder.program.nodes["attention_mask"]
    assert pooled in tail.inputs
    lengths = [node for node in tail.nodes if node.target is aten.sum.dim_IntList and node.args[0] is pooled]
    assert len(lengths) == 1


class _Tables(tiny.Encoder):
    """Each block has a table of biases by distance of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.tables = nn.ModuleList(nn.Embedding(2 * 8 + 1, tiny.HEADS) for _ in range(tiny.BLOCKS))

    def run(self, x: Tensor, mask: Tensor) -> Tensor:
        places = torch.arange(x.shape[1])
        distance = (places[None, :] - places[:, None]).clamp(-8, 8) + 8
        for block, table in zip(self.blocks, self.tables, strict=True):
            x = block(x, table(distance).permute(2, 0, 1) + (1.0 - mask.float()) * -1e4)
        return x


def test_a_private_table_stays_in_its_block() -> None:
    captured = tiny.captured(_Tables, tiny.text())
    plan = partition(captured.program)
    distances = [node for node in captured.program.graph.nodes if node.target is aten.clamp.default]
    assert [made_by(plan, node) for node in distances] == [["before-encoder"]]
    for depth, block in plan.stacks[0].blocks:
        assert {name for name in weights(block) if "tables" in name} == {f"tables.{depth - 1}.weight"}
    assert not any("tables" in name for name in weights(plan.before[0]))
    assert_computes(captured.program, plan, captured.inputs)


def test_a_bias_of_the_first_block_that_all_use_is_made_before_the_stack() -> None:
    program = shared.captured(architectures.OTHERS["first_block_bias"])
    plan = partition(program)
    blocks = [block for _, block in plan.stacks[0].blocks]
    assert [piece.name for piece in pieces(plan) if "blocks.0.table.weight" in weights(piece)] == ["before-encoder"]
    (bias,) = set.intersection(*({*block.inputs} for block in blocks))
    assert made_by(plan, bias) == ["before-encoder"]
    assert_computes(program, plan, dict(program.example_inputs))


def test_a_part_of_a_weight_is_a_weight_where_it_is_used() -> None:
    program = shared.cached(decoders.REQUIRED["torch_transformer"])
    plan = partition(program)
    splits = {node for node in program.graph.nodes if node.target is aten.split_with_sizes.default}
    parts = {user for node in splits for user in node.users if node.args[0].op == "get_attr"}
    assert len(parts) == 16  # of four blocks queries' weight and bias, and those of keys and values
    assert not any(parts & {*piece.inputs, *piece.outputs} for piece in pieces(plan))
    assert {len(parts & {*block.nodes}) for _, block in plan.stacks[1].blocks} == {2}


def test_a_weight_that_is_turned_round_is_one_where_it_is_used() -> None:
    program = shared.cached(decoders.OTHERS["falcon"])  # x @ weight.T
    turned = {node for node in program.graph.nodes if node.target is aten.permute.default}
    turned = {node for node in turned if node.args[0].op == "get_attr"}
    plan = partition(program)
    assert not any(turned & {*piece.inputs, *piece.outputs} for piece in pieces(plan))
    assert {len(turned & {*block.nodes}) for _, block in plan.stacks[0].blocks} == {4}


def test_tied_weights_stay_tied(decoder: tiny.Captured) -> None:
    plan = partition(decoder.program)
    assert weights(plan.before[0]) & weights(*plan.tails) == {"words.weight"}
    assert_computes(decoder.program, plan, decoder.inputs)


# Several stacks, and what may be missing around them


def test_work_between_two_stacks_is_one_piece(two_stacks: tiny.Captured) -> None:
    program = two_stacks.program
    plan = partition(program)
    assert [stack.stack.name for stack in plan.stacks] == ["encoder", "decoder"]
    first, middle = plan.before
    assert first is not None
    assert middle is not None
    assert middle.name == "before-decoder"
    memory = program.nodes[plan.stacks[0].stack.output]
    assert memory in middle.inputs
    assert "encoder.leave.weight" in weights(middle)
    blocks = [block for _, block in plan.stacks[1].blocks]
    assert not any(memory in block.inputs for block in blocks)
    assert_computes(program, plan, two_stacks.inputs)
    assert_computes(program, partition(program, 2), two_stacks.inputs)


def test_stacks_run_in_the_order_of_what_they_read(two_stacks: tiny.Captured) -> None:
    program = replace(two_stacks.program, stacks=dict(reversed(list(two_stacks.program.stacks.items()))))
    plan = partition(program)
    assert [stack.stack.name for stack in plan.stacks] == ["encoder", "decoder"]
    assert_computes(program, plan, two_stacks.inputs)


class _Naked(tiny.Encoder):
    """Nothing but blocks: the input enters the first, the output leaves the last."""

    def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]
        for block in self.blocks:
            x = block(x, None)
        return x


def test_nothing_before_and_nothing_behind() -> None:
    captured = tiny.captured(partial(_Naked, "post"), {"x": tiny.signal().transpose(0, 1).contiguous()})
    plan = partition(captured.program)
    assert plan.before == [None]
    assert plan.tails == []
    (stack,) = plan.stacks
    assert stack.stack.input == "x"
    assert [node.name for node in stack.blocks[0][1].inputs] == ["x"]
    assert results(captured.program.graph)["output"] is captured.program.nodes[stack.stack.output]
    assert_computes(captured.program, plan, captured.inputs)


def test_an_input_that_enters_the_stack_has_no_piece_before(time_first: tiny.Captured) -> None:
    plan = partition(time_first.program)
    assert plan.before == [None]
    assert_computes(time_first.program, plan, time_first.inputs)


# Exits


def test_a_shared_head_adds_no_piece(encoder: tiny.Captured) -> None:
    program = apply(encoder.program, [InsertExits()])
    plan, without = partition(program), partition(encoder.program)
    assert [piece.name for piece in pieces(plan)] == [piece.name for piece in pieces(without)]
    assert_computes(program, plan, encoder.inputs)


def test_own_heads_are_pieces_with_their_own_weights(encoder: tiny.Captured) -> None:
    program = apply(encoder.program, [InsertExits(after=(1, 3), head="own")])
    plan = partition(program)
    (stack,) = plan.stacks
    assert sorted(stack.heads) == [1, 3]
    for after, (head,) in stack.heads.items():
        assert head.name == f"encoder.{after}-head"
        assert weights(head)
        assert all(name.startswith(f"exits.encoder.{after}.") for name in weights(head))
        assert program.nodes[stack.stack.cuts[after]] in head.inputs
    assert_computes(program, plan, encoder.inputs)


@pytest.mark.parametrize("kind", ["linear", "norm-linear", "bottleneck", "mlp", "block"])
def test_an_adapter_is_a_piece_between_the_exit_and_its_head(encoder: tiny.Captured, kind: str) -> None:
    program = apply(encoder.program, [InsertExits(after=2), InsertAdapter(kind=kind)])
    plan = partition(program)
    (stack,) = plan.stacks
    assert list(stack.adapters) == [2]
    adapter, (item,) = stack.adapters[2], program.exits
    assert adapter.name == "encoder.2-adapter"
    assert adapter.outputs == (program.nodes[item.state],)
    assert program.nodes[item.hidden] in adapter.inputs
    assert all(name.startswith("exits.encoder.2.adapter.") for name in weights(adapter))
    with torch.no_grad():
        expected = apply(program, [Truncate(after=2)]).module(**encoder.inputs)["logits"]
    state = run(program, plan, encoder.inputs)[program.nodes[item.state]]
    (tail,) = plan.tails
    values = {**run(program, plan, encoder.inputs), program.nodes[stack.stack.output]: state}
    torch.testing.assert_close(_tail(program, tail, values), expected)


def _tail(program: Program, tail: Subgraph, values: Mapping[fx.Node, Tensor]) -> Tensor:
    function = lower(tail)
    read = [attribute(program.graph_module, str(node.target)) for node in function.weights]
    with torch.no_grad():
        (logits,) = fx.GraphModule({}, function.graph)(*(values[node] for node in function.inputs), *read)
    found: Tensor = logits
    return found


def test_an_adapter_before_an_own_head_is_part_of_it(encoder: tiny.Captured) -> None:
    program = apply(encoder.program, [InsertExits(after=2, head="own"), InsertAdapter(kind="linear")])
    plan = partition(program)
    (stack,) = plan.stacks
    assert not stack.adapters
    assert {"exits.encoder.2.adapter.linear.weight", "exits.encoder.2.head.weight"} <= weights(*stack.heads[2])
    assert_computes(program, plan, encoder.inputs)


def test_scores_of_hidden_states_are_made_by_the_block(encoder: tiny.Captured) -> None:
    scores = InsertScores(measure=("top1", "cosine", "learned"))
    for head in ("shared", "own"):
        program = apply(encoder.program, [InsertExits(after=2, head=head), scores])
        plan = partition(program)
        (stack,) = plan.stacks
        item = next(item for item in program.exits if item.after == 2)
        returned = results(program.graph)
        block = dict(stack.blocks)[2]
        assert {returned[item.scores[name]] for name in ("cosine", "learned")} <= set(block.outputs)
        assert returned[item.scores["top1"]] not in block.nodes
        if head == "own":
            assert returned[item.scores["top1"]] in stack.heads[2][0].outputs
        assert_computes(program, plan, encoder.inputs)


# Other sizes


@pytest.mark.parametrize("name", ["encoder", "labeller", "decoder", "two_stacks", "time_first", "mixing"])
def test_pieces_compute_the_program_at_other_sizes(name: str, request: pytest.FixtureRequest) -> None:
    captured: tiny.Captured = request.getfixturevalue(name)
    plan = partition(captured.program)
    for inputs in other_sizes(captured.program):
        assert_computes(captured.program, plan, inputs)


# What runs for each chunk


class _Embedded(tiny.Decoder):
    """Returns what enters its blocks, too."""

    def forward(self, input_ids: Tensor) -> dict[str, Tensor]:  # type: ignore[override]
        return {"logits": super().forward(input_ids), "embedded": self.embed(input_ids) * 2}


@pytest.mark.parametrize(("make", "apart"), [(tiny.Decoder, False), (_Embedded, True)])
def test_the_first_piece_embeds_the_tokens(tmp_path: Path, make: Any, apart: bool) -> None:
    """Unless what that makes is needed where no part of the stack has run."""
    program = apply(tiny.captured(make, {"input_ids": tiny.ids()}).program, "insert-exits{after=1},insert-cache")
    assert program.cache is not None
    plan = partition(program)
    (stack,) = plan.stacks
    (tokens,) = (program.nodes[name] for name in program.cache.tokens)
    assert (plan.enter != [None]) == apart
    assert (tokens in stack.blocks[0][1].inputs) != apart
    assert all(tokens not in piece.inputs for _, piece in stack.blocks[1:])
    save(program, tmp_path / "m.offramp")  # which validates it
