"""What is done where the user names no passes: caches, where the model generates text with them."""

from __future__ import annotations

from offramp.errors import OfframpError
from offramp.passes.caches.outputs import why_no_generation
from offramp.passes.infra.pipeline import apply
from offramp.program.program import Program


def with_caches(program: Program) -> tuple[Program, str | None]:
    """The program with caches where it can generate text, else as it is, and why not.

    There is no reason to tell (None) where no stack is causal, as in all encoders.
    """
    if program.cache is not None or not any(stack.role == "decoder" for stack in program.stacks.values()):
        return program, None
    try:
        made = apply(program, "insert-cache")
    except OfframpError as error:
        return program, error.reason if error.hint is None else f"{error.reason}; try: {error.hint}"
    reason = why_no_generation(made)
    return (made, None) if reason is None else (program, reason)
