"""Does adaptive width pay? ViT-S on CIFAR-10: at the same share of the blocks' FLOPs, accuracy and time in one row.

One model with learners and exits serves all shares, by the width that its gates are given and by its thresholds; so
does one with exits alone. All are chosen on held-out images. Each static student is a model of its own. All learn from
one teacher; all are measured in turns. "share" is what the test images took.

``--train`` trains what is missing, half an hour to an hour and a half a model on one core; trained weights are kept in
``benchmarks/results/vision_acm``.
"""

from __future__ import annotations

import argparse
import copy
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

import offramp
from benchmarks import _vision as vision
from benchmarks._common import BUILD, Row, alternate, report, rounds, say, shown, spread
from benchmarks._vision import DEPTH, EXITS, LEARNERS, Recipe, captured, share, width_of
from offramp import training
from offramp.program import Program

SHARES = (0.75, 0.6, 0.4, 0.25)
OF_ONE = (0.75, 0.6, 0.5, 0.4, 0.3, 0.25)  # of a model that serves them all
OVER = 0.02  # a share may be that much more on held-out images: fewer blocks have .417 for four tenths
BOTH = (7, 9)  # exits of the model that has learners too
NEVER = 2.0  # a confidence that none has
WIDTHS = (0.6, 0.55, 0.5, 0.45, 0.4, 0.35, 0.3, 0.25, 0.2, 0.1)
CONFIDENCES = (0.0, *(each / 50 for each in range(20, 50)), NEVER)
BATCHES = (1, 16)
TIMED = 32  # images a turn
LOSS = 0.1  # of the outputs' scale in 8 bits: the table says what it costs
Examples = list[dict[str, np.ndarray[Any, Any]]]


@dataclass(frozen=True)
class Way:
    """A model, and how it runs; ``executed`` is its share of the blocks' FLOPs, of what a run says."""

    kind: str
    chain: offramp.Chain
    executed: Callable[[Sequence[offramp.Result]], float]
    policy: offramp.Policy | None = None


def examples(part: str, size: int, count: int | None = None) -> tuple[Examples, np.ndarray[Any, Any]]:
    """So many images in batches, as the model reads them, and their labels."""
    images, labels = vision.cifar(part)
    given = [{"pixel_values": vision.pixels(each).numpy()} for each in images[:count].split(size)]
    return given, labels[:count].numpy()


def chain(name: str, program: Program, precision: str) -> offramp.Chain:
    """The program as a bundle, loaded."""
    path = BUILD / f"vision_acm.{name}.{precision}.offramp"
    path.parent.mkdir(parents=True, exist_ok=True)
    loss = None if precision == "fp32" else LOSS
    offramp.save(program, path, precision, loss=loss, samples=examples("held out", 16, 32)[0])
    return offramp.load(path)


class Students:
    """The teacher's students, trained or read."""

    def __init__(self, taught: Recipe, recipe: Recipe, folder: Path, read_only: bool, precision: str) -> None:
        self.recipe, self.folder, self.read_only = recipe, folder, read_only
        self.chain = partial(chain, precision=precision)
        self.model = vision.untrained()
        self.teacher = captured(self.model)
        learn = training.CrossEntropy(smoothing=0.1)
        if not self.trained("teacher", lambda: self.teacher, lambda: taught.fit(self.teacher, learn)):
            raise SystemExit("without a teacher there is nothing to compare with: --train")

    def trained(
        self, name: str, made: Callable[[], Program], train: Callable[[], object] | None = None
    ) -> Program | None:
        """A program with its weights: read, or learnt from the teacher and written; None if it is left out."""
        path = self.folder / f"{name}.safetensors"
        if not path.exists() and self.read_only:
            say(f"{name} is left out: there is no {path}")
            return None
        program = made()
        if not path.exists():
            say(f"training {name}")
            if train:
                train()
            else:
                vision.distil(program, self.teacher, self.recipe)
            self.folder.mkdir(parents=True, exist_ok=True)
            training.save_weights(program, path, "all", torch.bfloat16)
        training.load_weights(program, path)
        return program

    def static(self) -> list[Way]:
        """The teacher, and students that are smaller for every image."""
        found = [Way("full", self.chain("teacher", self.teacher), _always(1.0))]
        for asked in SHARES:
            depth, width = round(asked * DEPTH), round(width_of(asked, gates=True), 3)
            of_nine = round(width_of(asked * DEPTH / 9, gates=True), 2)
            cut = partial(self.rewritten, f"truncate{{after={depth}}}")
            found += self.way("fewer blocks", f"truncate-{depth}", cut, depth / DEPTH)
            if width > 0:
                narrow, factored = (partial(self.smaller, made, width) for made in (vision.narrowed, vision.factored))
                found += self.way("narrow MLPs", f"narrow-{width}", narrow, share(width))
                found += self.way("factored MLPs", f"factored-{width}", factored, share(width))
            if 0 < of_nine < 0.9:
                both = partial(self.smaller, vision.narrowed, of_nine, "truncate{after=9}")
                found += self.way("9 blocks, narrow MLPs", f"cutnarrow-{of_nine}", both, share(of_nine) * 9 / DEPTH)
        return found

    def way(self, kind: str, name: str, made: Callable[[], Program], executed: float) -> list[Way]:
        """A student that is the same for every image, unless it is left out."""
        there = self.trained(name, made)
        return [Way(kind, self.chain(name, there), _always(executed))] if there else []

    def smaller(self, made: Callable[[nn.Module, float], nn.Module], width: float, passes: str = "") -> Program:
        """The teacher with MLPs that cost that share."""
        return captured(made(self.model, width), passes)

    def rewritten(self, passes: str) -> Program:
        """The teacher, rewritten, with weights of its own."""
        return captured(copy.deepcopy(self.model), passes)

    def exits(self) -> list[Way]:
        """One model with exits, by thresholds of confidence that take each share of the held-out images' blocks."""
        after = "|".join(map(str, EXITS))
        program = self.trained("exits", lambda: self.rewritten(f"insert-exits{{after={after},head=own}}"))
        if program is None:
            return []
        loaded = self.chain("exits", offramp.apply(program, "insert-scores{measure=top1}"))
        (stack,) = loaded.stacks
        never = offramp.Confidence(thresholds=dict.fromkeys(EXITS, NEVER))
        results = [loaded.run(each, never) for each in examples("held out", 100)[0]]
        sure = {after: np.concatenate([each.scores[stack][after]["top1"] for each in results]) for after in EXITS}

        def depth(threshold: float) -> float:
            left = np.full(len(sure[EXITS[0]]), DEPTH)
            for after in reversed(EXITS):
                left = np.where(sure[after] >= threshold, after, left)
            return float(left.mean()) / DEPTH

        def executed(results: Sequence[offramp.Result]) -> float:
            return float(np.concatenate([each.exits[stack] for each in results]).mean()) / DEPTH

        found = []
        for asked in OF_ONE:
            threshold = _solved(depth, asked)
            say(f"exits: {asked} of the blocks at a confidence of {threshold:.3f}")
            if depth(threshold) < asked + OVER:
                policy = offramp.Confidence(thresholds=dict.fromkeys(EXITS, threshold))
                found.append(Way("exits", loaded, executed, policy))
        return found

    def adaptive(self) -> list[Way]:
        """One model with learners and exits: for each share what does best on held-out images, exits asked or not."""
        after = "|".join(map(str, BOTH))
        passes = f"insert-exits{{after={after},head=own}},insert-acm"
        program = self.trained("acm-exits", lambda: self.rewritten(passes))
        if program is None:
            return []
        loaded = self.chain("acm-exits", offramp.apply(program, "insert-scores{measure=top1}"))
        tried = [each for width in WIDTHS for each in _tried(loaded, width)]
        found = []
        for kind, sures in (("adaptive width", (NEVER,)), ("adaptive width and exits", CONFIDENCES)):
            for asked in OF_ONE:
                fitting = [each for each in tried if each[1] <= asked + OVER and each[2] in sures]
                if fitting:
                    # Of those as right, where images leave soonest: that saves what learners do not.
                    best = max(fitting, key=lambda each: (each[0], -each[2]))[-1]
                    say(f"{kind}: {asked} of the FLOPs with {best}")
                    found.append(Way(kind, loaded, _of_learners, best))
        return found


def _tried(chain: offramp.Chain, width: float) -> Iterator[tuple[float, float, float, offramp.Policy]]:
    """Of the held-out images at a width, for each confidence: how many are right, their share of the FLOPs, the policy.

    What becomes of an image depends on no other, so that a run for each exit says it for all confidences.
    """
    (stack,), (given, labels) = chain.stacks, examples("held out", 50)
    runs = {}
    for after in (*BOTH, DEPTH):
        only = {each: 0.0 if each == after else NEVER for each in BOTH}
        runs[after] = [chain.run(each, offramp.Width(width, offramp.Confidence(thresholds=only))) for each in given]
    hits = {after: _hits(results, labels) for after, results in runs.items()}
    sites = [f"{stack}.{block}.mlp" for block in range(1, DEPTH + 1)]
    taken = [np.concatenate([each.learners[site].mean(1) for each in runs[DEPTH]]) for site in sites]
    spent = np.cumsum([_flops(each) for each in taken], 0) / DEPTH  # [blocks, images]
    sure = {at: np.concatenate([each.scores[stack][at]["top1"] for each in runs[DEPTH]]) for at in BOTH}
    for confidence in CONFIDENCES:
        right, executed = hits[DEPTH], spent[DEPTH - 1]
        for after in reversed(BOTH):
            leaves = sure[after] >= confidence
            right, executed = np.where(leaves, hits[after], right), np.where(leaves, spent[after - 1], executed)
        policy = offramp.Width(width, offramp.Confidence(thresholds=dict.fromkeys(BOTH, confidence)))
        yield float(right.mean()), float(executed.mean()), confidence, policy


def _hits(results: Sequence[offramp.Result], labels: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    found: np.ndarray[Any, Any] = np.concatenate([each.outputs["logits"].argmax(-1) for each in results]) == labels
    return found


def _right(results: Sequence[offramp.Result], labels: np.ndarray[Any, Any]) -> float:
    return float(_hits(results, labels).mean())


def _flops(taken: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """The share of a block's FLOPs, gates too, with so many learners."""
    least, units = share(0, gates=True), share(1) - share(0)
    return least + units * taken / LEARNERS


def _of_learners(results: Sequence[offramp.Result]) -> float:
    """The share of the blocks' FLOPs, gates too, that was executed: rows that had left a block took -1 there."""
    counts = [taken for each in results for taken in each.learners.values()]
    found = [np.where(taken < 0, 0, _flops(taken)).mean() for taken in counts]
    return float(np.mean(found)) * len(counts) / len(results) / DEPTH


def _always(value: float) -> Callable[[Sequence[offramp.Result]], float]:
    return lambda results: value


def _solved(rising: Callable[[float], float], wanted: float) -> float:
    """Where between 0 and 1 a rising function is what is wanted; an end where it is nowhere."""
    low, high = 0.0, 1.0
    for _ in range(8):
        middle = (low + high) / 2
        low, high = (middle, high) if rising(middle) < wanted else (low, middle)
    return (low + high) / 2


def measured(ways: Sequence[Way], count: int | None) -> list[Row]:
    """A row for each way."""
    given, labels = examples("test", 100, count)
    rows: list[Row] = []
    for way in ways:
        results = [way.chain.run(each, way.policy) for each in given]
        accuracy = round(_right(results, labels), 4)
        rows.append({"": way.kind, "share": round(way.executed(results), 3), "accuracy": accuracy})
        say(f"{way.kind}: {rows[-1]}")
    for size in BATCHES:
        say(f"batches of {size}: {len(ways)} ways in turns")
        inputs = examples("test", size, TIMED)[0]

        def sweep(way: Way, inputs: Examples = inputs) -> None:
            for each in inputs:
                way.chain.run(each, way.policy)

        times = alternate({str(i): partial(sweep, way) for i, way in enumerate(ways)}, 1.0, least=3)
        for i, row in enumerate(rows):
            row[f"ms, batch {size}"] = times[str(i)] / TIMED
            row[f"speed-up, batch {size}"] = round(times["0"] / times[str(i)], 2)
    return [shown(row) for row in rows]


def plot(rows: Sequence[Row], path: Path) -> None:
    """Accuracy over time, a line for each kind; nothing without matplotlib."""
    try:
        from matplotlib import pyplot
    except ImportError:
        say("no plot: pip install matplotlib")
        return
    figure, places = pyplot.subplots(1, len(BATCHES), figsize=(6 * len(BATCHES), 4.5), sharey=True)
    for place, size in zip(places, BATCHES, strict=True):
        for kind in dict.fromkeys(row[""] for row in rows):
            points = sorted((row[f"ms, batch {size}"], row["accuracy"]) for row in rows if row[""] == kind)
            place.plot(*zip(*points, strict=True), marker="o", label=kind)
        place.set(xlabel=f"ms an image, batch {size}", ylabel="accuracy")
        place.grid(alpha=0.3)
    places[0].legend()
    figure.tight_layout()
    figure.savefig(path, dpi=120)


def main() -> None:
    """Train or read, measure, print one table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--device", choices=("cpu", "cuda"), help="where to train (cuda, if there is one)")
    parser.add_argument("--epochs", type=float, default=4, help="of the teacher (4); students take half as many more")
    parser.add_argument("--weights", type=Path, default=vision.RESULTS, help=f"trained weights ({vision.RESULTS})")
    parser.add_argument("--train", action="store_true", help="train what is missing; else it is left out")
    parser.add_argument("--precision", default="fp32", choices=("fp32", "int8"), help="of every bundle (fp32)")
    parser.add_argument("--images", type=int, help="of the test set (all)")
    parser.add_argument("--quick", action="store_true", help="one epoch of few images: does everything run?")
    rounds(parser)
    args = parser.parse_args()
    if args.device == "cpu":
        os.environ["ACCELERATE_USE_CPU"] = "true"
    limit = 64 if args.quick else None
    epochs, batch = (1, 16) if args.quick else (args.epochs, vision.BATCH)
    folder = BUILD / "vision_acm_quick" if args.quick else args.weights
    taught, recipe = (Recipe(epochs, rate, batch, images=limit) for rate in (vision.TEACHER_RATE, vision.RATE))
    students = Students(taught, recipe, folder, not (args.train or args.quick), args.precision)
    ways = [*students.static(), *students.exits(), *students.adaptive()]
    runs = [measured(ways, limit or args.images) for _ in range(args.rounds)]
    plot(runs[0], BUILD / "vision_acm.png")
    title = f"CIFAR-10 test, ViT-S at 112 px in {args.precision}: share of the blocks' FLOPs, accuracy, time"
    report("vision_acm", title, spread(runs))


if __name__ == "__main__":
    main()
