"""What is said of each token lies by rows, also where a model has the tokens of all rows one after another."""

from __future__ import annotations

from typing import Any

from torch import fx

from offramp.passes.infra.editor import Editor
from offramp.program.analysis.products import product
from offramp.program.graph import aten, data_inputs, expression, is_pointwise, shape

_NORMS = (aten.layer_norm.default, aten.rms_norm.default)


def by_row(editor: Editor, count: fx.Node, tokens: fx.Node) -> fx.Node:
    """``count``, a number for each token of ``tokens`` [..., features], with rows on an axis of their own.

    Rows leave one by one, and are counted, along such an axis. The count stays as it is where it has one, and where
    nothing says how rows lie.
    """
    try:
        editor.program.axes.batch_axis(count)
    except ValueError:
        if (apart := _apart(tokens)) is not None:
            sizes = [_size(editor, apart, axis) for axis in range(len(shape(apart)) - 1)]
            return editor.call(aten.reshape.default, count, sizes, at=count)
    return count


def _apart(tokens: fx.Node) -> fx.Node | None:
    """The value with the same tokens, in order, on more axes: a reshape, and what works token by token, lie between."""
    todo = [tokens]
    while todo:
        node = todo.pop()
        given = [arg for arg in data_inputs(node) if len(shape(arg)) > 1]
        if node.target is aten.reshape.default:
            if len(shape(given[0])) > len(shape(node)) and _sizes(given[0])[-1] == _sizes(node)[-1]:
                return given[0]
        elif _token_by_token(node):
            todo += [arg for arg in given if _sizes(arg)[:-1] == _sizes(node)[:-1]]
    return None


def _token_by_token(node: fx.Node) -> bool:
    return is_pointwise(node) or node.target in _NORMS or product(node) is not None


def _size(editor: Editor, node: fx.Node, axis: int) -> Any:
    size = _sizes(node)[axis]
    return size if isinstance(size, int) else editor.call(aten.sym_size.int, node, axis, at=node)


def _sizes(node: fx.Node) -> list[Any]:
    return [expression(size) for size in shape(node)]
