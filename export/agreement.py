"""How far a bundle in fewer bits is from the same one in fp32: its outputs, its answers, and where rows leave."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from offramp.bundle.manifest import Exit
from offramp.bundle.measures import measure_named
from offramp.bundle.precision import ANSWERS, ERROR, EXITS
from offramp.runtime.chain import Chain
from offramp.runtime.policies.base import Policy, Rows, State

_THRESHOLDS = np.linspace(0.1, 0.9, 9)  # quantiles of the scores in fp32


class _Asks(Policy):
    """All scores of all exits, and no row leaves."""

    def measures(self, stack: str, exit_: Exit) -> tuple[str, ...] | None:
        return tuple(name for name in exit_.scores if measure_named(name).gates) or None

    def picks(self, stack: str, exit_: Exit) -> tuple[str, ...] | None:
        return None

    def leave(self, state: State) -> Rows:
        return np.zeros(state.rows.size, np.bool_)


def compared(before: Chain, after: Chain, samples: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """What encoding changed, over samples.

    ``encoding`` is the worst output's root of the mean square of the differences, over that of its values; ``same
    answers`` the share of places where an output of classes has its greatest value in the same one; ``same exits`` the
    share of rows that leave a stack after as many blocks, over thresholds from low to high of every measure. What a
    bundle does not have is left out: outputs of several classes, exits with scores.
    """
    errors, same = [0.0], list[float]()
    scores: dict[tuple[str, str], list[list[NDArray[Any]]]] = defaultdict(list)
    for inputs in samples:
        old, new = (chain.run(inputs, _Asks()) for chain in (before, after))
        for name, value in old.outputs.items():
            if value.dtype.kind != "f" or not value.size:
                continue
            scale = float(np.sqrt(np.mean(np.square(value)))) or 1.0
            errors.append(float(np.sqrt(np.mean(np.square(new.outputs[name] - value)))) / scale)
            if value.ndim > 1 and value.shape[-1] > 1:
                same.append(float((new.outputs[name].argmax(-1) == value.argmax(-1)).mean()))
        for stack, exits in old.scores.items():
            for measure in dict.fromkeys(name for found in exits.values() for name in found):
                places = [place for place, found in exits.items() if measure in found]
                pair = [[run.scores[stack][place][measure].reshape(-1) for place in places] for run in (old, new)]
                scores[stack, measure].append([np.stack(found, 1) for found in pair])
    figures = {ERROR: max(errors)}
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
