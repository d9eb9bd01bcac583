"""``truncate``: the program that always leaves a stack at one exit."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, ClassVar

from offramp.errors import PassError, SpecError
from offramp.passes.infra.base import Pass, PassResult, blocks_named, stack_named
from offramp.passes.infra.editor import Editor
from offramp.program.graph import dependents, results
from offramp.program.program import Program


@dataclass(frozen=True, repr=False)
class Truncate(Pass):
    """Static truncation: the stack's output is the state after ``after`` blocks, whatever the input.

    ``h2 -> block3 -> block4 -> tail``  becomes  ``h2 -> tail`` (through the exit's adapter and own head, if
    there is an exit after that block). This is what an exit forced by the runtime must compute.

    Requires: the stack exists, with more blocks than ``after``.
    Ensures: the deeper blocks, and the exits that are not before the new end, are gone.
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
        stack = program.stacks[name]
        there = next((item for item in program.exits_of(name) if item.after == self.after), None)
        editor = Editor(program, repr(self))
        output = editor[stack.output]
        state = editor[there.state if there and there.adapter != "identity" else stack.cuts[self.after]]
        gone = [
            key
            for item in program.exits_of(name)
            if item.after >= self.after
            for key in (*item.outputs.values(), *item.scores.values())
            if key not in program.outputs
        ]
        known = dict(editor.graph.output_node().args[0])  # type: ignore[arg-type]
        for key, own in (there.outputs if there else {}).items():
            known[key] = known[own]
        unkept = self._unkept(program, name)
        gone += [program.cache.buffers[key] for key in unkept] if program.cache else []
        editor.graph.output_node().args = ({key: node for key, node in known.items() if key not in gone},)
        editor.replace_uses(output, state, list(output.users))
        head: dict[str, Any] = {"head": "own"} if there and there.head == "own" else {}  # the others have the old one
        exits = tuple(
            item if item.stack != name else replace(item, **head)
            for item in program.exits
            if item.stack != name or item.after < self.after
        )
        editor.drop_dead(keep={item.state for item in exits})
        shorter = replace(stack, cuts=(*stack.cuts[: self.after], state.name))
        others = {  # what the stack gives may be what the next one takes
            key: replace(other, cuts=(state.name, *other.cuts[1:])) if other.input == stack.output else other
            for key, other in program.stacks.items()
        }
        changes: dict[str, Any] = {"stacks": {**others, name: shorter}, "exits": exits}
        if program.cache is not None:
            for key in unkept:
                editor.graph.erase_node(editor[key])
            kept = {key: value for key, value in program.cache.buffers.items() if key not in unkept}
            along = {key: program.cache.axes[key] for key in kept}
            changes["cache"] = replace(program.cache, buffers=kept, axes=along)
            changes["example_inputs"] = {k: v for k, v in program.example_inputs.items() if k not in unkept}
        return editor.finish(**changes)

    def _unkept(self, program: Program, name: str) -> list[str]:
        """The caches of the deeper blocks."""
        if program.cache is None:
            return []
        stack, returned = program.stacks[name], results(program.graph)
        deeper = dependents([program.nodes[stack.cuts[self.after]]], program.graph)
        deeper -= dependents([program.nodes[stack.output]], program.graph)
        return [key for key, made in program.cache.buffers.items() if returned[made] in deeper]

    def ensures(self, before: Program, result: PassResult) -> None:
        """The deeper blocks are gone."""
        stack = before.stacks[stack_named(before, self.stack)]
        if stack.output in result.program.nodes:
            raise PassError(f"{self!r} left the stack's output {stack.output} in the graph")
