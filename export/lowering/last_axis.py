"""Parts of the last axis: which one a node is, and whether two halves of a value are known to be equal."""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import fx

from offramp.program.graph import aten, attribute, expression, is_tensor, shape

_BY_ELEMENT = frozenset(
    {
        aten.cos.default,
        aten.sin.default,
        aten.neg.default,
        aten.clone.default,
        aten._to_copy.default,
        aten.mul.Tensor,
        aten.mul.Scalar,
        aten.add.Tensor,
        aten.sub.Tensor,
        aten.div.Tensor,
    }
)
_ALONG_ROWS = frozenset(
    {aten.reshape.default, aten.view.default, aten.expand.default, aten.unsqueeze.default, aten.squeeze.dim}
)
_BY_AXIS = frozenset({aten.index_select.default, aten.slice.Tensor})


def part(node: Any) -> tuple[fx.Node, int, int] | None:
    """What a node is a part of, along the last axis, and from where to where; None for anything else."""
    if not isinstance(node, fx.Node) or not is_tensor(node) or not shape(node):
        return None
    args: Any = node.args
    if node.target is aten.slice.Tensor:
        axis, start, stop, step = list(args[1:]) + [0, 0, 2**63 - 1, 1][len(args) - 1 :]
        size = _last_size(args[0])
        if not _is_last(node, axis) or not all(isinstance(n, int) for n in (size, start, stop)) or step != 1:
            return None
        begin, end, _ = slice(start, stop).indices(size)
        return args[0], begin, end
    if node.target is operator.getitem:
        split, at = args
        if split.target not in (aten.split.Tensor, aten.split_with_sizes.default):
            return None
        if not _is_last(node, split.args[2] if len(split.args) > 2 else 0):
            return None
        sizes = [expression(value.shape[-1]) for value in split.meta["val"]]
        return split.args[0], sum(sizes[:at]), sum(sizes[: at + 1])
    return None


def repeats(node: Any, module: torch.nn.Module) -> bool:
    """Whether both halves of the last axis hold the same: shown by how the value is made, or by the values.

    False means that it is not known.
    """
    size = _last_size(node)
    if not isinstance(size, int) or size % 2:
        return False
    if node.op == "get_attr":
        first, second = attribute(module, str(node.target)).chunk(2, -1)
        return torch.equal(first, second)
    if node.op != "call_function":
        return False
    target, given = node.target, [arg for arg in node.all_input_nodes if is_tensor(arg)]
    if target is aten.cat.default:
        pieces = node.args[0]
        return _is_last(node, (*node.args, 0)[1]) and len(pieces) == 2 and _same(*pieces)
    if target is aten.repeat.default:
        return bool(node.args[1][-1] == 2) or (node.args[1][-1] == 1 and repeats(given[0], module))
    if target in _BY_ELEMENT:
        return all(_last_size(arg) in (None, 1) or repeats(arg, module) for arg in given)
    if target is aten.embedding.default:
        return repeats(node.args[0], module)
    return _last_stays(node) and _last_size(given[0]) == size and repeats(given[0], module)


def _last_size(node: Any) -> Any:
    """The size of the last axis, None if there is none."""
    return expression(shape(node)[-1]) if is_tensor(node) and shape(node) else None


def _is_last(node: Any, axis: int) -> bool:
    return axis % len(shape(node)) == len(shape(node)) - 1


def _last_stays(node: Any) -> bool:
    """Whether the elements of the last axis stay together in a call that changes the layout, or takes rows."""
    if node.target in _BY_AXIS:
        return not _is_last(node, (*node.args, 0)[1])
    if node.target is aten.transpose.int:
        return not any(_is_last(node, axis) for axis in node.args[1:])
    if node.target is aten.permute.default:
        return _is_last(node, node.args[1][-1])
    return node.target in _ALONG_ROWS


def _same(first: Any, second: Any) -> bool:
    """Whether two arguments are the same computation."""
    if first is second:
        return True
    if isinstance(first, fx.Node) and isinstance(second, fx.Node):
        if first.op == second.op == "get_attr":
            return first.target == second.target
        calls = first.op == second.op == "call_function" and first.target is second.target
        return calls and _same(first.args, second.args) and _same(first.kwargs, second.kwargs)
    if isinstance(first, (list, tuple)) and isinstance(second, (list, tuple)):
        return len(first) == len(second) and all(map(_same, first, second))
    if isinstance(first, dict) and isinstance(second, dict):
        return first.keys() == second.keys() and all(_same(first[key], second[key]) for key in first)
    return bool(type(first) is type(second) and first == second)
