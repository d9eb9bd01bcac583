"""How does the cost of a token grow with context, batch and depth? Greedy, every token at full depth, fp32.

Context and batch: SmolLM2-135M in six segments. Depth: a Llama of 256 features with random weights, a segment for every
8 blocks. A slope is the logarithm of how often a cost has grown since the size before, over that of the size: 1 is
linear, 2 quadratic. What every step pays whatever the size hides in slopes below 1.
"""

from __future__ import annotations

import argparse
import math
import os
import statistics
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
from transformers import LlamaConfig, LlamaForCausalLM

import offramp
from benchmarks._common import BUILD, Row, report, say, shown, steps
from offramp import zoo
from offramp.cli import _figures

CONTEXTS, BATCHES, DEPTHS = (64, 256, 1024, 2048, 4096), (1, 2, 4, 8, 16), (8, 16, 32, 64)
UNITS = {"context": "tokens", "batch": "rows", "depth": "blocks"}
PROMPT, NEW = 64, 16
TURNS, SECONDS = 5, 20  # at least, both
SEGMENT = 8  # blocks
STEEP = 1.1  # a slope that is more than noise
STEP, FIRST, EXPORT, BUNDLE = "a step", "the prompt", "the export", "the bundle"


@dataclass(frozen=True)
class Case:
    """What is timed: a chain after a prompt of so many rows and tokens, and what it took to make, if that counts."""

    chain: offramp.Chain
    rows: int = 1
    context: int = PROMPT
    export_ms: float = 0.0
    bundle: int = 0  # bytes


@dataclass(frozen=True)
class Cost:
    """What a size takes: ``totals`` by name, of which slopes are; milliseconds, and bytes of the bundle."""

    size: int
    case: Case
    totals: Mapping[str, float]

    def slopes(self, before: Cost) -> dict[str, float]:
        """How each total has grown since a smaller size: 1 is linear."""
        times = math.log(self.size / before.size)
        return {name: math.log(total / before.totals[name]) / times for name, total in self.totals.items()}


def smollm2() -> offramp.Chain:
    """SmolLM2 in six segments; the bundle is kept."""
    path = BUILD / "smollm2-6.offramp"
    if not (path / "manifest.json").exists():
        say("exporting SmolLM2")
        offramp.save(offramp.apply(offramp.capture(*zoo.load("smollm2")), "insert-cache"), path, segments=6)
    return offramp.load(path)


def llama(blocks: int) -> Case:
    """Export a Llama of so many blocks with random weights."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 256, "num_attention_heads": 4, "intermediate_size": 704, "vocab_size": 1000}
    module = LlamaForCausalLM(LlamaConfig(num_hidden_layers=blocks, use_cache=False, **sizes)).eval()
    path = BUILD / f"growth-{blocks}.offramp"
    begun = time.perf_counter()
    program = offramp.apply(offramp.capture(module, {"input_ids": torch.randint(10, 1000, (2, 7))}), "insert-cache")
    offramp.save(program, path, segments=max(1, blocks // SEGMENT))
    exported = (time.perf_counter() - begun) * 1e3
    return Case(offramp.load(path), export_ms=exported, bundle=sum(file.stat().st_size for file in path.iterdir()))


def took(case: Case) -> tuple[float, float]:
    """Milliseconds of a step, the median, and of the prompt with the first token of every row."""
    ids = np.random.default_rng(0).integers(10, 1000, (case.rows, case.context))
    times = [time.perf_counter()]
    inputs = {str(case.chain.generates): ids}
    generator = case.chain.generator(inputs, offramp.Never(), max_new_tokens=NEW + 1, stop=())
    for _ in range(NEW + 1):
        generator.next()
        times.append(time.perf_counter())
    generator.end()
    first, *others = ((after - before) * 1e3 for before, after in pairwise(times))
    return statistics.median(others), first


def costs(axis: str, cases: Mapping[int, Case]) -> list[Cost]:
    """Medians of turns in which every size has one; a turn before them warms up, and tells how many there will be."""

    def turn() -> list[tuple[float, float]]:
        return [took(case) for case in cases.values()]

    begun = time.perf_counter()
    turn()
    count = max(TURNS, round(SECONDS / (time.perf_counter() - begun)))
    turns = [turn() for _ in steps(range(count), f"turns of {axis}")]
    found = []
    for (size, case), taken in zip(cases.items(), zip(*turns, strict=True), strict=True):
        step, first = (statistics.median(times) for times in zip(*taken, strict=True))
        totals = {STEP: step, FIRST: first, EXPORT: case.export_ms, BUNDLE: case.bundle}
        found.append(Cost(size, case, {name: total for name, total in totals.items() if total}))
    return found


def rows(axis: str, found: Sequence[Cost]) -> Iterator[Row]:
    """A row for each size; ``steepest`` is what has grown most since the one before."""
    for before, cost in zip([None, *found], found, strict=False):
        slopes = cost.slopes(before) if before else {}
        steepest = max(slopes, key=slopes.__getitem__, default="")
        case, totals = cost.case, cost.totals
        yield {
            "axis": f"{axis}, {UNITS[axis]}",
            "size": cost.size,
            "ms a step": totals[STEP],
            "slope": round(slopes[STEP], 2) if slopes else "",
            "tokens/s": round(case.rows / totals[STEP] * 1e3),
            "prompt, ms a token": totals[FIRST] / (case.rows * case.context),
            "export s": totals[EXPORT] / 1e3 if EXPORT in totals else "",
            "bundle MB a block": totals[BUNDLE] / cost.size / 1e6 if BUNDLE in totals else "",
            "steepest": f"{steepest} {slopes[steepest]:.2f}" if slopes else "",
        }


def verdict(found: Mapping[str, Sequence[Cost]]) -> str:
    """Whether, and where, anything grows faster than linearly."""
    steep = [
        f"{name} from {before.size} to {after.size} {UNITS[axis]} ({slope:.2f})"
        for axis, measured in found.items()
        for before, after in pairwise(measured)
        for name, slope in after.slopes(before).items()
        if slope > STEEP
    ]
    return f"faster than linearly (slope above {STEEP}): {', '.join(steep) or 'nothing'}"


def draw(found: Mapping[str, Sequence[Cost]], file: Path) -> None:
    """A panel for each axis, both scales logarithmic; dashed lines have the slope 1."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(3.6 * len(found), 3.4), layout="constrained")
    panels = figure.subplots(1, len(found), squeeze=False)[0]
    for axes, (axis, measured) in zip(panels, found.items(), strict=True):
        sizes = [cost.size for cost in measured]
        for name in (name for name in (STEP, FIRST, EXPORT) if name in measured[0].totals):
            times = [cost.totals[name] for cost in measured]
            (line,) = axes.plot(sizes, times, "o-", label=name)
            linear = [times[0] * size / sizes[0] for size in sizes]
            axes.plot(sizes, linear, "--", color=line.get_color(), linewidth=1, alpha=0.6)
        axes.set_xscale("log", base=2)
        axes.set_yscale("log")
        axes.set_xticks(sizes, [str(size) for size in sizes])
        axes.set_xlabel(UNITS[axis])
        axes.set_title(axis)
        axes.legend()
    panels[0].set_ylabel("milliseconds (dashed: linear)")
    _figures.save(figure, file)


def sizes(text: str) -> tuple[int, ...]:
    """ "64,256" as numbers, least first."""
    return tuple(sorted({int(part) for part in text.split(",") if part}))


def main() -> None:
    """Measure, print one table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    for axis, least in (("contexts", CONTEXTS), ("batches", BATCHES), ("depths", DEPTHS)):
        usual = ",".join(map(str, least))
        parser.add_argument(f"--{axis}", metavar="N,N", type=sizes, default=least, help=f'"": none ({usual})')
    parser.add_argument("--figure", metavar="FILE.png", type=Path, help="draw it (needs matplotlib)")
    args = parser.parse_args()
    if args.figure:
        _figures.need_matplotlib()
    os.environ["OFFRAMP_CACHE"] = ""  # a translation from the run before would make an export look quick
    cases: dict[str, dict[int, Case]] = {"context": {}, "batch": {}, "depth": {}}
    if args.contexts or args.batches:
        chain = smollm2()
        cases["context"] = {size: Case(chain, context=size) for size in args.contexts}
        cases["batch"] = {size: Case(chain, rows=size) for size in args.batches}
    if args.depths:
        llama(2)  # the first export of a process pays for imports
        cases["depth"] = {size: llama(size) for size in steps(args.depths, "exports")}
    found = {axis: costs(axis, of_sizes) for axis, of_sizes in cases.items() if of_sizes}
    table = [shown(row) for axis, measured in found.items() for row in rows(axis, measured)]
    report("growth", "greedy, full depth, fp32; a step makes a token of every row", table)
    print(verdict(found))
    if args.figure:
        draw(found, args.figure)


if __name__ == "__main__":
    main()
