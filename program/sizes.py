"""Inputs of other sizes than those that a program was captured with."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from offramp.program.graph import expression, placeholders, shape
from offramp.program.program import Program


def resized(program: Program, sizes: Mapping[Any, int]) -> dict[str, torch.Tensor]:
    """The example inputs, cropped or repeated (there and back) along the axes named by their symbols in ``sizes``."""
    inputs = {}
    nodes = placeholders(program.graph)
    for name in program.inputs:
        node, value = nodes[name], program.example_inputs[name]
        for axis, size in enumerate(shape(node)):
            wanted = sizes.get(expression(size))
            if wanted is not None and wanted != value.shape[axis]:
                places = torch.arange(wanted) % (2 * value.shape[axis])
                places = torch.minimum(places, 2 * value.shape[axis] - 1 - places)
                value = value.index_select(axis, places)
        inputs[name] = value
    return inputs


def other_sizes(program: Program) -> list[dict[str, torch.Tensor]]:
    """Inputs of sizes that were not captured: one row, one more row, shorter and longer sequences.

    Sizes that the graph cannot run in torch (a convolution's output must fit a table of positions, say) are
    left out.
    """
    return [inputs for inputs, _ in at_other_sizes(program)]


def at_other_sizes(program: Program) -> list[tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]]:
    """The inputs of `other_sizes`, each with the model's outputs that the graph gives for them in torch."""
    axes = program.axes
    example: dict[Any, int] = {}
    nodes = placeholders(program.graph)
    for name in program.inputs:
        for axis, size in enumerate(shape(nodes[name])):
            if not isinstance(expression(size), int):
                example.setdefault(expression(size), program.example_inputs[name].shape[axis])
    choices: list[dict[Any, int]] = []
    if axes.batch in example:
        choices += [{axes.batch: 1}, {axes.batch: example[axes.batch] + 1}]
    rest = {symbol: size for symbol, size in example.items() if symbol != axes.batch}
    if rest:
        choices.append({symbol: _within(axes.ranges.get(symbol), size * 2 // 3) for symbol, size in rest.items()})
        longer = {symbol: _within(axes.ranges.get(symbol), size + size // 2 + 1) for symbol, size in rest.items()}
        choices.append(longer | ({axes.batch: 1} if axes.batch in example else {}))
    found = [(inputs, _outputs(program, inputs)) for inputs in (resized(program, sizes) for sizes in choices)]
    return [(inputs, outputs) for inputs, outputs in found if outputs is not None]


def _outputs(program: Program, inputs: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor] | None:
    try:
        with torch.no_grad():
            returned = program.module(**program.fresh(inputs))
    except (RuntimeError, IndexError, ValueError):
        return None
    return program.as_returned(returned, inputs)


def _within(limits: tuple[int, int | None] | None, size: int) -> int:
    low, high = limits or (1, None)
    return max(low, 2, size if high is None else min(high, size))
