"""insert-acm: MLPs in ordered learners compute what they did, and with fewer what their first units compute."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import architectures
import decoders
import numpy as np
import pytest
import shared
import tiny
import torch
from torch import Tensor, nn

import offramp
from offramp.errors import PassError, SpecError
from offramp.passes import apply
from offramp.passes.acm.factors import factors
from offramp.program import Program, capture
from offramp.program.compare import TOLERANCE
from offramp.program.learners import WIDTH, Learners
from offramp.program.ops import FIRST_LEARNERS, first_learners
from offramp.program.program import evaluate

FACTORIES = {**architectures.REQUIRED, **decoders.REQUIRED, **decoders.OTHERS}
CAPTURED = ["encoder", "labeller", "decoder", "two_stacks"]


def records(program: Program) -> list[Learners]:
    return [item for item in program.records if isinstance(item, Learners)]


def weights(program: Program) -> dict[str, nn.Parameter]:
    return {name: weight for name, weight in program.module.named_parameters() if name.startswith("learners.")}


def text(program: Program, options: str = "") -> str:
    """The pass on every stack."""
    return ",".join(f"insert-acm{{stack={stack}{options}}}" for stack in program.stacks)


def undecided(program: Program, seed: int = 0) -> Program:
    """The program with gates that choose otherwise for each token."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, weight in weights(program).items():
            if ".gate." in name:
                weight.copy_(torch.randn(weight.shape, generator=generator) * 2)
    return program


def fixed(program: Program, count: int) -> Program:
    """The program whose untrained gates let each token take so many learners."""
    program.module.get_buffer(WIDTH).fill_(count / records(program)[0].learners)
    return program


def chosen(program: Program, inputs: Mapping[str, Tensor]) -> list[Tensor]:
    """How many learners each token takes, by site."""
    nodes = [program.nodes[item.choice] for item in records(program)]
    values = evaluate(program.graph_module, nodes, program.fresh(inputs))
    return [item.least + values[node].argmax(-1) for item, node in zip(records(program), nodes, strict=True)]


# Fires


@pytest.mark.parametrize("name", CAPTURED)
def test_with_all_learners_it_is_the_model(name: str, request: pytest.FixtureRequest) -> None:
    captured: tiny.Captured = request.getfixturevalue(name)
    program = apply(captured.program, text(captured.program))
    blocks = {stack.name: stack.blocks for stack in program.stacks.values()}
    assert [(item.stack, item.block, item.site) for item in records(program)] == [
        (stack, block, "mlp") for stack, count in blocks.items() for block in range(1, count + 1)
    ]
    tiny.assert_same(tiny.outputs(program.module, captured.inputs), captured.eager(), atol=1e-5)
    assert all((counts == 4).all() for counts in chosen(program, captured.inputs))


@pytest.mark.parametrize("order", ["activation", "importance", "given"])
@pytest.mark.parametrize("count", [0, 1, 2, 3])
def test_fewer_learners_are_the_first_hidden_units(encoder: tiny.Captured, order: str, count: int) -> None:
    program = fixed(apply(encoder.program, f"insert-acm{{blocks=2,order={order}}}"), count)
    model = tiny.seeded(tiny.Encoder)
    up, gelu, down = model.blocks[1].mlp
    units = torch.arange(24)
    if order == "importance":
        units = (up.weight.norm(dim=1) * down.weight.norm(dim=0)).argsort(descending=True)
    if order == "activation":
        seen: list[Tensor] = []
        with gelu.register_forward_hook(lambda module, given, made: seen.append(made)):
            model(**encoder.inputs)
        units = (seen[0].square().mean((0, 1)) * down.weight.square().sum(0)).argsort(descending=True)
    with torch.no_grad():
        down.weight[:, units[count * 6 :]] = 0
        expected = model(**encoder.inputs)
    tiny.assert_same(tiny.outputs(program.module, encoder.inputs), expected, atol=1e-5)


def test_weights_are_copies_that_equal_blocks_share() -> None:
    program = shared.captured(FACTORIES["albert"])
    made = weights(apply(program, "insert-acm"))
    assert len({name.split(".")[2] for name in made if ".gate." not in name}) == 1
    assert len({name.split(".")[2] for name in made if ".gate." in name}) == program.stacks["encoder"].blocks


def test_weights_that_nothing_reads_any_more_are_gone(encoder: tiny.Captured) -> None:
    count = sum(weight.numel() for weight in encoder.program.module.parameters())
    program = apply(encoder.program, "insert-acm")
    gates = sum(weight.numel() for name, weight in weights(program).items() if ".gate." in name)
    assert sum(weight.numel() for weight in program.module.parameters()) == count + gates


def test_a_weight_that_blocks_share_has_an_order_for_each() -> None:
    """What a unit writes differs, so what is most important does."""

    def make() -> nn.Module:
        module = tiny.Encoder()
        module.blocks[2].mlp[0].weight = module.blocks[1].mlp[0].weight
        return module

    program = apply(capture(tiny.seeded(make), tiny.text()), "insert-acm{blocks=2|3}")
    assert len({name for name in weights(program) if name.endswith("mlp.0.weight") and ".gate." not in name}) == 2


class _Shared(tiny.Encoder):
    """Blocks share an MLP, which is named as gates are."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = self.blocks[0].mlp
        for block in self.blocks:
            block.mlp = nn.Identity()

    def run(self, x: Tensor, reach: Tensor | None = None, *_: Any) -> Tensor:
        for block in self.blocks:
            x = block(x, reach)
            x = x + self.gate(x)
        return x


def test_weights_that_are_named_as_gates_are() -> None:
    made = weights(apply(capture(tiny.seeded(_Shared), tiny.text()), "insert-acm"))
    assert next(name for name in made if ".units." in name).endswith(".1.mlp.units.gate.0.weight")


class _Convolutions(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Conv1d(tiny.WIDTH, 32, 1), nn.Conv1d(32, tiny.WIDTH, 1)

    def forward(self, x: Tensor) -> Tensor:
        made: Tensor = self.down(self.up(x.transpose(1, 2)).relu())
        return made.transpose(1, 2)


def test_a_convolution_is_named() -> None:
    model = tiny.seeded(tiny.Encoder)
    for block in model.blocks:
        block.mlp = _Convolutions()
    with pytest.raises(SpecError) as caught:
        apply(capture(model, tiny.text()), "insert-acm")
    assert "is a convolution, and no product" in str(caught.value.hint)


class _Twice(nn.Module):
    """A square weight by which units are made, and by which they are read."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(tiny.WIDTH, tiny.WIDTH) / 4)

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(nn.functional.gelu(nn.functional.linear(x, self.weight)), self.weight)


class _Back(nn.Module):
    """The product with a layer's weight, the other way round."""

    def __init__(self, layer: nn.Linear) -> None:
        super().__init__()
        self.weight = layer.weight

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.weight


def test_a_weight_that_is_used_both_ways() -> None:
    def make() -> nn.Module:
        module = tiny.Encoder()
        for block in module.blocks:
            block.mlp = _Twice()
            block.attention.q.weight.data = torch.randn(16, 5) @ torch.randn(5, 16) / 10
            block.attention.out = _Back(block.attention.q)
        return module

    captured = tiny.captured(make, tiny.text())
    program = apply(captured.program, "insert-acm{sites=mlp|query|output}")  # factors of half the rank hold all of it
    tiny.assert_same(tiny.outputs(program.module, captured.inputs), captured.eager(), atol=1e-4)


def test_the_least_that_a_token_takes(encoder: tiny.Captured) -> None:
    program = undecided(apply(encoder.program, "insert-acm{learners=3,least=1}"))
    counts = torch.cat([each.flatten() for each in chosen(program, encoder.inputs)])
    assert set(counts.tolist()) == {1, 2, 3}
    assert "learners   mlp of block 2: 1 to 3 of 3" in str(program)


def test_gates_get_the_gradient_of_what_learners_are_for(encoder: tiny.Captured) -> None:
    program = undecided(apply(encoder.program, "insert-acm"))
    program.module(**encoder.inputs)["logits"].square().sum().backward()
    gates = {name: weight.grad for name, weight in weights(program).items() if ".gate.1." in name}
    assert all(grad is not None and bool(grad.abs().max() > 0) for grad in gates.values())


def test_straight_through_values_are_exactly_those_of_the_choice() -> None:
    generator = torch.Generator().manual_seed(0)
    hidden, choice = torch.randn(3, 5, 10, generator=generator), torch.randn(3, 5, 4, generator=generator)
    made = first_learners(hidden, choice.requires_grad_(), 4, 1)
    learner = torch.arange(10) * 4 // 10
    kept = learner < 1 + choice.argmax(-1, keepdim=True)
    assert torch.equal(made, torch.where(kept, hidden, 0.0))
    assert learner.bincount().tolist() == [3, 2, 3, 2]


# Exported


@pytest.mark.parametrize(
    ("name", "then"),
    [
        *((name, then) for name in CAPTURED for then in ("", "insert-exits")),
        ("decoder", "insert-cache"),
        ("two_stacks", "insert-cache"),
    ],
)
def test_a_bundle_computes_it(name: str, then: str, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    captured: tiny.Captured = request.getfixturevalue(name)
    program = undecided(apply(captured.program, text(captured.program)))
    counts = torch.cat([each.flatten() for each in chosen(program, captured.inputs)])
    assert len(counts.unique()) > 2
    steps = {"": "", "insert-cache": then, "insert-exits": ",".join(f"{then}{{stack={s}}}" for s in program.stacks)}
    figures = offramp.save(apply(program, steps[then]), tmp_path / "m.offramp")
    assert max(value for key, value in figures.items() if key != "tolerance") <= TOLERANCE


@pytest.mark.slow
@pytest.mark.parametrize(
    "name", ["bert", "vit", "wav2vec2", "llama", "gpt2", "t5", "bart", "whisper", "phi3", "gemma2", "falcon"]
)
def test_models_of_transformers(name: str, tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    given = shared.captured(FACTORIES[name])
    program = undecided(apply(given, text(given)))
    figures = offramp.save(program, tmp_path / "m.offramp", learners="grouped")
    assert max(value for key, value in figures.items() if key != "tolerance") <= TOLERANCE


def test_a_token_does_not_depend_on_its_batch(labeller: tiny.Captured, tmp_path: Path) -> None:
    program = undecided(apply(labeller.program, "insert-acm"))
    offramp.save(program, tmp_path / "m.offramp")
    chain = offramp.load(tmp_path / "m.offramp")
    arrays = {name: value.numpy() for name, value in labeller.inputs.items()}
    together = chain.run(arrays).outputs["logits"]
    for row in range(tiny.ROWS):
        alone = chain.run({name: value[row : row + 1] for name, value in arrays.items()}).outputs["logits"]
        np.testing.assert_allclose(alone[0], together[row], rtol=1e-5, atol=1e-6)


class _Flat(nn.Module):
    """An MLP of the tokens of all rows one after another."""

    def __init__(self, mlp: nn.Sequential, within: bool = False) -> None:
        super().__init__()
        self.up, self.act, self.down = mlp
        self.within = within

    def forward(self, x: Tensor) -> Tensor:
        flat = self.act(self.up(x)).flatten(0, 1) if self.within else self.act(self.up(x.flatten(0, 1)))
        return torch.as_tensor(self.down(flat).unflatten(0, x.shape[:2]))


def _flat(make: Callable[[], Any], within: bool = False) -> Any:
    module = tiny.seeded(make)
    for block in module.blocks:
        block.mlp = _Flat(block.mlp, within)
    return module


@pytest.mark.slow
def test_rows_leave_whose_tokens_lie_one_after_another(tmp_path: Path) -> None:
    program = capture(_flat(tiny.Encoder), tiny.text())
    offramp.save(apply(program, "insert-acm,insert-exits{after=2}"), tmp_path / "m.offramp")
    chain = offramp.load(tmp_path / "m.offramp")
    found = chain.run({name: value.numpy() for name, value in tiny.text().items()}, lambda state: state.rows == 1)
    assert found.exits["encoder"].tolist() == [4, 2]
    assert {counts.shape for counts in found.learners.values()} == {(tiny.ROWS, tiny.TOKENS)}
    assert (found.learners["encoder.3.mlp"][1] == -1).all()


@pytest.mark.parametrize("make", [tiny.Encoder, tiny.TimeFirst])
def test_learners_of_so_many_tokens_of_each_row_one_after_another_lie_by_rows(make: Any, tmp_path: Path) -> None:
    """Their number is fixed, so that rows look like blocks of it, also where the tokens of a row lie apart."""
    inputs = tiny.text() if make is tiny.Encoder else {"x": torch.randn(5, tiny.ROWS, tiny.WIDTH)}
    axes = {name: {0 if make is tiny.Encoder else 1: "batch"} for name in inputs}
    program = apply(capture(_flat(make), inputs, dynamic=axes), "insert-acm")
    offramp.save(program, tmp_path / "m.offramp")
    chain = offramp.load(tmp_path / "m.offramp")
    found = chain.run({name: value.numpy() for name, value in inputs.items()}, offramp.Width(0.5))
    places = next(iter(inputs.values())).shape[:2]
    assert {counts.shape for counts in found.learners.values()} == {tuple(places)}


@pytest.mark.parametrize("text", ["insert-acm{sites=mlp},insert-cache", "insert-cache,insert-acm"])
def test_a_decoder_generates_whose_tokens_lie_one_after_another(text: str, tmp_path: Path) -> None:
    program = capture(_flat(tiny.Decoder), {"input_ids": tiny.ids()})
    offramp.save(apply(program, text), tmp_path / "m.offramp")
    found = offramp.load(tmp_path / "m.offramp").generate({"input_ids": tiny.ids().numpy()}, max_new_tokens=3, stop=[])
    ids = tiny.ids()
    for place in range(3):
        logits = tiny.outputs(program.module, {"input_ids": ids})[program.outputs[0]]
        assert logits[:, -1].argmax(-1).tolist() == [tokens[place] for tokens in found.tokens]
        ids = torch.cat([ids, logits[:, -1:].argmax(-1)], 1)


# Projections


def test_projections_are_factors_of_equal_cost(encoder: tiny.Captured) -> None:
    program = apply(encoder.program, "insert-acm{blocks=2,sites=projections}")
    assert {item.site: item.least for item in records(program)} == {"query": 1, "kv": 1, "output": 0}
    made = weights(program)
    assert made["learners.encoder.2.query.first"].shape == (8, tiny.WIDTH)
    assert made["learners.encoder.2.query.second"].shape == (tiny.WIDTH, 8)
    assert made["learners.encoder.2.kv.first"].shape == (11, tiny.WIDTH)  # 11 * (16 + 32) is 16 * 32 and a little
    again = apply(program, "insert-acm{blocks=2,sites=mlp|projections}")
    assert [item.site for item in records(again)] == ["query", "kv", "output", "mlp"]
    assert "learners   kv of block 2: 1 to 4 of 4" in str(program)


def test_factors_are_the_best_of_their_rank_for_what_the_projection_reads() -> None:
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(20, 12, generator=generator)
    data = torch.randn(500, 12, generator=generator) * torch.logspace(0, -3, 12)
    for count in (1, 3, 6):
        first, second = factors(weight, 6, data)
        plain, also = factors(weight, 6, None)
        wanted = data @ weight.T
        error = (wanted - data @ first[:count].T @ second[:, :count].T).norm()
        assert error < 0.7 * (wanted - data @ plain[:count].T @ also[:, :count].T).norm()
    left, values, right = torch.linalg.svd(weight, full_matrices=False)
    torch.testing.assert_close(also @ plain, (left[:, :6] * values[:6]) @ right[:6], rtol=1e-4, atol=1e-4)


def test_a_projection_of_low_rank_is_what_it_was(encoder: tiny.Captured) -> None:
    """Factors of half the rank hold all of it."""

    def make() -> nn.Module:
        module = tiny.Encoder()
        attention = module.blocks[0].attention
        for linear in (attention.q, attention.out):
            linear.weight.data = torch.randn(16, 5) @ torch.randn(5, 16) / 10
        return module

    captured = tiny.captured(make, tiny.text())
    program = apply(captured.program, "insert-acm{blocks=1,sites=query|output}")
    tiny.assert_same(tiny.outputs(program.module, captured.inputs), captured.eager(), atol=1e-4)
    narrow = tiny.outputs(fixed(program, 1).module, captured.inputs)
    assert not torch.allclose(narrow["logits"], captured.eager()["logits"], atol=1e-2)


@pytest.mark.parametrize("form", ["dense", "grouped"])
@pytest.mark.parametrize("name", ["encoder", "decoder", "two_stacks"])
@pytest.mark.slow
def test_a_bundle_with_learners_everywhere(
    name: str, form: Any, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    captured: tiny.Captured = request.getfixturevalue(name)
    program = undecided(apply(captured.program, text(captured.program, ",sites=mlp|projections")))
    figures = offramp.save(program, tmp_path / "m.offramp", learners=form)
    assert max(value for key, value in figures.items() if key != "tolerance") <= TOLERANCE


# Beside other passes


def test_learners_go_with_their_blocks(encoder: tiny.Captured) -> None:
    program = apply(encoder.program, "insert-acm,truncate{after=2}")
    assert [item.block for item in records(program)] == [1, 2]
    expected = tiny.outputs(apply(encoder.program, "truncate{after=2}").module, encoder.inputs)
    tiny.assert_same(tiny.outputs(program.module, encoder.inputs), expected, atol=1e-5)


def test_they_live_through_other_passes(decoder: tiny.Captured) -> None:
    program = apply(decoder.program, "insert-acm,insert-exits{after=1|2},insert-scores,insert-cache,canonicalize")
    assert [item.block for item in records(program)] == [1, 2, 3, 4]
    assert all(program.nodes[item.hidden].target is FIRST_LEARNERS for item in records(program))


def test_a_second_time_does_nothing(encoder: tiny.Captured) -> None:
    program = apply(encoder.program, "insert-acm{blocks=1|3}")
    result = offramp.InsertAcm(blocks=(1, 3), learners=2).run(program)
    assert not result.modified
    assert result.notes == (
        "block 1 of stack 'encoder' has learners already",
        "block 3 of stack 'encoder' has learners already",
    )
    assert [item.block for item in records(apply(program, "insert-acm"))] == [1, 3, 2, 4]


# Refused


def test_a_model_that_depends_on_the_order_of_a_sum() -> None:
    """Hidden units whose large contributions cancel in pairs: what is left is what rounding leaves."""
    module = tiny.seeded(tiny.Encoder)
    with torch.no_grad():
        for block in module.blocks:
            up, _, down = block.mlp
            up.weight[12:], up.bias[12:] = up.weight[:12], up.bias[:12]
            down.weight.mul_(1e6)
            down.weight[:, 12:] = -down.weight[:, :12]
    program = capture(module, tiny.text())
    with pytest.raises(PassError, match=r"(?s)changed the output 'logits' by .*order=given keeps that"):
        apply(program, "insert-acm{order=importance}")
    assert records(apply(program, "insert-acm{order=given}"))


class _Wide(tiny.Block):
    """A block without a residual around its MLP."""

    def forward(self, x: Tensor, mask: Any, memory: Any = None, reach: Any = None) -> Tensor:
        return torch.as_tensor(self.mlp(self.norms[1](x + self.attend(self.norms[0](x), mask))))


def test_without_a_residual_each_token_takes_one() -> None:
    def make() -> nn.Module:
        module = tiny.Encoder()
        module.blocks = nn.ModuleList(_Wide() for _ in range(2))
        return module

    program = capture(tiny.seeded(make), tiny.text())
    with pytest.raises(SpecError, match="least=0: no residual goes around the MLP of block 1 of stack 'encoder'"):
        apply(program, "insert-acm{least=0}")
    assert [item.least for item in records(apply(program, "insert-acm"))] == [1, 1]


def test_hidden_units_that_lie_otherwise_than_tokens() -> None:
    with pytest.raises(
        SpecError, match=r"(?s)MLP of block 1 .* shape \['batch', 'tokens'\], .* \['batch\*tokens'\].*try"
    ):
        apply(capture(_flat(tiny.Encoder, within=True), tiny.text()), "insert-acm")


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ("learners=1", "learners=1: a whole number, 2 or more"),
        ("learners=25", "learners=25: the MLP of block 1 of stack 'encoder' has 24 hidden units"),
        ("least=4", "least=4: from 0 to 3"),
        ("least=-1", "least=-1"),
        ("order=random", "order=.?random"),
        ("sites=mlp|head", "sites=head: there are projections, mlp, query"),
        ("sites=qkv", "(?s)block 1 of stack 'encoder' has no qkv: query, kv, output, mlp.*try: a projection is"),
        ("blocks=0|2|5", r"blocks=0\|5: stack 'encoder' has the blocks 1 to 4"),
        ("stack=other", "unknown stack 'other'"),
    ],
)
def test_options_that_do_not_fit(encoder: tiny.Captured, options: str, reason: str) -> None:
    with pytest.raises(SpecError, match=reason):
        apply(encoder.program, f"insert-acm{{{options}}}")


@pytest.mark.parametrize(
    ("sites", "reason"),
    [
        ((), r"sites=\(\): there are projections, mlp, query"),
        (None, "sites=None: there are projections, mlp, query"),
        (("mlp", None), "sites=None: there are projections, mlp, query"),
    ],
)
def test_sites_that_are_none(encoder: tiny.Captured, sites: Any, reason: str) -> None:
    with pytest.raises(SpecError, match=reason):
        apply(encoder.program, [offramp.InsertAcm(sites=sites)])


class _Apart(nn.Module):
    """An MLP whose units are scaled by a softmax of a weight, or by a gate of all tokens' mean."""

    def __init__(self, gated: bool) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(tiny.WIDTH, 24), nn.Linear(24, tiny.WIDTH)
        self.scale = nn.Linear(tiny.WIDTH, 24) if gated else nn.Parameter(torch.randn(24))

    def forward(self, x: Tensor) -> Tensor:
        mean = x.mean(1, keepdim=True)
        scale = self.scale(mean) if isinstance(self.scale, nn.Linear) else self.scale.softmax(-1)
        return torch.as_tensor(self.down(nn.functional.gelu(self.up(x)) * scale))


@pytest.mark.parametrize(
    ("gated", "reason"),
    [(False, r"try: softmax \(blocks.0.mlp \(_Apart\), .*\) meets hidden units"), (True, r"\(blocks.0.mlp.scale ")],
)
def test_what_hidden_units_meet_is_named_where_it_is_computed_apart(gated: bool, reason: str) -> None:
    def make() -> nn.Module:
        module = tiny.Encoder()
        for block in module.blocks:
            block.mlp = _Apart(gated)
        return module

    with pytest.raises(SpecError, match=f"(?s)has no MLP: query, kv, output.*{reason}"):
        apply(capture(tiny.seeded(make), tiny.text(), dynamic={}), "insert-acm")


class _Beside(nn.Module):
    """An MLP, and another one beside it that changes its hidden units in another way."""

    def __init__(self, between: nn.Module) -> None:
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(tiny.WIDTH, 24), nn.GELU(), nn.Linear(24, tiny.WIDTH))
        self.other = nn.Sequential(nn.Linear(tiny.WIDTH, 20), between, nn.Linear(20, tiny.WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        return torch.as_tensor(self.mlp(x) + self.other(x))


@pytest.mark.parametrize(
    ("between", "reason"),
    [
        (nn.LayerNorm(20), r"layer_norm\w* \(blocks.0.mlp.other.1 \(LayerNorm\), .* meets hidden units of linear\w* "),
        (
            nn.Identity(),
            r"nothing changes what linear\w* \(blocks.0.mlp.other.2 .* reads of another product one by one",
        ),
        (nn.GELU(), None),
    ],
)
def test_an_mlp_beside_one_that_has_learners_is_noted(between: nn.Module, reason: str | None) -> None:
    def make() -> nn.Module:
        module = tiny.Encoder()
        for block in module.blocks:
            block.mlp = _Beside(between)
        return module

    result = offramp.InsertAcm(blocks=1).run(capture(tiny.seeded(make), tiny.text()))
    assert [item.site for item in result.program.learners] == (["mlp"] if reason else ["mlp", "mlp2"])
    assert len(result.notes) == (reason is not None)
    for note in result.notes:
        assert re.match(f"block 1 of stack 'encoder' has products that are no MLP: {reason}", note)


class _Sloped(nn.Module):
    """As Apertus: the activation's slope is a number that is computed from a weight."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(tiny.WIDTH, 24), nn.Linear(24, tiny.WIDTH)
        self.slope = nn.Parameter(torch.tensor([0.3]))

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.up(x)
        return torch.as_tensor(self.down(hidden.relu() + nn.functional.softplus(self.slope) * hidden.sigmoid()))


@pytest.mark.parametrize("learners", ["dense", "grouped"])
def test_a_number_that_is_made_of_weights_may_stand_between_the_products(learners: Any, tmp_path: Path) -> None:
    def make() -> nn.Module:
        module = tiny.Encoder()
        for block in module.blocks:
            block.mlp = _Sloped()
        return module

    model, inputs = tiny.seeded(make), tiny.text()
    program = apply(capture(model, inputs), "insert-acm")
    assert {item.site for item in program.learners} == {"mlp"}
    offramp.save(program, tmp_path / "m.offramp", learners=learners)
    found = offramp.load(tmp_path / "m.offramp").run({name: value.numpy() for name, value in inputs.items()})
    tiny.assert_same({"logits": torch.from_numpy(found.outputs["logits"])}, tiny.outputs(model, inputs))


def test_a_block_without_an_mlp() -> None:
    pytest.importorskip("transformers")
    program = capture(*FACTORIES["mixtral"](), dynamic={})
    reason = (
        r"block 1 of stack 'decoder' has no MLP: query, key, value, output\n.*try: topk \(model.layers.0.mlp.*experts"
    )
    with pytest.raises(SpecError, match=reason):
        apply(program, "insert-acm")
    assert len(apply(program, "insert-acm{sites=projections}").learners) == 16
