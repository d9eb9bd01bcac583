"""Settings of a path are tested one after the other, from careful to bold, until one fails; and what is told of it."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from offramp.calibration.examples import FIT_SHARE, Examples, together
from offramp.calibration.observe import generate
from offramp.calibration.quality import Quality, by_row, graded, same_class, short
from offramp.calibration.risk import accepted, least_examples, losses_of, p_value
from offramp.errors import InputError
from offramp.runtime import Chain, Never, Policy

Numbers = NDArray[np.float64]

LEAST_FIT = 20  # examples, for a fit of two numbers at each exit


@dataclass(frozen=True)
class Asked:
    """What a calibration promises, and of what; ``options`` are those of generations."""

    chain: Chain
    keep: float
    confidence: float
    quality: Quality
    options: Mapping[str, Any]

    @property
    def level(self) -> float:
        """The chance of a wrong promise."""
        return 1 - self.confidence

    def too_few(self, fitting: Examples, testing: Examples) -> str | None:
        """Why nothing can be proven whatever comes out; None where something can."""
        least = least_examples(self.keep, self.level)
        if len(fitting) >= LEAST_FIT and len(testing) >= least:
            return None
        needed = math.ceil(max(LEAST_FIT / FIT_SHARE, least / (1 - FIT_SHARE))) + 1
        return (
            f"{len(fitting) + len(testing)} examples are too few: keep={self.keep:g} with confidence "
            f"{self.confidence:g} needs at least {needed}, even if nothing is ever lost"
        )


def check_generation(chain: Chain, options: Mapping[str, Any]) -> None:
    """Raise where options make no sense for the generations of a bundle, or it makes none."""
    if chain.generates is None and options:
        raise InputError(f"options {sorted(options)} are of generations; this bundle does not generate")
    if options.get("temperature") or options.get("beams", 1) != 1:
        raise InputError("greedy texts are compared", hint="leave temperature and beams out")


@dataclass(frozen=True)
class Full:
    """What settings are compared with: a reference for each example, and the quality at full depth, [examples]."""

    references: Sequence[Any]
    grades: Numbers


@dataclass(frozen=True)
class Tested:
    """How far along a path the tests went: qualities by example of each setting that was tested, and its p-value."""

    full: Numbers
    early: Sequence[Numbers]
    p_values: Sequence[float]

    def record(self, level: float, settings: int) -> dict[str, Any]:
        """What a manifest says of the tests of a path of so many settings, and of the boldest that passed."""
        count = accepted(self.p_values, level)
        tested = min(len(self.p_values), count + 1)
        found: dict[str, Any] = {"settings": {"tested": tested, "passed": count, "of": settings}}
        if not count:
            return found
        early = self.early[count - 1]
        found["risk"] = {
            "full": round(float(self.full[: early.size].mean()), 6),
            "early": round(float(early.mean()), 6),
            "examples": early.size,
            "p_value": float(f"{self.p_values[count - 1]:.3g}"),
        }
        return found

    def why_none(self, asked: Asked, first: str, better: str) -> str:
        """Why not even the ``first`` setting passed, and that ``better`` ones might."""
        early = self.early[0]
        kept = early.mean() / max(self.full[: early.size].mean(), 1e-12)
        return (
            f"even {first} is not proven to keep {asked.keep:g}: it kept {kept:.4f} of the quality in {early.size} "
            f"examples (p = {self.p_values[0]:.2g}, needed {asked.level:.2g}); more examples, {better} or a "
            "smaller keep may help"
        )


def full(asked: Asked, examples: Examples) -> Full:
    """The answers at full depth with all learners; where there are labels, these are the references."""
    references: list[Any] = list(examples.labels) if examples.labels is not None else [None] * len(examples)
    grades = np.zeros(len(examples))
    for rows, answers in _answers(asked, examples, Never()):
        for row, answer in zip(rows, answers, strict=True):
            if examples.labels is None:  # a class is all that `same_class` looks at, and logits may be large
                references[row] = answer.argmax(-1) if asked.quality is same_class else answer
            grades[row] = graded(asked.quality, answer, references[row])
    return Full(references, grades)


def nothing_right(asked: Asked, examples: Examples) -> str | None:
    """What is wrong with labels that no answer at full depth agrees with in the least; None where one does."""
    if examples.labels is None or any(full(asked, examples.some([row])).grades[0] > 0 for row in range(len(examples))):
        return None
    _, answers = next(iter(_answers(asked, examples.some([0]), Never())))
    answer = answers[0].argmax(-1) if asked.quality is same_class else answers[0]
    return (
        f"at full depth the quality is 0 in all of {len(examples)} examples, so there is nothing to keep: the first "
        f"answer is {short(answer)}, and is compared with the label {short(examples.labels[0])}; do the labels belong "
        "to these inputs, and to this bundle?"
    )


def grades(asked: Asked, examples: Examples, policy: Policy, compared: Full) -> Numbers:
    """The quality of each example under a policy, [examples]."""
    found = np.zeros(len(examples))
    for rows, answers in _answers(asked, examples, policy):
        found[rows] = [
            graded(asked.quality, answer, compared.references[row]) for row, answer in zip(rows, answers, strict=True)
        ]
    return found


def tested(asked: Asked, examples: Examples, policies: Iterable[Policy]) -> Tested:
    """Policies on examples that nothing was fitted on, up to the first that fails."""
    compared = full(asked, examples)
    early: list[Numbers] = []
    values: list[float] = []
    for policy in policies:
        found, value = _proven(asked, examples, policy, compared)
        early.append(found)
        values.append(value)
        if value > asked.level:
            break
    return Tested(compared.grades, early, values)


def _proven(asked: Asked, examples: Examples, policy: Policy, compared: Full) -> tuple[Numbers, float]:
    """The qualities under one policy and the p-value; of generations only of as many examples as it takes."""
    if asked.chain.generates is None:
        found = grades(asked, examples, policy, compared)
        return found, p_value(losses_of(found, compared.grades, asked.keep), asked.keep)
    value, some = 1.0, np.zeros(0)
    for row, example in enumerate(examples.inputs):
        text, _ = generate(asked.chain, example, policy, asked.options)
        some = np.append(some, graded(asked.quality, text, compared.references[row]))
        value = p_value(losses_of(some, compared.grades[: row + 1], asked.keep), asked.keep)
        if value <= asked.level:  # enough is proven: the rest of the examples can stay out
            break
    return some, value


def _answers(asked: Asked, examples: Examples, policy: Policy) -> Iterable[tuple[list[int], Sequence[Any]]]:
    """What comes out, batch by batch: which examples, and the answer to each."""
    chain = asked.chain
    if chain.generates is not None:
        for row, example in enumerate(examples.inputs):
            yield [row], [generate(chain, example, policy, asked.options)[0]]
        return
    for rows, inputs in together(chain, examples.inputs):
        yield rows, by_row(chain, chain.run(inputs, policy).outputs)
