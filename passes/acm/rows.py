"""What is said of each token lies by rows, also where a model has the tokens of all rows one after another."""

from __future__ import annotations

from typing import Any

from torch import fx

from offramp.passes.infra.editor import Editor
from offramp.program.analysis.flattening import unflattened
from offramp.program.analysis.token_axes import Axes
from offramp.program.graph import aten, expression, shape


def by_row(editor: Editor, count: fx.Node, tokens: fx.Node) -> fx.Node:
    """``count``, a number for each token of ``tokens`` [..., features], with rows on an axis of their own.

    Rows leave one by one, and are counted, along such an axis. The count stays as it is where it has one, and where
    nothing says how rows lie.
    """
    if _apart(editor.program.axes, count) or (before := unflattened(tokens)) is None:
        return count
    sizes = [_size(editor, before, axis) for axis in range(len(shape(before)) - 1)]
    return editor.call(aten.reshape.default, count, sizes, at=count)


def _apart(axes: Axes, count: fx.Node) -> bool:
    """Whether rows have an axis of their own, or there are none."""
    try:
        place = axes.batch_axis(count)
    except ValueError:
        return False
    return place is None or place[1] == 1


def _size(editor: Editor, node: fx.Node, axis: int) -> Any:
    size = expression(shape(node)[axis])
    return size if isinstance(size, int) else editor.call(aten.sym_size.int, node, axis, at=node)
