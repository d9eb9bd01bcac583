"""``insert-cache``: a causal model runs on chunks of new tokens, keys and values of earlier ones kept."""

from __future__ import annotations

import operator
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, ClassVar

from torch import fx

from offramp.errors import PassError, SpecError
from offramp.passes.caches.causal import CHUNK, DATA, POSITIONAL, Causal
from offramp.passes.caches.chunks import check_chunks
from offramp.passes.caches.contents import ContentMasks, product_of
from offramp.passes.caches.incremental import LENGTHS, PLACES, Rebuilder
from offramp.passes.caches.outputs import last_places, logits_of
from offramp.passes.infra.base import Pass, PassResult
from offramp.program import ops
from offramp.program.analysis.attention import AttentionSite
from offramp.program.analysis.token_axes import Axes
from offramp.program.cache import Cache
from offramp.program.exit import Exit
from offramp.program.graph import aten, expression, read_by, results, shape, symbols
from offramp.program.program import Program

_LAYOUT = (
    aten.transpose.int,
    aten.permute.default,
    aten.expand.default,
    aten.unsqueeze.default,
    aten.reshape.default,
    aten.squeeze.dim,
)


@dataclass(frozen=True, repr=False)
class InsertCache(Pass):
    """Keys and values of earlier tokens are inputs, so that a causal model runs chunk by chunk.

    ``softmax(q k' + causal) v``  becomes  ``attention(q, k, v, key_cache, value_cache, lengths)``

    Attention is the only operator that mixes tokens in a causal model, so all else works on a chunk as it is.
    Values that depend on shapes only (position tables, rotary, biases, masks) are made for all positions up to the
    caches' capacity, and the chunk's rows are taken from them, each batch row at its own length. Masks that are
    plainly causal, or a window, are dropped; what masks say of keys by their contents is kept as keys are. What depends
    on other inputs only (keys and values of cross-attention) stays as it is: it is made once. Inputs that follow from
    the number of tokens go: padding masks (rows have lengths), causal masks, positions, and what is the same everywhere
    in the example.

    Generation reads one output: logits of each token, or of the last one alone (``x[:, -1]`` before the head). Others
    may be made from memory or mix the tokens (values pooled over them, say): they are what they were in one pass.

    Requires: a causal stack, from which an output is made that holds logits; up to that, no operator but attention
    mixes its tokens; the first axis of keys and values counts rows.
    Ensures: run in random chunks, rows apart, the program gives what it gave in one pass (to 1e-4 of the scale).
    Invalidates: nothing; names of cuts and exits stay.
    """

    name: ClassVar[str] = "insert-cache"

    def requires(self, program: Program) -> None:
        """There is a causal stack, and no cache yet."""
        if not any(stack.role == "decoder" for stack in program.require_stacks().values()):
            raise SpecError(
                f"no causal stack: {', '.join(program.stacks)} see all tokens at once",
                hint="leave insert-cache out; encoders need none",
            )
        blocks = [item for item in program.exits if item.adapter == "block"]
        if blocks and program.cache is None:
            raise SpecError(
                f"the exit after block {blocks[0].after} has a block as its adapter, which needs a cache of its own",
                hint="insert-adapter{kind=mlp}",
            )

    def run(self, program: Program) -> PassResult:
        """Rebuild the program."""
        if program.cache is not None:
            return PassResult(program, notes=("the program has caches already",))
        return _Insertion(program.without_dropout(), repr(self)).result()

    def ensures(self, before: Program, result: PassResult) -> None:
        """Chunks give what one pass gives."""
        if result.modified:
            check_chunks(before, result.program)


class _Insertion:
    """One application of the pass."""

    def __init__(self, program: Program, text: str) -> None:
        self.program, self.text, self.facts = program, text, Causal(program)
        self._check_axes()
        wanted = self.facts.example + 7
        self.capacity = wanted if self.facts.limit is None else min(wanted, self.facts.limit)
        self.builder = Rebuilder(program, text, self.facts, self.capacity)
        self.masks = ContentMasks(self.facts, self.builder, self._keyed)
        self.buffers: dict[str, str] = {}
        self.axes: dict[str, int] = {}
        self.returned: dict[str, fx.Node] = {}
        self.builder.last = last_places(self.facts)
        self.logits = logits_of(self.facts, self.builder.last)

    def result(self) -> PassResult:
        """The rebuilt program."""
        facts, graph = self.facts, self.program.graph
        hooks: dict[fx.Node, Callable[[fx.Node], fx.Node]] = {}
        after: dict[fx.Node, list[Callable[[fx.Node], None]]] = {}
        needed = self._needed()
        self.builder.loose = {node for node in graph.nodes if node not in needed}
        self.builder.mixed |= {site.output for site in facts.sites if site.output not in needed}
        sites = list(filter(facts.attends_to_tokens, [site for site in facts.sites if site.output in needed]))
        self.builder.skipped = self.masks.only(sites)
        for site in sites:
            if site.form == "sdpa":
                hooks[site.output] = partial(self._attention, site)
            else:
                self._decomposed(site, after)
                hooks |= self.masks.readers(site)
        for node in graph.find_nodes(op="call_function", target=aten.cumsum.default):
            counts = facts.kinds[node] == DATA and expression(shape(node)[node.args[1]]) == facts.tokens
            if counts and node in needed:
                hooks[node] = self._cumulative
        self.builder.build(hooks, after)
        new = {name: self.builder.value(node, "chunk") for name, node in results(graph).items()}
        self.builder.graph.output({**new, **self.returned})
        pinned = self._pinned()
        self.builder.graph.eliminate_dead_code(lambda node: node.op in ("placeholder", "output") or node.name in pinned)
        self.builder.graph.lint()
        return PassResult(self._program(), dict(self.builder.edits))

    def _pinned(self) -> frozenset[str]:
        """The names that must be in the rebuilt graph; raises where a record's are not."""
        made = {node.name for node in self.builder.graph.nodes}
        for item in self.program.records:
            if lost := [name for name in item.pinned_nodes if name not in made]:
                raise PassError(
                    f"insert-cache: the {item.kind} ({item.summary(self.program)}) needs the nodes {lost}, which "
                    "depend on positions only: they are made anew, for the whole capacity",
                    hint="insert-cache first, and the pass that adds the record after it",
                )
        return self.program.pinned

    def _check_axes(self) -> None:
        """Raise where no axis of the tokens' inputs counts rows, or what is implied has an axis of its own."""
        facts, axes = self.facts, self.program.axes
        kept = [node for node in self.program.graph.find_nodes(op="placeholder") if node not in facts.implied]
        left = {size for node in kept for size in map(expression, shape(node))}
        for node in facts.own:
            other = {size for size in map(expression, shape(node)) if size in axes.names and size != facts.tokens}
            if axes.batch is None and other and node in kept:
                raise PassError(
                    f"insert-cache: caches are kept for each row of a batch, and the rows of input {node.target} "
                    f"(axis {axes.names[min(other, key=str)]!r}) are not computed apart{self._mixed(other)}",
                    hint="leave insert-cache out, unless the model generates text: then return only what is made of "
                    "each row alone",
                )
            if own := sorted(axes.names[size] for size in other - left):
                raise PassError(
                    f"insert-cache: input {node.target} has an axis {own[0]!r} that no other input has",
                    hint="give the model masks of the tokens' own shape",
                )

    def _mixed(self, rows: set[Any]) -> str:
        """The outputs whose shapes tell that rows meet in them."""
        found = {name: [expression(size) for size in shape(node)] for name, node in results(self.program.graph).items()}
        names = [name for name, sizes in found.items() if sum(size in rows for size in sizes) != 1]
        return f": see outputs {', '.join(names)}" if names else ""

    def _needed(self) -> set[fx.Node]:
        """What generation reads the contents of: logits and scores of all exits, and what other records name."""
        names = [self.logits]
        for item in self.program.exits:
            names += [*item.scores.values(), item.outputs.get(self.logits, self.logits)]
        for record in self.program.records:
            names += [] if isinstance(record, Exit) else record.graph_outputs
        returned = results(self.program.graph)
        return read_by([returned[name] for name in names])

    def _whole(self) -> tuple[str, ...]:
        """The outputs that mix tokens, or say nothing of each: right where one chunk holds all tokens."""
        builder, returned = self.builder, results(self.program.graph)
        found = []
        for name in self.program.outputs:
            node = returned[name]
            sizes = [expression(size) for size in shape(node)]
            fixed = self.facts.kinds[node] in (POSITIONAL, CHUNK)
            pooled = self.facts.kinds[node] == DATA and self.facts.tokens not in sizes
            if name != self.logits and (fixed or pooled or builder.mixed & read_by([node])):
                found.append(name)
        return tuple(found)

    def _program(self) -> Program:
        program, facts = self.program, self.facts
        renamed = self.builder.renamed
        capacity = expression(self.builder.capacity)
        axes = Axes(
            {renamed[old]: name for old, name in program.axes.names.items() if old in renamed} | {capacity: "capacity"},
            renamed.get(program.axes.batch),
            tuple(renamed[old] for old in program.axes.tokens if old in renamed),
            {renamed[old]: limits for old, limits in program.axes.ranges.items() if old in renamed}
            | {capacity: (1, facts.limit)},
        )
        cache = Cache(
            tuple(str(node.target) for node in facts.own if node not in facts.implied),
            LENGTHS,
            PLACES,
            self.buffers,
            self.axes,
            {str(node.target): item for node, item in facts.implied.items()},
            facts.limit,
            self.logits,
            self._whole(),
        )
        kept = {name: value for name, value in program.example_inputs.items() if name not in cache.implied}
        made = replace(
            program,
            graph_module=fx.GraphModule(program.graph_module, self.builder.graph, "Program"),
            axes=axes,
            example_inputs=kept,
            history=(*program.history, self.text),
            records=(*program.records, cache),
        )
        return replace(made, example_inputs=made.fresh(kept, self.capacity))

    def _cache(self, kind: str, value: fx.Node, axis: int) -> tuple[fx.Node, str]:
        """A new input for earlier values like ``value``, and the name of the output that replaces it."""
        name = f"{kind}_cache_{sum(known.startswith(kind) for known in self.buffers)}"
        sizes = list(shape(value))
        if self.program.axes.batch is not None and expression(self.builder.batch) not in symbols(sizes[0]):
            raise self.builder.refusal("insert-cache: rows do not lie on the first axis of keys or values")
        sizes[axis] = self.builder.capacity
        self.axes[name] = axis
        self.buffers[name] = f"{name}_new"
        return self.builder.placeholder(name, sizes, value.meta["val"].dtype), self.buffers[name]

    def _attention(self, site: AttentionSite, node: fx.Node) -> fx.Node:
        """A fused attention becomes the one that keeps keys and values."""
        builder, window = self.builder, self.facts.window(site)
        query = builder.value(site.query)
        key, value = (self._ungrouped(arg) for arg in (site.key, site.value))
        if len(shape(query)) != 4:
            raise builder.refusal(f"attention over {len(shape(query))} axes; expected rows, heads, tokens, features")
        bias = None
        if window is None:
            contents, mask = self.facts.contents(site), site.masks[0].node
            wanted = [*shape(query)[:-1], builder.capacity]
            bias = self.masks.bias(mask, contents[mask]) if contents else builder.aligned(builder.value(mask), wanted)
        places = builder.places(shape(query)[0])  # of each row: heads, where the model counts rows and heads together
        if places > 1:
            query, key, value = (self._regrouped(item, places, 1) for item in (query, key, value))
            bias = bias if bias is None or expression(shape(bias)[0]) == 1 else self._regrouped(bias, places, 1)
        keys, values = self._cache("key", key, 2), self._cache("value", value, 2)
        lengths = builder.inputs[LENGTHS]
        called = builder.call(
            ops.ATTENTION, query, key, value, keys[0], values[0], lengths, bias, site.scale, window or 0
        )
        builder.edits["replaced"] += 1
        for at, (_, output) in enumerate((keys, values), 1):
            self.returned[output] = builder.call(operator.getitem, called, at)
        if places == 1:
            return builder.call(operator.getitem, called, 0, name=node.name)
        return self._regrouped(builder.call(operator.getitem, called, 0), 1, places, name=node.name)

    def _regrouped(self, node: fx.Node, old: int, new: int, name: str | None = None) -> fx.Node:
        """[old * rows, heads, tokens, features] as [new * rows, heads * old / new, tokens, features]."""
        builder, (_, heads, _, features) = self.builder, shape(node)
        rows = builder.sizer(builder.batch)
        rows = rows if new == 1 else builder.call(operator.mul, rows, new)
        last = builder.sizer(features) if expression(features) == expression(builder.capacity) else int(features)
        sizes = [rows, int(heads) * old // new, builder.sizer(builder.chunk), last]
        return builder.call(aten.reshape.default, node, sizes, name=name)

    def _keyed(self, value: fx.Node, axis: int) -> fx.Node:
        """What a mask says of keys, those of earlier tokens too."""
        cache, output = self._cache("mask", value, axis)
        self.returned[output] = whole = self.builder.appended(value, axis, cache)
        return whole

    def _ungrouped(self, node: fx.Node) -> fx.Node:
        """Keys or values before they are repeated for every query head of a group."""
        spread = node.args[0] if node.target is aten.reshape.default else None
        if isinstance(spread, fx.Node) and spread.target is aten.expand.default:
            inner = spread.args[0]
            if isinstance(inner, fx.Node) and inner.target is aten.unsqueeze.default and inner.args[1] in (2, -3):
                return self.builder.value(inner.args[0])  # type: ignore[arg-type]
        return self.builder.value(node)

    def _decomposed(self, site: AttentionSite, after: dict[fx.Node, list[Callable[[fx.Node], None]]]) -> None:
        """Keys and values are appended; all between them stays as it is, with the capacity as the axis of keys."""
        for operand, reader, kind in ((site.key, product_of(site), "key"), (site.value, site.output, "value")):
            start, path = self._append_point(operand)
            after.setdefault(start, []).append(partial(self._append, [*path, reader][0], kind))

    def _append(self, reader: fx.Node, kind: str, node: fx.Node) -> None:
        builder = self.builder
        new = builder.value(node)
        axes = [i for i, size in enumerate(shape(new)) if expression(size) == expression(builder.chunk)]
        if len(axes) != 1:
            raise builder.refusal("keys or values have no axis of tokens")
        cache, output = self._cache(kind, new, axes[0])
        self.returned[output] = builder.edges[reader, node] = builder.appended(new, axes[0], cache)

    def _cumulative(self, node: fx.Node) -> fx.Node:
        """A sum over all tokens so far: its terms are kept, and summed again."""
        builder = self.builder
        new, axis = builder.value(node.args[0]), int(node.args[1])  # type: ignore[arg-type]
        if len(shape(new)) != 2:
            raise builder.refusal("a cumulative sum over more than rows and tokens")
        cache, output = self._cache("sum", new, axis)
        whole = self.returned[output] = builder.appended(new, axis, cache)
        total = builder.call(aten.cumsum.default, whole, axis)
        return builder.call(aten.gather.default, total, axis, builder.positions(), name=node.name)

    def _append_point(self, operand: fx.Node) -> tuple[fx.Node, list[fx.Node]]:
        """Where keys or values are appended: up the views of the operand, to rows, heads, tokens, features."""
        batch = self.program.axes.batch
        path: list[fx.Node] = []
        best: tuple[fx.Node, list[fx.Node]] | None = None
        node = operand
        while True:
            sizes = [expression(size) for size in shape(node)]
            if len(sizes) == 4 and sizes[0] == batch and sizes[2] == self.facts.tokens:
                best = node, list(path)
            above = node.args[0] if node.target in _LAYOUT else None
            if not isinstance(above, fx.Node) or len(above.users) > 1 or self.facts.kinds[above] != DATA:
                break
            path.insert(0, node)
            node = above
        return best or (operand, [])
