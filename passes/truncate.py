"""``truncate``: the program that always leaves a stack at one exit."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

from offramp.errors import PassError, SpecError
from offramp.passes.infra.contract import Pass, PassResult, blocks_named, stack_named
from offramp.passes.infra.editor import Editor
from offramp.program.graph import results
from offramp.program.program import Program
from offramp.program.record import Truncation


@dataclass(frozen=True, repr=False)
class Truncate(Pass):
    """Static truncation: the stack's output is the state after ``after`` blocks, whatever the input.

    ``h2 -> block3 -> block4 -> tail``  becomes  ``h2 -> tail`` (through the exit's adapter and own head, if
    there is an exit after that block). This is what an exit forced by the runtime must compute.

    Requires: the stack exists, with more blocks than ``after``.
    Ensures: the deeper blocks are gone, and records of what is in them (exits from the new end on, their caches).
    Invalidates: nothing; the stack's record is a shorter one, whose last block has the exit's adapter.
    """

    name: ClassVar[str] = "truncate"
    stack: str | None = None
    after: int = 1

    def requires(self, program: Program) -> None:
        """The stack and the block exist."""
        stack = stack_named(program, self.stack)
        if not isinstance(self.after, int):
            raise SpecError(f"after={self.after}: truncate leaves the stack at one place", hint="after=1")
        blocks_named(program, stack, self.after)

    def run(self, program: Program) -> PassResult:
        """Rewire what reads the stack's output, and drop what is no longer used."""
        name = stack_named(program, self.stack)
        stack, there = program.stacks[name], program.exit_after(name, self.after)
        editor = Editor(program, repr(self))
        output = editor[stack.output]
        state = editor[there.state if there and there.adapter != "identity" else stack.cuts[self.after]]
        cut = Truncation(program, name, self.after, state.name)
        records = tuple(kept for item in program.records if (kept := item.truncated(cut)) is not None)

        returned = dict(results(editor.graph))
        for key, own in (there.outputs if there else {}).items():
            returned[key] = returned[own]
        named = {*program.outputs}.union(*(item.graph_outputs for item in records))
        editor.graph.output_node().args = ({key: node for key, node in returned.items() if key in named},)
        editor.replace_uses(output, state, list(output.users))
        editor.drop_dead(keep={name for item in records for name in item.pinned_nodes})
        inputs = {key for item in program.records for key in item.graph_inputs}
        inputs -= {key for item in records for key in item.graph_inputs}
        for key in inputs & program.example_inputs.keys():
            editor.graph.erase_node(editor[key])
        others = {  # what the stack gives may be what the next one takes
            key: other.renamed(cut.renamed) for key, other in program.stacks.items()
        }
        shorter = replace(stack, cuts=(*stack.cuts[: self.after], state.name))
        return editor.finish(
            stacks={**others, name: shorter},
            records=records,
            example_inputs={key: value for key, value in program.example_inputs.items() if key not in inputs},
        )

    def ensures(self, before: Program, result: PassResult) -> None:
        """The deeper blocks are gone."""
        stack = before.stacks[stack_named(before, self.stack)]
        if stack.output in result.program.nodes:
            raise PassError(f"{self!r} left the stack's output {stack.output} in the graph")
