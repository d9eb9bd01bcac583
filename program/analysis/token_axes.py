"""Which symbols of the shapes count rows of a batch, and which count tokens."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import sympy
import torch
from torch import fx

from offramp.program.analysis.attention import AttentionSite
from offramp.program.graph import aten, expression, is_tensor, placeholders, read_by, results, shape, sizes_of


@dataclass(frozen=True)
class Axes:
    """The free axes of a program.

    ``names`` maps every symbol that is a size of some input to a name. ``batch`` is the symbol along which
    nothing mixes: the rows. ``tokens`` are the symbols that attention mixes along. ``ranges`` gives the least
    and the greatest size of each (None: no limit).
    """

    names: Mapping[Any, str] = field(default_factory=dict)
    batch: Any = None
    tokens: tuple[Any, ...] = ()
    ranges: Mapping[Any, tuple[int, int | None]] = field(default_factory=dict)

    def describe(self, size: Any) -> int | str:
        """A size as an int, or as an expression over axis names (``"7*batch"``)."""
        found = expression(size)
        if isinstance(found, (int, sympy.Integer)):
            return int(found)
        text = str(found.subs({symbol: sympy.Symbol(name) for symbol, name in self.names.items()}))
        return text.replace("Max(", "max(").replace("Min(", "min(")

    def batch_axis(self, node: fx.Node) -> tuple[int, int] | None:
        """The axis of a tensor along which rows lie, and how many places each row takes; None if no axis does.

        Raises:
            ValueError: rows do not lie along one axis in blocks of equal, fixed size.
        """
        found = None
        for axis, size in enumerate(shape(node)):
            size = expression(size)
            if self.batch is None or self.batch not in getattr(size, "free_symbols", ()):
                continue
            factor = size / self.batch
            if found is not None or not isinstance(factor, sympy.Integer):
                raise ValueError(f"{node.name} has shape {[self.describe(s) for s in shape(node)]}")
            found = (axis, int(factor))
        return found


def find_axes(
    module: fx.GraphModule,
    example: Mapping[str, torch.Tensor],
    sites: Sequence[AttentionSite],
    given: Mapping[Any, str],
) -> Axes:
    """The axes of a captured graph.

    Tokens are read off the attention sites. The batch axis is the free input axis along which a change of
    the first place changes nothing elsewhere: that is tried on the example inputs, so no knowledge of the
    model is needed. ``given`` holds the names that the user chose.
    """
    inputs = placeholders(module.graph)
    symbols: dict[Any, tuple[str, int]] = {}
    for name, node in inputs.items():
        for axis, size in enumerate(shape(node)):
            size = expression(size)
            if isinstance(size, sympy.Symbol):
                symbols.setdefault(size, (name, axis))
    attended: set[Any] = set()
    for site in sites:
        for size in site.token_sizes:
            attended |= getattr(expression(size), "free_symbols", set())
    batch = next((s for s in _by_axis(symbols) if s not in attended and _independent(module, example, s)), None)
    tokens = tuple(s for s in symbols if s in attended)
    return Axes(_names(symbols, batch, tokens, given), batch, tokens, _ranges(inputs.values(), symbols))


def _by_axis(symbols: Mapping[Any, tuple[str, int]]) -> list[Any]:
    return sorted(symbols, key=lambda symbol: symbols[symbol][1])


def _independent(module: fx.GraphModule, example: Mapping[str, torch.Tensor], symbol: Any) -> bool:
    """Whether changing the first place along ``symbol`` leaves the outputs at all other places as they are."""
    changed, places = dict(example), {}
    for name, node in placeholders(module.graph).items():
        for axis, size in enumerate(sizes_of(node)):
            if size == symbol:
                changed[name] = _perturbed(changed[name], axis)
                places[name] = axis
    outputs = list(results(module.graph).items())
    if not all(symbol in sizes_of(node) for _, node in outputs) or _decide_together(module.graph, symbol):
        return False
    with torch.no_grad():
        before = module(**example)
        try:
            after = module(**changed)
        except (IndexError, RuntimeError):  # such ids are not valid: the last place's are
            after = module(
                **{
                    name: _rolled(example[name], places[name]) if name in places else value
                    for name, value in example.items()
                }
            )
    for name, node in outputs:
        axis = next(i for i, size in enumerate(shape(node)) if expression(size) == symbol)
        rest = torch.arange(1, before[name].shape[axis])
        a, b = before[name].index_select(axis, rest), after[name].index_select(axis, rest)
        if not torch.allclose(a, b, rtol=1e-4, atol=1e-5, equal_nan=True):
            return False
    return True


def _decide_together(graph: fx.Graph, symbol: Any) -> bool:
    """Whether one choice for all places along ``symbol`` depends on them, which no change of the example may show."""
    choices = [node.args[0] for node in graph.find_nodes(op="call_function", target=aten.where.self)]
    single = [node for node in choices if isinstance(node, fx.Node) and not shape(node)]
    return any(symbol in sizes_of(node) for node in read_by(single) if is_tensor(node))


def _rolled(value: torch.Tensor, axis: int) -> torch.Tensor:
    """The first place along ``axis`` gets what the last one has."""
    value = value.clone()
    value.select(axis, 0).copy_(value.select(axis, -1))
    return value


def _perturbed(value: torch.Tensor, axis: int) -> torch.Tensor:
    value = value.clone()
    first = value.select(axis, 0)
    if value.dtype == torch.bool:
        first.logical_not_()
    elif value.is_floating_point():
        first.add_(torch.linspace(0.5, 1.5, first.numel(), dtype=value.dtype).reshape(first.shape))
    else:  # ids and masks: 0 and 1 are valid for both
        first.copy_((first == 0).to(value.dtype))
    return value


def _names(
    symbols: Mapping[Any, tuple[str, int]], batch: Any, tokens: Sequence[Any], given: Mapping[Any, str]
) -> dict[Any, str]:
    names = dict(given)
    for symbol, (name, axis) in symbols.items():
        if symbol in names:
            continue
        wanted = "batch" if symbol == batch else "tokens" if symbol in tokens else f"{name}_{axis}"
        taken = set(names.values())
        names[symbol] = wanted if wanted not in taken else f"{wanted}_{name}_{axis}"
    return names


def _ranges(inputs: Any, symbols: Mapping[Any, tuple[str, int]]) -> dict[Any, tuple[int, int | None]]:
    """Limits as torch.export found them, but one row is always allowed: capture fixes sizes of one only."""
    ranges: dict[Any, tuple[int, int | None]] = {}
    for node in inputs:
        for size in shape(node) if is_tensor(node) else ():
            if expression(size) in symbols:
                found = size.node.shape_env.var_to_range[expression(size)]
                upper = int(found.upper) if found.upper.is_number and found.upper < 2**31 else None
                lower = int(found.lower) if found.lower.is_number else 0
                ranges[expression(size)] = (1 if lower <= 2 else lower, upper)
    return ranges
