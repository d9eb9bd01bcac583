"""Learners, of which each token takes the first: all are computed, those that it has not chosen count for nothing."""

from __future__ import annotations

import torch
from torch import fx

from offramp.export.lowering.node_builder import Builder
from offramp.export.lowering.table import lowering
from offramp.program.graph import aten, shape
from offramp.program.ops import FIRST_LEARNERS


@lowering(FIRST_LEARNERS)
def _dense(b: Builder, hidden: fx.Node, choice: fx.Node, learners: int, least: int) -> fx.Node:
    """``hidden`` where the greatest of ``choice`` is at the learner's place or behind it, else 0."""
    units = int(shape(hidden)[-1])
    chosen = b.call(aten.argmax.default, choice, -1, True)
    place = b.call(aten.mul.Tensor, b.call(aten.arange.default, units, dtype=torch.int64), learners)
    place = b.call(aten.div.Tensor_mode, place, units, rounding_mode="floor")
    place = b.call(aten.add.Tensor, place, 1 - least)
    kept = b.call(aten.ge.Tensor, chosen, place)
    return b.call(aten.mul.Tensor, hidden, b.call(aten._to_copy.default, kept, dtype=hidden.meta["val"].dtype))
