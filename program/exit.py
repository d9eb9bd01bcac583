"""An exit: a place where a stack may be left."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, ClassVar

from offramp.program.record import Record, Truncation

if TYPE_CHECKING:
    from offramp.program.program import Program


def asked_of(stack: str) -> str:
    """The input of the exported graph that says which tokens of a causal stack are scored: int64 [batch, asked]."""
    return f"{stack}_asked"


@dataclass(frozen=True)
class Exit(Record):
    """A place where a stack may be left, by names of graph nodes and of graph outputs.

    ``hidden`` is the stack's hidden state after ``after`` blocks, ``state`` what stands for the stack's output
    when it is left here (``hidden`` through the adapter). ``outputs`` maps the model's outputs to the graph
    outputs that hold them for this exit (empty where another stack follows); ``scores`` maps measures to graph
    outputs of shape [batch]. ``after`` equal to the number of blocks is full depth: it only carries scores.
    """

    kind: ClassVar[str] = "exit"

    stack: str
    after: int
    hidden: str
    state: str
    head: str = "shared"
    adapter: str = "identity"
    outputs: Mapping[str, str] = field(default_factory=dict)
    scores: Mapping[str, str] = field(default_factory=dict)

    @property
    def section(self) -> str:
        """Its stack."""
        return self.stack

    @property
    def graph_inputs(self) -> tuple[str, ...]:
        """The tokens whose scores are asked for, where they have become an input of the exported graph."""
        return (asked_of(self.stack),)

    @property
    def pinned_nodes(self) -> tuple[str, ...]:
        """The hidden state and what stands for the stack's output."""
        return (self.hidden, self.state)

    @property
    def graph_outputs(self) -> tuple[str, ...]:
        """Its outputs and scores; the model's own outputs at full depth."""
        return (*self.outputs.values(), *self.scores.values())

    def renamed(self, names: Mapping[str, str]) -> Exit:
        """The exit at the same places, by their new names."""
        return replace(self, hidden=names.get(self.hidden, self.hidden), state=names.get(self.state, self.state))

    def truncated(self, cut: Truncation) -> Exit | None:
        """Exits of the stack stay where they come before its new end.

        Where the exit at the new end has a head of its own, that is the model's now: the others have another one.
        """
        if self.stack != cut.stack:
            return self
        if self.after >= cut.after:
            return None
        end = cut.program.exit_after(cut.stack, cut.after)
        return replace(self, head="own") if end is not None and end.head == "own" else self

    def summary(self, program: Program) -> str:
        """Where it leaves, through what, and its scores."""
        full = self.after == program.stacks[self.stack].blocks
        what = "full depth" if full else f"head {self.head}, adapter {self.adapter}"
        scores = f"; scores {', '.join(self.scores)}" if self.scores else ""
        return f"after block {self.after}: {what}{scores}"
