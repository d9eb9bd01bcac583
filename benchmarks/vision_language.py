"""Do exits pay where images and questions are read and answers are written? Score and time in one row, one thread.

The encoder-decoder of ``examples/vision_language``, easy-VQA's test set: questions (one word) by accuracy, descriptions
by sacreBLEU. Everything is chosen on the validation set: to keep 99% of full depth's accuracy and 96% of its BLEU, what
MuE (arXiv 2211.11152) loses where it claims 50% and 40% less time. A chain has those exits alone that its policy asks.
All ways take turns, a few batches each. "encoder" is the time until the decoder's first step, "saved" of both; the
blocks are means of what patches, words and answer took.

Needs the weights that ``python -m examples.vision_language.train --form joint`` leaves, and of ``--form separate`` for
MuE's rows. Progress, and each row once it is measured, go to stderr; the table to stdout.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np

import offramp
from benchmarks._answers import DESCRIPTIONS, GROUPS, QUESTIONS, Kind, Way, bundle, examples, fitting, judged, measure
from benchmarks._common import Row, report, rounds, say, shown, spread
from benchmarks._translate import on_one_core
from examples.vision_language.model import BLOCKS, LONGEST

KINDS = (QUESTIONS, DESCRIPTIONS)
BATCHES = (1, 16)
EARLY = tuple(range(1, BLOCKS))
TRUNCATED = ((4, 4), (3, 3), (2, 2), (1, 1), (3, 1), (2, 1))  # blocks of the encoder, of the decoder
PATIENCE = (1, 2, 3)
FULL = "full depth"
Chosen = dict[str, offramp.Policy]  # by stack, or group of its tokens


class Ways:
    """The ways for one kind of request, chosen on ``count`` of the validation set."""

    def __init__(self, kind: Kind, weights: Path, count: int | None) -> None:
        self.kind, self.weights, self.count = kind, weights, count

    def all(self) -> Iterator[Way]:
        """Full depth first."""
        yield Way(FULL, bundle("joint", self.weights, {}))
        for encoder, decoder in TRUNCATED:
            exits, cut = {"decoder": [decoder]}, {"encoder": encoder, "decoder": decoder}
            yield Way(f"truncated to {encoder} + {decoder}", bundle("joint", self.weights, exits, cut))
        yield from self.way("DeeBERT: entropy", "joint", self.calibrated("joint", {"decoder": "entropy"}))
        yield from self.patient()
        if (self.weights / "separate.safetensors").exists():
            yield from self.mue()
        else:
            say(f"MuE is left out: there is no {self.weights / 'separate.safetensors'}")
        groups = dict.fromkeys(GROUPS, "cosine")
        for name, measures in (
            ("joint, groups leave apart", groups),
            ("DEED: top1 in the decoder", {"decoder": "top1"}),
            ("joint and DEED", {**groups, "decoder": "top1"}),
        ):
            yield from self.way(name, "joint", self.calibrated("joint", measures))

    def mue(self) -> Iterator[Way]:
        """Encoded apart, cosine everywhere: with the paper's constants, and thresholds that were chosen as ours are."""
        cosine = {name: offramp.Confidence(at, "cosine") for name, at in zip(GROUPS, (0.9, 0.95), strict=True)}
        if self.kind is QUESTIONS:
            paper: Chosen = {**cosine, "decoder": offramp.Confidence(0.95, "cosine")}
        else:
            falling = offramp.Decay(0.99, "cosine", tokens=LONGEST, beta=0.95, tau=1.0)
            paper = {**cosine, "decoder": falling}
        exits = dict.fromkeys((*GROUPS, "decoder"), EARLY)
        chain = bundle("separate", self.weights, exits)
        yield Way("separate, full depth", bundle("separate", self.weights, {}))
        yield Way("MuE: the paper's thresholds", chain, offramp.Each(paper), "kv")
        chosen = self.calibrated("separate", dict.fromkeys(exits, "cosine"))
        for name, propagate in (("MuE: chosen thresholds", "kv"), ("MuE with deferral", "defer")):
            yield from self.way(name, "separate", chosen, propagate)

    def way(self, name: str, form: str, chosen: Chosen, propagate: str = "defer") -> Iterator[Way]:
        """A chain with the exits that are asked; nothing where none is."""
        asked: dict[str, set[int]] = {}
        for place, policy in chosen.items():
            asked.setdefault(_stack(form, place), set()).update(getattr(policy, "thresholds", None) or EARLY)
        if not asked:
            say(f"{name} is left out: nothing was proven")
            return
        exits = {stack: sorted(after) for stack, after in asked.items()}
        yield Way(name, bundle(form, self.weights, exits), offramp.Each(chosen), propagate)

    def calibrated(self, form: str, measures: Mapping[str, str]) -> Chosen:
        """Thresholds for one place after the other, each of which may lose as much; the rest is as chosen before."""
        exits = {_stack(form, place): EARLY for place in (*GROUPS, "decoder")}
        chain, data = bundle(form, self.weights, exits), examples(self.kind, self.count)
        chosen: Chosen = {}
        for number, (place, score) in enumerate(measures.items(), 1):
            found = offramp.calibrate(
                chain,
                data,
                keep=1 - (1 - self.kind.keep) * number / len(measures),
                quality=judged(self.kind),
                stack=place,
                measure=score,
                others=offramp.Each(chosen) if chosen else None,
                max_new_tokens=self.kind.most,
            )
            reason = found.record["reason"]
            say(f"{self.kind.name}, {form}, {place} by {score}: {reason or found.record['thresholds']}")
            if reason is None:
                chosen = dict(found.policy.stacks)  # type: ignore[attr-defined]
        return chosen

    def patient(self) -> Iterator[Way]:
        """The least patience in the decoder (PABEE) that keeps enough of the score on the validation set."""
        chain, right = bundle("joint", self.weights, {"decoder": EARLY}), fitting(self.kind, "validation", self.count)
        ways = [Way(f"PABEE: patience {patience}", chain, offramp.Patience(patience)) for patience in PATIENCE]
        full = Way(FULL, bundle("joint", self.weights, {}))
        scores = [
            self.kind.score(way.texts, right) for way in measure([full, *ways], self.kind, "validation", 16, self.count)
        ]
        good = [way for way, score in zip(ways, scores[1:], strict=True) if score >= self.kind.keep * scores[0]]
        yield good[0] if good else ways[-1]


def _stack(form: str, place: str) -> str:
    """The stack that a group of tokens belongs to."""
    return place if form == "separate" else place.partition(".")[0]


def measured(kind: Kind, ways: Sequence[Way], count: int | None) -> list[Row]:
    """A row for each way: score, blocks, and at each size of batches the milliseconds of a request."""
    right = fitting(kind, "test", count)
    runs = {size: measure(ways, kind, "test", size, count) for size in BATCHES}
    full = kind.score(runs[1][0].texts, right)
    rows = []
    for at, way in enumerate(runs[1]):
        score = kind.score(way.texts, right)
        depths = [f"{np.mean(way.depths[place]):.2f}" for place in (*GROUPS, "decoder")]
        row: Row = {
            "": f"{kind.name}: {way.name}",
            "score": round(score, 2),
            "of full": f"{100 * score / full:.1f}%",
            "image / text / answer": " / ".join(depths),
        }
        for size, run in runs.items():
            took, whole = run[at], sum(run[0].encoder) + sum(run[0].decoder)
            row[f"encoder, {size}"] = sum(took.encoder) / len(right)
            row[f"decoder, {size}"] = sum(took.decoder) / len(right)
            row[f"saved %, {size}"] = round(100 * (1 - (sum(took.encoder) + sum(took.decoder)) / whole), 1)
        rows.append(shown(row))
    return rows


def main() -> None:
    """Choose, measure, print one table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--weights", type=Path, default=Path("build/vision_language"), help="what training left")
    parser.add_argument("--val", metavar="N", type=int, help="requests of each kind that choose (all)")
    parser.add_argument("--requests", metavar="N", type=int, default=600, help="of each kind, of the test set (600)")
    rounds(parser)
    args = parser.parse_args()
    on_one_core()
    rows: list[Row] = []
    for kind in KINDS:
        ways = list(Ways(kind, args.weights, args.val).all())
        rows += spread([measured(kind, ways, args.requests) for _ in range(args.rounds)])
    report("vision_language", "easy-VQA test, 6 + 6 blocks of 128 features, milliseconds of a request", rows)


if __name__ == "__main__":
    main()
