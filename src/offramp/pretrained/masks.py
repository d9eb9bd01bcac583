"""Masks of example inputs that hide nothing, and with which a model is for one length alone."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import torch

from offramp.errors import OfframpError
from offramp.program.compare import TOLERANCE, relative_error
from offramp.program.forward import eager

if TYPE_CHECKING:
    from torch import Tensor, nn

    from offramp.program.program import Program

Inputs = Mapping[str, "Tensor"]
Capture = Callable[["nn.Module", Inputs], "Program"]


def without_masks(
    program: Program, module: nn.Module, inputs: Inputs, capture: Capture, note: Callable[[str], None]
) -> tuple[Program, Inputs]:
    """The program and its inputs, without masks of ones where that is what lets lengths vary, which goes to ``note``.

    Outputs are the same then for rows of one length.
    """
    fixed = _fixed(program)
    masks = [name for name, value in inputs.items() if not value.is_floating_point() and bool((value == 1).all())]
    fewer = {name: value for name, value in inputs.items() if name not in masks}
    if not fixed or not masks or not fewer or not _same(module, inputs, fewer):
        return program, inputs
    try:
        other = capture(module, fewer)
    except OfframpError:
        return program, inputs
    if len(_fixed(other)) >= len(fixed):
        return program, inputs
    note(
        f"captured once more without {', '.join(masks)}, with which it is for one length alone: now it takes any, rows "
        "of one batch the same"
    )
    return other, fewer


def _fixed(program: Program) -> list[Any]:
    """Axes of tokens that have one length alone."""
    ranges = program.axes.ranges
    return [symbol for symbol in program.axes.tokens if symbol in ranges and ranges[symbol][0] == ranges[symbol][1]]


def _same(module: nn.Module, inputs: Inputs, fewer: Inputs) -> bool:
    """Whether a model gives with fewer inputs what it gives with all."""
    try:
        with torch.no_grad():
            expected, found = eager(module, inputs), eager(module, fewer)
    except OfframpError:
        return False
    return expected.keys() == found.keys() and all(
        relative_error(found[name], value, least=1.0) <= TOLERANCE for name, value in expected.items()
    )
