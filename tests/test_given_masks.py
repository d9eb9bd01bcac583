"""Masks and positions that are part of a bundle's graph, given all the same: as made, or as padding of prompts."""

# mypy: disable-error-code="no-any-return"
from __future__ import annotations

import copy
import json
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import tiny
import torch
import transformers
from torch import Tensor, nn

import offramp
from offramp.bundle.json_text import from_json, to_json
from offramp.calibration.examples import read
from offramp.errors import BundleError, InputError
from offramp.passes import apply

WORDS, PAD = 41, 3
TEXTS = [[4, 17, 8], [21], [13, 5, 5, 30, 2]]


class Llama(nn.Module):
    """All that its own generation gives it: ids, a mask and positions."""

    def __init__(self) -> None:
        super().__init__()
        config = transformers.LlamaConfig(
            vocab_size=WORDS, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2,
            num_key_value_heads=1, max_position_embeddings=64, initializer_range=0.4, pad_token_id=PAD,
            bos_token_id=None, eos_token_id=None,
        )  # fmt: skip
        self.model = transformers.LlamaForCausalLM(config)

    def forward(self, input_ids: Tensor, attention_mask: Tensor, position_ids: Tensor) -> dict[str, Tensor]:
        made = self.model(input_ids, attention_mask=attention_mask, position_ids=position_ids, use_cache=False)
        return {"logits": made.logits}


class Added(nn.Module):
    """torch.nn's layers, a mask of infinities of rows, and one of queries and keys."""

    def __init__(self) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(tiny.WIDTH, 2, 24, batch_first=True, dropout=0.0)
        self.blocks = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.words, self.head = nn.Embedding(WORDS, tiny.WIDTH), nn.Linear(tiny.WIDTH, WORDS)

    def forward(self, ids: Tensor, mask: Tensor, padding: Tensor) -> dict[str, Tensor]:
        return {"logits": self.head(self.blocks(self.words(ids), mask, padding[:, 0, 0]))}


def triangle(size: int) -> Tensor:
    return torch.full((size, size), float("-inf")).triu(1)


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, offramp.Chain]:
    positions = torch.arange(tiny.TOKENS).repeat(2, 1)
    inputs = {"input_ids": tiny.ids(), "attention_mask": torch.ones_like(tiny.ids()), "position_ids": positions}
    captured = tiny.captured(Llama, inputs)
    path = tmp_path_factory.mktemp("llama") / "bundle"
    offramp.save(apply(captured.program, "insert-exits{after=1},insert-cache"), path)
    return captured.model, offramp.load(path)


@pytest.fixture(scope="module")
def added(tmp_path_factory: pytest.TempPathFactory) -> offramp.Chain:
    padding = torch.zeros(2, 1, 1, tiny.TOKENS)
    padding[1, ..., -2:] = float("-inf")
    inputs = {"ids": tiny.ids(), "mask": triangle(tiny.TOKENS), "padding": padding}
    path = tmp_path_factory.mktemp("added") / "bundle"
    offramp.save(apply(tiny.captured(Added, inputs).program, "insert-cache"), path)
    return offramp.load(path)


def padded(left: bool) -> dict[str, Any]:
    """Ids, mask and positions as transformers has them, int64 [3, 5] each."""
    ids, masks = [], []
    for text in TEXTS:
        gap, seen = [PAD] * (5 - len(text)), [1] * len(text)
        ids.append(gap + text if left else text + gap)
        masks.append([0] * len(gap) + seen if left else seen + [0] * len(gap))
    mask = np.array(masks)
    positions = np.where(mask == 0, 1, mask.cumsum(1) - 1)
    return {"input_ids": np.array(ids), "attention_mask": mask, "position_ids": positions}


@pytest.fixture(scope="module")
def expected(llama: Any) -> list[list[int]]:
    """What transformers generates, batched with padding on the left."""
    inputs = {name: torch.from_numpy(value) for name, value in padded(True).items() if name != "position_ids"}
    made = llama[0].model.generate(**inputs, max_new_tokens=6, do_sample=False)
    return made[:, 5:].tolist()


@pytest.mark.parametrize("kind", ["arrays", "lists", "bool", "rows", "without positions", "plain", "other dtypes"])
@pytest.mark.parametrize("left", [True, False])
def test_generation_is_that_of_transformers(llama: Any, expected: Any, left: bool, kind: str) -> None:
    inputs = padded(left)
    if kind == "lists":
        inputs = {name: value.tolist() for name, value in inputs.items()}
    elif kind == "bool":
        inputs["attention_mask"] = inputs["attention_mask"].astype(bool)
    elif kind == "other dtypes":
        inputs |= {name: inputs[name].astype(np.int32) for name in ("attention_mask", "position_ids")}
    elif kind == "rows":
        inputs = {"input_ids": TEXTS, "attention_mask": [[1] * len(text) for text in TEXTS]}
    elif kind == "without positions":
        del inputs["position_ids"]
    elif kind == "plain":
        inputs = {"input_ids": TEXTS}
    chain = llama[1]
    assert [row.tolist() for row in chain.generate(inputs, max_new_tokens=6).tokens] == expected
    assert [step.token for step in chain.stream(inputs, max_new_tokens=1)] == [row[0] for row in expected]


def test_one_pass_takes_what_the_graph_makes(llama: Any, added: offramp.Chain) -> None:
    ids = np.array([TEXTS[0], [1, 2, 3]])
    plain = llama[1].run({"input_ids": ids}).outputs["logits"]
    positions = np.arange(3)[None].repeat(2, 0)
    for mask in (np.ones((2, 3), np.int64), [[1, 1, 1], [True] * 3]):
        found = llama[1].run({"input_ids": ids, "attention_mask": mask, "position_ids": positions})
        np.testing.assert_array_equal(found.outputs["logits"], plain)
    masks = {"mask": triangle(3).numpy(), "padding": np.zeros((2, 1, 1, 3), np.float32)}
    np.testing.assert_array_equal(
        added.run({"ids": ids, **masks}).outputs["logits"], added.run({"ids": ids}).outputs["logits"]
    )


def test_none_is_as_if_it_were_left_out(llama: Any) -> None:
    """Whether the graph makes it or the model has no such input: a tokenizer may give either."""
    ids, nothing = np.array([TEXTS[0]]), {"attention_mask": None, "token_type_ids": None}
    plain = llama[1].run({"input_ids": ids}).outputs["logits"]
    np.testing.assert_array_equal(llama[1].run({"input_ids": ids, **nothing}).outputs["logits"], plain)
    (wanted,) = llama[1].generate({"input_ids": ids}, max_new_tokens=3).tokens
    (found,) = llama[1].generate({"input_ids": ids, **nothing}, max_new_tokens=3).tokens
    assert found.tolist() == wanted.tolist()
    assert [step.token for step in llama[1].stream({"input_ids": ids, **nothing}, max_new_tokens=3)] == wanted.tolist()
    assert llama[1].generator({"input_ids": ids, **nothing}).next()[0].token == wanted[0]


@pytest.mark.parametrize("left", [True, False])
def test_examples_to_calibrate_on_lose_their_padding(llama: Any, left: bool) -> None:
    """They are what a tokenizer gives for several texts."""
    found = read(llama[1], {**padded(left), "labels": ["a", "b", "c"]})
    assert [{name: row.tolist() for name, (row,) in example.items()} for example in found.inputs] == [
        {"input_ids": text} for text in TEXTS
    ]
    assert found.labels == ["a", "b", "c"]
    with pytest.raises(InputError, match="'attention_mask' hides tokens of row 0 between others"):
        read(llama[1], {"input_ids": [[4, 17, 8]], "attention_mask": [[1, 0, 1]]})


def test_infinite_padding_over_four_axes(added: offramp.Chain) -> None:
    alone = added.generate({"ids": [[4, 17, 8], [21]]}, max_new_tokens=4)
    for hidden in (-np.inf, np.finfo(np.float32).min, -1e9):
        padding = np.zeros((2, 1, 1, 3), np.float32)
        padding[1, ..., :2] = hidden
        inputs = {"ids": [[4, 17, 8], [0, 0, 21]], "padding": padding, "mask": triangle(3).numpy()}
        found = added.generate(inputs, max_new_tokens=4)
        assert [row.tolist() for row in found.tokens] == [row.tolist() for row in alone.tokens]


ALONE = "leave 'attention_mask' out, and give rows without padding: those of another length in a call of their own"
COUNTED = "leave 'position_ids' out: positions count the tokens of a row"
IDS = [[4, 17, 8]]


@pytest.mark.parametrize(
    ("given", "reason", "hint"),
    [
        ({"attention_mask": [[1, 1, 0]]}, r"'attention_mask' is 0 at \[0, 2\]; the graph makes 1 there itself", ALONE),
        ({"attention_mask": [[0, 1, 1]]}, r"'attention_mask' is 0 at \[0, 0\]; the graph makes 1 there", ALONE),
        ({"position_ids": [[0, 1, 3]]}, r"'position_ids' is 3 at \[0, 2\]; the graph makes 2 there itself", COUNTED),
        ({"attention_mask": [[1, 1]]}, r"'attention_mask' has the shape \[1, 2\], expected \[1, 3\]", None),
        ({"attention_mask": [1, 1, 1]}, r"'attention_mask' has 1 axes in \[1, 1, 1\], expected 2", None),
        ({"attention_mask": [["a"] * 3]}, r"'attention_mask' cannot be an array of numbers: dtype <U1", None),
        ({"mask": [[1, 1, 1]]}, r"'mask' is not an input", None),
    ],
)
def test_refusals_of_one_pass(llama: Any, given: Any, reason: str, hint: str | None) -> None:
    with pytest.raises(InputError, match=reason) as caught:
        llama[1].run({"input_ids": np.array(IDS), **given})
    assert caught.value.hint == hint


@pytest.mark.parametrize(
    ("given", "reason", "hint"),
    [
        ({"attention_mask": [[1, 0, 1]]}, "hides tokens of row 0 between others; padding is at the ends", "the row"),
        ({"attention_mask": [[0, 0, 0]]}, "'attention_mask' hides all tokens of row 0", None),
        (
            {"attention_mask": [[1, 1, 2]]},
            "'attention_mask' is 2 in row 0; it is 1 for a token and 0 for padding",
            None,
        ),
        ({"attention_mask": [[1, 1]]}, r"'attention_mask' has rows of \[2\] places; the token ids have \[3\]", None),
        ({"attention_mask": [1, 1, 1]}, "'attention_mask' has 0 axes in", None),
        ({"attention_mask": 1}, r"'attention_mask' has rows of \[\] places", None),
        (
            {"position_ids": [[1, 2, 3]]},
            r"is \[1, 2, 3\] for the tokens of row 0; the graph makes \[0, 1, 2\]",
            COUNTED,
        ),
        ({"attention_mask": [[0, 1, 1]], "position_ids": [[0, 1, 2]]}, r"is \[1, 2\] for the tokens of row 0", COUNTED),
    ],
)
def test_refusals_of_generation(llama: Any, given: Any, reason: str, hint: str | None) -> None:
    with pytest.raises(InputError, match=reason) as caught:
        llama[1].generate({"input_ids": IDS, **given}, max_new_tokens=2)
    assert (hint or "") in (caught.value.hint or "")


def test_a_mask_of_queries_and_keys_is_taken_as_it_is_made(added: offramp.Chain) -> None:
    with pytest.raises(InputError, match=r"'mask' is 0 at \[0, 1\]; the graph makes -3.40282e\+38 there itself"):
        added.generate({"ids": IDS, "mask": np.zeros((3, 3))}, max_new_tokens=1)


def changes() -> Iterator[tuple[dict[str, Any], str]]:
    where = r"cache.implied.attention_mask"
    yield {"dtype": "text"}, rf"{where}.dtype: 'text' is none of"
    yield {"shape": ["batch", "words"]}, rf"{where}.shape: no such axes: words"
    yield {"shape": ["batch*"]}, rf"{where}.shape: 'batch\*' is not"
    yield {"axis": 2}, rf"{where}.axis: \['batch', 'tokens'\] has no axis 2"
    yield {"shape": ["batch"], "hidden": 0}, rf"{where}.hidden: \['batch'\] has no axes of queries"
    yield {"value": 1e300}, rf"{where}.value: 1e\+300 is too large"


@pytest.mark.parametrize(("change", "problem"), list(changes()))
def test_a_manifest_is_checked(llama: Any, change: dict[str, Any], problem: str) -> None:
    data = json.loads(to_json(llama[1].manifest))
    changed = copy.deepcopy(data)
    changed["cache"]["implied"]["attention_mask"] |= change
    with pytest.raises(BundleError, match=problem):
        from_json(json.dumps(changed))
    data["cache"]["implied"]["input_ids"] = data["cache"]["implied"]["attention_mask"]
    with pytest.raises(BundleError, match=r"cache.implied.input_ids: is one of the inputs"):
        from_json(json.dumps(data))
