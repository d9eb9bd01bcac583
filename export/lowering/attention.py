"""Attention without caches, in the layout that products write."""

from __future__ import annotations

from typing import Any

from torch import fx

from offramp.export.lowering.layouts import heads_beside, is_turned
from offramp.export.lowering.node_builder import Builder
from offramp.program.graph import aten, shape


def keep_heads_beside(graph: fx.Graph) -> None:
    """Leave heads beside features where queries, keys and values were turned for an attention only.

    ``attention(transpose(q, 1, 2), ...)``  becomes  ``transpose(Attention(q, ...), 1, 2)``
    """
    for node in graph.find_nodes(op="call_function", target=aten.scaled_dot_product_attention.default):
        if all(is_turned(arg) and len(shape(arg)) == 4 for arg in node.args[:3]):
            with graph.inserting_before(node):
                made = _attention(Builder(graph, origin=node), *node.args, **node.kwargs)
            if made is not None:
                node.replace_all_uses_with(made)
    graph.eliminate_dead_code()


def _attention(
    b: Builder,
    query: fx.Node,
    key: fx.Node,
    value: fx.Node,
    mask: fx.Node | None = None,
    dropout: float = 0.0,
    causal: bool = False,
    *,
    scale: float | None = None,
    **_: bool,
) -> fx.Node | None:
    """ONNX's Attention of three axes, with its result turned; None where heads are no numbers, or values drop out."""
    rows, heads, tokens = (b.size(query, axis) for axis in range(3))
    groups, features = b.size(key, 1), b.size(value, 3)
    if dropout or not (isinstance(heads, int) and isinstance(groups, int)):
        return None
    attributes: dict[str, Any] = {"q_num_heads": heads, "kv_num_heads": groups, "is_causal": int(causal)}
    if scale is not None:
        attributes["scale"] = float(scale)
    given = [heads_beside(b, node) for node in (query, key, value)]
    made = b.onnx("Attention", [*given, mask], attributes, [[rows, tokens, b.product(heads, features)]])
    apart = b.call(aten.reshape.default, made[0], [rows, tokens, heads, features])
    return b.call(aten.transpose.int, apart, 1, 2)
