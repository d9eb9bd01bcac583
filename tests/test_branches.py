"""torch.cond: both branches are computed and one is chosen; loops, and branches that change things, are refused."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import torch
from torch import Tensor, nn

import offramp
from offramp.errors import CaptureError, InputError
from offramp.program import capture

X = torch.arange(12.0).reshape(3, 4) - 4


class Branched(nn.Module):
    """A layer, then what a test makes of it."""

    def __init__(self, after: Callable[[nn.Linear, Tensor], Any]) -> None:
        super().__init__()
        self.layer, self.after = nn.Linear(4, 4), after

    def forward(self, x: Tensor) -> Any:
        return self.after(self.layer, x)


def of_weights(layer: nn.Linear, x: Tensor) -> Tensor:
    found: Tensor = torch.cond(
        x.sum() > 0, lambda x: layer(x) * torch.tensor([1.0, 2, 3, 4]), lambda x: x - layer.bias, (x,)
    )
    return found


def of_several(layer: nn.Linear, x: Tensor) -> dict[str, Tensor]:
    found: dict[str, Tensor] = torch.cond(
        (x.sum() > 0)[None], lambda x: {"a": x + 1, "b": x.sum()}, lambda x: {"a": x / 2, "b": x.mean()}, (x,)
    )
    return found


def within(layer: nn.Linear, x: Tensor) -> Tensor:
    found: Tensor = torch.cond(
        x.amin() > 0, torch.log, lambda x: torch.cond(x.sum() > -9, torch.exp, torch.abs, (x,)), (x,)
    )
    return found


@pytest.mark.parametrize("after", [of_weights, of_several, within])
def test_the_branch_is_chosen_by_the_values(after: Callable[..., Any]) -> None:
    """What the other branch makes, NaN of a logarithm too, is not read."""
    model = tiny.seeded(lambda: Branched(after))
    program = capture(model, X)
    for x in (X, X + 5, X - 9):
        with torch.no_grad():
            wanted = model(x)
        tiny.assert_same(program.module(x=x), wanted if isinstance(wanted, dict) else {"output": wanted})


class Labeller(nn.Module):
    """Blocks, and a head that looks at what they make."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder, self.few, self.many = tiny.Encoder(), nn.Linear(3, 2), nn.Linear(3, 2)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        (found,) = self.encoder(input_ids, attention_mask).values()
        chosen: Tensor = torch.cond(input_ids.sum() > 40, self.many, self.few, (found,))
        return chosen


def assert_same(chain: offramp.Chain, model: nn.Module, inputs: dict[str, Tensor]) -> None:
    found = chain.run({name: value.numpy() for name, value in inputs.items()}).outputs["output"]
    with torch.no_grad():
        np.testing.assert_allclose(found, model(**inputs), rtol=1e-5, atol=1e-6)


def test_rewritten_and_exported(tmp_path: Path) -> None:
    model, given = tiny.seeded(Labeller), tiny.text()
    offramp.save(offramp.apply(capture(model, given), "insert-exits"), tmp_path / "m.offramp")
    chain = offramp.load(tmp_path / "m.offramp")
    for ids in (torch.ones_like(given["input_ids"]), torch.full_like(given["input_ids"], 5)):
        assert_same(chain, model, {**given, "input_ids": ids})


def test_rows_that_decide_together_are_no_rows() -> None:
    """However seldom the condition holds: what one row gets depends on the others."""

    class Clamped(tiny.Encoder):
        def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Any:
            (found,) = super().forward(input_ids, attention_mask).values()
            return torch.cond(found.abs().amax() > 1e6, lambda x: x.clamp(-1, 1), lambda x: x * 1.0, (found,))

    assert capture(tiny.seeded(Clamped), tiny.text()).axes.batch is None


def test_a_condition_by_sizes_takes_the_examples_way_where_it_holds(tmp_path: Path) -> None:
    class Sized(tiny.Encoder):
        def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Any:
            (found,) = super().forward(input_ids, attention_mask).values()
            return torch.cond(input_ids.shape[1] > 5, lambda x: x + 1, lambda x: x * 2, (found,))

    model, given = tiny.seeded(Sized), tiny.text()
    offramp.save(capture(model, given), tmp_path / "m.offramp")
    chain = offramp.load(tmp_path / "m.offramp")
    for count in (6, 7):
        assert_same(chain, model, {name: value[:, :count] for name, value in given.items()})
    with pytest.raises(InputError, match="6"):
        chain.run({name: value[:, :5].numpy() for name, value in given.items()})


def changing(layer: nn.Linear, x: Tensor) -> Tensor:
    found: Tensor = torch.cond(x.sum() > 0, lambda x: x.add_(1), lambda x: x - 1, (layer(x),))
    return found


def changing_from_around(layer: nn.Linear, x: Tensor) -> Tensor:
    state = layer(x)
    found: Tensor = torch.cond(x.sum() > 0, lambda: state[:1].mul_(2), lambda: state[:1] - 1)
    return found


def unlike(layer: nn.Linear, x: Tensor) -> Tensor:
    found: Tensor = torch.cond(x.sum() > 0, lambda x: x.sum(), lambda x: x - 1, (x,))
    return found


def loop(layer: nn.Linear, x: Tensor) -> Tensor:
    counted: Any = torch._higher_order_ops.while_loop
    found: Tensor = counted(lambda i, x: i < 3, lambda i, x: (i + 1, layer(x)), (torch.tensor(0), x))[1]
    return found


@pytest.mark.parametrize(
    ("after", "why"),
    [
        (changing, r"a branch of torch.cond \(.*test_branches.py:\d+\) changes what it is given"),
        (changing_from_around, r"a branch of torch.cond \(.*\) changes what it is given"),
        (unlike, r"the branches of torch.cond \(.*test_branches.py:\d+\) make \[\] float32 and \[\w+, \w+\] float32"),
        (loop, r"while_loop \(.*test_branches.py:\d+\) runs a graph of its own, which no pass reads"),
    ],
)
def test_refused(after: Callable[..., Any], why: str) -> None:
    with pytest.raises(CaptureError, match=why):
        capture(Branched(after), X)
