"""A stack for each group of tokens, with the same weights."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import cache
from typing import Any

import torch
from torch import fx

from offramp.errors import PassError
from offramp.passes.groups.bounds import group_bounds
from offramp.passes.groups.resized import Resized
from offramp.passes.infra.contract import PassResult
from offramp.passes.infra.editor import Editor
from offramp.program.analysis.attention import AttentionSite
from offramp.program.analysis.attention_search import attention_sites
from offramp.program.analysis.stacks import Stack
from offramp.program.compare import TOLERANCE, relative_error
from offramp.program.graph import aten, dependents, expression, placeholders, results, run, shape
from offramp.program.groups import Group, Groups, token_axis
from offramp.program.program import Program


def run_apart(editor: Editor, name: str, groups: Sequence[Group]) -> PassResult:
    """``h -> blocks -> h'``  becomes  ``cat(blocks(h[image]), blocks(h[text])) -> h'``."""
    program = editor.program
    stack, axis = program.stacks[name], token_axis(program, program.stacks[name].input)
    end, hidden = editor[stack.output], editor[stack.input]
    blocks = {node.name for depth in range(stack.blocks) for node in program.block_nodes(stack, depth)}
    for item in program.records:
        if set(item.pinned_nodes) & blocks:
            raise PassError(
                f"stack {name!r} has {item.kind} ({item.summary(program)}), which each group would need for itself",
                hint="split-modalities first",
            )
    inside = {editor[node.name] for node in dependents([program.nodes[stack.input]], program.graph)}
    tokens = expression(shape(hidden)[axis])

    def call(target: Any, *args: Any) -> fx.Node:
        return editor.call(target, *fx.node.map_arg(args, lambda arg: editor.nodes[arg.name]), at=end.prev)

    parts: list[Stack] = []
    for group, (start, stop) in zip(groups, group_bounds(program, groups, call), strict=True):

        @cache
        def take(node: fx.Node, along: int, start: Any = start, stop: Any = stop) -> fx.Node:
            return call(aten.slice.Tensor, node, along, start, stop)

        copies = Resized(editor, tokens, 0, end, take, both=True)
        copies.made[hidden] = take(hidden, axis)
        for depth in range(stack.blocks):
            # each block reads the size from its own input: so the files of all groups are the same
            copies.count = call(aten.sym_size.int, copies.made[editor[stack.cuts[depth]]], axis)
            for node in program.block_nodes(stack, depth):
                if editor[node.name] in inside:
                    copies.copy(editor[node.name], {})
        cuts = tuple(copies.made[editor[cut]].name for cut in stack.cuts)
        parts.append(replace(stack, name=f"{name}.{group.name}", cuts=cuts))
    editor.rewrite(end, aten.cat.default, [editor[part.output] for part in parts], axis)
    editor.drop_dead(keep={node for item in program.records for node in item.pinned_nodes})
    stacks = {
        key: item
        for old, whole in program.stacks.items()
        for key, item in ({part.name: part for part in parts} if old == name else {old: whole}).items()
    }
    return editor.finish(stacks=stacks)


def check_apart(program: Program, made: Program, name: str, groups: Sequence[Group]) -> None:
    """Raise where the groups' stacks do not give what the given one gives without attention between groups."""
    expected = _hidden_from_each_other(program, name, groups)
    with torch.no_grad():
        found = made.module(**made.fresh({name: made.example_inputs[name] for name in made.inputs}))
    error = max(relative_error(found[key], expected[key]) for key in program.outputs)
    if not error <= TOLERANCE:
        raise PassError(
            f"stacks of single groups differ from stack {name!r} without attention between them: {error:.1e}",
            hint="form=joint",
        )


def _hidden_from_each_other(program: Program, name: str, groups: Sequence[Group]) -> dict[str, torch.Tensor]:
    """What a program gives on its example where tokens of a stack see those of their group alone."""
    stack = program.stacks[name]
    counts = torch.tensor(Groups(name, tuple(groups)).counts(program, program.example_inputs))
    group = torch.arange(len(groups)).repeat_interleave(counts)
    apart = group[:, None] != group
    values: dict[fx.Node, Any] = {
        node: program.example_inputs[key] for key, node in placeholders(program.graph).items()
    }
    order = [node for node in program.graph.nodes if node.op != "output"]
    blocks = {node for depth in range(stack.blocks) for node in program.block_nodes(stack, depth)}
    done = 0
    with torch.no_grad():
        for site in attention_sites(program.graph):
            if site.weights in blocks:
                at = order.index(site.weights)
                run(program.graph_module, order[done:at], values)
                values[site.weights] = _hiding(site, values, apart)
                done = at + 1
        run(program.graph_module, order[done:], values)
    return {key: values[node] for key, node in results(program.graph).items()}


def _hiding(site: AttentionSite, values: dict[fx.Node, Any], apart: torch.Tensor) -> torch.Tensor:
    """An attention's weights (of the fused one the output) where some keys are hidden from some queries."""
    target: Any = site.weights.target
    given: Any = fx.node.map_arg((site.weights.args, dict(site.weights.kwargs)), values.__getitem__)
    args, kwargs = list(given[0]), dict(given[1])
    if site.form != "sdpa":
        return target(args[0].masked_fill(apart, -torch.inf), *args[1:], **kwargs)  # type: ignore[no-any-return]
    mask = args[3] if len(args) > 3 else kwargs.pop("attn_mask", None)
    if mask is None:
        mask = ~apart
    else:
        mask = mask & ~apart if mask.dtype == torch.bool else mask.masked_fill(apart, -torch.inf)
    return target(*args[:3], mask, *args[4:], **kwargs)  # type: ignore[no-any-return]
