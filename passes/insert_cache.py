"""``insert-cache``: a causal model runs on chunks of new tokens, keys and values of earlier ones kept."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, ClassVar

from torch import fx

from offramp.bundle.expressions import evaluate
from offramp.bundle.manifest import Prompt
from offramp.errors import PassError, SpecError
from offramp.passes.caches.ahead import with_places_ahead
from offramp.passes.caches.cached_sites import CachedSites
from offramp.passes.caches.causal import Causal
from offramp.passes.caches.chunk_graph import LENGTHS, PLACES, PROMPT_LENGTHS
from offramp.passes.caches.chunks import check_chunks
from offramp.passes.caches.incremental import Rebuilder
from offramp.passes.caches.joins import Joins
from offramp.passes.caches.kinds import CHUNK, DATA, POSITIONAL
from offramp.passes.caches.outputs import last_places, logits_of
from offramp.passes.caches.unknown_rows import without_unknown_rows
from offramp.passes.infra.contract import Pass, PassResult
from offramp.program.analysis.token_axes import Axes
from offramp.program.cache import Cache
from offramp.program.exit import Exit
from offramp.program.graph import aten, expression, read_by, results, shape, sizes_of
from offramp.program.program import Program


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

    Features that the model joins before its text (``cat(image, embed(ids))``) are put among tokens too: in the graph
    the ids have a place in front for each of them, which a bundle's user leaves out as before.

    Generation reads one output: logits of each token, or of the last one alone (``x[:, -1]`` before the head). Others
    may be made from memory or mix the tokens (values pooled over them, say): they are what they were in one pass. One
    of which only a run tells how many rows it has (``features[mask]``) is left out, where that lets rows be apart.

    A program that has caches is left as it is.

    Requires: a causal stack, from which an output is made that holds logits; up to that, no operator but attention
    mixes its tokens; the first axis of keys and values counts rows; no exit has a block as its adapter.
    Ensures: run in random chunks, rows apart, the program gives what it gave in one pass (to 1e-4 of the scale).
    Invalidates: nothing; names of cuts and exits stay.
    """

    name: ClassVar[str] = "insert-cache"

    def requires(self, program: Program) -> None:
        """There is a causal stack, and no exit whose adapter is a block."""
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
        program, self.left_out = without_unknown_rows(program)
        program, self.ahead, self.cut = with_places_ahead(program)
        self.program, self.text = program, text
        ahead = evaluate(self.ahead, program.sizes(program.example_inputs))
        self.facts = Causal(program, ahead, fewer=ahead - 1 if isinstance(self.ahead, str) else 0)
        self._check_axes()
        wanted = self.facts.example + 7
        self.capacity = wanted if self.facts.limit is None else min(wanted, self.facts.limit)
        self.builder = Rebuilder(program, text, self.facts, self.capacity)
        self.cached = CachedSites(self.facts, self.builder)
        self.builder.last = last_places(self.facts)
        self.logits = logits_of(self.facts, self.builder.last)
        self.joins = Joins(self.facts, self.builder)

    def result(self) -> PassResult:
        """The rebuilt program."""
        facts, builder, graph, new = self.facts, self.builder, self.program.graph, self.builder.new.graph
        needed = self._needed()
        builder.unneeded = {node for node in graph.nodes if node not in needed}
        builder.mixed |= {site.output for site in facts.sites if site.output not in needed}
        apart = self.joins.apart()
        sums = set(graph.find_nodes(op="call_function", target=aten.cumsum.default)) - apart
        self.cached.visit(
            [site for site in facts.sites if site.output in needed and facts.attends_to_tokens(site)],
            [node for node in sums if node in needed and self._sums_tokens(node)],
        )
        builder.skipped |= apart
        joined = [*self.joins.nodes, *self.joins.derived]
        self.cached.hooks |= {node: self.joins.hook for node in joined if node in needed}
        builder.build(self.cached.hooks, self.cached.after, self.joins.enter, self.joins.given)
        returned = {name: builder.value(node, "chunk") for name, node in results(graph).items()}
        new.output({**returned, **self.cached.returned})
        pinned = self._pinned()
        new.eliminate_dead_code(lambda node: node.op in ("placeholder", "output") or node.name in pinned)
        new.lint()
        notes = [f"output {name!r} is left out: only a run tells how many rows it has" for name in self.left_out]
        return PassResult(self._program(), dict(builder.new.edits), tuple(notes))

    def _sums_tokens(self, node: fx.Node) -> bool:
        """Whether a cumulative sum is one over tokens."""
        axis: Any = node.args[1]
        return self.facts.kinds[node] == DATA and expression(shape(node)[axis]) == self.facts.tokens

    def _pinned(self) -> frozenset[str]:
        """The names that must be in the rebuilt graph; raises where a record's are not."""
        made = {node.name for node in self.builder.new.graph.nodes}
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
        left = {size for node in kept for size in sizes_of(node)}
        for node in facts.own:
            other = {size for size in sizes_of(node) if size in axes.names and size != facts.tokens}
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
        found = {name: sizes_of(node) for name, node in results(self.program.graph).items()}
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
            sizes = sizes_of(node)
            fixed = self.facts.kinds[node] in (POSITIONAL, CHUNK)
            pooled = self.facts.kinds[node] == DATA and self.facts.tokens not in sizes
            if name != self.logits and (fixed or pooled or builder.mixed & read_by([node])):
                found.append(name)
        return tuple(found)

    def _prompt(self) -> Prompt | None:
        """What of a prompt is made once."""
        if not self.joins:
            return None
        joins = self.joins
        given = {str(node.target): int(value) for node, value in joins.holding.items()}
        counting = tuple(str(node.target) for node, value in joins.given.items() if value is None)
        whole = any(self.facts.together(site) for site in self.facts.sites)
        return Prompt(
            str(self.builder.prompts[joins.ids].target),
            PROMPT_LENGTHS,
            joins.filler,
            given,
            whole,
            self.ahead,
            self.cut,
            counting,
        )

    def _program(self) -> Program:
        program, facts = self.program, self.facts
        renamed = self.builder.new.renamed
        capacity = expression(self.builder.new.capacity)
        made = {capacity: "capacity"} | ({expression(self.builder.new.prompt): "prompt"} if self.joins else {})
        axes = Axes(
            {renamed[old]: name for old, name in program.axes.names.items() if old in renamed} | made,
            renamed.get(program.axes.batch),
            tuple(renamed[old] for old in program.axes.tokens if old in renamed),
            {renamed[old]: limits for old, limits in program.axes.ranges.items() if old in renamed}
            | dict.fromkeys(made, (1, facts.limit)),
        )
        cache = Cache(
            tuple(str(n.target) for n in facts.own if n not in facts.implied and n not in self.joins.given),
            LENGTHS,
            PLACES,
            self.cached.buffers,
            self.cached.axes,
            {str(node.target): item for node, item in facts.implied.items()},
            facts.limit,
            self.logits,
            self._whole(),
            self._prompt(),
            self.joins.least + (self.ahead != 0),  # and one of text
        )
        kept = {name: value for name, value in program.example_inputs.items() if name not in cache.implied}
        result = replace(
            program,
            graph_module=fx.GraphModule(program.graph_module, self.builder.new.graph, "Program"),
            axes=axes,
            example_inputs=kept,
            history=(*program.history, self.text),
            records=(*program.records, cache),
        )
        return replace(result, example_inputs=result.fresh(kept, self.capacity))
