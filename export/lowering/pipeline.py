"""The pipeline of rewrites: named steps, each checked, and shown where asked."""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import sympy
import torch
from torch import fx
from torch._dispatch.python import enable_python_dispatcher
from torch.fx.experimental.symbolic_shapes import free_unbacked_symbols

from offramp.errors import ExportError
from offramp.program.fake_values import fake_result
from offramp.program.graph import expression, is_symint, is_tensor

log = logging.getLogger(__name__)

Rewritten = TypeVar("Rewritten")
#: A rewrite in place, or one that returns what it made.
Step = Callable[[Rewritten], Rewritten | None]
#: Looks at what a step made, and raises where it is wrong.
Check = Callable[[Rewritten], None]


def rewrite(
    given: Rewritten,
    steps: Mapping[str, Step[Rewritten]],
    where: str,
    check: Check[Rewritten] = lambda made: None,
    text: Callable[[Rewritten], str] = str,
) -> Rewritten:
    """Run steps by name, and ``check`` after each.

    With ``OFFRAMP_DUMP=dir`` in the environment every step writes what it got and what it made, as ``text`` has it,
    and the lines that changed, into ``dir/where``.

    Raises:
        ExportError: ``check`` refuses what a step made; the message names the step.
    """
    directory = os.environ.get("OFFRAMP_DUMP")
    for number, (name, step) in enumerate(steps.items(), 1):
        before, started = text(given) if directory else "", time.perf_counter()
        given = step(given) or given
        log.debug("%s: %s in %.3f s", where, name, time.perf_counter() - started)
        if directory:
            _dump(Path(directory) / where, f"{number:02d}-{name}", before, text(given))
        try:
            check(given)
        except ValueError as error:
            raise ExportError(
                f"{name} of {where}: {error}",
                hint="OFFRAMP_DUMP=dir shows what each step does; please report it with the model",
            ) from error
    return given


def _dump(directory: Path, stem: str, before: str, after: str) -> None:
    directory.mkdir(parents=True, exist_ok=True)
    (directory / f"{stem}.before.txt").write_text(f"{before}\n")
    (directory / f"{stem}.after.txt").write_text(f"{after}\n")
    old, new = before.splitlines(), after.splitlines()
    kept = set(old) & set(new)
    changes = [*(f"- {line}" for line in old if line not in kept), *(f"+ {line}" for line in new if line not in kept)]
    (directory / f"{stem}.changes.txt").write_text("\n".join([*changes, ""]))


class GraphCheck:
    """Checks a graph after each step: its order, and the shapes and dtypes of nodes that are new or read others now."""

    def __init__(self, graph: fx.Graph) -> None:
        self._seen = {node: _call(node) for node in graph.nodes}

    def __call__(self, graph: fx.Graph) -> None:
        """Raise a ValueError that names the first node that is wrong."""
        try:
            graph.lint()
        except RuntimeError as error:
            raise ValueError(str(error)) from error
        for node in graph.nodes:
            if node.op == "call_function" and self._seen.get(node) != _call(node):
                self._seen[node] = _call(node)
                _verify(node)


def _call(node: fx.Node) -> Any:
    return node.target, node.args, node.kwargs, id(node.meta.get("val"))


def _verify(node: fx.Node) -> None:
    """Compute the shape and dtype of a node's value from those of its arguments."""
    if "val" not in node.meta:
        raise ValueError(f"{node.format_node()} does not know its shape")
    modes = [arg.meta["val"].fake_mode for arg in node.all_input_nodes if is_tensor(arg)]
    if not modes or is_symint(node):
        return
    with enable_python_dispatcher():
        made = fake_result(modes[0], node.target, node.args, node.kwargs)
    found = node.meta["val"]
    pairs = zip(made, found, strict=True) if isinstance(found, (tuple, list)) else ((made, found),)
    for one, other in pairs:
        if isinstance(other, torch.Tensor) and not _alike(one, other):
            raise ValueError(f"{node.format_node()} makes {_kind(one)}, but is said to make {_kind(other)}")


def _alike(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Whether two values are of one kind; a size that depends on data is another symbol each time."""
    if one.dtype != other.dtype or len(one.shape) != len(other.shape):
        return False
    pairs = zip(one.shape, other.shape, strict=True)
    return all(equal_sizes(expression(a), expression(b)) or all(map(free_unbacked_symbols, (a, b))) for a, b in pairs)


def equal_sizes(one: Any, other: Any) -> bool:
    """Whether two sizes, as expressions or numbers, are the same."""
    return bool(one == other or sympy.expand(one - other) == 0)


def _kind(value: torch.Tensor) -> str:
    return f"{value.dtype} {list(value.shape)}"
