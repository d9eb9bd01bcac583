"""Do exits pay in translation? Multi30k, German to English, batch 1, greedy, one thread: BLEU and time in one row.

Thresholds are chosen on the validation set, and measured on the two test sets; all ways take turns, sentence by
sentence. "decoder" is the wall time of the steps: the encoder, and what runs once for a sentence, are not part of it.
``saved`` and ``tokens/s`` compare with full depth in one ONNX Runtime session, the quickest way without exits; below
each exit policy is the static truncation that is as deep on average. Progress, and each row once it is measured, go to
stderr; the table to stdout.
"""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Callable
from pathlib import Path

import offramp
from benchmarks._common import report, rounds, say, shown, spread
from benchmarks._translate import (
    MEASURE,
    Way,
    beside,
    bleu,
    bundle,
    listed,
    measure,
    on_one_core,
    perfect,
    row,
    same,
    single,
    without_exits,
)
from offramp.zoo.translator import DECODER_BLOCKS

SETS = (((1,), 8), ((2,), 8), ((1, 3), 8), ((2,), 4), ((2,), 5))  # exits, and the deepest
THRESHOLDS = (0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)
TARGETS = (0.9, 0.95, 0.97, 0.99)
KEEP = (0.99, 1.0)
TESTS = ("test_2016_flickr", "test_2017_flickr")


def deed(precision: str = "fp32") -> list[Way]:
    """Confidence at some exits (DEED, arXiv 2311.08623)."""
    return [
        Way(
            f"DEED: {MEASURE} >= {at} after {listed(exits)} of {deepest}",
            bundle(exits, deepest, precision=precision),
            same(offramp.Confidence(measure=MEASURE, thresholds={**dict.fromkeys(exits, at), deepest: 0.0})),
        )
        for (exits, deepest), at in itertools.product(SETS, THRESHOLDS)
    ]


def free(precision: str = "fp32") -> list[Way]:
    """One exit and a threshold that adapts itself (FREE, arXiv 2310.05424)."""
    return [
        Way(
            f"FREE: {target} are to agree after {exits[0]} of {deepest}",
            bundle(exits, deepest, precision=precision),
            same(offramp.Adaptive(exits[0], 0.6, MEASURE, target=target, pick=0.0)),
        )
        for (exits, deepest), target in itertools.product(SETS, TARGETS)
        if len(exits) == 1
    ]


def choose(ways: Callable[[], list[Way]], full: Way, count: int | None) -> dict[float, Way]:
    """For each share of full depth's BLEU the quickest way that keeps it on the validation set, as if never used."""
    base, *found = measure([full, *ways()], "val", count)
    chosen = {}
    for keep in KEEP:
        good = [i for i, way in enumerate(found) if bleu(way, "val") >= keep * bleu(base, "val")]
        if good:
            chosen[keep] = ways()[min(good, key=lambda i: found[i].milliseconds)]
            say(f"chosen for {keep:.0%} of full depth's BLEU: {chosen[keep].name}")
        else:
            say(f"nothing keeps {keep:.0%} of full depth's BLEU")
    return chosen


def main() -> None:
    """Choose, measure, print one table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--val", type=int, help="sentences of the validation set (all)")
    parser.add_argument("--sentences", type=int, help="sentences of each test set (all)")
    parser.add_argument("--plain", type=Path, help="weights of the same model, trained without exits")
    rounds(parser)
    args = parser.parse_args()
    on_one_core()
    one = single()
    few = same(offramp.Confidence(measure=MEASURE, thresholds={DECODER_BLOCKS: 0.0}))
    ways = [one, Way("full depth, screened head", bundle(head="screened"))]
    ways += [Way("full depth, short list", bundle(), few), Way("full depth, the chain", bundle((1, 3)))]
    ways += [single(k) for k in range(1, DECODER_BLOCKS)]
    if args.plain:
        ways.append(without_exits(args.plain))
    gated = [(f"[{keep:.0%}] ", way) for found in (deed, free) for keep, way in choose(found, one, args.val).items()]
    for mark, way in gated:
        ways.append(Way(mark + way.name, way.chain, way.policy))
        if way.name.startswith("DEED"):
            ways.append(Way(f"{mark}the same, hidden states copied", way.chain, way.policy, "hidden"))
    rows = []
    for split in TESTS:
        full = measure([one], split, args.sentences)[0]
        gates = [perfect(full, split, exits, args.sentences) for exits, deepest in SETS if deepest == DECODER_BLOCKS]
        runs = []
        for _ in range(args.rounds):
            found = measure([*ways, *gates], split, args.sentences)
            runs.append(beside([shown(row(way, found[0], split)) for way in found]))
        rows += spread(runs)
    report("translation", "Multi30k de-en: quality and decoder time", rows)


if __name__ == "__main__":
    main()
