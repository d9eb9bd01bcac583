"""Run a bundle on files, text, sound or images; needs no torch.

Prints the outputs, where each row left each stack, and the segments in the order in which they ran. A bundle
with caches generates text instead, and prints it as it comes; of several rows each when it ends.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from offramp.cli import _common, _generate, _inputs, _results
from offramp.errors import InputError

if TYPE_CHECKING:
    from offramp.runtime import Chain, Result

POLICIES = (
    "never, depth:encoder=2, confidence:0.9,measure=top1, entropy:0.3, patience:2, adaptive:2,target=0.99, verify:2, "
    "width:0.4 (of learners), width:0.4,confidence:0.9 (and exits)"
)


def arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the subcommand's arguments."""
    _inputs.add_arguments(parser)
    parser.add_argument("--policy", metavar="SPEC", help=f"{POLICIES}, ...; the bundle's own if left out")
    parser.add_argument(
        "--figure",
        metavar="FILE.png",
        type=Path,
        help="draw after how many blocks each patch, word and written token of one row left; of a bundle with "
        "learners how many of them each token took, in one pass (needs matplotlib)",
    )
    parser.add_argument(
        "-o", "--output", metavar="DIR", type=Path, help="write the outputs of one pass to DIR/NAME.npy"
    )
    _generate.add_arguments(parser)


def run(args: argparse.Namespace) -> int:
    """Load, run and print."""
    import numpy as np

    import offramp
    from offramp.cli import _policy

    policy = _policy.parse(args.policy) if args.policy else None
    chain = offramp.load(args.bundle, args.provider, args.threads)
    if _generate.wanted(chain, args):
        return _generate.run(chain, args, policy)
    if args.figure:
        from offramp.cli import _exits_figure, _learners_figure

        (_learners_figure if chain.manifest.learners else _exits_figure).check(chain)
    batches = _inputs.asked(chain, args)
    _inputs.check_complete(chain, batches)
    if args.figure and (rows := _inputs.rows(chain, batches)) > 1:
        from offramp.cli import _learners_picture

        raise _learners_picture.several(rows)
    results = [chain.run(inputs, policy) for inputs in batches]
    outputs = _results.outputs(chain, results)
    texts = [" | ".join(row) for row in zip(args.text, args.pair, strict=True)] if args.pair else args.text
    parts = [_outputs(outputs), *_results.meanings(chain, args.bundle, outputs, texts, batches)]
    print(*parts, _exits(chain, results, texts), *_width(chain, results), _trace(results), sep="\n\n")
    if args.output:
        try:
            args.output.mkdir(parents=True, exist_ok=True)
            for name, array in outputs.items():
                np.save(args.output / f"{name}.npy", array)
        except OSError as error:
            raise InputError(f"--output {args.output} cannot be written: {error}", hint="a directory") from error
    if args.figure and chain.manifest.learners:
        _learners_figure.write(chain, args.bundle, batches, results, args.figure)
    elif args.figure:
        _exits_figure.write(chain, args.bundle, batches, results[0].exits, args.figure)
    return 0


def _outputs(outputs: Mapping[str, Any]) -> str:
    return _common.table(
        ("output", "type", "shape", "least", "mean", "greatest"),
        [(name, str(array.dtype), list(array.shape), *_range(array)) for name, array in outputs.items()],
    )


def _range(array: Any) -> tuple[float, ...]:
    return (float(array.min()), float(array.mean()), float(array.max())) if array.size else (float("nan"),) * 3


def _exits(chain: Chain, results: Sequence[Result], texts: Sequence[str]) -> str:
    """One line for each row and stack: the block after which it left, and the last scores that were looked at."""
    rows = []
    for name in results[0].exits:
        blocks = chain.stacks[name].blocks
        if any(result.exits[name].ndim > 1 for result in results):  # of each token
            every = [row for result in results for row in result.exits[name]]
            rows += [
                (at, name, f"{row.mean():.1f} of {blocks} (tokens: {row.min()} to {row.max()})", "", _at(texts, at))
                for at, row in enumerate(every)
            ]
            continue
        taken = [(result, row, after) for result in results for row, after in enumerate(result.exits[name])]
        for at, (result, row, after) in enumerate(taken):
            looked = [scores for depth, scores in result.scores[name].items() if depth <= after]
            scores = (
                ", ".join(f"{measure} {values[row]:.4g}" for measure, values in looked[-1].items()) if looked else ""
            )
            rows.append((at, name, f"{after} of {blocks}", scores, _at(texts, at)))
    heads = ("row", "stack", "left after", "scores", "text")
    return _common.table(heads if texts else heads[:-1], rows if texts else [row[:-1] for row in rows])


def _at(texts: Sequence[str], row: int) -> str:
    return texts[row] if row < len(texts) else ""


def _width(chain: Chain, results: Sequence[Result]) -> list[str]:
    """What ran of the learners, where the bundle has any: of all batches, which may have tokens of different number."""
    ran = whole = 0
    for result in results:
        for name, taken in result.learners.items():
            item, there = chain.manifest.learners[name], taken[taken >= 0]
            ran += item.flops * int(there.sum())
            whole += item.flops * item.learners * there.size
    return [f"{ran / whole:.0%} of the learners ran"] if whole else []


def _trace(results: Sequence[Result]) -> str:
    trace = [timing for result in results for timing in result.trace]
    rows: list[tuple[str, object, float]] = [(t.segment, t.rows, t.milliseconds) for t in trace]
    return _common.table(("segment", "rows", "ms"), [*rows, ("all", "", sum(t.milliseconds for t in trace))])
