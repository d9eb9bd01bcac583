"""What an exit says of rows, and what the policy makes of it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from offramp.bundle.schedule import Branch
from offramp.runtime.generation.batching import Array, Index, Values, greatest
from offramp.runtime.policies.stack_policy import StackPolicy


@dataclass(frozen=True, slots=True)
class Wanted:
    """What is wanted of a step besides each row's next token.

    ``whole`` is asked where rows get to full depth: whether all of their tokens are wanted, not the last ones alone.
    ``accepts``, of a slot and the token that an exit has picked: whether that will do without the model's outputs;
    with ``deep`` also at full depth.
    """

    whole: Callable[[], bool] | None = None
    accepts: Callable[[int, int], bool] | None = None
    deep: bool = True

    def picks(self, branch: Branch) -> bool:
        """Whether full depth gives the tokens alone, which nobody is asked about."""
        return branch.full and branch.exact and self.deep and self.accepts is not None


class Asked(NamedTuple):
    """What an exit said of a row's last token.

    That is its scores, the next token where it picks one, and the model's outputs where its scores are made of them.
    """

    scores: Mapping[str, float]
    pick: int | None
    outputs: Mapping[str, Array] | None


@dataclass(slots=True)
class Notes:
    """A row on its way through the spans: where it left, and what exits said of its last token."""

    exits: dict[str, int] = field(default_factory=dict)
    scores: Mapping[str, float] = field(default_factory=dict)
    asked: dict[int, Asked] = field(default_factory=dict)


class Decision(NamedTuple):
    """Which rows leave, bool [rows]; the exit's values for all of them if it made any, and the tokens it picks.

    A token of -1 is none: the head of all classes has to say it.
    """

    leave: NDArray[np.bool_]
    made: Values | None = None
    tokens: Sequence[int] = ()

    def accepted(self, slots: Index, accepts: Callable[[int, int], bool] | None) -> dict[int, int]:
        """The picked tokens that will do, by row, of the rows that leave."""
        if accepts is None or not self.tokens:
            return {}
        places, known = slots.tolist(), [row for row in self.leave.nonzero()[0].tolist() if self.tokens[row] >= 0]
        return {row: self.tokens[row] for row in known if accepts(places[row], self.tokens[row])}


def decide(
    branch: Branch, policy: StackPolicy, wanted: Sequence[str], made: Values, rows: Index, notes: Sequence[Notes]
) -> Decision:
    """Let the policy decide on ``rows`` (places in the batch) by their last tokens: ``made`` are ``[rows, 1, ...]``.

    What the exit said goes into each row's notes.
    """
    found = {measure: made[branch.scores[measure]].reshape(rows.size, -1)[:, -1] for measure in wanted}
    leave = policy.leave(branch.after, rows, found)
    scores = {measure: array.tolist() for measure, array in found.items()}
    tokens = picked(branch, made, rows.size)
    ready = branch.ends and all(value in made for value in branch.results.values())
    for place, row in enumerate(notes):
        said = {measure: float(score[place]) for measure, score in scores.items()}
        row.scores = said or row.scores
        if branch.ends:
            outputs = {name: made[value][place] for name, value in branch.results.items()} if ready else None
            token = tokens[place] if tokens and tokens[place] >= 0 else None
            row.asked[branch.after] = Asked(said, token, outputs)
    return Decision(leave, made, tokens)


def picked(branch: Branch, made: Values, rows: int) -> Sequence[int]:
    """The token that the exit picks behind each row's last one; none at all where it picks none."""
    return () if branch.pick is None else made[branch.pick].reshape(rows, -1)[:, -1].tolist()


def all_picked(branch: Branch, values: Values, counts: Index) -> list[list[int]] | None:
    """The tokens that full depth picks behind all ``counts`` tokens of each row; None where it does not know one."""
    assert branch.pick is not None
    found = [row[:count] for row, count in zip(values[branch.pick].tolist(), counts.tolist(), strict=True)]
    return None if any(token < 0 for row in found for token in row) else found


def all_accepted(
    branch: Branch, policy: StackPolicy, wanted: Sequence[str], values: Values, rows: Index, counts: Index
) -> bool:
    """Whether the policy accepts the tokens that full depth picks for all ``counts`` tokens of each row."""
    inside = np.arange(greatest(counts)) < counts[:, None]
    found = {measure: values[branch.scores[measure]][inside] for measure in wanted}
    repeated = np.repeat(rows, counts)
    return bool(policy.decide(branch.after, repeated, found, history=repeated.size == rows.size).all())
