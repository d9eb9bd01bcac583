"""What look-ups in tables ask of a program's inputs: which numbers they hold, and how many places an axis has."""

from __future__ import annotations

import operator
from bisect import bisect_left
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, NamedTuple

import torch
from torch import fx

from offramp.program.graph import (
    ancestors,
    aten,
    data_inputs,
    expression,
    is_symint,
    is_tensor,
    placeholders,
    read_by,
    shape,
    symbols,
)
from offramp.program.program import Program, evaluate
from offramp.program.sizes import resized

#: A table's places by numbers from 0 on; `aten.index.Tensor` counts those below 0 from the table's end.
_FROM_0 = (aten.index_select.default, aten.gather.default, aten.scatter.src, aten.scatter.value)
#: What they read of their first argument arrives as it is.
_PASSING = frozenset(
    {
        *(aten.reshape.default, aten.view.default, aten._unsafe_view.default, aten.expand.default),
        *(aten.unsqueeze.default, aten.squeeze.default, aten.squeeze.dim, aten.squeeze.dims),
        *(aten.permute.default, aten.transpose.int, aten.t.default, aten.slice.Tensor, aten.select.int),
        *(aten.split.Tensor, aten.split_with_sizes.default, aten.chunk.default, aten.unbind.int, operator.getitem),
        *(aten._to_copy.default, aten.clone.default, aten.alias.default, aten.detach.default),
    }
)
_IDS = (torch.int32, torch.int64)
_LARGEST = 1 << 22  # numbers of an index that are looked at to know how long an axis may be
_FURTHER = 4  # positions may go up by less than 1 with each place: lengths that are tried, by rows of the table


class Lookup(NamedTuple):
    """A table whose rows along ``axis`` are looked up: ``numbers`` are from ``least`` to ``greatest``."""

    numbers: fx.Node
    least: int
    greatest: int


def lookups(graph: fx.Graph) -> Iterator[Lookup]:
    """All look-ups in tables of a known number of rows."""
    for node in graph.nodes:
        for table, axis, index, from_0 in looked_up(node):
            rows = expression(shape(table)[axis]) if is_tensor(table) and is_tensor(index) else None
            if isinstance(rows, int) and index.meta["val"].dtype in _IDS:
                yield Lookup(index, 0 if from_0 else -rows, rows - 1)


def known_ids(program: Program, also: Mapping[str, str]) -> dict[str, tuple[int, int]]:
    """The least and the greatest number that an input may hold, of those that are looked up as they are.

    Of an input whose parts are looked up in several tables it is what none of its places may be outside of. Nothing is
    said of one that has a place that is looked up in no table, or not as it is: an offset is added, some are masked.
    ``also`` are further nodes of the graph that hold inputs, by name.
    """
    nodes, found, graph = placeholders(program.graph), dict[str, tuple[int, int]](), list(lookups(program.graph))
    for name in program.inputs:
        limits = [
            limit
            for node in (nodes[name], *(nodes[other] for other, of in also.items() if of == name))
            if (limit := _limits(program, node, graph)) is not None
        ]
        if limits:
            found[name] = max(least for least, _ in limits), min(greatest for _, greatest in limits)
    return found


def _limits(program: Program, node: fx.Node, known: Iterable[Lookup]) -> tuple[int, int] | None:
    """The limits of one node of the graph's inputs."""
    example = program.example_inputs[str(node.target)]
    if node.meta["val"].dtype.is_floating_point or node.meta["val"].dtype == torch.bool or not example.numel():
        return None
    same = _as_they_are(program.graph, node)
    reading = [item for item in known if item.numbers in same]
    # which places of the input arrive at a table: each has its number
    places = torch.arange(example.numel()).reshape(example.shape)
    read = evaluate(
        program.graph_module,
        {item.numbers for item in reading},
        {**program.example_inputs, str(node.target): places},
    )
    least = torch.full([example.numel()], torch.iinfo(torch.int64).min)
    greatest = torch.full([example.numel()], torch.iinfo(torch.int64).max)
    for item in reading:
        at = read[item.numbers].flatten().long()
        least[at] = least[at].clamp(min=item.least)
        greatest[at] = greatest[at].clamp(max=item.greatest)
    if bool((greatest == torch.iinfo(torch.int64).max).any()):
        return None
    return int(least.min()), int(greatest.max())


def _as_they_are(graph: fx.Graph, node: fx.Node) -> set[fx.Node]:
    """The nodes that hold numbers of ``node`` and nothing else, in whatever order."""
    same = {node}
    for each in graph.nodes:
        passing = each.target in _PASSING and (not is_tensor(each) or each.meta["val"].dtype in _IDS)
        if passing and same.issuperset(read := data_inputs(each)) and len(read) == 1:
            same.add(each)
    return same


def longest(program: Program) -> dict[Any, int]:
    """How many places an axis of inputs may have at most, by its symbol, for the positions that are looked up.

    Positions are what follows from the length of one axis, whatever inputs hold.
    """
    found = dict[Any, int]()
    for item in lookups(program.graph):
        behind = ancestors([item.numbers])
        if any(node.op == "placeholder" for node in read_by([item.numbers])):
            continue
        sizes = {symbol for node in behind if is_symint(node) for symbol in symbols(node.meta["val"])}
        own = [symbol for symbol in sizes if symbol in program.axes.names and symbol != program.axes.batch]
        if len(own) == 1 and sizes <= {own[0], program.axes.batch}:
            limit = _longest(program, item, own[0])
            if limit is not None:
                found[own[0]] = min(limit, found.get(own[0], limit))
    return found


def _longest(program: Program, item: Lookup, axis: Any) -> int | None:
    """How long an axis may be for one look-up; None where that is not known, or where any length will do."""

    def beyond(size: int) -> int:
        """By how much the greatest number of the index is too great."""
        inputs = {**program.example_inputs, **resized(program, {axis: size})}
        return int(evaluate(program.graph_module, [item.numbers], inputs)[item.numbers].max()) - item.greatest

    along = sum(axis in symbols(dimension) for dimension in shape(item.numbers))
    most = (item.greatest + 2) * (1 if along > 1 else _FURTHER)
    if most ** max(along, 1) > _LARGEST:
        return None
    try:
        fits = [bool(beyond(size) <= 0) for size in (1, most)]
        found = bisect_left(range(most + 1), True, 2, key=lambda size: beyond(size) > 0) - 1
    except (RuntimeError, IndexError, ValueError):  # the axis cannot have such lengths
        return None
    return found if fits == [True, False] else None


def looked_up(node: fx.Node) -> Iterator[tuple[Any, int, Any, bool]]:
    """Tables that a node reads or writes: axis and index, and whether places are counted from 0 on alone."""
    args: Any = node.args
    if node.target is aten.embedding.default:
        yield args[0], 0, args[1], True
    elif node.target in _FROM_0:
        yield args[0], int(args[1]), args[2], True
    elif node.target is aten.index.Tensor:
        given = [(axis, index) for axis, index in enumerate(args[1]) if index is not None]
        if all(index.meta["val"].dtype != torch.bool for _, index in given):  # which stands for several axes
            for axis, index in given:
                yield args[0], axis, index, False
