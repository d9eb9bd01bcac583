"""Train the translator with an exit after every decoder block, on Multi30k; about an hour on two cores.

    python -m examples.translation.train [--plain] [--epochs N] [--out DIRECTORY]

Reads ``multi30k/train.{de,en}.gz`` (lowercased here) in ``$OFFRAMP_DATA``, or in ``../shared/data`` beside the
checkout. Deep supervision as in DEED (arXiv 2311.08623): ``L_avg + L_N``, two of the seven exits drawn at each step.
``--plain`` trains the same model without exits. An interrupted run goes on when started again.
"""

from __future__ import annotations

import argparse
import functools
import gzip
import random
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from torch import Tensor, nn

import offramp
from examples._data import data
from offramp.program import Program
from offramp.training import CurvePoint, fit
from offramp.training.losses import IGNORED
from offramp.training.objectives import CrossEntropy, DeepSupervision
from offramp.training.weights import save_weights
from offramp.zoo.translator import (
    BEGIN,
    DECODER_BLOCKS,
    END,
    LONGEST,
    PAD,
    VOCABULARY,
    Translator,
    example,
    with_exits,
)

TOKENS_A_BATCH = 3000


def lines(name: str) -> list[str]:
    """The sentences of one file of Multi30k."""
    path = data(f"multi30k/{name}.gz", "Multi30k (github.com/multi30k/dataset): captions, one a line")
    return [line.strip().lower() for line in gzip.open(path, "rt", encoding="utf-8")]


def tokenizer() -> Tokenizer:
    """Byte pairs of both languages, in lowercase, with `END` after every text."""
    made = Tokenizer(models.BPE(unk_token="<unk>"))
    made.normalizer = normalizers.Sequence([normalizers.NFC(), normalizers.Lowercase()])
    made.pre_tokenizer = pre_tokenizers.Metaspace()
    made.decoder = decoders.Metaspace()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY, special_tokens=["<pad>", "<s>", "</s>", "<unk>"], show_progress=False
    )
    made.train_from_iterator(lines("train.de") + lines("train.en"), trainer)
    made.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", END)])
    return made


class Batches:
    """Pairs of similar length together, about as many tokens in each batch, shuffled anew each epoch."""

    def __init__(self, split: str, words: Tokenizer) -> None:
        source, target = (
            words.encode_batch(lines(f"{split}.{language}"), add_special_tokens=False) for language in ("de", "en")
        )
        pairs = zip(source, target, strict=True)
        self.pairs = [([*s.ids[: LONGEST - 1], END], t.ids[: LONGEST - 2]) for s, t in pairs]
        self.set_epoch(0)

    def set_epoch(self, epoch: int) -> None:
        """Deal the batches of an epoch."""
        dice = random.Random(epoch)
        order = sorted(
            self.pairs, key=lambda pair: (len(pair[1]) + dice.random() * 2, len(pair[0]) + dice.random() * 4)
        )
        self.batches: list[list[tuple[list[int], list[int]]]] = [[]]
        for pair in order:
            longest = max(max(len(s), len(t) + 1) for s, t in (*self.batches[-1], pair))
            if longest * (len(self.batches[-1]) + 1) > TOKENS_A_BATCH:
                self.batches.append([])
            self.batches[-1].append(pair)
        dice.shuffle(self.batches)

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        for pairs in self.batches:
            source = nn.utils.rnn.pad_sequence([torch.tensor(s) for s, _ in pairs], True, PAD)
            target = nn.utils.rnn.pad_sequence([torch.tensor([BEGIN, *t]) for _, t in pairs], True, PAD)
            labels = nn.utils.rnn.pad_sequence([torch.tensor([*t, END]) for _, t in pairs], True, IGNORED)
            yield {
                "input_ids": source,
                "attention_mask": (source != PAD).long(),
                "decoder_input_ids": target,
                "labels": labels,
            }


@functools.cache
def captured() -> Program:
    """The translator, captured; weights as they start."""
    torch.manual_seed(0)
    return offramp.capture(Translator(), example(), training=True)


def program(exits: Sequence[int] = range(1, DECODER_BLOCKS)) -> Program:
    """The translator with exits in its decoder; the weights of all that this returns are the same."""
    return with_exits(captured(), exits) if exits else captured()


def show(point: CurvePoint) -> None:
    """Print a point of the curve."""
    print(f"step {point.step:6} epoch {point.epoch:6.2f} loss {point.loss:.3f} {point.seconds:6.0f} s", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--plain", action="store_true", help="without exits")
    parser.add_argument("--epochs", type=int, default=16)
    parser.add_argument("--out", type=Path, default=Path("build/translation"))
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    words = tokenizer()
    words.save(str(args.out / "tokenizer.json"))
    trained = program(()) if args.plain else program()
    objective = CrossEntropy(smoothing=0.1) if args.plain else DeepSupervision(sample=2, smoothing=0.1)

    fit(
        trained,
        Batches("train", words),
        objective,
        epochs=args.epochs,
        train="all",
        rate=2e-3,
        warmup=1000,
        optimizer=lambda weights: torch.optim.AdamW(weights, 2e-3, (0.9, 0.98), 1e-9, 1e-4),
        precision="auto",
        folder=args.out / ("plain" if args.plain else "exits"),
        progress=show,
    )
    file = args.out / ("plain.safetensors" if args.plain else "exits.safetensors")
    save_weights(trained, file, "all", torch.float16)
    print(f"wrote {file}: {file.stat().st_size:,} bytes")


if __name__ == "__main__":
    main()
