"""Graphs become functional: node by node where that can be seen to be right, by tracing again where it cannot."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram

from offramp.program.functional import functional
from offramp.program.graph import aten

X = torch.arange(24.0).reshape(3, 8) - 11


class Case(nn.Module):
    """A function of one tensor; ``table`` is a weight."""

    def __init__(self, function: Callable[[Tensor, Tensor], Any]) -> None:
        super().__init__()
        self.function = function
        self.table = nn.Parameter(torch.linspace(-1, 1, 8), requires_grad=False)

    def forward(self, x: Tensor) -> Any:
        return self.function(x, self.table)


def exported(function: Callable[[Tensor, Tensor], Any]) -> ExportedProgram:
    return torch.export.export(Case(function), (X,), dynamic_shapes={"x": {0: Dim.AUTO}}, strict=False)


def composites(x: Tensor, table: Tensor) -> Any:
    a, b = x.reshape(x.shape[0], 2, 4).flatten().unflatten(0, (x.shape[0], -1)).chunk(2, -1)
    return a + b.to(torch.float64), (x * table).reshape(-1, 2).T, x.type_as(table)


def fresh(x: Tensor, table: Tensor) -> Tensor:
    y = x * table
    y += 1
    return y.masked_fill_(x > 3, 0.0).mul(2)


def views(x: Tensor, table: Tensor) -> Tensor:
    y = (x * table).reshape(x.shape[0], 2, 4).permute(1, 0, 2)
    y /= 3
    return y + y.transpose(0, 1).sum()


def parts(x: Tensor, table: Tensor) -> Tensor:
    y = torch.zeros_like(x)
    y[:, 1:] = x[:, :-1]
    y[:, 0] = 7
    y[..., 2:4] += table[:2]
    return y * table


def parts_of_a_part(x: Tensor, table: Tensor) -> Tensor:
    y = (x * table).reshape(x.shape[0], 2, 4).clone()
    first = y[:, 0]
    first[:, 0::2] = y[:, 1, 0::2]
    first[:, 1::2] = y[:, 1, 1::2] * first[:, :2]
    return first * 2 + y.sum(1)


def a_part_twice(x: Tensor, table: Tensor) -> Tensor:
    y = x * table
    half = y[:, :4]
    half.add_(1)
    half.mul_(2)
    return y


def before_and_after(x: Tensor, table: Tensor) -> Tensor:
    y = x * table
    earlier = y.exp()
    y.neg_()
    return earlier + y


def regions(x: Tensor, table: Tensor) -> Tensor:
    with torch.no_grad(), torch.autocast("cpu", enabled=False):
        return (x * table).reshape(-1, 4).add_(1)


def view_read_later(x: Tensor, table: Tensor) -> Tensor:
    y = x * table
    half = y[:, :4]
    y.add_(1)
    return half * 2


def base_read_later(x: Tensor, table: Tensor) -> Tensor:
    y = x * table
    y.reshape(x.shape[0], 2, 4).relu_()
    return y


def narrower(x: Tensor, table: Tensor) -> Tensor:
    return (x * table).add_(x.to(torch.float64))


def read_statistics(x: Tensor, table: Tensor) -> Tensor:
    return nn.functional.batch_norm(x, table, table.abs(), weight=table, training=False)


def own_statistics(x: Tensor, table: Tensor) -> Tensor:
    return nn.functional.batch_norm(x, None, None, training=True) * table


LOCAL = (composites, fresh, views, parts, parts_of_a_part, a_part_twice, before_and_after, regions, read_statistics)
WHOLE = (view_read_later, base_read_later, narrower, own_statistics)


@pytest.mark.parametrize("function", [*LOCAL, *WHOLE], ids=lambda function: function.__name__)
def test_the_graph_computes_the_same_and_changes_nothing(function: Callable[[Tensor, Tensor], Any]) -> None:
    given = exported(function)
    made = functional(given)
    assert (made is given) == (function in LOCAL)
    for node in made.graph.nodes:
        schema = getattr(node.target, "_schema", None)
        assert schema is None or not schema.is_mutable, node
        assert not node.users or node.op == "get_attr" or "val" in node.meta
    made.graph.lint()
    made.graph_module.recompile()
    for x in (X, torch.cat([X, X / 7])):
        torch.testing.assert_close(made.module()(x.clone()), Case(function)(x.clone()))


def test_views_of_unknown_kind_are_decomposed() -> None:
    targets = {node.target for node in functional(exported(composites)).graph.nodes}
    assert not targets & {aten.flatten.using_ints, aten.unflatten.int, aten.chunk.default, aten.to.dtype}


def test_an_input_that_is_changed_stays_changed() -> None:
    made = functional(exported(lambda x, table: x.add_(1) * table))
    assert [spec.target for spec in made.graph_signature.output_specs if spec.target] == ["x"]


def test_sizes_are_read_in_the_order_of_the_inputs() -> None:
    class Two(nn.Module):
        def forward(self, x: Tensor, y: Tensor) -> Tensor:
            return y.reshape(y.shape[0], 2, 4) + x.sum() + x.shape[0]

    dims = {"x": {0: Dim.AUTO}, "y": {0: Dim.AUTO}}
    made = functional(torch.export.export(Two(), (X, torch.cat([X, X])), dynamic_shapes=dims, strict=False))
    sizes = made.graph.find_nodes(op="call_function", target=aten.sym_size.int)
    assert [(str(node.args[0]), node.args[1]) for node in sizes][:2] == [("x", 0), ("y", 0)]
