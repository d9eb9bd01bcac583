"""A projection as two factors, whose inner values are ordered by how much they carry."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx

from offramp.passes.infra.editor import Editor
from offramp.program.analysis.products import Product
from offramp.program.graph import aten, attribute

_SHRINK = 0.1  # towards inputs that are alike in all directions: an example has fewer tokens than there may be features


def rank(item: Product) -> int:
    """How many inner values two factors have that cost what the product costs."""
    return round(item.features * item.units / (item.features + item.units))


def factors(weight: Tensor, count: int, data: Tensor | None) -> tuple[Tensor, Tensor]:
    """``[count, features]`` and ``[units, count]``, whose product is nearest to ``weight`` [units, features].

    With ``data`` [tokens, features] nearest in what it makes of those: by the singular vectors of ``weight C^(1/2)``,
    where ``C`` are the data's second moments (as in SVD-LLM, arXiv 2403.07378). The first inner values carry most.
    """
    root = torch.eye(weight.shape[1], dtype=torch.float64)
    if data is not None:
        moments = data.double().T @ data.double() / max(1, len(data))
        scale = float(moments.trace()) / len(moments)
        if scale > 0:
            root = torch.linalg.cholesky((1 - _SHRINK) * moments / scale + _SHRINK * root)
    left, values, right = torch.linalg.svd(weight.double() @ root, full_matrices=False)
    left, values, right = left[:, :count], values[:count].sqrt(), right[:count]
    first = torch.linalg.solve_triangular(root, values[:, None] * right, upper=False, left=False)
    return first.to(weight.dtype), (left * values).to(weight.dtype)


def factorize(
    editor: Editor, item: Product, prefix: str, data: Tensor | None, copies: dict[Any, fx.Node]
) -> tuple[fx.Node, fx.Node]:
    """Let the product be that of two factors: the inner values, and the product, whose node and bias stay.

    ``copies`` are factors that have been made, by weight and which way it is used: blocks that share weights share
    them.
    """
    node, key = editor[item.node.name], (item.weight.target, item.units_axis)
    if (key, "first") not in copies:
        weight = attribute(editor.module, str(item.weight.target)).detach()
        made = factors(weight if item.units_axis == 0 else weight.T, rank(item), data)
        for name, value in zip(("first", "second"), made, strict=True):
            copies[key, name] = editor.parameter(f"{prefix}.{name}", value, node)
    inner = editor.call(aten.linear.default, editor[item.data.name], copies[key, "first"], at=node.prev)
    bias = [] if item.bias is None else [editor[item.bias.name]]
    editor.rewrite(node, aten.linear.default, inner, copies[key, "second"], *bias)
    return inner, node
