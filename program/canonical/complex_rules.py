"""What operators on complex numbers are on their parts."""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping
from typing import Any

from torch import fx

from offramp.errors import CaptureError
from offramp.program.canonical.pairs import REAL, Pair, PairWriter
from offramp.program.graph import aten, shape_key, source

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


def real_form(writer: PairWriter, node: fx.Node) -> Any:
    """The parts of what a call gives, or a real node where that is real.

    Raises:
        CaptureError: the operator has no real form here.
    """
    packet = getattr(node.target, "overloadpacket", node.target)
    if packet in _APART or node.target in (operator.getitem, aten.where.self):
        return _apart(writer, node)
    if packet in (aten.sym_size, aten.sym_numel):
        return writer.make(node.target, writer.pairs[node.args[0]].real, *node.args[1:])  # type: ignore[index]
    if packet in _PRODUCTS:
        return writer.product(node.target, *(writer.pair(arg) for arg in node.args))
    rule = _RULES.get(packet)
    if rule is None or (found := rule(writer, node)) is None:
        raise CaptureError(
            f"{node.target} on complex numbers has no form in real ones here ({source(node)})",
            hint="write this line with real and imaginary parts (torch.view_as_real)",
        )
    return found


def _apart(writer: PairWriter, node: fx.Node) -> Pair:
    """The same call on both parts; a real value among complex ones has zeros as its imaginary part."""
    values: Any = node.args[:1]
    if node.target is aten.where.self:
        values = node.args[1:]
    elif isinstance(values[0], list | tuple):
        values = values[0]
    pairs, kwargs = writer.pairs, dict(node.kwargs)
    if kwargs.get("dtype") in REAL:
        kwargs["dtype"] = REAL[kwargs["dtype"]]  # type: ignore[index]

    def imaginary(arg: fx.Node) -> Any:
        if arg in pairs:
            found = pairs[arg]
            return writer.make(aten.zeros_like.default, found.real) if found.imag is None else found.imag
        return writer.make(aten.zeros_like.default, arg) if arg in values else arg

    real = fx.node.map_arg(node.args, lambda arg: pairs[arg].real if arg in pairs else arg)
    if all(arg in pairs and pairs[arg].imag is None for arg in values):
        return Pair(writer.make(node.target, *real, **kwargs))
    imag = fx.node.map_arg(node.args, imaginary)
    return Pair(writer.make(node.target, *real, **kwargs), writer.make(node.target, *imag, **kwargs))


# A rule gives the parts of the result, or a real node; None where a form of the operator is not covered.


def _sum(writer: PairWriter, node: fx.Node) -> Pair | None:
    a, b = (writer.pair(arg) for arg in node.args[:2])
    if node.kwargs or len(node.args) > 2:
        return None
    target = aten.sub.Tensor if node.target.overloadpacket is aten.sub else aten.add.Tensor  # type: ignore[union-attr]
    pieces = writer.join(target, a.real, b.real), writer.join(target, a.imag, b.imag)
    like, imag = pieces
    if imag is None or (isinstance(imag, fx.Node) and shape_key(imag) == shape_key(like)):
        return Pair(like, imag)
    return Pair(like, writer.make(aten.add.Tensor, writer.make(aten.zeros_like.default, like), imag))


def _quotient(writer: PairWriter, node: fx.Node) -> Pair:
    a, b = (writer.pair(arg) for arg in node.args)

    def divide(part: Any, by: Any) -> Any:
        return None if part is None else writer.make(aten.div.Tensor, part, by)

    if b.imag is None:
        return Pair(divide(a.real, b.real), divide(a.imag, b.real))
    if not isinstance(b.real, fx.Node):
        whole = 1 / complex(b.real, b.imag)
        return writer.product(aten.mul.Tensor, a, Pair(whole.real, whole.imag))
    over = writer.product(aten.mul.Tensor, a, _conjugate(writer, b))
    size = writer.square(b)
    return Pair(divide(over.real, size), divide(over.imag, size))


def _conjugate(writer: PairWriter, z: Pair) -> Pair:
    return Pair(z.real, None if z.imag is None else writer.make(aten.neg.default, z.imag))


def _imaginary(writer: PairWriter, z: Pair) -> fx.Node:
    found: fx.Node = writer.make(aten.zeros_like.default, z.real) if z.imag is None else z.imag
    return found


def _polar(writer: PairWriter, size: Any, angle: Any) -> Pair:
    turned = (writer.make(target, angle) for target in (aten.cos.default, aten.sin.default))
    return Pair(*(writer.make(aten.mul.Tensor, size, part) for part in turned))


def _exponential(writer: PairWriter, node: fx.Node) -> Pair:
    z = writer.pair(node.args[0])
    return _polar(writer, writer.make(aten.exp.default, z.real), _imaginary(writer, z))


def _of_parts(writer: PairWriter, node: fx.Node) -> Pair | None:
    return Pair(*node.args) if len(set(map(shape_key, node.all_input_nodes))) == 1 else None


def _as_complex(writer: PairWriter, node: fx.Node) -> Pair:
    return Pair(*(writer.make(aten.select.int, node.args[0], -1, place) for place in (0, 1)))


def _as_real(writer: PairWriter, node: fx.Node) -> fx.Node:
    z = writer.pair(node.args[0])
    return writer.make(aten.stack.default, [z.real, _imaginary(writer, z)], -1)


def _cast(writer: PairWriter, node: fx.Node) -> Pair | fx.Node:
    z, wanted = writer.pair(node.args[0]), node.kwargs.get("dtype")
    dtype = REAL.get(wanted, wanted)  # type: ignore[arg-type]
    options = {"dtype": dtype} if dtype else {}
    parts = [None if part is None else writer.make(aten._to_copy.default, part, **options) for part in z]
    return parts[0] if wanted and wanted not in REAL else Pair(*parts)  # type: ignore[return-value]


def _filled(writer: PairWriter, node: fx.Node) -> Pair | None:
    """Values of one number each, made by size or like another value."""
    if any(isinstance(arg, complex) for arg in node.args):
        return None
    options: dict[str, Any] = dict(node.kwargs)
    if options.get("dtype") in REAL:
        options["dtype"] = REAL[options["dtype"]]
    args = [writer.pair(arg).real for arg in node.args]
    return Pair(writer.make(node.target, *args, **options))


_RULES: Mapping[Any, Callable[[PairWriter, fx.Node], Any]] = {
    aten.add: _sum,
    aten.sub: _sum,
    aten.div: _quotient,
    aten.conj: lambda w, node: _conjugate(w, w.pair(node.args[0])),
    aten._conj: lambda w, node: _conjugate(w, w.pair(node.args[0])),
    aten._conj_physical: lambda w, node: _conjugate(w, w.pair(node.args[0])),
    aten.conj_physical: lambda w, node: _conjugate(w, w.pair(node.args[0])),
    aten.real: lambda w, node: w.pair(node.args[0]).real,
    aten.imag: lambda w, node: _imaginary(w, w.pair(node.args[0])),
    aten.abs: lambda w, node: w.make(aten.sqrt.default, w.square(w.pair(node.args[0]))),
    aten.exp: _exponential,
    aten.polar: lambda w, node: _polar(w, *node.args),
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
