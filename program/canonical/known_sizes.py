"""What constants select, or say how often to repeat, is one: its size is known, though the operator does not say so."""

from __future__ import annotations

import torch
from torch import fx

from offramp.program.graph import ancestors, aten, attribute, is_tensor, run, sizes_of

_UNTAGGED = (aten.repeat_interleave.self_Tensor,)  # made of one that is tagged


def known_sizes(module: fx.GraphModule) -> int:
    """Calls whose results have sizes that depend on what is in tensors become constants, where they read such alone.

    Weights are none: they are trained.
    """
    graph, edits = module.graph, 0
    for node in [node for node in graph.nodes if node.op == "call_function"]:
        if not is_tensor(node) or not _by_contents(node):
            continue
        read, sizes = ancestors([node]), sizes_of(node)
        if not all(_constant(module, arg) for arg in read) or not all(isinstance(size, int) for size in sizes):
            continue
        with torch.no_grad():
            value = run(module, [arg for arg in graph.nodes if arg in read], {})[node]
        name = f"{node.name}_known"
        module.register_buffer(name, value, persistent=False)
        with graph.inserting_before(node):
            made = graph.get_attr(name)
        made.meta = dict(node.meta)
        node.replace_all_uses_with(made)
        graph.erase_node(node)
        edits += 1
    return edits


def _by_contents(node: fx.Node) -> bool:
    """Whether the size of a call's result depends on what is in tensors."""
    return node.target in _UNTAGGED or torch.Tag.dynamic_output_shape in getattr(node.target, "tags", ())


def _constant(module: fx.GraphModule, node: fx.Node) -> bool:
    """Whether a node is a constant, or computed in a way that gives the same each time."""
    if node.op == "get_attr":
        return is_tensor(node) and not isinstance(attribute(module, str(node.target)), torch.nn.Parameter)
    return node.op == "call_function" and torch.Tag.nondeterministic_seeded not in getattr(node.target, "tags", ())
