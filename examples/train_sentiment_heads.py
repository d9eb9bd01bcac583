"""Train the sentiment heads of zoo:minilm: one linear probe of the frozen encoder after each block.

    python examples/train_sentiment_heads.py [--output FILE]

Reads SST-2 as ``sst2/{train,dev,test}.tsv`` (header, then ``sentence<TAB>label``) in ``$OFFRAMP_DATA``, or in
``../shared/data`` beside the checkout. Takes about five minutes on two idle cores.

Each head is a logistic regression on the masked mean of the hidden state after its block. The features are
standardised for the fit, and the standardisation is folded into the weights. Most training rows are fragments
of a sentence while the task is whole sentences, so a row may weigh more the longer it is; that weighting and
the L2 penalty are chosen by the loss on the long rows of dev, which judges confidence as well as accuracy.
Nothing is chosen on test.
"""

from __future__ import annotations

import argparse
import itertools
import os
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from safetensors.torch import save_file
from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits

from offramp.zoo import minilm

SPLITS = ("train", "dev", "test")
TOKENS_A_BATCH = 2048
LONG = 14  # tokens of a dev row that resembles a whole sentence
LENGTH_POWERS = (0.0, 1.0, 2.0)  # a row weighs (its tokens) ** power
PENALTIES = (1e-4, 1e-3, 1e-2)
NEWTON_STEPS = 20


@dataclass(frozen=True)
class Split:
    """Features ``[depth, rows, 384]`` float16, labels ``[rows]`` of 0 and 1, token counts ``[rows]``."""

    features: npt.NDArray[np.float16]
    labels: Tensor
    lengths: Tensor


@dataclass(frozen=True)
class Head:
    """A binary logistic regression: score = ``features @ weight + bias``, positive for label 1."""

    weight: Tensor
    bias: Tensor

    def scores(self, features: Tensor) -> Tensor:
        return features @ self.weight + self.bias

    def tensors(self, prefix: str) -> dict[str, Tensor]:
        """The same as a linear layer of two outputs, whose difference is the score."""
        return {
            f"{prefix}classifier.weight": torch.stack((-self.weight, self.weight)) / 2,
            f"{prefix}classifier.bias": torch.stack((-self.bias, self.bias)) / 2,
        }


def data_folder() -> Path:
    named = os.environ.get("OFFRAMP_DATA")
    root = Path(named) if named else Path(__file__).resolve().parents[2] / "shared" / "data"
    folder = root / "sst2"
    missing = [f"{split}.tsv" for split in SPLITS if not (folder / f"{split}.tsv").is_file()]
    if missing:
        sys.exit(
            f"no {', '.join(missing)} in {folder}\n"
            "  This is SST-2 of the GLUE benchmark (gluebenchmark.com): a header line, then lines of\n"
            "  'sentence<TAB>label'. test.tsv is GLUE's dev set; dev.tsv is a tenth of its training set.\n"
            "  try: OFFRAMP_DATA=DIR, where DIR/sst2 has these files"
        )
    return folder


def read(path: Path) -> tuple[list[str], Tensor]:
    rows = [line.rsplit("\t", 1) for line in path.read_text(encoding="utf-8").splitlines()[1:]]
    return [text.strip() for text, _ in rows], torch.tensor([int(label) for _, label in rows])


@torch.inference_mode()
def extract(path: Path) -> Split:
    """The mean-pooled hidden state of every row after every block; rows of similar length share a batch."""
    texts, labels = read(path)
    encoder, pool = minilm.encoder(), minilm.MeanPool()
    blocks = encoder.config.num_hidden_layers
    features = np.empty((blocks, len(texts), encoder.config.hidden_size), dtype=np.float16)
    lengths = minilm.tokenize(*texts)["attention_mask"].sum(dim=1)
    order = lengths.argsort(stable=True)
    start = 0
    while start < len(order):
        longest = int(lengths[order[min(start + 64, len(order) - 1)]])
        rows = order[start : start + TOKENS_A_BATCH // longest]
        start += len(rows)
        batch = minilm.tokenize(*(texts[row] for row in rows.tolist()))
        hidden = encoder(**batch, output_hidden_states=True).hidden_states[1:]
        for block, state in enumerate(hidden):
            features[block, rows.numpy()] = pool(state, batch["attention_mask"]).numpy()
    return Split(features, labels, lengths)


def accuracy(scores: Tensor, labels: Tensor) -> float:
    return ((scores > 0) == (labels == 1)).float().mean().item()


def fit(features: Tensor, labels: Tensor, row_weights: Tensor, penalty: float) -> Head:
    """Newton's method on the weighted logistic loss; ``features [rows, 384]`` float32, standardised."""
    rows = torch.cat((features, torch.ones(len(features), 1)), dim=1)
    share = row_weights / row_weights.sum()
    ridge = torch.full((rows.shape[1],), 2 * penalty, dtype=torch.float64)
    ridge[-1] = 0.0  # the bias
    solution = torch.zeros_like(ridge)
    for _ in range(NEWTON_STEPS):
        probability = torch.sigmoid(rows @ solution.float())
        gradient = rows.T @ (share * (probability - labels)) + ridge * solution
        curvature = share * probability * (1 - probability)
        hessian = (rows.T @ (rows * curvature[:, None])).double() + ridge.diag()
        step = torch.linalg.solve(hessian, gradient)
        solution -= step
        if step.abs().max() < 1e-5:
            break
    else:
        raise RuntimeError(f"Newton's method has not converged in {NEWTON_STEPS} steps: {step.abs().max():.1e}")
    return Head(solution[:-1].float(), solution[-1].float())


def train(train_split: Split, dev: Split, block: int) -> tuple[Head, float, float]:
    """The best head for one block with the length power and the penalty that were chosen."""
    features = torch.from_numpy(train_split.features[block]).float()
    mean, deviation = features.mean(dim=0), features.std(dim=0).clamp(min=1e-3)  # some features are constant
    features = (features - mean) / deviation
    long = dev.lengths >= LONG
    held_out = (torch.from_numpy(dev.features[block]).float()[long] - mean) / deviation

    best: tuple[float, Head, float, float] | None = None
    for power, penalty in itertools.product(LENGTH_POWERS, PENALTIES):
        head = fit(features, train_split.labels, train_split.lengths.float() ** power, penalty)
        loss = binary_cross_entropy_with_logits(head.scores(held_out), dev.labels[long].float()).item()
        if best is None or loss < best[0]:
            best = (loss, head, power, penalty)
    assert best is not None
    _, head, power, penalty = best
    weight = head.weight / deviation
    return Head(weight, head.bias - weight @ mean), power, penalty


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--output", type=Path, default=minilm.HEADS)
    output: Path = parser.parse_args().output

    folder = data_folder()
    start = time.perf_counter()
    splits = {}
    for name in SPLITS:
        splits[name] = extract(folder / f"{name}.tsv")
        print(f"{name}: {len(splits[name].labels):,} rows, {time.perf_counter() - start:.0f} s", flush=True)

    blocks = splits["train"].features.shape[0]
    tensors: dict[str, Tensor] = {}
    print("depth  dev    test   length power  L2")
    for block in range(blocks):
        depth = block + 1
        head, power, penalty = train(splits["train"], splits["dev"], block)
        tensors |= head.tensors("" if depth == blocks else f"exits.encoder.{depth}.")
        dev, test = (
            accuracy(head.scores(torch.from_numpy(splits[name].features[block]).float()), splits[name].labels)
            for name in ("dev", "test")
        )
        print(f"{depth:5}  {dev:.3f}  {test:.3f}  {power:12g}  {penalty:g}", flush=True)
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, output)
    print(f"wrote {output.name}: {output.stat().st_size:,} bytes, {time.perf_counter() - start:.0f} s")


if __name__ == "__main__":
    main()
