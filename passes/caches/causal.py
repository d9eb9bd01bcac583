"""What depends on what in a causal program: kinds of values, and the facts that caches need."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from functools import cached_property
from typing import Any

import torch
from torch import fx

from offramp.errors import PassError
from offramp.passes.caches.implied_inputs import Meaning
from offramp.passes.caches.kinds import DATA, MEMORY, kinds_of
from offramp.passes.caches.limits import limit
from offramp.passes.caches.masks import plain_window
from offramp.passes.caches.roles import Roles, leaves, roles_of
from offramp.program.analysis.attention import AttentionSite, is_causal, together
from offramp.program.analysis.attention_search import attention_sites
from offramp.program.graph import expression, shape, sizes_of, source, symbols
from offramp.program.program import Program, as_tensor, evaluate
from offramp.program.sizes import resized


class Causal:
    """A program whose causal stacks read one axis of tokens.

    ``ahead`` of the example's are places for features in front of the text; other inputs may have ``fewer`` by so many.

    Attributes:
        tokens: the symbol of that axis.
        own: the inputs that have it.
        holding: those of them that hold the tokens.
        implied: those of them that follow from the number of tokens, and what they hold: masks, positions.
        kinds: of every tensor node (`offramp.passes.caches.kinds`).
        example: how many tokens the example inputs have.

    Raises:
        PassError: the causal stacks have no such axis, or each its own; an input has several axes of tokens.
    """

    def __init__(self, program: Program, ahead: int = 0, fewer: int = 0) -> None:
        self.program, self.ahead, self.fewer = program, ahead, fewer
        self.sites = attention_sites(program.graph)
        self.tokens = self._token_symbol()
        inputs = program.graph.find_nodes(op="placeholder")
        self.own = [node for node in inputs if any(self.tokens in symbols(size) for size in shape(node))]
        meaning = Meaning(program, self.sites, self.own, self.tokens)
        self.implied, self.holding = meaning.implied, meaning.contents
        self.example = max(
            program.example_inputs[str(n.target)].shape[self._axis(n)] for n in self.own if n not in self.implied
        )
        self.kinds = kinds_of(program, self.tokens, self.own, self.implied)
        self._windows: dict[fx.Node, int | None] = {}
        self._together: dict[fx.Node, int] = {}

    @cached_property
    def limit(self) -> int | None:
        """How many tokens it can be built for, None for no limit.

        Raises:
            PassError: the example is longer than that, or than where a choice by the number of tokens changes.
        """
        return limit(self)

    def _token_symbol(self) -> Any:
        found = {}
        for stack in self.program.stacks.values():
            if stack.role != "decoder":
                continue
            hidden = self.program.nodes[stack.input]
            axes = [size for size in sizes_of(hidden) if size in self.program.axes.tokens]
            if len(axes) != 1:
                sizes = [self.program.axes.describe(size) for size in shape(hidden)]
                raise PassError(
                    f"insert-cache: the hidden state of stack {stack.name} has shape {sizes}, none of whose axes is "
                    f"the tokens of an input ({source(hidden)})",
                    hint="capture with free token axes, sources and targets of different lengths; features of an image "
                    "may stand before the text: torch.cat([features, embed(ids)], 1)",
                )
            found[stack.name] = axes[0]
        if len(set(found.values())) > 1:
            raise PassError(
                f"insert-cache: the causal stacks {list(found)} read different axes of tokens; one is possible"
            )
        return next(iter(found.values()))

    def _axis(self, node: fx.Node) -> int:
        found = [i for i, size in enumerate(shape(node)) if expression(size) == self.tokens]
        if len(found) != 1:
            sizes = [self.program.axes.describe(size) for size in shape(node)]
            raise PassError(
                f"insert-cache: input {node.target} has shape {sizes}; an input has one axis of tokens",
                hint="make masks of queries and keys inside the forward",
            )
        return found[0]

    def values(
        self,
        nodes: Iterable[fx.Node],
        size: int | None = None,
        word: int | None = None,
        known: Mapping[fx.Node, torch.Tensor] | None = None,
    ) -> dict[fx.Node, torch.Tensor]:
        """The values of nodes, for ``size`` tokens (all of one ``word``, perhaps) or the example's.

        ``known`` are those of some nodes that they are made of.
        """
        inputs = dict(self.program.example_inputs)
        if size is not None:
            inputs = resized(self.program, {self.tokens: size, self.program.axes.batch: 2})
        if word is not None:
            inputs |= {str(n.target): torch.full_like(inputs[str(n.target)], word) for n in self.own}
        for node, item in self.implied.items():
            inputs[str(node.target)] = as_tensor(item, inputs[str(node.target)].shape)
        return evaluate(self.program.graph_module, nodes, inputs, known)

    def attends_to_tokens(self, site: AttentionSite) -> bool:
        """Whether a site's queries and keys are tokens (self-attention).

        Raises:
            PassError: they are, and it is not causal, or its mask depends on the contents of other inputs.
        """
        if self.kinds[site.output] != DATA or self.kinds[site.key] != DATA:
            return False
        if self.tokens not in symbols(site.token_sizes[1]):
            return False
        for mask in site.masks:
            if self.kinds[mask.node] == MEMORY:
                raise PassError(
                    f"insert-cache: an attention mask depends on the contents of other inputs ({source(mask.node)})",
                    hint="masks of the tokens' own ids, or inputs over the tokens",
                )
        values = self.values([mask.node for mask in site.masks])
        if (first := together(site, values)) is None:
            raise PassError(
                f"insert-cache: an attention over the tokens is not causal ({source(site.weights)})",
                hint="a model whose tokens do not see later ones, or do so at the beginning of a prompt only",
            )
        self._together[site.output] = first
        for seed in range(3) if self.contents(site) and not first else ():
            if not is_causal(site, values | self._otherwise(site, seed), whole=False):
                raise PassError(
                    "insert-cache: in an attention over the tokens their contents decide which later tokens are seen "
                    f"({source(site.weights)})",
                    hint="a mask that hides later tokens whatever the contents are",
                )
        return True

    def together(self, site: AttentionSite) -> int:
        """How many of the example's tokens must be there together, since some see later ones: 0 where none does."""
        return self._together.get(site.output, 0)

    def contents(self, site: AttentionSite) -> dict[fx.Node, Roles]:
        """The masks of a site that depend on the contents of tokens, and which of their axes count what."""
        axes = len(shape(site.weights)), site.query_axis, site.key_axis
        masks = [mask.node for mask in site.masks if self.kinds[mask.node] == DATA]
        return {node: roles_of(node, *axes, self.tokens) for node in masks}

    def leaves(self, site: AttentionSite) -> set[fx.Node]:
        """The values of keys or queries alone that those masks are made of."""
        found = (leaves(node, roles, self.is_data) for node, roles in self.contents(site).items())
        return {node for inner in found for node, _ in inner}

    def is_data(self, node: fx.Node) -> bool:
        """Whether a value depends on the contents of tokens."""
        return self.kinds[node] == DATA

    def _otherwise(self, site: AttentionSite, seed: int) -> dict[fx.Node, torch.Tensor]:
        """The values of a site's masks by contents, if the contents were others."""
        generator = torch.Generator().manual_seed(seed)
        known = {}
        for node, value in self.values(self.leaves(site)).items():
            hidden = [-1e9] if value.is_floating_point() else []
            choice = torch.cat([value.unique(), torch.tensor([0, *hidden]).to(value.dtype)])
            if value.dtype == torch.bool:
                choice = torch.tensor([False, True])
            known[node] = choice[torch.randint(len(choice), value.shape, generator=generator)]
        return self.values(self.contents(site), known=known)

    def window(self, site: AttentionSite) -> int | None:
        """How many keys a token of a fused site sees: 0 for all before it; None where its mask says something else."""
        if not site.masks:
            return 0
        mask = site.masks[0]
        if self.is_data(mask.node) or self.together(site):
            return None
        if mask.node not in self._windows:
            self._windows[mask.node] = plain_window(
                mask.node,
                self.program.graph_module,
                self.limit,
                self.example,
                lambda size: mask.visible_exactly(self.values([mask.node], size)[mask.node]),
            )
        return self._windows[mask.node]
