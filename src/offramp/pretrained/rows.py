"""Models that fix how many rows they take: of those one row at a time is more use than the example's two."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from offramp.errors import OfframpError
from offramp.pretrained.masks import Capture, Inputs
from offramp.program.capture import fixes_rows

if TYPE_CHECKING:
    from torch import nn

    from offramp.program.program import Program


def one_by_one(
    program: Program, module: nn.Module, inputs: Inputs, capture: Capture, note: Callable[[str], None]
) -> tuple[Program, Inputs]:
    """The program and its inputs; of one row where the model's own code fixes their number, which goes to ``note``."""
    if not fixes_rows(program.graph, inputs):
        return program, inputs
    one = {name: value[:1] for name, value in inputs.items()}
    try:
        found = capture(module, one)
    except OfframpError:
        return program, inputs
    note("the model's code fixes the number of rows: captured once more with one, which the bundle takes at a time")
    return found, one
