"""Ways of translating Multi30k, one sentence at a time: bundles, turns, BLEU."""

from __future__ import annotations

import functools
import math
import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from time import perf_counter
from typing import Literal, TypeAlias

import numpy as np
import sacrebleu
import torch
from tokenizers import Tokenizer

import offramp
from benchmarks import _chains
from benchmarks._chains import Single
from benchmarks._common import BUILD, Known, Row, say, steps
from examples.translation.train import captured, lines
from offramp.bundle.measures import PICK, SCREENED
from offramp.training.weights import load_weights
from offramp.zoo import translator
from offramp.zoo.translator import BEGIN, DECODER_BLOCKS, END, GENERATION, LONGEST, TOKENS

FOLDER = BUILD / "translation"
MEASURE = "top1-short"
THREADS = 1  # more make a model of this size slower
TURN = 8  # sentences
Heads: TypeAlias = Literal["whole", "screened", "short"]
FULL = "full depth, one session"
GATED = ("[", "a perfect gate")  # how the names of exit policies begin


@dataclass
class Way:
    """A way of decoding, and what it took: text, tokens, depths and decoder milliseconds of each sentence."""

    name: str
    chain: offramp.Chain | Single
    policy: Callable[[int], offramp.Policy] = lambda sentence: offramp.Never()
    propagate: str = "defer"
    deepest: int = DECODER_BLOCKS
    texts: list[str] = field(default_factory=list)
    tokens: list[list[int]] = field(default_factory=list)
    depths: list[list[int]] = field(default_factory=list)
    decoder: list[float] = field(default_factory=list)

    def translate(self, sentence: int, source: list[int]) -> None:
        """Translate a sentence, and note what it took."""
        inputs = {"input_ids": [source], "attention_mask": [[1] * len(source)]}
        room = min(2 * len(source) + 10, LONGEST - 1)
        if isinstance(self.chain, Single):
            session = self.chain.session(inputs)
            started = perf_counter()
            self.tokens.append(list(self.chain.tokens(session, room)))
            self.decoder.append((perf_counter() - started) * 1e3)
            self.depths.append([self.deepest] * len(self.tokens[-1]))
        else:
            policy = self.policy(sentence)
            steps = list(self.chain.stream(inputs, policy, propagate=self.propagate, max_new_tokens=room))
            self.tokens.append([step.token for step in steps])
            self.decoder.append(sum(step.milliseconds for step in steps))
            self.depths.append([step.exit for step in steps])
        self.texts.append(spoken(self.tokens[-1]))

    def anew(self) -> Way:
        """The same way, with nothing measured."""
        return Way(self.name, self.chain, self.policy, self.propagate, self.deepest)

    @property
    def milliseconds(self) -> float:
        """Of the decoder, a sentence."""
        return sum(self.decoder) / len(self.decoder)


def on_one_core() -> None:
    """Keep to one core, where exporting leaves no pool of threads behind, which later sessions would have to share."""
    torch.set_num_threads(1)  # several would wait for each other on the one core
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})


def same(policy: offramp.Policy) -> Callable[[int], offramp.Policy]:
    """One policy for all sentences."""
    return lambda sentence: policy


@functools.cache
def words() -> Tokenizer:
    """The tokenizer."""
    return Tokenizer.from_file(str(TOKENS))


def spoken(tokens: Sequence[int]) -> str:
    """Tokens as text."""
    return str(words().decode([token for token in tokens if token != END]))


@functools.cache
def saved(
    exits: Sequence[int] = (), deepest: int = DECODER_BLOCKS, head: Heads = "short", precision: str = "fp32"
) -> Path:
    """The translator as a bundle, with one segment between exits; no token goes deeper than ``deepest``.

    With a "short" list of candidates, exits and full depth pick tokens of it; with a "screened" head, of all.
    """
    encoding = "" if precision == "fp32" else f"-{precision}"
    path = FOLDER / f"{head}-{'-'.join(map(str, exits))}-of-{deepest}{encoding}.offramp"
    if not (path / "manifest.json").is_file():
        say(f"exporting {path}")
        made = program(exits, deepest)
        if head == "screened":
            made = offramp.apply(made, [offramp.InsertScores("decoder", SCREENED)])
        if head == "short":
            scores = offramp.InsertScores("decoder", (MEASURE, PICK), (*exits, deepest), ids=translator.english())
            made = offramp.apply(made, [scores])
        # what fewer bits cost is in the tables
        offramp.save(made, path, precision, loss=math.inf, segments=1, generation=GENERATION, files=[TOKENS])
    return path


def program(exits: Sequence[int] = (), deepest: int = DECODER_BLOCKS) -> offramp.Program:
    """The trained translator with its caches."""
    return offramp.apply(translator.trained(exits, deepest), "insert-cache")


@functools.cache
def bundle(
    exits: Sequence[int] = (), deepest: int = DECODER_BLOCKS, head: Heads = "short", precision: str = "fp32"
) -> offramp.Chain:
    """What `saved` has saved, loaded."""
    return offramp.load(saved(exits, deepest, head, precision), threads=THREADS)


@functools.cache
def single(deepest: int = DECODER_BLOCKS) -> Way:
    """The decoder as one file in one session, with neither exits nor a short list: what one has without offramp."""
    path, name = saved((), deepest, head="whole"), FULL if deepest == DECODER_BLOCKS else cut(deepest)
    if not (path / _chains.SINGLE_FOLDER / _chains.SINGLE).exists():
        _chains.write_single(program((), deepest), path)
    return Way(name, Single(path, bundle((), deepest, head="whole"), THREADS), deepest=deepest)


def without_exits(weights: Path) -> Way:
    """The same model as it was trained without exits: what ``examples.translation.train --plain`` left."""
    made = captured.__wrapped__()  # with weights of its own
    load_weights(made, weights)
    path, plain = FOLDER / "plain.offramp", offramp.apply(made.without_dropout(), "insert-cache")
    offramp.save(plain, path, segments=1, generation=GENERATION)
    _chains.write_single(plain, path)
    return Way("trained without exits, one session", Single(path, offramp.load(path, threads=THREADS), THREADS))


def sources(split: str, count: int | None = None) -> list[list[int]]:
    """Sentences to translate, as token ids."""
    return [[*found.ids[:-1][: LONGEST - 1], END] for found in words().encode_batch(lines(f"{split}.de")[:count])]


def bleu(way: Way, split: str) -> float:
    """sacreBLEU of lowercased text."""
    references = lines(f"{split}.en")[: len(way.texts)]
    return float(sacrebleu.corpus_bleu(way.texts, [references]).score)


def measure(ways: Iterable[Way], split: str, count: int | None = None) -> list[Way]:
    """Let all translate the same sentences in turns, a few at a time; none is always the first after another."""
    found, texts = [way.anew() for way in ways], sources(split, count)
    for start in steps(range(0, len(texts), TURN), f"{split}, {len(found)} ways, turns of {TURN} sentences"):
        for k in range(len(found)):
            way = found[(start // TURN + k) % len(found)]
            way.anew().translate(start, texts[start])  # what ran before has left the processor's caches to others
            for sentence in range(start, min(start + TURN, len(texts))):
                way.translate(sentence, texts[sentence])
    return found


@torch.no_grad()
def perfect(full: Way, split: str, exits: Sequence[int], count: int | None = None) -> Way:
    """A perfect gate for each sentence that ``full`` has translated: it leaves where the pick is full depth's."""
    module, policies = translator.trained(range(1, DECODER_BLOCKS)).module, []
    few = torch.tensor(translator.english())
    for source, text in zip(sources(split, count), full.tokens, strict=True):
        made = module(
            input_ids=torch.tensor([source]),
            attention_mask=torch.ones(1, len(source), dtype=torch.int64),
            decoder_input_ids=torch.tensor([[BEGIN, *text[:-1]]]),
        )
        depths = np.full(len(text), DECODER_BLOCKS)
        for after in sorted(exits, reverse=True):
            picked = few[made[f"decoder.{after}/logits"][0][:, few].argmax(-1)]
            depths[picked.numpy() == np.array(text)] = after
        policies.append(Known(depths.tolist()))
    return Way(f"a perfect gate after {listed(exits)}", bundle(exits), policies.__getitem__)


def listed(exits: Sequence[int]) -> str:
    """Exits as text."""
    return ", ".join(map(str, exits))


def row(way: Way, full: Way, split: str) -> Row:
    """What is shown of a way: quality and time beside each other."""
    return {
        "set": split.removesuffix("_flickr"),
        "decoding": way.name,
        "BLEU": round(bleu(way, split), 2),
        "of full": f"{100 * bleu(way, split) / bleu(full, split):.1f}%",
        "blocks": float(np.mean([depth for row in way.depths for depth in row])),
        "decoder ms": way.milliseconds,
        "saved %": round(100 * (1 - way.milliseconds / full.milliseconds), 1),
        "tokens/s of full": round(_pace(way) / _pace(full), 2),
    }


def beside(rows: Sequence[Row]) -> list[Row]:
    """The rows, below each of an exit policy that of the static truncation which is as deep on average."""
    short = {row["decoding"]: row for row in rows}
    found = []
    for row in rows:
        found.append(row)
        truncated = short.get(cut(round(row["blocks"])))
        if row["decoding"].startswith(GATED) and truncated:
            found.append({**truncated, "decoding": f"  beside it: {truncated['decoding']}"})
    return found


def cut(blocks: int) -> str:
    """What a truncated model is called."""
    return f"truncated to {blocks}, one session"


def _pace(way: Way) -> float:
    return sum(map(len, way.tokens)) / sum(way.decoder)
