"""The table of lowerings, and the pipeline around it: named steps that are checked, and shown where asked."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from torch import Tensor, fx, nn

import offramp
from offramp.errors import ExportError
from offramp.export import partition
from offramp.export.lowering import cleanup
from offramp.export.lowering.lower import lower, translate
from offramp.export.lowering.node_builder import Builder
from offramp.export.lowering.pipeline import GraphCheck, rewrite
from offramp.export.lowering.table import lowering, lowerings
from offramp.program.graph import aten


@torch.library.custom_op("offramp_tests::turned_and_squared", mutates_args=())
def turned_and_squared(x: Tensor) -> list[Tensor]:
    return [x.flip(-1), x * x]


@turned_and_squared.register_fake
def _(x: Tensor) -> list[Tensor]:
    return [torch.empty_like(x), torch.empty_like(x)]


OPERATOR = torch.ops.offramp_tests.turned_and_squared.default


class _Own(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        made: list[Tensor] = OPERATOR(x)
        return made[0] + made[1]


class Odd(tiny.Encoder):
    def __init__(self) -> None:
        super().__init__()
        for block in self.blocks:
            block.mlp[1] = _Own()


def test_an_operator_of_ones_own_is_lowered_by_the_table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its lowering takes operators of torch, or of ONNX."""
    program = tiny.captured(Odd, tiny.text()).program
    with pytest.raises(ExportError, match=r"turned_and_squared.default cannot be lowered"):
        offramp.save(program, tmp_path / "m")

    def lowered(b: Builder, x: fx.Node) -> list[fx.Node]:
        return [b.call(aten.flip.default, x, [-1]), b.onnx("Mul", [x, x], {}, [b.sizes(x)])[0]]

    monkeypatch.setitem(lowerings, OPERATOR, lowered)
    figures = offramp.save(program, tmp_path / "m")
    assert max(figures["segments"], figures["chain"], figures["other_shapes"]) < 1e-5
    block = partition(program).stacks[0].blocks[1][1]
    made = [node for node in lower(block).graph.nodes if node.target is aten.flip.default]
    assert [list(node.meta["nn_module_stack"].values())[-1][0] for node in made] == ["blocks.1.mlp.1"]


def test_an_operator_has_one_lowering(monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setitem(lowerings, OPERATOR, None)
        with pytest.raises(ValueError, match=r"turned_and_squared.default has a lowering"):
            lowering(OPERATOR)(lambda b, x: x)


# The pipeline


def test_every_step_is_shown(encoder: tiny.Captured, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OFFRAMP_DUMP", str(tmp_path / "dump"))
    monkeypatch.setenv("OFFRAMP_CACHE", "")
    offramp.save(encoder.program, tmp_path / "m")
    folder = tmp_path / "dump" / "lowering" / "encoder.1"
    steps = ["lower-operators", "merge-equal", "widen-masks", "finite-fills", "keep-heads-beside", "cancel-layout"]
    steps += ["fuse-norms", "plain-reshapes", "read-sizes"]
    names = [f"{i:02d}-{step}.before.txt" for i, step in enumerate(steps, 1)]
    assert sorted(file.name for file in folder.glob("*.before.txt")) == names
    widened = (folder / "03-widen-masks.changes.txt").read_text().splitlines()
    assert any("aten.expand" in line for line in widened if line.startswith("+"))
    onnx_steps = sorted(file.name for file in (folder / "onnx").glob("*.changes.txt"))
    assert onnx_steps[0] == "01-optimize.changes.txt"


def _graph() -> fx.Graph:
    class Module(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.relu().transpose(0, 1)

    graph = torch.export.export(Module(), (torch.ones(3, 4),)).graph
    assert isinstance(graph, fx.Graph)
    return graph


def _wrong_shape(graph: fx.Graph) -> None:
    node = next(iter(graph.find_nodes(op="call_function", target=aten.transpose.int)))
    node.args = (node.args[0], 1, 1)


def _no_shape(graph: fx.Graph) -> None:
    node = next(iter(graph.find_nodes(op="call_function", target=aten.relu.default)))
    with graph.inserting_after(node):
        graph.call_function(aten.neg.default, (node,))


def _wrong_order(graph: fx.Graph) -> None:
    first, last = (node for node in graph.nodes if node.op == "call_function")
    last.append(first)


@pytest.mark.parametrize(
    ("step", "found"),
    [
        (_wrong_shape, r"odd of m: .*transpose.* makes torch.float32 \[3, 4\], but is said to make .*\[4, 3\]"),
        (_no_shape, r"odd of m: .*neg.* does not know its shape"),
        (_wrong_order, r"odd of m: .* was used before it has been defined"),
    ],
)
def test_a_wrong_step_is_named(step: Any, found: str) -> None:
    graph = _graph()
    with pytest.raises(ExportError, match=found):
        rewrite(graph, {"fine": lambda graph: None, "odd": step}, "m", GraphCheck(graph))


def test_a_model_that_onnx_refuses_is_refused(encoder: tiny.Captured, monkeypatch: pytest.MonkeyPatch) -> None:
    (tail,) = partition(encoder.program).tails
    monkeypatch.setattr(cleanup, "strip", lambda model: model.graph.inputs.pop())
    with pytest.raises(ExportError, match="segment tail cannot be lowered to ONNX opset 23: ValidationError"):
        translate(lower(tail), "tail")
