"""Time a bundle at full depth and at every exit.

The ways alternate (A B C A B C ...), so that a machine that drifts does so for all; figures are medians. Inputs
are made up unless they are given: masks of ones, other whole numbers 0, noise.

With --depths, a bundle with caches generates after a made-up prompt, and the table says what leaving early is
worth: milliseconds a token when every token leaves there, and when every 2nd, 4th or 8th goes to full depth,
which computes what the others left out; there every token pays for the exit's scores, as it does with a policy.

With --against, another engine takes its turns: one pass of the same inputs as a further way; or what it generates
after the same prompt, in a process of its own, beside what the bundle generates.
"""

from __future__ import annotations

import argparse
import statistics
from collections import defaultdict
from collections.abc import Callable, Mapping
from functools import partial
from time import perf_counter, sleep
from typing import TYPE_CHECKING, Any

from offramp.cli import _against, _common, _inputs

if TYPE_CHECKING:
    from offramp.runtime import Chain, Policy


def arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the subcommand's arguments."""
    _inputs.add_arguments(parser)
    number = _common.positive
    parser.add_argument("--batch", metavar="N", type=number, default=1, help="rows of made-up inputs (default 1)")
    parser.add_argument(
        "--tokens", metavar="N", type=number, default=64, help="length of their other free axes (default 64)"
    )
    parser.add_argument(
        "--repeat",
        metavar="N",
        type=number,
        help="runs of each way (default 20); tokens with --depths, or against what generates (default 32)",
    )
    way = parser.add_mutually_exclusive_group()
    way.add_argument("--depths", action="store_true", help="the break-even of leaving early, token by token")
    way.add_argument(
        "--against", metavar="ENGINE=PATH", type=_against.parsed, action="append", default=[], help=_against.HELP
    )


def run(args: argparse.Namespace) -> int:
    """Load, time and print."""
    import offramp

    chain = offramp.load(args.bundle, args.provider, args.threads)
    if args.depths:
        from offramp.cli import _depths

        return _depths.run(chain, args)
    if _against.generates(args.against):
        from offramp.cli import _against_generation

        return _against_generation.run(chain, args)
    if args.input or args.text or args.pair or args.audio or args.image:
        inputs = _inputs.one(chain, _inputs.asked(chain, args))
    else:
        inputs = _inputs.made_up(chain, args.batch, args.tokens)
    print(", ".join(f"{name} {list(array.shape)}" for name, array in inputs.items()))
    ways: dict[str, Policy] = {"full depth": offramp.Never()}
    for name, stack in chain.stacks.items():
        for item in stack.exits[:-1]:
            ways[f"{name} {item.after} of {stack.blocks}"] = offramp.Depth({name: item.after})
    others = _against.runs(args.against, inputs, args)
    times, segments = measure(chain, inputs, ways, args.repeat or 20, others)
    full = statistics.median(times["full depth"])
    rows = [(way, statistics.median(all_), min(all_), full / statistics.median(all_)) for way, all_ in times.items()]
    print(f"\n{_common.table(('left after', 'median ms', 'least ms', 'speed-up'), rows)}")
    if others:
        expected = chain.run(inputs, offramp.Never()).outputs
        differences = _against.differences(expected, {name: other() for name, other in others.items()})
        print("\n" + "\n".join(differences))
    parts = [(name, statistics.median(all_)) for name, all_ in segments.items()]
    print(f"\n{_common.table(('segment', 'median ms'), parts)}")
    return 0


def measure(
    chain: Chain,
    inputs: Mapping[str, Any],
    ways: Mapping[str, Policy],
    repeat: int,
    others: Mapping[str, Callable[[], object]] | None = None,
) -> tuple[dict[str, list[float]], dict[str, list[float]]]:
    """Milliseconds of ``repeat`` alternating runs after two that do not count: by way, and by segment.

    ``others`` are further ways, of other engines.
    """
    runs: dict[str, Callable[[], object]] = {way: partial(chain.run, inputs, policy) for way, policy in ways.items()}
    runs |= others or {}
    times: dict[str, list[float]] = {way: [] for way in runs}
    segments: dict[str, list[float]] = defaultdict(list)
    for round_ in range(-2, repeat):
        for way, once in runs.items():
            sleep(_against.PAUSE if others else 0.0)
            started = perf_counter()
            result = once()
            elapsed = (perf_counter() - started) * 1e3
            if round_ >= 0:
                times[way].append(elapsed)
                for timing in getattr(result, "trace", ()):
                    segments[timing.segment].append(timing.milliseconds)
    return times, segments
