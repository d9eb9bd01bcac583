"""Axes without example sizes: what is computed over other axes, or captured with other sizes, is then the same text."""

from __future__ import annotations

import logging
from collections.abc import Iterable
from typing import Any

import sympy
import torch
from torch import fx
from torch._dispatch.python import enable_python_dispatcher
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import ShapeEnv

from offramp.export.lowering.pipeline import equal_sizes
from offramp.program.fake_values import fake_result
from offramp.program.graph import aten, expression, is_weight, shape, sizes_of
from offramp.program.symbols import new_axis

_log = logging.getLogger(__name__)
_SYMBOLIC = (torch.SymInt, torch.SymFloat, torch.SymBool)
_FIRST = 10  # the axes are 29, 31, 37, ... long where torch looks: primes from this one on, no usual number of features


def generic_axes(graph: fx.Graph) -> fx.Graph:
    """A computation's graph over axes of its own, of any size from 2 on.

    Every size that its inputs have is an axis, whatever it is made of: blocks over ``tokens`` and over
    ``frames//2 + 1`` are one computation. So is a number that the graph reads from them as a size. Where the shapes
    need to know how these sizes belong together, the symbols in them are the axes. Where they follow from the example
    (a table cut at 64 rows, say), it is the graph itself.
    """
    read = {expression(node.meta["val"]) for node in graph.find_nodes(op="call_function", target=aten.sym_size.int)}
    given = [node for node in graph.find_nodes(op="placeholder") if not is_weight(node)]
    sizes = _unique(size for node in given for size in sizes_of(node))
    sizes = [size for size in sizes if not isinstance(size, int) or size in read]
    symbols = [size for size in sizes if isinstance(size, int) or size.is_Symbol]
    inner = (s for size in sizes if not isinstance(size, int) for s in sorted(size.free_symbols, key=str))
    symbols = _unique([*symbols, *inner])
    for axes in (sizes, symbols) if sizes != symbols else (sizes,):
        try:
            return _over(axes, graph)
        except (RuntimeError, ValueError, TypeError, IndexError, AssertionError) as error:  # torch's own
            _log.debug("not over the axes %s: %s", axes, error)
    return graph


def _unique(sizes: Iterable[Any]) -> list[Any]:
    return list(dict.fromkeys(sizes))


class _Axes:
    """New symbols in the place of sizes."""

    def __init__(self, axes: Iterable[Any]) -> None:
        self.mode = FakeTensorMode(shape_env=ShapeEnv())
        self.mode.cache_enabled = False  # to keep a result takes longer than to compute it, and few are asked twice
        self._made = {axis: self._axis(i) for i, axis in enumerate(axes)}
        self._old = {expression(new): old for old, new in self._made.items()}

    def _axis(self, index: int) -> Any:
        assert self.mode.shape_env is not None
        return new_axis(self.mode.shape_env, f"axis{index}", int(sympy.prime(_FIRST + index)))

    def size(self, old: Any) -> Any:
        """A size of an input."""
        known = expression(old)
        if isinstance(known, int) or known in self._made:
            return self._made.get(known, known)
        assert self.mode.shape_env is not None
        renamed = known.xreplace({axis: expression(new) for axis, new in self._made.items()})
        return self.mode.shape_env.create_symintnode(renamed, hint=None)

    def equal(self, new: Any, old: Any) -> bool:
        """Whether a size is what it was, for the old symbols."""
        new, old = (x.node.expr if isinstance(x, _SYMBOLIC) else x for x in (new, old))
        return equal_sizes(new.xreplace(self._old) if isinstance(new, sympy.Basic) else new, old)


def _over(axes: Iterable[Any], graph: fx.Graph) -> fx.Graph:
    """The graph with its shapes computed anew.

    Raises:
        ValueError: they are not what they were; or whatever an operator raises.
    """
    symbols, made = _Axes(axes), fx.Graph()
    env: dict[fx.Node, fx.Node] = {}
    for node in graph.nodes:
        env[node] = made.node_copy(node, env.__getitem__)
        if node.op == "output":
            break
        if node.op == "placeholder":
            with symbols.mode:
                sizes = shape(node) if is_weight(node) else [symbols.size(size) for size in shape(node)]
                value = torch.empty(sizes, dtype=node.meta["val"].dtype)
        else:
            with enable_python_dispatcher():
                value = fake_result(symbols.mode, node.target, env[node].args, env[node].kwargs)
        if not _same(symbols, value, node.meta["val"]):
            raise ValueError(f"{node} would be {value}, and is {node.meta['val']}")
        env[node].meta = {**node.meta, "val": value}
    return made


def _same(axes: _Axes, new: Any, old: Any) -> bool:
    """Whether a value has the shape and dtype that it had."""
    if isinstance(old, torch.Tensor):
        return (
            new.dtype == old.dtype and len(new.shape) == len(old.shape) and all(map(axes.equal, new.shape, old.shape))
        )
    if isinstance(old, (tuple, list)):
        return len(new) == len(old) and all(_same(axes, *pair) for pair in zip(new, old, strict=True))
    return axes.equal(new, old)
