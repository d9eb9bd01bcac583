"""What mixes tokens gets a cache: attention keeps keys and values, a cumulative sum its terms."""

from __future__ import annotations

import operator
from collections import Counter
from collections.abc import Callable, Iterable
from functools import partial

from torch import fx

from offramp.passes.caches.causal import Causal
from offramp.passes.caches.chunk_graph import LENGTHS
from offramp.passes.caches.content_masks import ContentMasks, product_of
from offramp.passes.caches.incremental import Rebuilder
from offramp.passes.caches.kinds import DATA
from offramp.program import ops
from offramp.program.analysis.attention import AttentionSite
from offramp.program.graph import aten, expression, shape, sizes_of, symbols

_LAYOUT = (
    aten.transpose.int,
    aten.permute.default,
    aten.expand.default,
    aten.unsqueeze.default,
    aten.reshape.default,
    aten.squeeze.dim,
)


class CachedSites:
    """The caches of a program that is rebuilt: ``buffers`` and ``axes`` as in ``Cache``, ``returned`` by output.

    ``hooks`` and ``after`` are what `Rebuilder.build` takes, once `visit` has seen what mixes tokens.
    """

    def __init__(self, facts: Causal, builder: Rebuilder) -> None:
        self.facts, self.builder, self.new = facts, builder, builder.new
        self.masks = ContentMasks(facts, builder, self._keyed)
        self.buffers: dict[str, str] = {}
        self.axes: dict[str, int] = {}
        self.returned: dict[str, fx.Node] = {}
        self.hooks: dict[fx.Node, Callable[[fx.Node], fx.Node]] = {}
        self.after: dict[fx.Node, list[Callable[[fx.Node], None]]] = {}
        self._counts: Counter[str] = Counter()

    def visit(self, sites: Iterable[AttentionSite], sums: Iterable[fx.Node]) -> None:
        """Plan a cache for each of these attentions and cumulative sums over tokens."""
        sites = list(sites)
        self.builder.skipped = self.masks.only(sites)
        for site in sites:
            if site.form == "sdpa":
                self.hooks[site.output] = partial(self._attention, site)
            else:
                self._decomposed(site)
                self.hooks |= self.masks.readers(site)
        for node in sums:
            self.hooks[node] = self._cumulative

    def _cache(self, kind: str, value: fx.Node, axis: int) -> tuple[fx.Node, str]:
        """A new input for earlier values like ``value``, and the name of the output that replaces it."""
        name = f"{kind}_cache_{self._counts[kind]}"
        self._counts[kind] += 1
        sizes = list(shape(value))
        if self.facts.program.axes.batch is not None and expression(self.new.batch) not in symbols(sizes[0]):
            raise self.new.refusal("insert-cache: rows do not lie on the first axis of keys or values")
        sizes[axis] = self.new.capacity
        self.axes[name] = axis
        self.buffers[name] = f"{name}_new"
        return self.new.placeholder(name, sizes, value.meta["val"].dtype), self.buffers[name]

    def _keyed(self, value: fx.Node, axis: int) -> fx.Node:
        """What a mask says of keys, those of earlier tokens too."""
        cache, output = self._cache("mask", value, axis)
        self.returned[output] = whole = self.new.appended(value, axis, cache)
        return whole

    def _attention(self, site: AttentionSite, node: fx.Node) -> fx.Node:
        """A fused attention becomes the one that keeps keys and values."""
        builder, new, window = self.builder, self.new, self.facts.window(site)
        query = builder.value(site.query)
        key, value = (self._ungrouped(arg) for arg in (site.key, site.value))
        if len(shape(query)) != 4:
            raise new.refusal(f"attention over {len(shape(query))} axes; expected rows, heads, tokens, features")
        bias = self._bias(site, query) if window is None else None
        places = new.places(shape(query)[0])  # of each row: heads, where the model counts rows and heads together
        if places > 1:
            query, key, value = (self._regrouped(item, places, 1) for item in (query, key, value))
            bias = bias if bias is None or expression(shape(bias)[0]) == 1 else self._regrouped(bias, places, 1)
        keys, values = self._cache("key", key, 2), self._cache("value", value, 2)
        given = (query, key, value, keys[0], values[0], new.inputs[LENGTHS], bias, site.scale, window or 0)
        called = new.call(ops.ATTENTION, *given, *([False] if self.facts.together(site) else []))
        new.edits["replaced"] += 1
        for at, (_, output) in enumerate((keys, values), 1):
            self.returned[output] = new.call(operator.getitem, called, at)
        if places == 1:
            return new.call(operator.getitem, called, 0, name=node.name)
        return self._regrouped(new.call(operator.getitem, called, 0), 1, places, name=node.name)

    def _bias(self, site: AttentionSite, query: fx.Node) -> fx.Node:
        """The mask of a fused attention for the chunk's queries."""
        contents, mask = self.facts.contents(site), site.masks[0].node
        if contents:
            return self.masks.bias(mask, contents[mask])
        return self.builder.rows.aligned(self.builder.value(mask), [*shape(query)[:-1], self.new.capacity])

    def _regrouped(self, node: fx.Node, old: int, new: int, name: str | None = None) -> fx.Node:
        """[old * rows, heads, tokens, features] as [new * rows, heads * old / new, tokens, features]."""
        graph, (_, heads, _, features) = self.new, shape(node)
        rows = graph.sizer(graph.batch)
        rows = rows if new == 1 else graph.call(operator.mul, rows, new)
        last = graph.sizer(features) if expression(features) == expression(graph.capacity) else int(features)
        sizes = [rows, int(heads) * old // new, graph.sizer(graph.chunk), last]
        return graph.call(aten.reshape.default, node, sizes, name=name)

    def _ungrouped(self, node: fx.Node) -> fx.Node:
        """Keys or values before they are repeated for every query head of a group."""
        spread = node.args[0] if node.target is aten.reshape.default else None
        if isinstance(spread, fx.Node) and spread.target is aten.expand.default:
            inner = spread.args[0]
            if isinstance(inner, fx.Node) and inner.target is aten.unsqueeze.default and inner.args[1] in (2, -3):
                return self.builder.value(inner.args[0])  # type: ignore[arg-type]
        return self.builder.value(node)

    def _decomposed(self, site: AttentionSite) -> None:
        """Keys and values are appended; all between them stays as it is, with the capacity as the axis of keys."""
        for operand, reader, kind in ((site.key, product_of(site), "key"), (site.value, site.output, "value")):
            start, path = self._append_point(operand)
            self.after.setdefault(start, []).append(partial(self._append, [*path, reader][0], kind))

    def _append(self, reader: fx.Node, kind: str, node: fx.Node) -> None:
        value = self.builder.value(node)
        axes = [i for i, size in enumerate(shape(value)) if expression(size) == expression(self.new.chunk)]
        if len(axes) != 1:
            raise self.new.refusal("keys or values have no axis of tokens")
        cache, output = self._cache(kind, value, axes[0])
        self.returned[output] = self.builder.edges[reader, node] = self.new.appended(value, axes[0], cache)

    def _append_point(self, operand: fx.Node) -> tuple[fx.Node, list[fx.Node]]:
        """Where keys or values are appended: up the views of the operand, to rows, heads, tokens, features."""
        batch = self.facts.program.axes.batch
        path: list[fx.Node] = []
        best: tuple[fx.Node, list[fx.Node]] | None = None
        node = operand
        while True:
            sizes = sizes_of(node)
            if len(sizes) == 4 and sizes[0] == batch and sizes[2] == self.facts.tokens:
                best = node, list(path)
            above = node.args[0] if node.target in _LAYOUT else None
            if not isinstance(above, fx.Node) or len(above.users) > 1 or self.facts.kinds[above] != DATA:
                break
            path.insert(0, node)
            node = above
        return best or (operand, [])

    def _cumulative(self, node: fx.Node) -> fx.Node:
        """A sum over all tokens so far: its terms are kept, and summed again."""
        new = self.new
        value, axis = self.builder.value(node.args[0]), int(node.args[1])  # type: ignore[arg-type]
        if len(shape(value)) != 2:
            raise new.refusal("a cumulative sum over more than rows and tokens")
        cache, output = self._cache("sum", value, axis)
        whole = self.returned[output] = new.appended(value, axis, cache)
        total = new.call(aten.cumsum.default, whole, axis, **node.kwargs)  # type: ignore[arg-type]
        return new.call(aten.gather.default, total, axis, self.builder.rows.positions(), name=node.name)
