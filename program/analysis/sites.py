"""Sites: the products with weights in a block, by what they do together.

An MLP is two products with an activation of its hidden units between them, one by one; in a gated one two products
with the same input are multiplied. Around an attention lie the projections of its queries, keys and values, and of
what it gives. All are found by what reads what: module paths and names say nothing here.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import fx

from offramp.program.analysis.attention import AttentionSite
from offramp.program.analysis.attention_search import attention_sites
from offramp.program.analysis.products import Product, hint, numel, product
from offramp.program.graph import (
    ancestors,
    aten,
    attribute,
    data_inputs,
    expression,
    is_pointwise,
    is_tensor,
    read_by,
    shape,
    weights,
)
from offramp.program.ops import ATTENTION, FIRST_LEARNERS

#: "qkv" and "kv" are products that make several at once.
KINDS = ("mlp", "query", "key", "value", "qkv", "kv", "output")

#: They neither mix features nor make new ones; what lies along the last axis before, does so behind them.
_SAME_FEATURES = (aten.reshape.default, aten.dropout.default, aten._to_copy.default, aten.clone.default)
_SPLITS = (aten.split.Tensor, aten.split_with_sizes.default, aten.chunk.default)
#: They change values one by one, and torch's own tags do not say so.
_UNIT_BY_UNIT = (aten.hardswish.default, aten.log_sigmoid.default)
_LINEAR = (aten.mul.Scalar, aten.div.Scalar, aten.add.Scalar, aten.sub.Scalar, aten.neg.default, *_SAME_FEATURES)


@dataclass(frozen=True)
class Site:
    """Products of one block that do one thing.

    ``kind`` is one of `KINDS`. ``first`` are the products that read ``input``: one, or two in a gated MLP (or one that
    makes both halves); of a projection the only one. ``inner`` are the nodes between them and ``last``, in graph order,
    which change hidden units one by one (none in a projection, whose ``last`` is its ``first``).
    """

    kind: str
    first: tuple[Product, ...]
    inner: tuple[fx.Node, ...]
    last: Product

    @property
    def input(self) -> fx.Node:
        """The value that the first products read."""
        return self.first[0].data

    @property
    def output(self) -> fx.Node:
        """The last product."""
        return self.last.node

    @property
    def gated(self) -> bool:
        """Whether two products are multiplied."""
        return sum(map(self.parts, self.first)) > 1

    @property
    def split(self) -> bool:
        """Whether it has learners."""
        return any(node.target is FIRST_LEARNERS for node in self.inner)

    def parts(self, item: Product) -> int:
        """How many times the hidden units are among what a first product makes."""
        return item.units // self.last.features if self.inner else 1

    @cached_property
    def products(self) -> tuple[Product, ...]:
        """All products, each once."""
        return tuple({item.node: item for item in (*self.first, self.last)}.values())

    @property
    def parameters(self) -> int:
        """How many numbers its weights and biases hold."""
        held = {w for item in self.products for w in (item.weight, item.bias) if w is not None}
        return sum(math.prod(map(int, shape(weight))) for weight in held)

    @property
    def flops(self) -> int:
        """Floating-point operations of its products on the example inputs: two for each weight and token."""
        return sum(2 * numel(item.node) * item.features for item in self.products)

    @property
    def token_flops(self) -> int:
        """Floating-point operations of its products for one token."""
        return sum(2 * item.units * item.features for item in self.products)

    @property
    def residual(self) -> bool:
        """Whether the output, normalised perhaps, goes into sums with other values, and nowhere else."""
        own, joins = {self.output}, list[fx.Node]()
        for node in self.output.graph.nodes:
            given = data_inputs(node)
            if own.isdisjoint(given):
                continue
            if all(arg in own or not _of_inputs(arg) for arg in given):
                own.add(node)
            else:
                joins.append(node)
        return bool(joins) and all(node.target is aten.add.Tensor for node in joins)

    def importance(self, module: torch.nn.Module) -> torch.Tensor:
        """How much each hidden unit weighs, [units]: what it reads in each first product, times what it writes."""

        def norms(item: Product, axis: int) -> torch.Tensor:
            weight = attribute(module, str(item.weight.target)).detach().float()
            found: torch.Tensor = torch.linalg.vector_norm(weight, dim=1 - axis)
            return found.reshape(-1, self.last.features).prod(0)

        weighs = norms(self.last, 1 - self.last.units_axis)
        for item in self.first:
            weighs = weighs * norms(item, item.units_axis)
        return weighs


def attentions(graph: fx.Graph) -> list[AttentionSite]:
    """The attentions of a graph, those that keep a cache too."""
    found = attention_sites(graph)
    for node in graph.find_nodes(op="call_function", target=ATTENTION):
        query, key, value, *rest = list[Any](node.args)
        found.append(AttentionSite("sdpa", query, key, value, (), float(rest[4]), None, True, node, node, -2, -1))
    return found


def find_sites(block: Sequence[fx.Node], mixing: Sequence[AttentionSite]) -> list[Site]:
    """The sites among the nodes of a block, in graph order; products that belong to none are left out."""
    products = _products(block)
    sites, taken = list[Site](), set[fx.Node]()
    for item in products.values():
        mlp = _mlp(item, products)
        if mlp is not None and taken.isdisjoint(each.node for each in mlp.products):
            sites.append(mlp)
            taken |= {each.node for each in mlp.products}
    for item in products.values():
        kind = None if item.node in taken else _projection(item, block, mixing, products)
        if kind is not None:
            sites.append(Site(kind, (item,), (), item))
    order = {node: place for place, node in enumerate(block)}
    return sorted(sites, key=lambda site: order[site.output])


def mlp(last: fx.Node) -> Site | None:
    """The MLP that ends in a product, None if it ends none."""
    products = _products(last.graph.nodes)
    return _mlp(products[last], products) if last in products else None


def unmatched(
    block: Sequence[fx.Node], state: fx.Node, sites: Sequence[Site]
) -> Iterator[tuple[fx.Node, fx.Node | None]]:
    """Products of a block that read hidden units of others and make no MLP with them, the sites being all it has.

    With each comes what meets the units and does not change them one by one, or reads them beside the product; None
    where nothing does. ``state`` is what enters the block: what reads that is no last product of an MLP.
    """
    products = _products(block)
    left = products.keys() - {item.node for site in sites for item in site.products}
    for item in (products[node] for node in products if node in left):
        first, inner, odd = _reached(item, products)
        if state in (*inner, *odd):
            continue
        first.sort(key=lambda each: (-numel(each.data), block.index(each.node)))
        odd += [each.node for each in first if each.data is not first[0].data or each.units != item.features]
        seen = {node: ancestors([node], stop=products) for node in odd}
        mixing = [node for node, made_of in seen.items() if state not in made_of and not left.isdisjoint(made_of)]
        if mixing or any(each.node in left and each.units == item.features for each in first):
            inside = {item.node, *inner, *(each.node for each in first)}
            others = [user for node in inside - {item.node} for user in node.users if user not in inside]
            yield item.node, next(iter([*odd, *others]), None)


def block_flops(block: Sequence[fx.Node], mixing: Sequence[AttentionSite]) -> int:
    """Floating-point operations of a block's products and attentions on the example inputs; the rest is small."""
    total = sum(2 * numel(node) * item.features for node in block if (item := product(node)) is not None)
    inside = set(block)
    for site in mixing:
        if site.weights in inside:
            keys = hint(site.token_sizes[1])
            features = hint(shape(site.query)[-1]) + hint(shape(site.value)[-1])
            total += 2 * numel(site.query) // hint(shape(site.query)[-1]) * keys * features
    return total


def _products(nodes: Iterable[fx.Node]) -> dict[fx.Node, Product]:
    return {node: found for node in nodes if (found := product(node)) is not None}


def _mlp(last: Product, products: dict[fx.Node, Product]) -> Site | None:
    """The MLP that ends in a product."""
    found = _units(last, products)
    if found is None:
        return None
    first, inner = found
    parts = sorted(item.units / last.features for item in first)
    active = any(node.target not in _LINEAR for node in inner)
    if parts not in ([1], [1, 1], [2]) or len({item.data for item in first}) > 1 or not active:
        return None
    return Site("mlp", tuple(first), tuple(inner), last)


def _units(last: Product, products: dict[fx.Node, Product]) -> tuple[list[Product], list[fx.Node]] | None:
    """The products whose values become what ``last`` reads, unit by unit, and the nodes on the way; None if any mix."""
    first, inner, odd = _reached(last, products)
    inside = {*inner, *(item.node for item in first)}
    if odd or any(user not in inside and user is not last.node for node in inside for user in node.users):
        return None
    order = {node: place for place, node in enumerate(last.node.graph.nodes)}
    return sorted(first, key=lambda item: order[item.node]), sorted(inner, key=order.__getitem__)


def _reached(last: Product, products: dict[fx.Node, Product]) -> tuple[list[Product], list[fx.Node], list[fx.Node]]:
    """From what ``last`` reads back to other products: these, the nodes on the way, and those that mix units."""
    first, inner, odd = list[Product](), list[fx.Node](), list[fx.Node]()
    todo, seen = [last.data], set[fx.Node]()
    while todo:
        node = todo.pop()
        if node in seen:
            continue
        seen.add(node)
        if node in products:
            first.append(products[node])
        elif is_tensor(node) and numel(node) == 1 and not _of_inputs(node):
            continue  # a number that is made of weights, a slope say
        elif (halved := half(node, last.features)) is not None:
            inner += halved[1:]
            todo.append(halved[0])
        elif not _by_unit(node, last.features):
            odd.append(node)
        else:
            inner.append(node)
            todo += _hidden(node)
    return first, inner, odd


def _by_unit(node: fx.Node, units: int) -> bool:
    """Whether a call changes values along the last axis one by one."""
    if node.op != "call_function" or not is_tensor(node) or not shape(node) or expression(shape(node)[-1]) != units:
        return False
    if any(numel(weight) not in (1, shape(weight)[-1]) for weight in weights(node) if shape(weight)):
        return False
    if node.target in _SAME_FEATURES:
        return all(expression(shape(arg)[-1]) == units for arg in data_inputs(node))
    if node.target is FIRST_LEARNERS:
        return True
    if node.target is aten.prelu.default:  # of several slopes each is for a place along axis 1
        return all(shape(weight) == (1,) for weight in weights(node))
    return (is_pointwise(node) or node.target in _UNIT_BY_UNIT) and bool(data_inputs(node))


def _hidden(node: fx.Node) -> list[fx.Node]:
    """The hidden units that a call changes one by one; what a gate says of them are none."""
    return list(node.all_input_nodes[:1]) if node.target is FIRST_LEARNERS else data_inputs(node)


def half(node: fx.Node, units: int) -> list[fx.Node] | None:
    """What a node is a half of, along the last axis, and the nodes that take it, itself last; None if it is none."""
    args: list[Any] = list(node.args)
    halves = [node]
    if node.target is operator.getitem and args[0].target in _SPLITS:
        halves, args = [args[0], node], list(args[0].args)
        sizes = [expression(value.shape[-1]) for value in halves[0].meta["val"]]
    elif node.target is aten.slice.Tensor and args[2:3] in ([0], [units]) and args[4:] in ([], [1]):
        sizes = [units, units] if expression(shape(node)[-1]) == units else []
        args = [args[0], None, args[1]]
    else:
        return None
    axis, rank = args[2] if len(args) > 2 else 0, len(shape(args[0]))
    if sizes != [units, units] or axis % rank != rank - 1 or expression(shape(args[0])[-1]) != 2 * units:
        return None
    return [args[0], *halves]


def _projection(
    item: Product, block: Sequence[fx.Node], mixing: Sequence[AttentionSite], products: dict[fx.Node, Product]
) -> str | None:
    """Which of the projections around an attention of the block a product is; None if it is none."""
    inside, others = set(block), products.keys() - {item.node}
    made: list[str] = []
    for site in mixing:
        if site.weights in inside:
            if site.output in ancestors([item.data], stop=others):
                return "output"
            parts = {"query": site.query, "key": site.key, "value": site.value}
            made += [kind for kind, node in parts.items() if item.node in ancestors([node], stop=others)]
    several = "".join(kind[0] for kind in ("query", "key", "value") if kind in made)
    return made[0] if len(several) == 1 else several if several in KINDS else None


def _of_inputs(node: fx.Node) -> bool:
    """Whether a value depends on what the model is given."""
    return any(arg.op == "placeholder" for arg in read_by([node]))
