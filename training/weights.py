"""Weights of programs: which ones passes have added, and files of them."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Literal

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from offramp.errors import SpecError
from offramp.program.learners import WEIGHTS
from offramp.program.program import Program, as_program


def added(program: Program) -> dict[str, torch.nn.Parameter]:
    """The weights that passes have added to the captured model, by name."""
    mine = {str(node.target) for node in program.graph.nodes if node.op == "get_attr" and "provenance" in node.meta}
    return {name: weight for name, weight in program.graph_module.named_parameters() if name in mine}


def trained(program: Program, learners: bool) -> dict[str, torch.nn.Parameter]:
    """The `added` weights that are trained where the model is not; without ``learners`` those are part of it."""
    return {name: one for name, one in added(program).items() if learners or not name.startswith(f"{WEIGHTS}.")}


def save_weights(
    program: Program,
    path: str | os.PathLike[str],
    which: Literal["added", "all"] = "added",
    dtype: torch.dtype | None = None,
) -> None:
    """Write a program's weights as safetensors: those that passes have added, or all; floats as ``dtype``.

    Raises:
        SpecError: there are no such weights, the program, ``which`` or ``dtype`` is something else, or the file cannot
            be written.
    """
    as_program(program)
    if which not in ("added", "all"):
        raise SpecError(f"which={which!r}: there are added and all")
    if dtype is not None and not (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
        raise SpecError(f"dtype={dtype!r}: what floats are written as", hint="dtype=torch.float16")
    chosen = added(program) if which == "added" else dict(program.graph_module.named_parameters())
    if not chosen:
        raise SpecError("the passes have added no weights", hint="which='all', or a pass that does: insert-adapter")
    found = {name: weight.detach() for name, weight in chosen.items()}
    if dtype is not None:
        found = {name: weight.to(dtype) if weight.is_floating_point() else weight for name, weight in found.items()}
    try:
        save_file({name: weight.contiguous() for name, weight in found.items()}, path)
    except (OSError, SafetensorError) as error:
        raise SpecError(
            f"{os.fspath(path)} cannot be written: {error}", hint="a file in a directory that is there"
        ) from error
    Path(path).chmod(0o644)  # safetensors writes for the owner only


def load_weights(program: Program, path: str | os.PathLike[str], *, part: bool = False) -> None:
    """Read weights into a program, in place: what `save_weights` wrote for the same pipeline.

    With ``part``, what the program does not have (an exit, say) is left out.

    Raises:
        SpecError: the file cannot be read, or holds weights that the program does not have in that shape; no weight
            is changed then.
    """
    as_program(program)
    try:
        stored = load_file(path)
    except (OSError, SafetensorError) as error:
        raise SpecError(f"{os.fspath(path)} cannot be read: {error}", hint="a file of save_weights") from error
    mine = dict(program.graph_module.named_parameters())
    if part:
        stored = {name: value for name, value in stored.items() if name in mine}
    wrong = [
        f"{name} {list(value.shape)} (the program: {list(mine[name].shape) if name in mine else 'none'})"
        for name, value in stored.items()
        if name not in mine or mine[name].shape != value.shape
    ]
    if wrong:
        raise SpecError(
            f"{os.fspath(path)} has weights that do not fit the program: {', '.join(wrong[:5])}",
            hint="the same pipeline of passes as when they were saved",
        )
    with torch.no_grad():
        for name, value in stored.items():
            mine[name].copy_(value)
