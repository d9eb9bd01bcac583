"""Generation: prompts in, tokens out one by one, each at a depth of its own."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from time import perf_counter
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from offramp.runtime.generation.sampling import Chooser
from offramp.runtime.generation.session import Prompts, Run
from offramp.runtime.result import Timing


class Token(NamedTuple):
    """One token of one row.

    Attributes:
        row: The row's place in the batch.
        token: Its id.
        exit: After how many blocks of the last stack it was made.
        exits: The same for every stack that runs for each token.
        scores: What the last exit that was asked scored, by measure.
        milliseconds: Wall time of the step, which all rows share.
        caught_up: How many tokens that had left early were computed deeper in this step, over all rows.
        finished: Whether the row ends with it.
        trace: The segments of the step.
    """

    row: int
    token: int
    exit: int
    exits: Mapping[str, int]
    scores: Mapping[str, float]
    milliseconds: float
    caught_up: int
    finished: bool
    trace: tuple[Timing, ...]


@dataclass(frozen=True, slots=True)
class Generated:
    """What `Chain.generate` returns, by row: new token ids int64 [n], and after how many blocks each was made."""

    tokens: tuple[NDArray[np.int64], ...]
    exits: tuple[NDArray[np.int64], ...]
    scores: tuple[float, ...] = ()


def stream(run: Run, prompts: Prompts) -> Iterator[Token]:
    """Generate token by token until every row has ended."""
    sampling, plan = run.sampling, run.plan
    chooser = Chooser(sampling, plan.vocabulary)
    limit = sampling.max_new_tokens
    assert limit is not None
    if limit == 0:
        return
    texts = [list(map(int, prompt)) for prompt in prompts]
    lengths = [len(text) for text in texts]
    tokens: list[NDArray[np.int64]] = list(prompts)
    askers = run.first

    def picks(slot: int, token: int) -> bool:
        row = run.rows[slot]
        return chooser.takes(token, len(texts[row]) - lengths[row])

    while run.rows:
        started = perf_counter()
        run.decoder.launcher.trace = []
        left = run.feed(tokens, askers, picks=picks if chooser.batched else None)
        chosen = [-1 if item.pick is None else item.pick for item in left]
        if open_ := [slot for slot, item in enumerate(left) if item.pick is None]:
            rows = [run.rows[slot] for slot in open_]
            logits = _rows([left[slot].outputs[plan.output].reshape(-1) for slot in open_])
            emitted = [len(texts[row]) - lengths[row] for row in rows]
            if chooser.batched:
                made = chooser.choose_all(logits, np.array(emitted)).tolist()
            else:
                told = zip(rows, logits, emitted, strict=True)
                made = [chooser.choose(row, np.array(texts[row]), own, count) for row, own, count in told]
            for slot, token in zip(open_, made, strict=True):
                chosen[slot] = token
        milliseconds = (perf_counter() - started) * 1e3
        trace = tuple(run.decoder.launcher.trace)
        caught_up = sum(run.decoder.taken.values())
        ended = []
        records = []
        for slot, (item, token) in enumerate(zip(left, chosen, strict=True)):
            row = run.rows[slot]
            texts[row].append(token)
            finished = run.ends(texts[row]) or len(texts[row]) - lengths[row] >= limit
            if finished:
                ended.append(slot)
            exit_ = item.exits[plan.stacks[-1]]
            records.append(Token(row, token, exit_, item.exits, item.scores, milliseconds, caught_up, finished, trace))
        yield from records if len(records) == 1 else sorted(records, key=lambda record: record.row)
        run.drop(ended)
        tokens = [np.array([texts[row][-1]]) for row in run.rows]
        askers = run.askers


def _rows(arrays: Sequence[NDArray[Any]]) -> NDArray[Any]:
    """Arrays of one shape as rows of one; no copy where there is one."""
    return arrays[0][None] if len(arrays) == 1 else np.stack(arrays)
