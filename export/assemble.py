"""``save``: a program becomes a bundle directory, validated against torch before it gets its name."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from importlib.metadata import version
from pathlib import Path
from secrets import token_hex
from typing import Any, Literal

import onnx
import onnxruntime
import torch

from offramp.bundle.json_text import from_json, section, to_json
from offramp.bundle.manifest import MANIFEST_FILE, Generation
from offramp.bundle.preprocessing import Preprocessing
from offramp.errors import ExportError, PolicyError
from offramp.export.describe import Describer, Progress
from offramp.export.encode import Precision, precisions, screens
from offramp.export.fewer_bits import in_fewer_bits
from offramp.export.forms import fastest
from offramp.export.lowering.exporter import OPSET
from offramp.export.lowering.node_builder import TARGETS, Target
from offramp.export.multistep import with_steps
from offramp.export.partition import partition
from offramp.export.patterns import check_patterns
from offramp.export.prepare import prepared
from offramp.export.validation import at_full_width, given, opened, validate
from offramp.export.whole import with_whole
from offramp.export.write import Writer
from offramp.program.autocast import without_autocast
from offramp.program.dropout import drawing
from offramp.program.graph import ancestors, results, source
from offramp.program.learners import FORMS
from offramp.program.program import Program, as_program
from offramp.runtime import card
from offramp.runtime.chain import Chain
from offramp.runtime.policies.base import Policy
from offramp.runtime.policies.builtin import from_dict


@without_autocast
def save(
    program: Program,
    path: str | os.PathLike[str],
    precision: Precision = "fp32",
    *,
    samples: Sequence[Mapping[str, Any]] | Callable[[Chain, Path], Sequence[Mapping[str, Any]]] | None = None,
    loss: float | None = None,
    agreement: float = 0.0,
    segments: int | None = None,
    target: Target = "ort",
    learners: Literal["dense", "grouped"] | None = None,
    generation: Mapping[str, Any] | None = None,
    preprocessing: Mapping[str, Any] | None = None,
    labels: Mapping[str, Sequence[str]] | None = None,
    files: Sequence[str | os.PathLike[str]] | Mapping[str, str | os.PathLike[str] | bytes] = (),
    policy: Policy | Mapping[str, Any] | None = None,
    name: str | None = None,
    source: str | None = None,
    licence: str | None = None,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Export a program as a bundle of ONNX segments, and validate it.

    Args:
        program: what to export.
        path: the bundle's directory. One that holds a bundle is replaced, once the new one is valid.
        precision: of the weights: "fp32"; "fp16", in which they are stored, and computed with in fp32; "int8", in
            blocks where tokens come one by one, with activations in whole numbers too where a segment runs on many
            (encoders, models without caches); "int4", in blocks (heads that are tied to tables of words with
            these in 8 bits, or by 512 tokens of samples in 4); one for each pattern of segments, of which the first
            that matches counts, ``{"tail": "fp32", "decoder.*": "int4"}``, and fp32 for the others; or "auto", for
            each segment what is fastest on this machine within ``loss`` and ``agreement``.
        samples: inputs on which an encoded bundle is compared with the one in fp32, and by which weights of 4 bits are
            rounded; the captured ones if left out. For 4 bits some thousand tokens of what the model is for are best.
            Or what gives them, called with the chain in fp32 and the directory of its files.
        loss: how far its outputs may be from those, the root of the mean square of the differences over that of the
            values; if left out .05, and .3 where something is int4.
        agreement: the share of answers (the greatest of several classes), and of exits taken, that are to be the same
            as in fp32. The latter is over thresholds from low to high: calibrated ones are chosen later.
        segments: how many per stack; None makes every block a segment of its own. Exits always end a segment.
        target: how cached attention is lowered: "ort" (ONNX Runtime's own operators, whose time follows the
            length that is filled) or "portable" (ONNX's own, opset 24).
        learners: how learners of ``insert-acm`` run: "dense" (all, and those that a token has not taken count for
            nothing), "grouped" (each on the tokens that take it), or None for what is faster here, on the CPU: each
            kind of site is timed on the example's tokens, or on one token where the program has caches.
        generation: how the model generates: fields of `offramp.bundle.manifest.Generation`, such as ``prompt``,
            ``stop``, ``max_length``, ``template``.
        preprocessing: how text, sound and images become inputs: fields of
            `offramp.bundle.preprocessing.Preprocessing`.
        labels: names of the places of an output's last axis, by output: the classes of logits.
        files: further files to put into the bundle, a tokenizer for example: paths; or by name in the bundle a path or
            the contents.
        policy: the bundle's default policy, one of offramp's own, or what its ``to_dict`` gives; in fp32 alone.
        name: what the bundle calls the model; the path's name if None.
        source: where the model came from, for people who read the bundle's card (its ``README.md``, unless ``files``
            has one).
        licence: under which terms its weights may be used, for the same people.
        progress: called with a segment's name, how many are done, and how many there are.

    Returns:
        The validation figures (largest relative errors), as they stand in the manifest.

    Raises:
        SpecError: ``program`` is a module that was not captured, or ``segments`` is no number of them.
        ExportError: a segment cannot be lowered, or anything differs from torch by more than 1e-4 of its
            scale, or from fp32 by more than ``loss`` and ``agreement`` allow; or a pattern of ``precision`` takes no
            segment. Nothing is left at ``path`` then that was not there before.
        BundleError: ``generation`` or ``preprocessing`` have unknown keys, or values that make no sense.
        PolicyError: ``policy`` cannot be written down, or asks for exits or scores that the program does not have.
    """
    program = as_program(program)
    default = None if policy is None else _written(policy)
    known = precisions(precision)
    if policy is not None and known != {"fp32"}:
        raise ExportError(
            f"precision={precision!r}, policy={policy}: thresholds hold for the precision that they were chosen for",
            hint="offramp calibrate BUNDLE, once it is saved",
        )
    if target not in TARGETS:
        raise ExportError(f"target={target!r}: there are {', '.join(TARGETS)}")
    place = Path(path).resolve()
    if place.exists() and not (place / MANIFEST_FILE).is_file() and (not place.is_dir() or any(place.iterdir())):
        raise ExportError(f"{place} exists and is no bundle", hint="another path; offramp replaces bundles only")
    generates = section(Generation, {} if generation is None else generation)
    prepares = section(Preprocessing, {} if preprocessing is None else preprocessing)
    program = program.without_dropout()
    _refuse_random(program)
    if learners not in (None, *FORMS):
        raise ExportError(f"learners={learners!r}: there are {', '.join(FORMS)}")
    hidden = [item.hidden for item in program.learners]
    forms, measured = (dict.fromkeys(hidden, learners), {}) if learners else fastest(program, target)
    lowered = prepared(program, forms)
    plan = partition(lowered, segments)
    work = place.parent / f".{place.name}-{token_hex(8)}"  # whose name is known before it is there
    directory, writer = work / place.name, None
    try:
        _make(work, place)
        directory.mkdir()
        writer = Writer(directory, lowered.graph_module)
        describer = Describer(lowered, plan, writer, target, progress, partial(screens, precision))
        if not isinstance(precision, str):
            check_patterns(precision, describer.segment_names())
        provenance = _provenance(program, source, licence) | ({"learners": measured} if measured else {})
        manifest = describer.manifest(name or place.stem, provenance, default)
        for item, content in files.items() if isinstance(files, Mapping) else ((Path(f).name, f) for f in files):
            _add(item, content, directory)
        manifest = replace(manifest, files=writer.close(), generation=generates, preprocessing=prepares)
        manifest = replace(manifest, labels={name: tuple(map(str, names)) for name, names in (labels or {}).items()})
        sessions: dict[str, Any] | None = opened(manifest, directory)
        with at_full_width(program):
            figures = validate(program, manifest, directory, describer.origin, lowered, sessions)
        manifest = replace(manifest, validation=figures)
        if known != {"fp32"}:
            if callable(samples):
                samples = samples(Chain(manifest, directory), directory)
            taken = samples or [given(program, program.example_inputs)]
            sessions = None  # of files that are not there any more
            manifest = in_fewer_bits(manifest, directory, precision, taken, loss, agreement)
            figures = dict(manifest.validation)
        example = given(program, program.example_inputs)
        manifest = with_steps(with_whole(manifest, directory, example, sessions), directory, example)
        text = to_json(manifest)
        from_json(text)  # what the runtime would refuse is not written
        (directory / MANIFEST_FILE).write_text(text)
        card.write(manifest, directory, place.name)
        directory.chmod(0o755)
        _take_place(directory, place)
    except BaseException:
        if writer is not None:
            writer.abandon()
        raise
    finally:
        _remove(work)
    return figures


def _written(policy: Policy | Mapping[str, Any]) -> dict[str, Any]:
    """A default policy as the manifest has it."""
    written = (policy if isinstance(policy, Policy) else from_dict(policy)).to_dict()
    try:
        json.dumps(written, allow_nan=False)
    except ValueError as error:
        raise PolicyError(f"{policy!r} has numbers that JSON does not have: {error}") from error
    return written


def _make(folder: Path, place: Path) -> None:
    """Make the directory in which the bundle of that place is written."""
    try:
        folder.mkdir(0o700, parents=True)
    except OSError as error:
        raise ExportError(
            f"{place} cannot be written: {error.strerror}", hint="a path in a directory that may be written to"
        ) from error


def _take_place(directory: Path, place: Path) -> None:
    """Give a new bundle its name. One of that name is moved aside, and removed once the new one is in its place.

    An interrupt may come before or after each of these steps: it leaves one of the two there, and nothing beside it.
    """
    if not place.exists():
        directory.rename(place)
        return
    aside = directory.parent / f".{place.name}-old-{token_hex(8)}"
    held = aside / place.name
    try:
        aside.mkdir(0o700)
        place.rename(held)
        directory.rename(place)
    finally:
        try:
            if held.exists() and not place.exists():
                held.rename(place)
        finally:
            if place.exists():  # else the old one is all that there is
                _remove(aside)


def _remove(folder: Path) -> None:
    """Remove a directory, if it is there; once more where that is interrupted."""
    try:
        shutil.rmtree(folder, ignore_errors=True)
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise


def _add(name: str, content: str | os.PathLike[str] | bytes, directory: Path) -> None:
    copied = directory / name
    if copied.parent != directory or copied.exists() or copied.name == MANIFEST_FILE:
        raise ExportError(f"{name} would replace the bundle's own, or lie outside it", hint="another name")
    if isinstance(content, bytes):
        copied.write_bytes(content)
    else:
        shutil.copyfile(content, copied)


def _refuse_random(program: Program) -> None:
    """Raise where an output depends on random numbers: they are others in every run."""
    read = ancestors(results(program.graph).values())
    for node in drawing(program.graph):
        if node in read:
            raise ExportError(
                f"the model draws random numbers with {node.target}, so no two of its answers are the same: "
                f"{source(node)}",
                hint="numbers as an input, in the example inputs of a file.py:factory, where its forward takes them; "
                "or a forward that draws none",
            )


def _provenance(program: Program, source: str | None, licence: str | None) -> dict[str, Any]:
    known = {"source": source, "licence": licence}
    return {
        **{key: value for key, value in known.items() if value},
        "pipeline": list(program.history),
        "opset": OPSET,
        "versions": {
            "offramp": version("offramp"),
            "torch": torch.__version__,
            "onnx": onnx.__version__,
            "onnxruntime": onnxruntime.__version__,
        },
    }
