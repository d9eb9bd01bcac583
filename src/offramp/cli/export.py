"""Export a model, rewritten by a pipeline, as a bundle that ONNX Runtime runs.

Every segment, the whole chain and every exit are compared with torch before the bundle gets its name. The
tokenizer.json of a zoo: or hf: model goes into it, and how a zoo: model generates text and hears sound. A
causal model generates token by token only with -p "insert-cache,...".
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from offramp.cli import _common
from offramp.runtime.errors import InputError


def arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the subcommand's arguments."""
    _common.model_argument(parser)
    parser.add_argument("-o", "--output", metavar="DIR", type=Path, required=True, help="the bundle's directory")
    _common.pipeline_argument(parser, default="no exits")
    parser.add_argument(
        "--segments", metavar="N", type=_common.positive, help="pieces per stack; one per block if left out"
    )
    parser.add_argument(
        "--target",
        choices=("ort", "portable"),
        default="ort",
        help="operators of cached attention: ONNX Runtime's own (ort, the default), or ONNX's, opset 24",
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
    if missing := [str(file) for file in args.file or [] if not file.is_file()]:
        raise InputError(f"--file {', '.join(missing)}: there is no such file")
    passes = _common.passes(args.pipeline)
    program = _common.captured(args.model)
    if passes:
        program = offramp.apply(program, passes)
    with _common.progress("exporting") as shown:
        figures = offramp.save(
            program,
            args.output,
            segments=args.segments,
            target=args.target,
            generation=generation(args.model),
            preprocessing=preprocessing(args.model),
            files=_files(args.model, args.file or []),
            policy=policy,
            name=args.name,
            progress=shown,
        )
    print(offramp.load(args.output))
    errors = ", ".join(f"{what} {error:.1e}" for what, error in figures.items() if what != "tolerance")
    print(f"errors against torch: {errors} (allowed {figures['tolerance']:.0e})")
    return 0


def generation(model: str) -> dict[str, Any]:
    """How a model of the zoo generates text; empty for all others."""
    from offramp import zoo

    scheme, _, name = model.partition(":")
    return {**zoo.generation(name)} if scheme == "zoo" else {}


def preprocessing(model: str) -> dict[str, Any]:
    """How a model of the zoo hears; empty for all others."""
    from offramp import zoo

    scheme, _, name = model.partition(":")
    audio = zoo.audio(name) if scheme == "zoo" else {}
    return {"audio": audio} if audio else {}


def _files(model: str, further: list[Path]) -> list[Path]:
    """The tokenizer that comes with a model, and further files; of one name the latter."""
    from offramp import zoo
    from offramp.cli._inputs import TOKENIZER

    scheme, _, rest = model.partition(":")
    own = list(zoo.tokenizer_files(rest)) if scheme == "zoo" else []
    if scheme == "hf":
        own = [file for file in (Path(rest) / TOKENIZER,) if file.is_file()]
    return [*(file for file in own if file.name not in {other.name for other in further}), *further]
