"""insert-cache: in chunks of any sizes, rows apart, a program gives what it gives in one pass; what it refuses."""

# mypy: disable-error-code="no-any-return, override"
from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import tiny
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

from offramp.errors import PassError, SpecError, StructureError
from offramp.passes import InsertCache, PassResult, Truncate, apply
from offramp.passes.caches.chunks import cached_stacks, in_chunks
from offramp.program import Program, capture, ops
from offramp.program.graph import results

Core = Callable[[Tensor, Tensor, Tensor, Any], Tensor]  # q, k, v [rows, heads, tokens, features], mask
Embed = Callable[["Decoder", Tensor, Tensor], Tensor]  # of embedded tokens and their ids
Tail = Callable[["Decoder", Tensor], Any]  # of the last hidden state
WINDOW = 3

# Decoders of two blocks


class Attention(tiny.Attention):
    def __init__(self, core: Core) -> None:
        super().__init__()
        self.core = core

    def forward(self, x: Tensor, memory: Tensor, mask: Tensor | None, causal: bool = False) -> Tensor:
        q = self.q(x).unflatten(-1, (tiny.HEADS, -1)).transpose(1, 2)
        k, v = self.kv(memory).unflatten(-1, (2, tiny.HEADS, -1)).permute(2, 0, 3, 1, 4).unbind()
        return self.out(self.core(q, k, v, mask).transpose(1, 2).flatten(2))


def flagged(q: Tensor, k: Tensor, v: Tensor, mask: Any) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v, is_causal=True)


def masked(q: Tensor, k: Tensor, v: Tensor, mask: Any) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)


def distance(q: Tensor) -> Tensor:
    places = torch.arange(q.shape[-2])
    return places[:, None] - places


def slopes(q: Tensor) -> Tensor:
    """ALiBi's: of each head, a number that the distance is multiplied by."""
    return -(2.0 ** -torch.arange(1, tiny.HEADS + 1))[:, None, None] * distance(q)


def scores(q: Tensor, k: Tensor) -> Tensor:
    return q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1])


def triangle(q: Tensor, k: Tensor, v: Tensor, mask: Any) -> Tensor:
    hidden = torch.full((q.shape[2], q.shape[2]), float("-inf")).triu(1)
    return (scores(q, k) + hidden).softmax(-1) @ v


def window(q: Tensor, k: Tensor, v: Tensor, mask: Any) -> Tensor:
    return masked(q, k, v, (distance(q) >= 0) & (distance(q) < WINDOW))


def dilated(q: Tensor, k: Tensor, v: Tensor, mask: Any) -> Tensor:
    """Every other key: neither plainly causal nor a window."""
    return masked(q, k, v, (distance(q) >= 0) & (distance(q) % 2 == 0))


def alibi(q: Tensor, k: Tensor, v: Tensor, mask: Any) -> Tensor:
    return masked(q, k, v, slopes(q).masked_fill(distance(q) < 0, float("-inf")))


def alibi_written(q: Tensor, k: Tensor, v: Tensor, mask: Any) -> Tensor:
    return (scores(q, k) + slopes(q)).masked_fill(distance(q) < 0, -1e9).softmax(-1) @ v


def grouped(q: Tensor, k: Tensor, v: Tensor, mask: Any) -> Tensor:
    """Both heads of queries share the first one of keys."""
    k, v = (y[:, :1, None].expand(-1, -1, tiny.HEADS, -1, -1).flatten(1, 2) for y in (k, v))
    return flagged(q, k, v, mask)


def together(core: Core, q: Tensor, k: Tensor, v: Tensor, mask: Any) -> Tensor:
    """Rows and heads on one axis, of three."""
    mask = mask if mask is None else mask.expand(-1, tiny.HEADS, -1, -1).flatten(0, 1)
    return core(q.flatten(0, 1), k.flatten(0, 1), v.flatten(0, 1), mask).unflatten(0, (-1, tiny.HEADS))


def one_head(core: Core, q: Tensor, k: Tensor, v: Tensor, mask: Any) -> Tensor:
    """[rows, tokens, features]: no axis of heads."""
    q, k, v = (y.transpose(1, 2).flatten(2) for y in (q, k, v))
    return core(q, k, v, mask if mask is None else mask[:, 0]).unflatten(2, (tiny.HEADS, -1)).transpose(1, 2)


class Decoder(tiny.Decoder):
    def __init__(self, core: Core = flagged, embed: Embed | None = None, tail: Tail | None = None) -> None:
        super().__init__()
        self.blocks = self.blocks[:2]
        self.own_embed, self.own_tail = embed, tail
        self.conv, self.norm = nn.Conv1d(tiny.WIDTH, tiny.WIDTH, 3), nn.GroupNorm(2, tiny.WIDTH)
        for block in self.blocks:
            block.attention = Attention(core)

    def embed(self, input_ids: Tensor) -> Tensor:
        x = super().embed(input_ids)
        return self.own_embed(self, x, input_ids) if self.own_embed else x

    def run(self, x: Tensor, mask: Any) -> Any:
        for block in self.blocks:
            x = block(x, mask)
        return self.own_tail(self, x) if self.own_tail else self.head(self.leave(x))

    def forward(self, input_ids: Tensor) -> Any:
        return self.run(self.embed(input_ids), None)


class Masked(Decoder):
    """A triangle, and a padding mask that is an input; positions count what is not padding."""

    def __init__(self, tail: Tail | None = None) -> None:
        super().__init__(masked, tail=tail)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Any:
        tokens = input_ids.shape[1]
        mask = torch.ones(tokens, tokens, dtype=torch.bool).tril() & attention_mask.bool()[:, None, None]
        x = self.words(input_ids) + self.places((attention_mask.long().cumsum(1) - 1).clamp(min=0))
        return self.run(x, mask)


class Counted(Decoder):
    """Positions count the ids that are not padding (1)."""

    def embed(self, input_ids: Tensor) -> Tensor:
        real = (input_ids != 1).long()
        return self.words(input_ids) + self.places(real.cumsum(1) * real)


class Typed(Decoder):
    """Two inputs over the tokens, and one that is the same for all of them."""

    def __init__(self) -> None:
        super().__init__()
        self.kinds, self.style = nn.Embedding(2, tiny.WIDTH), nn.Linear(4, tiny.WIDTH)

    def forward(self, input_ids: Tensor, kind_ids: Tensor, style: Tensor) -> Any:
        return self.run(self.embed(input_ids) + self.kinds(kind_ids) + self.style(style)[:, None], None)


class ByContent(Decoder):
    """Tokens do not see padding, which only their ids tell."""

    def __init__(self, core: Core = masked) -> None:
        super().__init__(core)

    def forward(self, input_ids: Tensor) -> Any:
        tokens = input_ids.shape[1]
        itself = torch.eye(tokens, dtype=torch.bool)
        mask = torch.ones(tokens, tokens, dtype=torch.bool).tril() & ((input_ids != 1)[:, None, None] | itself)
        return self.run(self.embed(input_ids), mask)


class TimeFirst(tiny.TimeFirst):
    """A triangle; rows and heads lie on one axis, and the output is of every token."""

    def attend(self, attention: tiny.Attention, x: Tensor) -> Tensor:
        time, rows, _ = x.shape
        q = attention.q(x) * (tiny.WIDTH // tiny.HEADS) ** -0.5
        k, v = attention.kv(x).chunk(2, -1)
        q, k, v = (y.reshape(time, rows * tiny.HEADS, -1).transpose(0, 1) for y in (q, k, v))
        hidden = torch.full((time, time), float("-inf")).triu(1)
        y = torch.bmm((torch.bmm(q, k.transpose(1, 2)) + hidden).softmax(-1), v)
        return attention.out(y.transpose(0, 1).reshape(time, rows, tiny.WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block.norms[0](x + self.attend(block.attention, x))
            x = block.norms[1](x + block.mlp(x))
        return self.head(x)


IDS = {"input_ids": tiny.ids()}
STYLE = torch.randn(2, 4, generator=torch.Generator().manual_seed(5))
MODELS: dict[str, tuple[Callable[[], nn.Module], tiny.Inputs]] = {
    "triangle": (partial(Decoder, triangle), IDS),
    "window": (partial(Decoder, window), IDS),
    "dilated": (partial(Decoder, dilated), IDS),
    "alibi": (partial(Decoder, alibi), IDS),
    "alibi_written": (partial(Decoder, alibi_written), IDS),
    "grouped": (partial(Decoder, grouped), IDS),
    "masked": (Masked, tiny.text()),
    "masked_by_bool": (Masked, {**tiny.text(), "attention_mask": tiny.padding().bool()}),
    "counted": (Counted, IDS),
    "typed": (Typed, {**IDS, "kind_ids": tiny.padding(), "style": STYLE}),
    "by_contents": (ByContent, IDS),
    "one_head": (partial(Decoder, partial(one_head, flagged)), IDS),
    "one_head_window": (partial(Decoder, partial(one_head, window)), IDS),
    "one_head_dilated": (partial(Decoder, partial(one_head, dilated)), IDS),
    "one_head_by_contents": (partial(ByContent, partial(one_head, masked)), IDS),
    "together": (partial(Decoder, partial(together, flagged)), IDS),
    "together_dilated": (partial(Decoder, partial(together, dilated)), IDS),
    "together_by_contents": (partial(ByContent, partial(together, masked)), IDS),
    "time_first": (TimeFirst, {"x": tiny.signal()}),
}
SHARED = ("decoder", "two_stacks")
CAUSAL_ONLY = {  # what is left of each mask: a window, and whether there is a bias
    "decoder": (0, None),
    "two_stacks": (0, None),
    "window": (WINDOW, None),
    "dilated": (0, torch.bool),
    "alibi": (0, torch.float32),
    "grouped": (0, None),
    "masked": (0, None),
    "masked_by_bool": (0, None),
    "counted": (0, None),
    "typed": (0, None),
}
Get = Callable[[str], tuple[tiny.Captured, Program]]


@pytest.fixture(scope="session")
def cached(request: pytest.FixtureRequest) -> Get:
    """A captured model, and its program with caches, made when first asked for."""
    known: dict[str, tuple[tiny.Captured, Program]] = {}

    def get(name: str) -> tuple[tiny.Captured, Program]:
        if name not in known:
            captured = request.getfixturevalue(name) if name in SHARED else tiny.captured(*MODELS[name])
            known[name] = captured, apply(captured.program, "insert-cache")
        return known[name]

    return get


def of_cache(captured: tiny.Captured, program: Program) -> tiny.Inputs:
    """The example that the model was captured with, without what follows from the number of tokens."""
    return {name: value for name, value in captured.inputs.items() if name in program.inputs}


def ones(program: Program, inputs: tiny.Inputs) -> tiny.Inputs:
    assert program.cache is not None
    return {**inputs, **program.implied(inputs)}


def axis_of(program: Program) -> int:
    """The axis of the tokens, in inputs and outputs; rows lie on the other one of the first two."""
    return 0 if "x" in program.inputs else 1


def chunked(program: Program, inputs: tiny.Inputs, steps: Sequence[Sequence[int]], spare: int = 0) -> tiny.Inputs:
    """All outputs, the tokens given so many at a time: ``steps[i][row]``, then all that is left one by one."""
    cache, axis = program.cache, axis_of(program)
    assert cache is not None
    first = inputs[cache.tokens[0]]
    total, rows = first.shape[axis], first.shape[1 - axis]
    widest = max((max(step) for step in steps), default=1)
    state = program.fresh(inputs, total + widest + spare)
    keys = [name for name in results(program.graph) if name not in cache.buffers.values()]
    wholes: dict[str, list[list[Tensor]]] = {key: [[] for _ in range(rows)] for key in keys}
    for step in [*steps, *[[1] * rows] * total]:
        lengths = state[cache.lengths]
        counts = [min(count, total - length) for count, length in zip(step, lengths.tolist(), strict=True)]
        if not any(counts):
            continue
        places = (lengths[:, None] + torch.arange(max(counts))).clamp(max=total - 1)
        given = dict(state)
        for name in cache.tokens:
            rowwise = [row[at] for row, at in zip(inputs[name].movedim(1 - axis, 0), places, strict=True)]
            given[name] = torch.stack(rowwise, 1 - axis)
        with torch.no_grad():
            made = program.module(**given)
        for key in keys:
            for row, count in enumerate(counts):
                wholes[key][row].append(made[key].select(1 - axis, row)[:count])
        state |= {name: made[new] for name, new in cache.buffers.items()}
        state[cache.lengths] = lengths + torch.tensor(counts)
    return {key: torch.stack([torch.cat(row) for row in found], 1 - axis) for key, found in wholes.items()}


def near(within: Callable[[Tensor], Tensor]) -> Core:
    """A causal core whose tokens see what lies near enough."""
    return lambda q, k, v, mask: masked(q, k, v, (distance(q) >= 0) & within(distance(q)))


class Far(Decoder):
    """With places for as many tokens as a mask is never looked at for."""

    def __init__(self, core: Core) -> None:
        super().__init__(core)
        self.places = nn.Embedding(16384, tiny.WIDTH)


NEAR: dict[str, tuple[Callable[[], nn.Module], tuple[int, Any]]] = {  # and the window and the bias that are left
    "a number": (partial(Decoder, near(lambda far: far < 24)), (24, None)),
    "a tensor": (partial(Decoder, near(lambda far: far < torch.tensor(24))), (24, None)),
    "one of each head": (
        partial(Decoder, near(lambda far: far < torch.tensor([16, 48])[:, None, None])), (0, torch.bool)
    ),
    "blocks": (partial(Decoder, near(lambda far: far // 6 < 8)), (48, None)),
    "parts": (partial(Decoder, near(lambda far: far * 0.03125 < 1)), (32, None)),
    "parts of nothing": (partial(Decoder, near(lambda far: far * 5e-324 < 1)), (0, None)),
    "further than is looked at": (partial(Far, near(lambda far: far < 10000)), (0, torch.bool)),
    "blocks of more": (partial(Far, near(lambda far: far // 128 < 100)), (0, torch.bool)),
}  # fmt: skip


# Fires


@pytest.mark.parametrize("name", [*SHARED, *MODELS])
def test_one_pass_with_empty_caches_is_the_model(cached: Get, name: str) -> None:
    captured, program = cached(name)
    inputs = of_cache(captured, program)
    expected = captured.eager(ones(program, inputs))
    for spare in (None, 20):
        tiny.assert_same(tiny.outputs(program.module, program.fresh(inputs, spare)), expected)


@pytest.mark.parametrize("name", CAUSAL_ONLY)
def test_masks_that_are_causal_or_a_window_go(cached: Get, name: str) -> None:
    _, program = cached(name)
    attentions = program.graph.find_nodes(op="call_function", target=ops.ATTENTION)
    assert len(attentions) == len(program.stacks["decoder"].cuts) - 1
    for node in attentions:
        bias = node.args[6]
        kind = None if bias is None else bias.meta["val"].dtype
        assert (node.args[8], kind) == CAUSAL_ONLY[name]
        assert node.args[7] == pytest.approx(8**-0.5)


@pytest.mark.parametrize("name", NEAR)
def test_windows_beyond_the_example_are_seen(name: str) -> None:
    make, left = NEAR[name]
    program = apply(tiny.captured(make, IDS).program, "insert-cache")
    for node in program.graph.find_nodes(op="call_function", target=ops.ATTENTION):
        bias = node.args[6]
        assert (node.args[8], None if bias is None else bias.meta["val"].dtype) == left


@pytest.mark.parametrize("name", ["triangle", "alibi_written", "time_first"])
def test_attention_that_is_written_out_gets_appended_keys(cached: Get, name: str) -> None:
    captured, program = cached(name)
    assert program.cache is not None
    blocks = captured.program.stacks["decoder"].blocks
    assert tiny.operators(program).count(str(ops.APPEND)) == len(program.cache.buffers) == 2 * blocks
    assert str(ops.ATTENTION) not in tiny.operators(program)
    assert tiny.operators(program).count("softmax.int") == tiny.operators(captured.program).count("softmax.int")


def test_the_record_of_the_caches(cached: Get) -> None:
    captured, program = cached("decoder")
    cache = program.cache
    assert cache is not None
    assert (cache.tokens, cache.lengths, cache.places, dict(cache.implied)) == (("input_ids",), "lengths", "places", {})
    assert cache.limit == 64
    names = [f"{kind}_cache_{i}" for i in range(tiny.BLOCKS) for kind in ("key", "value")]
    assert dict(cache.buffers) == {name: f"{name}_new" for name in names}
    assert dict(cache.axes) == dict.fromkeys(names, 2)
    assert program.inputs == ("input_ids",)
    assert list(program.example_inputs) == ["input_ids", "lengths", "places", *names]
    assert program.example_inputs["places"].tolist() == list(range(len(program.example_inputs["places"])))
    assert program.history == ("insert-cache",)
    assert program.outputs == captured.program.outputs
    assert cached_stacks(program) == {"decoder"}
    assert cached_stacks(captured.program) == set()
    text = str(program)
    assert "key_cache_0        float32[batch, 2, capacity, 8]" in text
    assert "capacity 1..64" in text


@pytest.mark.parametrize(
    ("name", "tokens", "ones", "limit"),
    [
        ("two_stacks", ("input_ids",), [], 64),
        ("masked", ("input_ids",), ["attention_mask"], 64),
        ("typed", ("input_ids", "kind_ids"), [], 64),
        ("counted", ("input_ids",), [], 63),  # from 1, so that the table's first place is not used
        ("time_first", ("x",), [], None),
    ],
)
def test_what_becomes_of_inputs(
    cached: Get, name: str, tokens: tuple[str, ...], ones: list[str], limit: int | None
) -> None:
    captured, program = cached(name)
    cache = program.cache
    assert cache is not None
    assert (cache.tokens, list(cache.implied), cache.limit) == (tokens, ones, limit)
    assert set(program.inputs) == set(captured.inputs) - set(ones)


def test_a_cumulative_sum_keeps_its_terms(cached: Get) -> None:
    captured, program = cached("counted")
    assert program.cache is not None
    assert program.cache.axes["sum_cache_0"] == 1
    assert "gather.default" in tiny.operators(program)
    padded = {"input_ids": tiny.ids().index_fill(1, torch.tensor([0, 3]), 1)}
    tiny.assert_same(chunked(program, padded, [[2, 1], [1, 3]]), captured.eager(padded))


def test_the_memory_is_made_once(cached: Get) -> None:
    """Keys and values of cross-attention depend on no token of the target."""
    captured, program = cached("two_stacks")
    given = program.fresh(of_cache(captured, program), 12)
    given["input_ids"] = given["input_ids"][:, :1]
    with torch.no_grad():
        found = program.module(**given)["output"]
    tiny.assert_same({"output": found[:, 0]}, {"output": captured.eager()["output"][:, 0]})


def test_example_ids_of_zeros_and_ones_are_no_mask() -> None:
    captured = tiny.captured(partial(Decoder, window), {"input_ids": torch.zeros(2, 7, dtype=torch.int64)})
    program = apply(captured.program, "insert-cache")
    assert program.cache is not None
    assert (program.cache.tokens, dict(program.cache.implied)) == (("input_ids",), {})


# Numerics


@given(name=st.sampled_from([*SHARED, *MODELS]), seed=st.integers(0, 10**6), rows=st.integers(1, 3), data=st.data())
def test_any_chunks_give_what_one_pass_gives(cached: Get, name: str, seed: int, rows: int, data: Any) -> None:
    captured, program = cached(name)
    total, axis = data.draw(st.integers(1, 9), label="tokens"), axis_of(program)
    inputs = {}
    for key, value in of_cache(captured, program).items():
        value = value.index_select(1 - axis if key == "x" else 0, torch.arange(rows) % 2)
        if program.cache is not None and key in program.cache.tokens:
            value = value.index_select(axis, torch.arange(total) % value.shape[axis])
        inputs[key] = value
    expected = captured.eager(ones(program, inputs))
    tiny.assert_same(in_chunks(program, inputs, seed), expected)
    steps = data.draw(st.lists(st.lists(st.integers(0, 5), min_size=rows, max_size=rows), max_size=4), label="steps")
    tiny.assert_same(chunked(program, inputs, steps, spare=data.draw(st.integers(0, 3))), expected)


def test_up_to_the_last_place(cached: Get) -> None:
    captured, program = cached("decoder")
    inputs = {"input_ids": tiny.ids(64, seed=8)}
    tiny.assert_same(in_chunks(program, inputs), captured.eager(inputs))
    state = program.fresh(inputs, 64)
    for at in range(0, 64, 16):
        with torch.no_grad():
            made = program.module(**{**state, "input_ids": inputs["input_ids"][:, at : at + 16]})
        state |= {"lengths": state["lengths"] + 16}
        state |= {name: made[f"{name}_new"] for name in state if "cache" in name}
    tiny.assert_same({"output": made["output"]}, {"output": captured.eager(inputs)["output"][:, -16:]})


def test_what_lies_behind_a_rows_length_is_not_read(cached: Get) -> None:
    for name in ("decoder", "triangle", "alibi"):
        captured, program = cached(name)
        state = program.fresh(of_cache(captured, program), 12)
        state |= {key: torch.full_like(value, 1e3) for key, value in state.items() if "cache" in key}
        tiny.assert_same(tiny.outputs(program.module, state), captured.eager())


# Training


@pytest.mark.parametrize("name", ["decoder", "two_stacks", "triangle", "alibi"])
def test_the_rewritten_program_trains_as_the_model_does(cached: Get, name: str) -> None:
    captured, program = cached(name)
    weights = dict(captured.program.module.named_parameters())
    assert weights.keys() == dict(program.module.named_parameters()).keys()
    found = []
    for made in (captured.program, program):
        inputs = of_cache(captured, program)
        given = made.fresh(inputs) if made is program else inputs
        loss = made.module(**given)["output"].square().mean()
        made_of = torch.autograd.grad(loss, list(weights.values()), allow_unused=True)
        found.append(dict(zip(weights, made_of, strict=True)))
    expected, grads = found
    assert sum(grad is not None for grad in grads.values()) > 20
    assert all(bool(grad.isfinite().all()) for grad in grads.values() if grad is not None)
    torch.testing.assert_close(grads, expected, rtol=1e-4, atol=1e-6)


# With the other passes

EXITS = "insert-exits{after=1|2,head=own},insert-adapter{after=2,kind=mlp},insert-scores{measure=top1|cosine|learned}"


def perturbed(program: Program) -> Program:
    """The program, with the weights of its exits away from where passes start them; the same every time."""
    random = torch.Generator().manual_seed(0)
    for name, weight in sorted(program.module.named_parameters()):
        if name.startswith("exits."):
            weight.data += torch.randn(weight.shape, generator=random) / 4
    return program


@pytest.fixture(scope="session")
def orders(decoder: tiny.Captured) -> dict[str, Program]:
    """Exits with adapters and scores: alone, before the caches, and after them."""
    texts = {"alone": EXITS, "before": f"{EXITS},insert-cache", "after": f"insert-cache,{EXITS}"}
    return {name: perturbed(apply(decoder.program, text)) for name, text in texts.items()}


def test_exits_before_or_after_the_caches_give_the_same(decoder: tiny.Captured, orders: dict[str, Program]) -> None:
    expected = tiny.outputs(orders["alone"].module, decoder.inputs)
    assert len(expected) == 1 + 2 + 3 * 2 + 1  # the model's, exits', scores', and top1 at full depth
    for name in ("before", "after"):
        program = orders[name]
        found = chunked(program, decoder.inputs, [[3, 1], [1, 2]])
        assert found.keys() == expected.keys()
        tiny.assert_same(found, expected, atol=1e-5)
        tiny.assert_same(tiny.outputs(program.module, program.fresh(decoder.inputs)), expected, atol=1e-5)


def test_names_of_cuts_and_exits_stay(orders: dict[str, Program]) -> None:
    alone, before = orders["alone"], orders["before"]
    assert before.stacks == alone.stacks
    assert before.exits == alone.exits
    assert before.outputs == alone.outputs
    assert orders["after"].stacks == alone.stacks
    named = {name for stack in alone.stacks.values() for name in stack.cuts}
    named |= {name for item in alone.exits for name in (item.hidden, item.state)}
    assert named <= before.nodes.keys()
    for name in named:
        assert before.nodes[name].target == alone.nodes[name].target or "getitem" in str(before.nodes[name].target)


@pytest.mark.parametrize("order", ["before", "after"])
@pytest.mark.parametrize("after", [1, 2, 3])
def test_truncated_after_the_caches_is_truncated_before(
    decoder: tiny.Captured, orders: dict[str, Program], order: str, after: int
) -> None:
    expected = tiny.outputs(apply(orders["alone"], [Truncate(after=after)]).module, decoder.inputs)
    short = apply(orders[order], [Truncate(after=after)])
    assert short.cache is not None
    kept = [f"{kind}_cache_{i}" for i in range(after) for kind in ("key", "value")]
    assert list(short.cache.buffers) == list(short.cache.axes) == kept
    assert [name for name in short.example_inputs if "cache" in name] == kept
    tiny.assert_same(chunked(short, decoder.inputs, [[2, 4]]), expected)


def test_truncate_then_cache_is_cache_then_truncate(
    decoder: tiny.Captured, two_stacks: tiny.Captured, cached: Get
) -> None:
    _, program = cached("two_stacks")
    short = apply(program, "truncate{stack=encoder,after=2},truncate{stack=decoder,after=1}")
    assert short.cache is not None
    assert list(short.cache.buffers) == ["key_cache_0", "value_cache_0"]
    expected = tiny.outputs(
        tiny.cut(tiny.cut(two_stacks.model, 2, "encoder.blocks"), 1, "decoder.blocks"), two_stacks.inputs
    )
    tiny.assert_same(chunked(short, two_stacks.inputs, [[3, 1]]), expected)


def test_the_given_program_stays_as_it_was(decoder: tiny.Captured) -> None:
    before = str(decoder.program.graph)
    InsertCache().run(decoder.program)
    assert str(decoder.program.graph) == before
    assert (decoder.program.cache, decoder.program.history) == (None, ())


# Contract


def test_a_second_run_changes_nothing(cached: Get) -> None:
    _, program = cached("decoder")
    again = InsertCache().run(program)
    assert not again.modified
    assert again.program is program
    assert again.notes == ("the program has caches already",)


def test_what_was_edited(cached: Get) -> None:
    captured, program = cached("decoder")
    result = InsertCache().run(captured.program)
    assert result.modified
    assert result.edits["replaced"] == tiny.BLOCKS
    assert result.edits["inserted"] > 0
    assert str(result.program.graph) == str(program.graph)


@pytest.mark.parametrize("name", ["decoder", "triangle", "masked", "counted"])
def test_provenance(cached: Get, name: str) -> None:
    captured, program = cached(name)
    for node in tiny.added(captured.program, program):
        told = node.meta["provenance"]
        assert told["pass"] == "insert-cache", node.name
        assert told["from"] in {**captured.program.nodes, **program.nodes}, node.name


def test_a_result_that_differs_in_chunks_breaks_the_contract(cached: Get) -> None:
    captured, program = cached("decoder")
    InsertCache().ensures(captured.program, PassResult(program, {"inserted": 1}))
    broken = apply(captured.program, "truncate{after=3}")
    with pytest.raises(PassError, match=r"in chunks, output 'output' differs from one pass: relative error \d"):
        InsertCache().ensures(broken, PassResult(program, {"inserted": 1}))


# Refusals: all say where


def shifted(model: Decoder, x: Tensor, ids: Tensor) -> Tensor:
    return x + F.pad(x, (0, 0, 1, 0))[:, :-1]


def shifted_at_once(model: Decoder, x: Tensor, ids: Tensor) -> Tensor:
    return x + F.pad(x, (0, 0, 1, -1))


def convolved(model: Decoder, x: Tensor, ids: Tensor) -> Tensor:
    return x + model.conv(F.pad(x.transpose(1, 2), (2, 0))).transpose(1, 2)


def normed(model: Decoder, x: Tensor, ids: Tensor) -> Tensor:
    return model.norm(x.transpose(1, 2)).transpose(1, 2)


def summed(model: Decoder, x: Tensor, ids: Tensor) -> Tensor:
    return x + x.cumsum(1)


def multiplied(model: Decoder, x: Tensor, ids: Tensor) -> Tensor:
    return x + (x @ x.transpose(1, 2)).tril() @ x / 9


def placed(model: Decoder, x: Tensor, ids: Tensor) -> Tensor:
    return x + torch.ones(x.shape[1], x.shape[1]).tril() @ x


def counted(model: Decoder, x: Tensor, ids: Tensor) -> Tensor:
    return x / x.shape[1]


def counted_in_steps(model: Decoder, x: Tensor, ids: Tensor) -> Tensor:
    """The same for all chunks that are tried, not for a longer text."""
    return x * (1 + x.shape[1] // 16)


def chosen(above: int) -> Callable[[Any, Tensor, Tensor], Tensor]:
    """An embedding that is scaled otherwise in texts of more tokens."""

    def embed(model: Any, x: Tensor, input_ids: Tensor) -> Tensor:
        return x * torch.where(torch.arange(x.shape[1]).max() + 1 > above, 2.0, torch.ones(x.shape[2]))

    return embed


def placed_in_steps(model: Decoder, x: Tensor, ids: Tensor) -> Tensor:
    """Positions that are further apart in texts of 16 tokens and more."""
    return x + 0.01 * torch.arange(x.shape[1])[:, None] * (1 + x.shape[1] // 16)


def padded(model: Decoder, x: Tensor) -> Any:
    return F.pad(model.head(model.leave(x)), (0, 0, 1, 0))


class Compared(Decoder):
    """Every row with every other one, beside the logits."""

    def forward(self, input_ids: Tensor) -> Any:
        logits = self.run(self.embed(input_ids), None)
        return {"logits": logits, "similar": logits.mean(1) @ logits.mean(1).T}


class AnyMask(Decoder):
    """Several masks of padding, as many as one likes."""

    def __init__(self) -> None:
        super().__init__(masked)

    def forward(self, input_ids: Tensor, masks: Tensor) -> Any:
        triangle = torch.ones(input_ids.shape[1], input_ids.shape[1], dtype=torch.bool).tril()
        return self.run(self.embed(input_ids), triangle & masks.bool().any(1)[:, None, None])


class HalfOpen(tiny.Decoder):
    """The second block sees all tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks[1].causal = False


class TwoDecoders(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = Decoder(flagged), Decoder(triangle)

    def forward(self, input_ids: Tensor, other_ids: Tensor) -> dict[str, Tensor]:
        return {"one": self.first(input_ids), "two": self.second(other_ids)}


class Named(Decoder):
    def forward(self, lengths: Tensor) -> Any:
        return self.run(self.embed(lengths), None)


class Placed(Decoder):
    """Positions are given."""

    def forward(self, input_ids: Tensor, position_ids: Tensor) -> Any:
        return self.run(self.words(input_ids) + self.places(position_ids), None)


HERE = r"the model \(Decoder\), .*test_insert_cache.py:\d+"
REFUSALS: dict[str, tuple[Callable[[], nn.Module], tiny.Inputs, str]] = {
    "causal convolution": (
        partial(Decoder, embed=convolved),
        IDS,
        r"aten.conv1d.default convolves neighbouring tokens, .* \(conv \(Conv1d\), .*test_insert_cache.py:\d+\)",
    ),
    "token shift": (partial(Decoder, embed=shifted), IDS, rf"aten.slice.Tensor takes some of the tokens.*{HERE}"),
    "token shift at once": (partial(Decoder, embed=shifted_at_once), IDS, rf"aten.pad.default shifts the .*{HERE}"),
    "norm over tokens": (partial(Decoder, embed=normed), IDS, r"aten.group_norm.default normalises over the tokens"),
    "sum of features": (partial(Decoder, embed=summed), IDS, rf"a cumulative sum over more than .*{HERE}"),
    "linear attention": (partial(Decoder, embed=multiplied), IDS, rf"aten.matmul.default sums over the .*{HERE}"),
    "matrix of positions": (partial(Decoder, embed=placed), IDS, rf"way that is not understood.*{HERE}"),
    "number of tokens": (partial(Decoder, embed=counted), IDS, rf"aten.div.Tensor reads the number of tokens.*{HERE}"),
    "number of tokens in steps": (
        partial(Decoder, embed=counted_in_steps), IDS, rf"aten.mul.Tensor reads the number of tokens, .*{HERE}"
    ),
    "positions that start again": (
        Placed, {**IDS, "position_ids": torch.tensor([[0, 1, 2, 3, 0, 1, 2]] * 2)},
        r"the example ends with what is no text \(inputs \['position_ids'\]\)",
    ),
    "chosen by more tokens": (
        partial(Decoder, embed=chosen(4)), IDS, rf"the example's 7 tokens the model takes other numbers than .*{HERE}"
    ),
    "one token more": (partial(Decoder, tail=padded), IDS, r"no output is logits .*: output \['batch', 'tokens \+ 1'"),
    "rows that mix": (Compared, IDS, r"rows of input input_ids \(axis .* are not computed apart: see outputs similar"),
    "an axis of a mask alone": (
        AnyMask,
        {**IDS, "masks": tiny.padding()[:, None].repeat(1, 3, 1)},
        "input masks has an axis 'masks_1' that no other input has",
    ),
    "block that sees all": (HalfOpen, IDS, r"attention over the tokens is not causal \(blocks.1.attention "),
    "two decoders": (TwoDecoders, {**IDS, "other_ids": tiny.ids(9)}, "causal stacks .* read different axes of tokens"),
    "a taken name": (Named, {"lengths": tiny.ids()}, "the program already has something called lengths"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSALS)
def test_refusals(name: str) -> None:
    make, inputs, reason = REFUSALS[name]
    captured = tiny.captured(make, inputs)
    with pytest.raises(PassError, match=reason):
        apply(captured.program, "insert-cache")


def gathered(model: Any, x: Tensor, input_ids: Tensor) -> Tensor:
    """A look-up in a table that is as long as the batch."""
    return x + torch.ones(x.shape[0])[torch.arange(x.shape[0])][:, None, None]


def test_a_table_of_any_length_is_no_limit() -> None:
    program = apply(tiny.captured(partial(Decoder, embed=gathered), IDS).program, "insert-cache")
    assert program.cache is not None
    assert program.cache.limit == 64  # of the table of places


def along_its_second_axis(model: Any, x: Tensor, input_ids: Tensor) -> Tensor:
    return x + model.places.weight[None, :48][:, torch.arange(x.shape[1])]


def by_two_indices(model: Any, x: Tensor, input_ids: Tensor) -> Tensor:
    places = torch.arange(x.shape[1])
    return x + model.places.weight[None, :48][torch.zeros_like(places), places]


@pytest.mark.parametrize("embed", [along_its_second_axis, by_two_indices])
def test_a_table_that_is_indexed_behind_another_axis_is_a_limit(embed: Embed) -> None:
    captured = tiny.captured(partial(Decoder, embed=embed), IDS)
    program = apply(captured.program, "insert-cache")
    assert program.cache is not None
    assert program.cache.limit == 48
    longest = {"input_ids": tiny.ids(48)}
    tiny.assert_same(tiny.outputs(program.module, program.fresh(longest)), captured.eager(longest))


class CountedInFloats(Decoder):
    def embed(self, input_ids: Tensor) -> Tensor:
        places = (input_ids != 1).cumsum(1, dtype=torch.float32)
        return self.words(input_ids) + places[..., None] @ self.places.weight[:1]


def test_a_cumulative_sum_keeps_its_dtype() -> None:
    captured = tiny.captured(CountedInFloats, IDS)
    program = apply(captured.program, "insert-cache")
    tiny.assert_same(tiny.outputs(program.module, program.fresh(captured.inputs)), captured.eager())


@pytest.mark.parametrize(("embed", "most"), [(chosen(20), 20), (chosen(7), 7), (placed_in_steps, 15)])
def test_what_is_chosen_by_the_length_is_a_limit(embed: Embed, most: int) -> None:
    captured = tiny.captured(partial(Decoder, embed=embed), IDS)
    program = apply(captured.program, "insert-cache")
    assert program.cache is not None
    assert program.cache.limit == most
    longest = {"input_ids": tiny.ids(most)}
    tiny.assert_same(tiny.outputs(program.module, program.fresh(longest)), captured.eager(longest))


class Windows(tiny.Decoder):
    """Beside the text features, filled up to whole windows of four."""

    def forward(self, input_ids: Tensor, features: Tensor) -> Tensor:
        windows = math.ceil(features.shape[1] / 4)
        filled = F.pad(features, (0, 0, 0, windows * 4 - features.shape[1]))
        x = self.embed(input_ids) + filled.unflatten(1, (windows, 4)).mean(2).amax(1, keepdim=True)
        for block in self.blocks:
            x = block(x, None)
        return self.head(self.leave(x))


def test_a_length_may_be_divided_and_rounded() -> None:
    inputs = {"input_ids": tiny.ids(), "features": torch.randn(tiny.ROWS, 10, tiny.WIDTH)}
    model = tiny.seeded(Windows)
    program = apply(capture(model, inputs), "insert-cache")
    tiny.assert_same(program.module(**program.fresh(inputs)), {"output": tiny.outputs(model, inputs)["output"]})


def test_sizes_that_are_fixed() -> None:
    captured = tiny.captured(Decoder, IDS, dynamic={})
    with pytest.raises(PassError, match=r"shape \[2, 7, 16\], none of whose axes is the tokens of an input"):
        apply(captured.program, "insert-cache")


def test_encoders_need_none(encoder: tiny.Captured) -> None:
    with pytest.raises(SpecError, match="no causal stack: encoder see all tokens at once"):
        apply(encoder.program, "insert-cache")


def test_a_program_without_stacks(decoder: tiny.Captured) -> None:
    with pytest.raises(StructureError, match="no stack"):
        apply(replace(decoder.program, stacks={}), "insert-cache")


def test_a_block_as_adapter_would_need_a_cache_of_its_own(decoder: tiny.Captured) -> None:
    program = apply(decoder.program, "insert-exits{after=2},insert-adapter{kind=block}")
    with pytest.raises(SpecError, match=r"exit after block 2 has a block as its adapter, .* a cache of its own"):
        apply(program, "insert-cache")


# Programs with caches


def test_fresh_makes_room(cached: Get) -> None:
    captured, program = cached("masked")
    assert program.cache is not None
    given = program.fresh(captured.inputs, 9)  # the mask is not asked for
    assert set(given) == set(program.example_inputs)
    assert given["lengths"].tolist() == [0, 0]
    assert given["places"].tolist() == list(range(9))
    for name in program.cache.buffers:
        assert given[name].shape == (2, 2, 9, 8)
        assert not given[name].any()
    assert program.fresh(captured.inputs)["places"].shape == (tiny.TOKENS,)
    assert captured.program.fresh(captured.inputs) == captured.inputs
    assert captured.program.implied(captured.inputs) == {}
    assert program.implied({"input_ids": tiny.ids(3)})["attention_mask"].tolist() == [[1] * 3] * 2


def test_fresh_caches_of_rows_and_heads_on_one_axis(cached: Get) -> None:
    captured, program = cached("time_first")
    given = program.fresh(captured.inputs, 9)
    assert given["lengths"].shape == (tiny.ROWS,)
    assert given["key_cache_0"].shape == (tiny.ROWS * tiny.HEADS, 8, 9)
    assert given["value_cache_0"].shape == (tiny.ROWS * tiny.HEADS, 9, 8)
