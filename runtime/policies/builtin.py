"""The policies that offramp brings, by name; `offramp.runtime.policies.base` says what a policy is."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, get_type_hints

import numpy as np

from offramp.bundle.manifest import Exit, GroupStack, Stack
from offramp.bundle.parse import decode
from offramp.errors import PolicyError
from offramp.runtime.policies.adaptive import Adaptive
from offramp.runtime.policies.base import (
    Agreement,
    Bound,
    Cost,
    Never,
    Policy,
    Rows,
    State,
    as_policy,
    bound_of,
    listing,
    make_plain,
    named,
    scored,
    whole,
)
from offramp.runtime.policies.budget import Budget
from offramp.runtime.policies.thresholds import Confidence, Decay, Entropy, Learned, ShallowDeep, Verify
from offramp.runtime.policies.width import Width

__all__ = [
    "NAMED",
    "Adaptive",
    "Budget",
    "Confidence",
    "Decay",
    "Depth",
    "Each",
    "Entropy",
    "Learned",
    "Never",
    "Patience",
    "ShallowDeep",
    "Verify",
    "Width",
    "from_dict",
]


@dataclass(frozen=True, slots=True)
class Depth(Policy):
    """Every row leaves after so many blocks: ``Depth(2)`` in every stack, ``Depth({"encoder": 2})`` in one.

    Stacks that are not named run to full depth. This is how exits are tested.
    """

    depth: int | Mapping[str, int]

    def __post_init__(self) -> None:
        given: Any = self.depth
        by_stack = isinstance(given, Mapping)
        if any(whole(count) is None for count in (given.values() if by_stack else [given])):
            raise PolicyError(f"{self!r}: numbers of blocks", hint='Depth(2), or Depth({"encoder": 2})')
        plain = {name: int(count) for name, count in given.items()} if by_stack else int(given)
        object.__setattr__(self, "depth", plain)

    def measures(self, stack: str, exit_: Exit) -> tuple[str, ...] | None:
        depth = self.depth if isinstance(self.depth, int) else self.depth.get(stack)
        return () if depth == exit_.after else None

    def leave(self, state: State) -> Rows:
        return np.ones(state.rows.size, np.bool_)

    def bound(self, stack: str, after: int) -> Bound | None:
        return Bound()

    def check(self, stacks: Mapping[str, Stack]) -> None:
        depths = dict.fromkeys(stacks, self.depth) if isinstance(self.depth, int) else self.depth
        for name, depth in depths.items():
            named(stacks, name)
            if depth not in {exit_.after for exit_ in stacks[name].exits}:
                stack = stacks[name]
                of = stack.of if isinstance(stack, GroupStack) else name
                raise PolicyError(
                    f"stack {name!r} has no exit after {depth} blocks; there are:\n{listing(stacks)}",
                    hint=f"insert-exits{{stack={of},after={depth}}}" if 0 < depth < stack.blocks else None,
                )

    def to_dict(self) -> dict[str, Any]:
        return {"name": "depth", "depth": self.depth if isinstance(self.depth, int) else dict(self.depth)}


@dataclass(frozen=True, slots=True)
class Patience(Policy):
    """A row leaves once ``patience`` exits in a row agree with the one before (PABEE, arXiv 2006.04152, 3.2).

    Needs the measure "prediction", int64 [rows], at every exit that is to count.
    """

    patience: int

    def __post_init__(self) -> None:
        make_plain(self)
        if self.patience < 1:
            raise PolicyError(f"{self!r}: a patience is at least 1")

    def measures(self, stack: str, exit_: Exit) -> tuple[str, ...] | None:
        return ("prediction",) if "prediction" in exit_.scores else None

    def leave(self, state: State) -> Rows:
        now = state.scores["prediction"]
        before = [scores["prediction"] for scores in state.history.values()][-self.patience :]
        if len(before) < self.patience:
            return np.zeros(now.size, np.bool_)
        leaving: Rows = np.all([now == one for one in before], axis=0)
        return leaving

    def check(self, stacks: Mapping[str, Stack]) -> None:
        scored(stacks, "prediction")

    def to_dict(self) -> dict[str, Any]:
        return {"name": "patience", "patience": self.patience}


@dataclass(frozen=True, slots=True)
class Each(Policy):
    """A policy for each stack, Never for the others: ``Each({"encoder": Confidence(0.9)})``; functions are policies."""

    stacks: Mapping[str, Policy]

    def __post_init__(self) -> None:
        if not isinstance(self.stacks, Mapping):
            raise PolicyError(
                f"Each takes policies by the names of stacks, this is {self.stacks!r}",
                hint='Each({"encoder": Confidence(0.9)})',
            )
        made = {name: as_policy(given) for name, given in self.stacks.items()}
        object.__setattr__(self, "stacks", made)

    @property
    def observes(self) -> frozenset[type[Agreement | Cost]]:
        return frozenset().union(*(policy.observes for policy in self.stacks.values()))

    def observe(self, seen: Agreement | Cost) -> None:
        policy = self.stacks.get(seen.stack)
        if policy is not None and type(seen) in policy.observes:
            policy.observe(seen)

    def compares(self, stack: str) -> bool:
        policy = self.stacks.get(stack)
        return policy is not None and Agreement in policy.observes and policy.compares(stack)

    def measures(self, stack: str, exit_: Exit) -> tuple[str, ...] | None:
        return self.stacks[stack].measures(stack, exit_) if stack in self.stacks else None

    def picks(self, stack: str, exit_: Exit) -> tuple[str, ...] | None:
        return self.stacks[stack].picks(stack, exit_) if stack in self.stacks else None

    def leave(self, state: State) -> Rows:
        return self.stacks[state.stack].leave(state)

    def bound(self, stack: str, after: int) -> Bound | None:
        return bound_of(self.stacks[stack], stack, after)

    def check(self, stacks: Mapping[str, Stack]) -> None:
        for name, policy in self.stacks.items():
            named(stacks, name)
            policy.check({name: stacks[name]})

    def to_dict(self) -> dict[str, Any]:
        return {"name": "each", "stacks": {name: policy.to_dict() for name, policy in self.stacks.items()}}


_KINDS: tuple[type[Policy], ...] = (
    Never,
    Depth,
    Confidence,
    Entropy,
    Learned,
    Decay,
    Patience,
    ShallowDeep,
    Adaptive,
    Verify,
    Budget,
    Each,
    Width,
)
_POLICIES = {"stacks", "exits"}  # options that hold policies
NAMED: Mapping[str, type[Policy]] = {kind.__name__.lower(): kind for kind in _KINDS}


def from_dict(data: Mapping[str, Any]) -> Policy:
    """The policy that ``Policy.to_dict`` wrote: ``{"name": "confidence", "threshold": 0.9}``.

    Raises:
        PolicyError: there is no policy of that name, or it has no such options.
    """
    if not isinstance(data, Mapping):
        raise PolicyError(
            f"{data!r} is no policy that JSON has",
            hint='{"name": "confidence", "threshold": 0.9}, as to_dict writes it',
        )
    options = {key: value for key, value in data.items() if key != "name"}
    kind = NAMED.get(str(data.get("name")))
    if kind is None:
        raise PolicyError(f"no policy {data.get('name')!r}; there are {', '.join(NAMED)}")
    try:
        hints, problems = get_type_hints(kind), list[str]()
        for key in options.keys() & {item.name for item in fields(kind) if item.init} - _POLICIES:  # type: ignore[arg-type]
            decode(hints[key], options[key], key, problems)
        if problems:
            raise TypeError("; ".join(sorted(problems)))
        if "thresholds" in options:
            options["thresholds"] = {int(after): float(at) for after, at in options["thresholds"].items()}
        if isinstance(options.get("exits"), Mapping):
            options["exits"] = from_dict(options["exits"])
        if kind is Each:
            options["stacks"] = {stack: from_dict(item) for stack, item in options["stacks"].items()}
        return kind(**options)
    except (TypeError, ValueError, AttributeError, KeyError, RecursionError) as error:
        raise PolicyError(f"policy {data['name']!r} cannot have the options {options}: {error}") from error
