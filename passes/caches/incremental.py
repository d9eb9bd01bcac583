"""Rebuild a causal program so that it runs on chunks of new tokens: rows of tables, appended keys.

In the rebuilt graph the token axis has become two: data has the chunk's size along it, positional values (see
``causal``) are made for all positions up to the capacity of the caches, and where data meets them the chunk's rows are
taken out. Axes need no other label than these two sizes.
"""

from __future__ import annotations

import operator
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import sympy
import torch
from torch import fx
from torch._dispatch.python import enable_python_dispatcher
from torch._dynamo.source import ConstantSource
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv

from offramp.errors import PassError
from offramp.passes.caches.causal import CHUNK, DATA, MEMORY, POSITIONAL, Causal
from offramp.passes.caches.mixing import mixes_tokens
from offramp.program import ops
from offramp.program.graph import (
    FILLED,
    aten,
    attribute,
    expression,
    fake_result,
    is_symint,
    is_tensor,
    placeholders,
    shape,
    source,
    symbols,
)
from offramp.program.program import Program

#: The input that says how many tokens each row has already, int64 [rows].
LENGTHS = "lengths"
#: The input whose size is the capacity of the caches: its positions, int64 [capacity].
PLACES = "places"
_RESHAPES = (aten.reshape.default, aten.view.default, aten.expand.default)


class Rebuilder:
    """The graph that is being built; ``build`` does it all.

    ``hooks`` replace nodes: called with this and the node, they return its new value, or None for the usual one.
    """

    def __init__(self, program: Program, text: str, facts: Causal, capacity: int) -> None:
        self.program, self.text = program, text
        self.tokens, self.kinds, self.implied = facts.tokens, facts.kinds, facts.implied
        self.graph = fx.Graph()
        self.edits: Counter[str] = Counter()
        self.mode = FakeTensorMode(shape_env=ShapeEnv())
        self.values: dict[tuple[fx.Node, str], fx.Node] = {}
        #: What a node reads instead of its argument: ``(node, argument)``.
        self.edges: dict[tuple[fx.Node, fx.Node], fx.Node] = {}
        #: Nodes of the given graph that only masks are made of which are made otherwise.
        self.skipped: set[fx.Node] = set()
        self.origin: fx.Node | None = None
        self._rows: dict[Any, fx.Node] = {}
        self._symbols = self._new_symbols()
        self.batch = self._symbols.get(program.axes.batch)
        self.chunk = self._symbols[self.tokens]
        self.capacity = self._symbol("capacity", capacity)
        self.inputs: dict[str, fx.Node] = {}
        #: Nodes that generation does not need: they may mix tokens, and those that do are in ``mixed``.
        self.loose: set[fx.Node] = set()
        self.mixed: set[fx.Node] = set()
        #: Nodes that take the last token's place, which is the chunk's last.
        self.last: set[fx.Node] = set()

    # symbols and inputs

    def _new_symbols(self) -> dict[Any, torch.SymInt]:
        hints: dict[Any, int] = {}
        for node in self.program.graph.find_nodes(op="placeholder"):
            example = self.program.example_inputs[str(node.target)]
            for size, hint in zip(shape(node), example.shape, strict=True):
                if isinstance(expression(size), sympy.Symbol):
                    hints.setdefault(expression(size), hint)
        return {symbol: self._symbol(str(symbol), max(hint, 2)) for symbol, hint in hints.items()}

    def _symbol(self, name: str, hint: int) -> torch.SymInt:
        env = self.mode.shape_env
        assert env is not None
        origin = ConstantSource(name)
        symbol = env.create_symbol(hint, source=origin, dynamic_dim=DimDynamic.DYNAMIC)
        made: torch.SymInt = env.create_symintnode(symbol, hint=hint, source=origin)  # type: ignore[assignment]
        return made

    def size_value(self, size: Any, tokens: Any) -> Any:
        """A size of the given graph in terms of the new symbols, the token axis being ``tokens``."""
        found = expression(size)
        if isinstance(found, int):
            return found
        known = {**self._symbols, self.tokens: tokens}
        if found in known:
            return known[found]
        env = self.mode.shape_env
        assert env is not None
        replaced = found.xreplace({symbol: value.node.expr for symbol, value in known.items()})
        return env.create_symintnode(replaced, hint=None)

    @property
    def renamed(self) -> dict[Any, Any]:
        """The symbols of the given graph, and what they are called in the new one."""
        return {old: expression(new) for old, new in self._symbols.items()}

    def placeholder(self, name: str, sizes: Sequence[Any], dtype: torch.dtype) -> fx.Node:
        """A new input of the graph."""
        last = list(self.inputs.values())[-1] if self.inputs else self.graph._root
        with self.graph.inserting_after(last):
            node = self.graph.placeholder(name)
        given = placeholders(self.program.graph).get(name)
        if str(node.target) != name or node.name != (given.name if given else name):  # `input` is called input_1
            raise PassError(f"the program already has something called {name}")
        with self.mode:
            node.meta["val"] = torch.empty(tuple(sizes), dtype=dtype)
        if name not in self.program.nodes:
            node.meta["provenance"] = {"pass": self.text, "from": self.origin.name if self.origin else name}
        self.inputs[name] = node
        return node

    # building

    def call(self, target: Any, *args: Any, name: str | None = None, **kwargs: Any) -> fx.Node:
        """A new call at the end of the graph; its value's shape is computed."""
        name = name or f"{getattr(target, '__name__', 'size').split('.')[0]}_chunked"  # no name of an old node
        try:
            with enable_python_dispatcher():
                value = fake_result(self.mode, target, args, kwargs)
        except Exception as error:
            raise self.refusal(f"{target} does not fit a chunk of new tokens: {error}".splitlines()[0]) from error
        node = self.graph.create_node("call_function", target, args, kwargs, name=name)
        node.meta["val"] = value
        node.meta["provenance"] = {"pass": self.text, "from": self.origin.name if self.origin else ""}
        for key in ("nn_module_stack", "stack_trace"):
            if self.origin is not None and key in self.origin.meta:
                node.meta[key] = self.origin.meta[key]
        self.edits["inserted"] += 1
        return node

    def refusal(self, reason: str, hint: str | None = None) -> PassError:
        """An error that says where in the model it is."""
        place = f" ({source(self.origin)})" if self.origin is not None else ""
        return PassError(f"{reason}{place}", hint=hint)

    def build(
        self,
        hooks: Mapping[fx.Node, Callable[[fx.Node], fx.Node]],
        after: Mapping[fx.Node, Sequence[Callable[[fx.Node], None]]],
    ) -> None:
        """Rebuild every node that is data, memory or constant; positional ones are made where they are read.

        ``hooks`` make a node's new value themselves; ``after`` are called with a node once it has one.
        """
        for node in self.program.graph.find_nodes(op="placeholder"):
            if self.kinds[node] != POSITIONAL:
                self.values[node, ""] = self.same(node)
        self.placeholder(LENGTHS, [self.batch if self.batch is not None else 1], torch.int64)
        self.placeholder(PLACES, [self.capacity], torch.int64)
        for node in self.program.graph.nodes:
            if node.op in ("output", "placeholder") or is_symint(node) or self.kinds[node] in (POSITIONAL, CHUNK):
                continue
            if node in self.skipped and self.kinds[node] == DATA:
                continue
            self.origin = node
            self.values[node, ""] = hooks[node](node) if node in hooks else self.same(node)
            for follow in after.get(node, ()):
                follow(node)

    def value(self, node: fx.Node, world: str = "") -> fx.Node:
        """The new value of a tensor node; a positional one for the ``"capacity"`` or the ``"chunk"``."""
        if self.kinds[node] not in (POSITIONAL, CHUNK):
            return self.values[node, ""]
        world = "chunk" if self.kinds[node] == CHUNK else world or "capacity"
        if (node, world) not in self.values:
            before, self.origin = self.origin, node
            self.values[node, world] = self._positional(node, world)
            self.origin = before
        return self.values[node, world]

    def same(self, node: fx.Node) -> fx.Node:
        """The node on the chunk."""
        if node.op == "placeholder":
            sizes = [self.size_value(size, self.chunk) for size in shape(node)]
            return self.placeholder(str(node.target), sizes, node.meta["val"].dtype)
        if node.op == "get_attr":
            made = self.graph.create_node("get_attr", str(node.target), name=node.name)
            value = attribute(self.program.graph_module, str(node.target))
            made.meta = {**node.meta, "val": self.mode.from_tensor(value, static_shapes=True)}
            return made
        if node.target in FILLED and node.args[0] in self.skipped:
            return self.filled(node, [self.chunk] * len(shape(node)))
        if self.kinds[node] != DATA:
            args, kwargs = fx.node.map_arg((node.args, node.kwargs), lambda arg: self._plain(arg, "chunk"))
            return self.copied(node, args, kwargs)
        if node in self.last or (node in self.loose and self._mixes(node)):
            args, kwargs = fx.node.map_arg((node.args, node.kwargs), lambda arg: self._plain(arg, "chunk"))
            return self.copied(node, args, kwargs)
        args, kwargs = self.data_arguments(node)
        reason = mixes_tokens(node, args, self.chunk)
        made = self.copied(node, args, kwargs)
        if reason is not None:
            raise self.refusal(
                f"{node.target} {reason}, and a chunk of new tokens does not hold the earlier ones",
                hint="attention is the only operator over tokens that gets a cache (and a cumulative sum of ids)",
            )
        return made

    def _mixes(self, node: fx.Node) -> bool:
        """Whether a value that generation does not need depends on several tokens: then it is that of one chunk."""
        if node not in self.mixed and not self.mixed.intersection(node.all_input_nodes):
            try:
                if mixes_tokens(node, self.data_arguments(node)[0], self.chunk) is None:
                    return False
            except PassError:  # positions that do not fit a part of the tokens
                pass
        self.mixed.add(node)
        return True

    def copied(self, node: fx.Node, args: Any, kwargs: Any, name: str | None = None) -> fx.Node:
        """A call of the node's target under the node's name, which records of cuts and exits rely on."""
        made = self.call(node.target, *args, name=name or node.name, **kwargs)
        if name is None and made.name != node.name:
            raise PassError(f"the name {node.name} is taken")
        made.meta = {**node.meta, "val": made.meta["val"]} if name is None else {**node.meta, **made.meta}
        self.edits["inserted"] -= 1
        return made

    def _positional(self, node: fx.Node, world: str) -> fx.Node:
        if node.op == "placeholder":
            return self._made(node, world)
        if node.target in FILLED and node.args[0] in self.skipped:
            return self.filled(node, [self.capacity if world == "capacity" else self.chunk] * len(shape(node)))
        args, kwargs = fx.node.map_arg((node.args, node.kwargs), lambda arg: self._plain(arg, world))
        return self.copied(node, args, kwargs, name=f"{node.name}_{world}")

    def filled(self, node: fx.Node, tokens: Sequence[Any]) -> fx.Node:
        """A tensor of one number, with ``tokens[axis]`` tokens along each axis of tokens."""
        value = FILLED[node.target]
        number: Any = node.kwargs.get("fill_value", node.args[-1]) if value is None else value
        sizes = [self.sizer(self.size_value(size, count)) for size, count in zip(shape(node), tokens, strict=True)]
        return self.call(aten.full.default, sizes, number, dtype=node.meta["val"].dtype)

    def _made(self, node: fx.Node, world: str) -> fx.Node:
        """An input that follows from the number of tokens."""
        item, dtype = self.implied[node], node.meta["val"].dtype
        size = self.capacity if world == "capacity" else self.chunk
        sizes = [self.sizer(self.size_value(s, size)) for s in shape(node)]
        if item.axis is None:
            whole = self.call(aten.full.default, sizes, _number(item.value, dtype), dtype=dtype)
            if item.hidden is None:
                return whole
            places = self.call(aten.arange.default, sizes[-1])
            past = self.call(aten.ge.Tensor, self.call(aten.unsqueeze.default, places, 1), places)
            hidden = self.call(aten.full.default, [], _number(item.hidden, dtype), dtype=dtype)
            return self.call(aten.where.self, past, whole, hidden)
        if world == "capacity":
            places = self.call(aten.arange.default, sizes[item.axis])
        elif item.axis == 1 and len(sizes) == 2 and self._counts_rows(self.size_value(shape(node)[0], size)):
            places = self.positions()
        else:
            raise self.refusal(
                f"the positions {node.target} are read beside tokens of all rows at once",
                hint="positions of every row, [batch, tokens]",
            )
        places = self.call(aten.add.Tensor, places, int(item.value))
        places = self.call(aten._to_copy.default, places, dtype=dtype) if dtype != torch.int64 else places
        if world == "chunk":
            return places
        wide = self.call(aten.reshape.default, places, [-1 if axis == item.axis else 1 for axis in range(len(sizes))])
        return self.call(aten.expand.default, wide, sizes)

    def _plain(self, arg: fx.Node, world: str) -> fx.Node:
        return self.size(arg, world) if is_symint(arg) else self.value(arg, world)

    # sizes

    def size(self, node: fx.Node, world: str) -> Any:
        """A size of the given graph, with the token axis as the ``"chunk"`` or the ``"capacity"``."""
        tokens = self.capacity if world == "capacity" else self.chunk
        value = self.size_value(node.meta["val"], tokens)
        if isinstance(value, torch.SymInt):
            for other in self.inputs.values():
                for axis, known in enumerate(shape(other)):
                    if expression(known) == expression(value):
                        return self.sizer(value, other, axis)
        if isinstance(expression(value), int):
            return expression(value)
        if node.target is aten.sym_size.int:
            return self.call(aten.sym_size.int, self.value(node.args[0], world), node.args[1])  # type: ignore[arg-type]
        args = fx.node.map_arg(node.args, lambda arg: self._plain(arg, world))
        return self.call(node.target, *args)

    def sizer(self, value: Any, holder: fx.Node | None = None, axis: int = 0) -> Any:
        """The node that reads a size from an input."""
        found = expression(value)
        if isinstance(found, int):
            return found
        key = ("size", str(found))
        if key not in self._rows:
            places = [(other, i) for other in self.inputs.values() for i in range(len(shape(other)))]
            ratios = [sympy.simplify(found / expression(shape(other)[i])) for other, i in places]
            if holder is None and 1 not in ratios:  # several places of every row, say
                self._rows[key] = self._times(value, places, ratios)
                return self._rows[key]
            if holder is None:
                holder, axis = places[ratios.index(1)]
            last = list(self.inputs.values())[-1]
            with self.graph.inserting_after(last):
                node = self.graph.create_node("call_function", aten.sym_size.int, (holder, axis), name="size_chunked")
            node.meta["val"] = shape(holder)[axis]
            node.meta["provenance"] = {"pass": self.text, "from": holder.name}
            self._rows[key] = node
        return self._rows[key]

    def _times(self, value: Any, places: Sequence[tuple[fx.Node, int]], ratios: Sequence[Any]) -> fx.Node:
        for (holder, axis), ratio in zip(places, ratios, strict=True):
            if ratio.is_Integer and not isinstance(expression(shape(holder)[axis]), int):
                return self.call(operator.mul, self.sizer(shape(holder)[axis]), int(ratio))
        raise self.refusal(f"a size of {expression(value)} is that of no input")

    def _worlds(self, node: fx.Node, first: fx.Node) -> Callable[[int], str]:
        """For the sizes that a data node is called with: whether the i-th over tokens means keys or the chunk."""
        labels = [self._label(size) for size in shape(first)]
        along = [label for label in labels if label]
        if node.target in _RESHAPES:
            wanted = [s for s in node.args[1] if isinstance(s, fx.Node) and self.tokens in symbols(s.meta["val"])]  # type: ignore[union-attr]
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

    def _label(self, size: Any) -> str:
        free = symbols(size)
        if free and self._constant(size):
            return ""
        if expression(self.capacity) in free:
            return "capacity"
        return "chunk" if expression(self.chunk) in free else ""

    def _constant(self, size: Any) -> bool:
        """Whether a size is the same whatever the symbols in it are (``1 - max(0, 1 - capacity)``, say)."""
        env = self.mode.shape_env
        assert env is not None
        return env._maybe_evaluate_static(expression(size)) is not None

    # where data meets positions

    def data_arguments(self, node: fx.Node) -> tuple[Any, Any]:
        """The arguments of a data node: rows of positional tables, and sizes by what they count."""
        tensors = [arg for arg in node.all_input_nodes if is_tensor(arg)]
        read = {arg: self.edges.get((node, arg)) or self.value(arg) for arg in tensors}
        data = [read[arg] for arg in tensors if self.kinds[arg] in (DATA, MEMORY) or (node, arg) in self.edges]
        world = self._worlds(node, data[0]) if data else lambda i: "chunk"
        counted = Counter[str]()

        def argument(arg: fx.Node) -> Any:
            if is_symint(arg):
                if self.tokens in symbols(arg.meta["val"]):
                    counted["sizes"] += 1
                    return self.size(arg, world(counted["sizes"] - 1))
                return self.size(arg, "chunk")
            if not is_tensor(arg):
                return self.values[arg, ""]
            table = read[arg]
            if self.kinds[arg] != POSITIONAL or (node, arg) in self.edges:
                return table
            return self.aligned(table, self._reference(node, data))

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
                if expression(size) != 1 and (sizes[axis] is None or self._label(size) == "capacity"):
                    sizes[axis] = size
        return sizes

    def aligned(self, table: fx.Node, reference: Sequence[Any]) -> fx.Node:
        """The chunk's rows of a positional table, along the axis where ``reference`` has the chunk (or nothing)."""
        offset = len(reference) - len(shape(table))
        keys = {axis for axis, size in enumerate(reference) if size is not None and self._label(size) == "capacity"}
        axes = [
            axis
            for axis, size in enumerate(shape(table))
            if self._label(size) == "capacity" and offset + axis not in keys
        ]
        if len(axes) > 1:  # query, then key
            axes = [axis for axis in axes if reference[offset + axis] is not None] or axes[:1]
        if not axes:
            return table
        if offset < 0 or len(axes) > 1:
            raise self.refusal(
                f"positions of shape {self._shown(shape(table))} meet tokens in a way that is not understood"
            )
        place = next((i for i, size in enumerate(reference) if self._counts_rows(size)), 0)
        return self.rows(table, axes[0], len(reference), place, self.places(reference[place]))

    def _counts_rows(self, size: Any) -> bool:
        return self.batch is not None and size is not None and expression(self.batch) in symbols(size)

    def places(self, size: Any) -> int:
        """How many places of each row an axis has that counts rows; 1 for another."""
        return int(sympy.simplify(expression(size) / expression(self.batch))) if self._counts_rows(size) else 1

    def positions(self) -> fx.Node:
        """Positions of the chunk's tokens in their rows, int64 [rows, chunk]."""
        if "positions" not in self._rows:
            lengths = self.inputs[LENGTHS]
            first = self.call(aten.unsqueeze.default, lengths, 1)
            chunk, capacity = self.sizer(self.chunk), self.sizer(self.capacity)
            steps = self.call(aten.arange.default, chunk)
            last = self.call(operator.sub, capacity, 1)
            added = self.call(aten.add.Tensor, first, steps)
            # places behind a shorter row's tokens may lie past the end: what they hold is not read
            limit = self.call(aten.scalar_tensor.default, last, dtype=torch.int64)
            self._rows["positions"] = self.call(aten.minimum.default, added, limit)
        return self._rows["positions"]

    def rows(self, table: fx.Node, axis: int, rank: int, place: int, each: int = 1) -> fx.Node:
        """Rows of ``table`` at the chunk's positions: of ``rank`` axes, with the batch on axis ``place``.

        ``each`` is how many places of every row that axis has; ``table`` has as many, or one for all.
        """
        key = (table, axis, rank, place, each)
        if key in self._rows:
            return self._rows[key]
        chosen, missing = table, rank - len(shape(table))
        places = 1
        for _ in range(missing):
            chosen = self.call(aten.unsqueeze.default, chosen, 0)
        axis += missing
        if self._counts_rows(shape(chosen)[place]):  # the same in all rows: they differ in nothing but contents
            places = self.places(shape(chosen)[place])
            chosen = self.call(aten.slice.Tensor, chosen, place, 0, places)
        elif expression(shape(chosen)[place]) != 1:
            raise self.refusal(f"a value of positions has {shape(chosen)[place]} places where rows are counted")
        if (axis, place, places, each) == (1, 0, 1, 1):
            flat = self.call(aten.reshape.default, chosen, [self._dimension(chosen, i) for i in range(1, rank)])
            self._rows[key] = self.call(aten.index.Tensor, flat, [self.positions()])
            return self._rows[key]
        flat = self.call(aten.reshape.default, self.positions(), [-1])
        taken = self.call(aten.index_select.default, chosen, axis, flat)
        batch, chunk = self.sizer(self.batch) if self.batch is not None else 1, self.sizer(self.chunk)
        sizes: list[Any] = [self._dimension(taken, i) for i in range(rank)]
        split = self.call(aten.reshape.default, taken, [*sizes[:axis], batch, chunk, *sizes[axis + 1 :]])
        order = [i for i in range(rank + 1) if i != axis]
        order.insert(place, axis)
        moved = self.call(aten.permute.default, split, order)
        if places < each:
            wide = [-1] * (rank + 1)
            wide[place + 1] = places = each
            moved = self.call(aten.expand.default, moved, wide)
        final: list[Any] = [*sizes[:axis], chunk, *sizes[axis + 1 :]]
        if places == 1:
            final[place] = batch
        else:
            final[place] = self.call(operator.mul, batch, places)
        self._rows[key] = self.call(aten.reshape.default, moved, final)
        return self._rows[key]

    def _dimension(self, node: fx.Node, axis: int) -> Any:
        size = shape(node)[axis]
        if isinstance(expression(size), int):
            return expression(size)
        if expression(size) == expression(self.capacity):
            return self.sizer(self.capacity)
        return self.call(aten.sym_size.int, node, axis)

    def _shown(self, sizes: Sequence[Any]) -> str:
        return f"[{', '.join(str(expression(size)) for size in sizes)}]"

    def appended(self, new: fx.Node, axis: int, cache: fx.Node) -> fx.Node:
        """The cache with the chunk's values in it."""
        self.edits["replaced"] += 1
        return self.call(ops.APPEND, cache, new, self.inputs[LENGTHS], axis)


def _number(value: float, dtype: torch.dtype) -> float | int | bool:
    return value if dtype.is_floating_point else bool(value) if dtype == torch.bool else int(value)
