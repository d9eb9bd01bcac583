"""``offramp bench --depths``: from which share of early tokens on leaving early saves time.

A token that leaves early leaves work for later: the next one that goes deep computes the deeper blocks of all
that wait. So what counts is the time of a period of r tokens, of which r - 1 leave early.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from offramp.cli import _common, _generate, _inputs, _words
from offramp.errors import InputError
from offramp.runtime import Depth, Never, Policy

if TYPE_CHECKING:
    from offramp.bundle.manifest import Exit, Stack
    from offramp.runtime import Chain, State
    from offramp.runtime.generation.tokens import Token
    from offramp.runtime.policies.base import Rows

PERIODS = (2, 4, 8)
ALONE: dict[str, Any] = {
    "stop": (),
    "stop_strings": (),
    "temperature": 0,
    "beams": 1,
}  # all have as many steps
_LEAST = 1.0  # percent; less than that is noise
_WARM_UP = 3  # tokens: the prompt, and those that find caches cold


@dataclass(slots=True)
class EveryNth(Policy):
    """Leaves a stack after so many blocks, but goes to full depth at every n-th token; for one row of one run.

    It asks for the exit's scores and does not look at them, since a policy that decides by them has them computed.
    """

    stack: str
    depth: int
    period: int
    _asked: int = field(default=0, init=False)

    def measures(self, stack: str, exit_: Exit) -> tuple[str, ...] | None:
        return tuple(exit_.scores) if (stack, exit_.after) == (self.stack, self.depth) else None

    def leave(self, state: State) -> Rows:
        self._asked += 1
        return np.full(state.rows.size, self._asked % self.period != 0)


def run(chain: Chain, args: argparse.Namespace) -> int:
    """Measure and print."""
    if chain.manifest.cache is None:
        raise InputError("--depths: this bundle has no caches", hint='offramp export -p "insert-cache,insert-exits"')
    stack = _words.token_stack(chain)
    if len(stack.exits) < 2:
        raise InputError(
            f"stack {stack.name!r} has no exit before full depth", hint=f"insert-exits{{stack={stack.name}}}"
        )
    tokens = args.repeat or 32
    inputs = given(chain, args, tokens, "--depths")
    print(", ".join(f"{name} {list(np.shape(value))}" for name, value in inputs.items()), f"and {tokens} tokens\n")
    print(report(stack, times(chain, inputs, stack, tokens)))
    return 0


def given(chain: Chain, args: argparse.Namespace, tokens: int, whose: str) -> _inputs.Inputs:
    """What the user gave, and made up what that lacks: a prompt of ``--tokens``, or as many as leave room.

    ``whose`` option it is that times one row.
    """
    if args.batch != 1:
        raise InputError(f"{whose} times one row", hint="leave --batch out")
    cache = chain.manifest.cache
    assert cache is not None
    args.raw = False
    given = _inputs.one(chain, _generate.prompted(chain, args))
    length = args.tokens if cache.limit is None else min(args.tokens, cache.limit - tokens - _WARM_UP)
    if length < 1:
        raise InputError(f"the model takes {cache.limit} tokens, which leaves no room for {tokens} and a prompt")
    made_up = _inputs.made_up(chain, 1, length)
    rows = {len(value) for value in given.values()}
    if rows - {1}:
        raise InputError(f"{whose} times one row, these are {max(rows)}")
    return made_up | given


def times(chain: Chain, inputs: Mapping[str, Any], stack: Stack, tokens: int) -> dict[tuple[int, int], float]:
    """Median milliseconds a token by (depth, period); period 1 is full depth, period 0 never goes there."""
    early = [exit_.after for exit_ in stack.exits[:-1]]
    ways: dict[tuple[int, int], Policy] = {(stack.blocks, 1): Never()}
    ways |= {(depth, 0): Depth({stack.name: depth}) for depth in early}
    ways |= {(depth, period): EveryNth(stack.name, depth, period) for depth in early for period in PERIODS}
    count = tokens + _WARM_UP
    streams: dict[tuple[int, int], Iterator[Token]] = {
        way: chain.stream(inputs, policy, max_new_tokens=count, **ALONE) for way, policy in ways.items()
    }
    steps: dict[tuple[int, int], list[Token]] = {way: [] for way in ways}
    for _ in range(count):
        for way, stream in streams.items():
            steps[way].append(next(stream))
    return {way: _per_token(found[_WARM_UP:], way[1], stack.blocks) for way, found in steps.items()}


def _per_token(steps: list[Token], period: int, blocks: int) -> float:
    """The mean over a period of the medians of its early and its deep tokens."""
    deep = [step.milliseconds for step in steps if step.exit == blocks]
    early = [step.milliseconds for step in steps if step.exit != blocks]
    if period < 2:
        return statistics.median(deep or early)
    if not deep or not early:
        raise InputError(f"--repeat {len(steps)} is too few tokens: every {period}th goes to full depth")
    return ((period - 1) * statistics.median(early) + statistics.median(deep)) / period


def report(stack: Stack, found: Mapping[tuple[int, int], float]) -> str:
    """The table, and the smallest share of early tokens that pays."""
    full = found[stack.blocks, 1]
    early = [exit_.after for exit_ in stack.exits[:-1]]
    saved = {way: 100 * (1 - found[way] / full) for way in found}
    rows: list[list[object]] = [
        [f"{depth} of {stack.blocks}", found[depth, 0]] + [_percent(saved[depth, period]) for period in (0, *PERIODS)]
        for depth in early
    ]
    rows.append([f"{stack.blocks} of {stack.blocks}", full, *[""] * (1 + len(PERIODS))])
    heads = ["blocks", "ms a token", "all early", *(f"{period - 1} of {period} early" for period in PERIODS)]
    return f"{_common.table(heads, rows)}\n\n{_break_even(stack, saved)}"


def _break_even(stack: Stack, saved: Mapping[tuple[int, int], float]) -> str:
    for period in PERIODS:
        paying = {way: percent for way, percent in saved.items() if way[1] == period and percent >= _LEAST}
        if paying:
            depth, _ = best = max(paying, key=lambda way: paying[way])
            return (
                f"break-even: with {period - 1} of {period} tokens leaving after {depth} of {stack.blocks} blocks, "
                f"{paying[best]:.0f}% of the time is saved"
            )
    most = PERIODS[-1]
    return f"break-even: none; even {most - 1} of {most} tokens leaving early save less than {_LEAST:.0f}% of the time"


def _percent(value: float) -> str:
    return f"{value:+.1f}%"
