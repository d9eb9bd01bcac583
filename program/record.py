"""Records: what is known of a program beside its graph, and how it follows the graph's rewrites.

An exit is one, so are the caches of a causal program, and a package outside may have records of its own: who changes
a graph asks each record what must stay, and what becomes of it.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, ClassVar, Self

from offramp.program.graph import data_inputs, results

if TYPE_CHECKING:
    from offramp.program.program import Program


class Record:
    """The base of all records: frozen dataclasses that speak of a graph by names of its nodes, inputs and outputs.

    A record that pins nodes says in `renamed` how it follows them; all else has a default.
    """

    #: What records of this class are called, in one word.
    kind: ClassVar[str] = "record"

    @property
    def section(self) -> str | None:
        """The stack that the record belongs to; None for the program as a whole."""
        return None

    @property
    def pinned_nodes(self) -> tuple[str, ...]:
        """The nodes that must survive rewrites under their names, whether something reads them or not."""
        return ()

    @property
    def graph_inputs(self) -> tuple[str, ...]:
        """The inputs that the graph has for this record, beside those of the captured forward."""
        return ()

    @property
    def graph_outputs(self) -> tuple[str, ...]:
        """The outputs of the graph that this record names; those that are not the model's are there for it."""
        return ()

    def renamed(self, names: Mapping[str, str]) -> Self:
        """The record where nodes have new names: ``names`` maps old ones to new ones, other nodes keep theirs."""
        if self.pinned_nodes:
            raise NotImplementedError(f"{type(self).__name__} pins nodes and does not say how it is renamed")
        return self

    def truncated(self, cut: Truncation) -> Self | None:
        """The record once a stack always ends earlier; None where nothing is left of it.

        By default it goes with the first of its nodes or outputs that goes, and follows the stack's output.
        """
        lost = {*cut.gone} - {*cut.renamed}
        if lost.intersection(self.pinned_nodes) or any(map(cut.loses, self.graph_outputs)):
            return None
        return self.renamed(cut.renamed)

    def summary(self, program: Program) -> str:
        """The record in one line."""
        return ", ".join(self.pinned_nodes) or type(self).__name__


@dataclass(frozen=True)
class Truncation:
    """``stack`` of ``program`` (as it was before) ends after ``after`` blocks: ``state`` stands for its output."""

    program: Program
    stack: str
    after: int
    state: str

    @property
    def renamed(self) -> Mapping[str, str]:
        """The stack's output, and what stands for it."""
        return {self.program.stacks[self.stack].output: self.state}

    @cached_property
    def gone(self) -> frozenset[str]:
        """The nodes of the deeper blocks, and what is made of them but not of the stack's output alone."""
        stack = self.program.stacks[self.stack]
        output = self.program.nodes[stack.output]
        found = {node for depth in range(self.after, stack.blocks) for node in self.program.block_nodes(stack, depth)}
        for node in self.program.graph.nodes:
            if node.op == "call_function" and any(arg in found and arg is not output for arg in data_inputs(node)):
                found.add(node)
        return frozenset(node.name for node in found)

    def loses(self, output: str) -> bool:
        """Whether an output of the graph is made of nodes that go."""
        return results(self.program.graph)[output].name in self.gone - self.renamed.keys()


def exchanged(records: Iterable[Record], kind: type[Record], made: Sequence[Record]) -> tuple[Record, ...]:
    """The records with ``made`` in the place of those of a kind."""
    return (*made, *(item for item in records if not isinstance(item, kind)))
