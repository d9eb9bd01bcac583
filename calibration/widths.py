"""How wide a bundle with learners runs: budgets are tested like the settings of exits, and timed as a whole.

The fitting part of the examples makes the path: from careful to bold, those budgets that are faster than the one
before, up to where so much is lost that no test would pass. The other part tests them in that order.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import mean
from time import perf_counter
from typing import Any, NamedTuple

import numpy as np

from offramp.bundle.schedule import Schedule
from offramp.calibration import sequence
from offramp.calibration.costs import FASTER
from offramp.calibration.examples import Example, Examples
from offramp.calibration.observe import GREEDY, StepKind, generate
from offramp.calibration.risk import accepted, losses_of
from offramp.calibration.sequence import Asked, Tested
from offramp.errors import InputError
from offramp.runtime import Chain, Never, Policy, Width
from offramp.runtime.generation.tokens import Token

ALL = 1.0  # learners
BUDGETS = tuple(step / 20 for step in range(19, 1, -1))  # from careful to bold
_FAR = 3  # standard errors; where so many more than may be is lost, no test would pass
_TIMED_ROWS, _TIMED_TEXTS = 48, 12


class Path(NamedTuple):
    """Budgets from careful to bold, and milliseconds of a step by budget (1 for all learners); why others are not."""

    budgets: Sequence[float]
    milliseconds: Mapping[float, float]
    dropped: Mapping[float, str]


def choose(
    asked: Asked, fitting: Examples, testing: Examples, budgets: Sequence[float] = BUDGETS
) -> tuple[Policy, dict[str, Any]]:
    """`Width` with the boldest budget that passed, or `Never`; and what the record says of it."""
    path = path_of(asked, fitting, budgets)
    results = sequence.tested(asked, testing, (Width(budget) for budget in path.budgets))
    full = round(path.milliseconds[ALL], 4)
    record: dict[str, Any] = {
        "reason": None,
        "step": step_of(asked.chain),
        "budgets": list(path.budgets),
        "dropped": {f"{budget:g}": why for budget, why in path.dropped.items()},
        "milliseconds": {"full": full, "expected": full},
        **results.record(asked.level, len(path.budgets)),
    }
    count = accepted(results.p_values, asked.level)
    if not count:
        record["reason"] = _why_never(asked, path, results)
        return Never(), record
    policy = Width(path.budgets[count - 1])
    record["width"] = policy.budget
    record["executed"] = _executed(asked, fitting, policy)
    record["milliseconds"]["expected"] = round(path.milliseconds[policy.budget], 4)
    return policy, record


def path_of(asked: Asked, fitting: Examples, budgets: Sequence[float]) -> Path:
    """The budgets that are worth a test, by what the fitting part shows; none where no operation is ever left out."""
    if all_dense(asked.chain):
        times = time_widths(asked.chain, fitting.inputs, [ALL], asked.options)
        return Path([], times, {budgets[0]: "it saves nothing"})
    compared = sequence.full(asked, fitting)
    good: list[float] = []
    dropped: dict[float, str] = {}
    for budget in budgets:
        quality = sequence.grades(asked, fitting, Width(budget), compared)
        losses = losses_of(quality, compared.grades, asked.keep)
        if losses.mean() > _FAR * losses.std() / np.sqrt(losses.size):
            kept = quality.mean() / compared.grades.mean()
            dropped[budget] = f"it loses too much: it kept {kept:.4f} of the quality in {losses.size} fitting examples"
            break
        good.append(budget)
    times = time_widths(asked.chain, fitting.inputs, [ALL, *good], asked.options)
    settings = [ALL]
    for budget in good:
        before = settings[-1]
        if times[budget] <= FASTER * times[before]:
            settings.append(budget)
        else:
            dropped[budget] = f"it saves nothing: {times[budget]:.3f} ms, {times[before]:.3f} ms at width {before:g}"
    return Path(settings[1:], times, dict(sorted(dropped.items(), reverse=True)))


def step_of(chain: Chain) -> StepKind:
    """What takes less time where learners are left out, by whether they lie in what runs once for a generation."""
    if chain.generates is None:
        return "row"
    manifest = chain.manifest
    once = {
        value
        for step in Schedule.of(manifest).steps
        if step.stage.when == "input"
        for name in step.segments
        for value in manifest.segments[name].outputs.values()
    }
    found = {item.count in once for item in manifest.learners.values()}
    return "generation" if len(found) == 2 else "input" if True in found else "token"


def time_widths(
    chain: Chain,
    examples: Sequence[Example],
    budgets: Sequence[float],
    options: Mapping[str, Any],
    step: StepKind | None = None,
) -> dict[float, float]:
    """Milliseconds of a step (None: `step_of`), one row at a time, by budget, in turns.

    The first budget is what others are ratios of, and whose number of tokens a generation has.
    """
    kind = step or step_of(chain)
    some = examples[: _TIMED_ROWS if chain.generates is None else _TIMED_TEXTS]
    for budget in budgets:
        _wall(kind, chain, some[0], Width(budget), options)
    times = []
    for example in some:
        runs = [_wall(kind, chain, example, Width(budget), options) for budget in budgets]
        if kind in ("token", "generation") and not all(steps for _, steps in runs):
            raise InputError("no token is generated, so there is nothing to time", hint="max_new_tokens=32")
        times.append([milliseconds(kind, *run, like=runs[0][1]) for run in runs])
    ratios = np.array(times)
    found = np.median(ratios[:, 0]) * np.median(ratios / ratios[:, :1], 0)
    return dict(zip(budgets, found.tolist(), strict=True))


def milliseconds(step: StepKind, wall: float, tokens: Sequence[Token], like: Sequence[Token]) -> float:
    """Of a step on average, where all took ``wall``; of a generation as if it had as many tokens as ``like``."""
    if step == "row":
        return wall
    if step == "input":
        return wall - sum(token.milliseconds for token in tokens)
    behind = [token.milliseconds for token in tokens[1:] or tokens]
    return mean(behind) if step == "token" else wall - sum(behind) + mean(behind) * len(like[1:] or like)


def _wall(
    step: StepKind, chain: Chain, example: Example, policy: Policy, options: Mapping[str, Any]
) -> tuple[float, Sequence[Token]]:
    """Milliseconds of a row, or as much of a generation as there is to time, and the tokens that were made."""
    started = perf_counter()
    steps: Sequence[Token] = ()
    if step == "row":
        chain.run(example, policy)
    elif step == "input":
        chain.session(example, policy).end()
    else:
        _, steps = generate(chain, example, policy, options)
    return (perf_counter() - started) * 1e3, steps


def _executed(asked: Asked, examples: Examples, policy: Policy) -> float:
    """The mean share of the learners' operations that is executed, of some examples."""
    found = []
    for example in examples.inputs[:_TIMED_TEXTS]:
        if asked.chain.generates is not None:
            found.append(asked.chain.generate(example, policy, **{**asked.options, **GREEDY}).width)
        else:
            found.append(asked.chain.run(example, policy).width)
    return round(mean(width for width in found if width is not None), 4)


def _why_never(asked: Asked, path: Path, results: Tested) -> str:
    if path.budgets:
        return results.why_none(asked, f"width {path.budgets[0]:g}", "trained gates")
    budget, why = list(path.dropped.items())[-1]
    dense = "; learners that run dense are all computed: offramp.save(..., learners='grouped')"
    form = dense if all_dense(asked.chain) else ""
    return f"no width is worth a test: at {budget:g} {why}{form}"


def all_dense(chain: Chain) -> bool:
    """Whether all learners are computed at any width, so that times differ by noise alone."""
    return all(item.form == "dense" for item in chain.manifest.learners.values())
