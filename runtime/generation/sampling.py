"""How the next token is chosen from logits: greedy or drawn, with limits, each row of a batch by itself."""

from __future__ import annotations

import math
import secrets
from collections.abc import Collection, Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from offramp.bundle.options import LogitProcessor, Sampling, token_lists
from offramp.errors import ExecutionError, InputError
from offramp.runtime.generation.processors import completing, penalised, repeating

__all__ = ["Chooser", "LogitProcessor", "Sampling", "log_probabilities"]


class _Ban(NamedTuple):
    """Token ids that a row cannot emit which has emitted ``start`` tokens or more, but less than ``end``."""

    ids: NDArray[np.int64]
    start: float = 0
    end: float = math.inf


class Chooser:
    """Chooses tokens for the rows of one run, and keeps their random generators; a run has a chooser of its own.

    Args:
        sampling: how to choose.
        vocabulary: how many logits there are.

    Raises:
        InputError: token ids that the vocabulary does not have, or nothing left to choose from.
    """

    def __init__(self, sampling: Sampling, vocabulary: int) -> None:
        self.sampling, self._vocabulary = sampling, vocabulary
        self._seed = secrets.randbits(64) if sampling.seed is None else sampling.seed
        self._generators: dict[int, np.random.Generator] = {}
        outside = {name: max(ids) for name, ids in token_lists(sampling).items() if max(ids, default=0) >= vocabulary}
        if outside:
            problems = [f"{name} has {id_}; token ids end at {vocabulary - 1}" for name, id_ in outside.items()]
            raise InputError("\n  ".join(problems))
        self._words = [word for word in sampling.bad_words if len(word) > 1]
        single = {word[0] for word in sampling.bad_words if len(word) == 1} - set(sampling.stop)
        first = int(sampling.forced_first is not None)
        self._early = _bans((single, 0, math.inf), (sampling.stop, 0, sampling.min_new_tokens))
        self._late = _bans((sampling.suppress, 0, math.inf), (sampling.suppress_first, first, first + 1))
        banned = [ban.ids for ban in (*self._early, *self._late) if ban.start == 0]
        if not self._forced(0) and banned and np.unique(np.concatenate(banned)).size == vocabulary:
            raise InputError(f"all {vocabulary} tokens are banned as a row's first")
        self._reads = bool(sampling.processors or self._words or sampling.no_repeat_ngram_size)  # the text so far
        self._reads |= sampling.repetition_penalty != 1
        self.batched = sampling.temperature == 0 and not self._reads  # whether `choose_all` serves

    def choose(self, row: int, tokens: NDArray[np.int64], logits: NDArray[np.float32], emitted: int) -> int:
        """The next token of a row; what other rows there are does not matter.

        Args:
            row: the row's place in the user's batch, which stays the same while other rows end.
            tokens: prompt and emitted tokens so far, int64 [n].
            logits: float32 [vocabulary]; not changed.
            emitted: how many tokens the row has emitted.

        Raises:
            InputError: a processor returns something else than logits that leave a choice.
            ExecutionError: the model's logits have the wrong shape, or leave no choice.
        """
        _shaped(logits, self._vocabulary)
        check_best(logits.max(keepdims=True))
        logits = self._allowed(self._processed(tokens, logits)[None], np.array([emitted]))[0]
        best = int(logits.argmax())
        check_best(logits[best : best + 1])
        return best if self.sampling.temperature == 0 else self._drawn(row, *self._weights(logits))

    def choose_all(self, logits: NDArray[np.float32], emitted: NDArray[np.int64]) -> NDArray[np.int64]:
        """As `choose` for a whole batch, where the choice is ``batched``: [batch, vocabulary], [batch] -> [batch]."""
        if not self.batched:
            raise InputError("choose_all is greedy and does not look at texts", hint="choose, row by row")
        _shaped(logits, emitted.size, self._vocabulary)
        logits = self._allowed(logits, emitted)
        chosen: NDArray[np.int64] = logits.argmax(-1)
        check_best(logits[np.arange(emitted.size), chosen])
        return chosen

    def takes(self, token: int, emitted: int) -> bool:
        """Whether a row that has emitted so many tokens may go on with this one, by the bans."""
        forced = self._forced(emitted)
        if forced and token != min(forced):
            return False
        bans = self._late if forced else (*self._early, *self._late)
        return not any(ban.start <= emitted < ban.end and token in ban.ids for ban in bans)

    @property
    def settled(self) -> int:
        """After how many tokens of a row the same ones are banned at all places."""
        places = [place for ban in (*self._early, *self._late) for place in (ban.start, ban.end) if place < math.inf]
        return int(max([*places, int(self.sampling.forced_first is not None)]))

    def free(self, ends: Collection[int]) -> NDArray[np.bool_] | None:
        """Which tokens, bool [vocabulary], a settled row goes on with, where ``ends`` end it; None: it depends."""
        if not self.batched or self.sampling.forced_last:
            return None
        found = np.ones(self._vocabulary, np.bool_)
        bans = [ban.ids.tolist() for ban in (*self._early, *self._late) if ban.end == math.inf]
        found[[*ends, *(token for ids in bans for token in ids)]] = False
        return found

    def chances(self, tokens: NDArray[np.int64], logits: NDArray[np.float32], emitted: int) -> NDArray[np.float64]:
        """The probabilities, float64 [vocabulary], that `choose` would draw from; arguments and errors as there."""
        ids, weights = self._weights(self.allowed(logits[None], [tokens], emitted)[0])
        found = np.zeros(self._vocabulary)
        found[ids] = weights / weights.sum()
        return found

    def draw(self, row: int, chances: NDArray[np.float64]) -> int:
        """A token of a row, drawn in proportion to ``chances`` [vocabulary]."""
        ids = np.flatnonzero(chances)
        return self._drawn(row, ids, chances[ids])

    def accept(self, row: int, token: int, draft: NDArray[np.float64], true: NDArray[np.float64]) -> int:
        """A token of the distribution ``true``, made of one that was drawn from ``draft``: it itself, if possible.

        Speculative sampling (arXiv 2211.17192, sec. 2.3): the token stays with probability ``true / draft``; else one
        is drawn in proportion to what ``true`` exceeds ``draft`` by.
        """
        if self._generator(row).random() * draft[token] < true[token]:
            return token
        rest = np.maximum(true - draft, 0.0)
        return self.draw(row, rest if rest.any() else true)

    def allowed(
        self, logits: NDArray[np.float32], texts: Sequence[NDArray[np.int64]], emitted: int
    ) -> NDArray[np.float32]:
        """Logits [texts, vocabulary] after processors and bans, for texts that have all emitted as many tokens."""
        _shaped(logits, len(texts), self._vocabulary)
        check_best(logits.max(-1))
        rows = [self._processed(tokens, row) for tokens, row in zip(texts, logits, strict=True)]
        return self._allowed(np.stack(rows), np.full(len(rows), emitted))

    def _processed(self, tokens: NDArray[np.int64], logits: NDArray[np.float32]) -> NDArray[np.float32]:
        """Logits [vocabulary] after all that looks at the text."""
        if not self._reads:
            return logits
        sampling = self.sampling
        if sampling.repetition_penalty != 1:
            logits = penalised(tokens, logits, sampling.repetition_penalty)
        for processor in sampling.processors:
            logits = self._called(processor, tokens, logits)
        banned = repeating(tokens, sampling.no_repeat_ngram_size) + completing(tokens, self._words)
        if banned := [token for token in banned if token < self._vocabulary]:
            logits = logits.copy()
            logits[banned] = -np.inf
        return logits

    def _called(
        self, processor: LogitProcessor, tokens: NDArray[np.int64], logits: NDArray[np.float32]
    ) -> NDArray[np.float32]:
        found: Any = processor(tokens, logits.copy())
        name = getattr(processor, "__name__", repr(processor))
        if not isinstance(found, np.ndarray) or found.dtype.kind != "f" or found.shape != logits.shape:
            shown = f"{found.dtype} {list(found.shape)}" if isinstance(found, np.ndarray) else repr(found)
            raise InputError(f"the processor {name} returned {shown}, expected float32 [{self._vocabulary}]")
        if not np.isfinite(found.max()):  # of NaN and anything, the maximum is NaN
            raise InputError(f"the processor {name} returned NaN or infinity, or banned every token")
        return found.astype(np.float32, copy=False)

    def _forced(self, emitted: int) -> tuple[int, ...]:
        """The tokens of which a row has to emit one now; none where it is free."""
        sampling = self.sampling
        if sampling.forced_last and sampling.max_new_tokens is not None and emitted == sampling.max_new_tokens - 1:
            return sampling.forced_last
        return (sampling.forced_first,) if sampling.forced_first is not None and emitted == 0 else ()

    def _allowed(self, logits: NDArray[np.float32], emitted: NDArray[np.int64]) -> NDArray[np.float32]:
        """Logits [batch, vocabulary] with minus infinity for what a row may not emit now, 0 for what it has to."""
        found = _without(logits, self._early, emitted)
        for row, count in enumerate(emitted.tolist()):
            if forced := self._forced(count):
                found = found.copy() if found is logits else found
                found[row] = -np.inf
                found[row, list(forced)] = 0
        return _without(found, self._late, emitted)

    def _weights(self, logits: NDArray[np.float32]) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
        """The tokens that may be drawn, and in which proportion."""
        top_k, top_p, min_p = self.sampling.top_k, self.sampling.top_p, self.sampling.min_p
        ids = np.flatnonzero(logits > -np.inf)
        if top_k is not None and top_k < ids.size:
            ids = np.flatnonzero(logits >= np.partition(logits, -top_k)[-top_k])
        with np.errstate(over="ignore"):  # a low temperature makes minus infinity of what is far from the best
            weights = np.exp((logits[ids] - logits.max()).astype(np.float64) / self.sampling.temperature)
        if top_p is not None and top_p < 1:
            total = weights.sum()
            # What is less likely than (1 - p) / n is less than 1 - p in all: no need to sort it.
            likely = np.flatnonzero(weights >= (1 - top_p) * total / weights.size)
            order = likely[np.argsort(-weights[likely], kind="stable")]
            order = order[: int(np.searchsorted(np.cumsum(weights[order]), top_p * total)) + 1]
            ids, weights = ids[order], weights[order]
        if min_p:
            likely = np.flatnonzero(weights >= min_p * weights.max())
            ids, weights = ids[likely], weights[likely]
        return ids, weights

    def _generator(self, row: int) -> np.random.Generator:
        if row not in self._generators:
            sequence = np.random.SeedSequence(self._seed, spawn_key=(row,))
            self._generators[row] = np.random.default_rng(sequence)
        return self._generators[row]

    def _drawn(self, row: int, ids: NDArray[np.int64], weights: NDArray[np.float64]) -> int:
        reached = np.cumsum(weights)
        return int(ids[np.searchsorted(reached, self._generator(row).random() * reached[-1], side="right")])


def _bans(*rules: tuple[Collection[int], float, float]) -> list[_Ban]:
    return [_Ban(np.unique(np.array([*ids])), start, end) for ids, start, end in rules if ids and start < end]


def _without(logits: NDArray[np.float32], bans: Sequence[_Ban], emitted: NDArray[np.int64]) -> NDArray[np.float32]:
    """Logits [batch, vocabulary] with minus infinity for what is banned; the same array where nothing is."""
    now = [(ban.ids, rows) for ban in bans if (rows := (ban.start <= emitted) & (emitted < ban.end)).any()]
    logits = logits.copy() if now else logits
    for ids, rows in now:
        logits[np.ix_(rows, ids)] = -np.inf
    return logits


def log_probabilities(logits: NDArray[np.float32]) -> NDArray[np.float32]:
    """The logarithm of softmax over the last axis, same shape; minus infinity stays, one logit has to be finite."""
    shifted = logits - logits.max(-1, keepdims=True)
    total = np.exp(shifted).sum(-1, keepdims=True, dtype=np.float64)
    found: NDArray[np.float32] = (shifted - np.log(total)).astype(np.float32)
    return found


def _shaped(logits: NDArray[np.float32], *shape: int) -> None:
    if logits.shape != shape:
        raise ExecutionError(f"the logits have the shape {list(logits.shape)}, expected {list(shape)}")


def check_best(best: NDArray[np.float32]) -> None:
    """Raise where the highest logit of a row, NaN where there is one among them, is no number."""
    if not np.isfinite(best).all():
        raise ExecutionError("the model's logits are NaN or infinite, or minus infinity for all that is not banned")
