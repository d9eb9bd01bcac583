"""Do a bundle's exits and widths pay, on this machine? Quality against time, and the best there could be.

With --data every setting is run in turns with full depth, beside the bundle's own policy; a perfect gate is reckoned
from the times of the segments. Without --data only times are measured. Needs no torch.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import TYPE_CHECKING

from offramp.cli import _common, _data, _figures, _inputs
from offramp.errors import InputError

if TYPE_CHECKING:
    from offramp.calibration.reporting import Report
    from offramp.calibration.verdicts import Point

_MADE_UP_ROWS, _MADE_UP_TOKENS, _MADE_UP_NEW = 8, 64, 32


def arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the subcommand's arguments."""
    _data.add_arguments(parser, required=False)
    parser.add_argument(
        "--stack", metavar="NAME", help="the stack that is left early; the last with scores if left out"
    )
    parser.add_argument("--json", action="store_true", help="print one line of JSON")
    parser.add_argument(
        "--figure", metavar="FILE.png", type=Path, help="draw the frontier (needs --data and matplotlib)"
    )


def run(args: argparse.Namespace) -> int:
    """Measure and print."""
    import offramp
    from offramp.calibration.reporting import report

    if args.figure:
        if not args.data:
            raise InputError("--figure shows quality, for which examples are needed", hint="--data FILE")
        _figures.need_matplotlib()
    chain = offramp.load(args.bundle, args.provider, args.threads)
    options = _data.options(args)
    if args.data:
        data = _data.read(chain, args.bundle, args.data, truncate=args.truncate)
    else:
        length, cache = _MADE_UP_TOKENS, chain.manifest.cache
        if cache is not None and chain.generates:
            room = cache.limit or length + _MADE_UP_NEW
            options = {"max_new_tokens": min(_MADE_UP_NEW, max(1, room // 2)), **options}
            length = max(1, min(length, room - options["max_new_tokens"] + 1))
        data = [_inputs.made_up(chain, 1, length) for _ in range(_MADE_UP_ROWS)]
    found = report(chain, data, stack=args.stack, judge=args.data is not None, **options)
    print(json.dumps(found.to_dict()) if args.json else text(found))
    if args.figure:
        draw(found, args.figure)
    return 0


def text(found: Report) -> str:
    """The sentence, and plain tables."""
    parts = [found.verdict]
    if found.full:
        rows = [_row(point) for point in (found.full, *found.frontier, *([found.oracle] if found.oracle else []))]
        parts.append(
            _common.table(("policy", "quality", f"ms {_common.a(found.step)}", "speed-up", "left after"), rows)
        )
    if found.widths:
        saved = [(f"{budget:g}", f"{share:.0%}") for budget, share in found.widths.items()]
        parts.append(_common.table(("width", "saves"), saved))
    if not found.segments:
        return "\n\n".join(parts)
    gates = sorted({name for times in found.segments.values() for name in times if name.startswith("gate ")})
    costs: list[tuple[object, ...]] = [
        (
            f"{after} of {found.blocks}",
            times["blocks"],
            times["leave"],
            *(f"{times[gate]:.3f}" if gate in times else "" for gate in gates),
            f"{found.depths[after]:.0%}" if after in found.depths else "",
            found.dropped.get(after, ""),
        )
        for after, times in found.segments.items()
        if after
    ]
    heads = (
        found.stack,
        "ms of blocks",
        "ms to leave",
        *(f"ms of {gate}" for gate in gates),
        "saves at most",
        "dropped",
    )
    parts.append(_common.table(heads, costs) + f"\naround the stack {found.segments[0]['around']:.3f} ms")
    return "\n\n".join(parts)


def _row(point: Point) -> tuple[object, ...]:
    left = ", ".join(f"{after}: {share:.0%}" for after, share in point.exits.items())
    return point.policy, point.quality, point.milliseconds, point.speedup, left


def draw(found: Report, file: Path) -> None:
    """Quality against milliseconds: the frontier of exits and that of widths, full depth, and the perfect gate.

    Raises:
        InputError: the file cannot be written.
    """
    from matplotlib.figure import Figure

    from offramp.calibration.reporting import OWN

    assert found.full is not None
    figure = Figure(figsize=(6.4, 4.0), layout="constrained")
    axes = figure.add_subplot()
    settings = sorted((point for point in found.frontier if point.policy != OWN), key=lambda point: point.milliseconds)
    for measure in dict.fromkeys(point.policy.split()[0] for point in settings):
        line = [point for point in settings if point.policy.split()[0] == measure]
        axes.plot(
            [point.milliseconds for point in line], [point.quality for point in line], "o-", label=f"by {measure}"
        )
    axes.plot(found.full.milliseconds, found.full.quality, "ks", label=found.full.policy)
    for point in found.frontier:
        if point.policy == OWN:
            axes.plot(point.milliseconds, point.quality, "rD", label=OWN)
    if found.oracle is not None:
        axes.plot(found.oracle.milliseconds, found.oracle.quality, "g*", markersize=12, label=found.oracle.policy)
    axes.axhline(found.full.quality, color="0.8", linewidth=1, zorder=0)
    axes.set_xlabel(f"milliseconds {_common.a(found.step)}")
    axes.set_ylabel("quality")
    axes.set_xlim(left=0)
    axes.set_title(found.verdict.partition(":")[0] + f": {found.stack} of {found.blocks} blocks")
    axes.legend()
    _figures.save(figure, file)
