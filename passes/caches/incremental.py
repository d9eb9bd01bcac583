"""Rebuild a causal program so that it runs on chunks of new tokens: rows of tables, appended keys.

In the rebuilt graph the token axis has become two: data has the chunk's size along it, positional values (see
``causal``) are made for all positions up to the capacity of the caches, and where data meets them the chunk's rows are
taken out. Axes need no other label than these two sizes.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import torch
from torch import fx

from offramp.errors import PassError
from offramp.passes.caches.causal import Causal
from offramp.passes.caches.chunk_graph import LENGTHS, PLACES, ChunkGraph
from offramp.passes.caches.kinds import CHUNK, DATA, MEMORY, POSITIONAL
from offramp.passes.caches.mixing import mixes_tokens
from offramp.passes.caches.position_rows import PositionRows
from offramp.program.graph import FILLED, aten, attribute, expression, filling, is_symint, is_tensor, shape, symbols
from offramp.program.program import Program

_RESHAPES = (aten.reshape.default, aten.view.default, aten.expand.default)


class Rebuilder:
    """Makes the nodes of the given graph in ``new``; ``build`` does it all."""

    def __init__(self, program: Program, text: str, facts: Causal, capacity: int) -> None:
        self.program, self.kinds, self.implied = program, facts.kinds, facts.implied
        self.new = ChunkGraph(program, text, facts.tokens, capacity)
        self.rows = PositionRows(self.new)
        self.values: dict[tuple[fx.Node, str], fx.Node] = {}
        #: What a node reads instead of its argument: ``(node, argument)``.
        self.edges: dict[tuple[fx.Node, fx.Node], fx.Node] = {}
        #: Nodes of the given graph that only masks are made of which are made otherwise.
        self.skipped: set[fx.Node] = set()
        #: Nodes that generation does not need: they may mix tokens, and those that do are in ``mixed``.
        self.unneeded: set[fx.Node] = set()
        self.mixed: set[fx.Node] = set()
        #: The prompt's inputs, by the inputs of tokens.
        self.prompts: dict[fx.Node, fx.Node] = {}
        #: Nodes that take the last token's place, which is the chunk's last.
        self.last: set[fx.Node] = set()

    def build(
        self,
        hooks: Mapping[fx.Node, Callable[[fx.Node], fx.Node]],
        after: Mapping[fx.Node, Sequence[Callable[[fx.Node], None]]],
        enter: Callable[[], None],
        given: Collection[fx.Node],
    ) -> None:
        """Rebuild every node that is data, memory or constant; positional ones are made where they are read.

        ``hooks`` make a node's new value themselves; ``after`` are called with a node once it has one. ``enter`` makes
        further inputs, and values of those that are ``given`` for a prompt only.
        """
        for node in self.program.graph.find_nodes(op="placeholder"):
            if self.kinds[node] != POSITIONAL and node not in given:
                self.values[node, ""] = self.same(node)
        self.new.placeholder(LENGTHS, [self.new.batch if self.new.batch is not None else 1], torch.int64)
        self.new.placeholder(PLACES, [self.new.capacity], torch.int64)
        enter()
        for node in self.program.graph.nodes:
            if node.op in ("output", "placeholder") or is_symint(node) or self.kinds[node] in (POSITIONAL, CHUNK):
                continue
            if node in self.skipped and self.kinds[node] == DATA:
                continue
            self.new.origin = node
            self.values[node, ""] = hooks[node](node) if node in hooks else self.same(node)
            for follow in after.get(node, ()):
                follow(node)

    def value(self, node: fx.Node, extent: str = "") -> fx.Node:
        """The new value of a tensor node; a positional one for the ``"capacity"`` or the ``"chunk"``.

        For the ``"prompt"`` that of all its tokens together, in the place of a chunk's.
        """
        whole = extent == "prompt" and self.kinds[node] in (DATA, POSITIONAL, CHUNK)
        if not whole and self.kinds[node] not in (POSITIONAL, CHUNK):
            return self.values[node, ""]
        if not whole:
            extent = "chunk" if self.kinds[node] == CHUNK else extent or "capacity"
        if (node, extent) not in self.values:
            before, self.new.origin = self.new.origin, node
            self.values[node, extent] = self._again(node, extent)
            self.new.origin = before
        return self.values[node, extent]

    def same(self, node: fx.Node) -> fx.Node:
        """The node on the chunk."""
        if node.op == "placeholder":
            sizes = [self.new.size_value(size, self.new.chunk) for size in shape(node)]
            return self.new.placeholder(str(node.target), sizes, node.meta["val"].dtype)
        if node.op == "get_attr":
            made = self.new.graph.create_node("get_attr", str(node.target), name=node.name)
            value = attribute(self.program.graph_module, str(node.target))
            made.meta = {**node.meta, "val": self.new.mode.from_tensor(value, static_shapes=True)}
            return made
        if node.target in FILLED and node.args[0] in self.skipped:
            return self.filled(node, [self.new.chunk] * len(shape(node)))
        if self.kinds[node] != DATA:
            args, kwargs = fx.node.map_arg((node.args, node.kwargs), lambda arg: self._plain(arg, "chunk"))
            return self.copied(node, args, kwargs)
        if node in self.last or (node in self.unneeded and self._mixes(node)):
            args, kwargs = fx.node.map_arg((node.args, node.kwargs), lambda arg: self._plain(arg, "chunk"))
            return self.copied(node, args, kwargs)
        args, kwargs = self.data_arguments(node)
        reason = mixes_tokens(node, args, self.new.chunk)
        made = self.copied(node, args, kwargs)
        if reason is not None:
            raise self.new.refusal(
                f"{node.target} {reason}, and a chunk of new tokens does not hold the earlier ones",
                hint="attention is the only operator over tokens that gets a cache (and a cumulative sum of ids)",
            )
        return made

    def _mixes(self, node: fx.Node) -> bool:
        """Whether a value that generation does not need depends on several tokens: then it is that of one chunk."""
        if node not in self.mixed and not self.mixed.intersection(node.all_input_nodes):
            try:
                if mixes_tokens(node, self.data_arguments(node)[0], self.new.chunk) is None:
                    return False
            except PassError:  # positions that do not fit a part of the tokens
                pass
        self.mixed.add(node)
        return True

    def copied(self, node: fx.Node, args: Any, kwargs: Any, name: str | None = None) -> fx.Node:
        """A call of the node's target under the node's name, which records of cuts and exits rely on."""
        return self.copied_as(node, node.target, *args, name=name, **kwargs)

    def copied_as(self, node: fx.Node, target: Any, *args: Any, name: str | None = None, **kwargs: Any) -> fx.Node:
        """A call of something else in the node's place."""
        made = self.new.call(target, *args, name=name or node.name, **kwargs)
        if name is None and made.name != node.name:
            raise PassError(f"the name {node.name} is taken")
        made.meta = {**node.meta, "val": made.meta["val"]} if name is None else {**node.meta, **made.meta}
        self.new.edits["inserted"] -= 1
        return made

    def _again(self, node: fx.Node, extent: str) -> fx.Node:
        """The node for another number of tokens."""
        if node.op == "placeholder":
            return self.prompts[node] if node in self.prompts else self._made(node, extent)
        apart = self.kinds[node] == POSITIONAL or node.args[0] in self.skipped
        if node.target in FILLED and apart and not isinstance(filling(node), fx.Node):
            return self.filled(node, [self._tokens(extent)] * len(shape(node)))
        args, kwargs = fx.node.map_arg((node.args, node.kwargs), lambda arg: self._plain(arg, extent))
        return self.copied(node, args, kwargs, name=f"{node.name}_{extent}")

    def filled(self, node: fx.Node, tokens: Sequence[Any]) -> fx.Node:
        """A tensor of one number, with ``tokens[axis]`` tokens along each axis of tokens."""
        number = filling(node)
        sizes = [
            self.new.sizer(self.new.size_value(size, count)) for size, count in zip(shape(node), tokens, strict=True)
        ]
        return self.new.call(aten.full.default, sizes, number, dtype=node.meta["val"].dtype)

    def _made(self, node: fx.Node, extent: str) -> fx.Node:
        """An input that follows from the number of tokens."""
        item, dtype = self.implied[node], node.meta["val"].dtype
        size = self._tokens(extent)
        sizes = [self.new.sizer(self.new.size_value(s, size)) for s in shape(node)]
        if item.axis is None:
            whole = self.new.full(sizes, item.value, dtype)
            if item.hidden is None:
                return whole
            places = self.new.call(aten.arange.default, sizes[-1])
            past = self.new.call(aten.ge.Tensor, self.new.call(aten.unsqueeze.default, places, 1), places)
            hidden = self.new.full([], item.hidden, dtype)
            return self.new.call(aten.where.self, past, whole, hidden)
        if extent != "chunk":
            places = self.new.call(aten.arange.default, sizes[item.axis])
        elif item.axis == 1 and len(sizes) == 2 and self.new.counts_rows(self.new.size_value(shape(node)[0], size)):
            places = self.rows.positions()
        else:
            raise self.new.refusal(
                f"the positions {node.target} are read beside tokens of all rows at once",
                hint="positions of every row, [batch, tokens]",
            )
        places = self.new.call(aten.add.Tensor, places, int(item.value))
        places = self.new.call(aten._to_copy.default, places, dtype=dtype) if dtype != torch.int64 else places
        if extent == "chunk":
            return places
        wide = self.new.call(
            aten.reshape.default, places, [-1 if axis == item.axis else 1 for axis in range(len(sizes))]
        )
        return self.new.call(aten.expand.default, wide, sizes)

    def _plain(self, arg: fx.Node, extent: str) -> fx.Node:
        return self.size(arg, extent) if is_symint(arg) else self.value(arg, extent)

    # sizes

    def _tokens(self, extent: str) -> Any:
        """How many tokens the chunk has, or the capacity, or the prompt."""
        return {"capacity": self.new.capacity, "chunk": self.new.chunk, "prompt": self.new.prompt}[extent]

    def size(self, node: fx.Node, extent: str) -> Any:
        """A size of the given graph, with the token axis as the ``"chunk"``, the ``"capacity"`` or the ``"prompt"``."""
        value = self.new.size_value(node.meta["val"], self._tokens(extent))
        if isinstance(value, torch.SymInt):
            for other in self.new.inputs.values():
                for axis, known in enumerate(shape(other)):
                    if expression(known) == expression(value):
                        return self.new.sizer(value, other, axis)
        number = isinstance(expression(value), int)
        if number and not isinstance(expression(node.meta["val"]), int):
            return expression(value)
        if node.target is aten.sym_size.int:  # of a fixed number too: who reads it, means whatever it is
            return self.new.call(aten.sym_size.int, self.value(node.args[0], extent), node.args[1])  # type: ignore[arg-type]
        if number:
            return expression(value)
        args = fx.node.map_arg(node.args, lambda arg: self._plain(arg, extent))
        return self.new.call(node.target, *args)

    def _extents(self, node: fx.Node, first: fx.Node) -> Callable[[int], str]:
        """For the sizes that a data node is called with: whether the i-th over tokens means keys or the chunk."""
        labels = [self.new.label(size) for size in shape(first)]
        along = [label for label in labels if label]
        if node.target in _RESHAPES:
            wanted = [s for s in node.args[1] if isinstance(s, fx.Node) and self.new.tokens in symbols(s.meta["val"])]  # type: ignore[union-attr]
            if len(wanted) == len(along):
                return lambda i: along[i]
            if node.target is not aten.expand.default and len(along) > len(wanted) and "capacity" in along:
                minus = [at for at, s in enumerate(node.args[1]) if s == -1]  # type: ignore[arg-type]
                at = [k for k, s in enumerate(node.args[1]) if s in wanted]  # type: ignore[arg-type]
                if minus and at:  # -1 stands for one of them
                    kept = along[1:] if minus[0] < at[0] else along[:-1]
                    return lambda i: kept[i]
        elif node.target is aten.slice.Tensor:
            axis = int(node.args[1]) if len(node.args) > 1 else 0  # type: ignore[arg-type]
            return lambda i: labels[axis] or "chunk"
        return lambda i: "chunk" if "chunk" in along or not along else along[0]

    # where data meets positions

    def data_arguments(self, node: fx.Node) -> tuple[Any, Any]:
        """The arguments of a data node: rows of positional tables, and sizes by what they count."""
        tensors = [arg for arg in node.all_input_nodes if is_tensor(arg)]
        read = {arg: self.edges.get((node, arg)) or self.value(arg) for arg in tensors}
        data = [read[arg] for arg in tensors if self.kinds[arg] in (DATA, MEMORY) or (node, arg) in self.edges]
        extent = self._extents(node, data[0]) if data else lambda i: "chunk"
        counted = Counter[str]()

        def argument(arg: fx.Node) -> Any:
            if is_symint(arg):
                if self.new.tokens in symbols(arg.meta["val"]):
                    counted["sizes"] += 1
                    return self.size(arg, extent(counted["sizes"] - 1))
                return self.size(arg, "chunk")
            if not is_tensor(arg):
                return self.values[arg, ""]
            table = read[arg]
            if self.kinds[arg] != POSITIONAL or (node, arg) in self.edges:
                return table
            return self.rows.aligned(table, self._reference(node, data))

        args, kwargs = fx.node.map_arg((node.args, node.kwargs), argument)
        return args, kwargs

    def _reference(self, node: fx.Node, data: Sequence[fx.Node]) -> list[Any]:
        """The shape that positional arguments of a data node are broadcast to, as far as data gives it."""
        if node.target is aten.scaled_dot_product_attention.default:
            query = shape(data[0])
            return [*query[:-1], None]
        if node.target is aten.baddbmm.default and len(data) > 1:
            return [*shape(data[-2])[:-1], shape(data[-1])[-1]]
        rank = max([len(shape(arg)) for arg in data] or [0])
        if is_tensor(node):
            rank = max(rank, len(shape(node)))
        sizes: list[Any] = [None] * rank
        for arg in data:
            for axis, size in enumerate(shape(arg), rank - len(shape(arg))):
                if expression(size) != 1 and (sizes[axis] is None or self.new.label(size) == "capacity"):
                    sizes[axis] = size
        return sizes
