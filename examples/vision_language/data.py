"""easy-VQA (pip's ``easy-vqa``): images of one shape each, questions about them, and sentences that describe them.

The questions and their answers are the package's. The sentences are made here, from what the pixels say of the shape:
one is asked for in three ways, and of the three sentences that fit each of them a hash picks the one that is learned.
"""

from __future__ import annotations

import functools
import importlib.util
import json
import random
import sys
import zlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers
from torch import Tensor, nn

from examples.vision_language.model import BEGIN, END, PAD, SIDE
from offramp.training.losses import IGNORED

PACKAGE = "easy-vqa==1.0"
HELD_OUT = 400  # images of the package's train set, the last ones, that are the validation set
SPECIAL = ("<pad>", "<s>", "</s>", "<unk>", "<image>")  # in the order of the model's ids

COLOURS = {
    "black": (0, 0, 0),
    "gray": (128, 128, 128),
    "red": (255, 0, 0),
    "green": (0, 255, 0),
    "blue": (0, 0, 255),
    "yellow": (255, 255, 0),
    "teal": (0, 128, 128),
    "brown": (165, 42, 42),
}
PLACES = (
    ("in the top left corner", "at the top", "in the top right corner"),
    ("on the left", "in the center", "on the right"),
    ("in the bottom left corner", "at the bottom", "in the bottom right corner"),
)
SENTENCES = {
    "describe the image in a few words": (
        "the image shows a {colour} {shape}",
        "a {size} {colour} {shape} {place}",
        "there is a {colour} {shape} {place}",
    ),
    "describe the image": (
        "the image contains a {size} {colour} {shape} {place}",
        "a {colour} {shape} that is {size} lies {place}",
        "{place} of the image there is a {size} {colour} {shape}",
    ),
    "describe the image in detail": (
        "the only shape here is a {size} {colour} {shape} {place}",
        "the background is pale and a {size} {colour} {shape} lies {place}",
        "one {shape} is {place} and it is {size} and {colour}",
    ),
}
REQUESTS = tuple(SENTENCES)

Name = Literal["train", "validation", "test"]
Task = tuple[int, str, str]  # an image's number, what is asked, the answer


@dataclass(frozen=True)
class Scene:
    """What an image shows: a shape, and the box around it in pixels, its ends not included."""

    shape: str
    colour: str
    left: int
    top: int
    right: int
    bottom: int

    @property
    def size(self) -> str:
        longer = max(self.right - self.left, self.bottom - self.top)
        return "small" if longer < 16 else "medium" if longer < 24 else "large"

    @property
    def place(self) -> str:
        column, row = (3 * (self.left + self.right) // (2 * SIDE), 3 * (self.top + self.bottom) // (2 * SIDE))
        return PLACES[row][column]

    def sentences(self, request: str) -> list[str]:
        """All that fit a request."""
        words = {"shape": self.shape, "colour": self.colour, "size": self.size, "place": self.place}
        return [sentence.format_map(words) for sentence in SENTENCES[request]]

    def sentence(self, request: str, key: str) -> str:
        """The one that the hash of ``key`` picks."""
        fitting = self.sentences(request)
        return fitting[zlib.crc32(f"{request} {key}".encode()) % len(fitting)]

    def moved(self, right: int, down: int) -> Scene:
        return replace(
            self,
            left=self.left + right,
            right=self.right + right,
            top=self.top + down,
            bottom=self.bottom + down,
        )


def seen(pixels: NDArray[np.uint8]) -> Scene:
    """What an image ``uint8 [64, 64, 3]`` shows: one colour on another, and how much of its box the shape fills."""
    values = pixels.astype(np.int64)
    found, counts = np.unique(values @ np.array([1 << 16, 1 << 8, 1]), return_counts=True)
    common = [np.array([code >> 16, code >> 8 & 255, code & 255]) for code in found[np.argsort(counts)[-2:]]]
    shape, ground = common
    inside = np.abs(values - shape).sum(-1) < np.abs(values - ground).sum(-1)
    rows, columns = (np.flatnonzero(inside.any(axis)) for axis in (1, 0))
    left, top, right, bottom = int(columns[0]), int(rows[0]), int(columns[-1]) + 1, int(rows[-1]) + 1
    filled = inside.sum() / ((right - left) * (bottom - top))
    name = "triangle" if filled < 0.7 else "circle" if filled < 0.93 else "rectangle"
    colour = min(COLOURS, key=lambda colour: int(np.abs(shape - COLOURS[colour]).sum()))
    return Scene(name, colour, left, top, right, bottom)


@dataclass(frozen=True)
class Split:
    """Images ``uint8 [images, 64, 64, 3]``, what they show, and the package's questions about them."""

    name: Name
    pixels: NDArray[np.uint8]
    scenes: tuple[Scene, ...]
    questions: tuple[Task, ...]

    @property
    def requests(self) -> tuple[Task, ...]:
        """Every request for every image, with the sentence that is picked."""
        return tuple(
            (image, request, scene.sentence(request, f"{self.name} {image}"))
            for image, scene in enumerate(self.scenes)
            for request in REQUESTS
        )


def folder() -> Path:
    """The package's data, found without importing it; without it, a message."""
    spec = importlib.util.find_spec("easy_vqa")
    places = spec.submodule_search_locations if spec else None
    found = Path(places[0]) / "data" if places else None
    needed = [f"{part}/{name}" for part in ("train", "test") for name in ("questions.json", "images/0.png")]
    missing = [name for name in needed if found is None or not (found / name).is_file()]
    if found is None or missing:
        where = "it is not installed" if found is None else f"{found} lacks {', '.join(missing)}"
        sys.exit(f"no easy-VQA: {where}\n  try: pip install --no-deps {PACKAGE}")
    return found


@functools.cache
def load(name: Name) -> Split:
    """A split; the validation set is the last `HELD_OUT` images of the package's train set."""
    home = folder() / ("test" if name == "test" else "train")
    tasks = [(image, question, answer) for question, answer, image in json.loads((home / "questions.json").read_text())]
    count = 1 + max(image for image, _, _ in tasks)
    if missing := [image for image in range(count) if not (home / f"images/{image}.png").is_file()]:
        sys.exit(
            f"{home}/images lacks {len(missing)} of {count} images, {missing[0]}.png for example\n"
            f"  try: pip install --no-deps --force-reinstall {PACKAGE}"
        )
    first, last = {"train": (0, count - HELD_OUT), "validation": (count - HELD_OUT, count), "test": (0, count)}[name]
    pixels = np.stack([_decoded(home / f"images/{image}.png") for image in range(first, last)])
    questions = tuple((image - first, *words) for image, *words in tasks if first <= image < last)
    return Split(name, pixels, tuple(map(seen, pixels)), questions)


def _decoded(path: Path) -> NDArray[np.uint8]:
    with Image.open(path) as image:
        return np.asarray(image.convert("RGB"))


def tokenizer() -> Tokenizer:
    """Of what the training set asks and answers."""
    train = load("train")
    return words_of(text for _, *both in (*train.questions, *train.requests) for text in both)


def words_of(texts: Iterable[str]) -> Tokenizer:
    """A token for each word and mark of the texts, in lowercase, after those that are `SPECIAL`."""
    splitter = pre_tokenizers.Whitespace()
    words = sorted({word for text in set(texts) for word, _ in splitter.pre_tokenize_str(text.lower())})
    made = Tokenizer(models.WordLevel({word: i for i, word in enumerate((*SPECIAL, *words))}, unk_token="<unk>"))
    made.normalizer, made.pre_tokenizer = normalizers.Lowercase(), splitter
    made.add_special_tokens(list(SPECIAL))
    return made


def pixel_values(images: NDArray[np.uint8]) -> Tensor:
    """Images ``uint8 [batch, 64, 64, 3]`` as the models take them: ``float32 [batch, 3, 64, 64]``, -1 to 1."""
    return torch.from_numpy(images).permute(0, 3, 1, 2).contiguous().float() / 127.5 - 1


def collated(
    pixels: NDArray[np.uint8], asked: Sequence[str], answers: Sequence[str], words: Tokenizer
) -> dict[str, Tensor]:
    """A batch: the inputs of `VisionLanguage`, and ``labels`` of the words that it should say."""
    questions = [torch.tensor(text.ids) for text in words.encode_batch(asked)]
    said = [text.ids for text in words.encode_batch(answers)]
    input_ids = nn.utils.rnn.pad_sequence(questions, True, PAD)
    return {
        "pixel_values": pixel_values(pixels),
        "input_ids": input_ids,
        "attention_mask": (input_ids != PAD).long(),
        "decoder_input_ids": nn.utils.rnn.pad_sequence([torch.tensor([BEGIN, *ids]) for ids in said], True, PAD),
        "labels": nn.utils.rnn.pad_sequence([torch.tensor([*ids, END]) for ids in said], True, IGNORED),
    }


class Batches:
    """Questions and requests in batches of their own, shuffled anew each epoch; every shape moves to another place."""

    def __init__(self, split: Split, words: Tokenizer, rows: int = 128) -> None:
        self.split, self.words, self.rows = split, words, rows
        self.set_epoch(0)

    def set_epoch(self, epoch: int) -> None:
        """Deal the batches of an epoch."""
        dice = random.Random(epoch)
        self.epoch, self.batches = epoch, list[list[Task]]()
        for tasks in (list(self.split.questions), list(self.split.requests)):
            dice.shuffle(tasks)
            self.batches += [tasks[start : start + self.rows] for start in range(0, len(tasks), self.rows)]
        dice.shuffle(self.batches)

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        for number, tasks in enumerate(self.batches):
            dice = random.Random(f"{self.epoch} {number}")
            moved = [self._moved(task, dice) for task in tasks]
            pixels, answers = np.stack([image for image, _ in moved]), [answer for _, answer in moved]
            yield collated(pixels, [asked for _, asked, _ in tasks], answers, self.words)

    def _moved(self, task: Task, dice: random.Random) -> tuple[NDArray[np.uint8], str]:
        """The image with its shape elsewhere, a pixel or more from the border, and the answer that is right then."""
        image, asked, answer = task
        scene = self.split.scenes[image]
        right = dice.randint(1 - scene.left, SIDE - 1 - scene.right)
        down = dice.randint(1 - scene.top, SIDE - 1 - scene.bottom)
        if asked in SENTENCES:
            answer = scene.moved(right, down).sentence(asked, f"{self.split.name} {image}")
        return np.roll(self.split.pixels[image], (down, right), (0, 1)), answer
