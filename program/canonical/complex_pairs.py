"""Complex numbers become pairs of real ones: what comes after capture, and ONNX, knows only those."""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import fx

from offramp.errors import CaptureError
from offramp.program.graph import add_call, aten, attribute, fake_mode, shape_key, source

_REAL = {torch.complex32: torch.float16, torch.complex64: torch.float32, torch.complex128: torch.float64}

#: What does the same to both parts: moves, copies and sums of elements.
_APART = frozenset(
    {
        *(aten.reshape, aten.view, aten._unsafe_view, aten.expand, aten.unsqueeze, aten.squeeze, aten.flatten),
        *(aten.permute, aten.transpose, aten.t, aten.flip, aten.roll, aten.repeat, aten.unflatten, aten.movedim),
        *(aten.slice, aten.select, aten.narrow, aten.index_select, aten.index, aten.gather, aten.embedding),
        *(aten.split, aten.split_with_sizes, aten.chunk, aten.unbind, aten.cat, aten.stack, aten.diagonal),
        *(aten.clone, aten.alias, aten.detach, aten.contiguous, aten.lift_fresh_copy, aten.resolve_conj),
        *(aten.neg, aten.sum, aten.mean, aten.cumsum, aten.tril, aten.triu, aten.zeros_like, aten.resolve_neg),
    }
)
_PRODUCTS = frozenset({aten.mul, aten.mm, aten.bmm, aten.matmul})


class _Pair(NamedTuple):
    """The parts of a complex value: nodes or numbers, None where there is no imaginary part."""

    real: Any
    imag: Any = None


def made_real(module: fx.GraphModule) -> int:
    """Rewrite the graph of ``module`` in place so that no value of it is complex; returns how many were.

    ``view_as_complex(x)`` is ``x[..., 0]`` and ``x[..., 1]``, and from there on every operator works on both, up to
    ``view_as_real`` or another one that gives real numbers again. Complex weights become two real ones.

    Raises:
        CaptureError: an input or output is complex, or an operator has no real form here; it is named, with its line.
    """
    rewriter = _Rewriter(module)
    for node in list(module.graph.nodes):
        rewriter.visit(node)
    for node in reversed(rewriter.replaced):
        module.graph.erase_node(node)
    for target in {str(node.target) for node in rewriter.replaced if node.op == "get_attr"}:
        owner, _, leaf = target.rpartition(".")
        delattr(module.get_submodule(owner), leaf)
    return len(rewriter.replaced)


def _is_complex(node: fx.Node) -> bool:
    value = node.meta.get("val")
    values = value if isinstance(value, list | tuple) else [value]
    return any(isinstance(item, torch.Tensor) and item.is_complex() for item in values)


class _Rewriter:
    def __init__(self, module: fx.GraphModule) -> None:
        self.module, self.graph = module, module.graph
        self.pairs: dict[fx.Node, _Pair] = {}
        self.replaced: list[fx.Node] = []
        self._mode = fake_mode(self.graph)
        self._node: fx.Node

    def visit(self, node: fx.Node) -> None:
        """Give a node that makes or reads complex numbers its parts, or its real replacement."""
        reads = [arg for arg in node.all_input_nodes if arg in self.pairs]
        if not reads and not _is_complex(node):
            return
        self._node = node
        if node.op == "placeholder":
            raise CaptureError(
                f"the input {node.target!r} is complex",
                hint="real inputs: torch.view_as_complex inside the forward, on an input with a last axis of two",
            )
        if node.op == "output":
            returned: Any = node.args[0]
            named = [name for name, value in returned.items() if value in self.pairs]
            raise CaptureError(f"the outputs {named} are complex", hint="torch.view_as_real of them")
        with self.graph.inserting_before(node):
            made = self._weight(node) if node.op == "get_attr" else self._call(node)
        if isinstance(made, _Pair) and _is_complex(node):
            self.pairs[node] = made
        else:
            node.replace_all_uses_with(made.real if isinstance(made, _Pair) else made)
        self.replaced.append(node)

    def _weight(self, node: fx.Node) -> _Pair:
        value = attribute(self.module, str(node.target))
        kind = torch.nn.Parameter if isinstance(value, torch.nn.Parameter) else torch.nn.Buffer
        owner, _, leaf = str(node.target).rpartition(".")
        made = []
        for name, part in (("real", value.detach().real), ("imag", value.detach().imag)):
            holder = self.module.get_submodule(owner)
            while hasattr(holder, f"{leaf}_{name}"):
                leaf += "_"
            setattr(holder, f"{leaf}_{name}", kind(part.clone(memory_format=torch.contiguous_format)))
            target = f"{owner}.{leaf}_{name}" if owner else f"{leaf}_{name}"
            node = self.graph.create_node("get_attr", target)
            node.meta["val"] = self._mode.from_tensor(part, static_shapes=True)
            made.append(self._stamped(node))
        return _Pair(*made)

    def _call(self, node: fx.Node) -> Any:
        packet = getattr(node.target, "overloadpacket", node.target)
        if packet in _APART or node.target in (operator.getitem, aten.where.self):
            return self._apart(node)
        if packet in (aten.sym_size, aten.sym_numel):
            return self.make(node.target, self.pairs[node.args[0]].real, *node.args[1:])  # type: ignore[index]
        rule = _RULES.get(packet)
        if packet in _PRODUCTS:
            return self.product(node.target, *(self.pair(arg) for arg in node.args))
        if rule is None or (found := rule(self, node)) is None:
            raise CaptureError(
                f"{node.target} on complex numbers has no form in real ones here ({source(node)})",
                hint="write this line with real and imaginary parts (torch.view_as_real)",
            )
        return found

    def _apart(self, node: fx.Node) -> _Pair:
        """The same call on both parts; a real value among complex ones has zeros as its imaginary part."""
        values: Any = node.args[:1]
        if node.target is aten.where.self:
            values = node.args[1:]
        elif isinstance(values[0], list | tuple):
            values = values[0]
        kwargs = dict(node.kwargs)
        if kwargs.get("dtype") in _REAL:
            kwargs["dtype"] = _REAL[kwargs["dtype"]]  # type: ignore[index]

        def imaginary(arg: fx.Node) -> Any:
            if arg in self.pairs:
                found = self.pairs[arg]
                return self.make(aten.zeros_like.default, found.real) if found.imag is None else found.imag
            return self.make(aten.zeros_like.default, arg) if arg in values else arg

        real = fx.node.map_arg(node.args, lambda arg: self.pairs[arg].real if arg in self.pairs else arg)
        if all(arg in self.pairs and self.pairs[arg].imag is None for arg in values):
            return _Pair(self.make(node.target, *real, **kwargs))
        imag = fx.node.map_arg(node.args, imaginary)
        return _Pair(self.make(node.target, *real, **kwargs), self.make(node.target, *imag, **kwargs))

    # what rules are made of

    def pair(self, arg: Any) -> _Pair:
        """The parts of an argument: a complex or real node, or a number."""
        if isinstance(arg, complex):
            return _Pair(arg.real, arg.imag)
        return self.pairs.get(arg) or _Pair(arg) if isinstance(arg, fx.Node) else _Pair(arg)

    def make(self, target: Any, *args: Any, **kwargs: Any) -> fx.Node:
        """A call whose value's shape is computed."""
        return self._stamped(add_call(self._mode, self.graph, target, *args, **kwargs))

    def _stamped(self, made: fx.Node) -> fx.Node:
        kept = ("nn_module_stack", "stack_trace")
        made.meta |= {key: self._node.meta[key] for key in kept if key in self._node.meta}
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

    def product(self, target: Any, a: _Pair, b: _Pair) -> _Pair:
        """``(a + bi)(c + di) = (ac - bd) + (ad + bc)i`` of any product."""
        target = aten.mul.Tensor if target is aten.mul.Scalar else target
        return _Pair(
            self.join(
                aten.sub.Tensor, self.times(target, a.real, b.real), self.times(target, a.imag, b.imag)
            ),
            self.join(
                aten.add.Tensor, self.times(target, a.real, b.imag), self.times(target, a.imag, b.real)
            ),
        )  # fmt: skip

    def square(self, z: _Pair) -> Any:
        """The square of the magnitude."""
        mul = aten.mul.Tensor
        return self.join(aten.add.Tensor, self.times(mul, z.real, z.real), self.times(mul, z.imag, z.imag))


# Operators: a rule gives the parts of the result, or a real node; None where a form of it is not covered.


def _sum(rewriter: _Rewriter, node: fx.Node) -> _Pair | None:
    a, b = (rewriter.pair(arg) for arg in node.args[:2])
    if node.kwargs or len(node.args) > 2:
        return None
    target = aten.sub.Tensor if node.target.overloadpacket is aten.sub else aten.add.Tensor  # type: ignore[union-attr]
    pieces = rewriter.join(target, a.real, b.real), rewriter.join(target, a.imag, b.imag)
    like, imag = pieces
    if imag is None or (isinstance(imag, fx.Node) and shape_key(imag) == shape_key(like)):
        return _Pair(like, imag)
    return _Pair(like, rewriter.make(aten.add.Tensor, rewriter.make(aten.zeros_like.default, like), imag))


def _quotient(rewriter: _Rewriter, node: fx.Node) -> _Pair:
    a, b = (rewriter.pair(arg) for arg in node.args)

    def divide(part: Any, by: Any) -> Any:
        return None if part is None else rewriter.make(aten.div.Tensor, part, by)

    if b.imag is None:
        return _Pair(divide(a.real, b.real), divide(a.imag, b.real))
    if not isinstance(b.real, fx.Node):
        whole = 1 / complex(b.real, b.imag)
        return rewriter.product(aten.mul.Tensor, a, _Pair(whole.real, whole.imag))
    over = rewriter.product(aten.mul.Tensor, a, _conjugate(rewriter, b))
    size = rewriter.square(b)
    return _Pair(divide(over.real, size), divide(over.imag, size))


def _conjugate(rewriter: _Rewriter, z: _Pair) -> _Pair:
    return _Pair(z.real, None if z.imag is None else rewriter.make(aten.neg.default, z.imag))


def _imaginary(rewriter: _Rewriter, z: _Pair) -> fx.Node:
    found: fx.Node = rewriter.make(aten.zeros_like.default, z.real) if z.imag is None else z.imag
    return found


def _polar(rewriter: _Rewriter, size: Any, angle: Any) -> _Pair:
    turned = (rewriter.make(target, angle) for target in (aten.cos.default, aten.sin.default))
    return _Pair(*(rewriter.make(aten.mul.Tensor, size, part) for part in turned))


def _exponential(rewriter: _Rewriter, node: fx.Node) -> _Pair:
    z = rewriter.pair(node.args[0])
    return _polar(rewriter, rewriter.make(aten.exp.default, z.real), _imaginary(rewriter, z))


def _of_parts(rewriter: _Rewriter, node: fx.Node) -> _Pair | None:
    return _Pair(*node.args) if len(set(map(shape_key, node.all_input_nodes))) == 1 else None


def _as_complex(rewriter: _Rewriter, node: fx.Node) -> _Pair:
    return _Pair(*(rewriter.make(aten.select.int, node.args[0], -1, place) for place in (0, 1)))


def _as_real(rewriter: _Rewriter, node: fx.Node) -> fx.Node:
    z = rewriter.pair(node.args[0])
    return rewriter.make(aten.stack.default, [z.real, _imaginary(rewriter, z)], -1)


def _cast(rewriter: _Rewriter, node: fx.Node) -> _Pair | fx.Node:
    z, wanted = rewriter.pair(node.args[0]), node.kwargs.get("dtype")
    dtype = _REAL.get(wanted, wanted)  # type: ignore[arg-type]
    options = {"dtype": dtype} if dtype else {}
    parts = [None if part is None else rewriter.make(aten._to_copy.default, part, **options) for part in z]
    return parts[0] if wanted and wanted not in _REAL else _Pair(*parts)  # type: ignore[return-value]


def _filled(rewriter: _Rewriter, node: fx.Node) -> _Pair | None:
    """Values of one number each, made by size or like another value."""
    if any(isinstance(arg, complex) for arg in node.args):
        return None
    options: dict[str, Any] = dict(node.kwargs)
    if options.get("dtype") in _REAL:
        options["dtype"] = _REAL[options["dtype"]]
    args = [rewriter.pair(arg).real for arg in node.args]
    return _Pair(rewriter.make(node.target, *args, **options))


_RULES: Mapping[Any, Callable[[_Rewriter, fx.Node], Any]] = {
    aten.add: _sum,
    aten.sub: _sum,
    aten.div: _quotient,
    aten.conj: lambda r, node: _conjugate(r, r.pair(node.args[0])),
    aten._conj: lambda r, node: _conjugate(r, r.pair(node.args[0])),
    aten._conj_physical: lambda r, node: _conjugate(r, r.pair(node.args[0])),
    aten.conj_physical: lambda r, node: _conjugate(r, r.pair(node.args[0])),
    aten.real: lambda r, node: r.pair(node.args[0]).real,
    aten.imag: lambda r, node: _imaginary(r, r.pair(node.args[0])),
    aten.abs: lambda r, node: r.make(aten.sqrt.default, r.square(r.pair(node.args[0]))),
    aten.exp: _exponential,
    aten.polar: lambda r, node: _polar(r, *node.args),
    aten.complex: _of_parts,
    aten.view_as_complex: _as_complex,
    aten.view_as_real: _as_real,
    aten._to_copy: _cast,
    aten.zeros: _filled,
    aten.ones: _filled,
    aten.full: _filled,
    aten.ones_like: _filled,
    aten.full_like: _filled,
    aten.arange: _filled,
}
