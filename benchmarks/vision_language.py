"""Do exits pay where images and questions are read and answers are written? Score and time in one row, one thread.

The encoder-decoder of ``examples/vision_language``, easy-VQA's test set: questions (one word) by accuracy, descriptions
by sacreBLEU. Everything is chosen on the validation set, and kept in build: to keep 99% of full depth's accuracy and
96% of its BLEU, what MuE (arXiv 2211.11152) loses where it claims 50% and 40% less time. A chain has those exits alone
that its policy asks. All ways take turns, a few batches each. "encoder" is the time until the decoder's first step,
"saved" of both; the blocks are means of what patches, words and answer took.

The weights of both forms (MuE's rows take those of ``separate``) are in the repository; ``--weights`` takes others.
Progress, and each row once it is measured, go to stderr; the table to stdout.
"""

from __future__ import annotations

import argparse
import itertools
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

import offramp
from benchmarks._answers import (
    DESCRIPTIONS,
    GROUPS,
    QUESTIONS,
    Kind,
    Way,
    bundle,
    examples,
    fitting,
    folder,
    judged,
    measure,
    weights_of,
)
from benchmarks._common import Row, report, rounds, say, shown, spread
from benchmarks._translate import on_one_core
from examples.vision_language.model import BLOCKS, LONGEST
from offramp.runtime.policies.builtin import from_dict
from offramp.runtime.policies.thresholds import Threshold

KINDS = {kind.name: kind for kind in (QUESTIONS, DESCRIPTIONS)}
BATCHES = (1, 16)
EARLY = tuple(range(1, BLOCKS))
TRUNCATED = ((4, 4), (3, 3), (2, 2), (1, 1), (3, 1), (2, 1))  # blocks of the encoder, of the decoder
PATIENCE = (1, 2, 3)
FULL = "full depth"
SHALLOW = (1, 2, 3)  # fixed depths that are tried
SWEPT = 1200  # validation requests that they, and patience, are tried on
PLACES = (*GROUPS, "decoder")
COSINE = dict.fromkeys(GROUPS, "cosine")
ALL = 1e-6  # a threshold below that lets everything leave
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
        yield from self.way("DeeBERT: entropy", "joint", self.calibrated("joint", {"decoder": "entropy"})[-1])
        yield self.patient()
        if weights_of("separate", self.weights).exists():
            yield from self.mue()
        else:
            say(f"MuE is left out: there is no {weights_of('separate', self.weights)}")
        deed = {**COSINE, "decoder": "top1"}
        yield from self.way("DEED: top1 in the decoder", "joint", self.calibrated("joint", {"decoder": "top1"})[-1])
        yield from self.way("joint and DEED, one after the other", "joint", self.calibrated("joint", deed)[-1])
        yield from self.way("joint calibrated", "joint", self.at_once("joint", COSINE))
        yield from self.way("joint and DEED", "joint", self.at_once("joint", deed))
        yield self.fixed()

    def mue(self) -> Iterator[Way]:
        """Encoded apart, cosine everywhere: with the paper's constants, and with what was chosen as ours is."""
        cosine = {name: offramp.Confidence(at, "cosine") for name, at in zip(GROUPS, (0.9, 0.95), strict=True)}
        if self.kind is QUESTIONS:
            paper: Chosen = {**cosine, "decoder": offramp.Confidence(0.95, "cosine")}
        else:
            falling = offramp.Decay(0.99, "cosine", tokens=LONGEST, beta=0.95, tau=1.0)
            paper = {**cosine, "decoder": falling}
        chain = bundle("separate", self.weights, dict.fromkeys(PLACES, EARLY))
        yield Way("separate, full depth", bundle("separate", self.weights, {}))
        yield Way("MuE: the paper's thresholds", chain, offramp.Each(paper), "kv")
        chosen = self.at_once("separate", {**COSINE, "decoder": "cosine"})
        yield from self.way("MuE: calibrated", "separate", chosen, "kv")
        yield from self.way("MuE with deferral", "separate", chosen)

    def fixed(self) -> Way:
        """The same depths for all requests: the quickest ones of patches, words and answer that keep enough."""
        image, text, answer = self.kept("joint", "fixed", self._fixed)
        exits, cut = {"encoder": sorted({image, text}), "decoder": [answer]}, {"decoder": answer}
        policy = offramp.Depth(dict(zip(GROUPS, (image, text), strict=True)))
        return Way(f"joint, fixed: {image}, {text}, {answer}", bundle("joint", self.weights, exits, cut), policy)

    def _fixed(self) -> list[int]:
        depths = list(itertools.product(SHALLOW, repeat=len(PLACES)))
        chain = bundle("joint", self.weights, {"encoder": EARLY, "decoder": EARLY})
        policies = [offramp.Never(), *(offramp.Depth(dict(zip(PLACES, each, strict=True))) for each in depths)]
        full, *found = self.on_validation([Way("", chain, policy) for policy in policies])
        good = [at for at, (score, _) in enumerate(found) if score >= self.kind.keep * full[0]]
        say(f"{self.kind.name}: {len(good)} of {len(depths)} fixed depths keep enough")
        return list(depths[min(good, key=lambda at: found[at][1])])

    def on_validation(self, ways: Sequence[Way]) -> list[tuple[float, float]]:
        """The score of each way on a part of the validation set, and its milliseconds."""
        count = min(self.count or SWEPT, SWEPT)
        right = fitting(self.kind, "validation", count)
        found = measure(ways, self.kind, "validation", 16, count)
        return [(self.kind.score(way.texts, right), sum(way.encoder) + sum(way.decoder)) for way in found]

    def kept(self, form: str, name: str, choose: Callable[[], Any]) -> Any:
        """What was chosen for these weights; chosen now where it was not."""
        file = folder(form, self.weights) / f"{self.kind.name}-{name}-{self.count}.json"
        if not file.exists():
            file.write_text(json.dumps(choose()))
        return json.loads(file.read_text())

    def way(self, name: str, form: str, chosen: Chosen, propagate: str = "defer") -> Iterator[Way]:
        """A chain with the exits that are asked and reached; nothing where none is.

        Blocks of a decoder that no token reaches are cut off.
        """
        if not chosen:
            say(f"{name} is left out: nothing was proven")
            return
        policies = {place: _reached(policy) for place, policy in chosen.items()}
        exits: dict[str, list[int]] = {}
        for place, policy in policies.items():
            stack = _stack(form, place)
            exits[stack] = sorted({*exits.get(stack, ()), *_exits(policy)})
        cut = {}
        if isinstance(policies.get("decoder"), offramp.Depth):
            (cut["decoder"],) = _exits(policies.pop("decoder"))
        yield Way(name, bundle(form, self.weights, exits, cut), offramp.Each(policies), propagate)

    def calibrated(self, form: str, measures: Mapping[str, str]) -> list[Chosen]:
        """Thresholds for one place after the other, of each with those before.

        The first may lose three quarters of what all may, the next one half of the rest, the last one all of it.
        """
        found = self.kept(form, "-".join(measures.values()), lambda: self._calibrated(form, measures))
        return [{place: from_dict(policy) for place, policy in each.items()} for each in found]

    def _calibrated(self, form: str, measures: Mapping[str, str]) -> list[dict[str, Any]]:
        found = []
        chosen: Chosen = {}
        for left, (place, score) in zip(reversed(range(len(measures))), measures.items(), strict=True):
            share = 1 - 0.5 ** (len(measures) - left + 1) if left else 1.0
            keep, others = 1 - (1 - self.kind.keep) * share, offramp.Each(chosen) if chosen else None
            chosen = self._calibrate(form, keep, stack=place, measure=score, others=others) or chosen
            found.append({place: policy.to_dict() for place, policy in chosen.items()})
        return found

    def _calibrate(self, form: str, keep: float, **options: Any) -> Chosen:
        """What a calibration chose, by place; nothing where nothing was proven."""
        chain = bundle(form, self.weights, {_stack(form, place): EARLY for place in PLACES})
        asked = {"keep": keep, "quality": judged(self.kind), "max_new_tokens": self.kind.most, **options}
        made = offramp.calibrate(chain, examples(self.kind, self.count), **asked)
        say(f"{self.kind.name}, {form}, {options['stack']}: {made.record['reason'] or made.policy}")
        if made.record["reason"] is not None:
            return {}
        assert isinstance(made.policy, offramp.Each)
        return dict(made.policy.stacks)

    def at_once(self, form: str, measures: Mapping[str, str]) -> Chosen:
        """Thresholds and fixed depths for all places together."""
        found = self.kept(form, f"at-once-{'-'.join(measures.values())}", lambda: self._at_once(form, measures))
        return {place: from_dict(policy) for place, policy in found.items()}

    def _at_once(self, form: str, measures: Mapping[str, str]) -> dict[str, Any]:
        made = self._calibrate(form, self.kind.keep, stack=list(measures), measure=measures)
        return {place: policy.to_dict() for place, policy in made.items()}

    def patient(self) -> Way:
        """The least patience in the decoder (PABEE) that keeps enough, or the most that was tried."""
        chain = bundle("joint", self.weights, {"decoder": EARLY})

        def choose() -> int:
            policies = [offramp.Never(), *map(offramp.Patience, PATIENCE)]
            full, *found = self.on_validation([Way("", chain, policy) for policy in policies])
            good = [at for at, (score, _) in enumerate(found) if score >= self.kind.keep * full[0]]
            return PATIENCE[good[0] if good else -1]

        patience = self.kept("joint", "patience", choose)
        return Way(f"PABEE: patience {patience}", chain, offramp.Patience(patience))


def _reached(policy: offramp.Policy) -> offramp.Policy:
    """The policy without exits behind one that everything leaves at."""
    if not isinstance(policy, Threshold):
        return policy
    kept: dict[int, float] = {}
    for after, at in sorted(policy.thresholds.items()):
        kept[after] = at
        if at < ALL and not isinstance(policy, offramp.Entropy):
            break
    return replace(policy, thresholds=kept)


def _exits(policy: offramp.Policy) -> list[int]:
    """After how many blocks a policy lets something leave."""
    if isinstance(policy, Threshold):
        return [*policy.thresholds]
    assert isinstance(policy, offramp.Depth)
    assert isinstance(policy.depth, int)
    return [policy.depth]


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
        depths = [f"{np.mean(way.depths[place]):.2f}" for place in PLACES]
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
    parser.add_argument("--kinds", nargs="+", choices=list(KINDS), default=list(KINDS), help="of requests (both)")
    parser.add_argument("--requests", metavar="N", type=int, default=600, help="of each kind, of the test set (600)")
    rounds(parser)
    args = parser.parse_args()
    on_one_core()
    rows: list[Row] = []
    for kind in (KINDS[name] for name in args.kinds):
        ways = list(Ways(kind, args.weights, args.val).all())
        rows += spread([measured(kind, ways, args.requests) for _ in range(args.rounds)])
    report("vision_language", "easy-VQA test, 6 + 6 blocks of 128 features, milliseconds of a request", rows)


if __name__ == "__main__":
    main()
