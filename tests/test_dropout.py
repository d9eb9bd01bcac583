"""Capture for training: dropout is kept, switched by the module's mode, and gone at export."""

from __future__ import annotations

import functools

import numpy as np
import pytest
import tiny
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import offramp
from offramp.program.dropout import keeps
from offramp.program.graph import aten


class Dropping(tiny.Talker):
    """Drops embeddings, attention weights of the fused operator, and what blocks add."""

    def __init__(self, probability: float = 0.5) -> None:
        super().__init__()
        self.drop = nn.Dropout(probability)
        self.probability = probability

    def forward(self, input_ids: Tensor) -> Tensor:  # type: ignore[override]
        x = self.drop(self.embed(input_ids))
        for block in self.blocks:
            y = x[:, None]
            dropped = self.probability if self.training else 0.0
            x = x + F.scaled_dot_product_attention(y, y, y, dropout_p=dropped, is_causal=True)[:, 0]
            x = x + self.drop(block.mlp(x))
        out: Tensor = self.head(self.leave(x))
        return out


class Noisy(tiny.Talker):
    def forward(self, input_ids: Tensor) -> Tensor:  # type: ignore[override]
        x = self.embed(input_ids)
        out: Tensor = self.head(x + torch.rand_like(x) if self.training else x)
        return out


class Normalised(tiny.Talker):
    """Uses statistics of the batch in training mode."""

    def forward(self, input_ids: Tensor) -> Tensor:  # type: ignore[override]
        x = self.embed(input_ids)
        out: Tensor = self.head(x - x.mean((0, 1)) if self.training else x)
        return out


def program(training: bool = True, model: nn.Module | None = None) -> offramp.Program:
    torch.manual_seed(3)
    if model is None:
        return plain(training)
    return offramp.capture(model, {"input_ids": tiny.ids()}, training=training)


@functools.cache
def plain(training: bool) -> offramp.Program:
    return offramp.capture(Dropping(), {"input_ids": tiny.ids()}, training=training)


def test_dropout_follows_the_mode_of_the_module() -> None:
    made = program()
    module, inputs = made.module, made.example_inputs
    assert not module.training
    assert torch.equal(module(**inputs)["output"], module(**inputs)["output"])
    module.train()
    assert not torch.allclose(module(**inputs)["output"], module(**inputs)["output"])
    module.eval()
    torch.testing.assert_close(module(**inputs)["output"], made.example_outputs["output"])


def test_both_kinds_of_dropout_are_kept_with_their_probability() -> None:
    kept = [node for node in program().graph.nodes if keeps(node)]
    assert {node.target for node in kept} == {aten.dropout.default, aten.scaled_dot_product_attention.default}
    assert {node.meta["kept_dropout"] for node in kept} == {0.5}
    assert len(kept) == 1 + 2 * 4


def test_the_mean_over_many_masks_is_near_the_eval_value() -> None:
    made = program(model=Dropping(0.1))
    made.module.train()
    torch.manual_seed(0)
    x = torch.stack([made.module(**made.example_inputs)["output"] for _ in range(300)]).mean(0)
    made.module.eval()
    assert (x - made.example_outputs["output"]).abs().mean() < 0.1


def test_weights_are_shared_with_the_model() -> None:
    model = Dropping()
    made = program(model=model)
    assert {id(weight) for weight in made.module.parameters()} <= {id(weight) for weight in model.parameters()}


def test_without_training_there_is_none() -> None:
    made = program(training=False)
    assert not any(map(keeps, made.graph.nodes))
    assert made.module is made.graph_module
    assert made.without_dropout() is made


def test_stacks_are_those_of_eval_mode() -> None:
    stack, other = program().stacks["decoder"], program(training=False).stacks["decoder"]
    assert (stack.role, stack.blocks, stack.path) == (other.role, other.blocks, other.path) == ("decoder", 4, "blocks")


def test_removal_keeps_the_values_and_renames_what_was_named() -> None:
    made = offramp.apply(program(), "insert-exits,insert-scores")
    deployed = made.without_dropout()
    assert not any(map(keeps, deployed.graph.nodes))
    assert not deployed.graph.find_nodes(op="call_function", target=aten.dropout.default)
    found = deployed.module(**made.example_inputs)
    for name, value in made.module(**made.example_inputs).items():
        torch.testing.assert_close(found[name], value)
    assert all(cut in deployed.nodes for cut in deployed.stacks["decoder"].cuts)


def test_a_canonicalised_program_keeps_it() -> None:
    assert any(map(keeps, offramp.apply(program(), "canonicalize").graph.nodes))


def test_export_and_caches_leave_it_out(tmp_path: object) -> None:
    made = offramp.apply(program(), "insert-exits{after=2},insert-cache")
    assert not any(map(keeps, made.graph.nodes))
    bundle = f"{tmp_path}/x.offramp"
    offramp.save(offramp.apply(program(), "insert-exits{after=2}"), bundle, segments=2)
    expected = program()
    found = offramp.load(bundle).run({"input_ids": expected.example_inputs["input_ids"].numpy()})
    np.testing.assert_allclose(found.outputs["output"], expected.example_outputs["output"].detach(), atol=1e-4)


@pytest.mark.parametrize(
    ("model", "match"),
    [(Noisy(), r"draws random numbers with aten.rand_like.*test_dropout.py"), (Normalised(), "by more than dropout")],
)
def test_what_is_more_than_dropout_is_refused(model: nn.Module, match: str) -> None:
    with pytest.raises(offramp.OfframpError, match=match):
        program(model=model)
