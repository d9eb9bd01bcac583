"""How far a bundle in fewer bits is from the same one in fp32: its outputs, its answers, and where rows leave."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from offramp.bundle.manifest import Exit, Manifest
from offramp.bundle.measures import measure_named
from offramp.bundle.precision import ANSWERS, ERROR, EXITS, against_fp32
from offramp.errors import ExportError
from offramp.export.patterns import raised
from offramp.runtime.chain import Chain
from offramp.runtime.policies.base import Policy, Rows, State
from offramp.runtime.policies.builtin import Depth, Never
from offramp.runtime.result import Result

_THRESHOLDS = np.linspace(0.1, 0.9, 9)  # quantiles of the scores in fp32


class _Asks(Policy):
    """All scores of all exits, and no row leaves."""

    def measures(self, stack: str, exit_: Exit) -> tuple[str, ...] | None:
        return tuple(name for name in exit_.scores if measure_named(name).gates) or None

    def picks(self, stack: str, exit_: Exit) -> tuple[str, ...] | None:
        return None

    def leave(self, state: State) -> Rows:
        return np.zeros(state.rows.size, np.bool_)


@dataclass(frozen=True)
class Bounds:
    """How far outputs may be from fp32, and the share of answers, and of exits taken, that are to be the same."""

    loss: float
    agreement: float = 0.0

    def broken(self, figures: Mapping[str, float]) -> list[str]:
        """Those that figures, as `changed` has them, are not within."""
        wrong = [] if figures[ERROR] <= self.loss else [f"loss={self.loss}"]
        if not all(figures.get(key, 1.0) >= self.agreement for key in (ANSWERS, EXITS)):
            wrong.append(f"agreement={self.agreement}")
        return wrong

    def check(self, manifest: Manifest, precision: str | Mapping[str, str]) -> None:
        """ExportError where a bundle that was asked for in that precision is not within them."""
        if wrong := self.broken(manifest.validation):
            finer = raised(precision, manifest)
            tries = ["precision auto", *([f"more bits for some segments: {finer}"] if finer else []), "other bounds"]
            raise ExportError(
                f"{against_fp32(manifest)}; that is not within {' and '.join(wrong)}",
                hint="; or ".join(tries[precision == "auto" :]),
            )


def ways(manifest: Manifest) -> Iterator[Policy]:
    """Policies that together run every file: full depth, and each exit that has files of its own."""
    yield Never()
    files = {name: item.file for name, item in manifest.segments.items()}
    for stack in manifest.stacks.values():
        run = {files[name] for name in stack.exits[-1].segments}
        for exit_ in stack.exits[:-1]:
            if not run.issuperset(own := {files[name] for name in exit_.segments}):
                run |= own
                yield Depth(dict.fromkeys(stack.by_group, exit_.after))


def answers(chain: Chain, samples: Sequence[Mapping[str, Any]]) -> list[list[Result]]:
    """What a bundle says of all samples: at full depth, with all that its exits score, and at exits of their own."""
    policies = [_Asks(), *list(ways(chain.manifest))[1:]]
    return [[chain.run(inputs, policy) for inputs in samples] for policy in policies]


def changed(before: Sequence[Sequence[Result]], after: Sequence[Sequence[Result]]) -> dict[str, float]:
    """What encoding changed, over what `answers` gives.

    ``encoding`` is the worst output's root of the mean square of the differences, over that of its values (1 if they
    are 0), in all samples; ``same answers`` the share of places where an output of classes has its greatest value in
    the same one; ``same exits`` the share of rows that leave a stack after as many blocks, over thresholds from low to
    high of every measure. What a bundle does not have is left out: outputs of several classes, exits with scores.
    """
    errors, same = [0.0], list[float]()
    scores: dict[tuple[str, str], list[list[NDArray[Any]]]] = defaultdict(list)
    for olds, news in zip(before, after, strict=True):
        squares: dict[str, NDArray[np.float64]] = defaultdict(lambda: np.zeros(3))  # differences, values, how many
        for old, new in zip(olds, news, strict=True):
            for name, value in old.outputs.items():
                there = np.isfinite(value)  # what is hidden may be -inf
                if value.dtype.kind != "f" or not there.any():
                    continue
                apart = (new.outputs[name][there] - value[there]).astype(np.float64)
                squares[name] += np.square(apart).sum(), np.square(value[there], dtype=np.float64).sum(), apart.size
                if value.ndim > 1 and value.shape[-1] > 1:
                    same.append(float((new.outputs[name].argmax(-1) == value.argmax(-1)).mean()))
            for stack, exits in old.scores.items():
                for measure in dict.fromkeys(name for found in exits.values() for name in found):
                    places = [place for place, found in exits.items() if measure in found]
                    pair = [[run.scores[stack][place][measure].reshape(-1) for place in places] for run in (old, new)]
                    scores[stack, measure].append([np.stack(found, 1) for found in pair])
        errors += [float(np.sqrt(apart / (values or count))) for apart, values, count in squares.values()]
    figures = {ERROR: float(np.max(errors))}  # no number where one is none
    if same:
        figures[ANSWERS] = float(np.mean(same))
    if scores:
        figures[EXITS] = float(np.mean([_same_exits(measure, pairs) for (_, measure), pairs in scores.items()]))
    return figures


def _same_exits(measure: str, pairs: Sequence[Sequence[NDArray[Any]]]) -> float:
    """The share of rows that leave alike; scores before and after are [rows, exits]."""
    old, new = (np.concatenate(found) for found in zip(*pairs, strict=True))
    if measure_named(measure).surer == "less":
        old, new = -old, -new
    taken = [
        [np.where((scores >= at).any(1), (scores >= at).argmax(1), scores.shape[1]) for scores in (old, new)]
        for at in np.quantile(old, _THRESHOLDS)
    ]
    return float(np.mean([one == other for one, other in taken]))
