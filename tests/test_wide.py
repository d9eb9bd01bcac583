"""Arithmetic in bfloat16 that a model's code asks for: float32 and rounded, as torch's own kernels do it."""

from __future__ import annotations

from pathlib import Path

import decoders
import numpy as np
import pytest
import tiny
import torch
from torch import Tensor, nn

import offramp
from offramp.errors import ExportError
from offramp.program import Program, capture
from offramp.program.canonical.wide import made_wide
from offramp.program.forward import named_outputs
from offramp.program.graph import aten, is_tensor

X = torch.randn(3, 5, 4, generator=torch.Generator().manual_seed(0))


class Cases(nn.Module):
    """Each method whose name is not private gives one output, of a value ``h`` in bfloat16 and a real one ``x``."""

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        names = [name for name in vars(Cases) if not name.startswith("_") and name != "forward"]
        return {name: getattr(self, name)(x.bfloat16(), x) for name in names}

    def product(self, h: Tensor, x: Tensor) -> Tensor:
        return h * h.sin()

    def chain(self, h: Tensor, x: Tensor) -> Tensor:
        return ((h + 0.1) * 3 - h).exp().float()

    def numbers(self, h: Tensor, x: Tensor) -> Tensor:
        return (h > 0.3) & (h - 0.7 < h * 0.9) | (h.remainder(0.3) == 0.1)

    def activations(self, h: Tensor, x: Tensor) -> Tensor:
        return nn.functional.silu(h).clamp(-0.1, 0.3) + nn.functional.gelu(h) / 0.3

    def powers(self, h: Tensor, x: Tensor) -> Tensor:
        return torch.add(h**3, h.abs().rsqrt(), alpha=0.3)

    def promoted(self, h: Tensor, x: Tensor) -> Tensor:
        return h * x

    def compared(self, h: Tensor, x: Tensor) -> Tensor:
        return h.sin() > 0.3

    def filled(self, h: Tensor, x: Tensor) -> Tensor:
        return h.masked_fill(x > 0, torch.finfo(torch.bfloat16).min)

    def parts(self, h: Tensor, x: Tensor) -> Tensor:
        first, second = (h * 1.7).chunk(2, -1)
        return torch.cat([second * first, first], -1).transpose(0, 1)

    def seen(self, h: Tensor, x: Tensor) -> Tensor:
        return h


@pytest.fixture(scope="module")
def program() -> Program:
    return capture(Cases(), X)


def test_values_are_those_of_torch_to_the_bit(program: Program) -> None:
    made, expected = program.module(x=X), Cases()(X)
    assert {name: value.dtype for name, value in made.items()} == {name: v.dtype for name, v in expected.items()}
    for name, value in expected.items():
        assert torch.equal(made[name], value), name


def test_nothing_is_computed_in_bfloat16(program: Program) -> None:
    calls = [node for node in program.graph.nodes if node.op == "call_function" and is_tensor(node)]
    narrow = {node.target for node in calls if node.meta["val"].dtype == torch.bfloat16}
    assert {target for target in narrow if torch.Tag.pointwise in getattr(target, "tags", ())} == {
        aten.pow.Tensor_Scalar,
        aten.rsqrt.default,
        aten.add.Tensor,  # with alpha
    }


def test_a_second_run_edits_nothing(program: Program) -> None:
    assert made_wide(program.graph) == 0


@pytest.mark.slow
def test_a_model_whose_biases_are_made_in_bfloat16(tmp_path: Path) -> None:
    """Falcon's alibi, which slopes that are no powers of two show."""
    module, inputs = decoders.OTHERS["falcon_alibi"]()
    program = offramp.apply(capture(module, inputs), "insert-exits{after=1},insert-cache")
    offramp.save(program, tmp_path / "m.offramp")
    chain = offramp.load(tmp_path / "m.offramp")
    with torch.no_grad():
        expected = named_outputs(module(**inputs))["logits"].numpy()
    found = chain.run({name: value.numpy() for name, value in inputs.items()}).outputs["logits"]
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-4)


class Narrow(tiny.Encoder):
    def forward(self, *args: Tensor, **kwargs: Tensor) -> dict[str, Tensor]:
        return {name: value.bfloat16() for name, value in super().forward(*args, **kwargs).items()}


def test_an_output_in_bfloat16_is_refused_where_it_is_made(tmp_path: Path) -> None:
    made = tiny.captured(Narrow, tiny.text()).program
    with pytest.raises(ExportError, match=r"test_wide\.py:\d+\) is bfloat16, .*\n  try: .*\.float\(\)"):
        offramp.save(made, tmp_path / "m.offramp")
