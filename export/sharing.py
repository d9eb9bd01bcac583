"""Sharing: the values that several segments read, and that are made once and passed on."""

from __future__ import annotations

import operator
from collections import Counter
from collections.abc import Iterable
from typing import Any

from torch import fx

from offramp.export.dataflow import Dataflow
from offramp.export.lowering.merged_products import merged
from offramp.export.requests import Request
from offramp.export.subgraph import made_by
from offramp.program.graph import (
    ancestors,
    aten,
    dependents,
    expression,
    is_symint,
    is_tensor,
    placeholders,
    read_by,
    shape,
    sizes_of,
    symbols,
)

#: What takes a part of a weight, or turns it round.
_VIEWS = (
    operator.getitem,
    aten.split_with_sizes.default,
    aten.split.Tensor,
    aten.chunk.default,
    aten.slice.Tensor,
    aten.select.int,
    aten.permute.default,
    aten.transpose.int,
    aten.t.default,
)


def shared_values(flow: Dataflow, requests: Iterable[Request]) -> set[fx.Node]:
    """Values that several requests need, that no stack's inside goes into, and that are worth passing on."""
    counts = Counter(node for request in requests for node in made_by(request.outputs, request.stop))
    shared = {node for node, count in counts.items() if count > 1}
    if flow.program.cache is not None:
        chunked = flow.chunked  # what chunks read and do not change is made once
        shared |= {arg for node in counts if node in chunked for arg in node.all_input_nodes if arg in counts}
        shared = {node for node in shared if node not in chunked or counts[node] > 1}
        shared -= (shared & chunked) - _taken_along(flow, shared & chunked)
    shared = {node for node in shared if flow.level[node] is not None and is_tensor(node)}
    return {node for node in shared if not merged(node) and not _of_weight(node) and not _trivial(flow, node)}


def _of_weight(node: Any) -> bool:
    """Whether a value is a part of a weight, or one turned round: to a product it is a weight only where it is made."""
    while node.op == "call_function" and node.target in _VIEWS and len(node.all_input_nodes) == 1:
        node = node.args[0]
    return bool(node.op == "get_attr")


def _taken_along(flow: Dataflow, nodes: Iterable[fx.Node]) -> set[fx.Node]:
    """The values of chunks that are made once, and go with their tokens where these wait.

    Such a value has rows and tokens on its first two axes; a view that begins otherwise (``[rows, heads, tokens,
    features]``) is made where it is used. So is what depends on lengths, of which each part has its own, unless that is
    by way of caches (behind attention); and what depends on nothing but the chunk's size.
    """
    program, graph = flow.program, flow.program.graph
    cache, inputs = program.cache, placeholders(graph)
    assert cache is not None
    tokens = expression(shape(inputs[cache.tokens[0]])[program.chunk_axis])
    (capacity,) = sizes_of(inputs[cache.places])
    first = [1 if program.axes.batch is None else program.axes.batch, tokens]
    counting = dependents([inputs[cache.lengths]], graph) - dependents([inputs[name] for name in cache.buffers], graph)
    own = dependents(inputs.values(), graph) - counting
    found = set[fx.Node]()
    for node in (node for node in nodes if is_tensor(node) and node in own):
        sizes = sizes_of(node)
        if sizes[:2] == first and all({tokens, capacity}.isdisjoint(symbols(size)) for size in sizes[2:]):
            found.add(node)
    return found


def _trivial(flow: Dataflow, node: fx.Node) -> bool:
    """Whether a value is made where it is used: constants of one element, and positions in the batch.

    The latter (``arange`` over the rows, say) would be wrong for rows that are left when others have gone.
    """
    if any(arg.op == "placeholder" for arg in read_by([node])):
        return False
    sizes = [arg.meta["val"] for arg in ancestors([node]) if is_symint(arg)]
    by_rows = any(flow.program.axes.batch in symbols(size) for size in sizes)
    return by_rows or all(isinstance(expression(size), int) and size == 1 for size in shape(node))
