"""Choose when a bundle's rows or tokens leave, so that it keeps its quality, and make that its default.

With the probability --confidence over the examples, the quality with exits is at least --keep times that at full
depth. Exits that cost more than they save on this machine are left out; where nothing can be proven, or nothing
pays, the default is full depth, and the reason is printed. Quality is being right about the labels, or without
labels agreement with full depth; of generated tokens, 1 less the normalised edit distance. Needs no torch.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from offramp.cli import _common, _data

if TYPE_CHECKING:
    from offramp.calibration import Calibration


def arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the subcommand's arguments."""
    _data.add_arguments(parser, required=True)
    parser.add_argument("--keep", metavar="SHARE", type=float, default=0.99, help="of the quality (default 0.99)")
    parser.add_argument("--confidence", metavar="P", type=float, default=0.95, help="that it is kept (default 0.95)")
    parser.add_argument("--measure", metavar="NAME", help="the score to go by; the fastest if left out")
    parser.add_argument("--seed", metavar="N", type=int, default=0, help="of the split into fitting and testing")


def run(args: argparse.Namespace) -> int:
    """Calibrate, write the manifest, print."""
    import offramp

    chain = offramp.load(args.bundle, args.provider, args.threads)
    calibration = offramp.calibrate(
        chain,
        _data.read(chain, args.bundle, args.data, truncate=args.truncate),
        keep=args.keep,
        confidence=args.confidence,
        stack=args.stack,
        measure=args.measure,
        seed=args.seed,
        **_data.options(args),
    )
    calibration.write(args.bundle)
    print(_text(calibration, "token" if chain.generates else "row"))
    return 0


def _text(calibration: Calibration, step: str) -> str:
    record = calibration.record
    lines = [f"policy   {calibration.policy}"]
    if record["reason"]:
        lines.append(f"because  {record['reason']}")
    if risk := record.get("risk"):
        lines.append(
            f"quality  {risk['early']:.4f} with exits, {risk['full']:.4f} at full depth, in {risk['examples']} test "
            f"examples; at least {record['keep']:g} of it with confidence {record['confidence']:g} "
            f"(p = {risk['p_value']:.2g})"
        )
        times = record["milliseconds"]
        lines.append(
            f"time     {times['expected']:.3f} ms a {step} expected, {times['full']:.3f} ms at full depth: "
            f"{times['full'] / times['expected']:.2f}x"
        )
    return "\n".join(lines) + ("\n\n" + _exits(record) if record.get("temperatures") or record.get("dropped") else "")


def _exits(record: Mapping[str, Any]) -> str:
    """One line for each exit: its threshold, or why it is not asked."""
    thresholds, dropped = record.get("thresholds", {}), record["dropped"]
    after = sorted({*record["temperatures"], *dropped}, key=int)
    rows = [(int(at), f"{thresholds[at]:.6g}" if at in thresholds else "", dropped.get(at, "")) for at in after]
    return _common.table(("after", record["measure"], "not asked, because"), rows)
