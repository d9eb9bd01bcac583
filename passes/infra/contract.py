"""What a pass is: the contract that every rewrite keeps."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from operator import index
from typing import Any, ClassVar, SupportsIndex

from offramp.errors import SpecError
from offramp.program.program import Program


@dataclass(frozen=True)
class PassResult:
    """What a pass did.

    ``edits`` counts the changes by kind (``inserted``, ``replaced``, ``erased``), as the editor counted them.
    ``notes`` says which sites were skipped and why.
    """

    program: Program
    edits: Mapping[str, int] = field(default_factory=dict)
    notes: tuple[str, ...] = ()

    @property
    def modified(self) -> bool:
        """Whether the pass changed anything: derived from the edits, never claimed."""
        return any(self.edits.values())


@dataclass(frozen=True)
class Pass:
    """A rewrite of programs: a frozen dataclass whose fields are its options.

    The program is verified before and after a pass, and is free in between. A pass works on a private copy of
    the graph (tensors are shared) and returns a new program. Where it cannot apply it raises with the reason,
    or returns an unmodified result whose notes name the sites that it skipped and why; it never warns and
    carries on. ``repr`` of a pass is its text in a pipeline.
    """

    name: ClassVar[str]

    def requires(self, program: Program) -> None:
        """Raise a ``SpecError`` that names every stack, block or option which does not fit the program."""

    def run(self, program: Program) -> PassResult:
        """Rewrite the program."""
        raise NotImplementedError

    def ensures(self, before: Program, result: PassResult) -> None:
        """Raise a ``PassError`` where the result is not what the pass promises."""

    def __repr__(self) -> str:
        options = []
        for item in fields(self):
            value = getattr(self, item.name)
            if value != item.default:
                options.append(f"{item.name}={_text(value)}")
        return f"{self.name}{{{','.join(options)}}}" if options else self.name


def _text(value: Any) -> str:
    if isinstance(value, (tuple, list)):
        return "|".join(map(str, value))
    return str(value)


def stack_named(program: Program, name: str | None) -> str:
    """The stack of that name; None stands for the only stack.

    Raises:
        StructureError: the program has no stack at all.
        SpecError: there is no such stack, or None was given and there are several.
    """
    names = list(program.require_stacks())
    if name is None and len(names) == 1:
        return names[0]
    if name is None:
        raise SpecError(
            f"the program has the stacks {names}: say which one",
            hint=f"stack={names[-1] if names else '...'}",
        )
    if name not in program.stacks:
        groups = {f"{item.stack}.{group.name}": item.stack for item in program.groups for group in item.groups}
        hint = f"stack={groups[name]}, by whose exits its groups leave" if name in groups else None
        raise SpecError(
            f"unknown stack {name!r}; the program has {names}", hint=hint or "`offramp inspect` shows the stacks"
        )
    return name


def blocks_named(program: Program, stack: str, after: Any) -> tuple[int, ...]:
    """Block counts of a stack, 1 to blocks - 1; "all" stands for every one.

    Raises:
        SpecError: a count outside of the stack, or the full depth, which is no early exit.
    """
    last = program.stacks[stack].blocks
    counts, wrong = numbers(after, last - 1)
    if wrong or not counts:
        raise SpecError(
            f"after={_text(wrong)} is no place for an exit: stack {stack!r} has {last} blocks",
            hint=f"counts from 1 to {last - 1} (block {last} is full depth, always there), or all",
        )
    return counts


def numbers(given: Any, last: int) -> tuple[tuple[int, ...], list[Any]]:
    """The numbers from 1 to ``last`` that an option names, each once, in order, and what it names beside them.

    "all" stands for every one; one may stand alone.
    """
    if given == "all":
        return tuple(range(1, last + 1)), []
    found = tuple(given) if isinstance(given, (tuple, list)) else (given,)
    wrong = [item for item in found if not isinstance(item, SupportsIndex) or not 0 < index(item) <= last]
    return tuple(sorted({index(item) for item in found if item not in wrong})), wrong
