"""The caches of a causal program."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, ClassVar

from offramp.bundle.manifest import Implied, Prompt
from offramp.program.record import Record, Truncation

if TYPE_CHECKING:
    from offramp.program.program import Program


@dataclass(frozen=True)
class Cache(Record):
    """How a causal program runs on chunks of new tokens, by names of graph inputs and outputs.

    ``tokens`` are the inputs that hold a chunk; ``lengths`` (int64 [batch]) says how many tokens each row has
    already, ``places`` (int64 [capacity]: 0, 1, ...) how many the caches have room for. ``buffers`` maps an input
    that holds the keys or values of those to the output that holds the chunk's too; ``axes`` says along which axis
    of each the positions lie. ``implied`` are inputs of the model that follow from how many tokens there are
    (padding masks: rows have lengths instead; positions): the rewritten graph makes them itself. ``limit`` is the
    greatest number of tokens, None for no limit.
    ``logits`` is the output that generation reads: of each token of the chunk, or of the last one. ``whole`` are the
    outputs that mix tokens: those are right where one chunk holds all of them. ``prompt`` is there where
    values of other inputs are put among a prompt's tokens; ``least`` is how many tokens of the example it then has to
    have, so that what follows is text.
    """

    kind: ClassVar[str] = "cache"

    tokens: tuple[str, ...]
    lengths: str
    places: str
    buffers: Mapping[str, str]
    axes: Mapping[str, int]
    implied: Mapping[str, Implied] = field(default_factory=dict)
    limit: int | None = None
    logits: str = ""
    whole: tuple[str, ...] = ()
    prompt: Prompt | None = None
    least: int = 1

    @property
    def graph_inputs(self) -> tuple[str, ...]:
        """Lengths, places, and earlier contents."""
        of_prompt = (self.prompt.tokens, self.prompt.lengths) if self.prompt else ()
        return (self.lengths, self.places, *of_prompt, *self.buffers)

    @property
    def graph_outputs(self) -> tuple[str, ...]:
        """The new contents."""
        return tuple(self.buffers.values())

    def truncated(self, cut: Truncation) -> Cache:
        """The caches of the blocks that are left."""
        kept = {name: made for name, made in self.buffers.items() if not cut.loses(made)}
        return replace(self, buffers=kept, axes={name: self.axes[name] for name in kept})

    def summary(self, program: Program) -> str:
        """What it keeps, and of how many tokens."""
        limit = "any number" if self.limit is None else f"up to {self.limit}"
        return f"{len(self.buffers)} buffers of {', '.join(self.tokens)}, {limit} of tokens; logits in {self.logits}"
