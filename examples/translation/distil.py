"""Train the translator's shallow exits on the model's own translations, so that most tokens can leave early.

    python -m examples.translation.distil [--out DIRECTORY]

Goes on from ``exits.safetensors``, which ``examples.translation.train`` left in the same directory. Full depth
translates the training set with four beams, and all depths learn from that (sequence-level distillation: Kim and
Rush, arXiv 1606.07947): one translation for each sentence is what few blocks can learn. Exits also follow full depth's
probabilities, token by token. The second phase goes slower, and weighs most the exits that are used most. Takes one and
a half times as long as the training before; an interrupted run goes on.
"""

from __future__ import annotations

import argparse
import json
from functools import partial
from pathlib import Path

import torch
from tokenizers import Tokenizer

import offramp
from examples.translation.train import Batches, program, show
from offramp.training.fitting import fit
from offramp.training.objectives import DeepSupervision, SelfDistillation, Together
from offramp.training.weights import load_weights, save_weights
from offramp.zoo.translator import BEGIN, END, LONGEST

PHASES = (  # epochs, learning rate, weights of the depths
    (12, 1e-3, {1: 0.4, 2: 0.3, 3: 0.2, 4: 0.1, 5: 0.1, 6: 0.1, 7: 0.1, 8: 1.0}),
    (6, 5e-4, {1: 0.4, 2: 0.6, 3: 0.3, 4: 0.6, 5: 0.3, 6: 0.1, 7: 0.1, 8: 1.0}),
)


def translated(batches: Batches, weights: Path, out: Path) -> list[list[int]]:
    """The training sentences in English, by full depth; what is in ``out`` already is not made again."""
    found = [json.loads(line) for line in out.read_text().splitlines()] if out.is_file() else []
    exact = program(())
    load_weights(exact, weights, part=True)
    bundle = out.with_name("full.offramp")
    offramp.save(offramp.apply(exact.without_dropout(), "insert-cache"), bundle, segments=1)
    chain = offramp.load(bundle, threads=1)
    with out.open("a") as file:
        for source, _ in batches.pairs[len(found) :]:
            inputs = {"input_ids": [source], "attention_mask": [[1] * len(source)], "decoder_input_ids": [[BEGIN]]}
            room = min(2 * len(source) + 10, LONGEST - 1)
            made = chain.generate(inputs, offramp.Never(), beams=4, stop=[END], max_new_tokens=room)
            found.append([int(token) for token in made.tokens[0] if token != END])
            file.write(json.dumps(found[-1]) + "\n")
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("build/translation"))
    out = parser.parse_args().out
    file = out / "exits.safetensors"
    batches = Batches("train", Tokenizer.from_file(str(out / "tokenizer.json")))
    own = translated(batches, file, out / "translated.jsonl")
    batches.pairs = [(source, text[: LONGEST - 2]) for (source, _), text in zip(batches.pairs, own, strict=True)]
    for number, (epochs, rate, shares) in enumerate(PHASES, 1):
        batches.set_epoch(0)
        trained = program()
        load_weights(trained, file)
        file = out / f"distilled-{number}.safetensors"
        if file.is_file():
            continue
        fit(
            trained,
            batches,
            Together((DeepSupervision(sample=2, weights=shares, smoothing=0.1), SelfDistillation(sample=2))),
            epochs=epochs,
            train="all",
            rate=rate,
            warmup=300,
            optimizer=partial(torch.optim.AdamW, lr=rate, betas=(0.9, 0.98), eps=1e-9, weight_decay=1e-4),
            precision="auto",
            folder=out / f"phase-{number}",
            progress=show,
        )
        save_weights(trained, file, "all", torch.float16)
        print(f"wrote {file}: {file.stat().st_size:,} bytes")


if __name__ == "__main__":
    main()
