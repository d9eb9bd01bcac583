"""Queries, keys and values of one state as one product: one pass over the state, and no weight more in the bundle."""

from __future__ import annotations

import operator
from collections import defaultdict
from typing import Any, TypeAlias

from torch import fx

from offramp.passes.infra.editor import Editor
from offramp.program import ops
from offramp.program.graph import aten, attribute, data_inputs, expression, shape, storage_key

Products: TypeAlias = tuple[fx.Node, ...]


def merge_products(editor: Editor) -> None:
    """Merge the products that make the queries, keys and values of a cached attention.

    ``x @ q', x @ k', x @ v'``  becomes  ``split(x @ cat([q, k, v])')``

    The weights' rows one behind the other are one weight of the bundle, which stands for theirs. So nothing else
    may read those, but the same product of the same weights (a block that is run several times, say).
    """
    groups = [group for node in editor.graph.nodes if node.target is ops.ATTENTION and (group := _group(node))]
    keys = {group: tuple(_key(editor, arg) for node in group for arg in node.args[1:]) for group in groups}
    readers: defaultdict[Any, set[Any]] = defaultdict(set)
    member = {node: key for group, key in keys.items() for node in group}
    for node in editor.graph.find_nodes(op="get_attr"):
        readers[_key(editor, node)] |= {member.get(user, user) for user in node.users}
    for group, key in keys.items():
        if len(set(key)) == len(key) and all(readers[weight] == {key} for weight in key):
            _merge(editor, group)


def merged(node: fx.Node) -> tuple[fx.Node, ...]:
    """The weights that a node lays one behind the other, itself if it is one; none for any other node."""
    if node.op == "get_attr":
        return (node,)
    if node.target is not aten.cat.default or len(node.args) > 1:
        return ()
    parts: Any = node.args[0]
    return tuple(parts) if all(part.op == "get_attr" for part in parts) else ()


def _key(editor: Editor, node: Any) -> Any:
    return storage_key(attribute(editor.module, str(node.target)))


def _group(attention: fx.Node) -> Products:
    """The three products, of one state; empty if there are no such."""
    found = [_products(arg) for arg in attention.args[:3]]
    if any(len(products) != 1 for products in found):
        return ()
    group = tuple(products.pop() for products in found)
    first = group[0]
    alike = len(set(group)) == 3 and all(
        node.args[0] is first.args[0]
        and not node.kwargs
        and len(node.args) == len(first.args)
        and all(isinstance(arg, fx.Node) and arg.op == "get_attr" for arg in node.args[1:])
        for node in group
    )
    return group if alike else ()


def _products(node: Any) -> set[fx.Node]:
    """The nearest products with weights that a value is made from."""
    found, seen, todo = set[fx.Node](), set[fx.Node](), [node]
    while todo:
        node = todo.pop()
        if node in seen:
            continue
        seen.add(node)
        if node.target is aten.linear.default:
            found.add(node)
        else:
            todo += data_inputs(node)
    return found


def _merge(editor: Editor, group: Products) -> None:
    order = {node: at for at, node in enumerate(editor.graph.nodes)}
    at = first = min(group, key=order.__getitem__)
    arguments = []
    parts: Any
    for parts in zip(*(node.args[1:] for node in group), strict=True):
        for weight in parts:
            if order[weight] > order[first]:
                first.prepend(weight)
        at = editor.call(aten.cat.default, list(parts), at=at)
        arguments.append(at)
    product = editor.call(aten.linear.default, first.args[0], *arguments, at=at)
    sizes = [expression(shape(node)[-1]) for node in group]
    split = editor.call(aten.split_with_sizes.default, product, sizes, -1, at=product)
    for place, node in enumerate(group):
        editor.replace_uses(node, editor.call(operator.getitem, split, place, at=split), list(node.users))
