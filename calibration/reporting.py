"""`report`: do a bundle's exits pay, here and on these examples? Quality against time, and the best there could be.

All points of the frontier are run, in turns with full depth. The oracle is reckoned from the times of the segments:
a gate that costs nothing and lets every step leave at the first exit that answers as full depth does, late
computations included. What it saves bounds what any gate can save without losing quality.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from time import perf_counter
from typing import Any

import numpy as np
from numpy.typing import NDArray

from offramp.bundle.manifest import Stack
from offramp.calibration.costs import Costs
from offramp.calibration.examples import Example, Examples, read
from offramp.calibration.gates import Fit, policy_of
from offramp.calibration.observe import Observed, generate, observe_rows, observe_tokens, stack_of, time_rows
from offramp.calibration.quality import Quality, answers_of, classes_of, graded, same_class, same_tokens
from offramp.runtime import Chain, Never, Policy

FULL, OWN, PERFECT = "full depth", "the bundle's own policy", "a perfect gate (reckoned)"
_POINTS = 8
_KEEP = 0.99  # of the quality, for a setting to count as one that keeps it
_WORTH = 0.05  # of the time; less is not worth an exit
_LITTLE = 0.10  # of the time; where even the oracle saves less, gates are not what is missing


@dataclass(frozen=True)
class Point:
    """One way to run: its quality, and milliseconds a step, wall-clock, beside those of full depth in turns with it.

    ``exits`` has the share of steps that left after so many blocks.
    """

    policy: str
    quality: float
    milliseconds: float
    speedup: float
    exits: Mapping[int, float]


@dataclass(frozen=True)
class Report:
    """Whether exits pay.

    Attributes:
        verdict: The answer in a sentence.
        step: What is decided and timed: a "row", or a "token" behind the prompt.
        stack, blocks: The stack that is left.
        measure: What the frontier's settings compare with thresholds.
        full: Quality and milliseconds at full depth.
        frontier: Settings from careful to bold; behind them the bundle's own policy, unless that is `Never`.
        oracle: The best there could be; its milliseconds are those of full depth times the reckoned share.
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

    @property
    def tokens(self) -> bool:
        return self.chain.generates is not None

    def observe(self, examples: Examples) -> tuple[Observed, Costs]:
        if not self.tokens:
            return observe_rows(self.chain, self.stack, examples, self.quality), self.costs(examples)
        texts = [generate(self.chain, example, Never(), self.options)[0] for example in examples.inputs]
        return observe_tokens(self.chain, self.stack, examples, texts, self.options)

    def agreement(self, examples: Examples, seen: Observed) -> NDArray[np.bool_]:
        """Where a step's answer is that of full depth, bool [steps, exits]; where labels decide, as good as that."""
        if examples.labels is None or self.tokens or self.quality is not same_class:
            return seen.good
        return observe_rows(self.chain, self.stack, Examples(examples.inputs, None)).good

    def costs(self, examples: Examples) -> Costs:
        return self.observe(examples)[1] if self.tokens else time_rows(self.chain, self.stack, examples.inputs)

    def play(self, example: Example, policy: Policy) -> tuple[Any, float, Sequence[int]]:
        """The answer, milliseconds in all, and after how many blocks each step left."""
        if self.tokens:
            text, steps = generate(self.chain, example, policy, self.options)
            return text, sum(step.milliseconds for step in steps[1:]), [step.exit for step in steps[1:]]
        started = perf_counter()
        result = self.chain.run(example, policy)
        elapsed = (perf_counter() - started) * 1e3
        name = answers_of(self.chain)
        place = self.chain.rows_of(name)
        answer = result.outputs[name] if place is None else result.outputs[name].take(0, place[0])
        return answer, elapsed, result.exits[self.stack.name].tolist()

    def points(self, examples: Examples, ways: Mapping[str, Policy]) -> list[Point]:
        """Every policy on every example, in turns; the first is full depth."""
        policies = list(ways.values())
        grades = np.zeros((len(policies), len(examples)))
        times = np.zeros_like(grades)
        left: list[Counter[int]] = [Counter() for _ in policies]
        self.play(examples.inputs[0], policies[0])
        for row, example in enumerate(examples.inputs):
            reference = None if examples.labels is None else examples.labels[row]
            for at, policy in enumerate(policies):
                answer, times[at, row], exits = self.play(example, policy)
                reference = answer if reference is None else reference
                grades[at, row] = graded(self.quality, answer, reference)
                left[at].update(exits)
        means = [float(times[at].sum() / max(1, left[at].total())) for at in range(len(policies))]
        return [
            Point(name, float(grades[at].mean()), means[at], means[0] / means[at], _shares(left[at]))
            for at, name in enumerate(ways)
        ]


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
        stack: As for `calibrate`.
        judge: Whether the answers mean something; else only times are measured, on inputs that are made up.
        options: As for `calibrate`.

    Raises:
        InputError: options or data make no sense for this bundle.
    """
    tokens = chain.generates is not None
    if judge and not tokens and quality is None:
        classes_of(chain)
    bench = _Bench(chain, stack_of(chain, stack), quality or (same_tokens if tokens else same_class), options)
    examples = read(chain, data)
    fitting, held = examples.split(0) if judge and len(examples) > 1 else (examples, examples)
    if not judge:
        return _report(bench, bench.costs(examples), None, [], None, {})
    seen, costs = bench.observe(held)
    fit = Fit(bench.observe(fitting)[0], costs, _KEEP, 0.5, len(held), _POINTS)
    path = fit.chosen()
    alone = len(chain.stacks) == 1
    ways: dict[str, Policy] = {FULL: Never()}
    for thresholds, _ in path.settings:
        shown = ", ".join(f"{bench.stack.exits[at].after}: {number:.4g}" for at, number in thresholds.items())
        ways[f"{path.measure} {shown}"] = policy_of(bench.stack, path.measure, thresholds, alone=alone)
    if chain.policy != Never():
        ways[OWN] = chain.policy
    full, *frontier = bench.points(held, ways)
    dropped = {bench.stack.exits[at].after: why for at, why in path.dropped.items()}
    return _report(bench, costs, full, frontier, (seen, bench.agreement(held, seen)), dropped, path.measure)


def _report(
    bench: _Bench,
    costs: Costs,
    full: Point | None,
    frontier: Sequence[Point],
    held: tuple[Observed, NDArray[np.bool_]] | None,
    dropped: Mapping[int, str],
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
        step="token" if bench.tokens else "row",
        stack=stack.name,
        blocks=stack.blocks,
        measure=measure,
        full=full,
        frontier=frontier,
        oracle=oracle,
        depths=depths,
        segments=segments,
        dropped=dropped,
    )


def verdict(
    full: Point | None, frontier: Sequence[Point], oracle: Point | None, depths: Mapping[int, float], stack: Stack
) -> str:
    """Whether exits pay, in a sentence: "yes: ...", "no: ...", "not with these gates: ...", or that nobody can say."""
    if full is None or oracle is None:
        depth, most = max(depths.items(), key=lambda item: item[1])
        return (
            f"cannot say without examples: leaving after {depth} of {stack.blocks} blocks saves {most:.0%} of the time"
        )
    bound = 1 - 1 / oracle.speedup
    if bound < _LITTLE:
        return f"no: a perfect gate would save {max(bound, 0):.0%}; train the exits, or leave them out"
    keeping = [point for point in frontier if point.quality >= _KEEP * full.quality]
    best = max(keeping, key=lambda point: point.speedup, default=full)
    saved = 1 - 1 / best.speedup
    if saved < _WORTH:
        return (
            f"not with these gates: a perfect gate would save {bound:.0%}, but no setting that keeps {_KEEP:.0%} of "
            f"the quality saves {_WORTH:.0%}; train the exits, or gates"
        )
    return (
        f"yes: {best.policy} saves {saved:.0%} of the time ({best.speedup:.2f}x) at "
        f"{best.quality / full.quality:.1%} of the quality; a perfect gate would save {bound:.0%}"
    )


def _shares(left: Counter[int]) -> dict[int, float]:
    return {depth: count / left.total() for depth, count in sorted(left.items())}
