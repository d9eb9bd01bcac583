"""Learners: a site of a block whose width each token chooses."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, ClassVar

from offramp.program.record import Record

if TYPE_CHECKING:
    from offramp.program.program import Program


#: The tensor [1] that all gates read: the share of the learners that a token is to take on average, 1 for all.
WIDTH = "learners.width"


@dataclass(frozen=True)
class Learners(Record):
    """A site that is split into ordered learners, of which each token takes the first ``least`` to ``learners``.

    ``site`` is the site's name in block ``block`` (from 1) of the stack. ``choice`` is the node with the gate's
    logits, one for each number of learners from ``least`` on; ``hidden`` the node with the units that are kept.
    Weights are named ``learners.STACK.BLOCK.SITE.*``.
    """

    kind: ClassVar[str] = "learners"

    stack: str
    block: int
    site: str
    learners: int
    least: int
    choice: str
    hidden: str

    @property
    def section(self) -> str:
        """The stack."""
        return self.stack

    @property
    def pinned_nodes(self) -> tuple[str, ...]:
        """The gate's logits, and the units that are kept."""
        return (self.choice, self.hidden)

    def renamed(self, names: Mapping[str, str]) -> Learners:
        """The same learners, by the new names of their nodes."""
        return replace(self, choice=names.get(self.choice, self.choice), hidden=names.get(self.hidden, self.hidden))

    def summary(self, program: Program) -> str:
        """Where they are, and how many a token takes."""
        return f"{self.site} of block {self.block}: {self.least} to {self.learners} of {self.learners}"
