"""Where what is no text takes the place of tokens: the features of an image, say.

A chunk of new tokens does not hold the others that this depends on, and features belong to a prompt. So what a prompt's
tokens become is made once, for all of them together, and a chunk's rows are taken from it. A token behind the prompt is
one of the text: it stays what it is where nothing is put in its place.
"""

from __future__ import annotations

from functools import cached_property
from typing import Any, Literal

import torch
from torch import fx

from offramp.errors import PassError
from offramp.passes.caches.causal import Causal
from offramp.passes.caches.chunk_graph import PROMPT_LENGTHS
from offramp.passes.caches.incremental import Rebuilder
from offramp.passes.caches.kinds import DATA, MEMORY, POSITIONAL
from offramp.program.graph import ancestors, aten, expression, is_tensor, read_by, shape, sizes_of, source
from offramp.program.ops import FILL_PLACES

_PUT = (FILL_PLACES, aten.slice_scatter.default, aten.select_scatter.default, aten.index_put.default)
_HINT = "embeddings [batch, tokens, features] of one input of token ids; example rows that end with text"


class Joins:
    """The places of a program where other inputs' values are put among its tokens, and inputs that belong to a prompt.

    Attributes:
        nodes: The nodes that put values among tokens.
        given: Inputs over a prompt's tokens that say more of them (which see later ones, say), and what they are of
            text behind it; None for positions, which count on there from the greatest.
        derived: What masks read that is made of those inputs alone (groups of tokens that see each other, say), and
            what that is of text.
        filler: An id of the example that stays what it is: it stands behind the shorter prompts of a batch.
        least: How many tokens of the example a prompt must have, so that all behind it stay what they are.
    """

    def __init__(self, facts: Causal, builder: Rebuilder) -> None:
        self.facts, self.builder = facts, builder
        self.nodes = [node for node in facts.program.graph.nodes if self._joins(node)]
        self.given = {node: value for node in facts.own if (value := self._of_text(node)) is not False}
        self.derived = self._derived() if self.given else {}
        self.filler, self.least = self._text() if self.nodes or self.given else (0, 1)

    def __bool__(self) -> bool:
        return bool(self.nodes or self.given)

    def _joins(self, node: fx.Node) -> bool:
        kinds = self.facts.kinds
        if node.target not in _PUT or kinds[node] != DATA or kinds[node.args[0]] not in (DATA, POSITIONAL):  # type: ignore[index]
            return False
        axis: Any = node.args[2] if node.target is aten.slice_scatter.default and len(node.args) > 2 else None
        if axis is not None and len(shape(node)) == 3 and expression(shape(node)[axis]) == self.facts.tokens:
            return kinds.get(node.args[1]) != DATA  # type: ignore[arg-type]  # learned features as well
        return any(kinds[arg] == MEMORY for arg in node.all_input_nodes if is_tensor(arg))

    def _of_text(self, node: fx.Node) -> float | Literal[False] | None:
        """What an input beside the ids is of the tokens that the example's rows end with; False where that differs."""
        facts, value = self.facts, self.facts.program.example_inputs[str(node.target)]
        if node in facts.implied or node in facts.holding or value.is_floating_point() or value.shape[-1] < 2:
            return False
        if expression(shape(node)[-1]) != facts.tokens or self._row_axis(node) is None:
            return False
        ends = value[..., -2:].flatten(0, -2)
        if value.dim() == 2 and bool((ends == ends[0, 0]).all()):
            return float(ends[0, 0])
        return None if value.dtype != torch.bool and bool((ends[:, 1] == ends[:, 0] + 1).all()) else False

    def _row_axis(self, node: fx.Node) -> int | None:
        """The axis of rows, of which a program without a batch axis has one."""
        program, sizes = self.facts.program, sizes_of(node)
        if program.axes.batch is None:
            return sizes.index(1) if 1 in sizes else None
        place = program.axes.batch_axis(node)
        return place[0] if place is not None and place[1] == 1 else None

    @property
    def holding(self) -> dict[fx.Node, float]:
        """Those of `given` that hold one value behind a prompt."""
        return {node: value for node, value in self.given.items() if value is not None}

    def _derived(self) -> dict[fx.Node, float]:
        facts, found = self.facts, dict[fx.Node, float]()
        masks = [site for site in facts.sites if facts.kinds[site.output] == DATA and facts.contents(site)]
        nodes = {leaf for site in masks for leaf in facts.leaves(site)}
        made = {
            node
            for node in nodes
            if read_by([node]).intersection(facts.own) <= self.holding.keys() | facts.implied.keys()
        }
        for node, value in facts.values(made - self.given.keys()).items():
            ends = value[:, -2:] if value.dim() > 1 else value[:0]
            if not ends.numel() or not bool((ends == ends.flatten()[0]).all()):
                raise PassError(
                    f"insert-cache: what {[str(item.target) for item in self.given]} say of the example's last tokens "
                    f"differs ({source(node)})",
                    hint=_HINT,
                )
            found[node] = float(ends.flatten()[0])
        return found

    def apart(self) -> set[fx.Node]:
        """The nodes that nothing but what is derived from those inputs is made of."""
        needed = ancestors([self.facts.program.graph.output_node()], self.derived)
        return {node for node in ancestors(self.derived) - needed if self.facts.kinds.get(node) == DATA}

    @property
    def ids(self) -> fx.Node:
        """The input of token ids.

        Raises:
            PassError: there is none, or several.
        """
        found = [node for node in self.facts.own if node not in self.facts.implied and node not in self.given]
        if len(found) != 1 or found[0].meta["val"].dtype.is_floating_point or len(shape(found[0])) != 2:
            names = [str(node.target) for node in found]
            raise PassError(f"insert-cache: which of {names} are ids of a prompt that is more than text?", hint=_HINT)
        ids: fx.Node = found[0]
        return ids

    def _text(self) -> tuple[int, int]:
        """An id that stays what it is, and how many tokens there are up to the last that does not."""
        facts, example = self.facts, self.facts.program.example_inputs
        ids = example[str(self.ids.target)]
        wanted = [*self.derived, *(arg for node in self.nodes for arg in (node, node.args[0]))]
        found = facts.values(wanted)
        text = torch.ones_like(ids, dtype=torch.bool)
        for node, value in self.given.items():
            text &= self._as_text(node, value, example[str(node.target)])
        for node, value in self.derived.items():
            text &= (found[node] == value).flatten(1).reshape(*text.shape, -1).all(-1)
        for node in self.nodes:
            same = found[node] == found[node.args[0]]
            if same.dim() < 3 or same.shape[:2] != ids.shape:
                raise PassError(
                    f"insert-cache: values are put among tokens in an unknown layout ({source(node)})", hint=_HINT
                )
            text &= same.flatten(2).all(-1)
        if not bool(text[:, -1].all()):
            place = source(self.nodes[0]) if self.nodes else f"inputs {[str(node.target) for node in self.given]}"
            raise PassError(f"insert-cache: the example ends with what is no text ({place})", hint=_HINT)
        places = torch.arange(1, ids.shape[1] + 1)
        return int(ids[0, -1]), max(1, int((~text * places).max()))

    def _as_text(self, node: fx.Node, value: float | None, example: torch.Tensor) -> torch.Tensor:
        """Where an input is what it is behind a prompt, bool [rows, tokens]."""
        if value is not None:
            return example == value
        rows_first = example.movedim(self._row_axis(node) or 0, 0).movedim(-1, 1)
        by_token = rows_first.reshape(*rows_first.shape[:2], -1)  # rows, tokens, others
        before = by_token.amax(2).cummax(1).values[:, :-1, None]
        first = torch.ones(len(by_token), 1, dtype=torch.bool)
        return torch.cat([first, (by_token[:, 1:] == before + 1).all(2)], 1)

    def enter(self) -> None:
        """Make the inputs that hold a prompt, where that is more than text."""
        if not self:
            return
        builder, new = self.builder, self.builder.new
        for node in (self.ids, *self.given):
            name = str(node.target) if node in self.given else f"prompt_{node.target}"
            sizes = [new.size_value(size, new.prompt) for size in shape(node)]
            builder.prompts[node] = new.placeholder(name, sizes, node.meta["val"].dtype)
        new.placeholder(PROMPT_LENGTHS, [new.batch if new.batch is not None else 1], torch.int64)
        for node, value in self.given.items():
            rank, row = len(shape(node)), self._row_axis(node)
            order = [row, rank - 1, *(axis for axis in range(rank - 1) if axis != row)]
            table = builder.prompts[node] if rank == 2 else new.call(aten.permute.default, builder.prompts[node], order)
            own = self._counted(table) if value is None else self._same(node, value)
            target, *args = self._chosen(table, own)
            made = new.call(target, *args)
            back = [order.index(axis) for axis in range(rank)]
            builder.values[node, ""] = made if rank == 2 else new.call(aten.permute.default, made, back)

    def _counted(self, table: fx.Node) -> fx.Node:
        """What a chunk's tokens are behind a prompt: they count on from its greatest number, of all axes."""
        new = self.builder.new
        ends = new.call(aten.unsqueeze.default, new.inputs[PROMPT_LENGTHS], 1)
        inside = new.call(aten.lt.Tensor, new.call(aten.arange.default, new.sizer(new.prompt)), ends)
        greatest = table
        if len(shape(table)) > 2:
            greatest = new.call(aten.amax.default, greatest, list(range(2, len(shape(table)))))
        none = new.call(aten.full_like.default, greatest, torch.iinfo(table.meta["val"].dtype).min)
        greatest = new.call(aten.amax.default, new.call(aten.where.self, inside, greatest, none), [1], True)
        steps = new.call(aten.sub.Tensor, self.builder.rows.positions(), new.call(aten.sub.Tensor, ends, 1))
        if table.meta["val"].dtype != torch.int64:
            steps = new.call(aten._to_copy.default, steps, dtype=table.meta["val"].dtype)
        own = new.call(aten.add.Tensor, greatest, steps)
        for _ in shape(table)[2:]:
            own = new.call(aten.unsqueeze.default, own, -1)
        return own

    def _same(self, node: fx.Node, value: float) -> fx.Node:
        """One number for each token of the chunk."""
        new = self.builder.new
        sizes = [new.sizer(new.size_value(size, new.chunk)) for size in shape(node)]
        return new.full(sizes, value, node.meta["val"].dtype)

    def hook(self, node: fx.Node) -> fx.Node:
        """The node's value on a chunk: the prompt's rows where the chunk is in it, else the tokens' own."""
        text, builder = self.derived.get(node), self.builder
        own = builder.value(node.args[0], "chunk") if text is None else self._same(node, text)  # type: ignore[arg-type]
        table = builder.value(node, "prompt")
        builder.new.edits["replaced"] += 1
        target, *args = self._chosen(table, own)
        return builder.copied_as(node, target, *args)

    @cached_property
    def _places(self) -> tuple[fx.Node, fx.Node, fx.Node]:
        """Which of a chunk's tokens are the prompt's, ``[rows, chunk]``, and where those lie in it: rows, places."""
        new = self.builder.new
        positions = self.builder.rows.positions()
        ends = new.call(aten.unsqueeze.default, new.inputs[PROMPT_LENGTHS], 1)
        at = new.call(aten.minimum.default, positions, new.call(aten.sub.Tensor, ends, 1))
        count = 1 if new.batch is None else new.sizer(new.batch)
        rows = new.call(aten.unsqueeze.default, new.call(aten.arange.default, count), 1)
        return new.call(aten.lt.Tensor, positions, ends), rows, at

    def _chosen(self, table: fx.Node, own: fx.Node) -> tuple[Any, ...]:
        """A call that gives what a chunk's tokens are: of the prompt's from the table, else their own."""
        new = self.builder.new
        inside, rows, at = self._places
        for _ in shape(own)[2:]:
            inside = new.call(aten.unsqueeze.default, inside, -1)
        taken = new.call(aten.index.Tensor, table, [rows, at])
        if own.meta["val"].dtype != torch.bool:
            return aten.where.self, inside, taken, own
        taken = new.call(aten.logical_and.default, inside, taken)  # ONNX Runtime selects no truth values
        own = new.call(aten.logical_and.default, new.call(aten.logical_not.default, inside), own)
        return aten.logical_or.default, taken, own
