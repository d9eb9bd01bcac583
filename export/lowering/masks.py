"""Masks in the form that ONNX Runtime takes."""

from __future__ import annotations

from torch import fx

from offramp.program.graph import aten, expression, shape


def widen_masks(graph: fx.Graph) -> None:
    """ONNX Runtime's Attention wants a mask row for every query; torch lets one row stand for all."""
    for node in graph.find_nodes(op="call_function", target=aten.scaled_dot_product_attention.default):
        mask = node.args[3] if len(node.args) > 3 else node.kwargs.get("attn_mask")
        if mask is None or len(shape(mask)) < 2 or expression(shape(mask)[-2]) != 1:
            continue
        query = node.args[0]
        rows = shape(query)[-2]
        with graph.inserting_before(node):
            if not isinstance(expression(rows), int):
                rows = graph.call_function(aten.sym_size.int, (query, len(shape(query)) - 2))
                rows.meta = {"val": shape(query)[-2]}
            wide = graph.call_function(aten.expand.default, (mask, [*[-1] * (len(shape(mask)) - 2), rows, -1]))
        with mask.meta["val"].fake_mode:
            wide.meta = {"val": mask.meta["val"].expand(*[-1] * (len(shape(mask)) - 2), shape(query)[-2], -1)}
        node.replace_input_with(mask, wide)
