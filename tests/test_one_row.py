"""Models whose rows are not computed apart generate one; positions that count on behind a prompt; Qwen's images."""

# mypy: disable-error-code="no-any-return, override"
from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import torch
import transformers
from breadth import slow_but
from test_image_tokens import FEATURES, IMAGE, JOINS, PATCHES, Join, Reader, added, example, greedy, scattered
from torch import Tensor, nn

import offramp
from offramp import models
from offramp.check import check
from offramp.errors import InputError
from offramp.program.sizes import at_other_sizes

PASSES = "insert-exits{stack=decoder},insert-scores{stack=decoder,measure=top1},insert-cache"


def one(ids: Tensor) -> Tensor:
    """The ids, of one row only."""
    return ids + torch.zeros(1, 1, dtype=torch.int64).reshape(ids.shape[0], 1)


class OneText(tiny.Decoder):
    def forward(self, input_ids: Tensor) -> Tensor:
        return super().forward(one(input_ids))


class OneImage(Reader):
    def forward(self, image: Tensor, input_ids: Tensor) -> dict[str, Tensor]:
        return super().forward(image.reshape(1, PATCHES, FEATURES), one(input_ids))


def loaded(program: offramp.Program, path: Path) -> offramp.Chain:
    figures = offramp.save(offramp.apply(program, PASSES), path)
    assert 0 < figures["cache"] < 1e-5
    return offramp.load(path)


def same_however_deep(chain: offramp.Chain, inputs: dict[str, Any], new: int) -> list[int]:
    """The greedy tokens; those of drafts that full depth checks are the same."""
    found = chain.generate(inputs, offramp.Never(), max_new_tokens=new).tokens[0]
    checked = chain.generate(inputs, offramp.Verify(1, 0.05), max_new_tokens=new).tokens[0]
    np.testing.assert_array_equal(found, checked)
    return found.tolist()


def test_a_row_of_text(tmp_path: Path) -> None:
    model = tiny.seeded(OneText)
    program = offramp.capture(model, {"input_ids": tiny.ids(rows=1)})
    assert program.axes.batch is None
    chain = loaded(program, tmp_path / "m.offramp")
    for prompt in ([1, 2, 3], [4], [5, 6, 7, 8, 1]):
        ids = torch.tensor([prompt])
        for _ in range(6):
            with torch.no_grad():
                ids = torch.cat([ids, model(ids)[:, -1:].argmax(-1)], 1)
        assert same_however_deep(chain, {"input_ids": [prompt]}, 6) == ids[0, len(prompt) :].tolist()
    early = chain.generate({"input_ids": [[1, 2]]}, offramp.Depth(2), max_new_tokens=4)
    assert early.exits[0].tolist() == [4, 2, 2, 2]
    with pytest.raises(InputError, match=r"one row at a time, these are 2\n.*a call for each"):
        chain.generate({"input_ids": [[1], [2]]})
    with pytest.raises(InputError, match=r"beams=2: this bundle generates one row at a time"):
        chain.generate({"input_ids": [[1]]}, beams=2)


@pytest.mark.parametrize("join", slow_but([scattered, added], JOINS), ids=[join.__name__ for join in JOINS])
def test_a_row_with_an_image(join: Join, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model, inputs = OneImage(join).eval(), example(rows=1)
    chain = loaded(offramp.capture(model, inputs), tmp_path / "m.offramp")
    arrays = {name: value.numpy() for name, value in inputs.items()}
    found = same_however_deep(chain, arrays, 6)
    until = found.index(IMAGE) if IMAGE in found else 6  # one that is generated is text, as in transformers
    assert found[:until] == greedy(model, inputs, until)


# positions


class Placed(Reader):
    """Positions are an input: [batch, tokens], or ``axes`` of them for each token."""

    def __init__(self, axes: int = 0) -> None:
        super().__init__(scattered)
        self.axes, self.where = axes, nn.Embedding(64, tiny.WIDTH)

    def forward(self, image: Tensor, input_ids: Tensor, position_ids: Tensor) -> dict[str, Tensor]:
        places = self.where(position_ids)
        x = self.join(self, self.look(image), input_ids) + (places.sum(0) if self.axes else places)
        for block in self.blocks:
            x = block(x, None)
        return {"logits": self.head(self.leave(x))}


def positions(ids: Tensor, axes: int) -> Tensor:
    """All of an image's tokens have the same one, or one on each of ``axes``; the text goes on behind the greatest."""
    inside = ids == IMAGE
    start = (~inside).cumsum(-1) + (inside.cumsum(-1) > 0)
    behind = (inside.cumsum(-1) > 0) & ~inside
    found = start + behind * max(0, axes - 1)
    return torch.stack([found + at * inside for at in range(axes)]) if axes else found


@pytest.mark.parametrize("axes", [0, 3])
@pytest.mark.slow
def test_positions_count_on_behind_a_prompt(axes: int, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model, inputs = Placed(axes).eval(), example()
    given = {**inputs, "position_ids": positions(inputs["input_ids"], axes)}
    program = offramp.capture(model, given)
    chain = loaded(program, tmp_path / "m.offramp")
    assert chain.manifest.cache is not None
    assert chain.manifest.cache.prompt is not None
    assert chain.manifest.cache.prompt.counting == ("position_ids",)
    sizes = (4, 4) if axes else (4, 12)  # one that ends with the image
    rows = [inputs["input_ids"][at, :size] for at, size in enumerate(sizes)]
    placed = [positions(row[None], axes) for row in rows]
    beside = torch.cat(placed, 1).numpy() if axes else [row[0].numpy() for row in placed]
    arrays = {"image": inputs["image"].numpy(), "input_ids": [row.numpy() for row in rows], "position_ids": beside}
    found = chain.generate(arrays, offramp.Never(), max_new_tokens=6)
    for at, row in enumerate(rows):
        ids, places, wanted = row[None], placed[at], list[int]()
        while len(wanted) < 6 and IMAGE not in wanted:
            with torch.no_grad():
                logits = model(inputs["image"][at : at + 1], ids, places)["logits"]
            wanted.append(int(logits[0, -1].argmax()))
            ids = torch.cat([ids, torch.tensor([wanted[-1:]])], 1)
            places = torch.cat([places, (places.max() + 1).expand_as(places[..., -1:])], -1)
        assert found.tokens[at].tolist()[: len(wanted)] == wanted
    wrong = torch.cat(placed, 1)[..., :3].numpy() if axes else [row[0, :3].numpy() for row in placed]
    with pytest.raises(InputError, match=r"'position_ids'.*has"):
        chain.generate({**arrays, "position_ids": wrong})


# axes that have one size


class Halves(nn.Module):
    """Nobody would call it with another number of features than 6, but nothing says so before it runs."""

    def __init__(self) -> None:
        super().__init__()
        self.mix, self.tail = nn.Linear(3, 4), nn.Linear(4, 2)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        halves = x.unfold(1, 3, 3).reshape(x.shape[0], -1)[:, :6].reshape(-1, 2, 3)
        return self.tail(self.mix(halves)).sum(1) + y.mean(1, keepdim=True)


def test_an_axis_that_runs_at_one_size_has_it() -> None:
    program = offramp.capture(Halves(), {"x": torch.randn(2, 6), "y": torch.randn(2, 5)})
    names = {name: symbol for symbol, name in program.axes.names.items()}
    assert program.axes.ranges[names["y_1"]] == (1, None)
    assert {inputs["y"].shape[1] for inputs, _ in at_other_sizes(program)} == {3, 8}


# Qwen's vision-language models, their grid fixed: one row, three axes of positions

GRID, PLACE = (1, 4, 4), 90
_VISION = {"depth": 2, "num_heads": 2, "patch_size": 4, "spatial_merge_size": 2, "temporal_patch_size": 2}
_WIDE = {"hidden_size": 16, "intermediate_size": 32, "out_hidden_size": 32}
QWENS: dict[str, dict[str, Any]] = {
    "Qwen2VL": {"embed_dim": 16, "hidden_size": 32, "mlp_ratio": 2},
    "Qwen2_5_VL": {**_WIDE, "window_size": 16, "fullatt_block_indexes": [1]},
    "Qwen3VL": {**_WIDE, "num_position_embeddings": 16, "deepstack_visual_indexes": [0, 1]},
}


class Qwen(nn.Module):
    def __init__(self, kind: str) -> None:
        super().__init__()
        text = {
            "vocab_size": 100, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 3,
            "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 256, "head_dim": 8,
            "rope_parameters": {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 10000.0},
        }  # fmt: skip
        config = getattr(transformers, f"{kind}Config")(
            text_config=text, vision_config={**_VISION, **QWENS[kind]}, image_token_id=PLACE, video_token_id=91,
            vision_start_token_id=92, vision_end_token_id=93,
        )  # fmt: skip
        self.model = getattr(transformers, f"{kind}ForConditionalGeneration")(config).eval()
        with torch.no_grad():
            for weight in self.model.parameters():
                if weight.dim() > 1:
                    weight.mul_(2.0)

    def forward(self, pixel_values: Tensor, input_ids: Tensor, position_ids: Tensor) -> Tensor:
        grid = torch.tensor([list(GRID)] * input_ids.shape[0])
        return self.model(
            input_ids=input_ids, pixel_values=pixel_values, image_grid_thw=grid, position_ids=position_ids
        ).logits

    def given(self, before: int, behind: int) -> dict[str, Tensor]:
        ids = torch.tensor([[*range(5, 5 + before), 92, *[PLACE] * 4, 93, *range(10, 10 + behind)]])
        types = (ids == PLACE).long()
        places, _ = self.model.model.get_rope_index(ids, types, torch.tensor([GRID]))
        return {"pixel_values": torch.randn(16, 96), "input_ids": ids, "position_ids": places}


@pytest.mark.slow
@pytest.mark.parametrize("kind", QWENS)
def test_qwen_vl_generates_as_transformers_does(kind: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = Qwen(kind)
    inputs = model.given(2, 6)
    report = check(model, inputs)
    assert report.ok, report.reason
    assert [stack.cached for stack in report.stacks if stack.name == "decoder"] == [True]
    program = offramp.capture(model, inputs)
    (axis,) = [symbol for symbol, name in program.axes.names.items() if name == "pixel_values_1"]
    assert program.axes.ranges[axis] == (96, 96)
    chain = loaded(program, tmp_path / "m.offramp")
    for before, behind in ((2, 6), (1, 2), (7, 9)):
        inputs = model.given(before, behind)
        found = same_however_deep(chain, {name: value.numpy() for name, value in inputs.items()}, 8)
        wanted = model.model.generate(
            input_ids=inputs["input_ids"],
            pixel_values=inputs["pixel_values"],
            image_grid_thw=torch.tensor([GRID]),
            mm_token_type_ids=(inputs["input_ids"] == PLACE).long(),
            max_new_tokens=8,
            do_sample=False,
        )
        assert found == wanted[0, -8:].tolist()


class _Counts(nn.Module):
    """Two layers; how many rows there are is a plain number to it."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), 2)

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = self.layers(x) * len(x)
        return found


@pytest.mark.parametrize(("name", "given", "taken"), [("f.py:one", 1, 1), ("f.py:two", 2, 2), ("hf:two", 2, 1)])
def test_where_the_model_fixes_the_rows_one_is_not_made_two(name: str, given: int, taken: int) -> None:
    notes: list[str] = []
    inputs = {"x": torch.randn(given, 5, 8)}
    program, found = models.captured(name, _Counts().eval(), inputs, offramp.capture, notes.append)
    assert (program.example_inputs["x"].shape[0], found["x"].shape[0]) == (taken, taken)  # type: ignore[call-overload]
    assert len(notes) == (given != taken)
    expected = _Counts().eval()(inputs["x"][:taken])
    torch.testing.assert_close(program.module(x=inputs["x"][:taken])["output"], expected)
