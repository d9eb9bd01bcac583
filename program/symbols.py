"""Symbols of sizes in an environment of torch's."""

from __future__ import annotations

import torch
from torch._dynamo.source import ConstantSource
from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv


def new_axis(env: ShapeEnv, name: str, hint: int) -> torch.SymInt:
    """A size of any length that is equal to no other; ``hint`` is its length where torch looks for one."""
    origin = ConstantSource(name)
    symbol = env.create_symbol(hint, source=origin, dynamic_dim=DimDynamic.DYNAMIC)
    made: torch.SymInt = env.create_symintnode(symbol, hint=hint, source=origin)  # type: ignore[assignment]
    return made
