"""Layouts and repeated work: what undoes each other, what is computed twice, and reshapes of a known layout."""

from __future__ import annotations

from collections.abc import Hashable
from typing import Any

import torch
from torch import fx

from offramp.export.lowering.node_builder import Builder
from offramp.program.canonical.equal_nodes import call_key, merge_equal
from offramp.program.canonical.simplify import sizes_from_inputs
from offramp.program.graph import aten, shape, sizes_of


def cancel_layout(graph: fx.Graph) -> None:
    """Drop what changes nothing: a transpose of a transpose, a reshape before another or to the shape that is there."""
    for node in graph.find_nodes(op="call_function", target=aten.transpose.int):
        given: Any = node.args[0]
        if given.target is aten.transpose.int and _axes(node) == _axes(given):
            node.replace_all_uses_with(given.args[0])
    for node in graph.find_nodes(op="call_function", target=aten.reshape.default):
        first = given = node.args[0]
        while given.target is aten.reshape.default:
            given = given.args[0]
        node.replace_input_with(first, given)
        if same_shape(node, given):
            node.replace_all_uses_with(given)
    graph.eliminate_dead_code()


def _axes(node: fx.Node) -> set[Any]:
    return {int(axis) % len(shape(node)) for axis in node.args[1:]}  # type: ignore[arg-type]


def same_shape(first: fx.Node, second: fx.Node) -> bool:
    """Whether two values are known to have equal sizes."""
    return sizes_of(first) == sizes_of(second)


def heads_beside(b: Builder, node: fx.Node) -> fx.Node:
    """``[rows, heads, chunk, features]`` as ``[rows, chunk, heads * features]``, as it was before if it was that."""
    rows, heads, chunk, features = b.sizes(node)
    turned: Any = node.args[0] if is_turned(node) else b.call(aten.transpose.int, node, 1, 2)
    wanted = b.call(aten.reshape.default, turned, [rows, chunk, b.product(heads, features)])
    while turned.target is aten.reshape.default:
        turned = turned.args[0]
        if same_shape(turned, wanted):
            return turned  # type: ignore[no-any-return]
    return wanted


def is_turned(node: Any) -> bool:
    """Whether a node exchanges axes 1 and 2: heads and tokens."""
    return node.target is aten.transpose.int and set(node.args[1:]) == {1, 2}


def plain_reshapes(graph: fx.Graph) -> None:
    """A reshape is decomposed by the strides of its input, which decomposing others changes: copy, then view."""
    for node in graph.find_nodes(op="call_function", target=aten.reshape.default):
        with graph.inserting_before(node):
            plain = graph.call_function(aten.clone.default, (node.args[0],), {"memory_format": torch.contiguous_format})
        value = node.args[0].meta["val"]
        with value.fake_mode:
            plain.meta = {"val": torch.empty_like(value, memory_format=torch.contiguous_format)}
        node.target = aten.view.default
        node.replace_input_with(node.args[0], plain)


def read_sizes(graph: fx.Graph) -> None:
    """Read sizes from inputs, so that no value is made for its size alone."""
    sizes_from_inputs(graph)
    graph.eliminate_dead_code()


def merge_calls(graph: fx.Graph) -> None:
    """Compute once what is computed twice of the same: blocks of one segment share what they make of lengths."""
    merge_equal(graph, _shared_key)


def _shared_key(node: fx.Node) -> Hashable | None:
    """Calls of ONNX's operators stay apart."""
    return None if getattr(node.target, "namespace", "") == "onnx_symbolic" else call_key(node)
