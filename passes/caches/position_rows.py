"""Where data meets positions: of what is made for all positions, the chunk's rows are taken, each row's at its own."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import Any

import torch
from torch import fx

from offramp.passes.caches.chunk_graph import LENGTHS, ChunkGraph
from offramp.program.graph import aten, expression, shape, sizes_of


class PositionRows:
    """Takes the chunk's rows of positional tables in the new graph; what was taken once is taken no second time."""

    def __init__(self, new: ChunkGraph) -> None:
        self.new = new
        self._positions: fx.Node | None = None
        self._taken: dict[tuple[fx.Node, int, int, int, int], fx.Node] = {}

    def positions(self) -> fx.Node:
        """Positions of the chunk's tokens in their rows, int64 [rows, chunk]."""
        if self._positions is None:
            new = self.new
            first = new.call(aten.unsqueeze.default, new.inputs[LENGTHS], 1)
            chunk, capacity = new.sizer(new.chunk), new.sizer(new.capacity)
            steps = new.call(aten.arange.default, chunk)
            last = new.call(operator.sub, capacity, 1)
            added = new.call(aten.add.Tensor, first, steps)
            # places behind a shorter row's tokens may lie past the end: what they hold is not read
            limit = new.call(aten.scalar_tensor.default, last, dtype=torch.int64)
            self._positions = new.call(aten.minimum.default, added, limit)
        return self._positions

    def aligned(self, table: fx.Node, reference: Sequence[Any]) -> fx.Node:
        """The chunk's rows of a positional table, along the axis where ``reference`` has the chunk (or nothing)."""
        new, offset = self.new, len(reference) - len(shape(table))
        keys = {axis for axis, size in enumerate(reference) if size is not None and new.label(size) == "capacity"}
        axes = [
            axis
            for axis, size in enumerate(shape(table))
            if new.label(size) == "capacity" and offset + axis not in keys
        ]
        if len(axes) > 1:  # query, then key
            axes = [axis for axis in axes if reference[offset + axis] is not None] or axes[:1]
        if not axes:
            return table
        if offset < 0 or len(axes) > 1:
            shown = ", ".join(map(str, sizes_of(table)))
            raise new.refusal(f"positions of shape [{shown}] meet tokens in a way that is not understood")
        place = next((i for i, size in enumerate(reference) if new.counts_rows(size)), 0)
        return self.rows(table, axes[0], len(reference), place, new.places(reference[place]))

    def rows(self, table: fx.Node, axis: int, rank: int, place: int, each: int = 1) -> fx.Node:
        """Rows of ``table`` at the chunk's positions: of ``rank`` axes, with the batch on axis ``place``.

        ``each`` is how many places of every row that axis has; ``table`` has as many, or one for all.
        """
        key = (table, axis, rank, place, each)
        if key not in self._taken:
            self._taken[key] = self._take(*key)
        return self._taken[key]

    def _take(self, table: fx.Node, axis: int, rank: int, place: int, each: int) -> fx.Node:
        new = self.new
        chosen, missing = table, rank - len(shape(table))
        places = 1
        for _ in range(missing):
            chosen = new.call(aten.unsqueeze.default, chosen, 0)
        axis += missing
        if new.counts_rows(shape(chosen)[place]):  # the same in all rows: they differ in nothing but contents
            places = new.places(shape(chosen)[place])
            chosen = new.call(aten.slice.Tensor, chosen, place, 0, places)
        elif expression(shape(chosen)[place]) != 1:
            size = new.program.axes.describe(shape(chosen)[place])
            raise new.refusal(f"a value of positions has {size} places where rows are counted")
        if (axis, place, places, each) == (1, 0, 1, 1):
            flat = new.call(aten.reshape.default, chosen, [new.dimension(chosen, i) for i in range(1, rank)])
            return new.call(aten.index.Tensor, flat, [self.positions()])
        flat = new.call(aten.reshape.default, self.positions(), [-1])
        taken = new.call(aten.index_select.default, chosen, axis, flat)
        batch, chunk = new.sizer(new.batch) if new.batch is not None else 1, new.sizer(new.chunk)
        sizes: list[Any] = [new.dimension(taken, i) for i in range(rank)]
        split = new.call(aten.reshape.default, taken, [*sizes[:axis], batch, chunk, *sizes[axis + 1 :]])
        order = [i for i in range(rank + 1) if i != axis]
        order.insert(place, axis)
        moved = new.call(aten.permute.default, split, order)
        if places < each:
            wide = [-1] * (rank + 1)
            wide[place + 1] = places = each
            moved = new.call(aten.expand.default, moved, wide)
        final: list[Any] = [*sizes[:axis], chunk, *sizes[axis + 1 :]]
        final[place] = batch if places == 1 else new.call(operator.mul, batch, places)
        return new.call(aten.reshape.default, moved, final)
