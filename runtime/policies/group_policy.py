"""A policy at a stack whose tokens leave in groups: each group is asked as a stack of its own is."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import NamedTuple, TypeAlias

import numpy as np
from numpy.typing import NDArray

from offramp.bundle.expressions import evaluate
from offramp.bundle.manifest import Stack
from offramp.runtime.policies.base import Cost, Policy, Rows, Scores
from offramp.runtime.policies.stack_policy import Record, StackPolicy


class _Layout(NamedTuple):
    """The places that groups have among scores, the place of each token, and the places that stand for no tokens."""

    parts: tuple[slice, ...]
    tokens: NDArray[np.int64]
    empty: NDArray[np.int64]


@lru_cache(256)
def _layout(counts: tuple[int, ...], alone: tuple[bool, ...]) -> _Layout:
    """For groups of so many tokens, which leave alone or together."""
    scores = [count if apart else 1 for count, apart in zip(counts, alone, strict=True)]
    parts = tuple(slice(end - count, end) for count, end in zip(scores, itertools.accumulate(scores), strict=True))
    times = [count // (score or 1) for count, score in zip(counts, scores, strict=True) for _ in range(score)]
    return _Layout(parts, np.repeat(np.arange(sum(scores)), times), np.flatnonzero(np.array(times) == 0))


class GroupPolicy:
    """The groups of one stack in one run. A row leaves once all its groups have.

    ``value`` is the name of the value that says where tokens are that have not left. Of a group whose tokens leave
    alone, token ``t`` of row ``r`` is asked as row ``r * tokens + t``.
    """

    def __init__(self, policy: Policy, stack: Stack, batch: int, sizes: Mapping[str, int]) -> None:
        self._stack, self.value, self._costs = stack, stack.places or "", Cost in policy.observes
        counts = tuple(evaluate(group.tokens, sizes) for group in stack.groups)
        layout = _layout(counts, tuple(group.alone for group in stack.groups))
        self._parts, self._tokens = layout.parts, layout.tokens
        self._groups = {
            name: StackPolicy(policy, group, batch * (part.stop - part.start))
            for (name, group), part in zip(stack.by_group.items(), self._parts, strict=True)
        }
        places = self._parts[-1].stop
        self._inside = np.ones((batch, places), np.bool_)  # by rows that are in the stack
        self._depths = np.full((batch, places), stack.blocks)  # by place in the batch
        if layout.empty.size:  # nobody waits for no tokens
            self._inside[:, layout.empty], self._depths[:, layout.empty] = False, stack.exits[0].after
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
        """The scores by group, ``after`` and measure, as `StackPolicy` has them; [batch, tokens] of tokens alone."""
        found: dict[str, Record] = {}
        for (name, asked), group, part in zip(self._groups.items(), self._stack.groups, self._parts, strict=True):
            sizes = (-1, part.stop - part.start) if group.alone else (-1,)
            found[name] = {
                after: {measure: score.reshape(sizes) for measure, score in scores.items()}
                for after, scores in asked.record.items()
            }
        return found

    def exits(self, depths: NDArray[np.int64]) -> dict[str, NDArray[np.int64]]:
        """After how many blocks each row's tokens left, by group: int64 [batch]; [batch, tokens] of tokens alone."""
        return {
            name: self._depths[:, part] if group.alone else self._depths[:, part.start]
            for name, group, part in zip(self._groups, self._stack.groups, self._parts, strict=True)
        }

    def places(self) -> NDArray[np.int64]:
        """Where the tokens are that have not left: int64 [rows, tokens]; a row with fewer repeats its first."""
        return active_places(self._inside[:, self._tokens])

    def leave(self, after: int, rows: NDArray[np.int64], found: Scores) -> Rows:
        """Which of ``rows`` have left altogether; ``found`` has the wanted scores, [rows, groups]."""
        for group, part in zip(self._groups.values(), self._parts, strict=True):
            wanted = group.wanted[after]
            if wanted is None:
                continue
            here, at = np.nonzero(self._inside[:, part])
            if not here.size:
                continue
            scores = {name: found[name][here, part.start + at] for name in wanted}
            leaves = group.leave(after, rows[here] * (part.stop - part.start) + at, scores)
            if leaves.any():
                here, at = here[leaves], part.start + at[leaves]
                self._inside[here, at], self._depths[rows[here], at] = False, after
            group.keep(np.flatnonzero(~leaves))
        return np.logical_not(self._inside.any(1))

    def keep(self, stay: NDArray[np.int64]) -> None:
        """Forget the rows that left; ``stay`` says which of the last rows did not."""
        self._inside = self._inside[stay]

    def report(self, depths: Sequence[int] | NDArray[np.int64], milliseconds: float) -> None:
        """Tell the policy what the stack took, if it wants to know; the groups share it by their tokens."""
        if not self._costs:
            return
        for group, part in zip(self._groups.values(), self._parts, strict=True):
            share = np.isin(self._tokens, np.arange(part.start, part.stop)).mean()
            group.report(self._depths[:, part].ravel(), milliseconds * float(share))


def active_places(inside: Rows) -> NDArray[np.int64]:
    """Where tokens are True, in order: int64 [rows, the most of a row]; a row with fewer repeats its first one."""
    if len(inside) == 1:
        return np.flatnonzero(inside)[None]
    counts = inside.sum(1)
    order = np.argsort(~inside, axis=1, kind="stable")[:, : int(counts.max(initial=0))]
    return np.where(np.arange(order.shape[1]) < counts[:, None], order, order[:, :1])


#: What decides at the exits of a stack.
StackLike: TypeAlias = StackPolicy | GroupPolicy


def asked_at(stacks: Mapping[str, Stack], policy: Policy, batch: int, sizes: Mapping[str, int]) -> dict[str, StackLike]:
    """A policy at each stack in one run over axes of these sizes."""
    return {
        name: GroupPolicy(policy, stack, batch, sizes) if stack.groups else StackPolicy(policy, stack, batch)
        for name, stack in stacks.items()
    }
