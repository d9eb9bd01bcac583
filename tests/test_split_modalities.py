"""split-modalities: groups of an encoder's tokens leave apart, visible to the others (joint) or not (separate)."""

# mypy: disable-error-code="no-any-return"
from __future__ import annotations

import itertools
import json
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from two_modalities import PATCHES, Joined, captured, inputs, joined

import offramp
from offramp import cli
from offramp.bundle.json_text import from_json, to_json
from offramp.bundle.manifest import Exit, Group, Stack
from offramp.errors import BundleError, PolicyError, SpecError
from offramp.program import Program
from offramp.program.groups import left_early
from offramp.program.ops import put_tokens, take_tokens
from offramp.runtime import Chain
from offramp.runtime.policies.base import State
from offramp.runtime.policies.group_policy import GroupPolicy, active_places

KINDS: dict[str, dict[str, Any]] = {
    "plain": {},
    "text first": {"first": "text"},
    "written out": {"written": True},
    "norm behind": {"post": True},
    "bias of pairs": {"bias": True},
    "classifier": {"decodes": False},
}
EXITS = "insert-exits{stack=encoder},insert-scores{stack=encoder,measure=cosine}"


class Case:
    """A model, its program with groups and exits, and its chain."""

    def __init__(self, path: Path, **how: Any) -> None:
        self.model, self.inputs = joined(**how), inputs(how.get("decodes", True))
        self.captured = captured(**how)
        self.program = offramp.apply(self.captured, f"split-modalities{{stack=encoder}},{EXITS}")
        self.figures = offramp.save(self.program, path)
        self.chain = offramp.load(path)
        self.arrays = {name: value.numpy() for name, value in self.inputs.items()}

    def expected(self, depths: Tensor) -> np.ndarray[Any, Any]:
        """The model's own modules, in which a token that has left stays as it is; ``depths`` [rows, (image, text)]."""
        model = self.model
        blocks = list(model.encoder)
        counts = [PATCHES + 1, self.inputs["input_ids"].shape[1]]
        order = [0, 1] if model.first == "image" else [1, 0]
        per_token = depths[:, order].repeat_interleave(torch.tensor([counts[i] for i in order]), 1)[..., None]

        class Leaving(torch.nn.Module):
            def __init__(self, block: torch.nn.Module, depth: int) -> None:
                super().__init__()
                self.block, self.depth = block, depth

            def forward(self, x: Tensor, mask: Tensor) -> Tensor:
                return torch.where(per_token >= self.depth, self.block(x, mask), x)

        model.encoder = torch.nn.ModuleList(Leaving(block, at) for at, block in enumerate(blocks, 1))
        try:
            with torch.no_grad():
                return model(**self.inputs)["logits"].numpy()
        finally:
            model.encoder = torch.nn.ModuleList(blocks)


BREADTH = ("text first", "norm behind", "bias of pairs", "written out")
MARKED = [pytest.param(kind, marks=pytest.mark.slow if kind in BREADTH else ()) for kind in KINDS]


@pytest.fixture(scope="module", params=MARKED)
def case(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Case:
    return Case(tmp_path_factory.mktemp("bundle") / "model.offramp", **KINDS[request.param])


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Case:
    return Case(tmp_path_factory.mktemp("bundle") / "plain.offramp")


def _close(found: np.ndarray[Any, Any], expected: np.ndarray[Any, Any]) -> None:
    np.testing.assert_allclose(found, expected, atol=2e-5 * max(1.0, float(np.abs(expected).max())))


def test_groups_are_what_tokens_are_made_of(case: Case) -> None:
    (item,) = case.program.groups
    found = {group.name: group.tokens for group in item.groups}
    assert found == {"image": PATCHES + 1, "text": "tokens"}
    assert item.groups[0].name == case.model.first
    assert "tokens in groups: " in str(case.program)


def test_without_exits_nothing_changes(case: Case) -> None:
    split = offramp.apply(case.captured, "split-modalities")
    before, after = case.captured.module(**case.inputs), split.module(**case.inputs)
    assert all(torch.equal(before[name], after[name]) for name in case.captured.outputs)


def test_a_bundle_without_exits_is_the_model(plain: Case, tmp_path: Path) -> None:
    figures = offramp.save(offramp.apply(plain.captured, "split-modalities"), tmp_path / "model.offramp")
    assert figures["groups"] < 1e-5
    result = offramp.load(tmp_path / "model.offramp").run(plain.arrays)
    _close(result.outputs["logits"], plain.expected(torch.tensor([[3, 3]] * 3)))


def test_every_pair_of_depths_is_exact(case: Case) -> None:
    for image, text in itertools.product((1, 2, 3), repeat=2):
        result = case.chain.run(case.arrays, offramp.Depth({"encoder.image": image, "encoder.text": text}))
        _close(result.outputs["logits"], case.expected(torch.tensor([[image, text]] * 3)))
        assert result.exits["encoder.image"].tolist() == [image] * 3
        assert result.exits["encoder.text"].tolist() == [text] * 3


def test_what_left_early_says_is_what_the_modules_give(case: Case) -> None:
    drawn = torch.tensor([[1, 3], [3, 2], [2, 2]])
    order = [0, 1] if case.model.first == "image" else [1, 0]
    found = left_early(case.program, case.program.fresh(case.inputs), {"encoder": drawn[:, order]})
    _close(found["logits"].detach().numpy(), case.expected(drawn))


def test_rows_of_different_depths_are_the_rows_alone(case: Case) -> None:
    depths = {"encoder.image": np.array([1, 3, 2]), "encoder.text": np.array([3, 1, 2])}

    def leave(state: State) -> Any:
        return (
            depths[state.stack][state.rows] == state.after if state.stack in depths else np.zeros(state.rows.size, bool)
        )

    together = case.chain.run(case.arrays, leave)
    for row in range(3):
        own = {name: int(depth[row]) for name, depth in depths.items()}
        alone = case.chain.run({name: value[row : row + 1] for name, value in case.arrays.items()}, offramp.Depth(own))
        _close(together.outputs["logits"][row], alone.outputs["logits"][0])
        assert {name: together.exits[name][row] for name in own} == own


def test_save_validates_groups(case: Case) -> None:
    assert case.figures["groups"] < 1e-5
    assert case.figures["exits"] < 1e-5


def test_scores_are_of_each_group_without_padding(plain: Case) -> None:
    result = plain.chain.run(plain.arrays, offramp.Confidence(2.0, measure="cosine"))
    states = [plain.program.nodes[name] for name in plain.program.stacks["encoder"].cuts]
    values = offramp.program.program.evaluate(plain.program.graph_module, states, plain.inputs)
    before, after = (values[node].detach() for node in states[1:3])
    lengths = plain.inputs["attention_mask"].sum(1)
    for row in range(3):
        image, text = slice(0, PATCHES + 1), slice(PATCHES + 1, PATCHES + 1 + int(lengths[row]))
        for name, tokens in (("encoder.image", image), ("encoder.text", text)):
            one = F.cosine_similarity(before[row, tokens].flatten(), after[row, tokens].flatten(), 0)
            assert result.scores[name][2]["cosine"][row] == pytest.approx(one.item(), abs=1e-5)


def test_a_group_that_has_left_is_not_asked_again(plain: Case) -> None:
    asked = []

    def leave(state: State) -> Any:
        asked.append((state.stack, state.after, state.rows.tolist()))
        return np.array([state.stack == "encoder.image"] * state.rows.size)

    result = plain.chain.run(plain.arrays, leave)
    assert asked == [("encoder.image", 1, [0, 1, 2]), ("encoder.text", 1, [0, 1, 2]), ("encoder.text", 2, [0, 1, 2])]
    assert result.scores["encoder.image"].keys() == {1}


@given(st.lists(st.tuples(st.integers(1, 3), st.integers(1, 3)), min_size=3, max_size=3))
@settings(max_examples=25, deadline=None)
def test_any_rows_leave_anywhere(plain: Case, drawn: list[tuple[int, int]]) -> None:
    depths = np.array(drawn)

    def leave(state: State) -> Any:
        return depths[state.rows, ["encoder.image", "encoder.text"].index(state.stack)] == state.after

    _close(plain.chain.run(plain.arrays, leave).outputs["logits"], plain.expected(torch.tensor(drawn)))


@pytest.mark.slow
def test_with_caches_text_is_generated_from_what_is_left(tmp_path: Path) -> None:
    given_ = inputs()
    pipeline = f"split-modalities,{EXITS},insert-exits{{stack=decoder}},insert-scores{{stack=decoder}},insert-cache"
    figures = offramp.save(offramp.apply(captured(), pipeline), tmp_path / "m.offramp")
    assert figures["cache"] < 1e-5
    chain = offramp.load(tmp_path / "m.offramp")
    arrays = {name: value.numpy() for name, value in given_.items() if name != "decoder_input_ids"}
    arrays["decoder_input_ids"] = np.ones((3, 1), np.int64)
    early = offramp.Each({"encoder.image": offramp.Depth(1), "encoder.text": offramp.Depth(2)})
    found = chain.generate(arrays, early, max_new_tokens=5)
    searched = chain.generate(arrays, early, max_new_tokens=5, beams=2)
    assert {name: depths.tolist() for name, depths in searched.encoders.items()} == {
        "encoder.image": [1, 1, 1], "encoder.text": [2, 2, 2]
    }  # fmt: skip
    program = offramp.apply(captured(), "split-modalities")
    ids = torch.ones(3, 1, dtype=torch.int64)
    depths = {"encoder": torch.tensor([[1, 2]] * 3)}
    for _ in range(5):
        logits = left_early(program, {**given_, "decoder_input_ids": ids}, depths)["logits"]
        ids = torch.cat([ids, logits[:, -1:].argmax(-1)], 1)
    assert [row.tolist() for row in found.tokens] == ids[:, 1:].tolist()


@pytest.mark.parametrize("kind", MARKED)
def test_separate_stacks_are_the_blocks_without_attention_between_groups(kind: str, tmp_path: Path) -> None:
    model, given_ = joined(**KINDS[kind]), inputs(KINDS[kind].get("decodes", True))
    pipeline = "split-modalities{form=separate}"
    for name in ("image", "text"):
        pipeline += f",insert-exits{{stack=encoder.{name}}},insert-scores{{stack=encoder.{name},measure=cosine}}"
    program = offramp.apply(captured(**KINDS[kind]), pipeline)
    sizes = [PATCHES + 1, given_["input_ids"].shape[1]]
    group = torch.arange(2).repeat_interleave(torch.tensor(sizes if model.first == "image" else sizes[::-1]))
    expected = _apart(model, given_, group)
    _close(program.module(**given_)["logits"].detach().numpy(), expected)
    assert not np.allclose(expected, model(**given_)["logits"].detach().numpy(), atol=1e-3)
    offramp.save(program, tmp_path / "m.offramp")
    chain = offramp.load(tmp_path / "m.offramp")
    arrays = {name: value.numpy() for name, value in given_.items()}
    _close(chain.run(arrays).outputs["logits"], expected)
    files = [{chain.manifest.segments[f"encoder.{name}.{at}"].file for name in ("image", "text")} for at in (1, 2, 3)]
    assert [len(found) for found in files] == ([1, 1, 1] if kind != "bias of pairs" else [len(f) for f in files])
    for image, text in itertools.product((1, 3), repeat=2):
        found = chain.run(arrays, offramp.Depth({"encoder.image": image, "encoder.text": text}))
        cut = "".join(
            f",truncate{{stack=encoder.{n},after={d}}}" for n, d in (("image", image), ("text", text)) if d < 3
        )
        short = offramp.apply(program, cut[1:]) if cut else program
        _close(found.outputs["logits"], short.module(**given_)["logits"].detach().numpy())


def _apart(model: Joined, given_: dict[str, Tensor], group: Tensor) -> np.ndarray[Any, Any]:
    """The model where its encoder's tokens see those of their group alone."""
    hidden = group[:, None] != group

    def hiding(mask: Tensor) -> Tensor:
        return mask & ~hidden if mask.dtype == torch.bool else mask.masked_fill(hidden, -1e9)

    hooks = [
        block.register_forward_pre_hook(lambda _, args: (args[0], hiding(args[1]), *args[2:]))
        for block in model.encoder
    ]
    with torch.no_grad():
        made = model(**given_)["logits"].numpy()
    for hook in hooks:
        hook.remove()
    return made


_PEAK = """
import sys
import numpy as np
import offramp
chain = offramp.load(sys.argv[1], threads=1)
for _ in range(3):
    chain.run(dict(np.load(sys.argv[2])))
print(next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmRSS")))
"""


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").is_file(), reason="resident memory is read from /proc")
def test_groups_share_their_weights_in_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("two_modalities.FEATURES", 768)
    model, given_ = joined(decodes=False), inputs(decodes=False)
    captured = offramp.capture(model, given_)
    arrays: dict[str, Any] = {name: value.numpy() for name, value in given_.items()}
    np.savez(tmp_path / "inputs.npz", **arrays)
    found = {}
    for form in ("whole", "joint", "separate"):
        split = captured if form == "whole" else offramp.apply(captured, f"split-modalities{{form={form}}}")
        exits = ",".join(f"insert-exits{{stack={name}}}" for name in split.stacks)
        offramp.save(offramp.apply(split, exits), tmp_path / form)
        command = [sys.executable, "-c", _PEAK, str(tmp_path / form), str(tmp_path / "inputs.npz")]
        found[form] = int(subprocess.run(command, check=True, capture_output=True, text=True).stdout) / 1024
    weights = sum(weight.nbytes for weight in model.encoder.parameters()) / 2**20
    assert weights > 25
    assert max(found["joint"], found["separate"]) - found["whole"] < 0.3 * weights, (found, weights)


@pytest.mark.parametrize(
    ("pipeline", "reason"),
    [
        ("split-modalities{stack=decoder}", "is causal"),
        ("split-modalities{form=loose}", "form=loose is not joint or separate"),
        ("split-modalities{names=a|b|c}", "tokens of 2 kinds are joined before stack 'encoder'"),
        ("insert-exits{stack=encoder},split-modalities", "has exits already"),
        ("split-modalities,insert-exits{stack=encoder},insert-scores{stack=encoder,measure=learned}", "in groups"),
        ("split-modalities,insert-exits{stack=encoder},insert-adapter{stack=encoder}", "in groups"),
        ("split-modalities,insert-acm{stack=encoder}", "in groups"),
        ("insert-acm{stack=encoder},split-modalities", "has learners"),
    ],
)
def test_refusals_say_why(pipeline: str, reason: str) -> None:
    with pytest.raises(SpecError, match=reason):
        offramp.apply(captured(), pipeline)


def test_a_stack_of_one_input_has_no_groups(one_input: Program) -> None:
    with pytest.raises(SpecError, match="no tokens of several inputs are joined before stack"):
        offramp.apply(one_input, "split-modalities")


@pytest.fixture(scope="module")
def one_input() -> Program:
    class Text(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = joined(decodes=False)

        def forward(self, input_ids: Tensor) -> Tensor:
            x = self.model.words(input_ids)
            for block in self.model.encoder:
                x = block(x, None)
            return self.model.head(x)

    return offramp.capture(Text().eval(), {"input_ids": inputs()["input_ids"]})


def test_names_are_taken_and_twice_is_once() -> None:
    once = offramp.apply(captured(), "split-modalities{names=pixels|words}")
    assert [group.name for group in once.groups[0].groups] == ["pixels", "words"]
    assert offramp.apply(once, "split-modalities").groups == once.groups


def test_policies_name_groups_and_no_stack(plain: Case) -> None:
    with pytest.raises(PolicyError, match=r"there is no stack 'encoder'(.*\n)*.*encoder.image: exits after 1, 2, 3"):
        plain.chain.run(plain.arrays, offramp.Depth({"encoder": 1}))


def test_hints_name_the_stack_that_has_a_groups_exits(plain: Case) -> None:
    stacks = {
        name: replace(stack, exits=tuple(exit_ for exit_ in stack.exits if exit_.after != 2))
        for name, stack in plain.chain.stacks.items()
    }
    with pytest.raises(PolicyError, match=r"'encoder.image' has no exit(.*\n)*.*insert-exits{stack=encoder,after=2}"):
        offramp.Depth({"encoder.image": 2}).check(stacks)
    split = offramp.apply(captured(), "split-modalities")
    with pytest.raises(SpecError, match=r"unknown stack 'encoder.text'(.*\n)*.*stack=encoder, by whose exits"):
        offramp.apply(split, "insert-exits{stack=encoder.text}")


@given(st.lists(st.lists(st.booleans(), min_size=5, max_size=5), min_size=1, max_size=4))
def test_places_of_active_tokens(drawn: list[list[bool]]) -> None:
    inside = np.array(drawn)
    inside[:, 2] |= ~inside.any(1)
    found = active_places(inside)
    for row, places in zip(inside, found, strict=True):
        assert set(places) == set(np.flatnonzero(row))
        assert places[: row.sum()].tolist() == np.flatnonzero(row).tolist()


@given(st.integers(1, 3), st.sampled_from([1, 2, "one"]), st.integers(1, 2), st.integers(0, 2**31))
@settings(deadline=None)
def test_taken_tokens_are_put_back(batch: int, heads: int | str, axis: int, seed: int) -> None:
    drawn = torch.Generator().manual_seed(seed)
    rows = 1 if heads == "one" else batch * int(heads)
    sizes = (rows, 5, 3) if axis == 1 else (rows, 2, 5, 3)
    tokens = torch.randn(sizes, generator=drawn)
    places = torch.stack([torch.randperm(5, generator=drawn)[:3] for _ in range(batch)])
    found = take_tokens(tokens, places, axis)
    for row in range(found.shape[0]):
        own = places[row * batch // found.shape[0]]
        assert torch.equal(found[row], tokens[min(row, rows - 1)].index_select(axis - 1, own))
    if rows > 1 or batch == 1:
        assert torch.equal(put_tokens(tokens, places, found, axis), tokens)
        changed = put_tokens(tokens, places, found + 1, axis)
        assert torch.equal(take_tokens(changed, places, axis), found + 1)


@pytest.fixture(scope="module", params=["joined", pytest.param("written out", marks=pytest.mark.slow), "one input"])
def alone(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Program, Chain]:
    program = captured(**KINDS["written out" if request.param == "written out" else "plain"])
    if request.param == "one input":
        program = request.getfixturevalue("one_input")
    path = tmp_path_factory.mktemp("bundle") / "alone.offramp"
    program = offramp.apply(program, f"split-modalities{{tokens=token}},{EXITS}")
    assert offramp.save(program, path)["groups"] < 1e-5
    return program, offramp.load(path)


def test_tokens_leave_alone(alone: tuple[Program, Chain]) -> None:
    program, chain = alone
    (item,) = program.groups
    given_ = {name: inputs()[name] for name in program.inputs}
    counts = item.counts(program, given_)
    drawn = np.random.default_rng(3)
    for _ in range(5):
        names = list(chain.stacks)[: len(counts)]
        depths = {name: drawn.integers(1, 4, (3, count)) for name, count in zip(names, counts, strict=True)}

        def leave(state: State, depths: dict[str, Any] = depths) -> Any:
            if state.stack not in depths:
                return np.zeros(state.rows.size, np.bool_)
            return depths[state.stack].ravel()[state.rows] == state.after

        found = chain.run({name: value.numpy() for name, value in given_.items()}, leave)
        assert all((found.exits[name] == depth).all() for name, depth in depths.items())
        wanted = torch.from_numpy(np.concatenate(list(depths.values()), 1))
        expected = left_early(program, program.fresh(given_), {"encoder": wanted})
        for name in program.outputs:
            _close(found.outputs[name], expected[name].detach().numpy())


def test_padding_leaves_first_where_tokens_leave_alone(tmp_path: Path) -> None:
    program = offramp.apply(captured(), f"split-modalities{{tokens=token}},{EXITS}")
    offramp.save(program, tmp_path / "m.offramp")
    chain = offramp.load(tmp_path / "m.offramp")
    result = chain.run(
        {name: value.numpy() for name, value in inputs().items()}, offramp.Confidence(0.9999, measure="cosine")
    )
    padded = inputs()["attention_mask"].numpy() == 0
    assert (result.exits["encoder.text"][padded] == 1).all()
    assert (result.exits["encoder.text"][~padded] > 1).any()
    scores = result.scores["encoder.text"][1]["cosine"]
    assert scores.shape == padded.shape
    states = [program.nodes[name] for name in program.stacks["encoder"].cuts[:2]]
    before, after = offramp.program.program.evaluate(program.graph_module, states, inputs()).values()
    expected = F.cosine_similarity(before, after, -1)[:, PATCHES + 1 :].detach().numpy()
    np.testing.assert_allclose(scores[~padded], expected[~padded], atol=1e-5)


@pytest.mark.slow
def test_a_fixed_number_of_tokens_leaves_alone(tmp_path: Path) -> None:
    class Image(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = joined(decodes=False)

        def forward(self, pixel_values: Tensor) -> Tensor:
            x = self.model.patch(pixel_values).flatten(2).transpose(1, 2)
            for block in self.model.encoder:
                x = block(x, None)
            return self.model.head(x[:, 0])

    program = offramp.capture(Image().eval(), {"pixel_values": inputs()["pixel_values"]})
    program = offramp.apply(program, f"split-modalities{{tokens=token}},{EXITS}")
    assert offramp.save(program, tmp_path / "m.offramp")["groups"] < 1e-5
    chain = offramp.load(tmp_path / "m.offramp")
    shown = cli.main(["run", str(tmp_path / "m.offramp"), "--input", f"pixel_values={_saved(tmp_path)}"])
    assert shown == 0
    assert chain.run({"pixel_values": inputs()["pixel_values"].numpy()}).exits["encoder.tokens"].shape == (3, PATCHES)


def _saved(folder: Path) -> Path:
    np.save(folder / "pixels.npy", inputs()["pixel_values"].numpy())
    return folder / "pixels.npy"


@pytest.mark.parametrize("names", ["a|a", "text|text"])
def test_names_are_different(names: str) -> None:
    with pytest.raises(SpecError, match="repeated or the names of stacks"):
        offramp.apply(captured(), f"split-modalities{{names={names}}}")


def test_a_group_without_tokens_waits_for_nobody() -> None:
    stack = Stack(
        "encoder", "encoder", 2, "x", "y", (), (Exit(1, (), "x", {}, {}), Exit(2, (), "y", {}, {})),
        (Group("image", "n//4"), Group("text", "n")), "places",
    )  # fmt: skip
    asked = GroupPolicy(offramp.Depth({"encoder.text": 1}), stack, 2, {"n": 3})
    assert asked.places().tolist() == [[0, 1, 2]] * 2
    assert asked.leave(1, np.arange(2), {}).all()
    assert asked.exits(np.array([1, 1]))["encoder.image"].tolist() == [1, 1]


def test_padding_alone_leaves_at_once(tmp_path: Path) -> None:
    """A row without text does not hold the others' blocks up."""
    program = offramp.apply(captured(), f"split-modalities,{EXITS}")
    offramp.save(program, tmp_path / "m.offramp")
    arrays = {name: value.numpy().copy() for name, value in inputs().items()}
    arrays["attention_mask"][1] = 0
    result = offramp.load(tmp_path / "m.offramp").run(arrays, offramp.Confidence(0.9999, measure="cosine"))
    assert result.exits["encoder.text"][1] == 1
    assert result.exits["encoder.text"][0] > 1


class TwoEncoders(torch.nn.Module):
    """The second encoder reads what the first has made, and words of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = joined(decodes=False), joined(decodes=False, blocks=2)

    def forward(self, pixel_values: Tensor, input_ids: Tensor, other_ids: Tensor) -> Tensor:
        one = self.first
        x = torch.cat([one.patch(pixel_values).flatten(2).transpose(1, 2), one.words(input_ids)], 1)
        for block in one.encoder:
            x = block(x, None)
        x = torch.cat([one.norm(x), self.second.words(other_ids)], 1)
        for block in self.second.encoder:
            x = block(x, None)
        return self.second.head(x[:, 0])


@pytest.mark.slow
def test_groups_of_several_stacks(tmp_path: Path) -> None:
    given_ = {name: inputs()[name] for name in ("pixel_values", "input_ids")}
    program = offramp.capture(TwoEncoders().eval(), {**given_, "other_ids": torch.randint(1, 9, (3, 4))})
    first, second = program.stacks
    pipeline = ",".join(
        f"split-modalities{{stack={name}}},insert-exits{{stack={name}}},insert-scores{{stack={name},measure=cosine}}"
        for name in (second, first)  # whatever the order
    )
    assert offramp.save(offramp.apply(program, pipeline), tmp_path / "m.offramp")["groups"] < 1e-5


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"tokens": "x["}, "stacks.encoder.groups.image: 'x[' is not an expression"),
        ({"tokens": -2}, "stacks.encoder.groups.image: -2 tokens"),
        ({"name": "text"}, "'encoder.text' is the name of several things that leave"),
    ],
)
def test_a_manifest_that_is_wrong_is_refused(plain: Case, changes: dict[str, Any], said: str) -> None:
    data = json.loads(to_json(plain.chain.manifest))
    data["stacks"]["encoder"]["groups"][0] |= changes
    with pytest.raises(BundleError, match=re.escape(said)):
        from_json(json.dumps(data))
    del data["stacks"]["encoder"]["groups"]
    with pytest.raises(BundleError, match="has groups or places, and not both"):
        from_json(json.dumps(data))
