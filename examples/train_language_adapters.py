"""Train adapters with which SmolLM2 leaves early, on a part of WikiText-2; some minutes on one core.

    python -m examples.train_language_adapters [--tokens N] [--epochs N] [--out FILE]

Reads ``wikitext2/valid.txt`` in ``$OFFRAMP_DATA``, or in ``../shared/data`` beside the checkout. The exits learn what
the frozen last block says of each next token (self-distillation); the frozen blocks run once, see ``remember``.
"""

from __future__ import annotations

import argparse
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import torch
from tokenizers import Tokenizer
from torch import Tensor

import offramp
from examples._data import wikitext
from examples.train_speech_adapters import Among
from offramp import zoo
from offramp.program import Program
from offramp.training import CurvePoint, computes_bf16, fit
from offramp.training.batches import Batch
from offramp.training.objective_module import ObjectiveModule, remember
from offramp.training.objectives import Objective
from offramp.training.weights import save_weights

WEIGHTS = Path(__file__).with_name("language_adapters.safetensors")
COMMAND = "python -m examples.train_language_adapters"
EXITS = (20, 25, 28)
PIPELINE = f"insert-exits{{after={'|'.join(map(str, EXITS))}}},insert-adapter{{kind=norm-linear}}"
LENGTH, ROWS = 128, 4  # of a batch


def text(split: str) -> str:
    """A split of WikiText-2."""
    return wikitext(split).read_text(encoding="utf-8")


def batches(split: str, tokens: int) -> list[Batch]:
    """The first ``tokens`` tokens of a split, in rows of `LENGTH`."""
    (file,) = zoo.tokenizer_files("smollm2")
    ids = Tokenizer.from_file(str(file)).encode(text(split)[: tokens * 8]).ids[:tokens]
    rows = torch.tensor(ids[: len(ids) // LENGTH * LENGTH]).reshape(-1, LENGTH)
    return [{"input_ids": some} for some in rows.split(ROWS) if len(some) == ROWS]


def common(count: int) -> tuple[int, ...]:
    """The tokens that the validation text has most of."""
    (file,) = zoo.tokenizer_files("smollm2")
    found = Counter(Tokenizer.from_file(str(file)).encode(text("valid")).ids)
    return tuple(token for token, _ in found.most_common(count))


def program() -> Program:
    """SmolLM2 with its exits and adapters, as they start."""
    return offramp.apply(offramp.capture(*zoo.load("smollm2")), PIPELINE)


def by_depth(program: Program, batches: Sequence[Batch]) -> dict[int, tuple[float, float]]:
    """Perplexity, and how often the likeliest token is full depth's, at each exit and at full depth."""
    model = ObjectiveModule(program, Objective())
    (stack,) = program.stacks.values()
    outputs = {item.after: item.outputs["logits"] for item in program.exits_of(stack.name)} | {stack.blocks: "logits"}
    losses, same, count = dict.fromkeys(outputs, 0.0), dict.fromkeys(outputs, 0), 0
    for batch in batches:
        targets = batch["input_ids"][:, 1:]
        count += targets.numel()
        with torch.inference_mode():
            values = model.values(outputs.values(), batch)
        best = values["logits"].argmax(-1)
        for after, name in outputs.items():
            logits: Tensor = values[name]
            losses[after] += float(torch.nn.functional.cross_entropy(logits[:, :-1].mT, targets, reduction="sum"))
            same[after] += int((logits.argmax(-1) == best)[:, :-1].sum())
    return {after: (float(torch.tensor(losses[after] / count).exp()), same[after] / count) for after in outputs}


def show(point: CurvePoint) -> None:
    losses = ", ".join(f"{name} {value:.3f}" for name, value in point.losses.items())
    print(f"step {point.step:5} epoch {point.epoch:5.1f}  {losses}  {point.seconds:5.0f} s", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--tokens", type=int, default=24_000)
    parser.add_argument("--epochs", type=int, default=2)
    parser.add_argument("--out", type=Path, default=WEIGHTS)
    args = parser.parse_args()
    trained = program()
    (stack,) = trained.stacks
    given = batches("valid", args.tokens)
    with torch.autocast("cpu", torch.bfloat16, computes_bf16("cpu")):
        states = remember(trained, given, stack, dtype=torch.float32)
    print(f"{len(states)} batches of {ROWS} x {LENGTH} tokens", flush=True)
    objective = Among.of(given, "input_ids", hard=0.5)
    fit(trained, states, objective, epochs=args.epochs, precision="auto", warmup=20, progress=show, log_every=20)
    save_weights(trained, args.out, dtype=torch.float16)
    print(f"wrote {args.out}: {args.out.stat().st_size:,} bytes")


if __name__ == "__main__":
    main()
