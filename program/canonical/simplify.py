"""Canonical form: what computes nothing goes away, and one value has one node."""

from __future__ import annotations

import operator
from collections.abc import Callable, Collection, Hashable
from typing import Any

import torch
from torch import fx

from offramp.program.canonical.attention_axes import four_axes
from offramp.program.canonical.equal_nodes import call_key, merge_equal
from offramp.program.canonical.in_other_words import in_other_words
from offramp.program.canonical.known_sizes import known_sizes
from offramp.program.dropout import keeps
from offramp.program.fake_values import fake_result
from offramp.program.graph import (
    WRAPPERS,
    aten,
    expression,
    fake_mode,
    is_symint,
    is_tensor,
    shape,
    shape_key,
    sizes_of,
    storage_key,
)

_ASSERTIONS = ("_assert", "sym_constrain", "_check")
_END = torch.iinfo(torch.int64).max


def canonicalize(module: fx.GraphModule, protected: Collection[str] = ()) -> int:
    """Bring the graph of ``module`` into canonical form, in place; returns the number of edits.

    Wrappers are inlined, assertions dropped, what a mask of constants selects is one, operations that change nothing
    removed (clone, detach, full slices, dropout in eval mode, ...), views written as reshapes, ``squeeze`` by its axes,
    ``einsum`` with weights and ``glu`` as products, fused attention given four axes, sizes read from the inputs where
    an input has that size, equal pure computations merged, weights named once per storage. Nodes whose names are in
    ``protected`` stay. A second call makes no edit.
    """
    graph = module.graph
    edits = _inline_wrappers(module)
    edits += _drop_assertions(graph)
    edits += known_sizes(module)
    edits += _sizes_not_tensors(graph)
    edits += _plain_operators(graph)
    edits += _squeezed_by_axis(graph)
    edits += in_other_words(graph)
    edits += four_axes(graph)
    edits += _drop_identities(graph, frozenset(protected))
    edits += sizes_from_inputs(graph)
    edits += merge_equal(graph, lambda node: None if node.name in protected else _value_key(module, node))
    before = len(graph.nodes)
    graph.eliminate_dead_code(lambda node: node.op in ("placeholder", "output") or node.name in protected)
    edits += before - len(graph.nodes)
    graph.lint()
    module.delete_all_unused_submodules()
    module.recompile()
    return edits


def _inline_wrappers(module: fx.GraphModule) -> int:
    """``set_grad_enabled`` and disabled autocast regions become plain nodes."""
    edits = 0
    graph = module.graph
    for node in list(graph.nodes):
        if node.op != "call_function" or getattr(node.target, "__name__", "") not in WRAPPERS:
            continue
        at = next(i for i, arg in enumerate(node.args) if isinstance(arg, fx.Node) and arg.op == "get_attr")
        holder: Any = node.args[at]
        body = getattr(module, str(holder.target))
        _inline_wrappers(body)
        with graph.inserting_before(node):
            env: dict[fx.Node, Any] = dict(
                zip(body.graph.find_nodes(op="placeholder"), node.args[at + 1 :], strict=True)
            )
            for inner in body.graph.nodes:
                if inner.op == "output":
                    returned = inner.args[0]
                elif inner.op != "placeholder":
                    env[inner] = graph.node_copy(inner, env.__getitem__)
        flat = [env[item] for item in returned] if isinstance(returned, (tuple, list)) else env[returned]
        for user in list(node.users) if isinstance(flat, list) else ():
            user.replace_all_uses_with(flat[user.args[1]])
            graph.erase_node(user)
        if not isinstance(flat, list):
            node.replace_all_uses_with(flat)
        graph.erase_node(node)
        if not holder.users:
            graph.erase_node(holder)
        edits += 1
    return edits


def _drop_assertions(graph: fx.Graph) -> int:
    found = [
        node
        for node in graph.nodes
        if node.op == "call_function" and getattr(node.target, "__name__", "").startswith(_ASSERTIONS)
    ]
    for node in reversed(found):
        graph.erase_node(node)
    return len(found)


def _plain_operators(graph: fx.Graph) -> int:
    """Views become reshapes, which need no memory layout that dropping a clone may change; ``c - x`` is ``-x + c``."""
    edits = 0
    for node in list(graph.nodes):
        if node.target in (aten.view.default, aten._unsafe_view.default):
            node.target = aten.reshape.default
            edits += 1
        elif node.target is aten.rsub.Scalar and len(node.args) == 2:
            with graph.inserting_before(node):
                negative = graph.call_function(aten.neg.default, (node.args[0],))
            negative.meta = {**node.meta, "val": node.args[0].meta["val"]}
            node.target, node.args = aten.add.Tensor, (negative, node.args[1])
            edits += 1
    return edits


_SQUEEZES = (aten.squeeze.default, aten.squeeze.dim, aten.squeeze.dims)


def _squeezed_by_axis(graph: fx.Graph) -> int:
    """``squeeze`` names the axes that always have one place, and none that varies: a single row keeps its axis."""
    edits = 0
    for node in list(graph.nodes):
        if node.target not in _SQUEEZES:
            continue
        sizes = sizes_of(node.args[0])
        asked = node.args[1] if len(node.args) > 1 else range(len(sizes))
        asked = [asked] if isinstance(asked, int) else asked
        axes = sorted({axis % len(sizes) for axis in asked if sizes and sizes[axis] == 1})
        target, arg = (aten.squeeze.dim, axes[0]) if len(axes) == 1 else (aten.squeeze.dims, axes)
        if axes and (node.target, node.args[1:]) != (target, (arg,)):
            node.target, node.args = target, (node.args[0], arg)
            edits += 1
    return edits


_ARITHMETIC = {
    aten.add.Tensor: operator.add,
    aten.sub.Tensor: operator.sub,
    aten.mul.Tensor: operator.mul,
    aten.floor_divide.default: operator.floordiv,
}


def _sizes_not_tensors(graph: fx.Graph) -> int:
    """Sizes that went through a tensor (``scalar_tensor(size)``, arithmetic, ``item``) are sizes again."""

    def size(node: Any) -> Any:
        """The node's value as a size, written before ``here``; None where it is not made of sizes."""
        if not isinstance(node, fx.Node):
            return node if isinstance(node, int) else None
        if node.target in (aten.scalar_tensor.default, aten._to_copy.default):
            return node.args[0] if is_symint(node.args[0]) else size(node.args[0])  # type: ignore[arg-type]
        if (equal := _written(node)) is not None:
            return size(equal)
        if node.target is aten.rsub.Scalar or node.target in _ARITHMETIC:
            parts = [size(arg) for arg in node.args[:2]]
            if len(node.args) != 2 or node.kwargs or any(part is None for part in parts):
                return None
            if node.target is aten.rsub.Scalar:
                parts.reverse()
            target = operator.sub if node.target is aten.rsub.Scalar else _ARITHMETIC[node.target]
            made = graph.call_function(target, tuple(parts))
            made.meta = {"val": target(*(p.meta["val"] if isinstance(p, fx.Node) else p for p in parts))}
            return made
        return None

    edits = 0
    for node in graph.find_nodes(op="call_function", target=aten.item.default):
        with graph.inserting_before(node):
            found = size(node.args[0])
        if found is not None:
            node.replace_all_uses_with(found)
            graph.erase_node(node)
            edits += 1
    if edits:
        _refresh(graph)
    return edits


def _refresh(graph: fx.Graph) -> None:
    """Compute every node's shape again, from those of the inputs."""
    mode = fake_mode(graph)
    for node in graph.nodes:
        if node.op == "call_function":
            node.meta["val"] = fake_result(mode, node.target, node.args, node.kwargs)


def _same(node: fx.Node) -> bool:
    arg = node.args[0]
    return isinstance(arg, fx.Node) and is_tensor(arg) and shape_key(arg) == shape_key(node)


def _full_slice(node: fx.Node) -> bool:
    defaults: list[Any] = [None, 0, None, None, 1]
    start, end, step = [*node.args, *defaults[len(node.args) :]][2:]
    reaches = end is None or end == _END or isinstance(end, fx.Node)
    return reaches and start in (None, 0) and step == 1 and _same(node)


def _scalar(value: object) -> Callable[[fx.Node], bool]:
    def check(node: fx.Node) -> bool:
        return len(node.args) > 1 and node.args[1] == value and not isinstance(node.args[1], fx.Node) and _same(node)

    return check


def _always(_: fx.Node) -> bool:
    return True


_IDENTITIES: dict[Any, Callable[[fx.Node], bool]] = {
    aten.clone.default: _always,
    aten.alias.default: _always,
    aten.detach.default: _always,
    aten.detach_.default: _always,
    aten.contiguous.default: _always,
    aten.lift_fresh_copy.default: _always,
    aten.dropout.default: lambda node: node.args[2] is False and not keeps(node),
    aten.feature_dropout.default: lambda node: node.args[2] is False and not keeps(node),
    aten._to_copy.default: lambda node: _same(node),
    aten.to.dtype: lambda node: _same(node),
    aten.to.device: lambda node: _same(node),
    aten.to.dtype_layout: lambda node: _same(node),
    aten.type_as.default: lambda node: _same(node),
    aten.slice.Tensor: _full_slice,
    aten.expand.default: _same,
    aten.reshape.default: _same,
    **dict.fromkeys(_SQUEEZES, _same),
    aten.add.Tensor: _scalar(0),
    aten.sub.Tensor: _scalar(0),
    aten.mul.Tensor: _scalar(1),
    aten.div.Tensor: _scalar(1),
}


#: What writes over all of its first argument is its second one.
_WRITES = (aten.copy.default, aten.slice_scatter.default, aten.select_scatter.default)


def _written(node: fx.Node) -> Any:
    """The argument that a node is equal to; None where it is equal to none."""
    check = _IDENTITIES.get(node.target) if node.op == "call_function" else None
    if check is not None:
        return node.args[0] if check(node) else None
    if node.target in _WRITES and isinstance(node.args[1], fx.Node) and shape_key(node.args[1]) == shape_key(node):
        return node.args[1]
    return None


def _drop_identities(graph: fx.Graph, protected: frozenset[str]) -> int:
    edits = 0
    for node in list(graph.nodes):
        equal = None if node.name in protected else _written(node)
        if equal is None:
            continue
        node.replace_all_uses_with(equal)
        graph.erase_node(node)
        edits += 1
    return edits


def sizes_from_inputs(graph: fx.Graph) -> int:
    """Read every size that some input has from that input, so that blocks do not depend on each other.

    A size that is one number, as a loop over the tokens fixes it, becomes that number.
    """
    edits = 0
    inputs: dict[str, tuple[fx.Node, int]] = {}
    last = None
    for node in graph.find_nodes(op="placeholder"):
        last = node
        for axis, size in enumerate(shape(node)):
            if not isinstance(expression(size), int):
                inputs.setdefault(str(expression(size)), (node, axis))
    readers: dict[tuple[fx.Node, int], fx.Node] = {}
    for node in list(graph.nodes):
        if node.op != "call_function" or not is_symint(node):
            continue
        size = expression(node.meta["val"])
        if isinstance(size, int):
            edits += _written_out(node, size)
            continue
        place = inputs.get(str(size))
        if place is None:
            continue
        if place not in readers:
            if node.target is aten.sym_size.int and tuple(node.args) == place and node.prev is last:
                readers[place] = last = node
                continue
            assert last is not None
            with graph.inserting_after(last):
                reader = graph.call_function(aten.sym_size.int, place)
            reader.meta = {"val": node.meta["val"]}
            readers[place] = last = reader
        elif readers[place] is node:
            continue
        node.replace_all_uses_with(readers[place])
        graph.erase_node(node)
        edits += 1
    return edits


def _written_out(node: fx.Node, size: int) -> int:
    """Readers of a size have the number itself."""
    for user in list(node.users):
        user.args = fx.map_arg(user.args, lambda arg: size if arg is node else arg)
        user.kwargs = fx.map_arg(user.kwargs, lambda arg: size if arg is node else arg)
    node.graph.erase_node(node)
    return 1


def _value_key(module: fx.GraphModule, node: fx.Node) -> Hashable | None:
    """Equal where two nodes hold one value; weights do when their storage is the same."""
    if node.op != "get_attr":
        return call_key(node)
    value = module
    for part in str(node.target).split("."):
        value = getattr(value, part)
    return ("get_attr", storage_key(value)) if isinstance(value, torch.Tensor) else None
