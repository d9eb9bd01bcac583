"""Beam search: several texts of each row side by side, each at a depth of its own."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from offramp.errors import ExecutionError
from offramp.runtime.generation.sampling import Chooser, log_probabilities
from offramp.runtime.generation.session import Session
from offramp.runtime.generation.tokens import Generated


@dataclass(frozen=True, slots=True)
class _Text:
    """Tokens of one beam with their exits; ``total`` is the sum of their log-probabilities, at the end the score."""

    tokens: tuple[int, ...] = ()
    exits: tuple[int, ...] = ()
    total: np.float32 = np.float32(0)  # noqa: RUF009 (immutable)


@dataclass
class _Row:
    """A row of the batch: its beams, in the order of their slots, and the best texts that have ended, with scores."""

    number: int
    prompt: list[int]
    beams: list[_Text] = field(default_factory=lambda: [_Text()])
    ended: list[_Text] = field(default_factory=list)


def search(session: Session) -> Generated:
    """The best text that has ended of each row, by the sum of log-probabilities over ``length ** length_penalty``.

    ``session`` has slots for all beams of each row, and its first slots hold the rows. What is kept, what counts as
    ended and when a row is done is as in transformers' beam search, in float32.
    """
    chooser = Chooser(session.sampling, session.plan.vocabulary)
    rows = [_Row(number, prompt.tolist()) for number, prompt in enumerate(session.prompts)]
    going = rows if session.sampling.max_new_tokens else []
    session.rows = list(range(len(session.prompts)))
    tokens: Sequence[NDArray[np.int64]] = session.prompts
    while going:
        left = session.step(tokens).rows
        sources: list[int] = []
        slot, after = 0, []
        for row in going:
            here = left[slot : slot + len(row.beams)]
            logits = np.stack([item.outputs[session.plan.output].reshape(-1) for item in here])
            parents = _advance(row, logits, [item.exits[session.plan.stacks[-1]] for item in here], session, chooser)
            sources += [slot + parent for parent in parents]
            after += [row] if parents else []
            slot += len(here)
        session.rearrange(sources)
        going, session.rows = after, sources
        tokens = [np.array([beam.tokens[-1]]) for row in going for beam in row.beams]
    best = [row.ended[0] if row.ended else _Text() for row in rows]
    return Generated(
        tuple(np.array(text.tokens, np.int64) for text in best),
        tuple(np.array(text.exits, np.int64) for text in best),
        tuple(float(text.total) for text in best),
    )


def _advance(
    row: _Row, logits: NDArray[np.float32], exits: Sequence[int], session: Session, chooser: Chooser
) -> list[int]:
    """Extend a row's beams by a token; returns which beam each new one comes from, none where the row is done.

    ``logits`` are [beams, vocabulary], ``exits`` where each was made.
    """
    beams, limit = session.sampling.beams, session.sampling.max_new_tokens
    length = len(row.beams[0].tokens) + 1
    power = np.float32(length**session.sampling.length_penalty)
    following: list[_Text] = []
    parents: list[int] = []
    for rank, (parent, token, total) in enumerate(_best(row, logits, chooser)):
        beam = row.beams[parent]
        text = _Text((*beam.tokens, token), (*beam.exits, exits[parent]), total)
        if length == limit or session.ends([*row.prompt, *text.tokens]):
            if rank < beams:  # what is worse is there only so that there are as many beams as before
                row.ended.append(_Text(text.tokens, text.exits, total / power))
        elif len(following) < beams:
            following.append(text)
            parents.append(parent)
    row.ended = sorted(row.ended, key=lambda text: -text.total)[:beams]
    if not following and not row.ended:
        raise ExecutionError(f"all tokens are banned in every beam of row {row.number}, as number {length}")
    if not following or _done(row, following[0].total, length, session):
        return []
    row.beams = following
    return parents


def _best(row: _Row, logits: NDArray[np.float32], chooser: Chooser) -> list[tuple[int, int, np.float32]]:
    """The likeliest beams with one more token, in order: which beam, which token, and the new total."""
    sampling = chooser.sampling
    texts = [np.array([*row.prompt, *beam.tokens], np.int64) for beam in row.beams]
    totals = chooser.allowed(log_probabilities(logits), texts, len(row.beams[0].tokens))
    totals = totals + np.array([beam.total for beam in row.beams], np.float32)[:, None]
    count = min(max(2, 1 + len(sampling.stop)) * sampling.beams, totals.size)
    order = np.argpartition(-totals, count - 1, axis=None)[:count]
    order = order[np.argsort(-totals.reshape(-1)[order], kind="stable")]
    places = [divmod(int(place), totals.shape[1]) for place in order]
    return [(beam, token, totals[beam, token]) for beam, token in places if np.isfinite(totals[beam, token])]


def _done(row: _Row, best: np.float32, length: int, session: Session) -> bool:
    """Whether the search is over for a row whose best beam has the total ``best``, by ``early_stopping``."""
    sampling = session.sampling
    if len(row.ended) < sampling.beams:
        return False
    if sampling.early_stopping is True:
        return True
    if sampling.early_stopping == "never" and sampling.length_penalty > 0:
        length = sampling.max_new_tokens or length
    return bool(best / np.float32(length**sampling.length_penalty) <= row.ended[-1].total)
