"""Learners, of which each token takes the first: all computed and masked, or each on the tokens that have chosen it."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import Any

import torch
from torch import fx
from torch._dispatch.python import enable_python_dispatcher

from offramp.errors import ExportError
from offramp.export.lowering.node_builder import Builder
from offramp.export.lowering.table import lowering
from offramp.program.analysis.products import Product
from offramp.program.analysis.sites import Site, half, mlp
from offramp.program.graph import aten, expression, is_tensor, shape, source
from offramp.program.ops import FIRST_LEARNERS, learner_bounds


@lowering(FIRST_LEARNERS)
def _learners(b: Builder, hidden: fx.Node, choice: fx.Node, learners: int, least: int, form: str = "dense") -> fx.Node:
    """In the place of the whole MLP, or of the hidden units that a token has not chosen."""
    if form == "dense" or b.origin is None:
        return _dense(b, hidden, choice, learners, least)
    site = mlp(next(iter(b.origin.users)))
    if site is None:
        raise ExportError(f"{b.origin} is no longer inside an MLP ({source(b.origin)})", hint='learners="dense"')
    site.output.replace_all_uses_with(_grouped(b, site, choice, learners, least))
    return hidden


def _dense(b: Builder, hidden: fx.Node, choice: fx.Node, learners: int, least: int) -> fx.Node:
    """``hidden`` where the greatest of ``choice`` is at the learner's place or behind it, else 0."""
    units = int(shape(hidden)[-1])
    chosen = b.call(aten.unsqueeze.default, _chosen(b, choice, least), -1)
    place = b.call(aten.mul.Tensor, b.call(aten.arange.default, units, dtype=torch.int64), learners)
    place = b.call(aten.div.Tensor_mode, place, units, rounding_mode="floor")
    place = b.call(aten.add.Tensor, place, 1)
    kept = b.call(aten.ge.Tensor, chosen, place)
    return b.call(aten.mul.Tensor, hidden, b.call(aten._to_copy.default, kept, dtype=hidden.meta["val"].dtype))


def _chosen(b: Builder, choice: fx.Node, least: int) -> fx.Node:
    """How many learners a token takes, as ``insert-acm`` counts them: the two become one node."""
    return b.call(aten.add.Tensor, b.call(aten.argmax.default, choice, -1), least)


def _grouped(b: Builder, site: Site, choice: fx.Node, learners: int, least: int) -> fx.Node:
    """The MLP, learner by learner, on tokens sorted by how many they take: each runs on the first of them.

    Every weight is read once, and nothing is scattered: what a learner adds is padded to the tokens of the one before,
    and the inverse of the order is gathered.
    """
    x, units, out = site.input, site.last.features, int(shape(site.output)[-1])
    chosen = b.call(aten.reshape.default, _chosen(b, choice, least), [-1])
    flat = b.call(aten.reshape.default, x, [-1, int(shape(x)[-1])])
    total = b.onnx("Shape", [chosen], {}, [[1]], like=chosen)[0]
    tokens = b.size(flat, 0)
    order = b.onnx("TopK", [chosen, total], {"axis": 0, "largest": 1}, [[tokens], [tokens]], like=chosen)[1]
    back = b.onnx("TopK", [order, total], {"axis": 0, "largest": 0}, [[tokens], [tokens]], like=chosen)[1]
    flat = b.call(aten.index_select.default, flat, 0, order)
    zero = b.call(aten.full.default, [1], 0, dtype=torch.int64)
    made: fx.Node | None = None
    count, bounds = zero, learner_bounds(units, learners)
    for last in range(learners, max(least, 1) - 1, -1):  # those that all tokens take are one
        first = last if last > least else 1
        here, rows, size = flat, total, tokens
        if last > least:
            taking = b.call(aten._to_copy.default, b.call(aten.ge.Scalar, chosen, last), dtype=torch.int64)
            rows = b.call(aten.sum.dim_IntList, taking, [0], True)
            size = b.number(rows)
            here = b.onnx("Slice", [flat, zero, rows, zero], {}, [[size, int(shape(x)[-1])]], like=x)[0]
        found = _part(b, site, here, bounds[first - 1], bounds[last])
        made = found if made is None else b.call(aten.add.Tensor, found, _padded(b, made, count, rows, [size, out]))
        count = rows
    assert made is not None
    if least == 0:
        made = _padded(b, made, count, total, [tokens, out])
    made = b.call(aten.index_select.default, made, 0, back)
    made = b.call(aten.reshape.default, made, [*b.sizes(x)[:-1], out])
    return made if site.last.bias is None else b.call(aten.add.Tensor, made, site.last.bias)


def _padded(b: Builder, rows: fx.Node, count: fx.Node, wanted: fx.Node, sizes: list[Any]) -> fx.Node:
    """``count`` rows, and zeros behind them up to as many as are ``wanted``."""
    none = b.call(aten.full.default, [2], 0, dtype=torch.int64)
    more = b.call(aten.sub.Tensor, wanted, count)
    pads = b.call(aten.cat.default, [none, more, b.call(aten.full.default, [1], 0, dtype=torch.int64)])
    return b.onnx("Pad", [rows, pads], {"mode": "constant"}, [sizes], like=rows)[0]


def _part(b: Builder, site: Site, x: fx.Node, start: int, stop: int) -> fx.Node:
    """What hidden units from ``start`` to ``stop`` add to the output, for tokens ``x`` [tokens, features]."""
    units = site.last.features
    env: dict[Any, Any] = {}
    for item in site.first:
        if site.parts(item) == 1:
            env[item.node] = _product(b, item, x, item.units_axis, start, stop)
    products = {item.node: item for item in site.first}
    for node in site.inner:
        halved = half(node, units)
        if halved is not None:
            item, at = products[halved[0]], _half_of(node, units) * units
            env[node] = _product(b, item, x, item.units_axis, at + start, at + stop)
        elif node.target in (FIRST_LEARNERS, aten.reshape.default):
            env[node] = _given(b, env, node.all_input_nodes[0], units, start, stop)
        elif is_tensor(node):
            args, kwargs = fx.node.map_arg(
                (node.args, node.kwargs), lambda arg: _given(b, env, arg, units, start, stop)
            )
            with enable_python_dispatcher():  # torch's C++ cannot expand to a number of rows that the data decide
                env[node] = b.call(node.target, *args, **kwargs)
    return _product(b, site.last, env[site.last.data], 1 - site.last.units_axis, start, stop, biased=False)


def _half_of(node: fx.Node, units: int) -> int:
    """Which half of a product a node takes, 0 or 1."""
    args: Any = node.args
    return int(args[1]) if node.target is operator.getitem else int(args[2]) // units


def _given(b: Builder, env: dict[Any, Any], arg: fx.Node, units: int, start: int, stop: int) -> fx.Node:
    """An argument of a call between the products, for some of the hidden units."""
    if arg in env:
        return env[arg]  # type: ignore[no-any-return]
    if is_tensor(arg) and len(shape(arg)) > 1 and all(size == 1 for size in shape(arg)):
        return b.call(aten.reshape.default, arg, [1])  # tokens lie on fewer axes here than where it was broadcast
    if not is_tensor(arg) or not shape(arg) or expression(shape(arg)[-1]) != units:
        return arg
    flat = b.call(aten.reshape.default, arg, [units]) if len(shape(arg)) > 1 else arg
    return b.call(aten.slice.Tensor, flat, 0, start, stop)


def _product(
    b: Builder, item: Product, x: fx.Node, axis: int, start: int, stop: int, *, biased: bool = True
) -> fx.Node:
    """A product with a part of its weight, from ``start`` to ``stop`` along ``axis``."""
    weight = b.call(aten.slice.Tensor, item.weight, axis, start, stop)
    if item.units_axis == 1:
        weight = b.call(aten.transpose.int, weight, 0, 1)
    args: Sequence[Any] = (x, weight)
    if biased and item.bias is not None:
        args = (*args, b.call(aten.slice.Tensor, item.bias, 0, start, stop))
    return b.call(aten.linear.default, *args)
