"""Ways of answering questions about images and of describing them: bundles, turns, what each answer took."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np
import sacrebleu

import offramp
from benchmarks._common import BUILD, say, steps
from examples import vision_language
from examples.vision_language.data import REQUESTS, Split, collated, load, tokenizer
from examples.vision_language.data import Task as Asked
from examples.vision_language.model import BLOCKS, LONGEST
from examples.vision_language.train import GENERATION, program
from offramp.export.write import hashed
from offramp.training.weights import load_weights

THREADS = 1
TURN = 4  # batches
INPUTS = ("pixel_values", "input_ids", "attention_mask")
GROUPS = ("encoder.image", "encoder.text")
words = functools.cache(tokenizer)


@dataclass(frozen=True)
class Kind:
    """Questions or descriptions: which are asked, how long an answer is, how good it is (0 to 1), and all of them."""

    name: str
    asked: Callable[[Split], Sequence[Asked]]
    most: int  # new tokens
    keep: float  # of full depth's score, where thresholds are chosen
    quality: Callable[[str, Sequence[str]], float]
    score: Callable[[Sequence[str], Sequence[Sequence[str]]], float]

    def fitting(self, split: Split, asked: Asked) -> list[str]:
        """The answers that are right."""
        image, text, answer = asked
        return [answer] if text not in REQUESTS else split.scenes[image].sentences(text)


def _right(text: str, fitting: Sequence[str]) -> float:
    return float(text in fitting)


def _sentence(text: str, fitting: Sequence[str]) -> float:
    return min(1.0, sacrebleu.sentence_bleu(text, list(fitting)).score / 100)


def _accuracy(texts: Sequence[str], fitting: Sequence[Sequence[str]]) -> float:
    return 100 * sum(map(_right, texts, fitting)) / len(texts)


def _bleu(texts: Sequence[str], fitting: Sequence[Sequence[str]]) -> float:
    return float(sacrebleu.corpus_bleu(list(texts), [list(each) for each in zip(*fitting, strict=True)]).score)


QUESTIONS = Kind("questions", lambda split: split.questions, 1, 0.99, _right, _accuracy)
DESCRIPTIONS = Kind("descriptions", lambda split: split.requests, LONGEST - 1, 0.96, _sentence, _bleu)


@dataclass
class Way:
    """A way of answering, and what it took, by batch: milliseconds of encoder and decoder; by answer: text, depths."""

    name: str
    chain: offramp.Chain
    policy: offramp.Policy = field(default_factory=offramp.Never)
    propagate: str = "defer"
    texts: list[str] = field(default_factory=list)
    encoder: list[float] = field(default_factory=list)
    decoder: list[float] = field(default_factory=list)
    depths: dict[str, list[int]] = field(default_factory=dict)

    def answer(self, inputs: Mapping[str, Any], most: int) -> None:
        """Answer a batch, and note what it took."""
        started = perf_counter()
        made = self.chain.generator(inputs, self.policy, propagate=self.propagate, max_new_tokens=most)
        begun = perf_counter()
        tokens = []
        while made.rows:
            tokens += made.next()
        ended = perf_counter()
        made.end()
        self.encoder.append((begun - started) * 1e3)
        self.decoder.append((ended - begun) * 1e3)
        for row in range(len(inputs["input_ids"])):
            ids = [token.token for token in tokens if token.row == row]
            self.texts.append(words().decode(ids))  # without special tokens
        found = {name: made.exits[name].tolist() for name in made.exits}
        found.setdefault("encoder", [BLOCKS] * len(inputs["input_ids"]))
        for group in GROUPS:
            self.depths.setdefault(group, []).extend(found.get(group, found["encoder"]))
        self.depths.setdefault("decoder", []).extend(token.exit for token in tokens)

    def anew(self) -> Way:
        """The same way, with nothing measured."""
        return Way(self.name, self.chain, self.policy, self.propagate)


def batches(kind: Kind, name: Any, size: int, count: int | None = None) -> list[tuple[dict[str, Any], list[list[str]]]]:
    """Inputs of so many rows each, and the answers that are right; of all images, evenly."""
    split = load(name)
    asked = kind.asked(split)
    chosen = list(asked)[:: max(1, len(asked) // count)][:count] if count else list(asked)
    found = []
    for start in range(0, len(chosen), size):
        some = chosen[start : start + size]
        images, texts, answers = zip(*some, strict=True)
        made = collated(split.pixels[list(images)], texts, answers, words())
        found.append(({key: made[key].numpy() for key in INPUTS}, [kind.fitting(split, each) for each in some]))
    return found


def measure(ways: Sequence[Way], kind: Kind, name: str, size: int, count: int | None) -> list[Way]:
    """Let all answer the same in turns, a few batches at a time; none is always the first after another."""
    found, given = [way.anew() for way in ways], batches(kind, name, size, count)
    for start in steps(range(0, len(given), TURN), f"{kind.name} of {name}, batches of {size}, {len(found)} ways"):
        for k in range(len(found)):
            way = found[(start // TURN + k) % len(found)]
            way.anew().answer(given[start][0], kind.most)  # what ran before has left the processor's caches to others
            for inputs, _ in given[start : start + TURN]:
                way.answer(inputs, kind.most)
    return found


def fitting(kind: Kind, name: str, count: int | None) -> list[list[str]]:
    """The answers that are right, of what `measure` asks."""
    return [each for _, some in batches(kind, name, 64, count) for each in some]


def examples(kind: Kind, count: int | None) -> list[dict[str, Any]]:
    """Of the validation set, for `offramp.calibrate`: the label is what is right."""
    return [{**inputs, "labels": [right]} for inputs, (right,) in batches(kind, "validation", 1, count)]


def judged(kind: Kind) -> Callable[[Any, Any], float]:
    """How good an answer's token ids are."""

    def quality(tokens: Any, right: Sequence[str]) -> float:
        return kind.quality(words().decode(np.asarray(tokens).tolist()), right)

    return quality


def weights_of(form: str, weights: Path) -> Path:
    """The file of what learned in a form: what training left, else what is in the repository."""
    trained = weights / f"{form}.safetensors"
    ours = Path(vision_language.__file__).parent / trained.name
    return ours if ours.exists() and not trained.exists() else trained


@functools.cache
def folder(form: str, weights: Path) -> Path:
    """Where what is made of these weights lies."""
    place = BUILD / "vision_language" / hashed(weights_of(form, weights)).sha256[:8]
    place.mkdir(parents=True, exist_ok=True)
    return place


def bundle(
    form: str, weights: Path, exits: Mapping[str, Sequence[int]], cut: Mapping[str, int] | None = None
) -> offramp.Chain:
    """What learned in a form, with some of its exits and one segment between them, or without its deeper blocks."""
    cut = cut or {}
    parts = [f"{stack}-{'.'.join(map(str, after))}" for stack, after in exits.items() if after]
    path = folder(form, weights) / "_".join([form, *parts, *(f"{stack}-of-{after}" for stack, after in cut.items())])
    path = path.with_name(f"{path.name}.offramp")
    if not (path / "manifest.json").is_file():
        say(f"exporting {path}")
        made = program(words().get_vocab_size(), form, exits)
        load_weights(made, weights_of(form, weights), part=True)
        for stack, after in cut.items():
            made = offramp.apply(made, f"truncate{{stack={stack},after={after}}}")
        offramp.save(offramp.apply(made.without_dropout(), "insert-cache"), path, segments=1, generation=GENERATION)
    return offramp.load(path, threads=THREADS)
