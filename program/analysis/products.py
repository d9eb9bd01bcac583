"""Products with weights: the nodes that hold what a model has learned."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from offramp.program.graph import aten, is_weight, shape

_TRANSPOSES = (aten.permute.default, aten.transpose.int, aten.t.default)


@dataclass(frozen=True)
class Product:
    """``data @ weight``, perhaps with a bias: of ``features`` values along the last axis it makes ``units``."""

    node: fx.Node
    data: fx.Node
    weight: fx.Node
    bias: fx.Node | None
    units_axis: int  # of the weight
    reader: fx.Node  # what reads the weight: the product, or what transposes it for the product alone

    @property
    def units(self) -> int:
        """How many values it makes of each token."""
        return int(shape(self.weight)[self.units_axis])

    @property
    def features(self) -> int:
        """How many values of each token it reads."""
        return int(shape(self.weight)[1 - self.units_axis])


def product(node: fx.Node) -> Product | None:
    """A node as a product of values with a weight of two axes; None for anything else."""
    args: list[Any] = list(node.args)
    if node.target is aten.linear.default:
        data, weight, bias, axis = args[0], args[1], args[2] if len(args) > 2 else None, 0
    elif node.target is aten.addmm.default and not node.kwargs:
        data, weight, bias, axis = args[1], args[2], args[0], 1
    elif node.target in (aten.mm.default, aten.matmul.default):
        data, weight, bias, axis = args[0], args[1], None, 1
    else:
        return None
    reader = node
    if weight.target in _TRANSPOSES and len(weight.users) == 1 and len(shape(weight)) == 2:
        reader, weight, axis = weight, weight.args[0], 1 - axis
    if not is_weight(weight) or is_weight(data) or len(shape(weight)) != 2:
        return None
    if bias is not None and (not is_weight(bias) or len(shape(bias)) != 1):
        return None
    return Product(node, data, weight, bias, axis, reader)


def numel(node: fx.Node) -> int:
    """How many values a tensor holds in the example inputs."""
    return math.prod(map(hint, shape(node)))


def hint(size: Any) -> int:
    """A size in the example inputs; 1 for one that only a run tells."""
    if not isinstance(size, torch.SymInt):
        return int(size)
    return 1 if size.node.hint is None else int(size.node.hint)
