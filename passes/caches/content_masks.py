"""Masks that depend on the contents of tokens: what of them belongs to keys is appended to a cache, as keys are.

A mask has an axis of keys and one of queries. The values that it is made of have one of them only (see ``roles``):
those of keys are cached, those of queries are the chunk's. All below is made again with the two sizes apart.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import fx

from offramp.errors import PassError
from offramp.passes.caches.causal import Causal
from offramp.passes.caches.chunk_graph import PLACES
from offramp.passes.caches.incremental import Rebuilder
from offramp.passes.caches.kinds import CHUNK, DATA, POSITIONAL
from offramp.passes.caches.roles import KEY, QUERY, Roles, arguments, broadcasts, is_leaf, role_of_index
from offramp.program.analysis.attention import SOFTMAX, AttentionSite
from offramp.program.graph import (
    FILLED,
    ancestors,
    aten,
    dependents,
    expression,
    is_symint,
    is_tensor,
    shape,
    source,
    symbols,
)


class ContentMasks:
    """The masks of a program that depend on contents, for a chunk of queries and all keys so far.

    ``append`` gives the cached form of a value of keys: it is called with its node in the new graph and the axis.
    """

    def __init__(self, facts: Causal, builder: Rebuilder, append: Callable[[fx.Node, int], fx.Node]) -> None:
        self.facts, self.builder, self.append = facts, builder, append

    def only(self, sites: Sequence[AttentionSite]) -> set[fx.Node]:
        """The nodes that nothing but these masks is made of: they are not made on the chunk."""
        apart = {site.output: set(self.facts.contents(site)) for site in sites if site.form == "sdpa"}
        for site in sites:
            for reader in self.readers(site) if site.form != "sdpa" else ():
                apart[reader] = apart.get(reader, set()) | set(self.facts.contents(site))
        if not any(apart.values()):
            return set()
        graph = self.facts.program.graph
        needed = set[fx.Node]()
        todo = [graph.output_node(), *(leaf for site in sites for leaf in self.facts.leaves(site))]
        while todo:
            node = todo.pop()
            if node not in needed:
                needed.add(node)
                todo += [arg for arg in node.all_input_nodes if arg not in apart.get(node, ())]
        return set(graph.nodes) - needed

    def readers(self, site: AttentionSite) -> dict[fx.Node, Callable[[fx.Node], fx.Node]]:
        """Where the masks of an attention that is written out meet its scores, and what makes that node anew."""
        masks = self.facts.contents(site)
        if not masks:
            return {}
        scores = dependents([product_of(site)], self.facts.program.graph) & ancestors([site.weights])

        def with_masks(reader: fx.Node) -> fx.Node:
            for mask in masks.keys() & set(reader.all_input_nodes):
                made = ContentMask(self.builder, self.append).make(mask, masks[mask])
                self.builder.edges[reader, mask] = made
            return self.builder.same(reader)

        found = {reader: with_masks for mask in masks for reader in mask.users if reader in scores}
        return found | ({site.weights: self._hide_later} if site.weights.target in SOFTMAX else {})

    def _hide_later(self, weights: fx.Node) -> fx.Node:
        """Later places get no weight, also from a query that sees nothing, to which all keys are the same."""
        builder, new = self.builder, self.builder.new
        scores: Any = builder.value(weights.args[0])  # type: ignore[arg-type]
        sizes = shape(scores)
        if [expression(size) for size in sizes[-2:]] != [expression(new.chunk), expression(new.capacity)]:
            return builder.same(weights)
        here = new.call(aten.unsqueeze.default, builder.rows.positions(), -1)
        later = new.call(aten.gt.Tensor, new.inputs[PLACES], here)
        for _ in range(len(sizes) - 3):
            later = new.call(aten.unsqueeze.default, later, 1)
        if len(sizes) == 3 and new.places(sizes[0]) > 1:
            later = new.call(aten.repeat_interleave.self_int, later, new.places(sizes[0]), 0)
        hidden = new.call(aten.masked_fill.Scalar, scores, later, -torch.inf)
        builder.edges[weights, weights.args[0]] = hidden  # type: ignore[index]
        return builder.same(weights)

    def bias(self, mask: fx.Node, roles: Roles) -> fx.Node:
        """The mask of a fused attention, for each query of the chunk."""
        new = self.builder.new
        bias = ContentMask(self.builder, self.append).make(mask, roles)
        for _ in range(4 - len(shape(bias))):
            bias = new.call(aten.unsqueeze.default, bias, 0)
        if expression(shape(bias)[2]) != 1:
            return bias
        return new.call(aten.expand.default, bias, [-1, -1, new.sizer(new.chunk), -1])


def product_of(site: AttentionSite) -> fx.Node:
    """The contraction of queries and keys.

    Raises:
        PassError: there is none.
    """
    todo, seen = [site.weights], set[fx.Node]()
    while todo:
        node = todo.pop(0)
        if node in seen:
            continue
        seen.add(node)
        if site.key in node.all_input_nodes and site.query in node.all_input_nodes:
            return node
        todo += [arg for arg in node.all_input_nodes if is_tensor(arg)]
    raise PassError(f"insert-cache: no product of queries and keys at {source(site.weights)}")


class ContentMask:
    """One mask of one attention, made anew."""

    def __init__(self, builder: Rebuilder, append: Callable[[fx.Node, int], fx.Node]) -> None:
        self.builder, self.new, self.append = builder, builder.new, append
        self._made: dict[tuple[fx.Node, Roles], fx.Node] = {}

    def make(self, node: fx.Node, roles: Roles) -> fx.Node:
        """The mask with the chunk along its axis of queries and the capacity along that of keys."""
        if (node, roles) not in self._made:
            self._made[node, roles] = self._remade(node, roles)
        return self._made[node, roles]

    def _remade(self, node: fx.Node, roles: Roles) -> fx.Node:
        builder, kinds = self.builder, self.builder.kinds
        if node.target in FILLED:
            return builder.filled(node, [self.new.capacity if role == KEY else self.new.chunk for role in roles])
        if kinds[node] == CHUNK:
            raise self.new.refusal("a mask reads places that are counted over all rows")
        if kinds[node] == POSITIONAL:
            return builder.rows.aligned(builder.value(node), self._sizes(node, roles))
        if kinds[node] != DATA:
            return builder.value(node)
        if is_leaf(node, roles, self._is_data):
            return self.append(builder.value(node), roles.index(KEY)) if KEY in roles else builder.value(node)
        made = {arg: self._argument(node, arg, roles, inner) for arg, inner in arguments(node, roles)}
        if node.target is aten.slice.Tensor:
            axis = int(node.args[1]) if len(node.args) > 1 else 0  # type: ignore[arg-type]
            if roles[axis]:
                return made[node.args[0]]  # type: ignore[index]
        args: list[Any] = list(node.args)
        if node.target in (aten.expand.default, aten.repeat.default, aten.reshape.default, aten.view.default):
            offset = len(args[1]) - len(roles)
            args[1] = [self._length(size, roles[i - offset] if i >= offset else "") for i, size in enumerate(args[1])]
        elif node.target is aten.index.Tensor:
            sizes = ["chunk" if role_of_index(index, roles) == QUERY else "" for index in args[1]]
            args[1] = [builder.value(index, extent) for index, extent in zip(args[1], sizes, strict=True)]

        def argument(arg: fx.Node) -> fx.Node:
            if arg in made:
                return made[arg]
            if arg.graph is self.new.graph:
                return arg
            return builder.size(arg, "chunk") if is_symint(arg) else builder.value(arg)

        given: Any = fx.node.map_arg((tuple(args), node.kwargs), argument)
        return self.new.call(node.target, *given[0], **given[1])

    def _argument(self, node: fx.Node, arg: fx.Node, roles: Roles, inner: Roles) -> fx.Node:
        if self.builder.kinds[arg] == POSITIONAL and QUERY in inner and broadcasts(node):
            return self.builder.rows.aligned(self.builder.value(arg), self._sizes(node, roles))
        return self.make(arg, inner)

    def _sizes(self, node: fx.Node, roles: Roles) -> list[Any]:
        """The sizes of a mask in the new graph, None where they do not matter."""
        known = {KEY: self.new.capacity, QUERY: self.new.chunk}
        return [known.get(role) or self._rows(size) for size, role in zip(shape(node), roles, strict=True)]

    def _rows(self, size: Any) -> Any:
        value = self.new.size_value(size, self.new.chunk)
        return value if self.new.batch is not None and expression(self.new.batch) in symbols(value) else None

    def _length(self, size: Any, role: str) -> Any:
        builder = self.builder
        if not isinstance(size, fx.Node):
            return size
        if self.new.tokens not in symbols(size.meta["val"]):
            return builder.size(size, "chunk")
        return builder.size(size, "capacity" if role == KEY else "chunk")

    def _is_data(self, node: fx.Node) -> bool:
        return self.builder.kinds[node] == DATA
