"""``--precision``, which export and check have."""

from __future__ import annotations

import argparse


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The precision, and how far outputs may be from fp32 in it."""
    parser.add_argument(
        "--precision",
        metavar="SPEC",
        default="fp32",
        help="of the weights: fp32, fp16, int8, int4; one for segments by their names, 'decoder.*=int4,tail=int8'; or "
        "auto, for each segment what is fastest on this machine within the bounds",
    )
    parser.add_argument(
        "--loss",
        metavar="X",
        type=float,
        help="how far outputs may be from fp32 then, of their scale (.05, with int4 .3)",
    )


def read(text: str) -> str | dict[str, str]:
    """The precision that ``--precision`` says."""
    if "=" not in text:
        return text
    return {
        pattern: sign and precision for pattern, sign, precision in (item.partition("=") for item in text.split(","))
    }
