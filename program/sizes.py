"""Inputs of other sizes than those that a program was captured with."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch.utils._sympy.functions import FloorDiv, Mod, PythonMod

from offramp.errors import ForwardError
from offramp.program.compare import unlike
from offramp.program.graph import expression, fake_mode, placeholders, shape
from offramp.program.program import Program

log = logging.getLogger(__name__)

Answers = Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]]

_SMALL = 2  # of anything torch takes no less
_NEAR = 16  # places


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
    """Inputs of sizes that were not captured: one row and longer sequences, one more row and shorter ones.

    Sizes that the graph cannot run in torch (a convolution's output must fit a table of positions, say) are
    left out; where that is so of several together, each is tried alone.
    """
    return [inputs for inputs, _ in at_other_sizes(program)]


def at_other_sizes(program: Program) -> list[tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]]:
    """The inputs of `other_sizes`, each with the model's outputs that the graph gives for them in torch."""
    axes = program.axes
    example = {symbol: program.example_inputs[name].shape[axis] for symbol, (name, axis) in _free(program).items()}
    longer = {symbol: _within(axes.ranges.get(symbol), size + size // 2 + 1) for symbol, size in example.items()}
    shorter = {symbol: _within(axes.ranges.get(symbol), size * 2 // 3) for symbol, size in example.items()}
    if axes.batch in example:
        longer[axes.batch], shorter[axes.batch] = 1, example[axes.batch] + 1
    choices: list[dict[Any, int]] = [longer, shorter] if example else []
    found = []
    while choices:
        sizes = choices.pop(0)
        inputs = resized(program, sizes)
        outputs = _outputs(program, inputs)
        if outputs is not None:
            found.append((inputs, outputs))
        elif len(sizes) > 1:
            choices += [{symbol: size} for symbol, size in sizes.items()]
    return found


def with_limits(program: Program) -> Program:
    """The program, whose axes that run at one size alone are said to have that size.

    Torch may leave an axis free though all that reads it needs one size, or one that is nearly the same: code may have
    made a number of it. Batch and tokens are known to vary, these if torch has found no least number of them; so is
    an axis without which the others do not vary (lengths that go together), but for those of one input that do not vary
    together either (patches and their features, of which the product is fixed).
    """
    axes, free = program.axes, _free(program)
    sizes = {
        symbol: program.example_inputs[name].shape[at] for symbol, (name, at) in free.items() if symbol in axes.names
    }
    rest = {symbol: size for symbol, size in sizes.items() if symbol != axes.batch}

    def runs(symbols: Iterable[Any]) -> bool:
        others = {s: rest[s] * 2 for s in symbols}, {s: rest[s] * 2 // 3 for s in symbols}
        return any(_outputs(program, resized(program, some)) is not None for some in others)

    ranges = dict(axes.ranges)
    known = {symbol for symbol in axes.tokens if axes.ranges.get(symbol, (1, None))[0] <= _SMALL}
    for symbol in rest.keys() - known:
        others = rest.keys() - {symbol}
        beside = {other for other in others - known if free[other][0] == free[symbol][0]}
        never = beside and not any(map(runs, ({symbol, *beside}, *([other] for other in beside))))
        if (not others or runs(others) or never) and not runs([symbol]):
            ranges[symbol] = (rest[symbol], rest[symbol])
            if symbol in axes.tokens:
                name, at = free[symbol]
                log.warning(
                    "%r is for %d places on axis %d alone: the model's code makes a number of a length; without an "
                    "input that is not needed, a mask of samples say, it may take others",
                    name,
                    rest[symbol],
                    at,
                )
    return replace(program, axes=replace(axes, ranges=ranges))


def where_the_same(program: Program, answers: Answers) -> Program:
    """The program, whose axes have one size where the model's code takes another way at the next (an odd one, say).

    Torch has noted what the code asked of sizes. ``answers`` gives the model's own outputs for inputs; where it takes
    none of other sizes, nor does the program, nothing is wrong.
    """
    ranges, free = dict(program.axes.ranges), _free(program)
    sizes = {symbol: program.example_inputs[name].shape[axis] for symbol, (name, axis) in free.items()}
    for symbol in free.keys() - {program.axes.batch}:
        other = _other_way(program, symbol, sizes)
        if other is None or _same_at(program, resized(program, {symbol: other}), answers):
            continue
        (name, at), size = free[symbol], sizes[symbol]
        ranges[symbol] = (size, size)
        log.warning(
            "%r is for %d places on axis %d alone: at %d the model's code takes another way", name, size, at, other
        )
    return replace(program, axes=replace(program.axes, ranges=ranges))


def _same_at(program: Program, inputs: dict[str, torch.Tensor], answers: Answers) -> bool:
    found = _outputs(program, inputs)
    if found is None:
        return True
    try:
        expected = answers(inputs)
    except ForwardError:
        return True
    return not unlike(found, lambda: _outputs(program, inputs) or {}, expected)


def _other_way(program: Program, symbol: Any, sizes: Mapping[Any, int]) -> int | None:
    """A size near an axis's at which something is not so that the model's code has asked, and found so; None: none."""
    env = fake_mode(program.graph).shape_env
    asked = {env.replace(guard.expr) for guard in env.guards} if env is not None else set()
    of_it = [expr for expr in asked if symbol in expr.free_symbols and expr.has(FloorDiv, Mod, PythonMod)]
    _, high = program.axes.ranges.get(symbol, (1, None))
    far = (1 << k for k in range(_NEAR.bit_length(), sizes[symbol].bit_length()))  # a convolution's steps are wide
    steps: list[int] = [*range(1, _NEAR + 1), *far]
    for other in (sizes[symbol] + step for step in steps):
        within = high is None or other <= high
        if within and any(expr.subs({**sizes, symbol: other}) == False for expr in of_it):  # noqa: E712 (sympy's)
            return other
    return None


def _free(program: Program) -> dict[Any, tuple[str, int]]:
    """The symbols of sizes that may vary, each with the first input, and its axis, that has it."""
    nodes, found = placeholders(program.graph), dict[Any, tuple[str, int]]()
    for name in program.inputs:
        for axis, size in enumerate(shape(nodes[name])):
            if not isinstance(expression(size), int):
                found.setdefault(expression(size), (name, axis))
    return found


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
