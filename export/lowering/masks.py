"""Masks in the form that ONNX Runtime takes."""

from __future__ import annotations

import torch
from torch import fx

from offramp.program.graph import aten, expression, shape

_LOWEST = torch.finfo(torch.float32).min
_NEXT = float(torch.nextafter(torch.tensor(_LOWEST), torch.tensor(0.0)))
_COMPARES = (aten.eq.Scalar, aten.ne.Scalar, aten.gt.Scalar, aten.le.Scalar)


def finite_fills(graph: fx.Graph) -> None:
    """ONNX Runtime's Attention takes float32's lowest number for -inf, and gives a query that sees no key zeros.

    torch gives such a query (of padding) the mean of all values. The number next to the lowest hides keys as well.
    Where something asks for the lowest number, all stays as it is.
    """
    nodes = graph.find_nodes
    if any(_LOWEST in node.args for target in _COMPARES for node in nodes(op="call_function", target=target)):
        return
    for node in graph.nodes:
        if node.op == "call_function" and any(isinstance(arg, float) and arg == _LOWEST for arg in node.args):
            node.args = tuple(_NEXT if isinstance(arg, float) and arg == _LOWEST else arg for arg in node.args)


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
