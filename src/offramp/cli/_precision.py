"""``--precision``, which export and check have."""

from __future__ import annotations

import argparse

from offramp.errors import ExportError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The precision, and how far outputs may be from fp32 in it."""
    parser.add_argument(
        "--precision",
        metavar="SPEC",
        default="fp32",
        help="of the weights: fp32, fp16, int8, int4; PATTERN=PRECISION,... for segments by their names, "
        "'tail=fp32,decoder.*=int4,*=int8', where the first pattern that matches counts, and what none matches is "
        "fp32; or auto, for each segment what is fastest on this machine within the bounds",
    )
    parser.add_argument(
        "--loss",
        metavar="X",
        type=float,
        help="how far outputs may be from fp32 then, of their scale (.05, with int4 .3)",
    )


def read(text: str) -> str | dict[str, str]:
    """The precision that ``--precision`` says; ExportError where it is none."""
    if not {"=", ","} & set(text):
        return text
    items = [[part.strip() for part in item.partition("=")] for item in text.split(",")]
    given = {pattern: precision for pattern, sign, precision in items if sign}
    patterns = [pattern for pattern, *_ in items]
    if twice := next((pattern for pattern in patterns if patterns.count(pattern) > 1), None):
        raise ExportError(f"--precision {text!r}: {twice!r} is there twice", hint="one precision for each pattern")
    alone = [pattern for pattern, sign, _ in items if not sign]
    if alone:
        given = given or {"encoder.1": "fp32"}
        rest = alone[0] if alone[0] in ("fp32", "fp16", "int8", "int4") else "int8"
        example = ",".join(f"{pattern}={precision}" for pattern, precision in {**given, "*": rest}.items())
        raise ExportError(
            f"--precision {text!r}: one precision, or PATTERN=PRECISION for each, and {alone[0]!r} is not",
            hint=f"--precision {example!r}, where * is every segment that no pattern before it takes",
        )
    return given
