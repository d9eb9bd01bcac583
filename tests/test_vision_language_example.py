"""The vision-language example: its models, what they are captured as, and its data."""

from __future__ import annotations

import importlib.util
import random
import sys
from pathlib import Path

import numpy as np
import pytest
import tiny
import torch
from numpy.typing import NDArray
from tokenizers import Tokenizer
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).parent.parent))  # examples are no part of the package

import offramp
from examples.vision_language import data, export
from examples.vision_language.model import (
    BEGIN,
    PAD,
    PATCHES,
    SIDE,
    UNKNOWN,
    CausalCaptioner,
    VisionLanguage,
    causal_example,
    example,
)
from examples.vision_language.train import GENERATION, said
from offramp.export.write import hashed
from offramp.training.losses import IGNORED

VOCABULARY, BLOCKS = 40, 2
QUESTIONS = ([7, 8, 9], [10, 11, 12, 13, 14, 15])
needs_data = pytest.mark.skipif(
    importlib.util.find_spec("easy_vqa") is None, reason=f"needs pip install --no-deps {data.PACKAGE}"
)


def louder(module: VisionLanguage) -> VisionLanguage:
    """With larger weights, so that what is said depends on what is seen and said before."""
    with torch.no_grad():
        for name, weight in module.named_parameters():
            if weight.dim() > 1 and "table" not in name and "places" not in name:
                weight.mul_(8)
    return module


@pytest.fixture(scope="module")
def model() -> nn.Module:
    return louder(tiny.seeded(lambda: VisionLanguage(VOCABULARY, BLOCKS)))


@pytest.fixture(scope="module")
def captured(model: nn.Module) -> offramp.Program:
    return offramp.capture(model, example())


def asked() -> dict[str, Tensor]:
    """Two images, and questions of different lengths."""
    ids = nn.utils.rnn.pad_sequence([torch.tensor(row) for row in QUESTIONS], True, PAD)
    images = torch.rand(2, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(0)) * 2 - 1
    return {"pixel_values": images, "input_ids": ids, "attention_mask": (ids != PAD).long()}


def alone(row: int) -> dict[str, Tensor]:
    """One of them, without padding."""
    return {
        name: value[row : row + 1] if name == "pixel_values" else value[row : row + 1, : len(QUESTIONS[row])]
        for name, value in asked().items()
    }


# the models


def test_a_logit_for_each_word_of_the_answer(model: nn.Module) -> None:
    with torch.no_grad():
        logits = model(**example(rows=3, question=5, answer=4))["logits"]
    assert logits.shape == (3, 4, VOCABULARY)


def test_what_pads_a_question_changes_nothing(model: nn.Module) -> None:
    inputs = example()
    padded = {
        **inputs,
        "input_ids": nn.functional.pad(inputs["input_ids"], (0, 3), value=7),
        "attention_mask": nn.functional.pad(inputs["attention_mask"], (0, 3)),
    }
    with torch.no_grad():
        torch.testing.assert_close(model(**padded), model(**inputs), rtol=1e-5, atol=1e-5)


def test_image_and_question_matter_and_later_words_do_not(model: nn.Module) -> None:
    inputs = example()
    with torch.no_grad():
        logits = model(**inputs)["logits"]
        for name in ("pixel_values", "input_ids"):
            other = {**inputs, name: inputs[name].flip(-1) + 1}
            assert not torch.allclose(model(**other)["logits"], logits)
        inputs["decoder_input_ids"][:, -1] = 9
        found = model(**inputs)["logits"]
    torch.testing.assert_close(found[:, :-1], logits[:, :-1])
    assert not torch.allclose(found[:, -1], logits[:, -1])


def test_the_stacks_are_an_encoder_and_a_decoder(captured: offramp.Program) -> None:
    assert [(stack.name, stack.role, stack.blocks) for stack in captured.stacks.values()] == [
        ("encoder", "encoder", BLOCKS),
        ("decoder", "decoder", BLOCKS),
    ]


@pytest.mark.slow
def test_a_bundle_says_what_the_model_says(model: nn.Module, captured: offramp.Program, tmp_path: Path) -> None:
    program = offramp.apply(captured, "insert-exits{stack=decoder},insert-cache")
    offramp.save(program, tmp_path / "answers.offramp", generation={**GENERATION, "stop": []})
    chain = offramp.load(tmp_path / "answers.offramp")
    given = {name: value.numpy() for name, value in asked().items()}
    found = [row.tolist() for row in chain.generate(given, offramp.Never(), max_new_tokens=6).tokens]
    for row in range(2):
        ids = torch.tensor([[BEGIN]])
        for _ in range(6):
            with torch.no_grad():
                logits = model(**alone(row), decoder_input_ids=ids)["logits"]
            ids = torch.cat([ids, logits[:, -1:].argmax(-1)], 1)
        assert found[row] == ids[0, 1:].tolist()
    assert found[0] != found[1]


def test_the_recipe_decodes_a_batch_as_each_row_alone(model: nn.Module) -> None:
    assert said(model, asked(), 6) == [*said(model, alone(0), 6), *said(model, alone(1), 6)]


def test_an_image_among_the_words_gets_a_cache() -> None:
    model = tiny.seeded(lambda: CausalCaptioner(VOCABULARY, BLOCKS))
    with torch.no_grad():
        assert model(**causal_example(text=4))["logits"].shape == (2, PATCHES + 4, VOCABULARY)
    program = offramp.capture(model, causal_example())
    assert [(stack.role, stack.blocks) for stack in program.stacks.values()] == [("decoder", BLOCKS)]
    cached = offramp.apply(program, "insert-exits,insert-cache")
    assert cached.cache is not None
    assert cached.cache.tokens == ("input_ids",)


@needs_data
@pytest.mark.slow
def test_the_trained_model_answers_questions_and_describes_images(tmp_path: Path) -> None:
    for form, digest in export.SHA256.items():
        assert hashed(export.HERE / f"{form}.safetensors").sha256 == digest
    offramp.save(export.trained(), tmp_path / "answers.offramp", generation=GENERATION)
    chain = offramp.load(tmp_path / "answers.offramp")
    words, split = Tokenizer.from_file(str(export.TOKENIZER)), data.load("test")
    tasks = [*split.questions[:400:4], *split.requests[:150:3]]
    images, asked, answers = zip(*tasks, strict=True)
    batch = data.collated(split.pixels[list(images)], asked, answers, words)
    given = {name: batch[name].numpy() for name in ("pixel_values", "input_ids", "attention_mask")}
    said = words.decode_batch([row.tolist() for row in chain.generate(given, offramp.Never()).tokens])
    right = [text == answer for text, answer in zip(said[:100], answers[:100], strict=True)]
    assert sum(right) >= 90  # .968 of all
    told = [
        f"{split.scenes[image].colour} {split.scenes[image].shape}" in text
        for image, text in zip(images[100:], said[100:], strict=True)
    ]
    assert sum(told) >= 25
    early = offramp.Each({"encoder.image": offramp.Depth(1), "encoder.text": offramp.Depth(3)})
    found = words.decode_batch([row.tolist() for row in chain.generate(given, early, max_new_tokens=1).tokens])
    assert sum(text == answer for text, answer in zip(found[:100], answers[:100], strict=True)) >= 85


# the data


def drawn(shape: str, box: tuple[int, int, int, int], colour: str = "teal") -> NDArray[np.uint8]:
    """An image of a shape in a box, its ends not included."""
    left, top, right, bottom = box
    y, x = np.mgrid[:SIDE, :SIDE]
    inside = (left <= x) & (x < right) & (top <= y) & (y < bottom)
    across, down = ((x + 0.5 - left) / (right - left), (y + 0.5 - top) / (bottom - top))
    if shape == "circle":
        inside &= (across - 0.5) ** 2 + (down - 0.5) ** 2 <= 0.25
    if shape == "triangle":
        inside &= np.abs(across - 0.5) <= down / 2
    return np.where(inside[..., None], data.COLOURS[colour], (240, 235, 250)).astype(np.uint8)


@pytest.mark.parametrize("shape", ["circle", "rectangle", "triangle"])
@pytest.mark.parametrize("box", [(4, 8, 18, 22), (30, 20, 60, 50), (20, 40, 40, 62)])
def test_what_an_image_shows_is_read_from_its_pixels(shape: str, box: tuple[int, int, int, int]) -> None:
    scene = data.seen(drawn(shape, box))
    assert (scene.shape, scene.colour) == (shape, "teal")
    assert np.abs(np.subtract((scene.left, scene.top, scene.right, scene.bottom), box)).max() <= 1


def test_sizes_and_places_have_words() -> None:
    scene = data.Scene("circle", "red", 2, 4, 12, 14)
    assert (scene.size, scene.place) == ("small", "in the top left corner")
    assert scene.sentences("describe the image in a few words") == [
        "the image shows a red circle",
        "a small red circle in the top left corner",
        "there is a red circle in the top left corner",
    ]
    moved = scene.moved(25, 45)
    assert (moved.size, moved.place) == ("small", "at the bottom")
    assert data.Scene("circle", "red", 10, 10, 42, 42).size == "large"


def test_sentences_have_6_to_15_words_and_are_the_same_every_time() -> None:
    scene = data.Scene("circle", "red", 2, 4, 12, 14)
    lengths, picked = set(), set()
    for row in data.PLACES:
        for place in row:
            for templates in data.SENTENCES.values():
                lengths |= {
                    len(t.format(size="small", colour="red", shape="circle", place=place).split()) for t in templates
                }
    assert (min(lengths), max(lengths)) == (6, 15)
    for request in data.REQUESTS:
        keys = [f"train {image}" for image in range(30)]
        sentences = [scene.sentence(request, key) for key in keys]
        assert sentences == [scene.sentence(request, key) for key in keys]
        assert set(sentences) == set(scene.sentences(request))
        picked |= set(sentences)
    assert len(picked) == 9
    known = scene.sentence("describe the image", "train 0")
    assert known == "the image contains a small red circle in the top left corner"


def test_a_batch_is_shifted_and_padded() -> None:
    words = data.words_of(["B a", "a"])
    batch = data.collated(np.zeros((2, SIDE, SIDE, 3), np.uint8), ["a", "b a c"], ["a b", "b"], words)
    assert batch["pixel_values"].shape == (2, 3, SIDE, SIDE)
    assert batch["pixel_values"].unique().tolist() == [-1]
    assert batch["input_ids"].tolist() == [[5, PAD, PAD], [6, 5, UNKNOWN]]
    assert batch["attention_mask"].tolist() == [[1, 0, 0], [1, 1, 1]]
    assert batch["decoder_input_ids"].tolist() == [[BEGIN, 5, 6], [BEGIN, 6, PAD]]
    assert batch["labels"].tolist() == [[5, 6, 2], [6, 2, IGNORED]]


def test_without_the_package_the_recipe_says_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(SystemExit, match=r"not installed\n.*pip install --no-deps easy-vqa==1.0"):
        data.folder()


@needs_data
def test_the_answers_of_the_package_are_what_the_pixels_show() -> None:
    split = data.load("test")
    assert split.pixels.shape == (1000, SIDE, SIDE, 3)
    for image, _, answer in split.questions:
        if answer in ("circle", "rectangle", "triangle"):
            assert split.scenes[image].shape == answer
        elif answer not in ("yes", "no"):
            assert split.scenes[image].colour == answer


@needs_data
def test_batches_are_the_same_every_time_and_move_the_shapes() -> None:
    split = data.load("test")
    words = data.words_of(question for _, question, _ in split.questions)
    one, two = data.Batches(split, words, 16), data.Batches(split, words, 16)
    first, again = next(iter(one)), next(iter(two))
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert len(one) == -(-len(split.questions) // 16) + -(-3 * 1000 // 16)
    for image in range(8):
        dice = random.Random(image)
        pixels, sentence = one._moved((image, "describe the image", ""), dice)
        scene = data.seen(pixels)
        assert (scene.shape, scene.colour) == (split.scenes[image].shape, split.scenes[image].colour)
        assert sentence in scene.sentences("describe the image")
    one.set_epoch(1)
    assert not torch.equal(next(iter(one))["pixel_values"], first["pixel_values"])
