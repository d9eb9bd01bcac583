"""``remove-exits``: a stack without some of its exits, as where a calibration has no use for them."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar, Literal

from offramp.bundle.measures import OF_OWN_HEAD
from offramp.errors import PassError
from offramp.passes.infra.contract import Pass, PassResult, blocks_named, stack_named
from offramp.passes.infra.editor import Editor
from offramp.program.exit import Exit
from offramp.program.graph import results
from offramp.program.program import Program


@dataclass(frozen=True, repr=False)
class RemoveExits(Pass):
    """The opposite of ``insert-exits``: exits go with their adapters, heads and scores; trained weights of others stay.

    ``h2 -> state -> tail' -> encoder.2/logits``  goes; a bundle has no end of a segment there: each costs some time at
    every run, left or not.

    With the last early exit go the scores of full depth that nobody can ask for then: all but those of short and
    screened heads.

    Options: ``stack`` (may be left out where there is one); ``after``, counts of blocks or "all".

    Requires: the stack exists, with more blocks than each count.
    Ensures: no exit is left at these counts, and all other outputs compute what they did; where there was none it is
    noted.
    Invalidates: calibrated policies that ask these exits.
    """

    name: ClassVar[str] = "remove-exits"
    stack: str | None = None
    after: tuple[int, ...] | int | Literal["all"] = "all"

    def requires(self, program: Program) -> None:
        """The stack and the blocks exist."""
        blocks_named(program, stack_named(program, self.stack), self.after)

    def run(self, program: Program) -> PassResult:
        """Drop the exits' records and outputs, and what nothing else reads."""
        name = stack_named(program, self.stack)
        gone = self._exits(program)
        lacking = set(blocks_named(program, name, self.after)) - {item.after for item in gone}
        notes = [f"there is no exit after block {after}" for after in sorted(lacking) if self.after != "all"]
        if not gone:
            return PassResult(program, notes=tuple(notes or ["there is no exit"]))
        full = program.exit_after(name, program.stacks[name].blocks)
        alone = all(item is full or item in gone for item in program.exits_of(name))
        kept = (_of_own_head(full) if alone and item is full else item for item in program.records if item not in gone)
        records = tuple(item for item in kept if item is not None)
        named = {*program.outputs}.union(*(item.graph_outputs for item in records))
        editor = Editor(program, repr(self))
        editor.returns({}, dropped=results(editor.graph).keys() - named)
        editor.drop_dead(keep={name for item in records for name in item.pinned_nodes})
        return editor.finish(tuple(notes), records=records)

    def _exits(self, program: Program) -> list[Exit]:
        name = stack_named(program, self.stack)
        after = blocks_named(program, name, self.after)
        return [item for item in program.exits_of(name) if item.after in after]

    def ensures(self, before: Program, result: PassResult) -> None:
        """None of them is left."""
        if left := self._exits(result.program):
            raise PassError(f"{self!r} left the exits after {[item.after for item in left]}")


def _of_own_head(full: Exit) -> Exit | None:
    """Full depth with the scores that can be asked for where there is no early exit; None without any."""
    scores = {measure: key for measure, key in full.scores.items() if measure in OF_OWN_HEAD}
    return replace(full, scores=scores) if scores else None
