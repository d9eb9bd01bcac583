"""Prompts that are more than text: features of images among their tokens, tokens that see later ones."""

# mypy: disable-error-code="no-any-return, override"
from __future__ import annotations

import json
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
from offramp import cli
from offramp.check import check
from offramp.errors import ExecutionError, InputError, PassError, SpecError
from offramp.passes.caches.chunks import check_chunks
from offramp.program import ops
from offramp.program.graph import expression, placeholders, shape
from offramp.runtime.card import CARD_FILE

IMAGE, FEATURES, PATCHES, TOKENS = tiny.WORDS - 1, 5, 3, 12
Join = Callable[["Reader", Tensor, Tensor], Tensor]


class Reader(tiny.Decoder):
    """A causal decoder of two blocks that finds the features of an image among its tokens; ``join`` puts them there."""

    def __init__(self, join: Join) -> None:
        super().__init__()
        self.blocks, self.join, self.head = self.blocks[:2], join, nn.Linear(tiny.WIDTH, tiny.WORDS)
        self.look = nn.Linear(FEATURES, tiny.WIDTH)

    def forward(self, image: Tensor, input_ids: Tensor) -> dict[str, Tensor]:
        x = self.join(self, self.look(image), input_ids)
        for block in self.blocks:
            x = block(x, None)
        return {"logits": self.head(self.leave(x))}


def scattered(model: Reader, image: Tensor, ids: Tensor) -> Tensor:
    x = model.embed(ids)
    return x.masked_scatter((ids == IMAGE)[..., None].expand_as(x), image)


def scattered_flat(model: Reader, image: Tensor, ids: Tensor) -> Tensor:
    return model.embed(ids).masked_scatter((ids == IMAGE)[..., None], image.flatten(0, 1))


def indexed(model: Reader, image: Tensor, ids: Tensor) -> Tensor:
    x = model.embed(ids)
    x[ids == IMAGE] = image.flatten(0, 1)
    return x


def listed(model: Reader, image: Tensor, ids: Tensor) -> Tensor:
    return model.embed(ids).masked_scatter((ids == IMAGE)[..., None], torch.cat(list(image)))


def in_place(model: Reader, image: Tensor, ids: Tensor) -> Tensor:
    x = model.embed(ids).clone()
    x[:, 1 : 1 + PATCHES] = image
    return x


def added(model: Reader, image: Tensor, ids: Tensor) -> Tensor:
    x = model.embed(ids)
    x[ids == IMAGE] = image.flatten(0, 1) + x[ids == IMAGE]
    return x


class Deeper(Reader):
    """Features are added behind the first block too, as DeepStack does (arXiv 2406.04334)."""

    def forward(self, image: Tensor, input_ids: Tensor) -> dict[str, Tensor]:
        marked, features = input_ids == IMAGE, self.look(image)
        x = self.join(self, features, input_ids)
        for block in self.blocks:
            x = block(x, None).clone()
            x[marked, :] = x[marked, :] + features.flatten(0, 1)
        return {"logits": self.head(self.leave(x))}


JOINS = [scattered, scattered_flat, indexed, listed, in_place, added]
FEW = (scattered, indexed, added)


def example(tokens: int = TOKENS, rows: int = 2) -> dict[str, Tensor]:
    ids = torch.randint(3, IMAGE, (rows, tokens), generator=torch.Generator().manual_seed(0))
    ids[:, 1 : 1 + PATCHES] = IMAGE
    return {"image": torch.randn(rows, PATCHES, FEATURES, generator=torch.Generator().manual_seed(1)), "input_ids": ids}


def captured(join: Join) -> tuple[Reader, offramp.Program]:
    torch.manual_seed(0)
    model = Reader(join).eval()
    return model, offramp.capture(model, example())


@pytest.fixture(scope="module", params=slow_but(FEW, JOINS), ids=[join.__name__ for join in JOINS])
def made(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Reader, offramp.Chain]:
    model, program = captured(request.param)
    path = tmp_path_factory.mktemp("readers") / "reader.offramp"
    offramp.save(offramp.apply(program, "insert-exits,insert-scores{measure=top1},insert-cache"), path)
    return model, offramp.load(path)


def greedy(model: nn.Module, inputs: dict[str, Tensor], new: int) -> list[int]:
    ids = inputs["input_ids"]
    for _ in range(new):
        with torch.no_grad():
            found = model(**{**inputs, "input_ids": ids})["logits"][:, -1].argmax(-1)
        ids = torch.cat([ids, found[:, None]], 1)
    return ids[0, -new:].tolist()


def test_rows_of_different_prompts_and_images_get_what_they_get_alone(made: tuple[Reader, offramp.Chain]) -> None:
    model, chain = made
    inputs = example()
    rows = [inputs["input_ids"][0, :7], inputs["input_ids"][1]]
    given = {"image": inputs["image"].numpy(), "input_ids": [row.numpy() for row in rows]}
    found = chain.generate(given, offramp.Never(), max_new_tokens=6)
    for at, row in enumerate(rows):
        alone = {"image": inputs["image"][at : at + 1], "input_ids": row[None]}
        if IMAGE not in found.tokens[at]:  # one that is generated is text, as in transformers
            assert found.tokens[at].tolist() == greedy(model, alone, 6)
    checked = chain.generate(given, offramp.Verify(1, 0.05), max_new_tokens=6)
    for one, other in zip(found.tokens, checked.tokens, strict=True):
        np.testing.assert_array_equal(one, other)


@pytest.mark.parametrize("join", [scattered, in_place], ids=["scattered", "in_place"])
def test_a_model_of_one_row_is_exported(join: Join, tmp_path: Path) -> None:
    class One(Reader):
        def forward(self, image: Tensor, input_ids: Tensor) -> dict[str, Tensor]:
            return super().forward(image.reshape(1, PATCHES, FEATURES), input_ids.reshape(1, -1))

    torch.manual_seed(0)
    program = offramp.capture(One(join).eval(), example(rows=1))
    assert program.axes.batch is None
    assert offramp.save(program, tmp_path / "m.offramp")["chain"] < 1e-5


def test_features_may_be_added_behind_blocks(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model, inputs = Deeper(scattered).eval(), example()
    program = offramp.apply(offramp.capture(model, inputs), "insert-exits{after=1},insert-cache")
    assert program.stacks["decoder"].blocks == 2
    offramp.save(program, tmp_path / "m.offramp")
    given = {name: value.numpy() for name, value in inputs.items()}
    found = offramp.load(tmp_path / "m.offramp").generate(given, offramp.Never(), max_new_tokens=5)
    for at, tokens in enumerate(found.tokens):
        alone = {name: value[at : at + 1] for name, value in inputs.items()}
        assert tokens.tolist() == greedy(model, alone, 5)


def test_one_pass_of_the_bundle_is_the_model(made: tuple[Reader, offramp.Chain]) -> None:
    model, chain = made
    inputs = example(TOKENS + 3)
    found = chain.run({name: value.numpy() for name, value in inputs.items()}, offramp.Never()).outputs["logits"]
    with torch.no_grad():
        torch.testing.assert_close(torch.from_numpy(found), model(**inputs)["logits"], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("join", slow_but(FEW, JOINS), ids=[join.__name__ for join in JOINS])
def test_any_chunks_are_one_pass(join: Join) -> None:
    _, program = captured(join)
    cached = offramp.apply(program, "insert-cache")
    assert check_chunks(program, cached) < 1e-5
    assert cached.cache is not None
    assert cached.cache.least == 1 + PATCHES
    assert cached.cache.prompt is not None
    assert not cached.cache.prompt.whole


def test_a_row_says_where_the_features_go(tmp_path: Path) -> None:
    _, program = captured(scattered)
    offramp.save(offramp.apply(program, "insert-cache"), tmp_path / "reader.offramp")
    chain = offramp.load(tmp_path / "reader.offramp")
    (kept,) = chain.manifest.placeholders
    assert (kept.input, kept.token) == ("input_ids", IMAGE)
    image = example()["image"].numpy()
    for ids in ([[3, 4], [IMAGE] * 4], [[3, *[IMAGE] * 2, 4]] * 2):
        with pytest.raises(InputError, match=rf"row 0 of 'input_ids' has the id {IMAGE} [02] times"):
            chain.generate({"image": image, "input_ids": ids}, max_new_tokens=2)
    with pytest.raises(InputError, match="keeps a place for each of 3"):
        chain.run({"image": image, "input_ids": np.full((2, 5), 4)})


def test_a_text_says_once_where_the_image_goes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tokenizers = pytest.importorskip("tokenizers")
    words = {**{f"w{i}": i for i in range(IMAGE)}, "<image>": IMAGE}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="w0"))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    _, program = captured(scattered)
    root = tmp_path / "reader.offramp"
    offramp.save(offramp.apply(program, "insert-cache"), root, files=[tmp_path / "tokenizer.json"])
    image = example()["image"][:1].numpy()
    np.save(tmp_path / "x.npy", image)
    given = ["run", str(root), "--input", f"image={tmp_path / 'x.npy'}", "--max-new-tokens", "4"]
    prompt = {"image": image, "input_ids": [[3, *[IMAGE] * PATCHES, 5]]}
    wanted = tokenizer.decode(offramp.load(root).generate(prompt, max_new_tokens=4).tokens[0].tolist())
    for text in ("w3 <image> w5", f"w3 {'<image> ' * PATCHES}w5"):
        assert cli.main([*given, "--text", text]) == 0
        assert capsys.readouterr().out.split() == wanted.split()
    for text, count in (("w3 w5", 0), ("w3 <image> <image> w5", 2)):
        assert cli.main([*given, "--text", text]) == 1
        said = capsys.readouterr().err
        assert f"the text has '<image>' {count} times; it stands there once, or once for each of 3 features" in said
        assert '--text "<image> ..."' in said


@pytest.mark.parametrize("token", [-200, 500])
def test_the_id_of_a_place_may_be_no_rows_of_the_table(token: int, tmp_path: Path) -> None:
    """Where the model masks it; other ids that nobody knows are refused."""

    def masked(model: Reader, image: Tensor, ids: Tensor) -> Tensor:
        places = ids == token
        return model.embed(ids.masked_fill(places, 0)).masked_scatter(places[..., None], image)

    inputs = example()
    inputs["input_ids"][inputs["input_ids"] == IMAGE] = token
    torch.manual_seed(0)
    model = Reader(masked).eval()
    offramp.save(offramp.apply(offramp.capture(model, inputs), "insert-cache"), tmp_path / "m.offramp")
    chain = offramp.load(tmp_path / "m.offramp")
    one = {name: value[:1] for name, value in inputs.items()}
    given = {name: value.numpy() for name, value in one.items()}
    assert chain.generate(given, max_new_tokens=4).tokens[0].tolist() == greedy(model, one, 4)
    given["input_ids"][0, -1] = 499
    with pytest.raises(InputError, match=r"'input_ids' has the ids \[499\]; they go from 0 to"):
        chain.generate(given, max_new_tokens=4)


def test_other_counts_are_an_error_of_onnx_runtime_too(tmp_path: Path) -> None:
    _, program = captured(scattered)
    offramp.save(offramp.apply(program, "insert-exits"), tmp_path / "reader.offramp")
    file = tmp_path / "reader.offramp" / "manifest.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"placeholders": []}))
    chain = offramp.load(tmp_path / "reader.offramp")
    for count in (PATCHES - 1, PATCHES + 1):
        with pytest.raises(ExecutionError, match="out of data bounds"):
            chain.run({"image": example()["image"].numpy(), "input_ids": np.array([[IMAGE] * count + [4] * 5] * 2)})


def test_rows_are_computed_apart() -> None:
    _, program = captured(scattered_flat)
    assert program.axes.batch is not None
    assert not [node for node in program.graph.nodes if "masked_scatter" in str(node.target)]


EVERYWHERE: dict[str, Callable[[Tensor, Tensor, Tensor], Any]] = {
    "a number": lambda x, places, row: x.__setitem__(~places, 0.0),
    "a number more": lambda x, places, row: x.__setitem__(places, x[places] + 1.0),
    "a tensor of one number": lambda x, places, row: x.__setitem__(places, row.sum()),
    "a row": lambda x, places, row: x.__setitem__(places, row),
    "a list of one row": lambda x, places, row: x.__setitem__(places, row[None]),
    "a row more": lambda x, places, row: x.__setitem__(places, x[places] + row),
    "another kind of row": lambda x, places, row: x.__setitem__(places, x[places] * row),
}


@pytest.mark.parametrize("rows", [1, 2])
@pytest.mark.parametrize("put", EVERYWHERE)
def test_what_is_the_same_in_all_places_is_put_in_any_number_of_them(put: str, rows: int) -> None:
    class Marked(tiny.Encoder):
        def forward(self, input_ids: Tensor) -> Tensor:
            x = self.embed(input_ids).clone()
            EVERYWHERE[put](x, input_ids == IMAGE, self.places.weight[0])
            return self.leave(x)

    model, ids = tiny.seeded(Marked), example(rows=rows)["input_ids"]
    program = offramp.capture(model, {"input_ids": ids}, None if rows > 1 else {"input_ids": {1: "tokens"}})
    (name,) = program.outputs
    more = torch.tensor([[3, IMAGE, 4, IMAGE, 5], [IMAGE] * 5, [5, 4, 3, 6, IMAGE]])
    for marked in (ids, *(more[:, None] if rows == 1 else [more])):
        torch.testing.assert_close(program.module(input_ids=marked)[name], model(marked))


def test_an_example_ends_with_text() -> None:
    torch.manual_seed(0)
    inputs = example()
    inputs["input_ids"] = inputs["input_ids"].flip(1)[:, : TOKENS - 1]
    program = offramp.capture(Reader(scattered).eval(), inputs)
    with pytest.raises(PassError, match="the example ends with what is no text"):
        offramp.apply(program, "insert-cache")


# the operator


@given(rows=st.integers(1, 3), count=st.integers(1, 4), more=st.integers(0, 4), data=st.data())
@settings(max_examples=30, deadline=None)
def test_places_are_filled_in_order(rows: int, count: int, more: int, data: Any) -> None:
    tokens, features = torch.randn(rows, count + more, 2), torch.randn(rows, count, 2)
    order = [data.draw(st.permutations(range(count + more))) for _ in range(rows)]
    places = torch.tensor(order) < count
    found = ops.fill_places(tokens, places, features)
    torch.testing.assert_close(found, tokens.masked_scatter(places[..., None], features))


@pytest.mark.parametrize("marked", [1, 3])
def test_another_number_of_places_is_an_error(marked: int) -> None:
    places = torch.arange(4)[None] < marked
    with pytest.raises(IndexError):
        ops.fill_places(torch.zeros(1, 4, 2), places, torch.ones(1, 2, 2))


def test_gradients_reach_tokens_and_rows() -> None:
    tokens, rows = torch.randn(2, 4, 2, dtype=torch.float64), torch.randn(2, 2, 2, dtype=torch.float64)
    places = torch.tensor([[True, False, True, False], [False, False, True, True]])
    for value in (tokens, rows):
        value.requires_grad_()
    assert torch.autograd.gradcheck(lambda a, b: torch.ops.offramp.fill_places(a, places, b), (tokens, rows))


# capture


class Rows(nn.Module):
    """What a model does with the rows of a batch, one by one."""

    def __init__(self, each: Callable[[Tensor], Any]) -> None:
        super().__init__()
        self.inner, self.each = tiny.Encoder(), each

    def forward(self, input_ids: Tensor) -> Any:
        x = self.inner.embed(input_ids)
        for block in self.inner.blocks:
            x = block(x, None)
        return self.each(x)


@pytest.mark.parametrize(
    "make", [list, tuple, lambda x: [*x], lambda x: x.unbind(0)], ids=["list", "tuple", "star", "unbind"]
)
def test_a_batch_that_is_listed_and_joined_stays_of_any_size(make: Any) -> None:
    model = Rows(lambda x: torch.cat(make(x))).eval()
    program = offramp.capture(model, torch.randint(0, 9, (3, 7)))
    ids = torch.randint(0, 9, (5, 4))
    with torch.no_grad():
        torch.testing.assert_close(program.module(input_ids=ids)["output"], model(ids))


@pytest.mark.parametrize(
    "each",
    [
        lambda x: torch.cat([row * 2 for row in x]),
        lambda x: torch.cat(list(x)[::-1]),
        lambda x: torch.stack(list(x)),
        lambda x: torch.cat([*x, *x]),
    ],
    ids=["changed", "reversed", "stacked", "twice"],
)
def test_rows_that_are_used_alone_fix_their_number(each: Any) -> None:
    model, ids = Rows(each).eval(), torch.randint(0, 9, (3, 7))
    program = offramp.capture(model, ids)
    assert expression(shape(placeholders(program.graph)["input_ids"])[0]) == 3
    with torch.no_grad():
        torch.testing.assert_close(program.module(input_ids=ids)["output"], model(ids))


def test_rows_that_are_returned_are_left_out() -> None:
    program = offramp.capture(
        Rows(lambda x: {"all": torch.cat(rows := list(x)), "each": rows}).eval(), torch.ones(3, 7, dtype=torch.int64)
    )
    assert program.outputs == ("all",)


def test_an_index_over_tokens_tells_that_an_input_has_as_many() -> None:
    class Indexed(tiny.Decoder):
        def forward(self, input_ids: Tensor, groups: Tensor) -> Tensor:
            at = torch.arange(input_ids.shape[1])
            x = self.embed(input_ids) * groups[:, at][..., None]
            for block in self.blocks:
                x = block(x, None)
            return self.leave(x)

    given = {"input_ids": torch.randint(0, 9, (2, 7)), "groups": torch.randint(1, 9, (2, 7))}
    program = offramp.capture(Indexed().eval(), given)
    nodes = placeholders(program.graph)
    assert expression(shape(nodes["input_ids"])[1]) == expression(shape(nodes["groups"])[1])
    assert len(program.axes.names) == 2


# tokens that see later ones


class Prefix(Reader):
    """Tokens of group 1 see each other."""

    def __init__(self, join: Join) -> None:
        super().__init__(join)
        self.blocks = nn.ModuleList(tiny.Block() for _ in range(2))

    def forward(self, image: Tensor, input_ids: Tensor, groups: Tensor) -> dict[str, Tensor]:
        x = self.join(self, self.look(image), input_ids)
        places = torch.arange(x.shape[1])
        seen = (places[:, None] >= places) | ((groups[:, :, None] == 1) & (groups[:, None] == 1))
        for block in self.blocks:
            x = block(x, seen[:, None])
        return {"logits": self.head(self.leave(x))}


def prefixed(first: int = 6) -> tuple[Prefix, dict[str, Tensor]]:
    torch.manual_seed(0)
    inputs = example()
    groups = torch.zeros_like(inputs["input_ids"])
    groups[:, :first] = 1
    return Prefix(scattered).eval(), {**inputs, "groups": groups}


def test_a_prefix_that_sees_itself_is_together() -> None:
    model, inputs = prefixed()
    program = offramp.capture(model, inputs)
    assert [stack.role for stack in program.stacks.values()] == ["decoder"]
    cached = offramp.apply(program, "insert-cache")
    assert cached.cache is not None
    assert cached.cache.tokens == ("input_ids",)
    assert cached.cache.prompt is not None
    assert cached.cache.prompt.whole
    assert cached.cache.prompt.given == {"groups": 0}
    assert check_chunks(program, cached) < 1e-5


@pytest.mark.slow
def test_a_prefix_generates_as_the_model_does(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, inputs = prefixed()
    program = offramp.apply(offramp.capture(model, inputs), "insert-exits,insert-scores{measure=top1},insert-cache")
    offramp.save(program, tmp_path / "prefix.offramp")
    chain = offramp.load(tmp_path / "prefix.offramp")
    sizes = [8, TOKENS]
    rows = {name: [inputs[name][at, :n].numpy() for at, n in enumerate(sizes)] for name in ("input_ids", "groups")}
    found = chain.generate({"image": inputs["image"].numpy(), **rows}, offramp.Never(), max_new_tokens=5)
    for at, n in enumerate(sizes):
        ids, groups = inputs["input_ids"][at : at + 1, :n], inputs["groups"][at : at + 1, :n]
        for token in found.tokens[at].tolist():
            with torch.no_grad():
                logits = model(inputs["image"][at : at + 1], ids, groups)["logits"][0, -1]
            assert token == int(logits.argmax())
            ids = torch.cat([ids, torch.tensor([[token]])], 1)
            groups = torch.cat([groups, torch.zeros(1, 1, dtype=torch.int64)], 1)
    (code,) = re.findall(r"```python\n(.*?)```", (tmp_path / "prefix.offramp" / CARD_FILE).read_text(), re.DOTALL)
    monkeypatch.chdir(tmp_path)
    exec(compile(code, CARD_FILE, "exec"), {"__name__": "card"})
    with pytest.raises(InputError, match="'groups' is missing"):
        chain.generate({"image": inputs["image"].numpy(), "input_ids": rows["input_ids"]})
    with pytest.raises(InputError, match="'groups' has rows of"):
        chain.generate({"image": inputs["image"].numpy(), **rows, "groups": [[1], [1]]})


def test_an_encoder_stays_one() -> None:
    program = offramp.capture(Rows(lambda x: x).eval(), torch.randint(0, 9, (2, 7)))
    assert {stack.role for stack in program.stacks.values()} == {"encoder"}


# models of transformers


_VISION = {
    "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
    "image_size": 16, "patch_size": 8,
}  # fmt: skip
_TEXT: dict[str, Any] = {
    "vocab_size": 100, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 128, "bos_token_id": 1, "eos_token_id": None,
    "pad_token_id": 0,
}  # fmt: skip
_PLACE = 99


def _llava() -> nn.Module:
    vision = transformers.CLIPVisionConfig(**{**_VISION, "num_hidden_layers": 3}, projection_dim=32)
    config = transformers.LlavaConfig(
        vision_config=vision, text_config=transformers.LlamaConfig(**_TEXT), image_token_index=_PLACE
    )
    return transformers.LlavaForConditionalGeneration(config)


def _paligemma() -> nn.Module:
    vision = transformers.SiglipVisionConfig(**_VISION, vision_use_head=False)
    config = transformers.PaliGemmaConfig(
        vision_config=vision, text_config=transformers.GemmaConfig(**_TEXT, head_dim=8), image_token_index=_PLACE,
        vocab_size=100, projection_dim=32, hidden_size=32,
    )  # fmt: skip
    return transformers.PaliGemmaForConditionalGeneration(config)


def _gemma3() -> nn.Module:
    vision = transformers.SiglipVisionConfig(**_VISION, vision_use_head=False)
    text = transformers.Gemma3TextConfig(**_TEXT, head_dim=8, sliding_window=6)
    config = transformers.Gemma3Config(
        vision_config=vision, text_config=text, image_token_index=_PLACE, mm_tokens_per_image=4,
        boi_token_index=97, eoi_token_index=98,
    )  # fmt: skip
    return transformers.Gemma3ForConditionalGeneration(config)


def _blip2() -> nn.Module:
    former = {**{k: v for k, v in _VISION.items() if "size" in k[:11] or "num" in k}, "vocab_size": 100}
    former = {k: v for k, v in former.items() if k not in ("image_size", "patch_size")} | {"encoder_hidden_size": 32}
    text = transformers.OPTConfig(
        vocab_size=100, hidden_size=32, ffn_dim=64, num_hidden_layers=2, num_attention_heads=4,
        max_position_embeddings=128, word_embed_proj_dim=32, eos_token_id=None,
    )  # fmt: skip
    config = transformers.Blip2Config(
        vision_config=_VISION, qformer_config=former, text_config=text, num_query_tokens=4, image_token_index=_PLACE
    )
    return transformers.Blip2ForConditionalGeneration(config)


def _internvl() -> nn.Module:
    vision = {**_VISION, "image_size": [16, 16], "patch_size": [4, 4]}
    config = transformers.InternVLConfig(
        vision_config=vision, text_config=transformers.Qwen2Config(**_TEXT), image_token_id=_PLACE, downsample_ratio=0.5
    )
    return transformers.InternVLForConditionalGeneration(config)


@pytest.mark.parametrize(
    "make",
    slow_but([_llava], [_llava, _paligemma, _gemma3, _blip2, _internvl]),
)
def test_tokens_are_those_of_transformers(make: Callable[[], Any], tmp_path: Path) -> None:
    """Greedy, of prompts of different lengths with an image each."""
    torch.manual_seed(0)
    model = make().eval()
    with torch.no_grad():
        for weight in model.parameters():
            if weight.dim() > 1:
                weight.mul_(3.0)
    ids = torch.randint(5, 95, (2, 17))
    ids[:, 1:5] = _PLACE
    inputs = {"input_ids": ids, "pixel_values": torch.randn(2, 3, 16, 16)}
    types = {_paligemma: (torch.arange(17) >= 9), _gemma3: ids == _PLACE}.get(make)
    if types is not None:
        inputs["token_type_ids"] = types.expand(2, -1).long()
    program = offramp.capture(model, inputs)
    offramp.save(offramp.apply(program, "insert-exits{stack=decoder},insert-cache"), tmp_path / "model.offramp")
    chain = offramp.load(tmp_path / "model.offramp")

    sizes = [9, 17]
    rows = {name: [inputs[name][at, :n] for at, n in enumerate(sizes)] for name in inputs if name != "pixel_values"}
    if make is _paligemma:  # the whole prompt sees itself
        rows["token_type_ids"] = [torch.zeros_like(row) for row in rows["token_type_ids"]]
    given = {name: [row.numpy() for row in value] for name, value in rows.items()}
    found = chain.generate({**given, "pixel_values": inputs["pixel_values"].numpy()}, offramp.Never(), max_new_tokens=8)
    for at in range(2):
        alone = {name: value[at][None] for name, value in rows.items()}
        with torch.no_grad():
            wanted = model.generate(
                **alone, pixel_values=inputs["pixel_values"][at : at + 1], max_new_tokens=8, do_sample=False
            )
        assert found.tokens[at].tolist() == wanted[0, -8:].tolist()


@pytest.mark.slow
def test_a_model_that_drops_images_of_padding_has_none(tmp_path: Path) -> None:
    torch.manual_seed(0)
    vision = {**_VISION, "patch_size": 4}
    config = transformers.SmolVLMConfig(
        vision_config=vision, text_config=transformers.LlamaConfig(**_TEXT), image_token_id=_PLACE, scale_factor=2
    )
    model = transformers.SmolVLMForConditionalGeneration(config).eval()
    ids = torch.randint(5, 95, (1, 17))
    ids[:, 1:9] = _PLACE
    inputs = {"input_ids": ids, "pixel_values": torch.randn(1, 2, 3, 16, 16)}
    program = offramp.capture(model, inputs)
    offramp.save(offramp.apply(program, "insert-exits{stack=decoder},insert-cache"), tmp_path / "model.offramp")
    chain = offramp.load(tmp_path / "model.offramp")
    given = {name: value.numpy() for name, value in inputs.items()}
    found = chain.generate(given, offramp.Never(), max_new_tokens=8).tokens[0]
    with torch.no_grad():
        wanted = model.generate(**inputs, max_new_tokens=8, do_sample=False)[0]
    assert found.tolist() == wanted[-8:].tolist()


def _florence() -> tuple[nn.Module, dict[str, Tensor]]:
    """Its image's features take places of the encoder's text; the decoder's tokens are its own."""
    text = transformers.BartConfig(
        vocab_size=99, d_model=32, encoder_layers=3, decoder_layers=3, encoder_attention_heads=4,
        decoder_attention_heads=4, encoder_ffn_dim=64, decoder_ffn_dim=64, max_position_embeddings=64, use_cache=False,
    )  # fmt: skip
    vision = {
        "embed_dim": [8, 8, 16, 16], "depths": [1, 1, 1, 1], "num_heads": [2, 2, 2, 2], "num_groups": [2, 2, 2, 2],
        "window_size": 4, "projection_dim": 32, "max_position_embeddings": 10,
    }  # fmt: skip
    config = transformers.Florence2Config(text_config=text.to_dict(), vision_config=vision, image_token_id=98)
    torch.manual_seed(0)
    ids = torch.randint(3, 90, (2, 10))
    ids[:, :5] = 98
    inputs = {"input_ids": ids, "pixel_values": torch.randn(2, 3, 64, 64), "decoder_input_ids": ids[:, 5:]}
    return transformers.Florence2ForConditionalGeneration(config).eval(), inputs


@pytest.mark.slow
def test_florence_has_exits_and_caches_and_no_groups() -> None:
    model, inputs = _florence()
    report = check(model, inputs)
    assert report.ok, report.reason
    assert {stack.name for stack in report.stacks if stack.cached} == {"decoder"}
    program = offramp.capture(model, inputs)
    encoder = next(
        name for name, stack in program.stacks.items() if stack.path == "model.language_model.encoder.layers"
    )
    with pytest.raises(SpecError, match=f"no tokens of several inputs are joined before stack '{encoder}'"):
        offramp.apply(program, f"split-modalities{{stack={encoder}}}")
