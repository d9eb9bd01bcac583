"""The forms in which learners run agree, whatever tokens take and whatever is in the batch; runs say what ran."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import onnx
import pytest
import tiny
import torch
from breadth import slow_but
from hypothesis import given, settings
from hypothesis import strategies as st
from test_insert_acm import undecided
from torch import nn

import offramp
from offramp.bundle import directory
from offramp.bundle.checks import problems_of
from offramp.errors import ExportError, PolicyError
from offramp.passes import apply
from offramp.runtime import card
from offramp.runtime.policies import builtin

Form = Literal["dense", "grouped"]
FORMS: tuple[Form, ...] = ("dense", "grouped")


def arrays(inputs: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value.numpy() for name, value in inputs.items()}


def operators(path: Path) -> set[str]:
    return {
        node.op_type for file in path.glob("*.onnx") for node in onnx.load(file, load_external_data=False).graph.node
    }


@pytest.fixture(scope="module")
def chains(labeller: tiny.Captured, tmp_path_factory: pytest.TempPathFactory) -> dict[str, offramp.Chain]:
    """A labeller whose gates choose differently for each token, in every form, with exits."""
    folder = tmp_path_factory.mktemp("forms")
    program = undecided(apply(labeller.program, "insert-acm,insert-exits{after=2}"))
    for form in FORMS:
        offramp.save(program, folder / f"{form}.offramp", learners=form)
    assert "TopK" in operators(folder / "grouped.offramp")
    assert "TopK" not in operators(folder / "dense.offramp")
    return {form: offramp.load(folder / f"{form}.offramp") for form in FORMS}


@settings(max_examples=40, deadline=None)
@given(
    rows=st.integers(1, 5),
    tokens=st.integers(2, 30),
    seed=st.integers(0, 1000),
    budget=st.floats(0, 1),
    exits=st.booleans(),
)
def test_forms_agree(
    chains: dict[str, offramp.Chain], rows: int, tokens: int, seed: int, budget: float, exits: bool
) -> None:
    inputs = {"input_ids": tiny.ids(tokens, rows, seed).numpy(), "attention_mask": np.ones((rows, tokens), np.int64)}
    leaving = offramp.Depth(2) if exits else offramp.Never()
    made = {form: chain.run(inputs, offramp.Width(budget, leaving)) for form, chain in chains.items()}
    for name, counts in made["dense"].learners.items():
        np.testing.assert_array_equal(counts, made["grouped"].learners[name])
    assert made["dense"].width == made["grouped"].width
    np.testing.assert_allclose(made["grouped"].outputs["logits"], made["dense"].outputs["logits"], rtol=1e-4, atol=1e-5)
    first = {name: value[:1] for name, value in inputs.items()}
    alone = chains["grouped"].run(first, offramp.Width(budget, leaving)).outputs["logits"]
    np.testing.assert_allclose(alone[0], made["grouped"].outputs["logits"][0], rtol=1e-4, atol=1e-5)


def test_operations_are_those_of_the_learners_that_ran(chains: dict[str, offramp.Chain]) -> None:
    chain = chains["grouped"]
    result = chain.run(arrays(tiny.text(9, 3)), lambda state: state.rows == 1)
    assert result.exits["encoder"].tolist() == [4, 2, 4]
    assert set(result.learners) == set(chain.manifest.learners) == {f"encoder.{block}.mlp" for block in (1, 2, 3, 4)}
    executed = whole = 0
    for name, item in chain.manifest.learners.items():
        counts = result.learners[name]
        assert counts.shape == (3, 9)
        assert (counts[1] == -1).all() == (item.block > 2)
        ran = counts[counts >= 0]
        executed += item.flops * int(ran.sum())
        whole += item.flops * item.learners * ran.size
        assert item.flops == 2 * 2 * 16 * 24 // 4
    assert result.width == executed / whole


@pytest.mark.parametrize("form", FORMS)
def test_gates_that_are_not_trained_take_the_budget(form: Form, labeller: tiny.Captured, tmp_path: Path) -> None:
    program = apply(labeller.program, "insert-acm{least=1}")
    offramp.save(program, tmp_path / "m.offramp", learners=form)
    chain = offramp.load(tmp_path / "m.offramp")
    for budget, expected in ((0.0, 0.25), (0.25, 0.25), (0.5, 0.5), (0.75, 0.75), (1.0, 1.0)):
        result = chain.run(arrays(labeller.inputs), offramp.Width(budget))
        assert result.width == expected
        program.module.get_buffer("learners_width").fill_(budget)
        np.testing.assert_allclose(
            result.outputs["logits"], tiny.outputs(program.module, labeller.inputs)["logits"], rtol=1e-4, atol=1e-5
        )


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("then", ["insert-cache", "insert-exits{after=1|3},insert-scores,insert-cache"])
def test_generation(form: Form, then: str, decoder: tiny.Captured, tmp_path: Path) -> None:
    """A narrower bundle generates what the program of that width does."""
    program = undecided(apply(decoder.program, "insert-acm"))
    offramp.save(apply(program, then), tmp_path / "m.offramp", learners=form)
    chain = offramp.load(tmp_path / "m.offramp")
    prompts = tiny.ids().numpy()
    widths = []
    for budget in (1.0, 0.1):
        found = chain.generate({"input_ids": prompts}, offramp.Width(budget), max_new_tokens=5, stop=[])
        program.module.get_buffer("learners_width").fill_(budget)
        for row in range(tiny.ROWS):
            ids = tiny.ids()[row : row + 1]
            for token in found.tokens[row].tolist():
                logits = tiny.outputs(program.module, {"input_ids": ids})[program.outputs[0]]
                assert int(logits[0, -1].argmax()) == token
                ids = torch.cat([ids, torch.tensor([[token]])], 1)
        widths.append(found.width)
    assert None not in widths
    assert widths[0] != widths[1]
    assert chain.generate({"input_ids": prompts}, max_new_tokens=2).width == pytest.approx(widths[0], abs=0.2)


@pytest.mark.parametrize("stacks", [pytest.param(("encoder",), marks=pytest.mark.slow), ("encoder", "decoder")])
def test_learners_of_what_runs_once_are_counted(
    stacks: tuple[str, ...], two_stacks: tiny.Captured, tmp_path: Path
) -> None:
    """Of a prompt and no token behind it all learners that a run has, by their operations."""
    program = undecided(apply(two_stacks.program, ",".join(f"insert-acm{{stack={name}}}" for name in stacks)))
    offramp.save(apply(program, "insert-cache"), tmp_path / "m.offramp", learners="grouped", segments=1)
    chain, inputs = offramp.load(tmp_path / "m.offramp"), arrays(two_stacks.inputs)
    for budget in (1.0, 0.3):
        ran = chain.run(inputs, offramp.Width(budget))
        for beams in (1, 2):
            found = chain.generate(inputs, offramp.Width(budget), max_new_tokens=1, stop=[], beams=beams)
            assert found.width == pytest.approx(ran.width)
    assert found.width not in (None, 0.0, 1.0)
    longer = chain.generate(inputs, offramp.Width(0.3), max_new_tokens=4, stop=[]).width
    assert (longer == found.width) == (stacks == ("encoder",))


def test_the_card_says_what_has_learners(chains: dict[str, offramp.Chain]) -> None:
    text = card.card(chains["grouped"].manifest, "m.offramp")
    assert "| encoder | mlp | 4 | 4 | grouped |" in text
    assert "`Width(0.5)` lets them take half" in text
    assert "\n  encoder: mlp of 4 blocks in 4 learners, grouped\n" in repr(chains["grouped"])


def test_width_as_the_default_policy(labeller: tiny.Captured, tmp_path: Path) -> None:
    program = apply(labeller.program, "insert-acm,insert-exits{after=2},insert-scores{measure=cosine}")
    policy = offramp.Width(0.5, offramp.Confidence(0.9, measure="cosine"))
    assert builtin.from_dict(policy.to_dict()) == policy
    offramp.save(program, tmp_path / "m.offramp", policy=policy.to_dict())
    assert offramp.load(tmp_path / "m.offramp").run(arrays(labeller.inputs)).width == 0.5
    assert directory.read(tmp_path / "m.offramp")[0].policy == policy.to_dict()


def test_the_faster_form_is_chosen_and_said(tmp_path: Path) -> None:
    """Wide units of few tokens, and narrow ones: what is chosen is what was faster."""
    wide = tiny.seeded(tiny.Encoder)
    for block in wide.blocks:
        block.mlp = tiny.seeded(
            lambda: torch.nn.Sequential(torch.nn.Linear(16, 6000), torch.nn.GELU(), torch.nn.Linear(6000, 16))
        )
    for name, model in {"wide": wide, "narrow": tiny.seeded(tiny.Encoder)}.items():
        program = apply(offramp.capture(model, tiny.text()), "insert-acm{blocks=1|2}")
        offramp.save(program, tmp_path / name)
        manifest, _ = directory.read(tmp_path / name)
        times = manifest.provenance["learners"]
        assert set(times) == set(manifest.learners) == {"encoder.1.mlp", "encoder.2.mlp"}
        for site, item in manifest.learners.items():
            assert times[site]["tokens"] == tiny.ROWS * tiny.TOKENS
            assert item.form == min(FORMS, key=lambda form: times[site][form])
        assert ("TopK" in operators(tmp_path / name)) == (manifest.learners["encoder.1.mlp"].form == "grouped")


def test_with_caches_forms_are_timed_on_one_token(decoder: tiny.Captured, tmp_path: Path) -> None:
    offramp.save(apply(decoder.program, "insert-acm,insert-cache"), tmp_path / "m.offramp")
    manifest, _ = directory.read(tmp_path / "m.offramp")
    assert [times["tokens"] for times in manifest.provenance["learners"].values()] == [1] * tiny.BLOCKS


def test_with_caches_forms_of_what_runs_once_are_timed_on_its_tokens(two_stacks: tiny.Captured, tmp_path: Path) -> None:
    program = apply(two_stacks.program, "insert-acm{stack=encoder,blocks=1},insert-acm{stack=decoder,blocks=1}")
    offramp.save(apply(program, "insert-cache"), tmp_path / "m.offramp", segments=1)
    times = directory.read(tmp_path / "m.offramp")[0].provenance["learners"]
    found = {site: each["tokens"] for site, each in times.items()}
    assert found == {"encoder.1.mlp": tiny.ROWS * tiny.SOURCES, "decoder.1.mlp": 1}


class Scaled(torch.nn.Module):
    """Hidden units times one number, which has as many axes as they."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = torch.nn.Linear(16, 32), torch.nn.Linear(32, 16)
        self.scale = torch.nn.Parameter(torch.full((1, 1, 1), 1.3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        made: torch.Tensor = self.down(torch.nn.functional.gelu(self.up(x)) * self.scale.exp())
        return made


def test_a_number_with_several_axes(tmp_path: Path) -> None:
    model = tiny.seeded(tiny.Encoder)
    for block in model.blocks:
        block.mlp = tiny.seeded(Scaled)
    program = undecided(apply(offramp.capture(model, tiny.text()), "insert-acm"))
    made = {}
    for form in FORMS:
        offramp.save(program, tmp_path / form, learners=form)
        made[form] = offramp.load(tmp_path / form).run(arrays(tiny.text()), offramp.Width(0.5)).outputs["logits"]
    np.testing.assert_allclose(made["grouped"], made["dense"], rtol=1e-4, atol=1e-5)


class Flat(torch.nn.Module):
    """A linear layer as GPT-2 has it: all tokens one after another, in whose place they come back by their sizes."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.randn(inputs, outputs) / inputs**0.5)
        self.bias = torch.nn.Parameter(torch.zeros(outputs))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.addmm(self.bias, x.view(-1, x.shape[-1]), self.weight).view(*x.shape[:-1], -1)


@pytest.mark.parametrize("passes", slow_but(["insert-acm,insert-cache"], ["insert-acm", "insert-acm,insert-cache"]))
def test_sites_that_read_sizes_are_timed(tmp_path: Path, passes: str) -> None:
    model = tiny.seeded(tiny.Decoder)
    for block in model.blocks:
        block.mlp = tiny.seeded(lambda: torch.nn.Sequential(Flat(16, 32), torch.nn.GELU(), Flat(32, 16)))
    offramp.save(apply(offramp.capture(model, {"input_ids": tiny.ids(7)}), passes), tmp_path / "m.offramp")
    manifest, _ = directory.read(tmp_path / "m.offramp")
    assert len(manifest.provenance["learners"]) == tiny.BLOCKS


def test_the_width_that_a_program_takes_in_torch_is_its_own(labeller: tiny.Captured, tmp_path: Path) -> None:
    program = undecided(apply(labeller.program, "insert-acm"))
    width = program.module.get_buffer("learners_width").fill_(0.5)
    offramp.save(program, tmp_path / "m.offramp")
    assert width.item() == 0.5
    inputs, chain = arrays(labeller.inputs), offramp.load(tmp_path / "m.offramp")
    half = program.module(**labeller.inputs)["logits"].detach().numpy()
    np.testing.assert_allclose(chain.run(inputs, offramp.Width(0.5)).outputs["logits"], half, rtol=1e-4, atol=1e-5)


# Refused


def test_a_form_that_is_not_there(encoder: tiny.Captured, tmp_path: Path) -> None:
    with pytest.raises(ExportError, match="learners='sparse': there are dense, grouped"):
        offramp.save(encoder.program, tmp_path / "m.offramp", learners="sparse")  # type: ignore[arg-type]


def test_a_bundle_without_learners(labeller: tiny.Captured, tmp_path: Path) -> None:
    offramp.save(labeller.program, tmp_path / "m.offramp")
    chain = offramp.load(tmp_path / "m.offramp")
    with pytest.raises(PolicyError, match=r"(?s)Width\(budget=0.5.*this bundle has no learners.*insert-acm"):
        chain.run(arrays(labeller.inputs), offramp.Width(0.5))
    assert chain.run(arrays(labeller.inputs)).width is None


def test_widths_that_make_no_sense(chains: dict[str, offramp.Chain]) -> None:
    for budget in (-0.1, 1.1, float("nan")):
        with pytest.raises(PolicyError, match="a share of the learners, from 0 to 1"):
            offramp.Width(budget)
    with pytest.raises(PolicyError, match="one width for all stacks"):
        offramp.Width(0.5, offramp.Width(0.5))
    with pytest.raises(PolicyError, match="is inside another policy"):
        chains["dense"].run(arrays(tiny.text()), offramp.Each({"encoder": offramp.Width(0.5)}))


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"stack": "other"}, "stack: there is no stack 'other'"),
        ({"block": 5}, "block: stack 'encoder' has the blocks 1 to 4, not 5"),
        ({"least": 4}, "least: 4 is none of 0 to 3"),
        ({"flops": 0}, "flops: 0"),
        ({"form": "sparse"}, "form: 'sparse' is none of dense, grouped"),
        ({"count": "input_ids_"}, "count: nothing makes 'input_ids_'"),
        ({"count": "encoder.1"}, "count: 'encoder.1' is float32, expected int64"),
    ],
)
def test_manifests_that_contradict_themselves(
    chains: dict[str, offramp.Chain], changes: dict[str, Any], problem: str
) -> None:
    manifest = chains["dense"].manifest
    assert problems_of(manifest) == []
    wrong = replace(manifest.learners["encoder.1.mlp"], **changes)
    found = problems_of(replace(manifest, learners={**manifest.learners, "encoder.1.mlp": wrong}))
    assert found == [f"learners.encoder.1.mlp.{problem}"]


def test_a_manifest_without_a_width(chains: dict[str, offramp.Chain]) -> None:
    manifest = chains["dense"].manifest
    values = {**manifest.values, "learners_width": replace(manifest.values["learners_width"], shape=(2,))}
    assert problems_of(replace(manifest, values=values)) == [
        "learners: there is no value 'learners_width', float32 [1]"
    ]


class _Lerp(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(tiny.WIDTH, 24), nn.Linear(24, tiny.WIDTH)
        self.share = nn.Parameter(torch.rand(24))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        hidden = self.up(x)
        return torch.as_tensor(self.down(torch.lerp(hidden, hidden.tanh(), self.share)))


def test_units_that_a_weight_and_two_values_make_are_grouped(tmp_path: Path) -> None:
    def make() -> nn.Module:
        module = tiny.Encoder()
        module.blocks = module.blocks[:2]
        for block in module.blocks:
            block.mlp = _Lerp()
        return module

    program = undecided(apply(tiny.captured(make, tiny.text()).program, "insert-acm"))
    figures = offramp.save(program, tmp_path / "m.offramp", learners="grouped")
    assert max(value for key, value in figures.items() if key != "tolerance") <= figures["tolerance"]
    assert "TopK" in operators(tmp_path / "m.offramp")
