"""insert-adapter: what each kind computes, that it starts harmlessly, and whose weights it trains."""

# mypy: disable-error-code="no-any-return"
from __future__ import annotations

from functools import partial

import pytest
import tiny
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from offramp.errors import SpecError
from offramp.passes import InsertAdapter, InsertExits, apply
from offramp.passes.insert_adapter import KINDS
from offramp.program import Exit, Program, capture

NEUTRAL = ("identity", "linear", "bottleneck", "mlp")


def _exits(captured: tiny.Captured, adapter: str = "") -> Program:
    return apply(captured.program, ",".join(filter(None, ["insert-exits", adapter])))


def _outputs(program: Program, item: Exit, captured: tiny.Captured) -> dict[str, Tensor]:
    found = tiny.outputs(program.module, captured.inputs)
    return {output: found[key] for output, key in item.outputs.items()}


def _weights(program: Program) -> dict[str, Tensor]:
    return {name: weight.detach() for name, weight in program.module.named_parameters() if name.startswith("exits.")}


def _hidden(captured: tiny.Captured, blocks: int) -> Tensor:
    """The hidden state of the encoder after so many blocks."""
    short = tiny.cut(captured.model, blocks)
    assert isinstance(short, tiny.Encoder)
    with torch.no_grad():
        mask = captured.inputs["attention_mask"].bool()[:, None, None]
        return short.run(short.embed(captured.inputs["input_ids"]), mask)


def _head(captured: tiny.Captured, hidden: Tensor) -> Tensor:
    """The encoder's tail."""
    model, mask = captured.model, captured.inputs["attention_mask"]
    assert isinstance(model, tiny.Encoder)
    with torch.no_grad():
        return model.head((model.leave(hidden) * mask[..., None]).sum(1) / mask.sum(1, keepdim=True))


# Fires


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ["encoder", "labeller", "decoder", "time_first", "mixing"])
def test_every_kind_fits_every_model(name: str, kind: str, request: pytest.FixtureRequest) -> None:
    captured: tiny.Captured = request.getfixturevalue(name)
    program = _exits(captured, f"insert-adapter{{kind={kind}}}")
    assert {item.adapter for item in program.exits} == {kind}
    found = tiny.outputs(program.module, captured.inputs)
    tiny.assert_same(found, captured.program.example_outputs, rtol=0, atol=0)
    for item in program.exits if kind in NEUTRAL else ():
        tiny.assert_same(_outputs(program, item, captured), captured.truncated(item.after))


def test_norm_linear_starts_as_the_norm(encoder: tiny.Captured) -> None:
    program = _exits(encoder, "insert-adapter{kind=norm-linear}")
    for item in program.exits:
        expected = _head(encoder, F.layer_norm(_hidden(encoder, item.after), [tiny.WIDTH]))
        tiny.assert_same(_outputs(program, item, encoder), {"logits": expected})


def test_block_starts_as_the_last_block(encoder: tiny.Captured) -> None:
    program = _exits(encoder, "insert-adapter{kind=block}")
    mask = encoder.inputs["attention_mask"].bool()[:, None, None]
    last = encoder.model.get_submodule(f"blocks.{tiny.BLOCKS - 1}")
    for item in program.exits:
        with torch.no_grad():
            expected = _head(encoder, last(_hidden(encoder, item.after), mask))
        tiny.assert_same(_outputs(program, item, encoder), {"logits": expected})
    assert not any(a is b for a in _weights(program).values() for b in encoder.model.parameters())


def _shuffled(program: Program) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    weights = _weights(program)
    for weight in weights.values():
        weight.copy_(torch.randn(weight.shape, generator=generator) / 4)
    return weights


def test_what_each_kind_computes_with_trained_weights(encoder: tiny.Captured) -> None:
    hidden = _hidden(encoder, 2)

    def of(kind: str) -> tuple[dict[str, Tensor], Tensor]:
        program = _exits(encoder, f"insert-adapter{{kind={kind},after=2}}")
        weights = {name.removeprefix("exits.encoder.2.adapter."): w for name, w in _shuffled(program).items()}
        item = next(item for item in program.exits if item.after == 2)
        return weights, _outputs(program, item, encoder)["logits"]

    w, linear = of("linear")
    torch.testing.assert_close(linear, _head(encoder, F.linear(hidden, w["linear.weight"], w["linear.bias"])))
    w, normed = of("norm-linear")
    x = F.layer_norm(hidden, [tiny.WIDTH], w["norm.weight"], w["norm.bias"])
    torch.testing.assert_close(normed, _head(encoder, F.linear(x, w["linear.weight"], w["linear.bias"])))
    for kind, first, second in (("bottleneck", "down", "up"), ("mlp", "fc1", "fc2")):
        w, found = of(kind)
        x = F.gelu(F.linear(hidden, w[f"{first}.weight"], w[f"{first}.bias"]))
        x = hidden + F.linear(x, w[f"{second}.weight"], w[f"{second}.bias"])
        torch.testing.assert_close(found, _head(encoder, x))


@pytest.mark.parametrize(
    ("kind", "width", "expected"),
    [("bottleneck", "", 4), ("bottleneck", ",width=7", 7), ("mlp", "", 64), ("mlp", ",width=5", 5)],
)
def test_widths(encoder: tiny.Captured, kind: str, width: str, expected: int) -> None:
    program = _exits(encoder, f"insert-adapter{{kind={kind}{width},after=1}}")
    first, second = ("down", "up") if kind == "bottleneck" else ("fc1", "fc2")
    shapes = {name.removeprefix("exits.encoder.1.adapter."): tuple(w.shape) for name, w in _weights(program).items()}
    assert shapes == {
        f"{first}.weight": (expected, tiny.WIDTH),
        f"{first}.bias": (expected,),
        f"{second}.weight": (tiny.WIDTH, expected),
        f"{second}.bias": (tiny.WIDTH,),
    }


def test_adapters_of_a_model_in_half_precision_are_of_its_float32_copy() -> None:
    model = tiny.seeded(tiny.Encoder).to(torch.bfloat16)
    captured = tiny.Captured(model, tiny.text(), capture(model, tiny.text(), dynamic={}))
    for kind in KINDS:
        program = _exits(captured, f"insert-adapter{{kind={kind}}}")
        assert {weight.dtype for weight in _weights(program).values()} <= {torch.float32}
        assert tiny.outputs(program.module, captured.inputs)["encoder.1/logits"].dtype == torch.float32


def test_only_the_named_exits_get_one(encoder: tiny.Captured) -> None:
    bare = _exits(encoder)
    program = apply(bare, "insert-adapter{after=3,kind=linear}")
    assert [(item.after, item.adapter) for item in program.exits_of("encoder")] == [
        (1, "identity"),
        (2, "identity"),
        (3, "linear"),
    ]
    assert program.exits[:2] == bare.exits[:2]


def test_full_depth_has_no_adapter(encoder: tiny.Captured) -> None:
    program = _exits(encoder, "insert-scores,insert-adapter{kind=linear}")
    assert [(item.after, item.adapter) for item in program.exits_of("encoder")] == [
        (1, "linear"),
        (2, "linear"),
        (3, "linear"),
        (4, "identity"),
    ]


def test_it_stands_before_the_next_stack(two_stacks: tiny.Captured) -> None:
    text = "insert-exits{stack=encoder},insert-adapter{stack=encoder,kind=linear}"
    program = apply(two_stacks.program, text)
    for weight in _weights(program).values():
        weight.mul_(2.0)
    short = apply(program, "truncate{stack=encoder,after=2}")
    model = tiny.cut(two_stacks.model, 2, "encoder.blocks")
    assert isinstance(model, tiny.TwoStacks)
    model.encoder.blocks.append(Double())
    tiny.assert_same(tiny.outputs(short.module, two_stacks.inputs), tiny.outputs(model, two_stacks.inputs))


class Double(nn.Module):
    def forward(self, x: Tensor, _: Tensor) -> Tensor:
        return 2 * x


def test_a_block_with_cross_attention_reads_the_memory(two_stacks: tiny.Captured) -> None:
    text = "insert-exits{stack=decoder,after=1},insert-adapter{stack=decoder,kind=block}"
    program = apply(two_stacks.program, text)
    (item,) = program.exits
    model = tiny.cut(two_stacks.model, 1, "decoder.blocks")
    assert isinstance(model, tiny.TwoStacks)
    model.decoder.blocks.append(two_stacks.model.get_submodule("decoder.blocks.2"))
    tiny.assert_same(_outputs(program, item, two_stacks), tiny.outputs(model, two_stacks.inputs))


@pytest.mark.parametrize("kind", sorted(set(KINDS) - {"identity"}))
def test_training_adapters_leaves_the_model_alone(kind: str) -> None:
    captured = tiny.captured(partial(tiny.Encoder, "post"), tiny.text(), dynamic={})
    program = _exits(captured, f"insert-adapter{{kind={kind}}}")
    module = program.module
    kept = {name: weight.clone() for name, weight in captured.model.named_parameters()}
    adapters = {name: w for name, w in module.named_parameters() if name.startswith("exits.")}
    optimizer = torch.optim.SGD(adapters.values(), lr=0.05)

    def losses() -> Tensor:
        found = module(**captured.inputs)
        keys = [item.outputs["logits"] for item in program.exits]
        return torch.stack([F.cross_entropy(found[key], torch.tensor([2, 0])) for key in keys])

    start = losses()
    start.sum().backward()
    optimizer.step()
    assert bool((losses() < start).all())
    torch.testing.assert_close(dict(captured.model.named_parameters()), kept, rtol=0, atol=0)


# Refusals


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("insert-adapter", "has exits after no block, not after any"),
        ("insert-exits{after=1},insert-adapter{after=1|2}", r"has exits after \[1\], not after \[2\]"),
        ("insert-exits,insert-adapter{kind=magic}", "kind='magic': there are identity, linear"),
        ("insert-exits,insert-adapter{after=4}", "after=4 is no place"),
        ("insert-exits,insert-adapter{stack=other}", "unknown stack 'other'"),
        ("insert-exits,insert-adapter{kind=mlp,width=wide}", "width=.?wide"),
        ("insert-exits,insert-adapter{kind=mlp,width=0}", "width=0"),
        ("insert-exits,insert-adapter{kind=mlp,width=-3}", "width=-3"),
    ],
)
def test_refusals(encoder: tiny.Captured, text: str, reason: str) -> None:
    with pytest.raises(SpecError, match=reason):
        apply(encoder.program, text)


# Contract


@pytest.mark.parametrize("kind", KINDS)
def test_a_second_run_adds_nothing(encoder: tiny.Captured, kind: str) -> None:
    step = InsertAdapter(kind=kind)
    once = step.run(_exits(encoder)).program
    again = step.run(once)
    assert not again.modified
    assert again.program is once
    assert len(again.notes) == tiny.BLOCKS - 1


def test_an_exit_keeps_the_adapter_that_it_has(encoder: tiny.Captured) -> None:
    program = _exits(encoder, "insert-adapter{after=2,kind=mlp}")
    result = InsertAdapter(kind="linear").run(program)
    assert [item.adapter for item in result.program.exits_of("encoder")] == ["linear", "mlp", "linear"]
    assert result.notes == ("the exit after block 2 has the adapter mlp already",)


@pytest.mark.parametrize("kind", sorted(set(KINDS) - {"identity"}))
def test_provenance(encoder: tiny.Captured, kind: str) -> None:
    before = InsertExits().run(encoder.program).program
    step = InsertAdapter(kind=kind)
    result = step.run(before)
    tiny.assert_provenance(before, result.program, repr(step))
    assert result.edits["inserted"] == len(tiny.added(before, result.program))
