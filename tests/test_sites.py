"""Sites: MLPs and the projections around attentions, found by what reads what."""

# mypy: disable-error-code="no-any-return"
from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import architectures
import decoders
import pytest
import shared
import tiny
import torch
from breadth import slow_but
from test_insert_acm import undecided
from torch import Tensor, nn
from torch.nn import functional as F

import offramp
from offramp.passes import apply
from offramp.program import Program, capture
from offramp.program.analysis.sites import Site, attentions, block_flops, find_sites
from offramp.program.compare import TOLERANCE

QKVO = ("query", "key", "value", "output")
FACTORIES = {**architectures.REQUIRED, **architectures.OTHERS, **decoders.REQUIRED, **decoders.OTHERS}
KINDS = {
    "bert": (*QKVO, "mlp"),
    "albert": (*QKVO, "mlp"),
    "vit": (*QKVO, "mlp"),
    "wav2vec2": (*QKVO, "mlp"),
    "gpt2": ("qkv", "output", "mlp"),
    "llama": (*QKVO, "mlp"),
    "phi": (*QKVO, "mlp"),
    "whisper": (*QKVO, *QKVO, "mlp"),
    "bart": (*QKVO, *QKVO, "mlp"),
    "t5_gated": (*QKVO, *QKVO, "mlp"),
    "phi3": ("qkv", "output", "mlp"),  # both halves of a gated MLP are one product
    "gemma2": (*QKVO, "mlp"),  # norms behind the MLP, too
    "falcon": ("qkv", "output", "mlp"),  # weights are transposed in the graph
    "mixtral": QKVO,  # experts are left alone
}
GATED = ("llama", "t5_gated", "phi3", "gemma2")


def sites(program: Program, stack: str | None = None) -> list[list[Site]]:
    """The sites of each block of a stack, the last one where none is named."""
    found, mixing = program.stacks[stack or list(program.stacks)[-1]], attentions(program.graph)
    return [find_sites(program.own_nodes(found, index), mixing) for index in range(found.blocks)]


@pytest.mark.parametrize("name", slow_but(("bert", "gpt2", "llama", "whisper"), KINDS))
def test_kinds(name: str) -> None:
    pytest.importorskip("transformers")
    program = shared.captured(FACTORIES[name])
    found = sites(program)
    for block in found:
        assert sorted(site.kind for site in block) == sorted(KINDS[name])
        for site in block:
            assert site.gated == (site.kind == "mlp" and name in GATED)
            assert bool(site.inner) == (site.kind == "mlp")
            assert site.residual or site.kind not in ("mlp", "output")


def test_the_sites_of_a_cached_decoder_are_those_of_the_program(decoder: tiny.Captured) -> None:
    cached = apply(decoder.program, "insert-cache")
    kinds = [[site.kind for site in block] for block in sites(decoder.program)]
    assert kinds == [["query", "kv", "output", "mlp"]] * tiny.BLOCKS
    assert [[site.kind for site in block] for block in sites(cached)] == kinds


def test_what_a_site_is_made_of(encoder: tiny.Captured) -> None:
    mixing = attentions(encoder.program.graph)
    stack = encoder.program.stacks["encoder"]
    block = encoder.program.own_nodes(stack, 2)
    query, fused, output, mlp = find_sites(block, mixing)
    assert [str(item.weight.target) for item in mlp.products] == ["blocks.2.mlp.0.weight", "blocks.2.mlp.2.weight"]
    assert [(item.features, item.units) for item in mlp.products] == [(tiny.WIDTH, 24), (24, tiny.WIDTH)]
    assert mlp.parameters == 2 * 24 * tiny.WIDTH + 24 + tiny.WIDTH
    tokens = tiny.ROWS * tiny.TOKENS
    assert mlp.flops == 2 * tokens * 2 * 24 * tiny.WIDTH
    assert fused.flops == 2 * query.flops == 2 * output.flops
    contractions = 2 * 2 * tokens * tiny.TOKENS * tiny.WIDTH
    assert block_flops(block, mixing) == sum(site.flops for site in (query, fused, output, mlp)) + contractions


def test_a_program_shows_them(encoder: tiny.Captured) -> None:
    (line,) = [line for line in str(encoder.program).splitlines() if line.split()[0] == "sites"]
    assert line.split(None, 1)[1] == "query 272 (13%), kv 544 (25%), output 272 (13%), mlp 808 (38%)"


class _Block(nn.Module):
    """Attention, and behind it what ``make`` says."""

    def __init__(self, make: Callable[[], nn.Module]) -> None:
        super().__init__()
        self.attention, self.rest = tiny.Attention(), make()

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(x, x, None)
        return x + self.rest(x)


class _Product(nn.Module):
    """``x @ w + b`` written out."""

    def __init__(self, features: int, units: int) -> None:
        super().__init__()
        self.w, self.b = nn.Parameter(torch.randn(features, units) / 4), nn.Parameter(torch.randn(units))

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.w + self.b


class _Scaled(nn.Module):
    """Hidden units have factors of their own, and three products."""

    def __init__(self) -> None:
        super().__init__()
        self.gate, self.up, self.down = (nn.Linear(*sizes, bias=False) for sizes in ((16, 24), (16, 24), (24, 16)))
        self.scale = nn.Parameter(torch.rand(24))

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.silu(self.gate(x)) * self.up(x) * self.scale)


class _Halves(nn.Module):
    """Both halves of a gated MLP by one product."""

    def __init__(self, split: bool, first: int = 24) -> None:
        super().__init__()
        self.up, self.down, self.split, self.first = nn.Linear(16, 48), nn.Linear(first, 16), split, first

    def forward(self, x: Tensor) -> Tensor:
        both = self.up(x)
        gate, value = both.split(24, -1) if self.split else (both[..., : self.first], both[..., 24:])
        return self.down(F.silu(gate) * value[..., : self.first])


class _Glu(nn.Module):
    """Both halves of a gated MLP by one product, and what multiplies them by one operator."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(16, 48), nn.Linear(24, 16)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.glu(self.up(x)))


class _EveryOther(nn.Module):
    """Of what the first product makes, every other value is a hidden unit: no half."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(16, 48), nn.Linear(24, 16)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.gelu(self.up(x)[..., ::2]))


class _Einsum(nn.Module):
    """Products as sums over an index."""

    def __init__(self, first: str, second: str) -> None:
        super().__init__()
        self.equations = first, second
        up, down = torch.randn(16, 24) / 4, torch.randn(24, 16) / 4
        self.up = nn.Parameter(up.T.contiguous() if "fi" in first else up)
        self.down, self.bias = (
            nn.Parameter(down.T.contiguous() if "of" in second else down),
            nn.Parameter(torch.randn(24)),
        )

    def forward(self, x: Tensor) -> Tensor:
        hidden = F.gelu(torch.einsum(self.equations[0], x, self.up) + self.bias)
        return torch.einsum(self.equations[1], hidden, self.down)


class _Transposed(nn.Module):
    """Weights lie the other way round."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Parameter(torch.randn(24, 16) / 4), nn.Parameter(torch.randn(16, 24) / 4)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(x @ self.up.T) @ self.down.T


class _Normed(nn.Module):
    """A norm mixes hidden units."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.norm, self.down = nn.Linear(16, 24), nn.LayerNorm(24), nn.Linear(24, 16)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.norm(F.gelu(self.up(x))))


class _Folded(nn.Module):
    """Factors of hidden units lie in a table of two axes."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(16, 24), nn.Linear(24, 16)
        self.scale = nn.Parameter(torch.rand(2, 12))

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.gelu(self.up(x)) * self.scale.reshape(24))


class _Row(nn.Module):
    """Factors of hidden units lie along the last of three axes; of others the program makes that."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down, self.scale = nn.Linear(16, 24), nn.Linear(24, 16), nn.Parameter(torch.rand(24))
        self.row = nn.Buffer(torch.rand(1, 1, 24))

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.gelu(self.up(x)) * self.row * self.scale.view(1, 1, 24))


class _Read(nn.Module):
    """What the hidden units are is used twice."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(16, 16), nn.Linear(16, 16)

    def forward(self, x: Tensor) -> Tensor:
        hidden = F.gelu(self.up(x))
        return self.down(hidden) + hidden


class _TwoInputs(nn.Module):
    """The products that are multiplied read different values."""

    def __init__(self) -> None:
        super().__init__()
        self.gate, self.up, self.down = nn.Linear(16, 24), nn.Linear(16, 24), nn.Linear(24, 16)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.silu(self.gate(x)) * self.up(x.sin()))


MADE: dict[str, tuple[Callable[[], nn.Module], int]] = {
    "matmul": (lambda: nn.Sequential(_Product(16, 24), nn.ReLU(), _Product(24, 16)), 1),
    "deep": (lambda: nn.Sequential(nn.Linear(16, 24), nn.GELU(), nn.Linear(24, 24), nn.GELU(), nn.Linear(24, 16)), 1),
    "scaled": (_Scaled, 1),
    "halves": (lambda: _Halves(split=True), 1),
    "sliced halves": (lambda: _Halves(split=False), 1),
    "less than halves": (lambda: _Halves(split=False, first=16), 0),
    "glu": (_Glu, 1),
    "every other": (_EveryOther, 0),
    "einsum": (lambda: _Einsum("bti,if->btf", "btf,fo->bto"), 1),
    "einsum, transposed": (lambda: _Einsum("... i, fi -> ... f", "...f,of->...o"), 1),
    "hardswish": (lambda: nn.Sequential(nn.Linear(16, 24), nn.Hardswish(), nn.Linear(24, 16)), 1),
    "one slope": (lambda: nn.Sequential(nn.Linear(16, 24), nn.PReLU(), nn.Linear(24, 16)), 1),
    "slopes of tokens": (lambda: nn.Sequential(nn.Linear(16, 24), nn.PReLU(5), nn.Linear(24, 16)), 0),
    "transposed": (_Transposed, 1),
    "low rank": (lambda: nn.Sequential(nn.Linear(16, 4, bias=False), nn.Linear(4, 16)), 0),
    "normed": (_Normed, 0),
    "folded": (_Folded, 0),
    "a row": (_Row, 1),
    "read twice": (_Read, 0),
    "two inputs": (_TwoInputs, 0),
}


def of(make: Callable[[], nn.Module]) -> Program:
    """Two blocks with that behind the attention."""
    module = tiny.seeded(lambda: nn.Sequential(*(_Block(make) for _ in range(2))))
    example: Any = {"input": torch.randn(2, 5, 16, generator=torch.Generator().manual_seed(0))}
    return capture(module, example)


@pytest.mark.parametrize("name", MADE)
def test_what_is_an_mlp(name: str) -> None:
    make, count = MADE[name]
    program = of(make)
    for block in sites(program):
        found = [site for site in block if site.kind == "mlp"]
        assert len(found) == count
        assert all(site.gated == (name in ("scaled", "halves", "sliced halves", "glu")) for site in found)
        assert all(site.importance(program.graph_module).shape == (24,) for site in found)
    if count == 1:  # every copy of a weight is in the order of the learners, or the pass refuses its own result
        assert len(apply(program, "insert-acm{learners=5}").records) == 2


def test_learners_that_run_grouped_have_their_own_factors(tmp_path: Path) -> None:
    program = undecided(apply(of(_Row), "insert-acm"))
    figures = offramp.save(program, tmp_path / "m.offramp", learners="grouped")
    assert max(value for key, value in figures.items() if key != "tolerance") <= TOLERANCE
