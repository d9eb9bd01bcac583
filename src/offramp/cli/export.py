"""Export a model, rewritten by a pipeline, as a bundle that ONNX Runtime runs.

Every segment, the whole chain and every exit are compared with torch before the bundle gets its name. The
tokenizer.json of a zoo: or hf: model goes into it.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from offramp.cli import _common


def arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the subcommand's arguments."""
    _common.model_argument(parser)
    parser.add_argument("-o", "--output", metavar="DIR", type=Path, required=True, help="the bundle's directory")
    _common.pipeline_argument(parser, default="no exits")
    parser.add_argument(
        "--segments", metavar="N", type=_common.positive, help="pieces per stack; one per block if left out"
    )
    parser.add_argument("--name", help="what the bundle calls the model; the directory's name if left out")
    parser.add_argument("--policy", metavar="SPEC", help="the bundle's default policy (see offramp run)")
    parser.add_argument(
        "--file", metavar="FILE", type=Path, action="append", help="a further file for the bundle; may be repeated"
    )


def run(args: argparse.Namespace) -> int:
    """Capture, rewrite, save, and print what came out."""
    import offramp
    from offramp.cli import _policy

    policy = _policy.parse(args.policy).to_dict() if args.policy else None
    program = _common.captured(args.model)
    if args.pipeline:
        program = offramp.apply(program, args.pipeline)
    with _common.progress("exporting") as shown:
        figures = offramp.save(
            program,
            args.output,
            segments=args.segments,
            files=args.file or _tokenizer(args.model),
            policy=policy,
            name=args.name,
            progress=shown,
        )
    print(offramp.load(args.output))
    errors = ", ".join(f"{what} {error:.1e}" for what, error in figures.items() if what != "tolerance")
    print(f"errors against torch: {errors} (allowed {figures['tolerance']:.0e})")
    return 0


def _tokenizer(model: str) -> list[Path]:
    """The tokenizer.json that comes with a model."""
    from offramp import zoo
    from offramp.cli._inputs import TOKENIZER

    scheme, _, rest = model.partition(":")
    if scheme == "zoo":
        return [file for file in zoo.tokenizer_files(rest) if file.name == TOKENIZER]
    return [file for file in (Path(rest) / TOKENIZER,) if scheme == "hf" and file.is_file()]
