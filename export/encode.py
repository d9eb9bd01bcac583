"""A bundle's weights in fewer bits: what each segment gets, by the tokens that it runs on, and what that changes."""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from fnmatch import fnmatchcase
from functools import partial
from pathlib import Path
from typing import BinaryIO, TypeAlias

import onnx
from onnx import external_data_helper, numpy_helper

from offramp.bundle.manifest import WEIGHTS_FILE, Manifest, Stage
from offramp.errors import ExportError
from offramp.export.head_precision import heads_of, offsets, quantized_with_heads
from offramp.export.patterns import in_use, listed, pattern_of, written
from offramp.export.quantize import Tables, encoding_of, gathered, quantized, turned
from offramp.export.rounding import Array, Roundings
from offramp.export.write import ALIGNMENT, hashed

#: A precision of all segments, or of those whose names match a pattern; the first that matches counts.
Precision: TypeAlias = str | Mapping[str, str]
PRECISIONS = ("fp32", "fp16", "int8", "int4")
#: What is fastest where it is exported; of a whole bundle only.
AUTO = "auto"
_LEAST = 1024  # bytes: smaller arrays stay in their file
#: Of samples, by which a head can be rounded to 4 bits with its table: by a few it is further off than by none.
TOKENS = 512
#: Rows of tables that are worth it to have 4 bits: those of positions and types are small, and all tokens meet them.
WORDS = 4096


def precision_of(precision: Precision, segment: str) -> str:
    """What a segment's weights become.

    Raises:
        ExportError: there is no such precision.
    """
    chosen = precision
    if isinstance(precision, Mapping):
        pattern = pattern_of(precision, segment)
        chosen = "fp32" if pattern is None else precision[pattern]
    if chosen not in PRECISIONS:
        raise ExportError(
            f"precision={chosen!r}: there are {', '.join(PRECISIONS)}, or one for each pattern of segments; "
            "and auto, of a whole bundle",
            hint=written({"decoder.*": "int4", "tail": "int8"}),
        )
    return str(chosen)


def screens(precision: Precision, segment: str) -> bool:
    """Whether a segment's products have bits to spare: those of 8 or 4 bits are as quick as what would screen them."""
    return precision != AUTO and precision_of(precision, segment) in ("fp32", "fp16")


def precisions(precision: Precision) -> set[str]:
    """Those that it names; ExportError where there is no such one."""
    if precision == AUTO:
        return {AUTO}
    if not isinstance(precision, Mapping):
        return {precision_of(precision, "")}
    return {precision_of(item, "") for item in precision.values()} or {"fp32"}


def shown(precision: Precision) -> str:
    """A precision in words."""
    return precision if isinstance(precision, str) else ", ".join(f"{key} {item}" for key, item in precision.items())


def encodings_of(manifest: Manifest, precision: Precision) -> dict[str, str]:
    """The encoding of each file of a bundle.

    Raises:
        ExportError: see `precision_of`; or a file is read as two precisions.
    """
    wanted: dict[str, str] = {}
    together = run_together(manifest)
    for name, segment in manifest.segments.items():
        bits = precision_of(precision, name)
        encoding = "int8-dynamic" if bits == "int8" and name in together else bits
        if wanted.setdefault(segment.file, encoding) != encoding:
            raise _shared(manifest, precision, segment.file)
    return wanted


def _shared(manifest: Manifest, precision: Precision, file: str) -> ExportError:
    """That segments of one file are to have several precisions."""
    patterns = {"*": precision} if isinstance(precision, str) else precision
    names = list(manifest.segments)
    taken = dict[str, list[str]]()
    bits = {name: precision_of(precision, name) for name in names if manifest.segments[name].file == file}
    for name, item in bits.items():
        pattern = pattern_of(patterns, name)
        by = "which no pattern takes" if pattern is None else f"by {pattern!r}"
        taken.setdefault(f"{item} ({by})", []).append(name)
    wanted = next((item for item in bits.values() if item != "fp32"), "fp32")
    if set(bits.values()) == {wanted}:  # some of them run token by token
        wanted = "fp32"
    others = [name for name, item in bits.items() if item != wanted]
    ending = f"*{min(bits, key=len)}"
    if len(others) > 1 and {name for name in names if fnmatchcase(name, ending)} == bits.keys():
        others = [ending]
    return ExportError(
        f"segments that share the weights of {file} are to have several precisions: "
        + "; ".join(f"{listed(several)} {item}" for item, several in taken.items()),
        hint=written(in_use({**dict.fromkeys(others, wanted), **patterns, **dict.fromkeys(others, wanted)}, names)),
    )


def encoded(
    manifest: Manifest, source: Path, target: Path, wanted: Mapping[str, str], called: str, roundings: Roundings
) -> Manifest:
    """Write the segments of the bundle at ``source`` to ``target``, with its weights encoded; the manifest of that.

    Thresholds that were chosen for the bundle do not hold for it, so it has none.

    Args:
        manifest: of the bundle at ``source``.
        source: the bundle in fp32.
        target: an empty directory.
        wanted: the encoding of each file. One that has nothing for it gets what there is. A table has 4 bits where all
            who read it are to have 4, and it has `WORDS` rows, or where a head is tied to it, this met `TOKENS` of
            samples; 8 otherwise. Screened heads have the encoding of the file that makes their logits.
        called: what the manifest calls that.
        roundings: of weights of 4 bits.
    """
    tables, heads = _Tables(source, wanted, roundings), heads_of(manifest, source, wanted)
    with (target / WEIGHTS_FILE).open("wb") as weights:
        writer = _Weights(weights)
        made = dict[str, str]()
        for file, encoding in wanted.items():
            model, given = onnx.load(source / file), (tables.of(file), roundings.of(file))
            if file in heads:
                model, made[file] = quantized_with_heads(model, encoding, heads[file], tables.places[file], *given)
            else:
                model = quantized(model, encoding, *given)
                made[file] = encoding_of(model)
            (target / file).write_bytes(writer.moved(model).SerializeToString(deterministic=True))
    for file in manifest.take.values():
        shutil.copyfile(source / file, target / file)
    segments = {name: replace(item, encoding=made[item.file]) for name, item in manifest.segments.items()}
    files = {path.name: hashed(path) for path in sorted(target.iterdir())}
    others = {name: item for name, item in manifest.files.items() if name not in files}
    for name in others:
        (target / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(source / name, target / name)
    return replace(manifest, segments=segments, files=files | others, precision=called, policy=None, calibration=None)


def run_together(manifest: Manifest) -> set[str]:
    """The segments that run on many tokens at once, and never on one after the other."""
    return {name for stage in manifest.stages if stage.when != "chunk" for name in _segments(manifest, stage)}


def _segments(manifest: Manifest, stage: Stage) -> Iterator[str]:
    """The names of a stage's segments, its exits' too."""
    if stage.segment is not None:
        yield stage.segment
    if stage.stack is not None:
        stack = manifest.stacks[stage.stack]
        yield from (name for part in stack.parts for name in part.segments)
        yield from (name for exit_ in stack.exits for name in exit_.segments)


class _Tables:
    """The weights of which rows are gathered, in any of a bundle's files that are encoded.

    ``places`` says, by file and name, where all weights lie.
    """

    def __init__(self, source: Path, wanted: Mapping[str, str], roundings: Roundings) -> None:
        self.places = dict[str, dict[str, int]]()
        self._roundings = roundings
        self._tables, self._eight, self._long = set[int](), set[int](), set[int]()
        self._products = dict[int, tuple[str, str]]()  # the file of one, and what it reads there
        for file, encoding in wanted.items():
            model = onnx.load(source / file, load_external_data=False)
            known = self.places[file] = offsets(model)
            if encoding != "fp32":
                self._tables |= {known[name] for name in gathered(model) if name in known}
            if encoding.startswith("int8"):
                self._eight |= {*known.values()}
            rows = {item.name: item.dims[0] for item in model.graph.initializer if item.dims}
            self._long |= {place for name, place in known.items() if rows.get(name, 0) >= WORDS}
            for name, read in turned(model).items():
                if name in known:
                    self._products.setdefault(known[name], (file, read))

    def of(self, file: str) -> Tables:
        """Those of a file."""
        return {name: self._rounding(place) for name, place in self.places[file].items() if place in self._tables}

    def _rounding(self, place: int) -> Callable[[Array, int], Array] | None:
        if place in self._eight:
            return None
        if place not in self._products:
            return self._roundings.alone if place in self._long else None
        file, read = self._products[place]
        return partial(self._roundings.of(file), read) if self._roundings.tokens(file, read) >= TOKENS else None


class _Weights:
    """The weights file: the same bytes lie in it once."""

    def __init__(self, file: BinaryIO) -> None:
        self._file, self._placed = file, dict[str, int]()

    def moved(self, model: onnx.ModelProto) -> onnx.ModelProto:
        """The model with its larger arrays in the file."""
        for item in model.graph.initializer:
            if not item.HasField("raw_data"):
                item.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(item), item.name))
            if len(item.raw_data) < _LEAST:
                continue
            data = item.raw_data
            external_data_helper.set_external_data(item, WEIGHTS_FILE, self._place(data), len(data))
            item.ClearField("raw_data")
        return model

    def _place(self, data: bytes) -> int:
        key = hashlib.sha256(data).hexdigest()
        if key not in self._placed:
            self._file.write(b"\0" * (-self._file.tell() % ALIGNMENT))
            self._placed[key] = self._file.tell()
            self._file.write(data)
        return self._placed[key]
