"""Blocks that run on the tokens that have not left: queries are fewer, keys and values are all tokens'."""

from __future__ import annotations

import operator
from functools import partial

import torch
from torch import fx

from offramp.passes.caches.content_masks import product_of
from offramp.passes.groups.resized import Resized, taken, turned
from offramp.passes.infra.editor import Editor
from offramp.program.analysis.attention import AttentionSite
from offramp.program.analysis.attention_search import attention_sites
from offramp.program.graph import ancestors, aten, data_inputs, expression, shape
from offramp.program.groups import Groups, token_axis
from offramp.program.ops import PUT_TOKENS

#: What takes queries out of a product that makes keys and values too.
_PIECES = (operator.getitem, aten.select.int)


def run_on_active(editor: Editor, item: Groups, first: int) -> fx.Node:
    """Let the blocks of a stack behind the first ``first`` run on some tokens; returns the input that says on which.

    ``h -> block -> h'``  becomes  ``put(h, places, block(take(h, places), keys of h))``
    """
    active = _Active(editor, item)
    for depth in range(first, editor.program.stacks[item.stack].blocks):
        active.block(depth)
    editor.drop_dead(keep=editor.program.pinned)
    return active.places


class _Active:
    """A stack whose blocks are rewritten; ``places`` is the input that says which tokens run."""

    def __init__(self, editor: Editor, item: Groups) -> None:
        program = editor.program
        self.editor, self.stack = editor, program.stacks[item.stack]
        self.axis = token_axis(program, self.stack.input)
        sizes = shape(program.nodes[self.stack.input])
        self.tokens = expression(sizes[self.axis])
        count = editor.new_size(f"{item.stack}_active", max(2, item.total(program)))
        self.places = editor.input(item.places, (sizes[1 - self.axis], count), torch.int64)
        self.sites = attention_sites(editor.graph)

    def block(self, depth: int) -> None:
        """Rewrite a block: what queries and all behind them need is copied for the tokens that run."""
        editor = self.editor
        before, after = editor[self.stack.cuts[depth]], editor[self.stack.cuts[depth + 1]]
        nodes = [editor[node.name] for node in editor.program.block_nodes(self.stack, depth)]
        inside = {before, *nodes}
        reads = {node: [arg for arg in data_inputs(node) if arg in inside] for node in nodes}
        keys = {(reader, arg) for site in self.sites if site.weights in inside for reader, arg in _keys(site)}
        whole = ancestors([arg for _, arg in keys], stop=[before]) | {before}
        whole |= {node for node in nodes if node.target in _PIECES and node.args[0] in whole}
        some = {after}
        for node in reversed(nodes):
            if node in some - whole:
                some.update(arg for arg in reads[node] if (node, arg) not in keys)
        count = editor.call(aten.sym_size.int, self.places, 1, at=before)
        take = partial(taken, editor, self.places, after)
        copies = Resized(editor, self.tokens, count, after, take, both=False)
        for node in [before, *nodes]:
            if node in some & whole:
                axis = next(i for i, size in enumerate(shape(node)) if expression(size) == self.tokens)
                copies.made[node] = take(node, axis)
            elif node in some:
                copies.copy(node, {arg: arg for arg in reads[node] if (node, arg) in keys})
        self._put(before, copies.made[after], after)

    def _put(self, before: fx.Node, made: fx.Node, after: fx.Node) -> None:
        """Let the block's output be its input, but for the tokens that ran."""
        if self.axis == 1:
            self.editor.rewrite(after, PUT_TOKENS, before, self.places, made, 1)
            return
        old, new = (turned(self.editor, node, after) for node in (before, made))
        put = self.editor.call(PUT_TOKENS, old, self.places, new, 1, at=after.prev)
        self.editor.rewrite(after, aten.transpose.int, put, 0, 1)


def _keys(site: AttentionSite) -> list[tuple[fx.Node, fx.Node]]:
    """Who reads keys and values of an attention."""
    return [(site.output if site.form == "sdpa" else product_of(site), site.key), (site.output, site.value)]
