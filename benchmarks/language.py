"""Do early exits pay in SmolLM2? Perplexity and agreement by depth, before and after training; and decoding time.

The adapters come from ``examples/train_language_adapters.py``, trained on a part of WikiText-2's validation text; both
tables are of its test text. Ratios are medians over prompts of the time that full depth takes on the same prompt in
the same turn.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from tokenizers import Tokenizer

import offramp
from benchmarks._common import BUILD, Row, report, rounds, say, shown, spread, steps
from examples import train_language_adapters as recipe
from offramp import zoo
from offramp.bundle.measures import PICK
from offramp.program import Program
from offramp.runtime.policies.builtin import Verify
from offramp.training.weights import load_weights

TOKENS = 2048  # of the test text, for perplexity
PROMPTS, WORDS, NEW = 50, 8, 24
AT = 0.9
BLOCKS = 30
SHORT, CANDIDATES = "top1-short", 4096
BUNDLE = BUILD / "language.offramp"


class Run(NamedTuple):
    """What one prompt gave: tokens, the exit of each, milliseconds."""

    tokens: list[int]
    exits: list[int]
    ms: float


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


def ways() -> dict[str, offramp.Policy]:
    """Every policy."""
    found: dict[str, offramp.Policy] = {"full depth": offramp.Never()}
    for after in recipe.EXITS:
        found[f"short top1 >= {AT} after {after}"] = offramp.Confidence(measure=SHORT, thresholds={after: AT})
        found[f"verify after {after}"] = Verify(after, threshold=0.5, measure=SHORT)
    found[f"short top1 >= {AT} after {BLOCKS}"] = offramp.Confidence(measure=SHORT, thresholds={BLOCKS: AT})
    return found


def decoded(chain: offramp.Chain, prompt: list[int], policy: offramp.Policy) -> Run:
    """`NEW` tokens, greedy; no token ends them."""
    started = time.perf_counter()
    steps = list(chain.stream({"input_ids": [prompt]}, policy, max_new_tokens=NEW, stop=()))
    return Run([s.token for s in steps], [s.exit for s in steps], (time.perf_counter() - started) * 1e3)


def row(name: str, runs: Sequence[Run], full: Sequence[Run]) -> Row:
    """What one policy did."""
    pairs = list(zip(runs, full, strict=True))
    return {
        "way": name,
        "same texts, of 50": sum(run.tokens == whole.tokens for run, whole in pairs),
        "tokens before the first other one": round(statistics.mean(_common(run, whole) for run, whole in pairs), 1),
        "mean blocks": round(statistics.mean(exit_ for run in runs for exit_ in run.exits), 1),
        "ms a token": statistics.median(run.ms / NEW for run in runs),
        "of full": round(statistics.median(run.ms / whole.ms for run, whole in pairs), 3),
    }


def _common(run: Run, whole: Run) -> int:
    pairs = zip(run.tokens, whole.tokens, strict=True)
    return next((at for at, (one, other) in enumerate(pairs) if one != other), NEW)


def main() -> None:
    """Print two tables."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    rounds(parser)
    args = parser.parse_args()
    if not recipe.WEIGHTS.is_file():
        raise SystemExit(f"no {recipe.WEIGHTS.name}\n  try: {recipe.COMMAND}")
    program = by_depth()
    measures, after = (SHORT, PICK), (*recipe.EXITS, BLOCKS)
    scores = offramp.InsertScores(measure=measures, after=after, ids=recipe.common(CANDIDATES))
    say(f"exporting {BUNDLE}")
    offramp.save(
        offramp.apply(program, [scores, offramp.InsertCache()]),
        BUNDLE,
        segments=1,
        generation=zoo.generation("smollm2"),
        files=zoo.tokenizer_files("smollm2"),
    )
    chain = offramp.load(BUNDLE)
    asked = prompts(Tokenizer.from_file(str(Path(BUNDLE) / "tokenizer.json")))
    every = ways()
    decoded(chain, asked[0], every["full depth"])  # warms up
    measured = []
    for number in range(args.rounds):
        runs: dict[str, list[Run]] = {name: [] for name in every}
        for prompt in steps(asked, f"round {number + 1} of {args.rounds}"):
            for name, policy in every.items():
                runs[name].append(decoded(chain, prompt, policy))
        measured.append([shown(row(name, found, runs["full depth"])) for name, found in runs.items()])
    rows = spread(measured)
    report("language", f"SmolLM2-135M, {PROMPTS} prompts of {WORDS} words, {NEW} new tokens, greedy, fp32", rows)


if __name__ == "__main__":
    main()
