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

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from functools import cached_property
from typing import Any

from offramp.bundle.expressions import multiple
from offramp.bundle.measures import PICK
from offramp.bundle.preprocessing import Preprocessing

FORMAT = "offramp"
VERSION = 10
MANIFEST_FILE = "manifest.json"
WEIGHTS_FILE = "weights.bin"
#: The value that says which share of its learners a token is to take on average, float32 [1].
WIDTH = "learners_width"
#: Values of the segments in `Part.steps`: of how many tokens at most they make the next one, int64 []; whether a
#: token is followed by another without a look at it, bool [classes + 1], the last of which stands for none (-1); and
#: each token's next one where only they make it, int64 [tokens, batch, chunk].
STEPS, FREELY, NEXT = "steps", "steps/freely", "steps/next"

#: How learners run: all, and those that are not taken count for nothing, or each on the tokens that take it.
FORMS = ("dense", "grouped")
#: How the numbers of a segment are encoded: its weights and products.
ENCODINGS = ("fp32", "fp16", "int8", "int8-dynamic", "int4")

# The dtypes of values: numpy's names, and ONNX Runtime's.
DTYPES: Mapping[str, str] = {
    "bool": "tensor(bool)",
    "float16": "tensor(float16)",
    "float32": "tensor(float)",
    "float64": "tensor(double)",
    **{f"{sign}int{bits}": f"tensor({sign}int{bits})" for sign in ("", "u") for bits in (8, 16, 32, 64)},
}


def least_of(measure: str) -> str:
    """The value that says what tokens have to score for a segment in `Part.steps` to go on, float32 []."""
    return f"steps/least/{measure}"


def in_steps(value: str) -> str:
    """The value of a segment in `Part.steps` that holds another value of each of its tokens, [tokens, ...]."""
    return f"steps/{value}"


@dataclass(frozen=True)
class Value:
    """A tensor that crosses segments.

    ``shape`` holds sizes, or expressions over the manifest's axes ("batch", "2*tokens + 1").
    """

    dtype: str
    shape: tuple[int | str, ...]

    def place(self, axis: str | None) -> tuple[int, int] | None:
        """Where the items of an axis lie (rows, tokens): the dimension, and how many consecutive places each has.

        That is (0, 7) for the batch of ``["7*batch", ...]``; None where the value is the same for all of them.
        """
        for dimension, size in enumerate(self.shape):
            if axis is not None and (factor := multiple(size, axis)):
                return dimension, factor
        return None

    def __str__(self) -> str:
        return f"{self.dtype} [{', '.join(map(str, self.shape))}]"


@dataclass(frozen=True)
class Segment:
    """One use of an ONNX file: its input and output names, bound to values; ``encoding`` is that of its weights."""

    name: str
    file: str
    inputs: Mapping[str, str]
    outputs: Mapping[str, str]
    encoding: str = "fp32"


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
class Learners:
    """A site of block ``block`` (from 1) of a stack; a token takes the first ``least`` or more of its ``learners``.

    ``count`` is the value, int64, with how many each token takes. ``flops`` are the floating-point operations of one
    learner for one token, ``form`` is one of `FORMS`.
    """

    stack: str
    block: int
    site: str
    learners: int
    least: int
    count: str
    flops: int
    form: str


@dataclass(frozen=True)
class Part:
    """Segments of a stack that run without a place to leave between; ``depth`` blocks are done.

    ``output`` is the value of the hidden state then, which the next part reads. ``steps`` is a segment that runs the
    part for one token of one row after another, each the one that the exit behind it picks, while this scores at least
    `least_of` of each measure; its outputs have an axis of those tokens in front. At full depth that is the greatest of
    the model's outputs, which the segment makes itself (`NEXT`) where the part picks none.
    """

    depth: int
    segments: tuple[str, ...]
    output: str
    steps: str | None = None


@dataclass(frozen=True)
class Group:
    """Some of a stack's tokens: ``tokens`` of them, a number or an expression over axes.

    They leave together, or ``alone``, each where it likes.
    """

    name: str
    tokens: int | str
    alone: bool = False

    def scores(self, count: int) -> int:
        """How many scores it has where there are ``count`` tokens: one, or one for each."""
        return count if self.alone else 1


@dataclass(frozen=True)
class Stack:
    """A loop of ``blocks`` transformer blocks from value ``input`` to value ``output``.

    Where the first part makes the hidden state that enters the stack, ``input`` are the tokens that it is made of.
    Where tokens leave in ``groups``, which lie one behind the other, scores are [batch, groups] (of tokens that leave
    alone each has one), and the value ``places`` says where those are that have not left, int64 [batch, tokens that
    have not]. Where scores are of some tokens alone, the value ``asked`` says of which: int64 [batch, asked].
    ``whole`` runs all parts at once, for runs in which nobody is asked before full depth.
    """

    name: str
    role: str
    blocks: int
    input: str
    output: str
    parts: tuple[Part, ...]
    exits: tuple[Exit, ...]
    groups: tuple[Group, ...] = ()
    places: str | None = None
    asked: str | None = None
    whole: Part | None = None

    @property
    def runs(self) -> tuple[Part, ...]:
        """All that can run its blocks: the parts, and the whole."""
        return self.parts if self.whole is None else (*self.parts, self.whole)

    @cached_property
    def by_group(self) -> Mapping[str, Stack]:
        """What leaves, by the names that policies have for it: the stack itself, or ``STACK.GROUP`` for each group."""
        if not self.groups:
            return {self.name: self}
        alone = {item.name: getattr(self, item.name) for item in fields(self)} | {"groups": (), "places": None}
        names = [f"{self.name}.{group.name}" for group in self.groups]
        return {name: GroupStack(**{**alone, "name": name, "of": self.name}) for name in names}

    @property
    def asking(self) -> tuple[Exit, ...]:
        """The exits at which policies are asked: those before full depth, and full depth where it picks tokens."""
        return self.exits if PICK in self.exits[-1].scores else self.exits[:-1]


@dataclass(frozen=True)
class GroupStack(Stack):
    """A group of a stack's tokens, as policies see it; it leaves by the exits of the stack ``of`` that name."""

    of: str = ""


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
class Implied:
    """An input of the model that follows from how many tokens there are, so that nobody has to give it.

    ``shape`` as in `Value`. Every place holds ``value`` (a padding mask: nothing is padding); along ``axis``, if that
    is set, it rises by one from place to place (positions). Where ``hidden`` is set, the last two axes are queries and
    keys: it stands where the key comes after the query (a causal mask). ``padding`` is what a mask of one axis of
    tokens holds where a token is padding, None where that is not known.
    """

    dtype: str
    shape: tuple[int | str, ...]
    value: float
    axis: int | None = None
    hidden: float | None = None
    padding: float | None = None


@dataclass(frozen=True)
class Placeholder:
    """Places that a text keeps for something else, an image say: the id ``token`` in ``input``.

    Each row has it ``count`` times, a number or an expression over axes; or less often, where it has inputs that say so
    (``masks``, of a shorter recording).
    """

    input: str
    token: int
    count: int | str
    masks: tuple[str, ...] = ()


@dataclass(frozen=True)
class Prompt:
    """What of a prompt enters at once, since there is more in it than text: an image among its tokens, say.

    ``tokens`` is a value that holds the ids of the whole prompt, ``[batch, prompt]``; ``lengths``, int64 [batch], says
    how many of those each row has. ``filler`` is an id for the places behind them. ``given`` are inputs over the
    prompt's tokens, and what they hold behind it; those in ``counting``, positions ``[..., tokens]``, count on there
    from the row's greatest. ``whole``: some of its tokens see later ones, so they run together. In front of the text
    stand ``ahead`` places for features, a number or an expression over axes, which a run adds to what it is given, and
    takes from the outputs in ``cut``.
    """

    tokens: str
    lengths: str
    filler: int
    given: Mapping[str, int] = field(default_factory=dict)
    whole: bool = False
    ahead: int | str = 0
    cut: tuple[str, ...] = ()
    counting: tuple[str, ...] = ()

    @property
    def beside(self) -> tuple[str, ...]:
        """All inputs over the prompt's tokens beside its ids."""
        return (*self.given, *self.counting)


@dataclass(frozen=True)
class Cache:
    """Keys and values of earlier tokens, kept between chunks.

    ``tokens`` are the inputs that hold a chunk of tokens, along the axis ``chunk``. ``lengths`` is a value int64
    [batch]: how many tokens each row has already; ``places`` a value int64 [capacity]: 0, 1, and so on. ``buffers``
    maps a value that holds keys or values, with the axis ``capacity``, to the value that holds those of the chunk
    too; the two may share memory. ``logits`` is the output that generation reads, of each token or of the last one of
    a chunk. ``limit`` is the greatest number of tokens. With ``rowwise`` the segments that read buffers take several
    rows only when their chunk is one token.
    ``implied`` are inputs of the model that the graph makes itself, by the names that a user may give them under.
    ``prompt`` is there where a prompt is more than its tokens one by one.
    """

    tokens: tuple[str, ...]
    lengths: str
    places: str
    buffers: Mapping[str, str]
    chunk: str
    capacity: str
    logits: str
    limit: int | None = None
    rowwise: bool = False
    implied: Mapping[str, Implied] = field(default_factory=dict)
    prompt: Prompt | None = None

    @property
    def values(self) -> tuple[str, ...]:
        """The values that a run gives beside the inputs."""
        of_prompt = (self.prompt.tokens, self.prompt.lengths) if self.prompt else ()
        return (self.lengths, self.places, *of_prompt, *self.buffers)


@dataclass(frozen=True)
class File:
    """Size in bytes and sha256 (hex) of a file of the bundle."""

    bytes: int
    sha256: str


@dataclass(frozen=True)
class Generation:
    """How the model generates where a user does not say otherwise; a field's default means "not set".

    Attributes:
        prompt: Token ids that each row starts with where the user gives none.
        stop: Token ids that end a row.
        stop_strings: Texts that end a row, once its new tokens spell one.
        suppress: Token ids that are never chosen.
        suppress_first: Token ids that are not chosen as a row's first new one.
        forced_first: A row's first new token.
        forced_last: One of these is chosen where the greatest length leaves one place.
        bad_words: Sequences of token ids that are never completed.
        min_length: Tokens of a row, prompt included, before ``stop`` may be chosen.
        min_new_tokens: The same for new tokens.
        max_length: Tokens of a row at most, prompt included; ``max_new_tokens`` comes before it.
        max_new_tokens: New tokens of a row at most.
        repetition_penalty: Divides positive logits of tokens that the row has already, multiplies negative ones.
        no_repeat_ngram_size: No sequence of so many tokens comes twice in a row.
        temperature: Divides the logits; 0 is greedy.
        top_k: Draw from so many likeliest tokens.
        top_p: Draw from the likeliest tokens of that probability in all.
        min_p: Draw from tokens at least so likely as this times the likeliest.
        beams: Texts of each row that beam search keeps; 1 is no beam search.
        length_penalty: A text's score is its log-probability over its length to this power.
        early_stopping: When beam search ends: True, as soon as so many texts have ended; False, when no better one
            is likely; "never", when no better one is possible.
        pad: The id that fills rows up.
        template: What a user's text is put into: a text with ``{text}``.
    """

    prompt: tuple[int, ...] = ()
    stop: tuple[int, ...] = ()
    stop_strings: tuple[str, ...] = ()
    suppress: tuple[int, ...] = ()
    suppress_first: tuple[int, ...] = ()
    forced_first: int | None = None
    forced_last: tuple[int, ...] = ()
    bad_words: tuple[tuple[int, ...], ...] = ()
    min_length: int | None = None
    min_new_tokens: int | None = None
    max_length: int | None = None
    max_new_tokens: int | None = None
    repetition_penalty: float | None = None
    no_repeat_ngram_size: int | None = None
    temperature: float | None = None
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    beams: int | None = None
    length_penalty: float | None = None
    early_stopping: bool | str | None = None
    pad: int | None = None
    template: str | None = None


@dataclass(frozen=True)
class Manifest:
    """Everything the runtime needs to know of a bundle.

    ``inputs`` are names of values, and the names that a user gives; ``outputs`` maps the model's output names
    to the values of full depth. ``batch`` is the axis that rows lie on, None when the model has none: then a
    run is one row. ``take`` maps ``"dtype/axis"`` to a file that gathers rows on a device. ``calibration`` says how
    ``policy`` was chosen, for people. ``learners`` are by the name of their site; `WIDTH` is a value of bundles
    that have some. ``ids`` has the least and the greatest number of inputs that are looked up in tables as
    they are. ``placeholders`` are ids that stand for other inputs. ``labels`` names, by output, the places of its last
    axis: the classes of logits.
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
    learners: Mapping[str, Learners] = field(default_factory=dict)
    ids: Mapping[str, tuple[int, int]] = field(default_factory=dict)
    placeholders: tuple[Placeholder, ...] = ()
    policy: Mapping[str, Any] | None = None
    calibration: Mapping[str, Any] | None = None
    generation: Generation = field(default_factory=Generation)
    preprocessing: Preprocessing = field(default_factory=Preprocessing)
    labels: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    precision: str = "fp32"
    provenance: Mapping[str, Any] = field(default_factory=dict)
    validation: Mapping[str, Any] = field(default_factory=dict)
    format: str = FORMAT
    version: int = VERSION

    @property
    def cut(self) -> tuple[str, ...]:
        """The outputs that have nothing of the places in front of the text."""
        return self.cache.prompt.cut if self.cache and self.cache.prompt else ()

    @cached_property
    def leaving(self) -> Mapping[str, Stack]:
        """What leaves early, by the names that policies have for it: stacks, and groups of tokens (``STACK.GROUP``)."""
        return {name: stack for item in self.stacks.values() for name, stack in item.by_group.items()}
