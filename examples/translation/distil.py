"""Train the translator's shallow exits on the model's own translations, so that most tokens can leave early.

    python -m examples.translation.distil [--epochs N] [--out DIRECTORY]

Goes on from ``exits.safetensors``, which ``examples.translation.train`` left in the same directory. Full depth
translates the training set with four beams, and all depths learn from that (sequence-level distillation: Kim and
Rush, arXiv 1606.07947): one translation for each sentence is what few blocks can learn. Exits also follow full depth's
probabilities, token by token. Both take about as long as the training before; an interrupted run goes on.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch
from tokenizers import Tokenizer

import offramp
from examples.translation.model import BEGIN, END, LONGEST
from examples.translation.train import Batches, program, show
from offramp.training.loop import fit
from offramp.training.objectives import DeepSupervision, SelfDistillation, Together
from offramp.training.weights import load_weights, save_weights

SHARES = {1: 0.4, 2: 0.3, 3: 0.2, 4: 0.1, 5: 0.1, 6: 0.1, 7: 0.1, 8: 1.0}


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
            inputs = {"source": [source], "source_mask": [[1] * len(source)], "target": [[BEGIN]]}
            room = min(2 * len(source) + 10, LONGEST - 1)
            made = chain.generate(inputs, offramp.Never(), beams=4, stop=[END], max_new_tokens=room)
            found.append([int(token) for token in made.tokens[0] if token != END])
            file.write(json.dumps(found[-1]) + "\n")
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--epochs", type=int, default=12)
    parser.add_argument("--out", type=Path, default=Path("build/translation"))
    args = parser.parse_args()
    first = args.out / "exits.safetensors"
    batches = Batches("train", Tokenizer.from_file(str(args.out / "tokenizer.json")))
    own = translated(batches, first, args.out / "translated.jsonl")
    batches.pairs = [(source, text[: LONGEST - 2]) for (source, _), text in zip(batches.pairs, own, strict=True)]
    batches.set_epoch(0)
    trained = program()
    load_weights(trained, first)
    fit(
        trained,
        batches,
        Together((DeepSupervision(sample=2, weights=SHARES, smoothing=0.1), SelfDistillation(sample=2))),
        epochs=args.epochs,
        train="all",
        rate=1e-3,
        warmup=300,
        optimizer=lambda weights: torch.optim.AdamW(weights, 1e-3, (0.9, 0.98), 1e-9, 1e-4),
        precision="bf16",
        folder=args.out / "distilled",
        progress=show,
    )
    file = args.out / "distilled.safetensors"
    save_weights(trained, file, "all", torch.float16)
    print(f"wrote {file}: {file.stat().st_size:,} bytes")


if __name__ == "__main__":
    main()
