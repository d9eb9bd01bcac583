"""Several stacks at once: combinations of fixed depths and thresholds, searched on one part of the examples.

One stack after the other is greedy: the first may lose all that may be lost, for little. Here every stack has a few
candidates, from full depth to bold: depths that are the same for all, where nobody is asked, and thresholds. A search
over their combinations runs on the fitting part, each timed as a whole. What it finds makes one path, from careful to
bold, each combination faster than the one before, which the other part of the examples tests in that order (Pareto
testing: Laufer-Goldshtein et al., arXiv 2210.07913); so the promise is that of fixed-sequence testing.

What it runs of the fitting examples: a pass for each exit of each stack (where tokens leave two more), and what
`Search` does; of the test examples a pass at full depth and one for each combination of the path.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from offramp.bundle.manifest import Stack
from offramp.calibration import sequence
from offramp.calibration.combinations import Combination, Search, some
from offramp.calibration.costs import Costs
from offramp.calibration.examples import Examples
from offramp.calibration.exits import Exits, about, temperatures
from offramp.calibration.gates import leaves, thresholds_of
from offramp.calibration.observe import Observed, generate, others_of_group, time_rows, within
from offramp.calibration.risk import accepted
from offramp.calibration.sequence import Asked
from offramp.runtime import Depth, Each, Never, Policy, Width

Numbers = NDArray[np.float64]

_CANDIDATES = 8  # of a stack, full depth not counted
_POINTS = 5  # of a path of thresholds


@dataclass(frozen=True)
class Candidates:
    """What a stack may do, from full depth to bold.

    ``saves`` has the milliseconds of a row, or a whole generation, that each is expected to save; ``record`` is what a
    manifest says of them.
    """

    stack: Stack
    policies: Sequence[Policy]
    saves: Sequence[float]
    record: Mapping[str, Any]


@dataclass(frozen=True)
class Joint:
    """Several stacks are chosen for, all of them ``beside`` the same (None: full depth and all learners)."""

    asked: Asked
    stacks: Sequence[Exits]
    beside: Policy | None

    @property
    def about(self) -> dict[str, Any]:
        """What a record says of it."""
        return {"stack": [exits.stack.name for exits in self.stacks], **about(self.beside)}

    def policy(self, candidates: Sequence[Candidates], combination: Combination) -> Policy:
        """What a combination of candidates does."""
        exits = self.beside.exits if isinstance(self.beside, Width) else self.beside
        made: Policy = exits or Each({})
        if isinstance(self.beside, Width):
            made = Width(self.beside.budget, made)
        for of, at in zip(candidates, combination, strict=True):
            if at:
                made = within(of.policies[at], of.stack.name, made)
        return made


def choose(joint: Joint, fitting: Examples, testing: Examples) -> tuple[Policy, dict[str, Any]]:
    """The policy of the boldest combination that passed, or `Never`; and what the record says of it."""
    asked = joint.asked
    tests = len(testing)
    texts: list[NDArray[np.int64]] = []
    if any(exits.by_token for exits in joint.stacks):
        texts = [generate(asked.chain, example, Never(), asked.options)[0] for example in fitting.inputs]
    candidates = [_candidates(exits, fitting, texts, tests) for exits in joint.stacks]
    search = Search(asked, [of.saves for of in candidates], partial(joint.policy, candidates), fitting, tests)
    search.run()
    path = search.path()
    policies = [joint.policy(candidates, combination) for combination in path]
    results = sequence.tested(asked, testing, policies)
    full = round(search.full_milliseconds, 4)
    record: dict[str, Any] = {
        "reason": None,
        "step": "row" if asked.chain.generates is None else "generation",
        "stacks": {of.stack.name: dict(of.record) for of in candidates},
        "combinations": len(search.found),
        "milliseconds": {"full": full, "expected": full},
        **results.record(asked.level, len(path)),
    }
    count = accepted(results.p_values, asked.level)
    if not count:
        record["reason"] = (
            results.why_none(asked, "the most careful combination", "better exits")
            if path
            else "no combination that keeps enough of the fitting examples' quality is faster than full depth here"
        )
        return Never(), record
    chosen, expected = list(path.items())[count - 1]
    for of, at in zip(candidates, chosen, strict=True):
        record["stacks"][of.stack.name]["policy"] = of.policies[at].to_dict()
    record["milliseconds"]["expected"] = round(expected, 4)
    return policies[count - 1], record


# Candidates


def _candidates(exits: Exits, fitting: Examples, texts: Sequence[NDArray[np.int64]], tests: int) -> Candidates:
    """Full depth, and of fixed depths and thresholds those than which none is both cheaper and clearly better."""
    stack = exits.stack
    seen, costs = _observed(exits, fitting, texts)
    record: dict[str, Any] = {"measure": None, "temperatures": {}}
    found: list[tuple[float, Numbers, Policy]] = []  # expected milliseconds, quality of each example

    def add(taken: NDArray[np.int64], expected: float, policy: Policy) -> None:
        steps = np.take_along_axis(seen.quality, taken[:, None], 1)[:, 0]
        found.append((expected, seen.by_example(steps), policy))

    if len(seen.quality):  # else no text has a token that may leave
        for at, exit_ in enumerate(stack.exits[:-1]):
            taken = np.full(len(seen.quality), at)
            add(taken, costs.expected(taken, seen.lengths), Depth(exit_.after))
    if len(seen.quality) and (seen.scores or exits.measure is not None):
        path = exits.fit(seen, costs, tests, _POINTS)
        record = {"measure": path.measure, "temperatures": temperatures(stack, path)}
        for thresholds, expected in path.settings:
            taken = leaves(path.measure, seen.scores[path.measure], thresholds)
            add(taken, expected, thresholds_of(stack, path.measure, thresholds))
    kept: list[tuple[float, Numbers, Policy]] = []
    for one in sorted(found, key=lambda item: item[0]):
        if not any(_clearly_better(cheaper, one[1]) for _, cheaper, _ in kept):
            kept.insert(0, one)
    chosen = [(0.0, Never()), *((costs.full - expected, policy) for expected, _, policy in some(kept, _CANDIDATES))]
    steps = len(seen.quality) / len(fitting)
    saves = [saved * steps for saved, _ in chosen]
    return Candidates(stack, [policy for _, policy in chosen], saves, {**record, "candidates": len(chosen)})


def _clearly_better(one: Numbers, other: Numbers) -> bool:
    """By a standard error of what they differ in; or just as good everywhere."""
    more = one - other
    return bool(more.mean() >= more.std() / np.sqrt(more.size))


def _observed(exits: Exits, fitting: Examples, texts: Sequence[NDArray[np.int64]]) -> tuple[Observed, Costs]:
    """What every exit makes of the examples; and what it costs, a group of tokens where the other groups have left."""
    if exits.by_token:
        seen, costs = exits.tokens(fitting, texts)
        return seen, replace(costs, wide=None)
    beside = exits.beside
    for group in others_of_group(exits.asked.chain, exits.stack):
        beside = within(Depth(group.exits[0].after), group.name, beside or Each({}))
    costs = time_rows(exits.asked.chain, exits.stack, fitting.inputs, beside)
    return exits.rows(fitting), replace(costs, wide=None)
