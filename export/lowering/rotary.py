"""Rotary positions as one operator: proven on the whole program, where the tables are made.

A subgraph only sees the tables come in, so what has to be known of them is shown before the program is cut.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from offramp.export.lowering.last_axis import part, repeats
from offramp.passes.infra.editor import Editor
from offramp.program import ops
from offramp.program.graph import aten, expression, shape, sizes_of, source

_library = torch.library.Library("offramp", "FRAGMENT")
_library.define("rotary(Tensor x, Tensor cos, Tensor sin, Tensor lengths) -> Tensor")
_LAYOUT = (aten.reshape.default, aten.permute.default, aten.transpose.int, aten.unsqueeze.default)


def rotary(x: Tensor, cos: Tensor, sin: Tensor, lengths: Tensor) -> Tensor:
    """Turn pairs of features by an angle that follows the position.

    Args:
        x: ``[rows, heads, chunk, features]``; token ``i`` of row ``b`` is at position ``lengths[b] + i``. Feature
            ``j`` makes a pair with ``j + half``; those behind both halves stay as they are.
        cos: ``[capacity, half]``, by position.
        sin: the same.
        lengths: int64 ``[rows]``, how many tokens each row has already.
    """
    places = ops.positions(lengths, x.shape[2], cos.shape[0])
    cos, sin = cos[places].unsqueeze(1), sin[places].unsqueeze(1)
    half = cos.shape[-1]
    first, second, rest = x.split([half, half, x.shape[-1] - 2 * half], -1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin, rest], -1)


_library.impl("rotary", rotary, "CompositeExplicitAutograd")
torch.library.register_fake("offramp::rotary", lambda x, cos, sin, lengths: torch.empty_like(x))
ROTARY = torch.ops.offramp.rotary.default


class _RefusedError(Exception):
    """Why something that looks like a rotation is left as it is."""


@dataclass(frozen=True)
class _Rotation:
    output: fx.Node
    x: fx.Node
    cos: fx.Node
    sin: fx.Node


def fuse_rotary(editor: Editor) -> tuple[str, ...]:
    """Rewrite the rotations of a program that has caches; returns what was left alone, and why.

    ``x * cos + cat([-x[..., half:], x[..., :half]]) * sin``  becomes  ``rotary(x, cos', sin', lengths)``

    The tables hold one row for every position up to the capacity, the chunk's rows are taken from them, and their
    two halves are equal, of which one is kept. Where only the first features of ``x`` are turned and the others
    joined to them again, the operator does that too.
    """
    notes = []
    tables: dict[fx.Node, fx.Node] = {}
    for node in list(editor.graph.find_nodes(op="call_function", target=aten.add.Tensor)):
        found = _rotation(node)
        if found is None:
            continue
        try:
            cos, sin = (_table(editor, rows, found.x) for rows in (found.cos, found.sin))
        except _RefusedError as refused:
            notes.append(f"{node.name} ({source(node)}): {refused}")
            continue
        found = _whole(found)
        lengths = editor[_cache(editor).lengths]
        angles = [tables.get(table) or _first_half(editor, table, tables) for table in (cos, sin)]
        made = editor.call(ROTARY, found.x, *angles, lengths, at=found.output)
        editor.replace_uses(found.output, made, [user for user in found.output.users if user is not made])
    return tuple(notes)


def _rotation(node: fx.Node) -> _Rotation | None:
    """What a sum rotates, if it has the form of a rotation."""
    if node.kwargs or not all(isinstance(arg, fx.Node) and arg.target is aten.mul.Tensor for arg in node.args):
        return None
    for plain, turned in itertools.permutations(node.args):
        for swapped, sin in itertools.permutations(turned.args):  # type: ignore[union-attr]
            x = _swapped(swapped)
            for given, cos in itertools.permutations(plain.args):  # type: ignore[union-attr]
                if x is not None and given is x and isinstance(cos, fx.Node) and isinstance(sin, fx.Node):
                    return _Rotation(node, x, cos, sin)
    return None


def _swapped(node: Any) -> fx.Node | None:
    """``x`` of ``cat([-x[..., half:], x[..., :half]], -1)``."""
    if not isinstance(node, fx.Node) or node.target is not aten.cat.default or not _last(node, node.args[1:]):
        return None
    pieces: Any = node.args[0]
    if len(pieces) != 2 or pieces[0].target is not aten.neg.default:
        return None
    second, first = part(pieces[0].args[0]), part(pieces[1])
    size = expression(shape(node)[-1])
    if second is None or first is None or second[0] is not first[0] or not isinstance(size, int):
        return None
    halves = (first[1:], second[1:]) == ((0, size // 2), (size // 2, size))
    return first[0] if halves and expression(shape(first[0])[-1]) == size else None


def _last(node: fx.Node, axis: Any) -> bool:
    """Whether the axis that a call is given, 0 if none, is the last one of its result."""
    return (axis[0] if axis else 0) % len(shape(node)) == len(shape(node)) - 1


def _cache(editor: Editor) -> Any:
    return editor.program.cache


def _table(editor: Editor, rows: fx.Node, x: fx.Node) -> fx.Node:
    """The table of all positions that ``rows`` are the chunk's of.

    Raises:
        _RefusedError: that is not how they are made, or the halves are not known to be equal.
    """
    sizes, wanted = (sizes_of(node) for node in (rows, x))
    if len(wanted) != 4 or sizes != [wanted[0], 1, wanted[2], wanted[3]]:
        raise _RefusedError(f"the table has the shape {sizes} where the rotated value has {wanted}")
    lengths = editor[_cache(editor).lengths]
    if wanted[0] != expression(shape(lengths)[0]):
        raise _RefusedError("the first axis of the rotated value is not one place for each row")
    node = rows
    while node.target in _LAYOUT and _keeps_order(node):
        node = node.args[0]  # type: ignore[assignment]
    if node.target is not aten.index_select.default:
        raise _RefusedError("the angles are not looked up by position")
    table: Any
    index: Any
    table, axis, index = node.args
    capacity = expression(shape(editor[_cache(editor).places])[0])
    full = [(i, size) for i, size in enumerate(sizes_of(table)) if size != 1]
    if full != [(axis, capacity), (len(shape(table)) - 1, wanted[3])] or not _by_position(
        index, lengths, wanted[2], capacity
    ):
        raise _RefusedError("the angles are not looked up by position")
    if not repeats(table, editor.module):
        raise _RefusedError("the two halves of the angles are not known to be equal")
    return table  # type: ignore[no-any-return]


def _keeps_order(node: Any) -> bool:
    """Whether a change of layout leaves the elements in their order: axes of one place may go anywhere."""
    given = shape(node.args[0])
    order = list(range(len(given)))
    if node.target is aten.permute.default:
        order = [axis % len(given) for axis in node.args[1]]
    elif node.target is aten.transpose.int:
        _, first, second = node.args
        order[first], order[second] = order[second], order[first]
    moved = [axis for axis in order if expression(given[axis]) != 1]
    return moved == sorted(moved)


def _by_position(index: Any, lengths: fx.Node, chunk: Any, capacity: Any) -> bool:
    """Whether an index is ``lengths + arange(chunk)`` of every row, up to the last place."""
    while index.target is aten.reshape.default:
        index = index.args[0]
    if index.target is not aten.minimum.default:
        return False
    added, last = index.args
    if last.target is not aten.scalar_tensor.default or expression(last.args[0].meta["val"]) != capacity - 1:
        return False
    if added.target is not aten.add.Tensor or not all(isinstance(arg, fx.Node) for arg in added.args):
        return False
    first, steps = added.args
    start = (first.target, first.args) == (aten.unsqueeze.default, (lengths, 1))
    return start and steps.target is aten.arange.default and expression(shape(steps)[0]) == chunk


def _whole(found: _Rotation) -> _Rotation:
    """With the features that are not turned, where they are cut off before and joined to it after."""
    after: Any = list(found.output.users)
    if len(after) != 1 or after[0].target is not aten.cat.default or not _last(after[0], after[0].args[1:]):
        return found
    (joined,) = after
    first, *others = joined.args[0]
    others, turned = [part(other) for other in others], int(shape(found.x)[-1])
    for x, start, stop in ((found.x, 0, turned), part(found.x) or (found.x, 0, 0)):
        rest = (x, turned, expression(shape(x)[-1]))
        if (start, stop) == (0, turned) and first is found.output and others == [rest]:
            return _Rotation(joined, x, found.cos, found.sin)
    return found


def _first_half(editor: Editor, table: fx.Node, known: dict[fx.Node, fx.Node]) -> fx.Node:
    half = int(shape(table)[-1]) // 2
    first = editor.call(aten.slice.Tensor, table, len(shape(table)) - 1, 0, half, at=table)
    known[table] = editor.call(aten.reshape.default, first, [-1, half], at=first)
    return known[table]
