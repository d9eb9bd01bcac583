"""The program: one captured graph and the facts known of it."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from torch import fx

from offramp.bundle.expressions import evaluate as evaluate_size
from offramp.bundle.implied import fill
from offramp.bundle.manifest import Implied
from offramp.errors import SpecError, StructureError
from offramp.program.analysis.attention import AttentionSite, together
from offramp.program.analysis.attention_search import attention_sites
from offramp.program.analysis.stack_names import name_stacks
from offramp.program.analysis.stacks import Stack, find_stacks, why_none
from offramp.program.analysis.token_axes import Axes, find_axes
from offramp.program.cache import Cache
from offramp.program.dropout import Trainable, keeps, strip
from offramp.program.exit import Exit
from offramp.program.graph import ancestors, copied, dependents, placeholders, results, run, shape, sizes_of
from offramp.program.groups import Groups
from offramp.program.learners import Learners
from offramp.program.record import Record


@dataclass(frozen=True)
class Program:
    """A captured model: its graph, and what is known of it. Passes make new ones; nothing changes in place.

    ``graph_module`` takes tensors by name and returns a dictionary: the model's ``outputs``, and what passes
    added. ``example_inputs`` and ``example_outputs`` are what the model was captured with, and what eager torch
    gave. ``records`` are what passes know of it beside the graph: exits, caches, and what packages outside add.
    ``history`` is the pipeline text that made it.
    """

    graph_module: fx.GraphModule
    outputs: tuple[str, ...]
    axes: Axes
    stacks: Mapping[str, Stack]
    example_inputs: Mapping[str, torch.Tensor]
    example_outputs: Mapping[str, torch.Tensor]
    records: tuple[Record, ...] = ()
    history: tuple[str, ...] = ()

    def __deepcopy__(self, memo: dict[int, Any]) -> Program:
        """The same program with weights of its own."""
        return replace(self, graph_module=copy.deepcopy(self.graph_module, memo))

    @property
    def graph(self) -> fx.Graph:
        """The ``fx`` graph."""
        return self.graph_module.graph

    @cached_property
    def exits(self) -> tuple[Exit, ...]:
        """The records of exits, in the order in which they were inserted."""
        return tuple(item for item in self.records if isinstance(item, Exit))

    @cached_property
    def cache(self) -> Cache | None:
        """The record of caches; None for a program that sees all tokens at once."""
        return next((item for item in self.records if isinstance(item, Cache)), None)

    @cached_property
    def learners(self) -> tuple[Learners, ...]:
        """The records of sites with learners, in the order in which they were inserted."""
        return tuple(item for item in self.records if isinstance(item, Learners))

    @cached_property
    def groups(self) -> tuple[Groups, ...]:
        """The records of stacks whose tokens leave in groups."""
        return tuple(item for item in self.records if isinstance(item, Groups))

    @cached_property
    def pinned(self) -> frozenset[str]:
        """The nodes that stacks and records refer to: they survive every rewrite."""
        cuts = (stack.cuts for stack in self.stacks.values())
        return frozenset().union(*cuts, *(item.pinned_nodes for item in self.records))

    @cached_property
    def module(self) -> fx.GraphModule:
        """The graph as a trainable module: ``module(**inputs)`` returns a dictionary of tensors.

        The model's outputs stand under their own names; an exit's under ``exit.outputs`` and ``exit.scores``.
        Weights are those of the captured model, not copies. Where the program was captured for training, dropout
        follows ``module.train()`` and ``module.eval()``.
        """
        return Trainable(self.graph_module) if any(map(keeps, self.graph.nodes)) else self.graph_module

    def without_dropout(self) -> Program:
        """The program as it is deployed; this one where there is no dropout in it."""
        if not any(map(keeps, self.graph.nodes)):
            return self
        graph = copied(self.graph)
        renamed = strip(graph)
        module = fx.GraphModule(self.graph_module, graph, "Program")

        def now(name: str) -> str:
            while name in renamed:
                name = renamed[name]
            return name

        names = {old: now(old) for old in renamed}
        stacks = {key: stack.renamed(names) for key, stack in self.stacks.items()}
        return replace(
            self, graph_module=module, stacks=stacks, records=tuple(item.renamed(names) for item in self.records)
        )

    @cached_property
    def nodes(self) -> Mapping[str, fx.Node]:
        """The graph's nodes by name."""
        return {node.name: node for node in self.graph.nodes}

    @property
    def inputs(self) -> tuple[str, ...]:
        """The names of the inputs: the captured forward's parameters, without caches and lengths."""
        own = {name for item in self.records for name in item.graph_inputs}
        return tuple(name for name in self.example_inputs if name not in own)

    def fresh(self, inputs: Mapping[str, torch.Tensor], capacity: int | None = None) -> dict[str, torch.Tensor]:
        """``inputs`` (by the names of `inputs`) for the graph: with empty caches, where the program has any.

        The caches have ``capacity`` places, as many as there are tokens if None.
        """
        given = dict(inputs)
        if self.cache is None:
            return given
        for name in self.cache.implied:
            given.pop(name, None)
        nodes = placeholders(self.graph)
        chunk, axis = nodes[self.cache.tokens[0]], self.chunk_axis
        place = self.axes.batch_axis(chunk)
        rows = given[self.cache.tokens[0]].shape[place[0]] if place else 1
        given[self.cache.lengths] = torch.zeros(rows, dtype=torch.int64)
        if self.cache.prompt is not None:  # the tokens are all the prompt's
            given[self.cache.prompt.tokens] = given[self.cache.tokens[0]]
            given[self.cache.prompt.lengths] = torch.full((rows,), given[self.cache.tokens[0]].shape[axis])
        capacity = capacity or given[self.cache.tokens[0]].shape[axis]
        given[self.cache.places] = torch.arange(capacity)
        for name, along in self.cache.axes.items():
            places = self.axes.batch_axis(nodes[name])
            sizes = [
                capacity if i == along else rows * places[1] if places and i == places[0] else int(size)
                for i, size in enumerate(shape(nodes[name]))
            ]
            given[name] = torch.zeros(sizes, dtype=nodes[name].meta["val"].dtype)
        return given

    @property
    def chunk_axis(self) -> int:
        """The axis of a chunk's tokens in its ids; of a program with caches."""
        assert self.cache is not None
        chunk = placeholders(self.graph)[self.cache.tokens[0]]
        return next(axis for axis, size in enumerate(sizes_of(chunk)) if size in self.axes.tokens)

    def ahead(self, inputs: Mapping[str, torch.Tensor]) -> int:
        """How many places for features stand in front of the text in these inputs."""
        if self.cache is None or self.cache.prompt is None:
            return 0
        return evaluate_size(self.cache.prompt.ahead, self.sizes(inputs))

    def as_captured(self, inputs: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """The inputs as the captured model takes them: without places in front of the text."""
        ahead = self.ahead(inputs)
        if not ahead:
            return dict(inputs)
        assert self.cache is not None
        assert self.cache.prompt is not None
        over_text = {*self.cache.tokens, *self.cache.prompt.given, *self.cache.implied}
        count = inputs[self.cache.tokens[0]].shape[1]
        found = dict(inputs)
        for name in over_text & inputs.keys():
            for axis, size in enumerate(inputs[name].shape):
                if size == count and axis > 0:
                    found[name] = found[name].narrow(axis, ahead, count - ahead)
        return found

    def as_returned(
        self, outputs: Mapping[str, torch.Tensor], inputs: Mapping[str, torch.Tensor]
    ) -> dict[str, torch.Tensor]:
        """The model's outputs as the captured model gives them for these inputs."""
        cut = self.cache.prompt.cut if self.cache and self.cache.prompt else ()
        ahead = self.ahead(inputs)
        return {name: outputs[name][:, ahead:] if name in cut else outputs[name] for name in self.outputs}

    def sizes(self, inputs: Mapping[str, torch.Tensor]) -> dict[str, int]:
        """The lengths of the axes of these inputs, by name."""
        nodes = placeholders(self.graph)
        return {
            self.axes.names[size]: value.shape[axis]
            for name, value in inputs.items()
            if name in nodes
            for axis, size in enumerate(sizes_of(nodes[name]))
            if size in self.axes.names
        }

    def implied(self, inputs: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """The inputs of the captured model that ``insert-cache`` made part of the graph, in the sizes of ``inputs``."""
        if self.cache is None:
            return {}
        sizes = self.sizes({name: inputs[name] for name in self.inputs})
        return {
            name: as_tensor(item, [evaluate_size(size, sizes) for size in item.shape])
            for name, item in self.cache.implied.items()
        }

    def require_stacks(self) -> Mapping[str, Stack]:
        """The stacks.

        Raises:
            StructureError: there is none; the message says what was found instead.
        """
        if not self.stacks:
            reason, hint = why_none(self.graph, attention_sites(self.graph))
            raise StructureError(reason, hint=hint)
        return self.stacks

    def next_stack(self, name: str) -> str | None:
        """The stack that reads this stack's output, None for one whose tail ends in the model's outputs."""
        reached = dependents([self.nodes[self.stacks[name].output]], self.graph)
        for other, stack in self.stacks.items():
            if other != name and self.nodes[stack.cuts[1]] in reached:
                return other
        return None

    def groups_of(self, stack: str) -> Groups | None:
        """The groups in which tokens leave a stack, None where rows leave it as a whole."""
        return next((item for item in self.groups if item.stack == stack), None)

    def exits_of(self, stack: str) -> list[Exit]:
        """The exits of a stack, shallowest first."""
        return sorted((item for item in self.exits if item.stack == stack), key=lambda item: item.after)

    def exit_after(self, stack: str, after: int) -> Exit | None:
        """The exit of a stack after so many blocks, None where there is none."""
        return next((item for item in self.exits if (item.stack, item.after) == (stack, after)), None)

    def block_nodes(self, stack: Stack, index: int) -> list[fx.Node]:
        """The nodes of block ``index`` (0-based) that read the hidden state, in graph order."""
        first, last = self.nodes[stack.cuts[index]], self.nodes[stack.cuts[index + 1]]
        inside = dependents([first], self.graph, shapes=True) & ancestors([last], stop=[first])
        return [node for node in self.graph.nodes if node in inside]

    def own_nodes(self, stack: Stack, index: int) -> list[fx.Node]:
        """The nodes of a block, and those that nothing but the block uses: a bias made from its own table, say."""
        inside = set(self.block_nodes(stack, index))
        cuts = {name for other in self.stacks.values() for name in other.cuts}
        for node in reversed(list(self.graph.nodes)):
            private = node.op == "call_function" and node.name not in cuts
            if private and node not in inside and node.users and all(user in inside for user in node.users):
                inside.add(node)
        return [node for node in self.graph.nodes if node in inside]

    def tail_nodes(self, stack: Stack) -> list[fx.Node]:
        """The nodes between the stack's output and the model's outputs that read it, in graph order."""
        end = self.nodes[stack.output]
        inside = dependents([end], self.graph, shapes=True) & ancestors(
            results(self.graph)[name] for name in self.outputs
        )
        return [node for node in self.graph.nodes if node in inside]

    def __str__(self) -> str:
        from offramp.program.show import render

        return render(self)

    __repr__ = __str__


def as_tensor(implied: Implied, sizes: Sequence[int]) -> torch.Tensor:
    """What an implied input holds in these sizes."""
    return torch.from_numpy(fill(implied, sizes)).to(getattr(torch, implied.dtype))


def analyse(
    graph_module: fx.GraphModule,
    example_inputs: Mapping[str, torch.Tensor],
    example_outputs: Mapping[str, torch.Tensor],
    axis_names: Mapping[Any, str],
) -> Program:
    """The program of a canonical graph: its axes and stacks, found from scratch."""
    sites = attention_sites(graph_module.graph)
    found = find_stacks(graph_module.graph, sites)
    causal = [
        any(_generates(graph_module, site, example_inputs) for site in sites if _inside(site, stack)) for stack in found
    ]
    return Program(
        graph_module,
        tuple(example_outputs),
        find_axes(graph_module, example_inputs, sites, axis_names),
        name_stacks(found, causal),
        example_inputs,
        example_outputs,
    )


def _inside(site: AttentionSite, stack: Any) -> bool:
    return any(site.weights in block for block in stack.blocks)


def _generates(module: fx.GraphModule, site: AttentionSite, example: Mapping[str, torch.Tensor]) -> bool:
    """Whether the last tokens of an attention see no later ones."""
    return together(site, evaluate(module, [mask.node for mask in site.masks], example)) is not None


def evaluate(
    module: fx.GraphModule,
    wanted: Iterable[fx.Node],
    inputs: Mapping[str, torch.Tensor],
    known: Mapping[fx.Node, torch.Tensor] | None = None,
) -> dict[fx.Node, torch.Tensor]:
    """The values of the ``wanted`` nodes on ``inputs``, computing only what they need beside ``known`` values."""
    wanted, known = list(wanted), known or {}
    needed = ancestors(wanted, stop=known)
    order = [node for node in module.graph.nodes if node in needed]
    values: dict[fx.Node, Any] = {node: inputs[str(node.target)] for node in order if node.op == "placeholder"}
    values |= known
    keep: Callable[[fx.Node], bool] = set(wanted).__contains__
    with torch.no_grad():
        run(module, order, values, keep)
    return {node: values[node] for node in wanted}


def as_program(given: Any) -> Program:
    """What was given, which has to be a program.

    Raises:
        SpecError: it is something else, a module that was not captured say.
    """
    if not isinstance(given, Program):
        raise SpecError(
            f"a {type(given).__name__} is no program",
            hint="offramp.apply(offramp.capture(module, example_inputs), passes)",
        )
    return given
