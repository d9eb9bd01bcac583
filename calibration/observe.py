"""What every exit makes of every example: its scores and its quality, and how long each piece takes here.

A *step* is one decision where to leave: a row of a batch, or a token of a generation. Tokens are observed along the
text of full depth, each exit on its own, which deferral makes exact: what an exit reads does not depend on where the
tokens before left.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from time import perf_counter
from types import MappingProxyType
from typing import Any, Literal, TypeAlias

import numpy as np
from numpy.typing import NDArray

from offramp.bundle.manifest import Exit, GroupStack, Stack
from offramp.bundle.measures import measure_named
from offramp.calibration.costs import Costs
from offramp.calibration.examples import Example, Examples, together
from offramp.calibration.quality import Quality, by_row, graded, same_class
from offramp.errors import InputError
from offramp.runtime import Chain, Depth, Each, Never, Policy, State, Width
from offramp.runtime.generation.decision import Wanted
from offramp.runtime.generation.sampling import Chooser
from offramp.runtime.generation.tokens import Token
from offramp.runtime.policies.base import Rows
from offramp.runtime.result import Timing

#: What is timed: a row; of a generation a token behind the prompt, what runs once for its input, or all of it.
StepKind: TypeAlias = Literal["row", "token", "input", "generation"]
Numbers = NDArray[np.float64]
GREEDY = {"temperature": 0, "beams": 1}  # of generations that are compared
_TIMED = 48  # examples whose segments are timed
_PERIOD = 8  # tokens until one goes deep and takes the others along, where that is timed


@dataclass(frozen=True)
class Observed:
    """Scores and quality of every step at every exit of one stack.

    Attributes:
        scores: By measure float32 [steps, exits before full depth]; NaN where an exit does not have it.
        quality: float [steps, exits], full depth last.
        lengths: How many steps each example has, int [examples].
        wide: Quality of full depth with all learners, float [steps], where ``quality`` is beside something less than
            that; else None.
    """

    scores: Mapping[str, NDArray[np.float32]]
    quality: Numbers
    lengths: NDArray[np.int64]
    wide: Numbers | None = None

    @property
    def whole(self) -> Numbers:
        """What settings are compared with, float [steps]: the quality of full depth with all learners."""
        return self.quality[:, -1] if self.wide is None else self.wide

    @property
    def good(self) -> NDArray[np.bool_]:
        """Where leaving loses nothing against full depth with all learners, bool [steps, exits]."""
        return self.quality >= self.whole[:, None]

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


@dataclass(frozen=True, slots=True)
class _Stays(Policy):
    """Full depth of a stack, whose first exit is asked: its blocks run by parts, as they do where a row may leave."""

    stack: Stack

    def measures(self, stack: str, exit_: Exit) -> tuple[str, ...] | None:
        return () if (stack, exit_.after) == (self.stack.name, self.stack.exits[0].after) else None

    def leave(self, state: State) -> Rows:
        return np.zeros(state.rows.size, np.bool_)


def measures_of(exit_: Exit) -> tuple[str, ...]:
    """The scores of an exit that a threshold can be set for."""
    return tuple(name for name in exit_.scores if measure_named(name).gates)


def scored(chain: Chain) -> list[Stack]:
    """The stacks that may be left where there are scores."""
    return [
        stack
        for stack in _usable(chain).values()
        if any(measures_of(exit_) for exit_ in stack.exits[:-1]) and not _leave_alone(chain, stack)
    ]


def _leave_alone(chain: Chain, stack: Stack) -> bool:
    """Whether it is a group of tokens that leave one by one."""
    whole = _whole(chain, stack)
    return any(group.alone for group, name in zip(whole.groups, whole.by_group, strict=False) if name == stack.name)


def _usable(chain: Chain) -> dict[str, Stack]:
    """By the names that policies have for them; of those that run for each token the last, which tokens leave."""
    found = {name: stack for name, stack in chain.stacks.items() if chain.generates is None or runs_once(chain, stack)}
    last = list(chain.stacks.items())[-1:]
    return found if chain.generates is None else found | dict(last)


def runs_once(chain: Chain, stack: Stack) -> bool:
    """Whether a stack, or a group of one's tokens, runs once for the inputs of a generation."""
    stages = {stage.stack: stage for stage in chain.manifest.stages if stage.stack}
    return chain.generates is not None and stages[_whole(chain, stack).name].when == "input"


def _whole(chain: Chain, stack: Stack) -> Stack:
    """The stack that a group of tokens belongs to; a stack itself."""
    return chain.manifest.stacks[stack.of if isinstance(stack, GroupStack) else stack.name]


def stack_of(chain: Chain, name: str | None = None) -> Stack:
    """The stack whose exits are chosen among: the one named, else the last that has scores.

    Raises:
        InputError: there is none of that name, or none that has exits with scores.
    """
    usable = _usable(chain)
    if name in usable:
        _check_together(chain, usable[name])
    found = [stack for stack in scored(chain) if name in (None, stack.name)]
    if not found:
        what = "has no exit before full depth that has a score" if name in (None, *usable) else "is no stack to choose"
        raise InputError(
            f"{name or 'the bundle'!r} {what}; stacks: {sorted(usable)}",
            hint='offramp export -p "insert-exits,insert-scores{measure=top1}"',
        )
    return found[-1]


def stacks_of(chain: Chain, names: Sequence[str]) -> list[Stack]:
    """The stacks that are chosen for together, in the order in which they run; scores may be missing.

    Raises:
        InputError: there are none of these names, or they have no exits.
    """
    usable = _usable(chain)
    unknown = [name for name in names if name not in usable]
    without = [name for name in names if name in usable and len(usable[name].exits) < 2]
    if unknown or without or not names:
        what = f"{unknown} are no stacks to choose" if unknown else f"{without} have no exit before full depth"
        raise InputError(
            f"{what if names else 'no stack is named'}; stacks: {sorted(usable)}",
            hint='offramp export -p "insert-exits,insert-scores{measure=top1}"',
        )
    found = [stack for name, stack in usable.items() if name in names]
    for stack in found:
        _check_together(chain, stack)
    return found


def _check_together(chain: Chain, stack: Stack) -> None:
    if _leave_alone(chain, stack):
        raise InputError(
            f"the tokens of {stack.name!r} leave alone, and thresholds are chosen for what leaves together",
            hint='split-modalities{tokens=group}; or a policy of your own: Confidence(0.99, measure="cosine")',
        )


def others_of_group(chain: Chain, stack: Stack) -> list[Stack]:
    """The groups of tokens whose blocks are the same stack's; none of a stack that has no groups."""
    names = _whole(chain, stack).by_group
    return [other for name, other in chain.stacks.items() if name in names and name != stack.name]


# Rows


def within(policy: Policy, stack: str, beside: Policy | None) -> Policy:
    """The policy at a stack where all else is done as ``beside`` says: a `Width`, or an `Each`; None: in full."""
    if beside is None:
        return policy
    if isinstance(beside, Width):
        return Width(beside.budget, within(policy, stack, beside.exits))
    assert isinstance(beside, Each)
    return Each({**beside.stacks, stack: policy})


def answered(
    chain: Chain, inputs: Example, policy: Policy, options: Mapping[str, Any]
) -> tuple[list[Any], Mapping[str, Any]]:
    """What each row of a batch is answered, and the scores of stacks that run once for it."""
    if chain.generates is not None:
        made = chain.generator(inputs, policy, **{**options, **GREEDY})
        tokens: dict[int, list[int]] = {row: [] for row in made.rows}
        while made.rows:
            for token in made.next():
                tokens[token.row].append(token.token)
        made.end()
        return [np.array(row, np.int64) for row in tokens.values()], made.scores
    result = chain.run(inputs, policy)
    return by_row(chain, result.outputs), result.scores


def traced(chain: Chain, inputs: Example, policy: Policy, options: Mapping[str, Any]) -> tuple[Sequence[Timing], float]:
    """The segments that ran for an answer, and its milliseconds of wall time."""
    started = perf_counter()
    if chain.generates is None:
        trace: Sequence[Timing] = chain.run(inputs, policy).trace
    else:
        made = chain.generator(inputs, policy, **{**options, **GREEDY})
        found = list(made.trace)
        while made.rows:
            found += made.next()[0].trace
        made.end()
        trace = found
    return trace, (perf_counter() - started) * 1e3


def observe_rows(
    chain: Chain,
    stack: Stack,
    examples: Examples,
    quality: Quality = same_class,
    beside: Policy | None = None,
    options: Mapping[str, Any] = MappingProxyType({}),
) -> Observed:
    """What every exit makes of rows; without labels the reference is the answer at full depth with all learners."""
    early = len(stack.exits) - 1
    measures = {measure for exit_ in stack.exits[:-1] for measure in measures_of(exit_)}
    scores = {measure: np.full((len(examples), early), np.nan, np.float32) for measure in sorted(measures)}
    found = np.zeros((len(examples), early + 1))
    wide = None if beside is None else np.zeros(len(examples))

    def graded_rows(answers: Sequence[Any], references: Sequence[Any]) -> tuple[list[float], Sequence[Any]]:
        references = references or answers
        return [graded(quality, *pair) for pair in zip(answers, references, strict=True)], references

    for rows, inputs in together(chain, examples.inputs):
        references: Sequence[Any] = [examples.labels[row] for row in rows] if examples.labels is not None else ()
        if wide is not None:
            wide[rows], references = graded_rows(answered(chain, inputs, Never(), options)[0], references)
        for at, exit_ in reversed(list(enumerate(stack.exits))):
            full = at == early
            asked = () if full else measures_of(exit_)
            policy = within(Never() if full else Forced(stack.name, exit_.after, asked), stack.name, beside)
            answers, made = answered(chain, inputs, policy, options)
            found[rows, at], references = graded_rows(answers, references)
            for measure in asked:
                scores[measure][rows, at] = made[stack.name][exit_.after][measure]
    return Observed(scores, found, np.ones(len(examples), np.int64), wide)


def time_rows(chain: Chain, stack: Stack, examples: Sequence[Example], beside: Policy | None = None) -> Costs:
    """Median milliseconds of every segment, one row at a time, the ways through the stack in turns."""

    def trace_of(example: Example, policy: Policy) -> Sequence[Timing]:
        if chain.generates is None:
            return chain.run(example, policy).trace
        session = chain.session(example, policy)
        session.end()
        return session.trace

    ways = [within(Depth({stack.name: exit_.after}), stack.name, beside) for exit_ in stack.exits]
    if stack.whole is not None:
        ways += [within(_Stays(stack), stack.name, beside)]
    for way in (ways[0], *ways[-2:]):  # which warms all sessions up
        trace_of(examples[0], way)
    traces: list[list[Sequence[Timing]]] = [[] for _ in ways]
    wide: list[Sequence[Timing]] = []
    for example in examples[:_TIMED]:
        for found, way in zip(traces, ways, strict=True):
            found.append(trace_of(example, way))
        if beside is not None:
            wide.append(trace_of(example, Never()))
    if stack.name not in chain.manifest.stacks:  # a group, whose blocks run for the others too
        return Costs.of_ways([_total(found) for found in traces], _total(wide) if wide else None, stack)
    costs = Costs.of(chain.manifest, stack, _medians([item for each in traces for trace in each for item in trace]))
    at_once = None if stack.whole is None else _total(traces[len(stack.exits) - 1])
    return replace(costs, at_once=at_once, wide=_total(wide) if wide else None)


def _total(traces: Sequence[Sequence[Timing]]) -> float:
    """The median milliseconds of runs."""
    return float(np.median([sum(timing.milliseconds for timing in trace) for trace in traces]))


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
    steps = list(chain.stream(example, policy, **{**options, **GREEDY}))
    return np.array([step.token for step in steps], np.int64), steps


def unasked(chain: Chain, examples: Examples) -> list[int]:
    """How many tokens of each text go to full depth whatever a policy says: the first, behind a prompt of several."""
    found = []
    for example in examples.inputs:
        session = chain.session(example, Never())
        found.append(int(session.together))
        session.end()
    return found


def observe_tokens(
    chain: Chain,
    stack: Stack,
    examples: Examples,
    texts: Sequence[NDArray[np.int64]],
    options: Mapping[str, Any],
    beside: Policy | None = None,
) -> tuple[Observed, Costs]:
    """What every exit makes of the tokens of ``texts``, those of full depth with all learners.

    A step is good where it makes the same.

    The costs are those of a token after the prompt.
    """
    early = len(stack.exits) - 1
    measures = {measure for exit_ in stack.exits[:-1] for measure in measures_of(exit_)}
    skipped = unasked(chain, examples)
    lengths = np.array([max(0, len(text) - skip) for text, skip in zip(texts, skipped, strict=True)], np.int64)
    scores = {measure: np.full((lengths.sum(), early), np.nan, np.float32) for measure in sorted(measures)}
    quality = np.zeros((lengths.sum(), early + 1))
    trace: list[Timing] = []
    late: list[Timing] = []
    full: list[float] = []
    first: list[float] = []
    wide: list[float] = []
    start = 0
    for example, text, skip, length in zip(examples.inputs, texts, skipped, lengths, strict=True):
        for at, exit_ in enumerate(stack.exits):
            asked = measures_of(exit_) if at < early else ()
            force = Forced(stack.name, exit_.after, asked) if at < early else _Stays(stack)
            forced = within(force, stack.name, beside)
            for step, (token, found, timed) in enumerate(_forced_tokens(chain, example, forced, text, options)):
                quality[start + step, at] = token == text[skip + step]
                for measure in asked:
                    scores[measure][start + step, at] = found[measure]
                trace += timed
        periodic = within(_Periodic(stack.name, stack.exits[0].after), stack.name, beside)
        for step, (_, _, timed) in enumerate(_forced_tokens(chain, example, periodic, text, options)):
            late += timed if (step + 1) % _PERIOD == 0 else ()
        if length and stack.whole is not None:
            full.append(_streamed(chain, example, within(Never(), stack.name, beside), skip, len(text), options))
        if length and stack.parts[0].steps is not None:
            leave = within(Depth({stack.name: stack.exits[0].after}), stack.name, beside)
            first.append(_streamed(chain, example, leave, skip, len(text), options))
        if length and beside is not None:
            wide.append(_streamed(chain, example, Never(), skip, len(text), options))
        start += length
    seen = Observed(scores, quality, lengths, None if beside is None else np.ones(len(quality)))
    costs = Costs.of(chain.manifest, stack, _medians(trace), _medians(late), _PERIOD)
    ahead = float(costs.around + costs.blocks[0] + costs.leave[0] - np.median(first)) if first else 0.0
    at_once, widest = (float(np.median(each)) if each else None for each in (full, wide))
    return seen, replace(costs, at_once=at_once, wide=widest, ahead=max(0.0, ahead))


def _forced_tokens(
    chain: Chain, example: Example, policy: Policy, text: NDArray[np.int64], options: Mapping[str, Any]
) -> Iterator[tuple[int, Mapping[str, float], tuple[Timing, ...]]]:
    """Behind the prompt and each token of the text but the last: the token that comes out, its scores and what ran.

    Where the prompt goes to full depth, there is nothing of it.
    """
    session = chain.session(example, policy)
    plan, prompts = session.plan, session.prompts
    chooser = Chooser(plan.sampling(prompts[0].size, {**options, **GREEDY}), plan.vocabulary)
    deep = session.together
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


def _streamed(
    chain: Chain, example: Example, policy: Policy, skip: int, most: int, options: Mapping[str, Any]
) -> float:
    """Milliseconds that segments take for a token behind the first ``skip``, where one run may make several."""
    steps = generate(chain, example, policy, {**options, "max_new_tokens": most})[1]
    steps = steps[skip:] or steps
    return sum(timing.milliseconds for step in steps for timing in step.trace) / len(steps)


def _takes(chooser: Chooser, step: int, slot: int, token: int) -> bool:
    return chooser.takes(token, step)
