"""What a policy is: scores in, "leave" or "go on" out, for each row by itself.

One object may serve many runs and threads at once. Most policies are frozen: what they decide depends on the
`State` alone. A policy that `observes` learns, and what it has learned is shared by all rows and all runs that it
serves; it guards that with a lock, and keeps nothing of any single row.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, fields, is_dataclass
from functools import cache
from numbers import Integral, Real
from typing import Any, NamedTuple, TypeAlias, get_type_hints

import numpy as np
from numpy.typing import NDArray

from offramp.bundle.manifest import Exit, Stack
from offramp.bundle.measures import OF_SHORT
from offramp.errors import PolicyError

Rows: TypeAlias = NDArray[np.bool_]
Scores: TypeAlias = Mapping[str, NDArray[Any]]


@dataclass(frozen=True, slots=True)
class State:
    """What a policy sees at an exit: the rows that are still in the stack, and no others.

    Attributes:
        stack: The stack's name.
        after: How many blocks are done.
        blocks: How many the stack has.
        scores: For each measure that was asked for, float32 [rows] (int64 for those that say a class).
        rows: Where these rows are in the batch of the run, int64 [rows]; increasing, but in generations where others
            have ended.
        history: The scores of the same rows at the earlier exits that were asked, by ``after``, in order; none where
            full depth is asked of tokens that had waited.
        steps: How many tokens each of these rows has generated so far, int64 [rows]; None where nothing is generated.
    """

    stack: str
    after: int
    blocks: int
    scores: Scores
    rows: NDArray[np.int64]
    history: Mapping[int, Scores]
    steps: NDArray[np.int64] | None = None


@dataclass(frozen=True, slots=True)
class Agreement:
    """What full depth said of tokens that an exit had been asked about; in generations, once they are caught up.

    Attributes:
        stack: The stack's name.
        after: After how many blocks the exit is.
        scores: What it had scored, by measure, float32 [tokens].
        agreed: Whether the token that full depth finds likeliest is the exit's, bool [tokens].
    """

    stack: str
    after: int
    scores: Scores
    agreed: Rows


class Bound(NamedTuple):
    """What `Policy.leave` comes to at an exit, for each token of one row, until full depth has run.

    A token leaves that scores at least ``least`` by ``measure`` (None: any does), as float32; at most ``tokens`` of
    them, then the policy has to be asked.
    """

    measure: str | None = None
    least: float = -math.inf
    tokens: float = math.inf


@dataclass(frozen=True, slots=True)
class Cost:
    """What a step of a generation, or a stack in one run, took.

    Attributes:
        stack: The stack's name.
        depths: After how many blocks each row left, int64 [rows].
        milliseconds: Wall time, which all rows share.
        blocks: How many blocks the stack has.
    """

    stack: str
    depths: NDArray[np.int64]
    milliseconds: float
    blocks: int


class Policy:
    """Base of all policies; a plain function ``(state) -> bool [rows]`` serves as well.

    The exit at full depth is a policy's business only where it has picked a token of a short list: then it says whether
    that will do (leave), or the head is to run over the whole vocabulary. Of its scores it gets those of short lists.
    """

    @property
    def observes(self) -> frozenset[type[Agreement | Cost]]:
        """What it wants to observe; knowing agreement costs the head's time for the tokens that are caught up."""
        return frozenset()

    def observe(self, seen: Agreement | Cost) -> None:
        """Learn from what happened; runs in other threads may call this at the same time."""

    def compares(self, stack: str) -> bool:
        """Whether the tokens of a step that goes deep shall be compared; asked before each, to save some the cost."""
        return True

    def measures(self, stack: str, exit_: Exit) -> tuple[str, ...] | None:
        """The scores that `leave` needs at this exit; None where it is not to be asked at all."""
        raise PolicyError(
            f"{type(self).__name__} does not say which scores it needs",
            hint='a method measures(self, stack, exit_) that returns names, ("top1",), or None where it is not asked',
        )

    def picks(self, stack: str, exit_: Exit) -> tuple[str, ...] | None:
        """As `measures`, for full depth where it picks tokens of a short list: `leave` says whether one will do.

        None runs the head over the whole vocabulary.
        """
        return tuple(measure for measure in self.measures(stack, exit_) or () if measure in OF_SHORT) or None

    def leave(self, state: State) -> Rows:
        """Which rows leave here: bool [rows]."""
        raise PolicyError(
            f"{type(self).__name__} does not say which rows leave",
            hint="a method leave(self, state) that returns bool [rows]",
        )

    def bound(self, stack: str, after: int) -> Bound | None:
        """What `leave` comes to at an exit, so that several tokens may run before it is asked; None where it is not so.

        `leave` is called with all of them afterwards: ``state.rows`` is the same row then, repeatedly.
        """
        return None

    def check(self, stacks: Mapping[str, Stack]) -> None:
        """Raise PolicyError where this policy names a stack, an exit or a score that is not there."""

    def to_dict(self) -> dict[str, Any]:
        """This policy as JSON has it, for ``Manifest.policy``; `offramp.runtime.policies.from_dict` reads it.

        Raises:
            PolicyError: this policy is none of offramp's own.
        """
        raise PolicyError(f"{self!r} is not one of offramp's own policies, so JSON cannot hold it")


@dataclass(frozen=True, slots=True)
class Never(Policy):
    """Full depth for every row."""

    def measures(self, stack: str, exit_: Exit) -> tuple[str, ...] | None:
        return None

    def to_dict(self) -> dict[str, Any]:
        return {"name": "never"}


@dataclass(frozen=True, slots=True)
class Function(Policy):
    """A plain function as a policy: asked at every exit, with every score that there is."""

    function: Callable[[State], Any]

    def __post_init__(self) -> None:
        kind = self.function
        if not callable(kind) or (isinstance(kind, type) and issubclass(kind, Policy)):
            raise PolicyError(f"{kind!r} is no policy", hint="offramp.Confidence(0.9), or a function")

    def measures(self, stack: str, exit_: Exit) -> tuple[str, ...] | None:
        return tuple(exit_.scores)

    def leave(self, state: State) -> Rows:
        leaving: Rows = np.asarray(self.function(state))
        return leaving


def as_policy(given: Any) -> Policy:
    """A policy as it is, a function as one; PolicyError for anything else."""
    return given if isinstance(given, Policy) else Function(given)


def make_plain(policy: Policy) -> None:
    """Check that a policy's options are of their types, and make numbers of numpy and of others plain ones.

    Raises:
        PolicyError: the first one that is not.
    """
    for name, hint in _hints(type(policy)).items():  # type: ignore[arg-type]
        expected, plain = _PLAIN.get(hint, ("", None))
        if plain is None:
            continue
        given = getattr(policy, name)
        made = plain(given)
        if made is None and (given is not None or hint not in _OR_NONE):
            raise PolicyError(f"{type(policy).__name__}: {name} is {given!r}, expected {expected}")
        object.__setattr__(policy, name, made)


@cache
def _hints(kind: type[Policy]) -> Mapping[str, Any]:
    """The types of a policy's options: of those that offramp has, not of a subclass of a user's."""
    own = next(base for base in kind.__mro__ if base.__module__.startswith(__package__))
    hints = get_type_hints(own)
    return {item.name: hints[item.name] for item in fields(own) if item.init}


def whole(value: Any) -> int | None:
    """A whole number as Python has it; None for what is none."""
    return int(value) if isinstance(value, Integral) and not isinstance(value, bool) else None


def _number(value: Any) -> float | None:
    if isinstance(value, Integral):
        return whole(value)
    return float(value) if isinstance(value, Real) else None


def _text(value: Any) -> str | None:
    return value if isinstance(value, str) else None


def _by_depth(value: Any) -> Mapping[Any, Any] | None:
    """Numbers by numbers of blocks."""
    if not isinstance(value, Mapping):
        return None
    found = {whole(after): _number(at) for after, at in value.items()}
    return None if None in found or None in found.values() else found


_NUMBER, _WHOLE = ("a number", _number), ("a whole number", whole)
_OR_NONE = (float | None, int | None)
#: What options of each type are to be, and what makes plain ones of them: None for those that are not so.
_PLAIN: Mapping[Any, tuple[str, Callable[[Any], Any]]] = {
    **dict.fromkeys((float, float | None), _NUMBER),
    **dict.fromkeys((int, int | None), _WHOLE),
    str: ("a text", _text),
    Mapping[int, float]: ("numbers by numbers of blocks", _by_depth),
}


def bound_of(policy: Policy, stack: str, after: int) -> Bound | None:
    """`Policy.bound`; None for a subclass that leaves in a way of its own, of which it says nothing."""
    says, leaves = (next(kind for kind in type(policy).__mro__ if name in vars(kind)) for name in ("bound", "leave"))
    return policy.bound(stack, after) if issubclass(says, leaves) else None


def listing(stacks: Mapping[str, Stack]) -> str:
    """The exits of the stacks and their scores, one line a stack, for messages."""
    lines = []
    for name, stack in stacks.items():
        scores = sorted({measure for exit_ in stack.exits for measure in exit_.scores}) or ["none"]
        exits = ", ".join(str(exit_.after) for exit_ in stack.exits)
        lines.append(f"  {name}: exits after {exits} of {stack.blocks} blocks; scores {', '.join(scores)}")
    return "\n".join(lines)


def options(policy: Policy) -> dict[str, Any]:
    """A policy that is a dataclass as JSON has it: its name, and what it was made with."""
    assert is_dataclass(policy)
    found = {item.name: getattr(policy, item.name) for item in fields(policy) if item.init}
    plain = {k: {str(key): v for key, v in x.items()} if isinstance(x, Mapping) else x for k, x in found.items()}
    return {"name": type(policy).__name__.lower()} | {k: v for k, v in plain.items() if v not in (None, {})}


def named(stacks: Mapping[str, Stack], name: str) -> None:
    """Raise PolicyError where there is no stack of that name."""
    if name not in stacks:
        raise PolicyError(f"there is no stack {name!r}; there are:\n{listing(stacks)}")


def scored(stacks: Mapping[str, Stack], measure: str, after: Iterable[int] = ()) -> None:
    """Raise PolicyError where no exit before full depth has the score, or none after each of so many blocks has."""
    early = [exit_ for stack in stacks.values() for exit_ in stack.asking]
    if not early:
        raise PolicyError(f"there is no exit before full depth:\n{listing(stacks)}", hint="insert-exits{after=...}")
    found = {exit_.after for exit_ in early if measure in exit_.scores}
    if not found:
        raise PolicyError(
            f"no exit before full depth has the score {measure!r}; there are:\n{listing(stacks)}",
            hint=f"insert-scores{{measure={measure}}}",
        )
    if missing := sorted(set(after) - found):
        listed = "|".join(map(str, missing))
        raise PolicyError(
            f"no exit after {listed} blocks with the score {measure!r}; there are:\n{listing(stacks)}",
            hint=f"insert-exits{{after={listed}}},insert-scores{{measure={measure}}}",
        )


def only(stacks: Mapping[str, Stack], measure: str, policy: Policy, after: int | None = None) -> Stack:
    """The one stack that has the score at an exit before full depth (``after`` so many blocks).

    Raises:
        PolicyError: there is none, or several, which a policy that learns cannot tell apart.
    """
    scored(stacks, measure, () if after is None else (after,))
    found = [
        stack
        for stack in stacks.values()
        if any(measure in exit_.scores and after in (None, exit_.after) for exit_ in stack.asking)
    ]
    if len(found) > 1:
        raise PolicyError(
            f"{policy!r} learns of one stack, and several have such exits:\n{listing(stacks)}",
            hint=f"offramp.Each({{{found[-1].name!r}: ...}})",
        )
    return found[0]
