"""Blocks that run on the tokens that have not left: queries are fewer, keys and values are all tokens'."""

from __future__ import annotations

import operator
from collections.abc import Iterable

import torch
from torch import fx

from offramp.passes.caches.content_masks import product_of
from offramp.passes.groups.resized import Resized
from offramp.passes.infra.editor import Editor
from offramp.program.analysis.attention import AttentionSite
from offramp.program.analysis.attention_search import attention_sites
from offramp.program.graph import ancestors, aten, data_inputs, expression, shape
from offramp.program.groups import Groups, token_axis
from offramp.program.ops import PUT_TOKENS, TAKE_TOKENS


def run_on_active(editor: Editor, item: Groups, first: int) -> fx.Node:
    """Let the blocks of a stack behind the first ``first`` run on some tokens; returns the input that says on which.

    ``h -> block -> h'``  becomes  ``put(h, places, block(take(h, places), keys = h))``
    """
    program = editor.program
    stack = program.stacks[item.stack]
    axis = token_axis(program, stack.input)
    hidden = program.nodes[stack.input]
    tokens, rows = expression(shape(hidden)[axis]), 1 - axis
    count = editor.new_size(f"{item.stack}_active", max(2, item.total(program)))
    places = editor.input(item.places, (shape(hidden)[rows], count), torch.int64)
    sites = attention_sites(editor.graph)
    for depth in range(first, stack.blocks):
        before, after = editor[stack.cuts[depth]], editor[stack.cuts[depth + 1]]
        inside = {editor[node.name] for node in program.block_nodes(stack, depth)}
        _block(editor, [node for node in editor.graph.nodes if node in inside], before, after, places, axis, tokens, sites)
    editor.drop_dead(keep=program.pinned)
    return places


def _block(
    editor: Editor,
    nodes: list[fx.Node],
    before: fx.Node,
    after: fx.Node,
    places: fx.Node,
    axis: int,
    tokens: object,
    sites: Iterable[AttentionSite],
) -> None:
    """One block."""
    inside = {before, *nodes}
    reads = {node: [arg for arg in data_inputs(node) if arg in inside] for node in nodes}
    keys = {(reader, arg) for site in sites if site.weights in inside for reader, arg in _keys(site)}
    whole = ancestors([arg for _, arg in keys], stop=[before])
    whole |= {node for node in nodes if node.target is operator.getitem and node.args[0] in whole}
    some = {after}
    for node in reversed(nodes):
        if node in some and node not in whole:
            some.update(arg for arg in reads[node] if (node, arg) not in keys)

    def take(node: fx.Node, along: int) -> fx.Node:
        turned = along == 0  # rows lie behind the tokens
        node = editor.call(aten.transpose.int, node, 0, 1, at=after.prev) if turned else node
        node = editor.call(TAKE_TOKENS, node, places, along or 1, at=after.prev)
        return editor.call(aten.transpose.int, node, 0, 1, at=after.prev) if turned else node

    count = editor.call(aten.sym_size.int, places, 1, at=before)
    copies = Resized(editor, tokens, count, after, take, both=False)
    for node in [before, *nodes]:
        if node in some and node in whole | {before}:
            along = next(i for i, size in enumerate(shape(node)) if expression(size) == tokens)
            copies.made[node] = take(node, along)
        elif node in some:
            copies.copy(node, {arg: arg for arg in reads[node] if (node, arg) in keys})
    made, old = copies.made[after], before
    if axis == 0:
        made, old = (editor.call(aten.transpose.int, node, 0, 1, at=after.prev) for node in (made, old))
        put = editor.call(PUT_TOKENS, old, places, made, 1, at=after.prev)
        editor.rewrite(after, aten.transpose.int, put, 0, 1)
    else:
        editor.rewrite(after, PUT_TOKENS, old, places, made, axis)


def _keys(site: AttentionSite) -> list[tuple[fx.Node, fx.Node]]:
    """Who reads keys and values of an attention."""
    return [(site.output if site.form == "sdpa" else product_of(site), site.key), (site.output, site.value)]
