"""Where tokens of several inputs are joined before a stack: patches of an image and words of a question, say."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any

from torch import fx

from offramp.bundle.expressions import names as axes_of
from offramp.errors import SpecError
from offramp.program.graph import aten, data_inputs, expression, is_tensor, read_by, shape, sizes_of
from offramp.program.groups import Group, token_axis
from offramp.program.program import Program


def joined_groups(program: Program, stack: str, names: tuple[str, ...], *, alone: bool = False) -> tuple[Group, ...]:
    """The groups of a stack's tokens in their order, under these names (none: those of what they are made of).

    Where each token leaves ``alone``, there may be one group.

    Raises:
        SpecError: no tokens are joined there, or there are more or fewer names.
    """
    parts = _merged(_parts(program, stack))
    if alone and not parts:
        first = program.stacks[stack].input
        parts = [(set(), shape(program.nodes[first])[token_axis(program, first)])]
    if len(parts) < 2 and not alone:
        raise SpecError(
            f"no tokens of several inputs are joined before stack {stack!r}",
            hint="exits of rows as a whole: insert-exits alone; a model that joins its tokens by torch.cat",
        )
    if names and len(names) != len(parts):
        raise SpecError(
            f"names={'|'.join(names)}: tokens of {len(parts)} kinds are joined before stack {stack!r}, made of "
            + "; ".join(", ".join(sorted(inputs)) for inputs, _ in parts),
            hint=f"{len(parts)} names",
        )
    taken = sorted(name for name in names if not name or names.count(name) > 1 or f"{stack}.{name}" in program.stacks)
    if taken:
        raise SpecError(f"names={'|'.join(names)}: {taken} are empty, repeated or the names of stacks", hint="others")
    known = _distinct([_name(program, inputs) for inputs, _ in parts]) if len(parts) > 1 else ["tokens"]
    sizes = [program.axes.describe(size) for _, size in parts]
    groups = tuple(Group(name, size, alone) for name, size in zip(names or known, sizes, strict=True))
    for group in groups:
        try:
            axes_of(group.tokens)
        except ValueError as error:
            raise SpecError(f"the number of tokens of {group.name!r} is no sum of inputs' sizes: {error}") from error
    return groups


def _parts(program: Program, stack: str) -> list[tuple[set[str], Any]]:
    """What is joined: the inputs that it is made of, and how many tokens it has."""
    first = program.stacks[stack].input
    for node in joins(program.nodes[first], expression(shape(program.nodes[first])[token_axis(program, first)])):
        found = [(_inputs(arg), shape(arg)[along(node)]) for arg in flat(node)]
        if len({name for inputs, _ in found for name in inputs}) > 1:
            return found
    return []


def joins(start: fx.Node, tokens: Any) -> Iterator[fx.Node]:
    """The concatenations to ``tokens`` that a value is made of, the last one first: all between has as many tokens."""
    todo, seen = [start], set[fx.Node]()
    while todo:
        node = todo.pop(0)
        if node in seen:
            continue
        seen.add(node)
        if node.target is aten.cat.default and expression(shape(node)[along(node)]) == tokens:
            yield node
        todo += [arg for arg in data_inputs(node) if is_tensor(arg) and tokens in sizes_of(arg)]


def along(node: fx.Node) -> int:
    """The axis of a concatenation."""
    axis: Any = node.args[1] if len(node.args) > 1 else 0
    return int(axis) % len(shape(node))


def flat(node: fx.Node) -> list[fx.Node]:
    """What a concatenation is made of, those inside of it too."""
    found: list[fx.Node] = []
    for arg in node.args[0]:  # type: ignore[union-attr]
        inner = arg.target is aten.cat.default and along(arg) == along(node)  # type: ignore[union-attr,arg-type]
        found += flat(arg) if inner else [arg]  # type: ignore[arg-type,list-item]
    return found


def _inputs(node: fx.Node) -> set[str]:
    return {str(arg.target) for arg in read_by([node]) if arg.op == "placeholder"}


def _merged(parts: Sequence[tuple[set[str], Any]]) -> list[tuple[set[str], Any]]:
    """The parts where those of the same inputs, and of none (a class token), belong to their neighbour."""
    found: list[tuple[set[str], Any]] = []
    for inputs, size in parts:
        if found and (not inputs or not found[-1][0] or found[-1][0] == inputs):
            found[-1] = (found[-1][0] | inputs, found[-1][1] + size)
        else:
            found.append((inputs, size))
    return found


def _name(program: Program, inputs: set[str]) -> str:
    """What tokens that are made of these inputs are called."""
    for name in sorted(inputs):
        example = program.example_inputs[name]
        if example.is_floating_point():
            return "image" if example.dim() >= 4 else name
    return "text"


def _distinct(names: Sequence[str]) -> list[str]:
    """The names, numbered where several are the same."""
    total, seen, found = Counter(names), Counter[str](), []
    for name in names:
        seen[name] += 1
        found.append(name if total[name] == 1 else f"{name}{seen[name]}")
    return found
