"""Architectures end to end: captured, cut at every block, exported, and compared with torch."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path

import architectures
import pytest
import shared
import torch
from breadth import slow_but
from torch import Tensor, nn

import offramp
from offramp.errors import OfframpError
from offramp.export import save
from offramp.export.validation import eager, worst
from offramp.passes import InsertExits, Truncate, apply
from offramp.program import capture
from offramp.program.compare import TOLERANCE
from offramp.program.forward import named_outputs

FACTORIES = {**architectures.REQUIRED, **architectures.OTHERS, **architectures.REFUSED}
KINDS = ("torch_encoder_post", "einsum_encoder", "looped_block", "bert", "vit")

# How many blocks each stack has.
STACKS: dict[str, dict[str, int]] = {
    **{name: {"encoder": 4} for name in architectures.REQUIRED},
    "attribute_blocks": {"stack0": 4},
    "deberta": {"encoder": 4},
    "deberta_v2": {"encoder": 3},  # a convolution beside the first block
    "xlnet": {"encoder": 4},
    "t5_encoder": {"encoder": 4},
    "modernbert": {"encoder": 3},  # no norm before the first attention
    "convbert": {"encoder": 4},
    "wav2vec2_conformer": {"encoder": 4},
    "swin": {"encoder0": 2, "encoder1": 2, "encoder2": 2},
    "levit": {"encoder0": 2, "encoder1": 2, "encoder2": 2},
    "patchtst": {"encoder": 4},
    "perceiver": {"encoder": 4},
    "input_injection": {"encoder": 4},
    "first_block_bias": {"encoder": 4},
    "dual_tower": {"query": 4, "encoder": 3},
}


@pytest.fixture(scope="module", autouse=True)
def _plain_attention() -> Iterator[None]:
    """torch.nn's fused encoder layer fills padding with zeros, which the plain one that is captured does not."""
    enabled = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    yield
    torch.backends.mha.set_fastpath_enabled(enabled)


def built(name: str) -> tuple[nn.Module, dict[str, Tensor]]:
    try:
        return FACTORIES[name]()
    except ModuleNotFoundError as error:
        if error.name != "transformers":
            raise
        pytest.skip("transformers is not installed")


def of_eager(module: nn.Module, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
    with torch.no_grad():
        return named_outputs(module(**inputs))


@pytest.mark.parametrize("name", slow_but(KINDS, STACKS))
def test_an_exit_after_every_block(name: str, tmp_path: Path) -> None:
    module, inputs = built(name)
    program = shared.captured(FACTORIES[name])
    assert {stack.name: stack.blocks for stack in program.stacks.values()} == STACKS[name]
    program = apply(program, [InsertExits(stack) for stack in program.stacks])
    assert [(item.stack, item.after) for item in program.exits] == [
        (stack, after) for stack, blocks in STACKS[name].items() for after in range(1, blocks)
    ]
    figures = save(program, tmp_path / "m.offramp")
    assert max(figures.values()) <= TOLERANCE == figures["tolerance"] == 1e-4

    chain = offramp.load(tmp_path / "m.offramp")
    assert {name: len(stack.exits) for name, stack in chain.stacks.items()} == STACKS[name]
    others = architectures.resized(name, inputs)
    for given in (inputs, others):
        arrays = {key: value.numpy() for key, value in given.items()}
        assert worst(chain.run(arrays).outputs, of_eager(module, given)) <= TOLERANCE
    full = of_eager(module, others)
    for item in program.exits:
        expected = eager(apply(program, [Truncate(item.stack, item.after)]), others)
        result = chain.run(arrays, offramp.Depth({item.stack: item.after}))
        assert worst(result.outputs, expected) <= TOLERANCE
        assert set(result.exits[item.stack].tolist()) == {item.after}
        assert any(worst({key: value.numpy()}, {key: full[key]}) > 1e-3 for key, value in expected.items())


REASONS = {
    "mlp": ("structure", "no stack: the model has no attention"),
    "mamba": ("structure", "no stack: the model has no attention"),
    "data_dependent_loop": ("capture", "torch.export cannot capture _DataDependentLoop: .*architectures.py"),
    "one_block": ("structure", "no stack: the model has one attention"),
    "non_tensor_output": ("capture", "the forward returns outputs that are not tensors: names is a set"),
    "states_out": (
        "structure",
        "with the outputs .*means.* the model returns values from between its blocks",
    ),
}


@pytest.mark.parametrize("name", REASONS)
def test_what_is_refused(name: str) -> None:
    stage, reason = REASONS[name]
    module, inputs = built(name)
    with pytest.raises(OfframpError, match=reason) as caught:
        capture(module, inputs).require_stacks()
    assert caught.value.stage == stage
    assert caught.value.hint is not None


def test_every_refused_architecture_has_its_reason() -> None:
    assert set(REASONS) == set(architectures.REFUSED)
