"""The manifest of a partitioned program: names for values, segments bound to files, the plan of stages."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from torch import fx

from offramp.bundle import manifest as m
from offramp.bundle.expressions import names
from offramp.bundle.implied import LOWEST
from offramp.bundle.measures import SCREENED
from offramp.errors import ExportError
from offramp.export.lowering.node_builder import Target
from offramp.export.partition import Plan, StackPlan
from offramp.export.subgraph import Subgraph
from offramp.export.translations import Translations
from offramp.export.write import Writer
from offramp.program.analysis.lookups import known_ids, longest
from offramp.program.analysis.sites import mlp
from offramp.program.analysis.stacks import Stack
from offramp.program.exit import Exit, asked_of
from offramp.program.graph import aten, expression, placeholders, read_by, results, shape, sizes_of, source
from offramp.program.learners import Learners
from offramp.program.ops import FILL_PLACES
from offramp.program.program import Program

Progress = Callable[[str, int, int], None]
_ENCODING = "fp32"


class Describer:
    """Lowers the subgraphs of a plan through a writer, and says in manifest terms what they compute.

    ``screens`` says of a segment by its name whether the classes of `prediction-screened`, the greatest of the logits
    that it makes, are screened where blocks make them.
    """

    def __init__(
        self,
        program: Program,
        plan: Plan,
        writer: Writer,
        target: Target,
        progress: Progress | None = None,
        screens: Callable[[str], bool] = lambda segment: True,
    ) -> None:
        self.program, self.plan, self.writer, self.target = program, plan, writer, target
        self.progress = progress or (lambda name, done, total: None)
        self.values: dict[str, m.Value] = {}
        self.segments: dict[str, m.Segment] = {}
        self.origin: dict[str, fx.Node] = {}
        self.unsaid: dict[str, str] = {}
        self.translations = Translations(target)
        self.returned = results(program.graph)
        self.screens = screens
        self.screened = {
            self.returned[item.scores[SCREENED]]: self._logits_of(item)
            for item in program.exits
            if SCREENED in item.scores
        }
        self.names = {node: name for name, node in placeholders(program.graph).items()}
        for stack in program.stacks.values():
            for depth, name in enumerate(stack.cuts):
                self.names.setdefault(program.nodes[name], f"{stack.name}.{depth}")
        for item in program.learners:
            self.names[program.nodes[item.count]] = f"{item.name}.learners"
        if program.cache is not None:
            self.names |= {self.returned[name]: name for name in program.cache.buffers.values()}
        self._outside = (*plan.before, *plan.tables, *plan.enter, *plan.tails)
        self.batch = self._batch()
        self._total = len(self.segment_names())

    def _logits_of(self, item: Exit) -> str | None:
        """The name of the segment that makes an exit's logits; None where no segment of its own does."""
        plan = next(plan for plan in self.plan.stacks if plan.stack.name == item.stack)
        tails = plan.heads.get(item.after, self.plan.tails)
        return tails[0].name if tails else None

    def segment_names(self) -> list[str]:
        """The names that the segments will have."""
        found = [subgraph.name for subgraph in self._outside if subgraph]
        found += [subgraph.name for plan in self.plan.stacks for subgraph in plan.subgraphs()]
        if not self.plan.join:  # once more for every exit that shares them
            last = self.plan.stacks[-1]
            name, blocks = last.stack.name, last.stack.blocks
            early = [item.after for item in self.program.exits_of(name) if item.after < blocks]
            shared = [after for after in early if after not in last.heads]
            found += [f"{name}.{after}/{tail.name}" for after in shared for tail in self.plan.tails]
        return found

    def manifest(self, model: str, provenance: Mapping[str, Any], policy: Mapping[str, Any] | None) -> m.Manifest:
        """Lower everything and describe it (``files`` and ``validation`` are still empty)."""
        for name, node in placeholders(self.program.graph).items():
            self._value(name, node)
        stages: list[m.Stage] = []
        stacks: dict[str, m.Stack] = {}
        ahead = zip(self.plan.before, self.plan.tables, self.plan.enter, strict=True)
        for subgraphs, plan in zip(ahead, self.plan.stacks, strict=True):
            for subgraph, when in zip(subgraphs, ("input", "capacity", "chunk"), strict=True):
                if subgraph is not None:
                    stages.append(m.Stage(self._segment(subgraph), when=when))
            final = plan is self.plan.stacks[-1] and not self.plan.join
            stacks[plan.stack.name] = self._stack(plan, final)
            chunked = bool(set(self.segments[plan.blocks[0][1].name].inputs.values()) & self._chunk_values())
            stages.append(m.Stage(stack=plan.stack.name, when="chunk" if chunked else "input"))
        stages += [m.Stage(self._segment(tail)) for tail in self.plan.tails if self.plan.join]
        axes = self.program.axes
        take = {}
        for value in self.values.values():
            if place := value.place(axes.names[axes.batch]) if self.batch else None:
                take[f"{value.dtype}/{place[0]}"] = self.writer.take(value.dtype, place[0])
        return m.Manifest(
            model=model,
            inputs=tuple(self.program.inputs),
            outputs=self._outputs(),
            batch=axes.names[axes.batch] if self.batch else None,
            axes=self._axes(),
            values=self.values,
            segments=self.segments,
            stacks=stacks,
            stages=tuple(stages),
            files={},
            take=take,
            cache=self._cache(),
            ids=known_ids(self.program, self._prompts()),
            placeholders=self._placeholders(),
            learners={item.name: self._learner(item) for item in self.program.learners},
            policy=policy,
            provenance=provenance,
        )

    def _learner(self, item: Learners) -> m.Learners:
        hidden = self.program.nodes[item.hidden]
        site = mlp(next(iter(hidden.users)))
        assert site is not None, item
        flops = site.token_flops // item.learners
        count = self._name(item.count)
        return m.Learners(
            item.stack, item.block, item.site, item.learners, item.least, count, flops, str(hidden.args[4])
        )

    def _chunk_values(self) -> set[str]:
        cache = self.program.cache
        return {cache.lengths, *cache.buffers} if cache else set()

    def _cache(self) -> m.Cache | None:
        cache, axes = self.program.cache, self.program.axes
        if cache is None:
            return None
        inputs = placeholders(self.program.graph)
        node = inputs[cache.tokens[0]]
        chunk = next(axes.names[e] for e in sizes_of(node) if e in axes.tokens)
        (capacity,) = (axes.names[expression(size)] for size in shape(inputs[cache.places]))
        rowwise = any("GroupQueryAttention" in self.writer.operators(s.file) for s in self.segments.values())
        return m.Cache(
            cache.tokens,
            cache.lengths,
            cache.places,
            cache.buffers,
            chunk,
            capacity,
            cache.logits,
            cache.limit,
            rowwise,
            {name: self._implied(item) for name, item in cache.implied.items()},
            cache.prompt,
        )

    def _axes(self) -> dict[str, tuple[int, int | None]]:
        """The shortest and the longest length of each axis, which tables of positions limit too."""
        axes, cache = self.program.axes, self.program.cache
        limits: dict[Any, int | None] = dict(longest(self.program))
        if cache is not None:
            chunk = shape(placeholders(self.program.graph)[cache.tokens[0]])[self.program.chunk_axis]
            limits[expression(chunk)] = cache.limit
        found = dict[str, tuple[int, int | None]]()
        for symbol, (low, high) in axes.ranges.items():
            if symbol in axes.names:
                known = [limit for limit in (high, limits.get(symbol)) if limit is not None]
                found[axes.names[symbol]] = low, min(known, default=None)
        return found | dict.fromkeys(self.unsaid.values(), (0, None))

    def _prompts(self) -> dict[str, str]:
        """The values that hold an input's whole prompt."""
        cache = self.program.cache
        return {cache.prompt.tokens: cache.tokens[0]} if cache and cache.prompt else {}

    def _placeholders(self) -> tuple[m.Placeholder, ...]:
        """The ids in whose places other inputs' values are put."""
        given, found = self._prompts(), list[m.Placeholder]()
        for node in self.program.graph.find_nodes(op="call_function", target=FILL_PLACES):
            _, places, rows, *kept = node.args
            masks = sorted(str(leaf.target) for leaf in read_by(kept) if leaf.op == "placeholder")
            known = bool(kept) == bool(masks)
            if known and places.target is aten.eq.Scalar and places.args[0].op == "placeholder":
                name = str(places.args[0].target)
                count = self._size(self.program.axes.describe(shape(*kept or [rows])[1]))
                found.append(m.Placeholder(given.get(name, name), int(places.args[1]), count, tuple(masks)))
        return tuple(found)

    def _implied(self, item: m.Implied) -> m.Implied:
        """An input that the graph makes itself, in numbers that JSON has."""
        hidden, padding = (max(n, LOWEST) if n is not None else None for n in (item.hidden, item.padding))
        return replace(item, shape=tuple(map(self._size, item.shape)), hidden=hidden, padding=padding)

    def _stack(self, plan: StackPlan, final: bool) -> m.Stack:
        stack = plan.stack
        parts = [
            m.Part(depth, (self._segment(subgraph),), self._name(stack.cuts[depth])) for depth, subgraph in plan.blocks
        ]
        entering = self._name(stack.input)
        if entering not in self.values and self.program.cache is not None:  # the first block makes it
            entering = self.program.cache.tokens[0]
        known = {item.after: item for item in self.program.exits_of(stack.name)}
        exits = [self._exit(plan, item, final) for after, item in known.items() if after < stack.blocks]
        exits.append(self._full(plan, known.get(stack.blocks), final))
        return m.Stack(
            stack.name,
            stack.role,
            stack.blocks,
            entering,
            self._name(stack.output),
            tuple(parts),
            tuple(exits),
            *self._groups(stack),
            self._asked(stack),
        )

    def _groups(self, stack: Stack) -> tuple[tuple[m.Group, ...], str | None]:
        """The groups in which tokens leave a stack, and the value of the places of those that have not."""
        given = placeholders(self.program.graph)
        for item in self.program.groups:
            if item.stack == stack.name and item.places in given:
                self._value(item.places, given[item.places])
                return item.groups, item.places
        return (), None

    def _asked(self, stack: Stack) -> str | None:
        """The value that says which tokens are scored, where some of them may be."""
        name = asked_of(stack.name)
        return name if name in self.values else None

    def _full(self, plan: StackPlan, item: Exit | None, final: bool) -> m.Exit:
        stack = plan.stack
        output = self._name(stack.output)
        if not final:
            return m.Exit(stack.blocks, (), output, {}, {})
        segments = tuple(self._segment(tail) for tail in self.plan.tails)
        scores = {
            measure: self._name(self.returned[key].name) for measure, key in (item.scores if item else {}).items()
        }
        return m.Exit(stack.blocks, segments, output, self._outputs(), scores)

    def _outputs(self) -> dict[str, str]:
        """The values of the model's outputs at full depth."""
        return {name: self._name(self.returned[name].name) for name in self.program.outputs}

    def _exit(self, plan: StackPlan, item: Exit, final: bool) -> m.Exit:
        stack = plan.stack
        prefix = f"{stack.name}.{item.after}/"
        state = self._name(item.hidden)
        segments: list[str] = []
        made: dict[fx.Node, str] = {}
        if item.after in plan.adapters:
            state = f"{prefix}state"
            segments.append(self._segment(plan.adapters[item.after], {self.program.nodes[item.state]: state}))
        if item.after in plan.heads:
            for head in plan.heads[item.after]:
                segments.append(self._segment(head))
                made |= {node: self.names[node] for node in head.outputs}
        elif final:
            made = {node: prefix + self.names.get(node, node.name) for tail in self.plan.tails for node in tail.outputs}
            made = made and {**made, self.program.nodes[stack.output]: state}
            segments += [self._segment(tail, made, f"{prefix}{tail.name}") for tail in self.plan.tails]
        outputs = {}
        if final:
            for name in self.program.outputs:
                own = self.returned[item.outputs.get(name, name) if item.head == "own" else name]
                at_end = self.returned[name] is self.program.nodes[stack.output]
                outputs[name] = state if at_end and own not in made else made.get(own) or self._name(own.name)
        scores = {measure: self._score(stack, item, measure, made) for measure in item.scores}
        return m.Exit(item.after, tuple(segments), state, outputs, scores, item.head, item.adapter)

    def _score(self, stack: Stack, item: Exit, measure: str, made: Mapping[fx.Node, str]) -> str:
        """The value that holds an exit's score; ``made`` are those of its own segments.

        Raises:
            ExportError: no segment makes it.
        """
        node = self.returned[item.scores[measure]]
        full = next((other for other in self.program.exits_of(stack.name) if other.after == stack.blocks), None)
        at_end = self.returned[full.scores[measure]] if full and measure in full.scores else None
        found = made.get(node) or self.names.get(node) or (at_end and made.get(at_end))
        if not found:
            raise ExportError(
                f"no segment makes the score {measure} of the exit after block {item.after} of stack {stack.name}",
                hint="insert-scores on full depth too, for exits that share its head",
            )
        return found

    def _segment(
        self, subgraph: Subgraph, renamed: Mapping[fx.Node, str] | None = None, name: str | None = None
    ) -> str:
        """Lower a subgraph (or use its file again) and bind it to values; returns the segment's name."""
        name = name or subgraph.name
        if name in self.segments:
            return name
        self.progress(name, len(self.segments), self._total)
        translation = self.translations.of(subgraph)
        found = {node for node, made_by in self.screened.items() if self.screens(made_by or subgraph.name)}
        screened = [place for place, node in enumerate(translation.outputs) if node in found]
        file = self.writer.segment(translation, subgraph.name, _ENCODING, screened)
        renamed = renamed or {}
        inputs, outputs = {}, {}
        for i, node in enumerate(translation.inputs):
            inputs[f"in{i}"] = renamed.get(node) or self.names[node]
        for i, node in enumerate(translation.outputs):
            value = renamed.get(node) or self.names.setdefault(node, node.name)
            outputs[f"out{i}"] = value
            self._value(value, node)
        self.segments[name] = m.Segment(name, file, inputs, outputs, _ENCODING)
        return name

    def _name(self, node: str) -> str:
        return self.names[self.program.nodes[node]]

    def _value(self, name: str, node: fx.Node) -> None:
        self.origin[name] = node
        sizes = tuple(self._size(self.program.axes.describe(size)) for size in shape(node))
        dtype = str(node.meta["val"].dtype).removeprefix("torch.")
        if dtype not in m.DTYPES:
            raise ExportError(
                f"{name!r} ({source(node)}) is {dtype}, which numpy does not have, nor does a bundle",
                hint="let the model's code make float32 of it: .float()",
            )
        self.values[name] = m.Value(dtype, sizes)

    def _size(self, size: int | str) -> int | str:
        """A size as the manifest writes it; one that its arithmetic cannot say gets a name of its own."""
        try:
            known = names(size) <= set(self.program.axes.names.values())
        except ValueError:
            known = False
        return size if known else self.unsaid.setdefault(str(size), f"size{len(self.unsaid)}")

    def _batch(self) -> bool:
        """Whether rows can be taken out of every value that crosses segments."""
        subgraphs: Sequence[Subgraph | None] = [
            *self._outside,
            *(subgraph for s in self.plan.stacks for _, subgraph in s.blocks),
        ]  # fmt: skip
        try:
            for subgraph in subgraphs:
                for node in (*subgraph.inputs, *subgraph.outputs) if subgraph else ():
                    self.program.axes.batch_axis(node)
        except ValueError:
            return False
        return self.program.axes.batch is not None
