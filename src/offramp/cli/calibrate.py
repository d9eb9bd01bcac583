"""Choose when a bundle's rows or tokens leave, or how wide it runs, so that it keeps its quality.

The choice becomes the bundle's default policy. With the probability --confidence, on data like the examples, the
quality is at least --keep times that of the whole model: every block (full depth), and where insert-acm has split MLPs
into learners, parts that a token may do without, all of them (width 1). Exits and widths that cost more than they save
on this machine are left out; where nothing can be proven (with the defaults it takes about 650 examples at least), or
nothing pays, the default is the whole model, and the reason is printed. Quality is the share of classes that are those
of the labels, or without labels those that the whole model gives; of generated tokens, 1 less the normalised edit
distance. Other qualities, which models without classes need, are for offramp.calibrate(quality=...) in Python. Needs
no torch.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Literal

from offramp.cli import _common, _data
from offramp.errors import InputError

if TYPE_CHECKING:
    from offramp.calibration import Calibration
    from offramp.runtime import Chain, Each


def arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the subcommand's arguments."""
    _data.add_arguments(parser, required=True)
    parser.add_argument(
        "--stack",
        metavar="NAME",
        action="append",
        help="the stack (of blocks: encoder, decoder, ...) that is left early; if left out the last whose exits have "
        "scores. Repeated, thresholds and fixed depths of all are chosen together, which runs three in ten examples "
        "for each exit and for up to 64 combinations",
    )
    parser.add_argument(
        "--keep",
        metavar="SHARE",
        type=float,
        default=0.99,
        help="of the whole model's quality that is to be kept (default 0.99)",
    )
    parser.add_argument(
        "--confidence", metavar="P", type=float, default=0.95, help="the probability that it is kept (default 0.95)"
    )
    parser.add_argument(
        "--measure",
        metavar="NAME",
        help="the score that exits go by (top1, entropy, ...: offramp inspect lists them); the fastest if left out",
    )
    parser.add_argument(
        "--width",
        metavar="SHARE",
        type=_width,
        help='of a bundle with learners, the share of them that tokens take on average: "choose" chooses it, and no '
        "exits; with a number, 0.5 say, exits are chosen for a bundle that runs at that width. If left out, exits are "
        "chosen at width 1, or where no exit has a score, the width",
    )
    parser.add_argument(
        "--others",
        choices=("full", "own"),
        default="full",
        help="what stacks other than --stack do: full depth (the default), or what the bundle's own policy says, from "
        "a calibration on other examples; so one stack, or one group of tokens, is chosen after the other",
    )
    parser.add_argument(
        "--seed",
        metavar="N",
        type=int,
        default=0,
        help="of the random split of the examples: three in ten to choose settings by, the others to test them "
        "(default 0)",
    )


def run(args: argparse.Namespace) -> int:
    """Calibrate, write the manifest, print."""
    import offramp

    chain = offramp.load(args.bundle, args.provider, args.threads)
    calibration = offramp.calibrate(
        chain,
        _data.read(chain, args.bundle, args.data, truncate=args.truncate),
        keep=args.keep,
        confidence=args.confidence,
        stack=args.stack[0] if args.stack and len(args.stack) == 1 else args.stack,
        measure=args.measure,
        width=args.width,
        others=_others(chain, args),
        seed=args.seed,
        **_data.options(args),
    )
    if calibration.chosen:
        calibration.write(args.bundle)
    print(_text(calibration))
    return 0


def _others(chain: Chain, args: argparse.Namespace) -> Each | None:
    """What stacks other than the one that is named do."""
    if args.others == "full":
        return None
    if args.stack is None:
        raise InputError("--others own: the others of which stack?", hint=f"--stack {next(iter(chain.stacks))}")
    from offramp.runtime import Each, Never, Width

    policy = chain.policy.exits if isinstance(chain.policy, Width) else chain.policy
    if policy in (None, Never()):
        return None
    if not isinstance(policy, Each):
        raise InputError(
            f"--others own: the bundle's policy {policy!r} is no policy for each stack", hint="--others full"
        )
    others = {name: one for name, one in policy.stacks.items() if name not in args.stack}
    return Each(others) if others else None


def _width(text: str) -> float | Literal["choose"]:
    try:
        return "choose" if text == "choose" else float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is neither a number nor 'choose'") from None


def _text(calibration: Calibration) -> str:
    record = calibration.record
    lines = [f"policy   {calibration.policy}"]
    if record["reason"]:
        lines.append(f"because  {record['reason']}")
    if "executed" in record:
        lines.append(f"width    {record['executed']:.1%} of the learners' operations are executed")
    if risk := record.get("risk"):
        how = "at this width" if "budgets" in record else "with exits"
        lines.append(
            f"quality  {risk['early']:.4f} {how}, {risk['full']:.4f} at full depth, in {risk['examples']} test "
            f"examples; at least {record['keep']:g} of it with confidence {record['confidence']:g} "
            f"(p = {risk['p_value']:.2g})"
        )
        times = record["milliseconds"]
        lines.append(
            f"time     {times['expected']:.3f} ms {_common.a(record['step'])} expected, {times['full']:.3f} ms at full "
            f"depth: {times['full'] / times['expected']:.2f}x"
        )
    if "budgets" in record:
        lines += ["", _widths(record)]
    elif "stacks" in record:
        lines += ["", _stacks(record)]
    elif record.get("temperatures") or record.get("dropped"):
        lines += ["", _exits(record)]
    return "\n".join(lines)


def _widths(record: Mapping[str, Any]) -> str:
    """One line for each width: what came of its test, or why there was none."""
    settings = record["settings"]
    found = {f"{budget:g}": "not tested, since one before failed" for budget in record["budgets"]}
    for at, budget in enumerate(list(found)[: settings["tested"]]):
        found[budget] = "passed" if at < settings["passed"] else "failed"
    found |= {budget: f"not tested: {why}" for budget, why in record["dropped"].items()}
    return _common.table(("width", "test"), [(budget, found[budget]) for budget in sorted(found, key=float)[::-1]])


def _stacks(record: Mapping[str, Any]) -> str:
    """One line for each stack that was chosen for."""
    from offramp.runtime.policies.builtin import from_dict

    rows = [
        (name, str(from_dict(found["policy"])) if "policy" in found else "", found["candidates"])
        for name, found in record["stacks"].items()
    ]
    return _common.table(("stack", "policy", "of"), rows)


def _exits(record: Mapping[str, Any]) -> str:
    """One line for each exit: its threshold, or why it is not asked."""
    thresholds, dropped = record.get("thresholds", {}), record["dropped"]
    after = sorted({*record["temperatures"], *dropped}, key=int)
    rows = [(int(at), f"{thresholds[at]:.6g}" if at in thresholds else "", dropped.get(at, "")) for at in after]
    return _common.table(("after", record["measure"], "not asked, because"), rows)
