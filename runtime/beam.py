"""Beam search: several texts of each row side by side, each at a depth of its own."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from offramp.runtime.feed import Prompts, Run
from offramp.runtime.generate import Generated
from offramp.runtime.sampling import Chooser, log_probabilities


@dataclass(frozen=True, slots=True)
class _Text:
    """Tokens of one beam with their exits, and the sum of their log-probabilities."""

    tokens: tuple[int, ...] = ()
    exits: tuple[int, ...] = ()
    total: float = 0.0

    def score(self, length_penalty: float) -> float:
        return float(self.total / max(1, len(self.tokens)) ** length_penalty)


@dataclass
class _Row:
    """A row of the batch: its beams, in the order of their slots, and the texts that have ended."""

    number: int
    beams: list[_Text]
    ended: list[_Text] = field(default_factory=list)


def search(run: Run, prompts: Prompts, beams: int, length_penalty: float) -> Generated:
    """The best text of each row by the sum of log-probabilities over ``length ** length_penalty``.

    ``run`` has ``beams`` slots for each row, and its first slots hold the rows. A row ends when as many texts as it
    has beams have ended, and none of its beams can still beat the worst of them.
    """
    sampling, plan = run.sampling, run.plan
    chooser = Chooser(sampling, plan.vocabulary)
    limit = sampling.max_new_tokens
    assert limit is not None
    rows = [_Row(number, [_Text()]) for number in range(len(prompts))]
    done: list[_Row] = [] if limit else list(rows)
    run.rows = list(range(len(prompts)))
    tokens: Sequence[NDArray[np.int64]] = prompts
    askers = run.first
    while len(done) < len(prompts):
        left = run.feed(tokens, askers)
        sources: list[int] = []
        slot, going = 0, []
        for row in rows:
            here = left[slot : slot + len(row.beams)]
            logits = np.stack([item.outputs[plan.output].reshape(-1) for item in here])
            taken = [item.exits[plan.stacks[-1]] for item in here]
            parents = _advance(row, prompts[row.number], logits, taken, chooser, beams, limit, length_penalty)
            if parents:
                sources += [slot + parent for parent in parents]
                going.append(row)
            else:
                done.append(row)
            slot += len(here)
        run.rearrange(sources)
        rows, run.rows = going, sources
        tokens = [np.array([beam.tokens[-1]]) for row in rows for beam in row.beams]
        askers = run.askers
    best = [max(row.ended or row.beams, key=lambda text: text.score(length_penalty)) for row in _ordered(done)]
    return Generated(
        tuple(np.array(text.tokens, np.int64) for text in best),
        tuple(np.array(text.exits, np.int64) for text in best),
        tuple(text.score(length_penalty) for text in best),
    )


def _advance(
    row: _Row,
    prompt: NDArray[np.int64],
    logits: NDArray[np.float32],
    exits: Sequence[int],
    chooser: Chooser,
    beams: int,
    limit: int,
    length_penalty: float,
) -> list[int]:
    """Extend a row's beams by a token; returns which beam each new one comes from, none where the row has ended."""
    stop = chooser.sampling.stop
    emitted = len(row.beams[0].tokens)
    texts = [np.concatenate([prompt, np.array(beam.tokens, np.int64)]) for beam in row.beams]
    totals = log_probabilities(chooser.allowed(logits, texts, emitted))
    totals += np.array([beam.total for beam in row.beams], np.float32)[:, None]
    count = min(2 * beams, totals.size)
    order = np.argpartition(-totals, count - 1, axis=None)[:count]
    order = order[np.argsort(-totals.reshape(-1)[order], kind="stable")]
    parents: list[int] = []
    following: list[_Text] = []
    for place in order:
        parent, token = divmod(int(place), totals.shape[1])
        total = float(totals[parent, token])
        if not np.isfinite(total):
            continue
        beam = row.beams[parent]
        text = _Text((*beam.tokens, token), (*beam.exits, exits[parent]), total)
        if token in stop:
            row.ended = _best([*row.ended, text], beams, length_penalty)
        elif len(following) < beams:
            following.append(text)
            parents.append(parent)
    if emitted + 1 == limit:
        row.ended = _best([*row.ended, *following], beams, length_penalty)
        return []
    if not following:
        return []
    full = len(row.ended) == beams
    if full and max(text.score(length_penalty) for text in following) <= min(
        t.score(length_penalty) for t in row.ended
    ):
        return []
    row.beams = following
    return parents


def _best(texts: Sequence[_Text], count: int, length_penalty: float) -> list[_Text]:
    return sorted(texts, key=lambda text: -text.score(length_penalty))[:count]


def _ordered(rows: Sequence[_Row]) -> list[_Row]:
    return sorted(rows, key=lambda row: row.number)
