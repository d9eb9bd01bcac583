"""What a package outside would bring: a record, and the pass that adds it (see ``test_records.py``)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import ClassVar

from offramp.passes.infra.contract import Pass, PassResult, stack_named
from offramp.passes.infra.editor import Editor
from offramp.program.graph import aten
from offramp.program.program import Program
from offramp.program.record import Record


@dataclass(frozen=True)
class Mark(Record):
    """A part of the hidden state after ``after`` blocks: a node that nothing reads, and perhaps an output."""

    kind: ClassVar[str] = "mark"

    stack: str
    after: int
    node: str
    output: str | None = None
    feed: str | None = None

    @property
    def section(self) -> str:
        return self.stack

    @property
    def pinned_nodes(self) -> tuple[str, ...]:
        return (self.node,)

    @property
    def graph_inputs(self) -> tuple[str, ...]:
        return (self.feed,) if self.feed else ()

    @property
    def graph_outputs(self) -> tuple[str, ...]:
        return (self.output,) if self.output else ()

    def renamed(self, names: Mapping[str, str]) -> Mark:
        return replace(self, node=names.get(self.node, self.node))

    def summary(self, program: Program) -> str:
        return f"after block {self.after}: {self.node}"


@dataclass(frozen=True, repr=False)
class MarkBlock(Pass):
    """``h2``  becomes  ``h2 -> mul``, which nothing reads."""

    name: ClassVar[str] = "mark-block"
    stack: str | None = None
    after: int = 1
    factor: float = 0.5
    returned: bool = False

    def run(self, program: Program) -> PassResult:
        name = stack_named(program, self.stack)
        editor = Editor(program, repr(self))
        hidden = editor[program.stacks[name].cuts[self.after]]
        made = editor.call(aten.mul.Tensor, hidden, self.factor, at=hidden)
        mark = Mark(name, self.after, made.name, f"{name}.{self.after}/mark" if self.returned else None)
        if mark.output is not None:
            editor.returns({mark.output: made})
        return editor.finish(records=(*program.records, mark))


class NoPass:
    name = "no-pass"
