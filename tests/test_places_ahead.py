"""Features that a model joins before its text: the ids get places in front, which nobody who runs a bundle sees."""

# mypy: disable-error-code="no-any-return, override"
from __future__ import annotations

import json
import logging
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import torch
import transformers
from breadth import slow_but
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import offramp
from offramp.bundle.json_text import from_json, to_json
from offramp.check import check
from offramp.errors import BundleError, InputError, PassError
from offramp.passes.caches.ahead import with_places_ahead
from offramp.program import Program
from offramp.runtime import Chain

FEATURES, PATCHES, TOKENS = 5, 3, 9


class Joined(nn.Module):
    """Features before embedded ids, which have positions of their own; ``sees`` says which keys a query sees."""

    def __init__(self, *, prefix: bool = False, cut: bool = False, parts: bool = False) -> None:
        super().__init__()
        self.look, self.embed = nn.Linear(FEATURES, tiny.WIDTH), nn.Embedding(tiny.WORDS, tiny.WIDTH)
        self.places, self.norm = nn.Embedding(64, tiny.WIDTH), nn.LayerNorm(tiny.WIDTH)
        self.first = nn.Parameter(torch.randn(1, 1, tiny.WIDTH))
        self.blocks, self.head = nn.ModuleList(tiny.Block() for _ in range(3)), nn.Linear(tiny.WIDTH, tiny.WORDS)
        self.prefix, self.cut, self.parts = prefix, cut, parts

    def forward(self, image: Tensor, input_ids: Tensor) -> dict[str, Tensor]:
        text = self.norm(self.embed(input_ids) + self.places(torch.arange(input_ids.shape[1])))
        image = self.look(image)
        parts = [self.first.expand(image.shape[0], -1, -1), image] if self.parts else [image]
        x = torch.cat([*parts, text], 1)
        at, ahead = torch.arange(x.shape[1]), x.shape[1] - input_ids.shape[1]
        seen = (at <= at[:, None]) | ((at < ahead) & self.prefix)
        for block in self.blocks:
            x = block(x, seen)
        return {"logits": self.head(x[:, ahead:] if self.cut else x)}


class OneJoined(Joined):
    """Takes one row alone."""

    def forward(self, image: Tensor, input_ids: Tensor) -> dict[str, Tensor]:
        row = torch.zeros(1, 1, dtype=torch.int64).reshape(input_ids.shape[0], 1)
        return super().forward(image.reshape(1, PATCHES, FEATURES), input_ids + row)


class Tuned(nn.Module):
    """Learned tokens before the text, which the logits leave out (prompt tuning)."""

    def __init__(self) -> None:
        super().__init__()
        self.prefix, self.embed = nn.Parameter(torch.randn(3, tiny.WIDTH)), nn.Embedding(tiny.WORDS, tiny.WIDTH)
        self.blocks = nn.ModuleList(tiny.Block(causal=True) for _ in range(2))
        self.head = nn.Linear(tiny.WIDTH, tiny.WORDS)

    def forward(self, input_ids: Tensor) -> dict[str, Tensor]:
        x = torch.cat([self.prefix.expand(input_ids.shape[0], -1, -1), self.embed(input_ids)], 1)
        for block in self.blocks:
            x = block(x, None)
        return {"logits": self.head(x[:, 3:])}


KINDS: dict[str, dict[str, bool]] = {
    "causal": {},
    "a prefix that sees itself": {"prefix": True},
    "logits of the text alone": {"cut": True},
    "several parts": {"prefix": True, "cut": True, "parts": True},
}


def example(rows: int = 2, tokens: int = TOKENS, patches: int = PATCHES) -> dict[str, Tensor]:
    drawn = torch.Generator().manual_seed(0)
    image = torch.randn(rows, patches, FEATURES, generator=drawn)
    return {"image": image, "input_ids": torch.randint(1, tiny.WORDS, (rows, tokens), generator=drawn)}


def make(kind: str) -> Joined:
    torch.manual_seed(0)
    model = Joined(**KINDS[kind]).eval()
    with torch.no_grad():
        for weight in model.blocks.parameters():
            if weight.dim() > 1:
                weight.mul_(2.0)
    return model


def greedy(model: Callable[..., Any], inputs: dict[str, Tensor], name: str, count: int) -> list[int]:
    """The tokens of one row."""
    ids = inputs[name]
    for _ in range(count):
        with torch.no_grad():
            ids = torch.cat([ids, model(**{**inputs, name: ids})["logits"][:, -1:].argmax(-1)], 1)
    return ids[0, inputs[name].shape[1] :].tolist()


#: "several parts" has what the two between have.
MARKED = slow_but(["causal"], KINDS)


@pytest.fixture(scope="module", params=MARKED)
def case(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Joined, Program, Chain]:
    model = make(request.param)
    program = offramp.capture(model, example())
    path = tmp_path_factory.mktemp("bundle") / "model.offramp"
    cached = offramp.apply(program, "insert-exits,insert-scores{measure=top1},insert-cache")
    figures = offramp.save(cached, path)
    assert max(figures["cache"], figures["exits"], figures["other_shapes"]) < 1e-5
    return model, program, offramp.load(path)


@pytest.fixture(scope="module")
def longer(case: tuple[Joined, Program, Chain]) -> tuple[Joined, Program, tuple[str, ...]]:
    made, _, cut = with_places_ahead(case[1])
    return case[0], made, cut


@given(st.integers(1, 3), st.integers(2, 12), st.integers(2, 6))
@settings(max_examples=10, deadline=None)
def test_places_change_nothing(
    longer: tuple[Joined, Program, tuple[str, ...]], rows: int, tokens: int, patches: int
) -> None:
    model, made, cut = longer
    inputs = example(rows, tokens, patches)
    ahead = patches + model.parts
    ids = torch.cat([torch.full((rows, ahead), 2), inputs["input_ids"]], 1)
    found = made.module(**{**inputs, "input_ids": ids})["logits"]
    assert cut == (("logits",) if model.cut else ())
    torch.testing.assert_close(found[:, ahead:] if model.cut else found, model(**inputs)["logits"])


def test_what_needs_no_places_stays_as_it_is() -> None:
    program = offramp.capture(tiny.Talker(), {"input_ids": tiny.ids()})
    assert with_places_ahead(program) == (program, 0, ())


@pytest.mark.parametrize(("rows", "tokens", "patches"), [(2, 9, 3), (1, 2, 3), (3, 12, 5)])
def test_a_run_takes_and_gives_what_the_model_does(
    case: tuple[Joined, Program, Chain], rows: int, tokens: int, patches: int
) -> None:
    model, _, chain = case
    inputs = example(rows, tokens, patches)
    found = chain.run({name: value.numpy() for name, value in inputs.items()}).outputs["logits"]
    expected = model(**inputs)["logits"].detach().numpy()
    assert found.shape == expected.shape
    np.testing.assert_allclose(found, expected, atol=1e-4)


def test_generations_are_the_model_s(case: tuple[Joined, Program, Chain]) -> None:
    """Prompts of different lengths; step by step; back again; drafts that full depth checks; beams."""
    model, _, chain = case
    inputs, sizes = example(), [4, TOKENS]
    arrays: dict[str, Any] = {"image": inputs["image"].numpy()}
    arrays["input_ids"] = [inputs["input_ids"][at, :n].numpy() for at, n in enumerate(sizes)]
    one = [{name: value[at : at + 1] for name, value in inputs.items()} for at in range(2)]
    wanted = [
        greedy(model, {**row, "input_ids": row["input_ids"][:, :n]}, "input_ids", 6)
        for row, n in zip(one, sizes, strict=True)
    ]
    for policy in (offramp.Never(), offramp.Verify(1, 0.05)):
        found = chain.generate(arrays, policy, max_new_tokens=6)
        assert [row.tolist() for row in found.tokens] == wanted
    by_hand = chain.generator(arrays, offramp.Never(), max_new_tokens=6)
    assert [token.token for token in by_hand.next()] == [row[0] for row in wanted]
    assert by_hand.tokens(0).tolist() == [*arrays["input_ids"][0].tolist(), wanted[0][0]]
    by_hand.rewind(4)
    by_hand.append([[wanted[0][0]], [int(inputs["input_ids"][1, 4])]])
    assert by_hand.next()[0].token == wanted[0][1]
    best = chain.generate(arrays, offramp.Never(), max_new_tokens=4, beams=2)
    assert [len(row) for row in best.tokens] == [4, 4]


def test_tokens_of_a_prompt_beside_features_are_not_replaced(case: tuple[Joined, Program, Chain]) -> None:
    """Tables are made of the whole prompt: other ids at its places would not be read."""
    inputs = example()
    by_hand = case[2].generator({name: value.numpy() for name, value in inputs.items()}, max_new_tokens=6)
    first = by_hand.next()
    by_hand.rewind(TOKENS - 2)
    rest = inputs["input_ids"][:, TOKENS - 2 :].tolist()
    for wrong in ([[id_ + 1 for id_ in row] for row in rest], [[*row[:1], row[1] + 1, 3] for row in rest]):
        with pytest.raises(
            InputError, match=rf"row 0 has .* at token 7 of its prompt, .* had {re.escape(str(rest[0]))}"
        ):
            by_hand.append(wrong)
    by_hand.append([row[:1] for row in rest])
    by_hand.append([row[1:] for row in rest])
    assert [token.token for token in by_hand.next()] == [token.token for token in first]
    by_hand.rewind(TOKENS - 2)
    assert {token.token for token in by_hand.next()} != {row[0] for row in rest}  # the model says otherwise
    with pytest.raises(InputError, match=r"row \d has .* at token 7 of its prompt"):
        by_hand.next()


def test_one_row_at_a_time(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model, inputs = OneJoined().eval(), example(rows=1)
    program = offramp.capture(model, inputs)
    assert program.axes.batch is None
    cached = offramp.apply(program, "insert-exits{after=1},insert-scores{measure=prediction},insert-cache")
    assert offramp.save(cached, tmp_path / "m.offramp")["cache"] < 1e-5
    chain = offramp.load(tmp_path / "m.offramp")
    arrays = {name: value.numpy() for name, value in inputs.items()}
    for policy in (offramp.Never(), offramp.Verify(1, 0.05, measure="prediction")):
        found = chain.generate(arrays, policy, max_new_tokens=6).tokens[0].tolist()
        assert found == greedy(model, inputs, "input_ids", 6)


@pytest.mark.slow
def test_learned_tokens_stand_before_the_text(tmp_path: Path) -> None:
    model = tiny.seeded(Tuned)
    ids = example()["input_ids"]
    offramp.save(offramp.apply(offramp.capture(model, {"input_ids": ids}), "insert-cache"), tmp_path / "m.offramp")
    chain = offramp.load(tmp_path / "m.offramp")
    found = chain.run({"input_ids": ids.numpy()}).outputs["logits"]
    np.testing.assert_allclose(found, model(ids)["logits"].detach().numpy(), atol=1e-5)
    made = chain.generate({"input_ids": [ids[0, :4].numpy(), ids[1].numpy()]}, max_new_tokens=5)
    for at, n in enumerate((4, TOKENS)):
        assert made.tokens[at].tolist() == greedy(model, {"input_ids": ids[at : at + 1, :n]}, "input_ids", 5)


def test_a_prompt_of_one_token_calibrates(case: tuple[Joined, Program, Chain]) -> None:
    """With what stands in front of it, it goes to full depth."""
    examples = [{"image": example(1)["image"].numpy(), "input_ids": [[token]]} for token in range(1, 9)] * 10
    found = offramp.calibrate(case[2], examples, keep=0.9, max_new_tokens=3)
    assert found.record["examples"] == 80
    assert found.record["settings"]["of"] >= 0 if "settings" in found.record else found.record["reason"]


@pytest.mark.parametrize("static", [True, False])
@pytest.mark.slow
def test_the_room_for_text_is_known(static: bool, tmp_path: Path) -> None:
    """Positions of the text have a table of 64 rows; a text may fill it, and no more."""
    torch.manual_seed(0)
    model = make("causal")
    dims = {"image": {0: "batch"}, "input_ids": {0: "batch", 1: "tokens"}} if static else None
    program = offramp.capture(model, example(), dynamic=dims)
    offramp.save(offramp.apply(program, "insert-cache"), tmp_path / "m.offramp")
    chain = offramp.load(tmp_path / "m.offramp")
    arrays = {"image": example(1)["image"].numpy(), "input_ids": [[1] * 40]}
    room = 64 if static else 62  # where features vary in number, there may be as few as one
    assert len(chain.generate(arrays).tokens[0]) == room - 40 + 1  # the last one is read by nobody
    with pytest.raises(InputError, match=f"the prompt has 65 tokens; the model takes {room}"):
        chain.generate({**arrays, "input_ids": [[1] * 65]})
    with pytest.raises(InputError, match="every row needs at least one token"):
        chain.generate({**arrays, "input_ids": [[]]})


@pytest.mark.parametrize("room", [TOKENS, TOKENS + 1])
def test_an_example_leaves_room_for_fewer_features(room: int) -> None:
    """Three features take three places, and one may be all that a request has."""
    torch.manual_seed(0)
    model = Joined().eval()
    model.places = nn.Embedding(room, tiny.WIDTH)
    program = offramp.capture(model, example())
    hint = rf"for {room} tokens of text, .*\(9\) .* its 3 features are fewer\n.*at most {room - 2} tokens of text"
    with pytest.raises(PassError, match=hint):
        offramp.apply(program, "insert-cache")


@pytest.mark.parametrize(("room", "found"), [(TOKENS + 3, True), (TOKENS + 2, False)])
def test_several_tokens_at_once_are_tried_in_the_room_behind_prompt_and_places(
    room: int, found: bool, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    torch.manual_seed(0)
    model = Joined().eval()
    model.places = nn.Embedding(room, tiny.WIDTH)
    cached = offramp.apply(offramp.capture(model, example()), "insert-cache")
    offramp.save(cached, tmp_path / "m.offramp", segments=1)
    (stack,) = offramp.load(tmp_path / "m.offramp").manifest.stacks.values()
    warned = [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]
    said = "no file for several tokens at once: the example's prompt leaves room for one only"
    assert ([part.steps is not None for part in stack.parts], warned) == ([found], [] if found else [said])


@pytest.mark.slow
def test_more_places_than_text(tmp_path: Path) -> None:
    """Prompts are not filled up to what the places in front take already."""
    model = make("a prefix that sees itself")
    inputs = example(2, 4, 40)
    dims = {"image": {0: "batch"}, "input_ids": {0: "batch", 1: "tokens"}}
    program = offramp.capture(model, inputs, dynamic=dims)
    offramp.save(offramp.apply(program, "insert-cache"), tmp_path / "m.offramp")
    chain = offramp.load(tmp_path / "m.offramp")
    found = chain.generate({"image": inputs["image"].numpy(), "input_ids": [[3], [4, 5]]}, max_new_tokens=4)
    for at, prompt in enumerate(([3], [4, 5])):
        own = {"image": inputs["image"][at : at + 1], "input_ids": torch.tensor([prompt])}
        assert found.tokens[at].tolist() == greedy(model, own, "input_ids", 4)


def test_lists_are_inputs_as_ever(case: tuple[Joined, Program, Chain]) -> None:
    chain, inputs = case[2], example()
    arrays = {name: value.numpy() for name, value in inputs.items()}
    lists = {**arrays, "input_ids": inputs["input_ids"].tolist()}
    assert (chain.run(lists).outputs["logits"] == chain.run(arrays).outputs["logits"]).all()
    for wrong in ({"input_ids": [[1, 2], [3]]}, {"image": [[[1.0]], [1.0]]}):
        with pytest.raises(InputError):
            chain.run({**arrays, **wrong})
    with pytest.raises(InputError, match="'image' is missing"):
        chain.run({"input_ids": arrays["input_ids"]})


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"ahead": "nosuch"}, "cache.prompt.ahead: no such axes: nosuch"),
        ({"ahead": "a+"}, "cache.prompt.ahead: 'a+' is not an expression"),
        ({"ahead": -1}, "cache.prompt.ahead: -1 tokens"),
        ({"cut": ["nosuch"]}, "cache.prompt.cut: 'nosuch' is no output"),
    ],
)
def test_a_manifest_that_is_wrong_is_refused(
    case: tuple[Joined, Program, Chain], changes: dict[str, Any], said: str
) -> None:
    data = json.loads(to_json(case[2].manifest))
    data["cache"]["prompt"] |= changes
    with pytest.raises(BundleError, match=re.escape(said)):
        from_json(json.dumps(data))


@pytest.mark.slow
def test_parts_of_parts_are_one(tmp_path: Path) -> None:
    class Nested(Joined):
        def forward(self, image: Tensor, input_ids: Tensor) -> dict[str, Tensor]:
            x = torch.cat([self.first.expand(image.shape[0], -1, -1), self.embed(input_ids)], 1)
            x = torch.cat([self.look(image), x], 1)
            for block in self.blocks:
                at = torch.arange(x.shape[1])
                x = block(x, at <= at[:, None])
            return {"logits": self.head(x)}

    model = tiny.seeded(Nested)
    assert isinstance(model, Nested)
    program = offramp.apply(offramp.capture(model, example()), "insert-cache")
    offramp.save(program, tmp_path / "m.offramp")
    found = offramp.load(tmp_path / "m.offramp").run({name: value.numpy() for name, value in example().items()})
    np.testing.assert_allclose(found.outputs["logits"], model(**example())["logits"].detach().numpy(), atol=1e-4)


def test_a_mask_of_pairs_is_refused() -> None:
    class Masked(Joined):
        def forward(self, image: Tensor, input_ids: Tensor, mask: Tensor) -> dict[str, Tensor]:
            text = self.embed(input_ids) + mask.float().sum((1, 3))[..., None]
            x = torch.cat([self.look(image), text], 1)
            at = torch.arange(x.shape[1])
            for block in self.blocks:
                x = block(x, at <= at[:, None])
            return {"logits": self.head(x)}

    model = tiny.seeded(Masked)
    mask = torch.ones(2, 1, TOKENS, TOKENS, dtype=torch.bool)
    program = offramp.capture(model, {**example(), "mask": mask})
    with pytest.raises(PassError, match="input mask has "):
        offramp.apply(program, "insert-cache")


class Asked(Joined):
    """A question that is joined to queries, and looks at the image with them, says what is added to the text."""

    def __init__(self) -> None:
        super().__init__()
        self.queries = nn.Parameter(torch.randn(1, 4, tiny.WIDTH))
        self.asking = nn.ModuleList(tiny.Block(cross=True) for _ in range(2))

    def forward(self, image: Tensor, question: Tensor, input_ids: Tensor) -> dict[str, Tensor]:
        y = torch.cat([self.queries.expand(question.shape[0], -1, -1), self.embed(question)], 1)
        for block in self.asking:
            y = block(y, None, self.look(image))
        x = self.embed(input_ids) + y[:, :4].mean(1, keepdim=True)
        at = torch.arange(x.shape[1])
        for block in self.blocks:
            x = block(x, at <= at[:, None])
        return {"logits": self.head(x)}


def test_what_an_encoder_joins_stands_not_before_the_text() -> None:
    given = example()
    inputs = {"image": given["image"], "question": given["input_ids"][:, :6], "input_ids": given["input_ids"]}
    program = tiny.captured(Asked, inputs).program
    assert with_places_ahead(program) == (program, 0, ())
    assert offramp.apply(program, "insert-cache").cache is not None


class Folded(Joined):
    """Rows and tokens on one axis, before the features are joined to them."""

    def forward(self, image: Tensor, input_ids: Tensor) -> dict[str, Tensor]:
        rows, tokens = input_ids.shape
        text = self.norm(self.embed(input_ids).reshape(rows * tokens, -1)).reshape(rows, tokens, -1)
        x = torch.cat([self.look(image), text], 1)
        at = torch.arange(x.shape[1])
        for block in self.blocks:
            x = block(x, at <= at[:, None])
        return {"logits": self.head(x)}


def test_text_without_room_in_front_is_refused() -> None:
    program = tiny.captured(Folded, example()).program
    with pytest.raises(PassError, match=r"(?s)features stand before the text, .* try: leave insert-cache out"):
        offramp.apply(program, "insert-cache")


def test_a_prompt_is_text(case: tuple[Joined, Program, Chain]) -> None:
    chain = case[2]
    with pytest.raises(InputError, match="every row needs at least one token"):
        chain.generate({"image": example()["image"].numpy(), "input_ids": [[], [1]]})
    with pytest.raises(InputError, match=r"'input_ids' has the ids \[-1\]"):
        chain.generate({"image": example(1)["image"].numpy(), "input_ids": [[-1]]})


def _git() -> nn.Module:
    vision = {
        "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
        "image_size": 16, "patch_size": 8,
    }  # fmt: skip
    config = transformers.GitConfig(
        vision_config=vision, vocab_size=100, hidden_size=32, intermediate_size=64, num_hidden_layers=2,
        num_attention_heads=4, max_position_embeddings=24, bos_token_id=1, eos_token_id=None, pad_token_id=0,
    )  # fmt: skip
    torch.manual_seed(0)
    model = transformers.GitForCausalLM(config).eval()
    with torch.no_grad():
        for weight in model.parameters():
            if weight.dim() > 1:
                weight.mul_(3.0)
    return model


@pytest.mark.slow
def test_git_generates_as_in_transformers(tmp_path: Path) -> None:
    """Greedy, of prompts of different lengths with an image each; attention that is written out, with a mask given."""
    model: Any = _git()
    ids = torch.randint(5, 95, (2, 12), generator=torch.Generator().manual_seed(2))
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "pixel_values": torch.randn(2, 3, 16, 16)}
    report = check(model, inputs)
    assert report.ok, report.reason
    assert {stack.name: stack.cached for stack in report.stacks}["encoder"]
    program = offramp.apply(offramp.capture(model, inputs), "insert-exits{stack=encoder},insert-cache")
    offramp.save(program, tmp_path / "git.offramp")
    chain = offramp.load(tmp_path / "git.offramp")
    pixels, sizes = inputs["pixel_values"], [5, 12]
    arrays = {"pixel_values": pixels.numpy(), "input_ids": [ids[at, :n].numpy() for at, n in enumerate(sizes)]}
    found = chain.generate(arrays, offramp.Never(), max_new_tokens=8)
    for at, n in enumerate(sizes):
        own = {"pixel_values": pixels[at : at + 1], "input_ids": ids[at : at + 1, :n]}
        wanted = model.generate(**own, max_new_tokens=8, do_sample=False, use_cache=False)
        assert found.tokens[at].tolist() == wanted[0, n:].tolist()
    with pytest.raises(InputError, match="the prompt has 25 tokens; the model takes 24"):
        chain.generate({**arrays, "input_ids": [[5] * 25, [5]]})
