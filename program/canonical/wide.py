"""Pointwise arithmetic in bfloat16, for which ONNX Runtime has no CPU kernels, as torch does it: wide, then rounded."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx
from torch.fx.node import map_aggregate

from offramp.program.fake_values import fake_result
from offramp.program.graph import add_call, aten, fake_mode, is_pointwise, is_tensor

#: What torch rounds on the way: none of these is one operation in float32, then rounded.
_APART = (aten.addcdiv, aten.erf, aten.pow, aten.rsqrt)
#: Where it rounds numbers beside a tensor, too.
_NUMBERS = (aten.add, aten.sub, aten.eq, aten.ne, aten.lt, aten.le, aten.gt, aten.ge, aten.fmod, aten.remainder)


def made_wide(graph: fx.Graph) -> int:
    """Rewrite what computes with bfloat16 value by value, in place; returns how many calls were.

    ``f(x, y)``  becomes  ``f(x.float(), y.float()).bfloat16()``
    """
    mode, wide, edits = fake_mode(graph), dict[fx.Node, fx.Node](), 0

    def cast(node: fx.Node, dtype: torch.dtype) -> fx.Node:
        with graph.inserting_after(node):
            made = add_call(mode, graph, aten._to_copy.default, node, dtype=dtype)
        made.meta = {**node.meta, "val": made.meta["val"]}
        return made

    for node in list(graph.nodes):
        narrow = [arg for arg in node.all_input_nodes if _narrow(arg)]
        if not narrow or not is_pointwise(node) or "alpha" in node.kwargs or _packet(node) in _APART:
            continue
        rounds = _narrow(node)
        for arg in narrow:
            wide[arg] = wide.get(arg) or cast(arg, torch.float32)
            node.replace_input_with(arg, wide[arg])
        if _packet(node) in _NUMBERS:
            node.args = map_aggregate(node.args, _rounded)
        node.meta["val"] = fake_result(mode, node.target, node.args, node.kwargs)
        if rounds:
            made = cast(node, torch.bfloat16)
            node.replace_all_uses_with(made, lambda user, made=made: user is not made)
        edits += 1
    return edits


def _narrow(node: fx.Node) -> bool:
    return is_tensor(node) and node.meta["val"].dtype == torch.bfloat16


def _packet(node: fx.Node) -> Any:
    return getattr(node.target, "overloadpacket", None)


def _rounded(arg: Any) -> Any:
    return torch.tensor(arg, dtype=torch.bfloat16).item() if isinstance(arg, float) else arg
