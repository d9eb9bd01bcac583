"""Kinds of values in a causal program, by what they depend on.

*Data* depends on the contents of the tokens, *memory* on those of other inputs only (an encoder's side), *positional*
on shapes only, *constant* on nothing. *Chunk* is positional over an axis of batch and tokens together
(``arange(batch * tokens)``): it counts places, not positions.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import torch
from torch import fx

from offramp.program.graph import data_inputs, is_symint, symbols
from offramp.program.program import Program

CONSTANT, POSITIONAL, CHUNK, MEMORY, DATA = "constant", "positional", "chunk", "memory", "data"


def kinds_of(
    program: Program, tokens: Any, own: Collection[fx.Node], implied: Collection[fx.Node]
) -> dict[fx.Node, str]:
    """The kind of every tensor node; ``own`` are the inputs over ``tokens``, of which ``implied`` say nothing new."""
    kinds: dict[fx.Node, str] = {}
    for node in program.graph.nodes:
        if node.op == "placeholder":
            kinds[node] = POSITIONAL if node in implied else DATA if node in own else MEMORY
        elif node.op == "get_attr":
            kinds[node] = CONSTANT
        elif node.op == "call_function" and not is_symint(node):
            sizes = [arg.meta["val"] for arg in node.all_input_nodes if is_symint(arg)] + _sizes(node)
            inner = {kinds[arg] for arg in data_inputs(node)}
            moves = any(tokens in symbols(size) for size in sizes) or bool(inner & {POSITIONAL, CHUNK})
            if DATA in inner or (MEMORY in inner and moves):
                kinds[node] = DATA
            elif MEMORY in inner:
                kinds[node] = MEMORY
            elif moves:
                flat = any({tokens, program.axes.batch} <= symbols(size) for size in sizes)
                kinds[node] = CHUNK if CHUNK in inner or flat else POSITIONAL
            else:
                kinds[node] = CONSTANT
    return kinds


def _sizes(node: fx.Node) -> list[Any]:
    values = node.meta["val"]
    tensors = values if isinstance(values, (tuple, list)) else (values,)
    return [size for value in tensors if isinstance(value, torch.Tensor) for size in value.shape]
