"""A policy at a stack whose tokens leave in groups: each group is asked as a stack of its own is."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from offramp.bundle.expressions import evaluate
from offramp.bundle.manifest import Stack
from offramp.runtime.policies.base import Policy, Rows, Scores
from offramp.runtime.policies.stack_policy import Record, StackPolicy


class GroupPolicy:
    """The groups of one stack in one run. A row leaves once all its groups have.

    ``value`` is the name of the value that says where tokens are that have not left.
    """

    def __init__(self, policy: Policy, stack: Stack, batch: int, sizes: Mapping[str, int]) -> None:
        self._stack, self.value = stack, stack.places or ""
        self._groups = {name: StackPolicy(policy, group, batch) for name, group in stack.by_group.items()}
        self._counts = [evaluate(group.tokens, sizes) for group in stack.groups]
        self._inside = np.ones((batch, len(self._counts)), np.bool_)  # by rows that are in the stack
        self._depths = np.full((batch, len(self._counts)), stack.blocks)  # by place in the batch
        asked = {after: [group.wanted[after] for group in self._groups.values()] for after in self._exits}
        self.wanted = {
            after: tuple(dict.fromkeys(name for names in found if names is not None for name in names))
            if any(names is not None for names in found)
            else None
            for after, found in asked.items()
        }

    @property
    def _exits(self) -> list[int]:
        return [exit_.after for exit_ in self._stack.exits[:-1]]

    def records(self) -> dict[str, Record]:
        """The scores by group, ``after`` and measure, as `StackPolicy` has them."""
        return {name: group.record for name, group in self._groups.items()}

    def exits(self, depths: NDArray[np.int64]) -> dict[str, NDArray[np.int64]]:
        """After how many blocks each row's tokens left, by group: int64 [batch]."""
        return dict(zip(self._groups, self._depths.T, strict=True))

    def places(self) -> NDArray[np.int64]:
        """Where the tokens are that have not left: int64 [rows, tokens]; a row with fewer repeats its first."""
        return active_places(np.repeat(self._inside, self._counts, axis=1))

    def leave(self, after: int, rows: NDArray[np.int64], found: Scores) -> Rows:
        """Which of ``rows`` have left altogether; ``found`` has the wanted scores, [rows, groups]."""
        for at, group in enumerate(self._groups.values()):
            here = np.flatnonzero(self._inside[:, at])
            wanted = group.wanted[after]
            if wanted is None or not here.size:
                continue
            leaves = group.leave(after, rows[here], {name: found[name][here, at] for name in wanted})
            gone = here[leaves]
            self._inside[gone, at] = False
            self._depths[rows[gone], at] = after
            group.keep(np.flatnonzero(~leaves))
        return np.logical_not(self._inside.any(1))

    def keep(self, stay: NDArray[np.int64]) -> None:
        """Forget the rows that left; ``stay`` says which of the last rows did not."""
        self._inside = self._inside[stay]

    def report(self, depths: Sequence[int] | NDArray[np.int64], milliseconds: float) -> None:
        """Tell the policy what the stack took, if it wants to know; the groups share it by their tokens."""
        total = sum(self._counts) or 1
        for group, count, found in zip(self._groups.values(), self._counts, self._depths.T, strict=True):
            group.report(found, milliseconds * count / total)


def active_places(inside: Rows) -> NDArray[np.int64]:
    """Where tokens are True, in order: int64 [rows, the most of a row]; a row with fewer repeats its first one."""
    counts = inside.sum(1)
    order = np.argsort(~inside, axis=1, kind="stable")[:, : int(counts.max(initial=1))]
    return np.where(np.arange(order.shape[1]) < counts[:, None], order, order[:, :1])


#: What is asked at the exits of a stack.
Asked: TypeAlias = StackPolicy | GroupPolicy


def asked_at(stacks: Mapping[str, Stack], policy: Policy, batch: int, sizes: Mapping[str, int]) -> dict[str, Asked]:
    """A policy at each stack in one run over axes of these sizes."""
    return {
        name: GroupPolicy(policy, stack, batch, sizes) if stack.groups else StackPolicy(policy, stack, batch)
        for name, stack in stacks.items()
    }
