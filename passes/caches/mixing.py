"""Operators that mix tokens without being attention."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from torch import fx

from offramp.program.graph import aten, expression, is_pointwise, is_symint, is_tensor, shape, symbols

#: Operators that mix along their argument ``dim``, ``dims`` or ``dimension``.
_ALONG = re.compile(
    "cum(sum|prod|max|min)|logcumsumexp|flip|roll|sort|argsort|topk|_?(log_)?softmax|sum|mean|a?max|a?min|any|all|"
    "argmax|argmin|std|var|prod|logsumexp|norm|index_select|gather|select|unfold|diff|cat"
)
_CONVOLUTIONS = ("conv1d", "conv2d", "conv3d", "convolution", "conv_transpose1d", "avg_pool1d", "max_pool1d")
_NORMS = ("group_norm", "instance_norm", "batch_norm", "native_group_norm")
_PRODUCTS = (aten.matmul.default, aten.bmm.default, aten.mm.default, aten.baddbmm.default)


def mixes_tokens(node: fx.Node, args: Sequence[Any], chunk: Any) -> str | None:
    """How a node mixes values along an axis of size ``chunk`` (it sums over the tokens, say); None if it does not.

    ``args`` are the node's arguments with their new shapes. Axes of batch and tokens together are not judged.
    """
    schema = getattr(node.target, "_schema", None)
    if schema is None:  # getitem
        return None
    if is_pointwise(node):
        numbers = [arg.meta["val"] for arg in args if isinstance(arg, fx.Node) and is_symint(arg)]
        return "reads the number of tokens" if any(symbols(size) & symbols(chunk) for size in numbers) else None
    name = str(schema.name).rpartition("::")[2]
    tensors = args[0] if isinstance(args[0], (list, tuple)) else args[:1]
    first = next((arg for arg in tensors if isinstance(arg, fx.Node) and is_tensor(arg)), None)
    if first is None:
        return None
    token_axes = {axis for axis, size in enumerate(shape(first)) if _counts(size, chunk)}
    if not token_axes:
        return None
    if _ALONG.fullmatch(name) and token_axes & _dims(node, args, len(shape(first))):
        return f"goes over the tokens (axis {min(token_axes)} of {node.args[0]})"
    if name in _CONVOLUTIONS and any(axis >= 2 for axis in token_axes):
        weight = args[1] if len(args) > 1 else None
        kernel = shape(weight)[2:] if isinstance(weight, fx.Node) else (2,)
        if any(expression(size) != 1 for size in kernel):
            return "convolves neighbouring tokens"
    if name in _NORMS:
        return "normalises over the tokens"
    if name == "slice" and len(args) > 2:
        axis = int(args[1]) % len(shape(first))
        if axis in token_axes and (args[2] not in (None, 0) or not _whole(args, first, axis)):
            return "takes some of the tokens"
    if name == "index" and token_axes & {axis for axis, index in enumerate(args[1]) if index is not None}:
        return "takes some of the tokens"
    if name in ("pad", "constant_pad_nd"):  # what pads only is followed by a convolution or a slice
        ends = list(zip(args[1][::2], args[1][1::2], strict=True))
        moved = {len(shape(first)) - 1 - i for i, (before, behind) in enumerate(ends) if before == -behind != 0}
        if moved & token_axes:
            return "shifts the tokens"
    if node.target in _PRODUCTS and _counts(shape(args[-2])[-1], chunk):
        return "sums over the tokens"
    return None


def _counts(size: Any, chunk: Any) -> bool:
    """Whether a size is the number of tokens, or that and some padding."""
    return bool(getattr(expression(size) - expression(chunk), "is_number", False))


def _dims(node: fx.Node, args: Sequence[Any], rank: int) -> set[int]:
    """The axes that an operator goes along; all, where it is not given any."""
    schema = node.target._schema.arguments  # type: ignore[union-attr]
    for at, argument in enumerate(schema):
        if argument.name in ("dim", "dims", "dimension"):
            found = args[at] if at < len(args) else node.kwargs.get(argument.name, argument.default_value)
            if found is None or found == []:
                return set(range(rank))
            return {int(axis) % rank for axis in (found if isinstance(found, (list, tuple)) else [found])}
    return set(range(rank))


def _whole(args: Sequence[Any], first: fx.Node, axis: int) -> bool:
    end = args[3] if len(args) > 3 else None
    if end is None or (isinstance(end, int) and end > 2**40):
        return True
    return isinstance(end, fx.Node) and expression(end.meta["val"]) == expression(shape(first)[axis])
