"""Will this model work? Give it an exit after every block, and compare with torch.

Prints the figures; with --json one line of JSON on stdout, and everything else on stderr. Status 1 where the
model is refused or a result differs, with the stage and what to try.
"""

from __future__ import annotations

import argparse
import logging
import sys
from contextlib import redirect_stdout
from typing import TYPE_CHECKING

from offramp.cli import _common, _precision

if TYPE_CHECKING:
    from offramp.check import Report

log = logging.getLogger(__name__)


def arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the subcommand's arguments."""
    _common.model_argument(parser)
    _common.pipeline_argument(parser, default="caches where the model generates, and an exit after every block")
    _precision.add_arguments(parser)
    _common.ignore_generation_argument(parser)
    parser.add_argument("--json", action="store_true", help="print one line of JSON")


def run(args: argparse.Namespace) -> int:
    """Check and print, whatever happens on the way."""
    with redirect_stdout(sys.stderr):  # models print
        from offramp.check import Check

        with _common.progress("exporting") as shown:
            check = Check(
                args.model,
                pipeline=args.pipeline,
                precision=_precision.read(args.precision),
                loss=args.loss,
                ignore_generation=args.ignore_generation,
                progress=shown,
                note=_common.note,
            )
            try:
                check.run()
            except Exception as error:
                log.info("the check broke off", exc_info=True)
                label = "the model's own code failed" if check.stage == "model" else "internal error"
                check.failed(check.stage, f"{label}: {type(error).__name__}: {error}")
    report = check.report
    print(report.to_json() if args.json else _text(report))
    return 0 if report.ok else 1


def _text(report: Report) -> str:
    lines = [f"{report.model}: " + ("ok" if report.ok else f"{report.stage}: {report.reason}")]
    if report.ok and report.reason:
        lines.append(f"  note     {report.reason}")
    for stack in report.stacks:
        cached = ", cached" if stack.cached else ""
        lines.append(f"  stack    {stack.name}: {stack.blocks} blocks ({stack.role}{cached})")
    if report.segments is not None:
        lines.append(f"  bundle   {report.exits} exits, {report.segments} segments, {report.bytes['bundle']:,} bytes")
    errors = [f"{name} {error:.1e}" for name, error in report.max_error.items() if error is not None]
    seconds = [f"{step} {time:.1f}" for step, time in report.seconds.items() if time is not None]
    lines += [f"  errors   {', '.join(errors)}"] if errors else []
    same = [f"{name} {share:.1%}" for name, share in report.agreement.items()]
    lines += [f"  same     {', '.join(same)}, as in fp32"] if same else []
    lines += [f"  seconds  {', '.join(seconds)}"] if seconds else []
    return "\n".join(lines)
