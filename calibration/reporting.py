"""`report`: do a bundle's exits and widths pay, here and on these examples? Quality against time, and the best.

All points of the frontier are run, in turns with full depth. The oracle is reckoned from the times of the segments:
a gate that costs nothing and lets every step leave at the first exit that answers as full depth does, late
computations included. What it saves bounds what any gate can save without losing quality.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from time import perf_counter
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from offramp.bundle.manifest import Stack
from offramp.calibration.costs import Costs
from offramp.calibration.examples import Example, Examples, read
from offramp.calibration.gates import Fit, policy_of
from offramp.calibration.observe import (
    Observed,
    StepKind,
    generate,
    observe_rows,
    observe_tokens,
    runs_once,
    scored,
    stack_of,
    time_rows,
)
from offramp.calibration.quality import Quality, by_row, classes_of, graded, same_class, same_tokens
from offramp.calibration.sequence import Asked, check_generation, nothing_right
from offramp.calibration.verdicts import KEEP, Point, verdict, verdict_of_widths
from offramp.calibration.widths import ALL, all_dense, milliseconds, step_of, time_widths
from offramp.errors import InputError
from offramp.runtime import Chain, Never, Policy, Width
from offramp.runtime.generation.tokens import Token

FULL, OWN, PERFECT = "full depth", "the bundle's own policy", "a perfect gate (reckoned)"
_POINTS = 8
_LEAST = 2  # tokens of a text
_WIDTHS = (0.9, 0.75, 0.6, 0.5, 0.4, 0.3, 0.2, 0.1)


@dataclass(frozen=True)
class Report:
    """Whether exits pay, or widths.

    Attributes:
        verdict: The answer in a sentence.
        step: What is decided and timed: a "row", or a "token" behind the prompt. Of widths alone, where learners lie in
            what runs once for a generation, that ("input"), or a "generation" where the decoder has some too.
        stack, blocks: The stack that is left, or whose tokens take learners.
        measure: What the frontier's settings of exits compare with thresholds.
        full: Quality and milliseconds at full depth, with all learners.
        frontier: Settings of exits from careful to bold, and widths; behind them the bundle's own policy, unless that
            is `Never`.
        oracle: The best there could be; its milliseconds are those of full depth times the reckoned share. None for
            widths alone.
        widths: For each width, the share of a step's time that it saves, one row at a time; none where all learners
            run dense.
        depths: For each exit, the share of a step's time that leaving there saves, no gate, no late computation.
        segments: Milliseconds of what each exit adds: ``blocks`` from the exit before, ``leave``, and ``gate`` by
            measure; ``around`` the stack under 0.
        dropped: Exits that the frontier does not ask, and why.
    """

    verdict: str
    step: str
    stack: str
    blocks: int
    measure: str | None
    full: Point | None
    frontier: Sequence[Point]
    oracle: Point | None
    depths: Mapping[int, float]
    segments: Mapping[int, Mapping[str, float]]
    dropped: Mapping[int, str]
    widths: Mapping[float, float] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """As JSON has it."""
        return asdict(self)


@dataclass(frozen=True)
class _Bench:
    """A bundle under test: what is run, and what counts as good."""

    chain: Chain
    stack: Stack
    quality: Quality
    options: Mapping[str, Any]
    step: StepKind

    @property
    def tokens(self) -> bool:
        return self.chain.generates is not None

    def observe(self, examples: Examples) -> tuple[Observed, Costs]:
        if not self.tokens:
            return observe_rows(self.chain, self.stack, examples, self.quality), self.costs(examples)
        texts = [generate(self.chain, example, Never(), self.options)[0] for example in examples.inputs]
        if all(len(text) < _LEAST for text in texts):
            raise _too_short()
        return observe_tokens(self.chain, self.stack, examples, texts, self.options)

    def agreement(self, examples: Examples, seen: Observed) -> NDArray[np.bool_]:
        """Where a step's answer is that of full depth, bool [steps, exits]; where labels decide, as good as that."""
        if examples.labels is None or self.tokens or self.quality is not same_class:
            return seen.good
        return observe_rows(self.chain, self.stack, Examples(examples.inputs, None)).good

    def costs(self, examples: Examples) -> Costs:
        return self.observe(examples)[1] if self.tokens else time_rows(self.chain, self.stack, examples.inputs)

    def widths(self, examples: Examples) -> dict[float, float]:
        """The share of a step's time that each width saves."""
        times = time_widths(self.chain, examples.inputs, [ALL, *_WIDTHS], self.options, self.step)
        return {budget: 1 - times[budget] / times[ALL] for budget in _WIDTHS}

    def play(self, example: Example, policy: Policy, like: Sequence[Token]) -> _Played:
        """Run an example; a generation that is timed as a whole is taken for one of as many tokens as ``like``."""
        started = perf_counter()
        if not self.tokens:
            result = self.chain.run(example, policy)
            elapsed = (perf_counter() - started) * 1e3
            return _Played(by_row(self.chain, result.outputs)[0], elapsed, 1, result.exits[self.stack.name].tolist())
        text, steps = generate(self.chain, example, policy, self.options)
        elapsed = (perf_counter() - started) * 1e3
        if self.step == "token":
            behind = [token.milliseconds for token in steps[1:]]
            return _Played(text, sum(behind), len(behind), [token.exit for token in steps[1:]], steps)
        took = milliseconds(self.step, elapsed, steps, like or steps)
        return _Played(text, took, 1, [], steps)

    def points(self, examples: Examples, ways: Mapping[str, Policy]) -> list[Point]:
        """Every policy on every example, in turns; the first is full depth."""
        policies = list(ways.values())
        grades = np.zeros((len(policies), len(examples)))
        times = np.zeros_like(grades)
        steps = [0 for _ in policies]
        left: list[Counter[int]] = [Counter() for _ in policies]
        self.play(examples.inputs[0], policies[0], ())
        for row, example in enumerate(examples.inputs):
            reference = None if examples.labels is None else examples.labels[row]
            like: Sequence[Token] = ()
            for at, policy in enumerate(policies):
                played = self.play(example, policy, like)
                like, times[at, row] = like or played.tokens, played.milliseconds
                reference = played.answer if reference is None else reference
                grades[at, row] = graded(self.quality, played.answer, reference)
                steps[at] += played.steps
                left[at].update(played.exits)
        if not all(steps):
            raise _too_short()
        means = [float(times[at].sum() / steps[at]) for at in range(len(policies))]
        return [
            Point(name, float(grades[at].mean()), means[at], means[0] / means[at], _shares(left[at]), _budget(policy))
            for at, (name, policy) in enumerate(ways.items())
        ]


class _Played(NamedTuple):
    """An answer, the milliseconds of its steps, how many they are and after how many blocks each left; its tokens."""

    answer: Any
    milliseconds: float
    steps: int
    exits: Sequence[int]
    tokens: Sequence[Token] = ()


def _too_short() -> InputError:
    return InputError(
        "no text is longer than one token, and a prompt's own is not timed",
        hint=f"max_new_tokens={_LEAST} or more, or --max-new-tokens {_LEAST}",
    )


def report(
    chain: Chain,
    data: Mapping[str, Any] | Sequence[Mapping[str, Any]],
    *,
    quality: Quality | None = None,
    stack: str | None = None,
    judge: bool = True,
    **options: Any,
) -> Report:
    """Run the bundle on ``data`` in every way that matters.

    Args:
        chain: A loaded bundle.
        data: As for `calibrate`. Three in ten examples serve to fit the settings.
        quality: As for `calibrate`.
        stack: As for `calibrate`; of a generator one that runs for each token. One that has learners and no scores
            stands for the widths alone, as the last such does where no exit can be judged.
        judge: Whether the answers mean something; else only times are measured, on inputs that are made up.
        options: As for `calibrate`.

    Raises:
        InputError: options or data make no sense for this bundle.
    """
    if quality is not None and not callable(quality):
        raise InputError(f"quality={quality!r}: a function of answer and reference, or None")
    tokens = chain.generates is not None
    examples = read(chain, data)
    check_generation(chain, options)
    if judge and not tokens and quality is None:
        classes_of(chain, examples)
    alone = _widths_alone(chain, stack)
    left = chain.manifest.stacks[alone] if alone else stack_of(chain, stack)
    if not alone and runs_once(chain, left):
        raise InputError(
            f"stack {left.name!r} runs once for a generation, whose tokens are what is timed here",
            hint="offramp calibrate chooses its exits; here a stack that runs for each token, whose exits have scores",
        )
    learners, kind = chain.manifest.learners and not all_dense(chain), step_of(chain)
    step: StepKind = kind if alone else "token" if tokens else "row"
    bench = _Bench(chain, left, quality or (same_tokens if tokens else same_class), options, step)
    if judge and (wrong := nothing_right(Asked(chain, KEEP, 0.5, bench.quality, options), examples)):
        raise InputError(wrong, hint="examples without labels, which are compared with the answers at full depth")
    fitting, held = examples.split(0) if judge and len(examples) > 1 else (examples, examples)
    timed = learners and (alone or kind != "input")  # a token's time shows nothing of what runs once
    widths = bench.widths(held) if timed else {}
    if alone:
        return _of_widths(bench, held if judge else None, widths)
    if not judge:
        return _report(bench, bench.costs(examples), None, [], None, {}, widths)
    seen, costs = bench.observe(held)
    fit = Fit(bench.observe(fitting)[0], costs, KEEP, 0.5, len(held), _POINTS)
    path = fit.chosen()
    one = len(chain.stacks) == 1
    ways: dict[str, Policy] = {FULL: Never()}
    for thresholds, _ in path.settings:
        shown = ", ".join(f"{bench.stack.exits[at].after}: {number:.4g}" for at, number in thresholds.items())
        ways[f"{path.measure} {shown}"] = policy_of(bench.stack, path.measure, thresholds, alone=one)
    ways |= _by_width(widths)
    if chain.policy != Never():
        ways[OWN] = chain.policy
    full, *frontier = bench.points(held, ways)
    dropped = {bench.stack.exits[at].after: why for at, why in path.dropped.items()}
    return _report(bench, costs, full, frontier, (seen, bench.agreement(held, seen)), dropped, widths, path.measure)


def _widths_alone(chain: Chain, stack: str | None) -> str | None:
    """The stack whose learners are judged, where no exits are: the one named, or the last; else None."""
    wide = {item.stack for item in chain.manifest.learners.values()}
    found = [name for name in chain.manifest.stacks if name in wide and stack in (None, name)]
    judged = [each.name for each in scored(chain) if not runs_once(chain, each) or stack is not None]
    return found[-1] if found and (not judged if stack is None else stack not in judged) else None


def _by_width(widths: Mapping[float, float]) -> dict[str, Policy]:
    return {f"width {budget:g}": Width(budget) for budget in widths}


def _budget(policy: Policy) -> float | None:
    return policy.budget if isinstance(policy, Width) else None


def _of_widths(bench: _Bench, held: Examples | None, widths: Mapping[float, float]) -> Report:
    """Of a bundle that has no exits to choose among."""
    full, frontier = None, list[Point]()
    if held is not None:
        own = {} if bench.chain.policy == Never() else {OWN: bench.chain.policy}
        full, *frontier = bench.points(held, {FULL: Never(), **_by_width(widths), **own})
    return Report(
        verdict=verdict_of_widths(full, frontier, widths),
        step=bench.step,
        stack=bench.stack.name,
        blocks=bench.stack.blocks,
        measure=None,
        full=full,
        frontier=frontier,
        oracle=None,
        depths={},
        segments={},
        dropped={},
        widths=widths,
    )


def _report(
    bench: _Bench,
    costs: Costs,
    full: Point | None,
    frontier: Sequence[Point],
    held: tuple[Observed, NDArray[np.bool_]] | None,
    dropped: Mapping[int, str],
    widths: Mapping[float, float],
    measure: str | None = None,
) -> Report:
    stack = bench.stack
    after = [exit_.after for exit_ in stack.exits]
    depths = {
        depth: 1 - costs.expected(np.array([at]), np.array([1])) / costs.full for at, depth in enumerate(after[:-1])
    }
    oracle = None
    if held is not None and full is not None and len(held[1]):
        seen, agrees = held
        taken: NDArray[np.int64] = agrees.argmax(1)
        share = costs.expected(taken, seen.lengths) / costs.full
        left = Counter(after[at] for at in taken.tolist())
        grades = np.take_along_axis(seen.quality, taken[:, None], 1)
        quality = full.quality if bench.tokens else float(grades.mean())
        oracle = Point(PERFECT, quality, full.milliseconds * share, 1 / share, _shares(left))
    segments: dict[int, dict[str, float]] = {0: {"around": costs.around}}
    for at, depth in enumerate(after):
        gates = (
            {f"gate {name}": float(costs.gates(name)[at]) for name in held[0].scores}
            if held and at < len(after) - 1
            else {}
        )
        segments[depth] = {"blocks": float(costs.blocks[at]), "leave": float(costs.leave[at]), **gates}
    return Report(
        verdict=verdict(full, frontier, oracle, depths, stack),
        step=bench.step,
        stack=stack.name,
        blocks=stack.blocks,
        measure=measure,
        full=full,
        frontier=frontier,
        oracle=oracle,
        depths=depths,
        segments=segments,
        dropped=dropped,
        widths=widths,
    )


def _shares(left: Counter[int]) -> dict[int, float]:
    return {depth: count / left.total() for depth, count in sorted(left.items())}
