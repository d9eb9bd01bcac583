"""``split-modalities``: image and text leave an encoder each on its own."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar, Literal

from offramp.errors import SpecError
from offramp.passes.groups.apart import check_apart, run_apart
from offramp.passes.groups.joined import joined_groups
from offramp.passes.infra.contract import Pass, PassResult, stack_named
from offramp.passes.infra.editor import Editor
from offramp.program.graph import shape
from offramp.program.groups import Group, Groups
from offramp.program.program import Program


@dataclass(frozen=True, repr=False)
class SplitModalities(Pass):
    """Groups of an encoder's tokens, one for each input that they are made of, leave it at exits of their own (MuE).

    ``cat(image, text) -> blocks``  becomes, with ``form=separate``,  ``cat(blocks(image), blocks(text))``

    Options: ``stack`` (may be left out where there is one encoder); ``form``:

    - joint: all tokens attend to all, and a group that has left stays visible as it is: the blocks behind make keys
      and values of its last states, queries and all else of the other tokens alone. Without exits nothing changes
    - separate: a stack for each group, with the same weights, which attends to its own tokens alone (MuE, arXiv
      2211.11152, sec. 3.1). That is another model: it has to be trained so

    ``tokens=token``, for ``joint``, lets each token leave alone; those that are padding leave first. Then the tokens
    need not be made of several inputs: one group has them all.

    ``names`` are those of the groups in their order; left out they are image, text, or the inputs'. With ``joint`` they
    are policies' names for them, ``STACK.GROUP``; with ``separate`` those of the stacks.

    Requires: an encoder, before which ``torch.cat`` joins tokens of several inputs (or ``tokens=token``); rows are
    computed apart.
    Ensures: the outputs are what they were (joint), or what no attention between groups gives (separate).
    Invalidates: exits of the stack, so they come after it.
    """

    name: ClassVar[str] = "split-modalities"
    stack: str | None = None
    form: Literal["joint", "separate"] = "joint"
    tokens: Literal["group", "token"] = "group"
    names: tuple[str, ...] = ()

    def requires(self, program: Program) -> None:
        """There is an encoder, without exits yet, whose tokens are joined from several inputs."""
        name = self._stack(program)
        if program.stacks[name].role == "decoder":
            raise SpecError(
                f"stack {name!r} is causal: each of its tokens leaves on its own already",
                hint="insert-exits, insert-cache",
            )
        if program.axes.batch is None:
            raise SpecError(f"the rows of stack {name!r} are not computed apart", hint="a model with a batch axis")
        hidden = program.nodes[program.stacks[name].input]
        place = program.axes.batch_axis(hidden)
        if len(shape(hidden)) != 3 or place is None or place[1] != 1:
            sizes = [program.axes.describe(size) for size in shape(hidden)]
            raise SpecError(
                f"the hidden state of stack {name!r} has the shape {sizes}, expected rows, tokens and features",
                hint="insert-exits alone, which lets rows leave as a whole",
            )
        if program.exits_of(name):
            raise SpecError(f"stack {name!r} has exits already", hint="split-modalities, then insert-exits")
        if any(item.stack == name for item in program.learners):
            raise SpecError(
                f"stack {name!r} has learners, which are counted for all of its tokens", hint="leave insert-acm out"
            )
        if self.tokens == "token" and self.form == "separate":
            raise SpecError("form=separate: a stack is left by its tokens together", hint="form=joint, or tokens=group")
        self._groups(program, name)

    def run(self, program: Program) -> PassResult:
        """Note the groups, or give each its own stack."""
        name = self._stack(program)
        if any(item.stack == name for item in program.groups):
            return PassResult(program, notes=(f"the tokens of stack {name} are in groups already",))
        groups = self._groups(program, name)
        if self.form == "separate":
            return run_apart(Editor(program, repr(self)), name, groups)
        made = replace(
            program, records=(*program.records, Groups(name, groups)), history=(*program.history, repr(self))
        )
        return PassResult(made, {"noted": len(groups)})

    def ensures(self, before: Program, result: PassResult) -> None:
        """Stacks of single groups give what the one gives without attention between groups."""
        name = self._stack(before)
        if self.form == "separate":
            check_apart(before, result.program, name, joined_groups(before, name, self.names))

    def _groups(self, program: Program, stack: str) -> tuple[Group, ...]:
        """The groups of the stack's tokens."""
        alone = self.tokens == "token"
        return joined_groups(program, stack, self.names, alone=alone)

    def _stack(self, program: Program) -> str:
        """The stack that is named, or the only encoder."""
        encoders = [name for name, stack in program.require_stacks().items() if stack.role != "decoder"]
        return encoders[0] if self.stack is None and len(encoders) == 1 else stack_named(program, self.stack)
