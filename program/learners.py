"""Learners: a site of a block whose width each token chooses."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, ClassVar

from offramp.bundle.manifest import FORMS, WIDTH
from offramp.program.record import Record

if TYPE_CHECKING:
    from offramp.program.program import Program

__all__ = ["FORMS", "WEIGHTS", "WIDTH", "Learners"]

WEIGHTS = "learners"
"""What the names of all their weights begin with."""


@dataclass(frozen=True)
class Learners(Record):
    """A site that is split into ordered learners, of which each token takes the first ``least`` to ``learners``.

    All gates read the tensor `WIDTH` [1] of the program: the share that a token is to take on average, 1 for all.
    ``site`` is the site's name in block ``block`` (from 1) of the stack. ``choice`` is the node with the gate's
    logits, one for each number of learners from ``least`` on; ``count`` the one with the number that each token takes,
    int64; ``hidden`` the one with the units that are kept.
    Weights are named ``learners.STACK.BLOCK.SITE.*``.
    """

    kind: ClassVar[str] = "learners"

    stack: str
    block: int
    site: str
    learners: int
    least: int
    choice: str
    count: str
    hidden: str

    @property
    def name(self) -> str:
        """The site's name in the program: ``encoder.3.mlp``."""
        return f"{self.stack}.{self.block}.{self.site}"

    @property
    def section(self) -> str:
        """The stack."""
        return self.stack

    @property
    def pinned_nodes(self) -> tuple[str, ...]:
        """The gate's logits, the number of learners, and the units that are kept."""
        return (self.choice, self.count, self.hidden)

    @property
    def graph_inputs(self) -> tuple[str, ...]:
        """The width, where it has become an input: nobody who runs the captured model knows of it."""
        return (WIDTH,)

    def renamed(self, names: Mapping[str, str]) -> Learners:
        """The same learners, by the new names of their nodes."""
        found = {key: names.get(name, name) for key, name in vars(self).items() if key in ("choice", "count", "hidden")}
        return replace(self, **found)

    def summary(self, program: Program) -> str:
        """Where they are, and how many a token takes."""
        return f"{self.site} of block {self.block}: {self.least} to {self.learners} of {self.learners}"
