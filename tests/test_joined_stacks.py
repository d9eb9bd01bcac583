"""Stacks back to back: one value is what a stack gives and what the next one takes."""

# mypy: disable-error-code="no-any-return"
from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import offramp
from offramp.export import save
from offramp.export.partition import partition
from offramp.passes import InsertAdapter, InsertExits, Truncate, apply
from offramp.program import Program, capture
from offramp.runtime.chain import Chain

HEADS = 2


class Block(nn.Module):
    """What differs from stack to stack is the width of the MLP."""

    def __init__(self, inner: int, causal: bool) -> None:
        super().__init__()
        self.causal, self.norms = causal, nn.ModuleList(nn.LayerNorm(tiny.WIDTH) for _ in range(2))
        self.qkv, self.out = nn.Linear(tiny.WIDTH, 3 * tiny.WIDTH), nn.Linear(tiny.WIDTH, tiny.WIDTH)
        self.up, self.down = nn.Linear(tiny.WIDTH, inner), nn.Linear(inner, tiny.WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(self.norms[0](x)).unflatten(-1, (3, HEADS, -1)).permute(2, 0, 3, 1, 4).unbind()
        y = F.scaled_dot_product_attention(q, k, v, is_causal=self.causal)
        x = x + self.out(y.transpose(1, 2).flatten(2))
        return x + self.down(F.gelu(self.up(self.norms[1](x))))


def sequence(*inner: int, causal: bool = False) -> nn.Sequential:
    """Words in, words out; the forward's parameter is called ``input``."""
    return tiny.seeded(
        lambda: nn.Sequential(
            nn.Embedding(tiny.WORDS, tiny.WIDTH),
            *(Block(width, causal) for width in inner),
            nn.Linear(tiny.WIDTH, tiny.WORDS),
        )
    )


@pytest.fixture(scope="module")
def captured() -> Callable[..., Program]:
    known: dict[Any, Program] = {}

    def get(*inner: int, causal: bool = False) -> Program:
        key = (*inner, causal)
        if key not in known:
            known[key] = capture(sequence(*inner, causal=causal), (tiny.ids(),))
        return known[key]

    return get


def stacks_of(program: Program) -> dict[str, int]:
    return {stack.name: stack.blocks for stack in program.stacks.values()}


def exits(program: Program) -> Program:
    """One after each block, with an adapter that does something in all stacks but the last."""
    names = list(program.stacks)
    program = apply(program, [InsertExits(name) for name in names])
    program = apply(program, [InsertAdapter(name, after=1, kind="linear") for name in names[:-1]])
    with torch.no_grad():
        for name, weight in program.graph_module.named_parameters():
            if name.startswith("exits."):
                weight.add_(torch.randn(weight.shape, generator=torch.Generator().manual_seed(len(name))) / 4)
    return program


def assert_every_combination(program: Program, chain: Chain) -> None:
    """Exits forced in all stacks at once are the truncated program."""
    depths = [[item.after for item in chain.stacks[name].exits] for name in program.stacks]
    for chosen in itertools.product(*depths):
        at = dict(zip(program.stacks, chosen, strict=True))
        short = {name: after for name, after in at.items() if after < program.stacks[name].blocks}
        cut = apply(program, [Truncate(name, after) for name, after in short.items()])
        with torch.no_grad():
            expected = cut.module(**cut.fresh({name: program.example_inputs[name] for name in program.inputs}))
        found = chain.run({"input": program.example_inputs["input"].numpy()}, offramp.Depth(at))
        for name in program.outputs:
            np.testing.assert_allclose(found.outputs[name], expected[name], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("causal", [False, True], ids=["encoders", "decoders"])
def test_no_block_is_run_twice(captured: Callable[..., Program], causal: bool) -> None:
    program = captured(24, 24, 40, 40, causal=causal)
    assert stacks_of(program) == {"stack0": 2, "stack1": 2}
    assert program.stacks["stack0"].output == program.stacks["stack1"].input
    program = apply(program, "insert-cache") if causal else program
    plan = partition(program)
    pieces = [*plan.before, *plan.tables, *plan.enter, *(piece for s in plan.stacks for _, piece in s.blocks)]
    nodes = [node for piece in pieces if piece for node in piece.nodes if node.all_input_nodes]
    assert len(nodes) == len(set(nodes))
    middle = program.nodes[program.stacks["stack1"].input]
    assert [middle in piece.outputs for piece in pieces if piece].count(True) == 1


@pytest.mark.slow
def test_three_encoders(captured: Callable[..., Program], tmp_path: Path) -> None:
    program = exits(captured(24, 24, 40, 40, 32, 32))
    save(program, tmp_path / "m.offramp")
    assert_every_combination(program, offramp.load(tmp_path / "m.offramp"))


def test_one_segment_a_stack(captured: Callable[..., Program], tmp_path: Path) -> None:
    program = captured(24, 24, 40, 40)
    save(program, tmp_path / "m.offramp", segments=1)
    found = offramp.load(tmp_path / "m.offramp").run({"input": tiny.ids().numpy()}).outputs
    expected = tiny.outputs(program.module, {"input": tiny.ids()})
    np.testing.assert_allclose(found["output"], expected["output"], rtol=1e-4, atol=1e-5)


def test_a_stack_that_is_cut_short_gives_the_next_one_what_it_takes(captured: Callable[..., Program]) -> None:
    program = captured(24, 24, 40, 40, 32, 32)
    model = sequence(24, 24, 40, 40, 32, 32)
    for name, gone in (("stack0", [2]), ("stack1", [4]), ("stack2", [6])):
        cut = apply(program, [Truncate(name, 1)])
        for one, other in itertools.pairwise(cut.stacks.values()):
            assert one.output == other.input
        expected = nn.Sequential(*(part for at, part in enumerate(model) if at not in gone))
        with torch.no_grad():
            torch.testing.assert_close(cut.module(input=tiny.ids())["output"], expected(tiny.ids()))


def test_causal_stacks_generate(captured: Callable[..., Program], tmp_path: Path) -> None:
    """Every token's depth in each stack is its own; what the second has read of earlier tokens stays as it was."""
    model = sequence(24, 24, 40, 40, causal=True)
    program = exits(apply(captured(24, 24, 40, 40, causal=True), "insert-cache"))
    save(program, tmp_path / "m.offramp")
    chain = offramp.load(tmp_path / "m.offramp")
    assert_every_combination(program, chain)
    weights = dict(program.graph_module.named_parameters())
    prompts = [[1], [2, 3, 4], [5, 6]]
    depths: Mapping[str, list[list[int]]] = {"stack0": [[1, 2], [2, 1, 1], [1]], "stack1": [[2, 1], [1], [1, 2, 2]]}
    asked: dict[tuple[str, int], int] = {}

    def leave(state: Any) -> Any:
        for row in state.rows.tolist():
            asked[state.stack, row] = asked.get((state.stack, row), -1) + 1
        return np.array([_at(depths[state.stack][row], asked[state.stack, row]) == 1 for row in state.rows], bool)

    found = chain.generate({"input": prompts}, leave, max_new_tokens=7)
    for row, prompt in enumerate(prompts):
        expected = _written(model, weights, prompt, [depths[name][row] for name in program.stacks], 7)
        assert found.tokens[row].tolist() == expected


def _at(depths: list[int], turn: int) -> int:
    return depths[turn % len(depths)]


def _written(
    model: nn.Sequential, weights: Mapping[str, Tensor], prompt: list[int], depths: list[list[int]], count: int
) -> list[int]:
    """Tokens one by one, everything computed again for each; a prompt of several tokens runs to full depth."""
    embed, *blocks, head = model
    first = len(prompt) if len(prompt) > 1 else 0

    def taken(states: list[Tensor], turns: list[int], adapter: str | None) -> Tensor:
        made = []
        for place in range(states[0].shape[1]):
            after = 2 if place < first else _at(turns, place - first)
            state = states[after - 1][:, place]
            if after == 1 and adapter:
                state = F.linear(state, weights[f"{adapter}.linear.weight"], weights[f"{adapter}.linear.bias"])
            made.append(state)
        return torch.stack(made, 1)

    ids = list(prompt)
    with torch.no_grad():
        for _ in range(count):
            x = embed(torch.tensor([ids]))
            for at, adapter in enumerate(("exits.stack0.1.adapter", None)):
                early = blocks[2 * at](x)
                x = taken([early, blocks[2 * at + 1](early)], depths[at], adapter)
            ids.append(int(head(x)[0, -1].argmax()))
    return ids[len(prompt) :]
