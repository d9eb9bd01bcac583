"""Which axes of a mask count queries, and which keys: followed up from the attention through what made the mask."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeAlias

from torch import fx

from offramp.errors import PassError
from offramp.program.graph import FILLED, aten, expression, is_pointwise, is_tensor, shape, source, symbols

KEY, QUERY = "key", "query"
Roles: TypeAlias = tuple[str, ...]
IsData: TypeAlias = Callable[[fx.Node], bool]

_SAME = (
    aten._to_copy.default,
    aten.clone.default,
    aten.masked_fill.Scalar,
    aten.masked_fill.Tensor,
    aten.__and__.Tensor,
    aten.__or__.Tensor,
    aten.__xor__.Tensor,
    aten.where.self,
    aten.where.ScalarOther,
    aten.where.ScalarSelf,
    aten.where.Scalar,
)
_SPREAD = (aten.expand.default, aten.repeat.default)
_VIEWS = (
    aten.unsqueeze.default,
    aten.squeeze.dim,
    aten.reshape.default,
    aten.view.default,
    aten.transpose.int,
    aten.permute.default,
    aten.slice.Tensor,
    aten.select.int,
    aten.repeat_interleave.self_int,
)


def roles_of(node: fx.Node, rank: int, query: int, key: int, tokens: Any) -> Roles:
    """Which axes of a mask are queries and keys, given those of the scores, which have ``rank`` axes."""
    missing = rank - len(shape(node))
    named = {query % rank - missing: QUERY, key % rank - missing: KEY}
    return tuple(named.get(i, "") if tokens in symbols(size) else "" for i, size in enumerate(shape(node)))


def leaves(node: fx.Node, roles: Roles, is_data: IsData) -> Iterator[tuple[fx.Node, Roles]]:
    """The values of keys or of queries alone that a mask is made of, with their roles.

    Raises:
        PassError: an operator on the way does not say which axis is which.
    """
    if not is_data(node):
        return
    if is_leaf(node, roles, is_data):
        yield node, roles
        return
    for arg, inner in arguments(node, roles):
        yield from leaves(arg, inner, is_data)


def is_leaf(node: fx.Node, roles: Roles, is_data: IsData) -> bool:
    """Whether a value is one of keys or queries alone, rows and tokens on its first axes where that can be had."""
    if {KEY, QUERY} <= set(roles):
        return False
    if not any(roles) or roles[1:2] != ("",):
        return True
    views = (*_VIEWS, aten.index.Tensor)
    return not (broadcasts(node) or (node.target in views and is_data(node.args[0])))  # type: ignore[arg-type]


def arguments(node: fx.Node, roles: Roles) -> list[tuple[fx.Node, Roles]]:
    """The tensors that a node of a mask is made of, and which of their axes are queries and keys."""
    target, args = node.target, node.args
    if target in FILLED:
        return []
    tensors = [arg for arg in node.all_input_nodes if is_tensor(arg)]
    first: Any = args[0]
    if broadcasts(node):
        return [(arg, _broadcast(arg, roles)) for arg in tensors]
    if target is aten.index.Tensor and all(index is not None for index in args[1]):  # type: ignore[union-attr]
        return [(first, _indexed(node, roles))]
    if target in (aten.matmul.default, aten.bmm.default) and all(len(shape(arg)) == len(roles) for arg in tensors):
        left, right = args[0], args[1]
        return [(left, (*roles[:-1], "")), (right, (*roles[:-2], "", roles[-1]))]  # type: ignore[list-item]
    if target in _VIEWS and (inner := _viewed(node, roles)) is not None:
        return [(first, inner)]
    raise PassError(
        f"insert-cache: a mask made from the contents of tokens goes through {target}, after which queries and keys "
        f"cannot be told apart ({source(node)})",
        hint="masks of keys, (ids != pad)[:, None, None, :], combined by &, |, +, masked_fill or where",
    )


def broadcasts(node: fx.Node) -> bool:
    """Whether a node's arguments are broadcast to its own shape."""
    return is_pointwise(node) or node.target in _SAME or node.target in _SPREAD


def role_of_index(index: fx.Node, roles: Roles) -> str:
    """What an index of a mask counts: queries, keys, or neither."""
    found = set(_broadcast(index, roles)) - {""}
    return found.pop() if len(found) == 1 else ""


def _broadcast(arg: fx.Node, roles: Roles) -> Roles:
    sizes = shape(arg)
    aligned = roles[len(roles) - len(sizes) :]
    return tuple("" if expression(size) == 1 else role for size, role in zip(sizes, aligned, strict=True))


def _indexed(node: fx.Node, roles: Roles) -> Roles:
    """Of a value whose every axis is indexed: an axis is what the places of its index are."""
    indices: Any = node.args[1]
    return tuple(role_of_index(index, roles) for index in indices)


def _viewed(node: fx.Node, roles: Roles) -> Roles | None:
    args: Any = node.args
    rank = len(shape(args[0]))
    inner = list(roles)
    if node.target is aten.unsqueeze.default:
        inner.pop(args[1] % (rank + 1))
    elif node.target in (aten.squeeze.dim, aten.select.int):
        if rank > len(roles):
            inner.insert(args[1] % rank, "")
    elif node.target is aten.transpose.int:
        a, b = args[1] % rank, args[2] % rank
        inner[a], inner[b] = inner[b], inner[a]
    elif node.target is aten.permute.default:
        inner = [""] * rank
        for i, axis in enumerate(args[1]):
            inner[axis % rank] = roles[i]
    elif node.target is aten.slice.Tensor:
        axis = (args[1] if len(args) > 1 else 0) % rank
        if roles[axis] and expression(shape(node)[axis]) != expression(shape(args[0])[axis]):
            return None
    elif node.target is aten.repeat_interleave.self_int:
        if len(args) < 3 or roles[args[2] % rank]:
            return None
    else:
        return _reshaped(shape(args[0]), shape(node), roles)
    return tuple(inner)


def _reshaped(before: Sequence[Any], after: Sequence[Any], roles: Roles) -> Roles | None:
    """The roles before a reshape that leaves the axes of tokens whole."""
    inner, i = [""] * len(before), 0
    made: Any = 1
    passed: Any = 1
    for size, role in zip(after, roles, strict=True):
        if role:
            while i < len(before) and (made != passed or expression(before[i]) == 1 != expression(size)):
                passed, i = passed * expression(before[i]), i + 1
            if i == len(before) or made != passed or expression(before[i]) != expression(size):
                return None
            inner[i] = role
            passed, i = passed * expression(before[i]), i + 1
        made = made * expression(size)
    return tuple(inner)
