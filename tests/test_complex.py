"""Complex numbers: a captured graph has none, and computes what the model did."""

# mypy: disable-error-code="no-any-return"
from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import tiny
import torch
from breadth import slow_but
from torch import Tensor, nn
from torch.nn import functional as F

import offramp
from offramp.errors import CaptureError
from offramp.passes import Truncate, apply
from offramp.program import capture
from offramp.program.graph import is_tensor

X = torch.randn(3, 5, 4, 2, generator=torch.Generator().manual_seed(0))
REST = torch.view_as_complex(X)


class Cases(nn.Module):
    """Each method whose name is not private gives one output, of a complex value ``z`` and a real one, [3, 5, 4]."""

    def __init__(self) -> None:
        super().__init__()
        self.table = torch.polar(torch.ones(16, 4), torch.outer(torch.arange(16.0), torch.rand(4)))
        self.register_buffer("buffer", self.table[:8].clone())
        self.weight = nn.Parameter(torch.randn(4, 4, dtype=torch.complex64))
        self.buffer: Tensor

    @classmethod
    def names(cls) -> list[str]:
        return [name for name in vars(cls) if not name.startswith("_") and name not in ("names", "forward")]

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        z = torch.view_as_complex(x)
        return {name: torch.view_as_real(made) if (made := getattr(self, name)(z, x[..., 0])).is_complex() else made
                for name in self.names()}  # fmt: skip

    def rotation(self, z: Tensor, r: Tensor) -> Tensor:
        return z * self.table[: z.shape[1]].view(1, z.shape[1], 4)

    def stored(self, z: Tensor, r: Tensor) -> Tensor:
        return z * self.buffer[None, : z.shape[1]].conj()

    def made_here(self, z: Tensor, r: Tensor) -> Tensor:
        angles = torch.outer(torch.arange(z.shape[1]).float(), 2.0 ** -torch.arange(4))
        return z * torch.polar(torch.ones_like(angles), angles)

    def exponential(self, z: Tensor, r: Tensor) -> Tensor:
        return z * torch.exp(1j * r) + torch.exp(z)

    def parts_joined(self, z: Tensor, r: Tensor) -> Tensor:
        return torch.complex(r.cos(), r.sin()) * z

    def layout(self, z: Tensor, r: Tensor) -> Tensor:
        y = z.unsqueeze(1).expand(-1, 2, -1, -1).reshape(z.shape[0], -1, 4).transpose(1, 2).flip(1)
        return torch.cat([y[:, 1:], y[:, :1] * 2], 1).permute(2, 0, 1).contiguous()

    def lists(self, z: Tensor, r: Tensor) -> Tensor:
        first, second = z.chunk(2, -1)
        return torch.stack([second, first.unbind(-1)[0][..., None] * first, z[..., [0, 2]]], -1)

    def real_beside_complex(self, z: Tensor, r: Tensor) -> Tensor:
        return torch.cat([z, r.to(torch.complex64)], -1) + r[..., :1] - 3 + 2j

    def a_number(self, z: Tensor, r: Tensor) -> Tensor:
        return (z * (2 - 1j) + 1j) / 2 - z / (1 + 1j) + 0.5 * z

    def quotient(self, z: Tensor, r: Tensor) -> Tensor:
        return z / (self.table[: z.shape[1]] + 2) / (r * r + 1)

    def chosen(self, z: Tensor, r: Tensor) -> Tensor:
        return torch.where(r > 0, z, -z.conj())

    def sums(self, z: Tensor, r: Tensor) -> Tensor:
        return z.sum(-1, keepdim=True) - z.mean(-1, keepdim=True) - z.sum(-1)[..., None]

    def products(self, z: Tensor, r: Tensor) -> Tensor:
        return z @ self.weight + r.to(torch.complex64) @ self.weight

    def magnitude(self, z: Tensor, r: Tensor) -> Tensor:
        return z.abs() + z.real - z.imag + torch.view_as_real(z)[..., 1]

    def looked_up(self, z: Tensor, r: Tensor) -> Tensor:
        return z * F.embedding(torch.arange(z.shape[1]), self.table).index_select(1, torch.tensor([1, 0, 3, 2]))

    def of_one_kind(self, z: Tensor, r: Tensor) -> Tensor:
        return torch.ones_like(z) + torch.zeros_like(z) * z


@pytest.fixture(scope="module")
def cases() -> tuple[Cases, offramp.Program]:
    module = tiny.seeded(Cases)
    return module, capture(module, (X,), {"x": {0: "batch", 1: "tokens"}})


@pytest.mark.parametrize("name", Cases.names())
@pytest.mark.parametrize("sizes", [(3, 5), (2, 7)], ids=str)
def test_every_form(cases: tuple[Cases, offramp.Program], name: str, sizes: tuple[int, int]) -> None:
    module, program = cases
    x = X.repeat(2, 2, 1, 1)[: sizes[0], : sizes[1]].contiguous()
    with torch.no_grad():
        torch.testing.assert_close(program.module(x=x)[name], module(x)[name])


def test_nothing_complex_is_left(cases: tuple[Cases, offramp.Program]) -> None:
    _, program = cases
    assert not [node for node in program.graph.nodes if is_tensor(node) and node.meta["val"].is_complex()]
    assert not any(value.is_complex() for value in program.graph_module.state_dict().values())
    assert all(node.meta.get("stack_trace") for node in program.graph.nodes if node.op == "call_function")
    trained = dict(program.module.named_parameters())
    assert {"weight_real", "weight_imag"} <= set(trained)


class Of(nn.Module):
    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x)


def test_what_has_no_real_form_is_named_with_its_line() -> None:
    with pytest.raises(CaptureError, match=r"aten\.fft_fft\.default|aten\._fft_r2c\.default.*test_complex\.py"):
        capture(Of(lambda x: torch.fft.fft(x).real), (X,))
    with pytest.raises(CaptureError, match=r"aten\.pow\.Tensor_Scalar on complex numbers.*test_complex\.py:\d+"):
        capture(Of(lambda x: (torch.view_as_complex(x) ** 3).abs()), (X,))


def test_complex_inputs_and_outputs_are_refused() -> None:
    with pytest.raises(CaptureError, match=r"the input 'x' is complex[\s\S]*view_as_complex"):
        capture(Of(lambda x: x.abs()), (REST,))
    with pytest.raises(CaptureError, match=r"the outputs \['output'\] are complex[\s\S]*view_as_real"):
        capture(Of(torch.view_as_complex), (X,))


# Rotary positions as Llama's first code has them


def angles(size: int, end: int) -> Tensor:
    steps = 1.0 / (100.0 ** (torch.arange(0, size, 2)[: size // 2].float() / size))
    turned = torch.outer(torch.arange(end), steps).float()
    return torch.polar(torch.ones_like(turned), turned)


def rotated(q: Tensor, k: Tensor, freqs_cis: Tensor) -> tuple[Tensor, Tensor]:
    """Queries and keys, [rows, tokens, heads, features]."""
    q_, k_ = (torch.view_as_complex(x.float().reshape(*x.shape[:-1], -1, 2)) for x in (q, k))
    freqs_cis = freqs_cis.view(1, q_.shape[1], 1, q_.shape[-1])
    return tuple(torch.view_as_real(x * freqs_cis).flatten(3).type_as(q) for x in (q_, k_))  # type: ignore[return-value]


class RotaryBlock(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norms = nn.ModuleList(nn.LayerNorm(tiny.WIDTH) for _ in range(2))
        self.qkv, self.out = nn.Linear(tiny.WIDTH, 3 * tiny.WIDTH), nn.Linear(tiny.WIDTH, tiny.WIDTH)
        self.mlp = nn.Sequential(nn.Linear(tiny.WIDTH, 24), nn.GELU(), nn.Linear(24, tiny.WIDTH))

    def forward(self, x: Tensor, freqs_cis: Tensor, mask: Tensor) -> Tensor:
        q, k, v = self.qkv(self.norms[0](x)).unflatten(-1, (3, tiny.HEADS, -1)).unbind(2)
        q, k = rotated(q, k, freqs_cis)
        q, k, v = (part.transpose(1, 2) for part in (q, k, v))
        weights = (q @ k.transpose(2, 3) / q.shape[-1] ** 0.5 + mask).softmax(-1)
        x = x + self.out((weights @ v).transpose(1, 2).flatten(2))
        return x + self.mlp(self.norms[1](x))


class Rotary(nn.Module):
    """Its table is a plain attribute, or made in the forward."""

    def __init__(self, stored: bool) -> None:
        super().__init__()
        self.words, self.head = nn.Embedding(tiny.WORDS, tiny.WIDTH), nn.Linear(tiny.WIDTH, tiny.WORDS)
        self.blocks = nn.ModuleList(RotaryBlock() for _ in range(3))
        self.freqs_cis = angles(tiny.WIDTH // tiny.HEADS, 64) if stored else None

    def forward(self, tokens: Tensor) -> Tensor:
        count = tokens.shape[1]
        made = angles(tiny.WIDTH // tiny.HEADS, count) if self.freqs_cis is None else self.freqs_cis[:count]
        mask = torch.full((1, 1, count, count), float("-inf")).triu(1)
        x = self.words(tokens)
        for block in self.blocks:
            x = block(x, made, mask)
        return self.head(x)


@pytest.mark.parametrize("stored", slow_but([True], [True, False]), ids=["stored", "made"])
def test_generation_with_complex_positions(tmp_path: Path, stored: bool) -> None:
    model = tiny.seeded(lambda: Rotary(stored))
    captured = capture(model, (tiny.ids(),))
    assert {stack.name: (stack.role, stack.blocks) for stack in captured.stacks.values()} == {"decoder": ("decoder", 3)}
    program = apply(captured, "insert-cache,insert-exits")
    offramp.save(program, tmp_path / "m.offramp")
    chain = offramp.load(tmp_path / "m.offramp")
    assert chain.manifest.cache is not None
    assert chain.manifest.cache.limit == (64 if stored else None)
    found = chain.generate({"tokens": [[1, 2, 3], [4]]}, max_new_tokens=9)
    for row, prompt in enumerate([[1, 2, 3], [4]]):
        assert found.tokens[row].tolist() == written(model, prompt, 9)
    with torch.no_grad():
        short = apply(captured, [Truncate(after=1)]).module(tokens=tiny.ids())["output"]
    early = chain.run({"tokens": tiny.ids().numpy()}, offramp.Depth(1)).outputs["output"]
    np.testing.assert_allclose(early, short, rtol=1e-4, atol=1e-5)


def test_complex_tables_of_a_model_in_half_precision_stay_complex() -> None:
    model = tiny.seeded(lambda: Rotary(stored=True))
    table = model.freqs_cis
    del model.freqs_cis
    model.register_buffer("freqs_cis", table)
    program = capture(model.bfloat16(), (tiny.ids(),))
    with torch.no_grad():
        tiny.assert_same(program.module(tokens=tiny.ids()), {"output": copy.deepcopy(model).float()(tiny.ids())})


def written(model: nn.Module, prompt: list[int], count: int) -> list[int]:
    ids = list(prompt)
    with torch.no_grad():
        for _ in range(count):
            ids.append(int(model(torch.tensor([ids]))[0, -1].argmax()))
    return ids[len(prompt) :]
