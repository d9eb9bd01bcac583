"""What inputs over the tokens mean: which hold the tokens, and which follow from how many there are.

A mask's neutral value is found by trying: the constant with which the attentions see most. Positions are an input that
counts up, beside the token ids; another input beside them that has the same value everywhere keeps that value.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import fx

from offramp.bundle.manifest import Implied
from offramp.errors import PassError
from offramp.program.analysis.attention import AttentionSite, Mask, is_causal
from offramp.program.analysis.lookups import looked_up
from offramp.program.graph import aten, data_inputs, expression, read_by, results, shape, sizes_of
from offramp.program.program import Program, as_tensor, evaluate

_COUNTS = (aten.cumsum.default, aten.sum.dim_IntList, aten.sum.default, aten.arange.default)


class Meaning:
    """The inputs ``own`` over the axis ``tokens``, by what they mean.

    Attributes:
        contents: those that hold the tokens.
        implied: those that follow from the number of tokens, and what they hold.

    Raises:
        PassError: all of them look like masks.
    """

    def __init__(self, program: Program, sites: Sequence[AttentionSite], own: Sequence[fx.Node], tokens: Any) -> None:
        self.program, self.tokens, self.sites = program, tokens, sites
        self.masks = list({mask.node: mask for site in sites for mask in site.masks}.values())
        self.example = {node: program.example_inputs[str(node.target)] for node in own}
        self.contents = contents = self._contents()
        self.implied: dict[fx.Node, Implied] = {}
        for node in own:
            found = None if node in contents else self._mask(node)
            if found is not None:
                self.implied[node] = found
        rest = [node for node in own if node not in self.implied]
        if not rest:
            raise PassError(
                f"insert-cache: the inputs {sorted(str(n.target) for n in own)} all look like masks",
                hint="example inputs as they occur, token ids that differ",
            )
        for node in rest if contents else ():
            found = None if node in contents else self._plain(node)
            if found is not None:
                self.implied[node] = found

    def _contents(self) -> set[fx.Node]:
        """The inputs that hold the tokens: features, and ids that are looked up (in the table of the head's words)."""
        rows = self._looked_up()
        words = {int(size) for node in results(self.program.graph).values() for size in _fixed(node)[-1:]}
        features = {node for node in self.example if self._has_features(node)}
        first = features | {node for node in rows if rows[node] & words}
        telling = {node for node in first or rows if node in features or not _plain(self.example[node])}
        return telling or first or set(rows)

    def _has_features(self, node: fx.Node) -> bool:
        wide = any(size > 1 for size in _fixed(node))
        return wide and len(self._axes(node)) == 1 and node.meta["val"].is_floating_point()

    def _looked_up(self) -> dict[fx.Node, set[int]]:
        """Inputs that are looked up in tables as they are (not counted first), and those tables' numbers of rows."""
        found: dict[fx.Node, set[int]] = {}
        for node in self.program.graph.nodes:
            for table, axis, index, _ in looked_up(node):
                read = _whole_numbers(index)
                if table.op != "get_attr" or any(arg.target in _COUNTS for arg in read):
                    continue
                for arg in read & self.example.keys():
                    found.setdefault(arg, set()).add(int(expression(shape(table)[axis])))
        return found

    def _axes(self, node: fx.Node) -> list[int]:
        return [i for i, size in enumerate(shape(node)) if expression(size) == self.tokens]

    def _implied(self, node: fx.Node, value: float, axis: int | None = None, hidden: float | None = None) -> Implied:
        sizes = tuple(self.program.axes.describe(size) for size in shape(node))
        return Implied(str(node.meta["val"].dtype).removeprefix("torch."), sizes, value, axis, hidden)

    # masks

    def _mask(self, node: fx.Node) -> Implied | None:
        """What a mask holds that hides no token from later ones; None for an input that is no mask."""
        axes, value = self._axes(node), self.example[node]
        read = [mask for mask in self.masks if node in read_by([mask.node])]
        if not read or self._has_features(node):
            return None
        if len(axes) == 2:
            return self._triangle(node, value) if axes == [value.dim() - 2, value.dim() - 1] else None
        known = {float(number) for number in value.unique()[:3]}
        if len(known) > 2:
            return None
        seen = {number: self._seen(node, self._implied(node, number), read) for number in {0.0, 1.0} | known}
        if len({self._later(node, number) for number in seen}) > 1:  # it tells who sees later tokens
            return None
        found = self._neutral(seen, self._seen(node, None, read))
        if found is None:
            return None
        hiding = [
            number for number, (visible, _) in seen.items() if number != found and self._hides(node, read, visible)
        ]
        return replace(self._implied(node, found), padding=hiding[0] if len(hiding) == 1 else None)

    def _hides(self, node: fx.Node, read: Sequence[Mask], visible: Sequence[torch.Tensor]) -> bool:
        """Whether no attention that reads the input sees a key: one of its masks lets none through."""
        closed = {mask.node for mask, keys in zip(read, visible, strict=True) if not keys.any()}
        reading = {mask.node for mask in read}
        sites = [{mask.node for mask in site.masks} for site in self.sites]
        return all(masks & closed for masks in sites if masks & reading)

    def _later(self, node: fx.Node, number: float) -> bool:
        """Whether an attention sees later tokens where an input holds one number."""
        sites = [site for site in self.sites if any(node in read_by([mask.node]) for mask in site.masks)]
        given = dict(self.program.example_inputs)
        given[str(node.target)] = as_tensor(self._implied(node, number), self.example[node].shape)
        values = evaluate(self.program.graph_module, [mask.node for site in sites for mask in site.masks], given)
        return not all(is_causal(site, values, whole=False) for site in sites)

    def _neutral(self, seen: Mapping[float, tuple[list[torch.Tensor], float]], example: Any) -> float | None:
        """The constant with which most keys are seen, all those of the example among them, and scores change least."""
        counts = {number: sum(int(item.sum()) for item in visible) for number, (visible, _) in seen.items()}
        best = min(counts, key=lambda number: (-counts[number], seen[number][1]))
        covers = all(bool((a | ~b).all()) for a, b in zip(seen[best][0], example[0], strict=True))
        return best if covers and counts[best] > min(counts.values()) else None

    def _seen(self, node: fx.Node, filled: Implied | None, read: Sequence[Mask]) -> tuple[list[torch.Tensor], float]:
        """Which keys the masks let through, and how much they change their scores."""
        given = dict(self.program.example_inputs)
        if filled is not None:
            given[str(node.target)] = as_tensor(filled, self.example[node].shape)
        values = evaluate(self.program.graph_module, [mask.node for mask in read], given)
        visible = [mask.visible(values[mask.node]) for mask in read]
        added = [mask for mask in read if mask.kind in ("added", "subtracted")]
        change = sum(
            float(values[mask.node].masked_fill(~mask.visible(values[mask.node]), 0).abs().sum())
            for mask in added
            if values[mask.node].dtype != torch.bool
        )
        return visible, change

    def _triangle(self, node: fx.Node, value: torch.Tensor) -> Implied | None:
        """A causal mask of queries and keys that hides nothing else than what is padding in the example."""
        hidden = value[..., 0, -1].flatten()
        visible = value.diagonal(dim1=-2, dim2=-1).flatten(0, -2) if value.dim() > 2 else value.diagonal()[None]
        kept = visible[visible != hidden[0]]
        if not len(kept) or not bool((hidden == hidden[0]).all()) or not bool((kept == kept[0]).all()):
            return None
        keys = (value == kept[0]).any(-2, keepdim=True)
        past = torch.ones(value.shape[-2:], dtype=torch.bool).tril()
        if not torch.equal(value, torch.where(past & keys, kept[0], hidden[0])):
            return None
        return self._implied(node, float(kept[0]), hidden=float(hidden[0]))

    # positions, and the same everywhere

    def _plain(self, node: fx.Node) -> Implied | None:
        """Positions, or the one value that an input has everywhere; None for another input."""
        value, axes = self.example[node], self._axes(node)
        if len(axes) != 1 or any(size != 1 for size in _fixed(node)):
            return None
        first = float(value.flatten()[0])
        if bool((value == value.flatten()[0]).all()):
            return self._implied(node, first)
        return self._implied(node, first, axes[0]) if _counts_up(value, axes[0]) else None


def _fixed(node: fx.Node) -> list[int]:
    return [size for size in sizes_of(node) if isinstance(size, int)]


def _plain(value: torch.Tensor) -> bool:
    """Whether values are the same everywhere, or count up along an axis."""
    return bool((value == value.flatten()[0]).all()) or any(_counts_up(value, axis) for axis in range(value.dim()))


def _counts_up(value: torch.Tensor, axis: int) -> bool:
    if value.is_floating_point() or value.dtype == torch.bool:
        return False
    steps = torch.arange(value.shape[axis]).reshape([-1 if i == axis else 1 for i in range(value.dim())])
    return value.shape[axis] > 1 and bool((value == value.flatten()[0] + steps).all())


def _whole_numbers(index: fx.Node) -> set[fx.Node]:
    """What an index is made of, as far as that is whole numbers."""
    found, todo = set[fx.Node](), [index]
    while todo:
        node = todo.pop()
        value = node.meta.get("val")
        if node in found or not isinstance(value, torch.Tensor) or value.is_floating_point():
            continue
        found.add(node)
        todo += data_inputs(node)
    return found
