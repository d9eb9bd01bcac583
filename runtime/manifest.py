"""What a bundle says about itself: the only contract between ``export`` and ``runtime``.

A bundle is a flat directory: ``manifest.json``, one ``.onnx`` file per distinct piece of the graph, one
``weights.bin`` that holds every weight once, and whatever else ``files`` names (a tokenizer, say).

The manifest is a static dataflow graph. *Values* are tensors with names; a *segment* is one use of an ONNX
file, with its inputs and outputs bound to values, so that blocks that share weights, or exits that share a
head, are several segments of one file. *Stages* are run in order: a stage is either a segment or a stack. A
stack is a loop: after each of its parts, ``part.depth`` blocks are done, and where there is an exit of that
depth, rows may leave.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, is_dataclass
from typing import Any

from offramp.runtime.decode import decode
from offramp.runtime.errors import BundleError

FORMAT = "offramp"
VERSION = 3
MANIFEST_FILE = "manifest.json"
WEIGHTS_FILE = "weights.bin"

PICK = "prediction-short"
SHORT = ("top1-short", "margin-short", PICK)  # scores that need no head of the whole vocabulary

# The dtypes of values: numpy's names, and ONNX Runtime's.
DTYPES: Mapping[str, str] = {
    "bool": "tensor(bool)",
    "float16": "tensor(float16)",
    "float32": "tensor(float)",
    "float64": "tensor(double)",
    **{f"{sign}int{bits}": f"tensor({sign}int{bits})" for sign in ("", "u") for bits in (8, 16, 32, 64)},
}


@dataclass(frozen=True)
class Value:
    """A tensor that crosses segments.

    ``shape`` holds sizes, or expressions over the manifest's axes ("batch", "2*tokens + 1"). ``batch_axis``
    is the axis along which rows of a batch lie, None when the value is the same for all rows; each row takes
    ``batch_factor`` consecutive places of it (7 for a shape like ``["7*batch", ...]``).
    """

    dtype: str
    shape: tuple[int | str, ...]
    batch_axis: int | None = None
    batch_factor: int = 1

    def __str__(self) -> str:
        return f"{self.dtype} [{', '.join(map(str, self.shape))}]"


@dataclass(frozen=True)
class Segment:
    """One use of an ONNX file: its input and output names, bound to values."""

    name: str
    file: str
    inputs: Mapping[str, str]
    outputs: Mapping[str, str]


@dataclass(frozen=True)
class Exit:
    """A place where rows may leave a stack, ``after`` that many blocks; the last one is full depth.

    ``segments`` (adapter, then tail) make the exit's results out of the hidden state after that block.
    ``state`` is the value that stands for the stack's output when a row leaves here. ``outputs`` maps the
    model's output names to values; it is empty when other stages follow the stack. ``scores`` maps measures
    (``top1``, ``cosine``, ...) to values of shape [batch]; a score is made either by ``segments`` or already
    by the block's own segment. With the score `PICK` a row has its next token, which greedy generation takes without
    running ``segments`` where the policy lets the row leave; at full depth, where it finds the token good enough.
    """

    after: int
    segments: tuple[str, ...]
    state: str
    outputs: Mapping[str, str]
    scores: Mapping[str, str]
    head: str = "shared"
    adapter: str = "identity"


@dataclass(frozen=True)
class Part:
    """Segments of a stack that run without a place to leave between; ``depth`` blocks are done.

    ``output`` is the value of the hidden state then, which the next part reads.
    """

    depth: int
    segments: tuple[str, ...]
    output: str


@dataclass(frozen=True)
class Stack:
    """A loop of ``blocks`` transformer blocks from value ``input`` to value ``output``.

    Where the first part makes the hidden state that enters the stack, ``input`` are the tokens that it is made of.
    """

    name: str
    role: str
    blocks: int
    input: str
    output: str
    parts: tuple[Part, ...]
    exits: tuple[Exit, ...]

    @property
    def asking(self) -> tuple[Exit, ...]:
        """The exits at which policies are asked: those before full depth, and full depth where it picks tokens."""
        return self.exits if PICK in self.exits[-1].scores else self.exits[:-1]


@dataclass(frozen=True)
class Stage:
    """One step of the plan: a segment, or a stack (exactly one of the two names is set).

    ``when`` says how often it runs where a bundle has caches: once for each ``input``, again whenever the
    ``capacity`` of the caches changes, or for each ``chunk`` of new tokens.
    """

    segment: str | None = None
    stack: str | None = None
    when: str = "input"


@dataclass(frozen=True)
class Cache:
    """Keys and values of earlier tokens, kept between chunks.

    ``tokens`` are the inputs that hold a chunk of tokens, along the axis ``chunk``. ``lengths`` is a value int64
    [batch]: how many tokens each row has already; ``places`` a value int64 [capacity]: 0, 1, and so on. ``buffers``
    maps a value that holds keys or values, with the axis ``capacity``, to the value that holds those of the chunk
    too; the two may share memory. ``limit`` is the greatest number of tokens, ``vocabulary`` the number of token
    ids. With ``rowwise`` the segments that read buffers take several rows only when their chunk is one token.
    """

    tokens: tuple[str, ...]
    lengths: str
    places: str
    buffers: Mapping[str, str]
    chunk: str
    capacity: str
    limit: int | None = None
    vocabulary: int | None = None
    rowwise: bool = False


@dataclass(frozen=True)
class File:
    """Size in bytes and sha256 (hex) of a file of the bundle."""

    bytes: int
    sha256: str


@dataclass(frozen=True)
class Manifest:
    """Everything the runtime needs to know of a bundle.

    ``inputs`` are names of values, and the names that a user gives; ``outputs`` maps the model's output names
    to the values of full depth. ``batch`` is the axis that rows lie on, None when the model has none: then a
    run is one row. ``take`` maps ``"dtype/axis"`` to a file that gathers rows on a device. ``calibration`` says how
    ``policy`` was chosen, for people.
    """

    model: str
    inputs: tuple[str, ...]
    outputs: Mapping[str, str]
    batch: str | None
    axes: Mapping[str, tuple[int, int | None]]
    values: Mapping[str, Value]
    segments: Mapping[str, Segment]
    stacks: Mapping[str, Stack]
    stages: tuple[Stage, ...]
    files: Mapping[str, File]
    take: Mapping[str, str] = field(default_factory=dict)
    cache: Cache | None = None
    policy: Mapping[str, Any] | None = None
    calibration: Mapping[str, Any] | None = None
    generation: Mapping[str, Any] = field(default_factory=dict)
    precision: str = "fp32"
    provenance: Mapping[str, Any] = field(default_factory=dict)
    validation: Mapping[str, Any] = field(default_factory=dict)
    format: str = FORMAT
    version: int = VERSION


def to_json(manifest: Manifest) -> str:
    """The text of ``manifest.json``: fields in the order of the dataclasses, newline at the end."""
    return json.dumps(_plain(manifest), indent=1, ensure_ascii=False, allow_nan=False) + "\n"


def from_json(text: str) -> Manifest:
    """Read and check ``manifest.json``.

    Raises:
        BundleError: the text is no JSON, another format or of a newer version; or fields are missing or
            mistyped, or names refer to nothing. All problems are in one message, one per line.
    """
    from offramp.runtime.validate import problems_of

    try:
        data = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise BundleError(f"{MANIFEST_FILE} is not JSON: {error}") from error
    if not isinstance(data, dict) or data.get("format") != FORMAT:
        raise BundleError(f'{MANIFEST_FILE} is not one of offramp: it lacks "format": "{FORMAT}"')
    version = data.get("version")
    if isinstance(version, int) and version != VERSION:
        raise BundleError(
            f"the bundle has format version {version}, this offramp reads {VERSION}",
            hint="pip install --upgrade offramp" if version > VERSION else "export the model again",
        )
    problems: list[str] = []
    manifest: Manifest = decode(Manifest, data, "", problems)
    problems = problems or problems_of(manifest)
    if problems:
        raise BundleError(f"{MANIFEST_FILE} is wrong:\n  " + "\n  ".join(problems))
    return manifest


def _plain(value: object) -> object:
    """Dataclasses and mappings as dicts, tuples as lists: what the json module writes."""
    if is_dataclass(value):
        return {f.name: _plain(getattr(value, f.name)) for f in fields(value)}
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return value
