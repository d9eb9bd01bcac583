"""Canonical form: what computes nothing goes, what computes something stays, equal values have one node."""

# mypy: disable-error-code="no-any-return"
from __future__ import annotations

import pytest
import tiny
import torch
from torch import Tensor, nn

from offramp.passes import InsertExits
from offramp.passes.infra.editor import Editor
from offramp.program import Program, capture
from offramp.program.canonical.simplify import canonicalize
from offramp.program.graph import results

X = torch.randn(3, 5, 4, generator=torch.Generator().manual_seed(0))


class Cases(nn.Module):
    """Each method of a subclass whose name is not private gives one output."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 4)
        self.other = nn.Linear(4, 4, bias=False)
        self.other.weight = self.layer.weight
        self.register_buffer("twin", self.layer.weight.detach().clone())
        self.register_buffer("table", torch.arange(8.0).reshape(2, 4))
        self.twin: Tensor
        self.table: Tensor

    @classmethod
    def names(cls) -> list[str]:
        return [name for name in vars(cls) if not name.startswith("_")]

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        return {name: getattr(self, name)(x) for name in self.names()}


class Nothing(Cases):
    """Every case is ``sin`` of its input, in many words."""

    def clones(self, x: Tensor) -> Tensor:
        return x.clone().contiguous().detach().sin()

    def slices(self, x: Tensor) -> Tensor:
        return x[:, :, 0:][:, : x.shape[1]].sin()

    def dropout(self, x: Tensor) -> Tensor:
        return nn.functional.dropout(x, 0.5, self.training).sin()

    def cast(self, x: Tensor) -> Tensor:
        return x.float().to(torch.float32).type_as(self.table).sin()

    def shapes(self, x: Tensor) -> Tensor:
        return x.expand(x.shape[0], -1, 4).view(x.shape).reshape(x.shape[0], x.shape[1], 4).sin()

    def arithmetic(self, x: Tensor) -> Tensor:
        return ((x * 1 + 0.0 - 0) / 1.0).sin()

    def guarded(self, x: Tensor) -> Tensor:
        torch._check(x.shape[1] > 1)
        with torch.no_grad(), torch.autocast("cpu", enabled=False):
            return x.sin()


class Something(Cases):
    """Cases that look as if they changed nothing, but do; no two compute the same."""

    def part(self, x: Tensor) -> Tensor:
        return x[:, 1:]

    def stride(self, x: Tensor) -> Tensor:
        return x[:, ::2]

    def cast(self, x: Tensor) -> Tensor:
        return x.double()

    def promoted(self, x: Tensor) -> Tensor:
        return x.long() * 1.0

    def spread(self, x: Tensor) -> Tensor:
        return x[:, :1].expand(-1, 6, -1)

    def broadcast(self, x: Tensor) -> Tensor:
        return x[0, 0, 0] + torch.zeros(3, 1)

    def less(self, x: Tensor) -> Tensor:
        return 0 - x

    def inverse(self, x: Tensor) -> Tensor:
        return 1 / x

    def weight(self, x: Tensor) -> Tensor:
        return x @ self.layer.weight

    def equal_but_apart(self, x: Tensor) -> Tensor:
        return x @ self.twin

    def view_of_a_weight(self, x: Tensor) -> Tensor:
        return x @ self.layer.weight.T


class Repeated(Cases):
    """Cases of which all compute ``linear(x, w).sin() + 1`` with one weight under two names."""

    def first(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, self.layer.weight).sin() + 1

    def second(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x.clone(), self.other.weight).sin() + 1

    def third(self, x: Tensor) -> Tensor:
        return self.other(x).sin() + 1


def _captured(make: type[Cases]) -> tuple[Cases, Program]:
    model = tiny.seeded(make)
    return model, capture(model, X)


def test_what_changes_nothing_goes() -> None:
    model, program = _captured(Nothing)
    assert tiny.operators(program) == ["sin.default"]
    tiny.assert_same(program.module(x=X), model(X), rtol=0, atol=0)


def test_what_changes_something_stays() -> None:
    model, program = _captured(Something)
    returned = results(program.graph)
    assert len(set(returned.values())) == len(returned)
    tiny.assert_same(program.module(x=X), model(X), rtol=0, atol=0)


def test_equal_values_have_one_node_and_a_weight_has_one_name() -> None:
    model, program = _captured(Repeated)
    assert tiny.operators(program) == ["linear.default", "sin.default", "add.Tensor"]
    assert len(set(results(program.graph).values())) == 1
    assert len(program.graph.find_nodes(op="get_attr")) == 1
    tiny.assert_same(program.module(x=X), model(X), rtol=0, atol=0)


class Random(nn.Module):
    def forward(self, x: Tensor) -> dict[str, Tensor]:
        return {"a": torch.rand_like(x), "b": torch.rand_like(x)}


def test_random_numbers_are_not_equal() -> None:
    program = capture(Random(), X)
    assert tiny.operators(program) == ["rand_like.default", "rand_like.default"]


class Sizes(nn.Module):
    def forward(self, x: Tensor) -> dict[str, Tensor]:
        y = x.sin()
        z = torch.arange(y.shape[1]) + torch.arange(y.transpose(0, 1).shape[0])
        return {"y": y, "z": z, "half": torch.zeros(x[:, ::2].shape[1])}


def test_sizes_are_read_from_the_inputs() -> None:
    program = capture(Sizes(), X)
    readers = program.graph.find_nodes(op="call_function", target=torch.ops.aten.sym_size.int)
    assert [(str(node.args[0]), node.args[1]) for node in readers if node.users] == [("x", 1)]
    for tokens in (1, 4, 9):
        x = torch.ones(2, tokens, 4)
        tiny.assert_same(program.module(x=x), Sizes()(x))


class Looped(nn.Module):
    """As in RecurrentGemma: a loop over the tokens fixes their number, which is read before and behind it."""

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        y = nn.functional.pad(x, (0, 0, 3, 0))[:, : x.shape[1]]
        total = sum(y[:, i] for i in range(y.shape[1]))
        return {"total": total, "z": x.cos().reshape(x.shape[0] * y.shape[1], 4)}  # type: ignore[dict-item]


def test_a_size_that_is_fixed_is_a_number() -> None:
    program = capture(Looped(), X)
    sizes = program.graph.find_nodes(op="call_function", target=torch.ops.aten.sym_size.int)
    assert [(str(node.args[0]), node.args[1]) for node in sizes] == [("x", 0)]
    for rows in (1, 4):
        x = torch.ones(rows, 5, 4)
        tiny.assert_same(program.module(x=x), Looped()(x))


class SizeInATensor(nn.Module):
    """As in DeBERTa, where a slice's bounds are tensors that are made of a length."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.arange(64.0).reshape(16, 4))

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        span = torch.tensor(min(x.shape[1], 8))
        return {"y": self.table[8 - span : 8 + span]}


def test_a_size_that_went_through_a_tensor_is_a_size() -> None:
    program = capture(SizeInATensor(), X)
    assert "item.default" not in tiny.operators(program)
    for tokens in (1, 4, 8):
        x = torch.ones(2, tokens, 4)
        tiny.assert_same(program.module(x=x), {"y": torch.arange(64.0).reshape(16, 4)[8 - tokens : 8 + tokens]})


class Small(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer, self.drop = nn.Linear(4, 4), nn.Dropout(0.1)
        self.register_buffer("table", torch.randn(16, 4))
        self.table: Tensor

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        x = self.drop(x + self.table[: x.shape[1]])
        return {"y": (x + self.drop(self.layer(x))).contiguous().view(-1, 4)}


def test_the_graph_of_a_small_model() -> None:
    """The whole text, so that the form does not change unseen."""
    program = capture(tiny.seeded(Small), {"x": X})
    assert _text(program) == [
        "layer.weight",
        "layer.bias",
        "table",
        "input x",
        "a = sym_size.int(x, 1)",
        "b = slice.Tensor(table, 0, None, a)",
        "c = add.Tensor(x, b)",
        "d = linear.default(c, layer.weight, layer.bias)",
        "e = add.Tensor(c, d)",
        "f = reshape.default(e, [-1, 4])",
        "return f as y",
    ]


def _text(program: Program) -> list[str]:
    """The graph with letters for the names of its calls."""
    names: dict[object, str] = {}
    letters = iter("abcdefghijk")
    lines = []
    for node in program.graph.nodes:
        names[node] = next(letters) if node.op == "call_function" else str(node.target)
        args = ", ".join(names.get(arg) or str(arg) for arg in node.args if node.op != "output")
        if node.op == "call_function":
            lines.append(f"{names[node]} = {str(node.target).removeprefix('aten.')}({args})")
        elif node.op == "output":
            lines += [f"return {names[value]} as {name}" for name, value in results(program.graph).items()]
        else:
            lines.append("input " * (node.op == "placeholder") + names[node])
    return lines


@pytest.mark.parametrize("name", ["encoder", "labeller", "decoder", "two_stacks", "time_first", "mixing"])
def test_a_second_run_edits_nothing(name: str, request: pytest.FixtureRequest) -> None:
    program: Program = request.getfixturevalue(name).program
    editor = Editor(program, "test")
    assert canonicalize(editor.module) == 0


def test_protected_nodes_stay(encoder: tiny.Captured) -> None:
    program = InsertExits(after=2).run(encoder.program).program
    (item,) = program.exits
    editor = Editor(program, "test")
    assert canonicalize(editor.module, {item.hidden, item.state}) == 0
    assert item.state in editor.nodes
    editor = Editor(program, "test")
    assert canonicalize(editor.module) > 0
    assert item.state not in {node.name for node in editor.graph.nodes}
