"""Attention sites: every way of writing attention is found, with its mask, polarity, scale and soft-cap."""

# mypy: disable-error-code="no-any-return"
from __future__ import annotations

import math
from collections.abc import Callable
from functools import cache

import pytest
import tiny
import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F

from offramp.program import AttentionSite, Program, attention_sites, capture
from offramp.program.analysis.attention import is_causal, padding_mask
from offramp.program.graph import data_inputs, results
from offramp.program.program import evaluate

QUERIES, KEYS, SIZE = 5, 9, 8
SCALE = 0.3
Core = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]
FORMS: dict[str, Core] = {}


def form(core: Core) -> Core:
    """``core(q, k, v, mask)``: heads first, and a mask that is true where the key is seen."""
    FORMS[core.__name__] = core
    return core


def _low(mask: Tensor, least: float = -1e4) -> Tensor:
    return (1.0 - mask.float()) * least


@form
def fused_bool(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=SCALE)


@form
def fused_added(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v, attn_mask=_low(mask), scale=SCALE)


@form
def matmul_added(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    return ((q @ k.mT) * SCALE + _low(mask, torch.finfo(q.dtype).min)).softmax(-1) @ v


@form
def matmul_subtracted(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    return ((q @ k.mT) * SCALE - 1e4 * (1.0 - mask.float())).softmax(-1) @ v


@form
def matmul_divided(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    return (q @ k.mT / (1 / SCALE) + _low(mask)).softmax(-1) @ v


@form
def masked_fill(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    return (q @ k.mT * SCALE).masked_fill(~mask, -1e9).softmax(-1) @ v


@form
def where_seen(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    return torch.where(mask, q @ k.mT * SCALE, torch.finfo(q.dtype).min).softmax(-1) @ v


@form
def where_seen_tensor(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    return torch.where(mask, q @ k.mT * SCALE, torch.full((), -1e9)).softmax(-1) @ v


@form
def where_hidden(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    return torch.where(~mask, -1e9, q @ k.mT * SCALE).softmax(-1) @ v


@form
def where_hidden_tensor(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    return torch.where(~mask, torch.full((), -1e9), q @ k.mT * SCALE).softmax(-1) @ v


@form
def einsum_added(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    weights = (torch.einsum("bhqd,bhkd->bhqk", q, k) * SCALE + _low(mask)).softmax(-1)
    return torch.einsum("bhqk,bhkd->bhqd", weights, v)


@form
def einsum_keys_first(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    scores = torch.einsum("bhqd,bhkd->bhkq", q, k) * SCALE + _low(mask).mT
    return torch.einsum("bhkq,bhkd->bhqd", scores.softmax(-2), v)


@form
def bmm_added(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    rows, heads = q.shape[:2]
    q, k, v = (x.flatten(0, 1) for x in (q, k, v))
    scores = torch.bmm(q, k.mT).unflatten(0, (rows, heads)) * SCALE + _low(mask)
    return torch.bmm(scores.softmax(-1).flatten(0, 1), v).unflatten(0, (rows, heads))


@form
def baddbmm_added(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    rows, heads = q.shape[:2]
    added = _low(mask).expand(-1, heads, -1, -1).flatten(0, 1)
    q, k, v = (x.flatten(0, 1) for x in (q, k, v))
    return torch.bmm(torch.baddbmm(added, q, k.mT, alpha=SCALE).softmax(-1), v).unflatten(0, (rows, heads))


@form
def soft_capped(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    return (5.0 * torch.tanh(q @ k.mT * SCALE / 5.0) + _low(mask)).softmax(-1) @ v


@form
def exp_over_sum(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    scores = q @ k.mT * SCALE + _low(mask)
    powers = torch.exp(scores - scores.amax(-1, keepdim=True))
    return powers / powers.sum(-1, keepdim=True) @ v


@form
def exp_times_bool_over_sum(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    scores = q @ k.mT * SCALE
    powers = torch.exp(scores - scores.amax(-1, keepdim=True)) * mask
    return powers / (powers.sum(-1, keepdim=True) + 1e-9) @ v


@form
def exp_times_float_over_sum(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    scores = q @ k.mT * SCALE
    powers = mask.float() * torch.exp(scores - scores.amax(-1, keepdim=True))
    return powers / powers.sum(-1, keepdim=True).clamp(min=1e-9) @ v


class _Cross(nn.Module):
    def __init__(self, core: Core) -> None:
        super().__init__()
        self.core = core

    def forward(self, query: Tensor, memory: Tensor, reach: Tensor) -> Tensor:
        q, k, v = (x.unflatten(-1, (2, SIZE)).transpose(1, 2) for x in (query, memory, memory.cos()))
        return self.core(q, k, v, reach.bool()[:, None, None])


def _inputs() -> dict[str, Tensor]:
    random = torch.Generator().manual_seed(0)
    return {
        "query": torch.randn(tiny.ROWS, QUERIES, 2 * SIZE, generator=random),
        "memory": torch.randn(tiny.ROWS, KEYS, 2 * SIZE, generator=random),
        "reach": tiny.padding(KEYS),
    }


@cache
def _captured(name: str) -> Program:
    return capture(_Cross(FORMS[name]), _inputs())


@pytest.fixture(params=FORMS)
def program(request: pytest.FixtureRequest) -> Program:
    return _captured(request.param)


def _only(program: Program) -> AttentionSite:
    (site,) = attention_sites(program.graph)
    return site


def _read(node: fx.Node) -> set[str]:
    return {str(arg.target) for arg in _contents(node) if arg.op == "placeholder"}


def _contents(node: fx.Node) -> set[fx.Node]:
    """Every node whose contents a node depends on."""
    seen: set[fx.Node] = set()
    todo = [node]
    while todo:
        here = todo.pop()
        if here not in seen:
            seen.add(here)
            todo += data_inputs(here)
    return seen


def test_query_key_and_value_are_told_apart(program: Program) -> None:
    site = _only(program)
    assert [_read(node) for node in (site.query, site.key, site.value)] == [{"query"}, {"memory"}, {"memory"}]
    cosine = {node for node in program.graph.nodes if node.target is torch.ops.aten.cos.default}
    assert cosine & _contents(site.value)
    assert not cosine & _contents(site.key)


def test_scale(program: Program) -> None:
    assert _only(program).scale == pytest.approx(SCALE)


def test_soft_cap(program: Program) -> None:
    capped = program is _captured("soft_capped")
    assert _only(program).softcap == (pytest.approx(5.0) if capped else None)


def test_the_mask_shows_the_keys_that_are_not_padding(program: Program) -> None:
    site = _only(program)
    mask = padding_mask(site, program.axes.batch)
    if program is _captured("baddbmm_added"):
        assert site.masks, "its rows are folded with the heads, so it tells no padding, but it is a mask"
        return
    if program is _captured("einsum_keys_first"):
        (mask,) = site.masks
    assert mask is not None
    (value,) = evaluate(program.graph_module, [mask.node], _inputs()).values()
    seen = mask.visible(value).reshape(tiny.ROWS, KEYS)
    torch.testing.assert_close(seen, _inputs()["reach"].bool())


def test_token_axes(program: Program) -> None:
    named = {name: str(symbol) for symbol, name in program.axes.names.items()}
    assert {str(size) for size in _only(program).token_sizes} == set(named.values()) - {named["batch"]}
    queries, keys = _only(program).token_sizes
    assert (queries.node.hint, keys.node.hint) == (QUERIES, KEYS)


def test_the_output_mixes_the_values(program: Program) -> None:
    site = _only(program)
    assert site.form == ("sdpa" if site.weights is site.output else "decomposed")
    values = evaluate(program.graph_module, [site.weights, site.output], _inputs())
    weights, output = values[site.weights], values[site.output]
    if site.form == "decomposed":
        torch.testing.assert_close(weights.sum(site.key_axis), torch.ones((*weights.shape[:-2], QUERIES)))
    torch.testing.assert_close(output.reshape(-1), program.example_outputs["output"].reshape(-1), rtol=1e-5, atol=1e-6)


def test_all_forms_compute_the_same() -> None:
    expected = _Cross(fused_bool)(**_inputs())
    for core in FORMS.values():
        if core is not soft_capped:
            torch.testing.assert_close(_Cross(core)(**_inputs()), expected, rtol=1e-4, atol=1e-5)


# What is no attention


class _NoAttention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.router, self.experts = nn.Linear(tiny.WIDTH, 3), nn.Parameter(torch.ones(3, tiny.WIDTH))

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        chances = self.router(x).softmax(-1)
        return {
            "routed": chances @ self.experts,
            "pooled": (x.softmax(1) * x).sum(1),
            "ratio": x.exp() / x.sum(-1, keepdim=True),
            "kernel": x @ x.mT @ x,
        }


def test_routers_poolings_and_plain_products_are_not_attention() -> None:
    program = capture(_NoAttention(), {"x": torch.rand(2, 5, tiny.WIDTH)})
    assert attention_sites(program.graph) == []
    assert program.axes.tokens == ()


# Causality


def _tril(x: Tensor) -> Tensor:
    return torch.ones(x.shape[1], x.shape[1], dtype=torch.bool).tril()


CAUSAL: dict[str, tuple[bool, Callable[[Tensor, Tensor], Tensor]]] = {
    "causal": (True, lambda x, pad: _tril(x)),
    "causal, rows padded right": (True, lambda x, pad: _tril(x) & pad),
    "causal, added": (True, lambda x, pad: torch.zeros_like(_tril(x), dtype=x.dtype).masked_fill(~_tril(x), -1e4)),
    "window": (True, lambda x, pad: _tril(x) & (torch.ones_like(_tril(x)).triu(-2))),
    "every row padded": (True, lambda x, pad: _tril(x) & (torch.arange(x.shape[1]) < 4)),
    "padding alone": (False, lambda x, pad: pad),
    "none hidden": (False, lambda x, pad: torch.ones_like(_tril(x))),
    "anticausal": (False, lambda x, pad: _tril(x).mT),
    "two-sided window": (False, lambda x, pad: torch.ones_like(_tril(x)).triu(-2).tril(2)),
    "prefix": (False, lambda x, pad: _tril(x) | (torch.arange(x.shape[1]) < 3)),
    "bias by distance": (False, lambda x, pad: -_tril(x).float().cumsum(-1)),
}  # fmt: skip


class _Masked(nn.Module):
    """One attention for each mask."""

    def __init__(self, written_out: bool) -> None:
        super().__init__()
        self.written_out = written_out

    def attend(self, x: Tensor, mask: Tensor) -> Tensor:
        if not self.written_out:
            return F.scaled_dot_product_attention(x, x, x, attn_mask=mask)
        scores = x @ x.mT / math.sqrt(SIZE)
        scores = scores.masked_fill(~mask, -1e9) if mask.dtype == torch.bool else scores + mask
        return scores.softmax(-1) @ x

    def forward(self, x: Tensor, attention_mask: Tensor) -> dict[str, Tensor]:
        padding = attention_mask.bool()[:, None]
        return {name: self.attend(x, mask(x, padding)) for name, (_, mask) in CAUSAL.items()}


@cache
def _masked(written_out: bool) -> Program:
    random = torch.Generator().manual_seed(0)
    x = torch.randn(tiny.ROWS, tiny.TOKENS, SIZE, generator=random)
    return capture(_Masked(written_out), {"x": x, "attention_mask": tiny.padding()}, dynamic={})


@pytest.mark.parametrize("written_out", [False, True], ids=["fused", "written out"])
@pytest.mark.parametrize("name", CAUSAL)
def test_causality_is_read_off_the_values_of_the_masks(name: str, written_out: bool) -> None:
    program = _masked(written_out)
    made = results(program.graph)[name]  # of a fused attention over three axes by way of a view
    site = next(s for s in attention_sites(program.graph) if made in (s.output, *s.output.users))
    values = evaluate(program.graph_module, [mask.node for mask in site.masks], program.example_inputs)
    assert is_causal(site, values) is CAUSAL[name][0]


def test_the_flag_of_the_fused_operator_is_causal(decoder: tiny.Captured) -> None:
    sites = attention_sites(decoder.program.graph)
    assert [site.causal_flag for site in sites] == [True] * tiny.BLOCKS
    assert all(is_causal(site, {}) for site in sites)


def test_cross_attention_counts_two_axes(two_stacks: tiny.Captured) -> None:
    sites = attention_sites(two_stacks.program.graph)
    sizes = [tuple(size.node.hint for size in site.token_sizes) for site in sites]
    source, target = tiny.SOURCES, tiny.TOKENS
    assert sizes == [(source, source)] * tiny.BLOCKS + [(target, target), (target, source)] * 3
