"""Tensors of one number that are like another one, made of its sizes: they may be needed before it is there."""

from __future__ import annotations

from typing import Any

from torch import fx

from offramp.export.dataflow import Dataflow
from offramp.passes.infra.editor import Editor
from offramp.program.graph import FILLED, aten, expression, filling, is_tensor, placeholders, read_by, shape, sizes_of
from offramp.program.program import Program


def made_early(program: Program) -> list[str]:
    """The nodes that have one number in the shape of what a stack makes, and may be made before it (for a mask)."""
    calls = [node for node in program.graph.nodes if node.target in FILLED and node.args[0].op == "call_function"]
    found = [node for node in calls if not _beside(node)]
    level = Dataflow(program).level if found else {}
    return [node.name for node in found if level[node.args[0]] != 0]


def _beside(node: fx.Node) -> bool:
    """Whether all that reads the node is one call that reads the contents of what it is like, too."""
    return len(node.users) == 1 and node.args[0] in read_by(node.users)


def of_sizes(editor: Editor, node: fx.Node) -> None:
    """``ones_like(x)``  becomes  ``full([sym_size(y, 0), ...], 1)``, where ``y`` is what has that size first."""
    given: Any = node.args[1] if len(node.args) > 1 else None
    sizes = given if isinstance(given, (list, tuple)) else _sizes(editor, node)  # new_ones has them
    made = editor.call(aten.full.default, sizes, filling(node), at=node.prev, dtype=node.meta["val"].dtype)
    editor.replace_uses(node, made, list(node.users))


def _sizes(editor: Editor, node: fx.Node) -> list[Any]:
    """The sizes of a node that is like another one, read from inputs where these have them."""
    behind = read_by([like for like in node.all_input_nodes if is_tensor(like)])
    first = [*placeholders(editor.graph).values(), *(each for each in editor.graph.nodes if each in behind)]
    holders = {
        expression(size): (each, axis)
        for each in reversed(first)
        if is_tensor(each)
        for axis, size in enumerate(shape(each))
    }
    wanted = sizes_of(node)
    return [
        size if isinstance(size, int) else editor.call(aten.sym_size.int, *holders[size], at=node.prev)
        for size in wanted
    ]
