"""The thresholds of one stack's exits: fitted on one part of the examples, tested on the other."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from offramp.bundle.manifest import Stack
from offramp.calibration import sequence
from offramp.calibration.costs import FASTER, Costs
from offramp.calibration.examples import Examples
from offramp.calibration.gates import Fit, Path, Thresholds, leaves, policy_of
from offramp.calibration.observe import (
    Observed,
    StepKind,
    generate,
    measures_of,
    observe_rows,
    observe_tokens,
    runs_once,
    time_rows,
    unasked,
)
from offramp.calibration.risk import accepted, losses_of, p_value
from offramp.calibration.sequence import Asked, Tested
from offramp.errors import InputError
from offramp.runtime import Never, Policy, Width

ROW_POINTS, TOKEN_POINTS = 40, 10  # of a path; every point of tokens is generated anew


@dataclass(frozen=True)
class Exits:
    """Exits are to be chosen: of which stack, by which score, and beside what (None: full depth and all learners)."""

    asked: Asked
    stack: Stack
    measure: str | None
    beside: Policy | None

    def __post_init__(self) -> None:
        known = sorted({measure for exit_ in self.stack.exits[:-1] for measure in measures_of(exit_)})
        if self.measure is not None and self.measure not in known:
            raise InputError(
                f"no exit of {self.stack.name!r} has the score {self.measure!r}; there are {', '.join(known) or 'none'}"
            )

    @property
    def by_token(self) -> bool:
        """Whether tokens leave the stack; else rows do."""
        return self.asked.chain.generates is not None and not runs_once(self.asked.chain, self.stack)

    @property
    def step(self) -> StepKind:
        """What is timed."""
        return "token" if self.by_token else "row" if self.asked.chain.generates is None else "input"

    @property
    def about(self) -> dict[str, Any]:
        """What a record says of it."""
        return {"stack": self.stack.name, **about(self.beside)}

    def policy(self, path: Path, thresholds: Thresholds) -> Policy:
        """The policy with these thresholds, beside the others'."""
        alone = len(self.asked.chain.stacks) == 1
        return policy_of(self.stack, path.measure, thresholds, alone=alone, beside=self.beside)

    def fit(self, seen: Observed, costs: Costs, tests: int, points: int) -> Path:
        """The path of the measure that is asked for, or expected to be the fastest."""
        fit = Fit(seen, costs, self.asked.keep, self.asked.confidence, tests, points)
        return fit.chosen([self.measure] if self.measure is not None else list(seen.scores))

    def tokens(self, fitting: Examples, texts: Sequence[NDArray[np.int64]]) -> tuple[Observed, Costs]:
        """What every exit makes of the tokens of these texts, and what it takes."""
        asked = self.asked
        return observe_tokens(asked.chain, self.stack, fitting, texts, asked.options, self.beside)

    def rows(self, examples: Examples) -> Observed:
        """What every exit makes of rows."""
        asked = self.asked
        return observe_rows(asked.chain, self.stack, examples, asked.quality, self.beside, asked.options)


def about(beside: Policy | None) -> dict[str, Any]:
    """What a record says of what exits are beside."""
    exits = beside.exits if isinstance(beside, Width) else beside
    width = {"width": beside.budget} if isinstance(beside, Width) else {}
    return {**width, **({"others": exits.to_dict()} if exits is not None else {})}


def choose(exits: Exits, fitting: Examples, testing: Examples) -> tuple[Policy, dict[str, Any]]:
    """The policy with the boldest thresholds that passed, or `Never`; and what the record says of it."""
    return (_tokens if exits.by_token else _rows)(exits, fitting, testing)


def _rows(exits: Exits, fitting: Examples, testing: Examples) -> tuple[Policy, dict[str, Any]]:
    """Rows are run once at every exit; then all settings are known without running them."""
    costs = time_rows(exits.asked.chain, exits.stack, fitting.inputs, exits.beside)
    path = exits.fit(exits.rows(fitting), costs, len(testing), ROW_POINTS)
    return _chosen(exits, path, tested(path, exits.rows(testing), exits.asked.keep), costs)


def tested(path: Path, held: Observed, keep: float) -> Tested:
    """All settings of a path, on rows that nothing was fitted on."""
    scores = held.scores[path.measure]
    early = [
        np.take_along_axis(held.quality, leaves(path.measure, scores, thresholds)[:, None], 1)[:, 0]
        for thresholds, _ in path.settings
    ]
    return Tested(held.whole, early, [p_value(losses_of(one, held.whole, keep), keep) for one in early])


def _tokens(exits: Exits, fitting: Examples, testing: Examples) -> tuple[Policy, dict[str, Any]]:
    """Tokens feed back, so each setting is generated with, until one fails."""
    asked = exits.asked
    texts = [generate(asked.chain, example, Never(), asked.options)[0] for example in fitting.inputs]
    none_longer = max(text.size for text in texts) < 2  # else nobody needs to look at the prompts
    if none_longer and all(text.size <= n for text, n in zip(texts, unasked(asked.chain, fitting), strict=True)):
        return Never(), {
            "reason": "no text is longer than one token, which behind a prompt of several never leaves early"
        }
    seen, costs = exits.tokens(fitting, texts)
    path = exits.fit(seen, costs, len(testing), TOKEN_POINTS)
    policies = [exits.policy(path, thresholds) for thresholds, _ in path.settings]
    return _chosen(exits, path, sequence.tested(asked, testing, policies), costs)


def temperatures(stack: Stack, path: Path) -> dict[str, list[float]]:
    """What a record says of the scales: by ``after``, temperature and offset."""
    return {
        str(stack.exits[at].after): [round(scale.temperature, 6), round(scale.offset, 6)]
        for at, scale in path.scales.items()
    }


def _chosen(exits: Exits, path: Path, results: Tested, costs: Costs) -> tuple[Policy, dict[str, Any]]:
    """The boldest setting that passed, or `Never` and why."""
    asked, after = exits.asked, [str(exit_.after) for exit_ in exits.stack.exits]
    dropped = {after[at]: why for at, why in sorted(path.dropped.items())}
    full_ms = round(costs.whole, 4)
    record: dict[str, Any] = {
        "reason": None,
        "step": exits.step,
        "measure": path.measure,
        "temperatures": temperatures(exits.stack, path),
        "dropped": dropped,
        "milliseconds": {"full": full_ms, "expected": full_ms},
        **results.record(asked.level, len(path.settings)),
    }
    count = accepted(results.p_values, asked.level)
    if not count:
        first = f"the most careful setting of {path.measure!r}"
        record["reason"] = (
            results.why_none(asked, first, "better exits")
            if path.settings
            else f"no setting of {path.measure!r} is faster than full depth on this machine"
        )
        return Never(), record
    thresholds, expected = path.settings[count - 1]
    if expected > FASTER * costs.whole:
        record["reason"] = f"the boldest setting that passed takes {expected / costs.whole:.1%} of full depth's time"
        return Never(), record
    for at in path.scales.keys() - thresholds.keys():
        dropped[after[at]] = "none of the examples is sure enough there"
    record["thresholds"] = {after[at]: number for at, number in thresholds.items()}
    record["milliseconds"]["expected"] = round(expected, 4)
    return exits.policy(path, thresholds), record
