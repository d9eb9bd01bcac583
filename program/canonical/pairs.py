"""Arithmetic of complex numbers as pairs of real ones, written into a graph."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import fx

from offramp.program.graph import add_call, aten, fake_mode

#: The real dtypes of complex ones' parts.
REAL = {torch.complex32: torch.float16, torch.complex64: torch.float32, torch.complex128: torch.float64}


class Pair(NamedTuple):
    """The parts of a complex value: nodes or numbers, None where there is no imaginary part."""

    real: Any
    imag: Any = None


class PairWriter:
    """Writes calls on the parts of complex values; ``pairs`` holds the parts of the given graph's nodes.

    ``node`` is the node that new ones stand for.
    """

    def __init__(self, graph: fx.Graph) -> None:
        self.graph, self.mode = graph, fake_mode(graph)
        self.pairs: dict[fx.Node, Pair] = {}
        self.node: fx.Node

    def pair(self, arg: Any) -> Pair:
        """The parts of an argument: a complex or real node, or a number."""
        if isinstance(arg, complex):
            return Pair(arg.real, arg.imag)
        return self.pairs.get(arg) or Pair(arg) if isinstance(arg, fx.Node) else Pair(arg)

    def make(self, target: Any, *args: Any, **kwargs: Any) -> fx.Node:
        """A call whose value's shape is computed."""
        return self.stamped(add_call(self.mode, self.graph, target, *args, **kwargs))

    def stamped(self, made: fx.Node) -> fx.Node:
        """The node, with its place in the model."""
        kept = ("nn_module_stack", "stack_trace")
        made.meta |= {key: self.node.meta[key] for key in kept if key in self.node.meta}
        return made

    def join(self, target: Any, a: Any, b: Any) -> Any:
        """A sum or difference, of which None is zero."""
        if b is None:
            return a
        if a is None:
            return self.make(aten.neg.default, b) if target is aten.sub.Tensor else b
        return self.make(target, a, b)

    def times(self, target: Any, a: Any, b: Any) -> Any:
        """A product, of which None is zero."""
        if a is None or b is None:
            return None
        if not isinstance(a, fx.Node) and not isinstance(b, fx.Node):
            return a * b
        return self.make(target, *((a, b) if isinstance(a, fx.Node) else (b, a)))

    def product(self, target: Any, a: Pair, b: Pair) -> Pair:
        """``(a + bi)(c + di) = (ac - bd) + (ad + bc)i`` of any product."""
        target = aten.mul.Tensor if target is aten.mul.Scalar else target
        return Pair(
            self.join(
                aten.sub.Tensor, self.times(target, a.real, b.real), self.times(target, a.imag, b.imag)
            ),
            self.join(
                aten.add.Tensor, self.times(target, a.real, b.imag), self.times(target, a.imag, b.real)
            ),
        )  # fmt: skip

    def square(self, z: Pair) -> Any:
        """The square of the magnitude."""
        mul = aten.mul.Tensor
        return self.join(aten.add.Tensor, self.times(mul, z.real, z.real), self.times(mul, z.imag, z.imag))
