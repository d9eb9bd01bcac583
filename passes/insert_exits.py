"""``insert-exits``: let a stack be left after some of its blocks."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from torch import fx

from offramp.errors import PassError, SpecError
from offramp.passes.infra.contract import Pass, PassResult, blocks_named, stack_named
from offramp.passes.infra.editor import Editor
from offramp.program.exit import Exit
from offramp.program.graph import aten, results
from offramp.program.program import Program


@dataclass(frozen=True, repr=False)
class InsertExits(Pass):
    """An exit after each named block: the stack's tail applied to the hidden state there.

    ``h2 -> block3 -> block4 -> tail -> logits``  becomes
    ``h2 -> block3 -> block4 -> tail -> logits;  h2 -> state -> tail' -> encoder.2/logits``

    Where another stack follows (an encoder before a decoder), the exit has no outputs of its own: its state
    stands for the stack's output, and ``truncate`` or the runtime's ``Depth`` run the rest from it.

    Options: ``stack`` (may be left out where there is one); ``after``, counts of blocks or "all"; ``head``:
    "shared" uses the tail's own weights, "own" a copy of them that can be trained apart, named
    ``exits.STACK.AFTER.`` + the weight's name.

    Requires: the stack exists, with more blocks than each count.
    Ensures: one exit per count; an exit that was already there is left as it is and noted.
    Invalidates: nothing; the model's own outputs compute what they did.
    """

    name: ClassVar[str] = "insert-exits"
    stack: str | None = None
    after: tuple[int, ...] | int | Literal["all"] = "all"
    head: Literal["shared", "own"] = "shared"

    def requires(self, program: Program) -> None:
        """The stack, the blocks and the kind of head exist."""
        stack = stack_named(program, self.stack)
        blocks_named(program, stack, self.after)
        if self.head not in ("shared", "own"):
            raise SpecError(f"head={self.head!r}: there are shared and own")
        if self.head == "own" and program.groups_of(stack):
            raise SpecError(f"head=own: tokens leave stack {stack!r} at different exits", hint="head=shared")
        if self.head == "own" and (following := program.next_stack(stack)):
            raise SpecError(
                f"head=own: stack {stack!r} ends in stack {following!r}, not in a head",
                hint="head=shared, with an adapter (insert-adapter) where the exit needs weights of its own",
            )

    def run(self, program: Program) -> PassResult:
        """Insert the exits that are not there yet."""
        name = stack_named(program, self.stack)
        stack = program.stacks[name]
        known = {item.after for item in program.exits_of(name)}
        editor = Editor(program, repr(self))
        added, notes = [], []
        for after in blocks_named(program, name, self.after):
            if after in known:
                notes.append(f"stack {name} has an exit after block {after} already")
                continue
            hidden = editor[stack.cuts[after]]
            state = editor.call(aten.alias.default, hidden, at=hidden)
            outputs = {} if program.next_stack(name) else self._head(editor, program, name, after, state)
            added.append(Exit(name, after, hidden.name, state.name, self.head, outputs=outputs))
        return editor.finish(tuple(notes), records=(*program.records, *added))

    def _head(self, editor: Editor, program: Program, name: str, after: int, state: fx.Node) -> dict[str, str]:
        """Apply the stack's tail to the exit's state; returns the graph's names of the model's outputs."""
        stack = program.stacks[name]
        tail = [editor[node.name] for node in program.tail_nodes(stack)]
        end = editor[stack.output]
        mapping = {end: state}
        if self.head == "own":
            mapping |= editor.copied_weights(tail, f"exits.{name}.{after}", state)
        last = editor.graph.output_node().prev
        editor.clone(tail, mapping, last)
        returned = results(editor.graph)
        outputs = {output: f"{name}.{after}/{output}" for output in program.outputs if returned[output] in mapping}
        editor.returns({key: mapping[returned[output]] for output, key in outputs.items()})
        return outputs

    def ensures(self, before: Program, result: PassResult) -> None:
        """Every count has its exit now."""
        name = stack_named(before, self.stack)
        there = {item.after for item in result.program.exits_of(name)}
        missing = set(blocks_named(before, name, self.after)) - there
        if missing:
            raise PassError(f"{self!r} left out the exits after {sorted(missing)}")
