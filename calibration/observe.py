"""What every exit makes of every example: its scores and its quality, and how long each piece takes here.

A *step* is one decision where to leave: a row of a batch, or a token of a generation. Tokens are observed along the
text of full depth, each exit on its own, which deferral makes exact: what an exit reads does not depend on where the
tokens before left.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from offramp.bundle.manifest import Exit, Stack
from offramp.bundle.measures import measure_named
from offramp.calibration.costs import Costs
from offramp.calibration.examples import Example, Examples, together
from offramp.calibration.quality import Quality, answers_of, graded, same_class
from offramp.errors import InputError
from offramp.runtime import Chain, Depth, Never, Policy, State
from offramp.runtime.generation.decision import Wanted
from offramp.runtime.generation.sampling import Chooser
from offramp.runtime.generation.tokens import Token
from offramp.runtime.policies.base import Rows
from offramp.runtime.result import Timing

Numbers = NDArray[np.float64]
_GREEDY = {"temperature": 0, "beams": 1}
_TIMED = 48  # examples whose segments are timed
_PERIOD = 8  # tokens until one goes deep and takes the others along, where that is timed


@dataclass(frozen=True)
class Observed:
    """Scores and quality of every step at every exit of one stack.

    Attributes:
        scores: By measure float32 [steps, exits before full depth]; NaN where an exit does not have it.
        quality: float [steps, exits], full depth last.
        lengths: How many steps each example has, int [examples].
    """

    scores: Mapping[str, NDArray[np.float32]]
    quality: Numbers
    lengths: NDArray[np.int64]

    @property
    def good(self) -> NDArray[np.bool_]:
        """Where leaving loses nothing against full depth, bool [steps, exits]."""
        return self.quality >= self.quality[:, -1:]

    def by_example(self, steps: Numbers) -> Numbers:
        """The mean of each example's steps; examples without steps are left out."""
        owners = np.repeat(np.arange(self.lengths.size), self.lengths)
        there = self.lengths > 0
        return np.bincount(owners, steps, self.lengths.size)[there] / self.lengths[there]


@dataclass(frozen=True, slots=True)
class Forced(Policy):
    """All rows leave a stack after so many blocks, where these scores are made."""

    stack: str
    after: int
    asked: tuple[str, ...]

    def measures(self, stack: str, exit_: Exit) -> tuple[str, ...] | None:
        return self.asked if (stack, exit_.after) == (self.stack, self.after) else None

    def leave(self, state: State) -> Rows:
        return np.ones(state.rows.size, np.bool_)


@dataclass(slots=True)
class _Periodic(Policy):
    """One row leaves a stack after so many blocks, but every `_PERIOD`-th token goes to full depth."""

    stack: str
    after: int
    step: int = 0

    def measures(self, stack: str, exit_: Exit) -> tuple[str, ...] | None:
        return () if (stack, exit_.after) == (self.stack, self.after) else None

    def leave(self, state: State) -> Rows:
        self.step += 1
        return np.full(state.rows.size, self.step % _PERIOD != 0)


def measures_of(exit_: Exit) -> tuple[str, ...]:
    """The scores of an exit that a threshold can be set for."""
    return tuple(name for name in exit_.scores if measure_named(name).gates)


def stack_of(chain: Chain, name: str | None = None) -> Stack:
    """The stack whose exits are chosen among: the one named, else the last that has scores.

    Raises:
        InputError: there is none of that name, or none that has exits with scores.
    """
    generates = chain.generates is not None
    usable = {
        stage.stack: chain.stacks[stage.stack]
        for stage in chain.manifest.stages
        if stage.stack and (not generates or stage.when == "chunk")
    }
    if generates:
        usable = dict(list(usable.items())[-1:])  # tokens leave the last one
    scored = [stack for stack in usable.values() if any(measures_of(exit_) for exit_ in stack.exits[:-1])]
    found = [stack for stack in scored if name in (None, stack.name)]
    if not found:
        what = "has no exit before full depth that has a score" if name in (None, *usable) else "is no stack to choose"
        raise InputError(
            f"{name or 'the bundle'!r} {what}; stacks: {sorted(usable)}",
            hint='offramp export -p "insert-exits,insert-scores{measure=top1}"',
        )
    return found[-1]


# Rows


def observe_rows(chain: Chain, stack: Stack, examples: Examples, quality: Quality = same_class) -> Observed:
    """What every exit makes of rows; without labels the reference is the answer at full depth."""
    answer = answers_of(chain)
    place = chain.rows_of(answer)
    early = len(stack.exits) - 1
    measures = {measure for exit_ in stack.exits[:-1] for measure in measures_of(exit_)}
    scores = {measure: np.full((len(examples), early), np.nan, np.float32) for measure in sorted(measures)}
    found = np.zeros((len(examples), early + 1))
    for rows, inputs in together(chain, examples.inputs):
        references: Sequence[Any] = [examples.labels[row] for row in rows] if examples.labels is not None else ()
        for at, exit_ in reversed(list(enumerate(stack.exits))):
            full = at == early
            asked = () if full else measures_of(exit_)
            result = chain.run(inputs, Never() if full else Forced(stack.name, exit_.after, asked))
            output = result.outputs[answer]
            answers = [output] if place is None else list(np.moveaxis(output, place[0], 0))
            references = references or answers
            found[rows, at] = [graded(quality, *pair) for pair in zip(answers, references, strict=True)]
            for measure in asked:
                scores[measure][rows, at] = result.scores[stack.name][exit_.after][measure]
    return Observed(scores, found, np.ones(len(examples), np.int64))


def time_rows(chain: Chain, stack: Stack, examples: Sequence[Example]) -> Costs:
    """Median milliseconds of every segment, one row at a time, the ways through the stack in turns."""
    ways: list[Policy] = [Depth({stack.name: exit_.after}) for exit_ in stack.exits]
    chain.run(examples[0], ways[0]), chain.run(examples[0], ways[-1])
    trace: list[Timing] = []
    for example in examples[:_TIMED]:
        for way in ways:
            trace += chain.run(example, way).trace
    return Costs.of(chain.manifest, stack, _medians(trace))


def _medians(trace: Sequence[Timing]) -> dict[str, float]:
    times = defaultdict(list)
    for timing in trace:
        times[timing.segment].append(timing.milliseconds)
    return {name: float(np.median(found)) for name, found in times.items()}


# Tokens


def generate(
    chain: Chain, example: Example, policy: Policy, options: Mapping[str, Any]
) -> tuple[NDArray[np.int64], list[Token]]:
    """The tokens that one row makes, and the steps that made them."""
    steps = list(chain.stream(example, policy, **{**options, **_GREEDY}))
    return np.array([step.token for step in steps], np.int64), steps


def observe_tokens(
    chain: Chain, stack: Stack, examples: Examples, texts: Sequence[NDArray[np.int64]], options: Mapping[str, Any]
) -> tuple[Observed, Costs]:
    """What every exit makes of the tokens of ``texts``, those of full depth; a step is good where it makes the same.

    The costs are those of a token after the prompt.
    """
    early = len(stack.exits) - 1
    measures = {measure for exit_ in stack.exits[:-1] for measure in measures_of(exit_)}
    skipped = [chain.session(example, Never()).prompts[0].size > 1 for example in examples.inputs]
    lengths = np.array([max(0, len(text) - skip) for text, skip in zip(texts, skipped, strict=True)], np.int64)
    scores = {measure: np.full((lengths.sum(), early), np.nan, np.float32) for measure in sorted(measures)}
    quality = np.zeros((lengths.sum(), early + 1))
    trace: list[Timing] = []
    late: list[Timing] = []
    start = 0
    for example, text, skip, length in zip(examples.inputs, texts, skipped, lengths, strict=True):
        for at, exit_ in enumerate(stack.exits):
            asked = measures_of(exit_) if at < early else ()
            forced = Forced(stack.name, exit_.after, asked) if at < early else Never()
            for step, (token, found, timed) in enumerate(_forced_tokens(chain, example, forced, text, options)):
                quality[start + step, at] = token == text[skip + step]
                for measure in asked:
                    scores[measure][start + step, at] = found[measure]
                trace += timed
        periodic = _forced_tokens(chain, example, _Periodic(stack.name, stack.exits[0].after), text, options)
        for step, (_, _, timed) in enumerate(periodic):
            late += timed if (step + 1) % _PERIOD == 0 else ()
        start += length
    costs = Costs.of(chain.manifest, stack, _medians(trace), _medians(late), _PERIOD)
    return Observed(scores, quality, lengths), costs


def _forced_tokens(
    chain: Chain, example: Example, policy: Policy, text: NDArray[np.int64], options: Mapping[str, Any]
) -> Iterator[tuple[int, Mapping[str, float], tuple[Timing, ...]]]:
    """Behind the prompt and each token of the text but the last: the token that comes out, its scores and what ran.

    Where the prompt goes to full depth, there is nothing of it.
    """
    session = chain.session(example, policy)
    plan, prompts = session.plan, session.prompts
    chooser = Chooser(plan.sampling(prompts[0].size, {**options, **_GREEDY}), plan.vocabulary)
    deep = prompts[0].size > 1
    if deep:
        session.step(prompts)
    fed = [*prompts, *(np.array([token]) for token in text[:-1])]
    for step in range(deep, len(text)):
        ran = session.step([fed[step]], wanted=Wanted(accepts=partial(_takes, chooser, step)))
        (result,) = ran.rows
        token = result.pick
        if token is None:
            seen = np.concatenate(fed[: step + 1])
            token = chooser.choose(0, seen, result.outputs[plan.output].reshape(-1), step)
        yield token, result.scores, ran.trace


def _takes(chooser: Chooser, step: int, slot: int, token: int) -> bool:
    return chooser.takes(token, step)
