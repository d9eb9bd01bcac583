"""``canonicalize``: bring the graph into canonical form again, after other rewrites."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from offramp.passes.infra.contract import Pass, PassResult
from offramp.passes.infra.editor import Editor
from offramp.program.canonical.simplify import canonicalize
from offramp.program.program import Program


@dataclass(frozen=True, repr=False)
class Canonicalize(Pass):
    """Remove what computes nothing and merge what computes the same.

    ``y = clone(x); a = f(y); b = f(x)``  becomes  ``a = b = f(x)``

    Requires: nothing (``capture`` has done it once already).
    Ensures: a second run makes no edit. Cuts of stacks and what records pin keep their nodes.
    Invalidates: names of merged weights.
    """

    name: ClassVar[str] = "canonicalize"

    def run(self, program: Program) -> PassResult:
        """Canonicalise a copy of the graph."""
        editor = Editor(program, repr(self))
        editor.edits["erased"] += canonicalize(editor.module, program.pinned)
        return editor.finish()
