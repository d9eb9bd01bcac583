"""Do early exits pay on a real task? SST-2 test, MiniLM with its own heads: threshold against accuracy and time.

The calibrated policies are chosen on dev (phrases and sentences), and never saw the test set (sentences).
"""

from __future__ import annotations

import argparse
import functools
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

import offramp
from benchmarks._common import BUILD, Row, alternate, data, report, rounds, say, shown, spread
from offramp import zoo
from offramp.zoo import minilm

BATCHES = (1, 32)
THRESHOLDS = (0.55, 0.6, 0.7, 0.8, 0.9)
KEEP = (0.99, 0.98)
EXITS = "1|2|3|4|5"


def bundle(precision: str = "fp32") -> Path:
    """MiniLM with an exit after each block, and the heads that were trained for them."""
    path = BUILD / ("sentiment.offramp" if precision == "fp32" else f"sentiment-{precision}.offramp")
    program = offramp.capture(*zoo.load("minilm"))
    program = offramp.apply(
        program, f"insert-exits{{after={EXITS},head=own}},insert-scores{{measure=top1|margin|entropy}}"
    )
    with torch.no_grad():
        for after, head in minilm.exit_heads().items():
            for name, weight in head.items():
                program.module.get_parameter(f"exits.encoder.{after}.classifier.{name}").copy_(weight)
    offramp.save(program, path, precision, loss=math.inf)  # what it costs is in the table
    return path


def sentences(split: str) -> list[tuple[str, int]]:
    """Sentences and their labels."""
    lines = (data("sst2") / f"{split}.tsv").read_text().splitlines()[1:]
    return [(text, int(label)) for text, label in (line.split("\t") for line in lines)]


def calibrated(chain: offramp.Chain, keep: float) -> offramp.Policy:
    """The policy that keeps so much of the accuracy on dev, with a confidence of 0.95; prints how it was chosen."""
    rows = sentences("dev")
    encoded = [{name: array.numpy() for name, array in minilm.tokenize(text).items()} for text, _ in rows]
    examples = [{**inputs, "labels": [label]} for inputs, (_, label) in zip(encoded, rows, strict=True)]
    found = offramp.calibrate(chain, examples, keep=keep)
    print(f"keep {keep}:", json.dumps(found.record))
    return found.policy


def batches(size: int) -> tuple[list[dict[str, np.ndarray[Any, Any]]], np.ndarray[Any, Any]]:
    """The 872 test sentences in batches of near-equal length, and their labels in that order."""
    rows = sentences("test")
    if size > 1:
        rows.sort(key=lambda row: len(row[0]))
    encoded = [minilm.tokenize(*[text for text, _ in rows[i : i + size]]) for i in range(0, len(rows), size)]
    labels = np.array([label for _, label in rows])
    return [{name: tensor.numpy() for name, tensor in batch.items()} for batch in encoded], labels


def main() -> None:
    """Print one table: accuracy and time in one row."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    rounds(parser)
    args = parser.parse_args()
    say("exporting")
    chain = offramp.load(bundle())
    last = chain.stacks["encoder"].blocks
    policies: dict[str, offramp.Policy] = {"full depth": offramp.Never()}
    policies |= {f"always after {after}": offramp.Depth({"encoder": after}) for after in (1, 2, 3, 5)}
    for kept in ((2, 3, 4, 5), (3, 5)):
        for threshold in THRESHOLDS:
            name = f"top1 >= {threshold:.2f} after {', '.join(map(str, kept))}"
            policies[name] = offramp.Confidence(thresholds=dict.fromkeys(kept, threshold))
    policies |= {f"calibrated keep={keep}": calibrated(chain, keep) for keep in KEEP}
    rows = spread([measured(chain, policies) for _ in range(args.rounds)])
    report("sentiment", f"SST-2 test, 872 sentences, MiniLM of {last} blocks; holds: accuracy >= full depth", rows)


def measured(chain: offramp.Chain, policies: Mapping[str, offramp.Policy]) -> list[Row]:
    """A row for each policy and batch size."""
    rows = []
    for size in BATCHES:
        say(f"batches of {size}: {len(policies)} policies in turns")
        inputs, labels = batches(size)

        def sweep(policy: offramp.Policy, inputs: list[Any] = inputs) -> list[offramp.Result]:
            return [chain.run(batch, policy) for batch in inputs]

        times = alternate({name: functools.partial(sweep, policy) for name, policy in policies.items()}, 1.0, least=3)
        full = 0.0
        for name, policy in policies.items():
            results = sweep(policy)
            answers = np.concatenate([result.outputs["logits"].argmax(-1) for result in results])
            depth = np.concatenate([result.exits["encoder"] for result in results])
            accuracy = float((answers == labels).mean())
            full = full or accuracy
            rows.append(
                shown(
                    {
                        "batch": size,
                        "policy": name,
                        "accuracy": round(accuracy, 4),
                        "holds": "yes" if accuracy >= full else "no",
                        "mean blocks": round(float(depth.mean()), 2),
                        "ms a sentence": times[name] / len(labels),
                        "speed-up": round(times["full depth"] / times[name], 2),
                    }
                )
            )
    return rows


if __name__ == "__main__":
    main()
