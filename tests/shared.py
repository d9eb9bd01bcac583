"""Programs that tests share: each is captured once in a process, as tracing is most of what a small model takes.

Programs never change, and neither may their weights: a test that trains takes a copy (``copy.deepcopy``). The end of
the session checks that.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Hashable
from typing import Any

import torch

from offramp.passes import apply
from offramp.program import Program, capture

_LENT: list[tuple[Program, str, dict[str, torch.Tensor]]] = []
_KNOWN: dict[Hashable, Any] = {}


def lent(program: Program) -> Program:
    """The program, remembered as it is now."""
    weights = {name: weight.detach().clone() for name, weight in program.graph_module.state_dict().items()}
    _LENT.append((program, str(program.graph), weights))
    return program


def check() -> None:
    """Fail where a program that was lent is not as it was."""
    for program, graph, before in _LENT:
        after = program.graph_module.state_dict()
        assert str(program.graph) == graph, "a test or a pass changed a shared program in place"
        assert after.keys() == before.keys(), "a test or a pass changed a shared program in place"
        changed = [name for name, weight in before.items() if not torch.equal(weight, after[name])]
        assert not changed, f"a test changed weights of a shared program: {changed}"


def once(key: Hashable, make: Callable[[], Any]) -> Any:
    """What ``make`` gives, made once for each key."""
    if key not in _KNOWN:
        _KNOWN[key] = make()
    return _KNOWN[key]


@functools.cache
def captured(factory: Callable[[], tuple[torch.nn.Module, dict[str, torch.Tensor]]]) -> Program:
    """The program of a factory of ``architectures`` or ``decoders``."""
    return lent(capture(*factory()))


@functools.cache
def cached(factory: Callable[[], tuple[torch.nn.Module, dict[str, torch.Tensor]]]) -> Program:
    """The same with caches."""
    return lent(apply(captured(factory), "insert-cache"))
