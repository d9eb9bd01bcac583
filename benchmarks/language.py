"""Do early exits pay in SmolLM2? Perplexity and agreement by depth, before and after training; and decoding time.

The adapters come from ``examples/train_language_adapters.py``, trained on a part of WikiText-2's validation text; all
tables are of its test text. Ratios are medians over prompts of the time that full depth takes on the same prompt in
the same turn. The last table says what a round of `Verify` costs: drafts, each with the blocks up to the exit, and one
run of those above it over all of them.
"""

from __future__ import annotations

import argparse
import math
import statistics
import time
from collections.abc import Sequence
from itertools import pairwise
from typing import NamedTuple

from tokenizers import Tokenizer

import offramp
from benchmarks._common import BUILD, Row, report, rounded_by, rounds, say, shown, spread, steps
from examples import train_language_adapters as recipe
from offramp import zoo
from offramp.bundle.manifest import Stack
from offramp.bundle.measures import PICK, SCREENED
from offramp.program import Program
from offramp.runtime.policies.builtin import Verify
from offramp.training.weights import load_weights

TOKENS = 2048  # of the test text, for perplexity
PROMPTS, WORDS, NEW = 50, 8, 24
AT, VERIFY_AT = 0.9, (0.5, 0.8)
BLOCKS = 30
SHORT, TOP1, CANDIDATES = "top1-short", "top1", 4096
LOSS = 1.0  # of fewer bits; what they lose is in docs, by benchmarks.precision


class Run(NamedTuple):
    """What one prompt gave: milliseconds, and its tokens."""

    ms: float
    records: list[offramp.Token]

    @property
    def tokens(self) -> list[int]:
        """Their ids."""
        return [record.token for record in self.records]


def by_depth() -> Program:
    """Print the table of depths; returns the trained program."""
    say("agreement and perplexity by depth")
    program = recipe.program()
    batches = recipe.batches("test", TOKENS)
    before = recipe.by_depth(program, batches)
    load_weights(program, recipe.WEIGHTS)
    after = recipe.by_depth(program, batches)
    rows = [
        {
            "after block": depth,
            "perplexity untrained": round(before[depth][0], 1),
            "perplexity": round(after[depth][0], 1),
            "top-1 as full untrained": round(before[depth][1], 3),
            "top-1 as full": round(after[depth][1], 3),
        }
        for depth in sorted(after)
    ]
    report("language_depths", f"SmolLM2-135M, WikiText-2 test, {TOKENS:,} tokens in rows of {recipe.LENGTH}", rows)
    return program


def prompts(words: Tokenizer) -> list[list[int]]:
    """The first words of paragraphs of the test text."""
    lines = [line.split() for line in recipe.text("test").splitlines() if not line.strip().startswith("=")]
    texts = [" ".join(line[:WORDS]) for line in lines if len(line) > 2 * WORDS and "<unk>" not in line[:WORDS]]
    return [words.encode(text).ids for text in texts[:PROMPTS]]


def ways(measure: str) -> dict[str, offramp.Policy]:
    """Every policy."""
    found: dict[str, offramp.Policy] = {"full depth": offramp.Never()}
    for after in recipe.EXITS:
        found[f"{measure} >= {AT} after {after}"] = offramp.Confidence(measure=measure, thresholds={after: AT})
        for at in VERIFY_AT:
            found[f"verify after {after}, {measure} > {at}"] = Verify(after, threshold=at, measure=measure)
    if measure == SHORT:
        found[f"{SHORT} >= {AT} after {BLOCKS}"] = offramp.Confidence(measure=SHORT, thresholds={BLOCKS: AT})
    return found


def decoded(chain: offramp.Chain, prompt: list[int], policy: offramp.Policy) -> Run:
    """`NEW` tokens, greedy; no token ends them."""
    started = time.perf_counter()
    records = list(chain.stream({"input_ids": [prompt]}, policy, max_new_tokens=NEW, stop=()))
    return Run((time.perf_counter() - started) * 1e3, records)


def row(name: str, runs: Sequence[Run], full: Sequence[Run]) -> Row:
    """What one policy did."""
    pairs = list(zip(runs, full, strict=True))
    return {
        "way": name,
        "same texts, of 50": sum(run.tokens == whole.tokens for run, whole in pairs),
        "tokens before the first other one": round(statistics.mean(_common(run, whole) for run, whole in pairs), 1),
        "mean blocks": round(statistics.mean(record.exit for run in runs for record in run.records), 1),
        "ms a token": statistics.median(run.ms / NEW for run in runs),
        "of full": round(statistics.median(run.ms / whole.ms for run, whole in pairs), 3),
    }


def _common(run: Run, whole: Run) -> int:
    pairs = zip(run.tokens, whole.tokens, strict=True)
    return next((at for at, (one, other) in enumerate(pairs) if one != other), NEW)


def rounds_of(policy: Verify, stack: Stack, runs: Sequence[Run], full: Sequence[Run]) -> Row:
    """What a round of `Verify` takes: drafts and the token that goes deep, up to the exit; what is above it, once.

    Milliseconds inside segments. The last record of a round has its trace; the first round, which reads the prompt, and
    the last, which may be cut short, are left out.
    """
    above = {name for part in stack.parts if part.depth > policy.after for name in part.segments}
    above |= {name for exit_ in stack.exits if exit_.after > policy.after for name in exit_.segments}
    lowest = stack.parts[0].segments[0]
    below_ms = above_ms = 0.0
    tokens = checks = below = 0
    for run in runs:
        ends = [at for at, record in enumerate(run.records) if record.trace][:-1]
        for before, end in pairwise(ends):
            trace = run.records[end].trace
            tokens, checks = tokens + end - before, checks + 1
            below += sum(timing.segment == lowest for timing in trace)
            above_ms += sum(timing.milliseconds for timing in trace if timing.segment in above)
            below_ms += sum(timing.milliseconds for timing in trace if timing.segment not in above)
    whole = statistics.median(sum(t.milliseconds for t in record.trace) for run in full for record in run.records[1:])
    drafts, cost = below / checks - 1, (below_ms + above_ms) / checks
    return {
        "after": policy.after,
        "threshold": policy.threshold,
        "drafts a round": drafts,
        "of them kept": (tokens / checks - 1) / drafts if drafts else math.nan,
        "ms up to the exit": below_ms / below,
        "ms above it, once a round": above_ms / checks,
        "ms a token at full depth": whole,
        "of full": cost / (tokens / checks * whole),
        "of full, were all kept": cost / ((drafts + 1) * whole),
    }


def main() -> None:
    """Print three tables."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--precision", choices=("fp32", "int8", "int4"), default="fp32", help="of the weights (fp32)")
    rounds(parser)
    args = parser.parse_args()
    if not recipe.WEIGHTS.is_file():
        raise SystemExit(f"no {recipe.WEIGHTS.name}\n  try: {recipe.COMMAND}")
    program = by_depth()
    short, bundle = args.precision == "fp32", BUILD / f"language-{args.precision}.offramp"
    measures = (SHORT, PICK, SCREENED) if short else (TOP1,)
    after = (*recipe.EXITS, BLOCKS) if short else recipe.EXITS
    ids = recipe.common(CANDIDATES) if short else None
    program = offramp.apply(
        program, [offramp.InsertScores(measure=measures, after=after, ids=ids), offramp.InsertCache()]
    )
    say(f"exporting {bundle}")
    offramp.save(
        program,
        bundle,
        args.precision,
        samples=rounded_by(args.precision),
        loss=None if short else LOSS,
        segments=1,
        generation=zoo.generation("smollm2"),
        files=zoo.tokenizer_files("smollm2"),
    )
    chain = offramp.load(bundle)
    asked = prompts(Tokenizer.from_file(str(bundle / "tokenizer.json")))
    every = ways(SHORT if short else TOP1)
    decoded(chain, asked[0], every["full depth"])  # warms up
    measured, verified = [], []
    (stack,) = chain.manifest.stacks.values()
    for number in range(args.rounds):
        runs: dict[str, list[Run]] = {name: [] for name in every}
        for prompt in steps(asked, f"round {number + 1} of {args.rounds}"):
            for name, policy in every.items():
                runs[name].append(decoded(chain, prompt, policy))
        full = runs["full depth"]
        measured.append([shown(row(name, found, full)) for name, found in runs.items()])
        verified.append(
            [
                shown(rounds_of(policy, stack, runs[name], full))
                for name, policy in every.items()
                if isinstance(policy, Verify)
            ]
        )
    title = f"SmolLM2-135M, {PROMPTS} prompts of {WORDS} words, {NEW} new tokens, greedy, {args.precision}"
    report(f"language_{args.precision}", title, spread(measured))
    report(f"language_{args.precision}_verify", f"a round of Verify: {title}", spread(verified))


if __name__ == "__main__":
    main()
