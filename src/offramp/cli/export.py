"""Export a model, rewritten by a pipeline, as a bundle that ONNX Runtime runs.

Every segment, the whole chain and every exit are compared with torch before the bundle gets its name; where
weights get fewer bits (--precision), that in turn is compared with the bundle in fp32. What a zoo: or hf:
model has beside its weights goes into it: tokenizer.json, how it generates (of hf: generation_config and chat
template), how text, sound and images become its inputs, and the names of its classes. Without -p a model that
generates text gets caches for it, and no exits; -p "" changes nothing at all.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from offramp.cli import _common, _data, _precision
from offramp.errors import InputError


def arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the subcommand's arguments."""
    _common.model_argument(parser)
    parser.add_argument("-o", "--output", metavar="DIR", type=Path, required=True, help="the bundle's directory")
    _common.pipeline_argument(parser, default="caches where the model generates")
    _precision.add_arguments(parser)
    parser.add_argument(
        "--samples",
        metavar="FILE",
        type=Path,
        help="by which weights of 4 bits are rounded, and on which a bundle in fewer bits is compared with fp32: some "
        f"thousand tokens of what the model is for; the captured inputs if left out; {_data.FILE}: what it is to write "
        "(what it writes in fp32 if left out)",
    )
    parser.add_argument(
        "--agreement",
        metavar="SHARE",
        type=float,
        default=0.0,
        help="of answers, and of exits taken, that are to be the same as in fp32 then (0)",
    )
    parser.add_argument(
        "--segments", metavar="N", type=_common.positive, help="pieces per stack; one per block if left out"
    )
    parser.add_argument(
        "--target",
        choices=("ort", "portable"),
        default="ort",
        help="operators of cached attention: ONNX Runtime's own (ort, the default), or ONNX's, opset 24",
    )
    parser.add_argument(
        "--learners",
        choices=("dense", "grouped"),
        help="how learners run: all, or each on the tokens that take it; what is faster here if left out",
    )
    parser.add_argument("--name", help="what the bundle calls the model; the directory's name if left out")
    parser.add_argument("--policy", metavar="SPEC", help="the bundle's default policy (see offramp run), in fp32 alone")
    parser.add_argument(
        "--file", metavar="FILE", type=Path, action="append", help="a further file for the bundle; may be repeated"
    )
    _common.ignore_generation_argument(parser)


def run(args: argparse.Namespace) -> int:
    """Capture, rewrite, save, and print what came out."""
    import offramp
    from offramp import models
    from offramp.bundle.precision import ANSWERS, ERROR, EXITS
    from offramp.cli import _policy, _samples
    from offramp.passes.default import with_caches

    precision = _precision.read(args.precision)
    if args.samples and precision == "fp32":
        raise InputError("--samples: of a bundle in fp32 nothing is rounded or compared", hint="--precision int4")
    samples = _samples.reader(args.samples) if args.samples else None
    policy = _policy.parse(args.policy).to_dict() if args.policy else None
    if missing := [str(file) for file in args.file or [] if not file.is_file()]:
        raise InputError(f"--file {', '.join(missing)}: there is no such file")
    files = {file.name: file for file in args.file or []}
    if again := [str(file) for file in args.file or [] if files[file.name] != file]:
        raise InputError(
            f"--file {', '.join(again)}: another --file has that name, and a bundle has no folders of such files",
            hint="other names",
        )
    passes = _common.passes(args.pipeline)
    module, inputs = _common.loaded(args.model)
    models.check_generation(args.model, module, args.ignore_generation)  # before what takes long
    program, inputs = models.captured(args.model, module, inputs, offramp.capture, _common.note)
    own = models.settings(args.model, module, inputs, ignore_generation=args.ignore_generation, note=_common.note)
    if args.pipeline is not None:
        program = offramp.apply(program, passes)
    else:
        program, reason = with_caches(program)
        if reason:
            _common.note(f"no caches, so the bundle does not generate: {' '.join(reason.split())}")
        elif own["generation"] and program.cache is None:
            _common.note(
                "the bundle does not generate: its model does, but what its forward returns "
                f"({', '.join(program.outputs)}) comes of no causal stack"
            )
    with _common.progress("exporting") as shown:
        figures = offramp.save(
            program,
            args.output,
            precision,
            samples=samples,
            loss=args.loss,
            agreement=args.agreement,
            segments=args.segments,
            target=args.target,
            learners=args.learners,
            generation=own["generation"],
            preprocessing=own["preprocessing"],
            labels=own["labels"],
            files=own["files"] | files,
            policy=policy,
            name=args.name,
            **models.origin(args.model),
            progress=shown,
        )
    print(offramp.load(args.output))
    apart = {"tolerance", ERROR, ANSWERS, EXITS}
    errors = ", ".join(f"{what} {error:.1e}" for what, error in figures.items() if what not in apart)
    print(f"errors against torch: {errors} (allowed {figures['tolerance']:.0e})")
    return 0
