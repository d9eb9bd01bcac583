"""``insert-cache``: a causal model runs on chunks of new tokens, keys and values of earlier ones kept."""

from __future__ import annotations

import operator
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import fx

from offramp.passes.infra import incremental
from offramp.passes.infra.base import Pass, PassResult
from offramp.passes.infra.chunks import check_chunks
from offramp.passes.infra.incremental import CONSTANT, DATA, LENGTHS, MEMORY, PLACES, POSITIONAL, Rebuilder
from offramp.passes.infra.masks import plain_window
from offramp.program import ops
from offramp.program.attention import AttentionSite, attention_sites, is_causal
from offramp.program.axes import Axes
from offramp.program.graph import (
    aten,
    expression,
    is_tensor,
    read_by,
    results,
    shape,
    source,
)
from offramp.program.program import Cache, Program, evaluate
from offramp.program.sizes import resized
from offramp.runtime.errors import PassError, SpecError

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
    plainly causal, or a window, are dropped. What depends on other inputs only (keys and values of cross-attention)
    stays as it is: it is made once. A padding mask over the tokens becomes ones, since rows have lengths.

    Requires: a causal stack; no operator but attention mixes its tokens; the first axis of keys and values counts
    rows.
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
        return _Insertion(program, repr(self)).result()

    def ensures(self, before: Program, result: PassResult) -> None:
        """Chunks give what one pass gives."""
        if result.modified:
            check_chunks(before, result.program)


class _Insertion:
    """One application of the pass."""

    def __init__(self, program: Program, text: str) -> None:
        self.program, self.text = program, text
        self.stacks = [stack for stack in program.stacks.values() if stack.role == "decoder"]
        self.sites = attention_sites(program.graph)
        self.tokens = self._token_symbol()
        self.own = {
            node
            for node in program.graph.find_nodes(op="placeholder")
            if any(self.tokens in getattr(expression(size), "free_symbols", ()) for size in shape(node))
        }
        self.masks = self._masks()
        self.kinds = incremental.kinds_of(program, self.tokens, self.own - self.masks, self.masks)
        self.example = max(program.example_inputs[str(n.target)].shape[self._axis(n)] for n in self.own)
        self.limit = self._limit()
        self.capacity = self.example + 7 if self.limit is None else min(self.example + 7, self.limit)
        self.builder = Rebuilder(program, text, self.tokens, self.kinds, self.capacity)
        self.buffers: dict[str, str] = {}
        self.axes: dict[str, int] = {}
        self.returned: dict[str, fx.Node] = {}
        self.windows: dict[fx.Node, int | None] = {}

    def _token_symbol(self) -> Any:
        symbols = []
        for stack in self.stacks:
            hidden = self.program.nodes[stack.input]
            found = [e for e in map(expression, shape(hidden)) if e in self.program.axes.tokens]
            if len(found) != 1:
                sizes = [self.program.axes.describe(size) for size in shape(hidden)]
                raise PassError(
                    f"insert-cache: the hidden state of stack {stack.name} has shape {sizes}, none of whose axes is "
                    f"the tokens of an input ({source(hidden)})",
                    hint="capture with free token axes, sources and targets of different lengths; models that put "
                    "other tokens (of an image, say) before the text are not supported",
                )
            symbols.append(found[0])
        if len(set(symbols)) > 1:
            raise PassError(
                "insert-cache: the causal stacks have tokens of their own each, and one at a time is possible"
            )
        return symbols[0]

    def _axis(self, node: fx.Node) -> int:
        found = [i for i, size in enumerate(shape(node)) if expression(size) == self.tokens]
        if len(found) != 1:
            sizes = [self.program.axes.describe(size) for size in shape(node)]
            raise PassError(
                f"insert-cache: input {node.target} has shape {sizes}; an input has one axis of tokens",
                hint="make masks of queries and keys inside the forward",
            )
        return found[0]

    def _masks(self) -> set[fx.Node]:
        """Inputs of zeros and ones over the tokens that go into attention masks."""
        read = read_by([mask.node for site in self.sites for mask in site.masks])
        found = set()
        for node in self.own:
            value = self.program.example_inputs[str(node.target)]
            if node in read and bool(((value == 0) | (value == 1)).all()):
                found.add(node)
        if found == self.own:
            raise PassError(f"insert-cache: the inputs {sorted(str(n.target) for n in found)} all look like masks")
        return found

    def _limit(self) -> int | None:
        """How many tokens the model has positions for: from the captured range, and from tables of positions."""
        limits = [self.program.axes.ranges.get(self.tokens, (1, None))[1]]
        for node in self.program.graph.nodes:
            table, axis, index = _looked_up(node)
            if index is not None and self.kinds[index] == POSITIONAL and self.kinds[table] == CONSTANT:
                rows = int(expression(shape(table)[axis]))
                beyond = int(self._values([index], rows + 1)[index].max()) - (rows - 1)
                limits.append(rows + 1 - beyond if beyond > 0 else None)
        return min((limit for limit in limits if limit is not None), default=None)

    def result(self) -> PassResult:
        program, builder = self.program, self.builder
        hooks: dict[fx.Node, Any] = {}
        after: dict[fx.Node, Any] = {}
        for site in self.sites:
            if self.kinds[site.output] != DATA or not self._over_tokens(site):
                continue
            if site.form == "sdpa":
                self._fused(site, hooks)
            else:
                self._decomposed(site, after)
        for node in program.graph.find_nodes(op="call_function", target=aten.cumsum.default):
            if self.kinds[node] == DATA and expression(shape(node)[node.args[1]]) == self.tokens:
                hooks[node] = self._cumulative
        builder.build(hooks, after)
        builder.graph.output(
            {**{name: builder.value(node) for name, node in results(program.graph).items()}, **self.returned}
        )
        builder.graph.eliminate_dead_code(lambda node: node.op in ("placeholder", "output"))
        builder.graph.lint()
        module = fx.GraphModule(program.graph_module, builder.graph, "Program")
        names = {
            symbol: program.axes.names[old] for old, symbol in self._renamed().items() if old in program.axes.names
        }
        names[expression(builder.capacity)] = "capacity"
        ranges = {self._renamed()[old]: limits for old, limits in program.axes.ranges.items() if old in self._renamed()}
        ranges[expression(builder.capacity)] = (1, self.limit)
        renamed = self._renamed()
        axes = Axes(
            names,
            renamed.get(program.axes.batch),
            tuple(renamed[old] for old in program.axes.tokens if old in renamed),
            ranges,
        )
        cache = Cache(
            tuple(
                str(node.target) for node in program.graph.find_nodes(op="placeholder") if node in self.own - self.masks
            ),
            LENGTHS,
            PLACES,
            self.buffers,
            self.axes,
            {str(node.target): node.meta["val"].dtype for node in sorted(self.masks, key=str)},
            self.limit,
        )
        kept = {name: value for name, value in program.example_inputs.items() if name not in cache.ones}
        made = replace(
            program,
            graph_module=module,
            axes=axes,
            example_inputs=kept,
            history=(*program.history, self.text),
            cache=cache,
        )
        made = replace(made, example_inputs=made.fresh(kept, self.capacity))
        return PassResult(made, dict(builder.edits))

    def _renamed(self) -> dict[Any, Any]:
        return {old: expression(new) for old, new in self.builder._symbols.items()}

    def _over_tokens(self, site: AttentionSite) -> bool:
        """Whether a site's keys are tokens (self-attention), and not memory."""
        return self.kinds[site.key] == DATA and self.tokens in getattr(
            expression(site.token_sizes[1]), "free_symbols", ()
        )

    def _causal(self, site: AttentionSite) -> None:
        for mask in site.masks:
            if self.kinds[mask.node] in (DATA, MEMORY):
                raise PassError(
                    f"insert-cache: an attention mask depends on the contents of inputs ({source(mask.node)})",
                    hint="leave padding out: rows of a batch have lengths of their own",
                )
        if not is_causal(site, self._evaluated(site)):
            raise PassError(
                f"insert-cache: an attention over the tokens is not causal ({source(site.weights)})",
                hint="a model whose tokens do not see later ones",
            )

    def _evaluated(self, site: AttentionSite, size: int | None = None) -> dict[fx.Node, torch.Tensor]:
        return self._values([mask.node for mask in site.masks], size)

    def _values(self, nodes: list[fx.Node], size: int | None = None) -> dict[fx.Node, torch.Tensor]:
        """The values of positional nodes for ``size`` tokens."""
        inputs = dict(self.program.example_inputs)
        if size is not None:
            inputs = resized(self.program, {self.tokens: size, self.program.axes.batch: 2})
        inputs |= {str(node.target): torch.ones_like(inputs[str(node.target)]) for node in self.masks}
        return evaluate(self.program.graph_module, nodes, inputs)

    def _buffer(self, name: str, value: fx.Node, axis: int) -> fx.Node:
        """A new input for a cache of values like ``value``."""
        sizes = list(shape(value))
        if self.program.axes.batch is not None and expression(self.builder.batch) not in getattr(
            expression(sizes[0]), "free_symbols", ()
        ):
            raise PassError(
                "insert-cache: rows do not lie on the first axis of keys or values "
                f"({source(self.builder.origin or value)})"
            )
        sizes[axis] = self.builder.capacity
        self.axes[name] = axis
        return self.builder.placeholder(name, sizes, value.meta["val"].dtype)

    def _fused(self, site: AttentionSite, hooks: dict[fx.Node, Any]) -> None:
        self._causal(site)
        number = len(self.buffers) // 2
        names = [f"key_cache_{number}", f"value_cache_{number}"]
        self.buffers |= {name: f"{name}_new" for name in names}
        window: int | None = 0
        if site.masks:
            mask = site.masks[0]
            if mask.node not in self.windows:
                self.windows[mask.node] = plain_window(
                    mask.node,
                    self.limit,
                    self.example,
                    lambda size: mask.visible_exactly(self._evaluated(site, size)[mask.node]),
                )
            window = self.windows[mask.node]

        def attend(node: fx.Node) -> fx.Node:
            builder = self.builder
            query = builder.value(site.query)
            key, value = (self._ungrouped(arg) for arg in (site.key, site.value))
            if len(shape(query)) != 4:
                raise builder.refusal(
                    f"attention over {len(shape(query))} axes; expected rows, heads, tokens, features"
                )
            bias = None
            if window is None:
                table = builder.value(site.masks[0].node)
                reference = [*shape(query)[:-1], builder.capacity]
                bias = builder.aligned(table, reference)
            caches = [self._buffer(name, new, 2) for name, new in zip(names, (key, value), strict=True)]
            arguments = (query, key, value, *caches, builder.inputs[LENGTHS], bias, site.scale, window or 0)
            called = builder.call(ops.ATTENTION, *arguments)
            builder.edits["replaced"] += 1
            for at, name in enumerate(names, 1):
                self.returned[f"{name}_new"] = builder.call(operator.getitem, called, at)
            return builder.call(operator.getitem, called, 0, name=node.name)

        hooks[site.output] = attend

    def _ungrouped(self, node: fx.Node) -> fx.Node:
        """Keys or values before they are repeated for every query head of a group."""
        spread = node.args[0] if node.target is aten.reshape.default else None
        if isinstance(spread, fx.Node) and spread.target is aten.expand.default:
            inner = spread.args[0]
            if isinstance(inner, fx.Node) and inner.target is aten.unsqueeze.default and inner.args[1] in (2, -3):
                return self.builder.value(inner.args[0])  # type: ignore[arg-type]
        return self.builder.value(node)

    def _decomposed(self, site: AttentionSite, after: dict[fx.Node, Any]) -> None:
        self._causal(site)
        contraction = self._product(site)
        for operand, reader, kind in ((site.key, contraction, "key"), (site.value, site.output, "value")):
            number = sum(name.startswith(kind) for name in self.buffers)
            name = f"{kind}_cache_{number}"
            self.buffers[name] = f"{name}_new"
            start, path = self._append_point(operand)
            after.setdefault(start, [])
            after[start] = self._appender(after.get(start), start, [*path, reader], name)

    def _cumulative(self, node: fx.Node) -> fx.Node:
        """A sum over all tokens so far: its terms are kept, and summed again."""
        builder = self.builder
        new, axis = builder.value(node.args[0]), node.args[1]  # type: ignore[arg-type]
        name = f"sum_cache_{sum(name.startswith('sum') for name in self.buffers)}"
        self.buffers[name] = f"{name}_new"
        whole = builder.appended(new, axis, self._buffer(name, new, axis))  # type: ignore[arg-type]
        self.returned[f"{name}_new"] = whole
        total = builder.call(aten.cumsum.default, whole, axis)
        if len(shape(total)) != 2:
            raise builder.refusal("a cumulative sum over more than rows and tokens")
        return builder.call(aten.gather.default, total, axis, builder.positions(), name=node.name)

    def _appender(self, before: Any, start: fx.Node, path: list[fx.Node], name: str) -> Any:
        def append(node: fx.Node) -> None:
            if before:
                before(node)
            builder = self.builder
            new = builder.values[node, ""]
            axes = [i for i, size in enumerate(shape(new)) if expression(size) == expression(builder.chunk)]
            if len(axes) != 1:
                raise builder.refusal("keys or values have no axis of tokens")
            cache = self._buffer(name, new, axes[0])
            whole = builder.appended(new, axes[0], cache)
            self.returned[f"{name}_new"] = whole
            builder.edges[path[0], node] = whole

        return append

    def _product(self, site: AttentionSite) -> fx.Node:
        """The contraction of queries and keys."""
        todo, seen = [site.weights], set()
        while todo:
            node = todo.pop(0)
            if node in seen:
                continue
            seen.add(node)
            if site.key in node.all_input_nodes and site.query in node.all_input_nodes:
                return node
            todo += [arg for arg in node.all_input_nodes if is_tensor(arg)]
        raise PassError(f"insert-cache: no product of queries and keys at {source(site.weights)}")

    def _append_point(self, operand: fx.Node) -> tuple[fx.Node, list[fx.Node]]:
        """Where keys or values are appended: up the views of the operand, to rows, heads, tokens, features."""
        batch = self.program.axes.batch
        path: list[fx.Node] = []
        best: tuple[fx.Node, list[fx.Node]] | None = None
        node = operand
        while True:
            sizes = [expression(size) for size in shape(node)]
            if len(sizes) == 4 and sizes[0] == batch and sizes[2] == self.tokens:
                best = node, list(path)
            above = node.args[0] if node.target in _LAYOUT else None
            if not isinstance(above, fx.Node) or len(above.users) > 1 or self.kinds[above] != DATA:
                break
            path.insert(0, node)
            node = above
        return best or (operand, [])


def _looked_up(node: fx.Node) -> tuple[Any, int, fx.Node | None]:
    """Table, axis and index of a look-up in a table; no index for another node."""
    args: Any = node.args
    if node.target is aten.embedding.default:
        return args[0], 0, args[1]
    if node.target in (aten.index_select.default, aten.gather.default):
        return args[0], int(args[1]), args[2]
    if node.target is aten.index.Tensor and len(args[1]) == 1:
        return args[0], 0, args[1][0]
    return None, 0, None
