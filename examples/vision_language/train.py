"""Train the model that answers questions about images and describes them, on easy-VQA; an hour on two cores.

    python -m examples.vision_language.train [--form joint|separate|plain] [--epochs N] [--out DIRECTORY]

Needs ``pip install --no-deps easy-vqa==1.0``. An exit after every decoder block but the last learns with the model:
``L_avg + L_N`` of DEED (arXiv 2311.08623), two exits drawn at each step. Patches and words leave the encoder at exits
of their own (MuE, arXiv 2211.11152), which are drawn for each row: visible to the others as they are (``joint``), or
encoded without seeing each other (``separate``). ``--form plain`` trains the same model without exits. An interrupted
run goes on when started again. At the end: what share of the questions is answered, and of the requests with one of
the sentences that fit.
"""

from __future__ import annotations

import argparse
import functools
import importlib.util
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from tokenizers import Tokenizer
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

import offramp
from examples.vision_language.data import REQUESTS, Batches, Split, Task, collated, load, tokenizer
from examples.vision_language.model import BEGIN, END, LONGEST, VisionLanguage, example
from offramp.program import Program
from offramp.training import CurvePoint, fit
from offramp.training.encoder_depths import EncoderDepths
from offramp.training.objectives import CrossEntropy, DeepSupervision, Objective
from offramp.training.weights import save_weights
from offramp.zoo._declare import Generation

GENERATION: Generation = {
    "prompt": [BEGIN],
    "stop": [END],
    "suppress": [],
    "suppress_first": [],
    "max_length": LONGEST,
}
KINDS = {"yes": "yes or no", "no": "yes or no", "circle": "shape", "rectangle": "shape", "triangle": "shape"}


@functools.cache
def captured(vocabulary: int) -> Program:
    """The model, captured; weights as they start."""
    torch.manual_seed(0)
    return offramp.capture(VisionLanguage(vocabulary), example(), training=True)


def program(
    vocabulary: int, form: str = "joint", exits: Mapping[str, Sequence[int]] | None = None, tokens: str = "group"
) -> Program:
    """The model with exits after every block, in the decoder with an adapter at each; or by stack after ``exits``.

    The weights of all that this returns are the same, but for those of adapters. ``tokens`` of a modality leave the
    encoder as a "group", or each "token" by itself.
    """
    if form == "plain":
        return captured(vocabulary)
    split = offramp.apply(captured(vocabulary), f"split-modalities{{form={form},tokens={tokens}}}")
    pipeline = []
    for name in split.stacks if exits is None else [name for name, after in exits.items() if after]:
        after = "all" if exits is None else "|".join(map(str, exits[name]))
        pipeline.append(f"insert-exits{{stack={name},after={after}}}")
        if name == "decoder":
            pipeline.append("insert-adapter{stack=decoder}")
        measures = "top1|entropy|cosine|prediction" if name == "decoder" else "cosine"
        pipeline.append(f"insert-scores{{stack={name},measure={measures}}}")
    return offramp.apply(split, ",".join(pipeline)) if pipeline else split


@torch.no_grad()
def said(module: nn.Module, batch: dict[str, Tensor], most: int) -> list[list[int]]:
    """The words that are likeliest one by one, up to `END`, at full depth."""
    inputs = {name: batch[name] for name in ("pixel_values", "input_ids", "attention_mask")}
    ids = torch.full((len(inputs["input_ids"]), 1), BEGIN)
    for _ in range(most):
        chosen = module(**inputs, decoder_input_ids=ids)["logits"][:, -1].argmax(-1)
        chosen[(ids == END).any(1)] = END
        ids = torch.cat([ids, chosen[:, None]], 1)
        if bool((ids == END).any(1).all()):
            break
    return [row[: row.index(END)] if END in row else row for row in ids[:, 1:].tolist()]


def answered(trained: Program, split: Split, tasks: Sequence[Task], words: Tokenizer, most: int) -> list[str]:
    """What the model says to each task."""
    texts = []
    for start in range(0, len(tasks), 256):
        images, asked, answers = zip(*tasks[start : start + 256], strict=True)
        batch = collated(split.pixels[list(images)], asked, answers, words)
        texts += words.decode_batch(said(trained.module, batch, most))
    return texts


def score(trained: Program, split: Split, words: Tokenizer) -> None:
    """Print what share of the questions is answered, and of the images described, one request of each."""
    right: dict[str, list[bool]] = {}
    for task, text in zip(split.questions, answered(trained, split, split.questions, words, 1), strict=True):
        right.setdefault(KINDS.get(task[2], "colour"), []).append(text == task[2])
    every = [one for kind in right.values() for one in kind]
    shares = ", ".join(f"{kind} {sum(ones) / len(ones):.3f}" for kind, ones in sorted(right.items()))
    print(f"{split.name}: {sum(every) / len(every):.3f} of {len(every)} questions ({shares})")

    requests = split.requests[0 :: len(REQUESTS) + 1]  # of every image but each fourth, all ways of asking in turn
    texts = answered(trained, split, requests, words, LONGEST - 1)
    fitting = [split.scenes[image].sentences(asked) for image, asked, _ in requests]
    exact = sum(text in those for text, those in zip(texts, fitting, strict=True)) / len(texts)
    print(f"{split.name}: {exact:.3f} of {len(texts)} descriptions{bleu(texts, fitting)}; for example: {texts[0]}")


def bleu(texts: list[str], fitting: list[list[str]]) -> str:
    """sacreBLEU against all sentences that fit, as text; nothing where it is not installed."""
    if importlib.util.find_spec("sacrebleu") is None:
        return ""
    import sacrebleu

    return f", BLEU {sacrebleu.corpus_bleu(texts, list(map(list, zip(*fitting, strict=True)))).score:.1f}"


def show(point: CurvePoint) -> None:
    """Print a point of the curve."""
    print(f"step {point.step:6} epoch {point.epoch:6.2f} loss {point.loss:.3f} {point.seconds:6.0f} s", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--form", choices=("joint", "separate", "plain"), default="joint")
    parser.add_argument("--epochs", type=int, default=8)
    parser.add_argument("--out", type=Path, default=Path("build/vision_language"))
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    words = tokenizer()
    words.save(str(args.out / "tokenizer.json"))
    size = words.get_vocab_size()
    trained = program(size, args.form)
    objective: Objective = CrossEntropy()
    if args.form != "plain":
        objective = EncoderDepths(DeepSupervision(stack="decoder", sample=2))

    with sdpa_kernel(SDPBackend.MATH):  # on a CPU the backward pass of the fused kernel takes longer
        fit(
            trained,
            Batches(load("train"), words),
            objective,
            epochs=args.epochs,
            train="all",
            rate=1e-3,
            warmup=300,
            optimizer=lambda weights: torch.optim.AdamW(weights, 1e-3, (0.9, 0.98), 1e-9, 1e-2),
            precision="auto",
            folder=args.out / args.form,
            progress=show,
        )
    file = args.out / f"{args.form}.safetensors"
    save_weights(trained, file, "all", torch.float16)
    print(f"wrote {file}: {file.stat().st_size:,} bytes")
    for name in ("validation", "test"):
        score(trained, load(name), words)


if __name__ == "__main__":
    main()
