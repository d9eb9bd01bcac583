"""What is said of each token lies by rows, also where a model has the tokens of all rows one after another."""

from __future__ import annotations

from typing import Any

from torch import fx

from offramp.passes.infra.editor import Editor
from offramp.program.analysis.flattening import unflattened
from offramp.program.graph import aten, expression, shape


def by_row(editor: Editor, count: fx.Node, tokens: fx.Node) -> fx.Node:
    """``count``, a number for each token of ``tokens`` [..., features], with rows on an axis of their own.

    Rows leave one by one, and are counted, along such an axis. The count stays as it is where it has one, and where
    nothing says how rows lie.
    """
    try:
        editor.program.axes.batch_axis(count)
    except ValueError:
        if (apart := unflattened(tokens)) is not None:
            sizes = [_size(editor, apart, axis) for axis in range(len(shape(apart)) - 1)]
            return editor.call(aten.reshape.default, count, sizes, at=count)
    return count


def _size(editor: Editor, node: fx.Node, axis: int) -> Any:
    size = expression(shape(node)[axis])
    return size if isinstance(size, int) else editor.call(aten.sym_size.int, node, axis, at=node)
