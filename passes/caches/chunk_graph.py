"""The graph that ``insert-cache`` builds: its inputs, calls at its end, and sizes in terms of its own symbols."""

from __future__ import annotations

import operator
from collections import Counter
from collections.abc import Sequence
from functools import reduce
from typing import Any

import sympy
import torch
from torch import fx
from torch._dispatch.python import enable_python_dispatcher
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import ShapeEnv

from offramp.errors import PassError
from offramp.program import ops
from offramp.program.fake_values import fake_result
from offramp.program.graph import aten, expression, placeholders, shape, source, symbols
from offramp.program.program import Program
from offramp.program.symbols import new_axis

#: The input that says how many tokens each row has already, int64 [rows].
LENGTHS = "lengths"
#: The input whose size is the capacity of the caches: its positions, int64 [capacity].
PLACES = "places"
#: The input that says how many tokens each row's prompt has, int64 [rows].
PROMPT_LENGTHS = "prompt_lengths"


class ChunkGraph:
    """A graph whose token axis has two sizes: ``chunk`` for data, ``capacity`` for what is made for all positions.

    ``prompt`` is how many tokens the longest prompt has. ``batch`` is the size that counts rows, None where the program
    has no batch axis; ``tokens`` the symbol of the token axis in the given program. ``origin`` is the node of that
    which new ones are made for.
    """

    def __init__(self, program: Program, text: str, tokens: Any, capacity: int) -> None:
        self.program, self.text, self.tokens = program, text, tokens
        self.graph = fx.Graph()
        self.edits: Counter[str] = Counter()
        self.mode = FakeTensorMode(shape_env=ShapeEnv())
        self.mode.cache_enabled = False  # `fake_result` keeps its own, which takes less
        self.inputs: dict[str, fx.Node] = {}
        self.origin: fx.Node | None = None
        self._sizes: dict[str, fx.Node] = {}
        self._symbols = self._new_symbols()
        self.batch = self._symbols.get(program.axes.batch)
        self.chunk = self._symbols[tokens]
        self.capacity = new_axis(self._env, "capacity", capacity)
        self.prompt = new_axis(self._env, "prompt", capacity)

    # symbols

    def _new_symbols(self) -> dict[Any, torch.SymInt]:
        hints: dict[Any, int] = {}
        for node in self.program.graph.find_nodes(op="placeholder"):
            example = self.program.example_inputs[str(node.target)]
            for size, hint in zip(shape(node), example.shape, strict=True):
                if isinstance(expression(size), sympy.Symbol):
                    hints.setdefault(expression(size), hint)
        return {symbol: new_axis(self._env, str(symbol), max(hint, 2)) for symbol, hint in hints.items()}

    @property
    def _env(self) -> ShapeEnv:
        assert self.mode.shape_env is not None
        return self.mode.shape_env

    @property
    def renamed(self) -> dict[Any, Any]:
        """The symbols of the given graph, and what they are called in the new one."""
        return {old: expression(new) for old, new in self._symbols.items()}

    def size_value(self, size: Any, tokens: Any) -> Any:
        """A size of the given graph in terms of the new symbols, the token axis being ``tokens``."""
        found = expression(size)
        if isinstance(found, (int, float)):
            return found
        known = {**self._symbols, self.tokens: tokens}
        if found in known:
            return known[found]
        replaced = found.xreplace({symbol: value.node.expr for symbol, value in known.items()})
        if isinstance(size, torch.SymFloat):  # half of a length, before it is rounded
            return self._env.create_symfloatnode(replaced, hint=None)
        return self._env.create_symintnode(replaced, hint=None)

    def label(self, size: Any) -> str:
        """Which of its two sizes an axis of tokens has, "chunk" or "capacity"; "" for another axis."""
        free = symbols(size)
        if free and self._env._maybe_evaluate_static(expression(size)) is not None:  # 1 - max(0, 1 - capacity), say
            return ""
        if expression(self.capacity) in free:
            return "capacity"
        return "chunk" if expression(self.chunk) in free else ""

    def counts_rows(self, size: Any) -> bool:
        """Whether an axis of this size counts rows of the batch."""
        return self.batch is not None and size is not None and expression(self.batch) in symbols(size)

    def places(self, size: Any) -> int:
        """How many places of each row an axis has that counts rows; 1 for another."""
        return int(sympy.simplify(expression(size) / expression(self.batch))) if self.counts_rows(size) else 1

    # nodes

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

    def full(self, sizes: Sequence[Any], value: float, dtype: torch.dtype) -> fx.Node:
        """One number everywhere, as this dtype has it."""
        number = value if dtype.is_floating_point else bool(value) if dtype == torch.bool else int(value)
        return self.call(aten.full.default, sizes, number, dtype=dtype)

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

    def appended(self, new: fx.Node, axis: int, cache: fx.Node) -> fx.Node:
        """The cache with the chunk's values in it."""
        self.edits["replaced"] += 1
        return self.call(ops.APPEND, cache, new, self.inputs[LENGTHS], axis)

    def refusal(self, reason: str, hint: str | None = None) -> PassError:
        """An error that says where in the model it is."""
        place = f" ({source(self.origin)})" if self.origin is not None else ""
        return PassError(f"{reason}{place}", hint=hint)

    # sizes as nodes

    def sizer(self, value: Any, holder: fx.Node | None = None, axis: int = 0) -> Any:
        """The node that reads a size from an input."""
        found = expression(value)
        if isinstance(found, int):
            return found
        key = str(found)
        if key not in self._sizes:
            places = [(other, i) for other in self.inputs.values() for i in range(len(shape(other)))]
            ratios = [sympy.simplify(found / expression(shape(other)[i])) for other, i in places]
            if holder is None and 1 not in ratios:  # several places of every row, say
                self._sizes[key] = self._made(value, places, ratios)
                return self._sizes[key]
            if holder is None:
                holder, axis = places[ratios.index(1)]
            last = list(self.inputs.values())[-1]
            with self.graph.inserting_after(last):
                node = self.graph.create_node("call_function", aten.sym_size.int, (holder, axis), name="size_chunked")
            node.meta["val"] = shape(holder)[axis]
            node.meta["provenance"] = {"pass": self.text, "from": holder.name}
            self._sizes[key] = node
        return self._sizes[key]

    def _made(self, value: Any, places: Sequence[tuple[fx.Node, int]], ratios: Sequence[Any]) -> fx.Node:
        for (holder, axis), ratio in zip(places, ratios, strict=True):
            if ratio.is_Integer and not isinstance(expression(shape(holder)[axis]), int):
                return self.call(operator.mul, self.sizer(shape(holder)[axis]), int(ratio))
        if expression(value).is_Add:
            parts = [self.sizer(self._env.create_symintnode(part, hint=None)) for part in expression(value).args]
            total: fx.Node = reduce(lambda one, other: self.call(operator.add, one, other), parts)
            return total
        raise self.refusal(f"a size of {expression(value)} is that of no input")

    def dimension(self, node: fx.Node, axis: int) -> Any:
        """The size of a node's axis: a number, or a node that reads it."""
        size = shape(node)[axis]
        if isinstance(expression(size), int):
            return expression(size)
        if expression(size) == expression(self.capacity):
            return self.sizer(self.capacity)
        return self.call(aten.sym_size.int, node, axis)
