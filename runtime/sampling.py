"""How the next token is chosen from logits: greedy or drawn, with limits, each row of a batch by itself."""

from __future__ import annotations

import math
import secrets
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from offramp.runtime.errors import ExecutionError, InputError

LogitProcessor: TypeAlias = Callable[[NDArray[np.int64], NDArray[np.float32]], NDArray[np.float32]]
"""``(tokens, logits) -> logits``: prompt and emitted tokens so far, int64 [n]; logits float32 [vocabulary], its own
copy. Minus infinity bans a token."""


@dataclass(frozen=True, slots=True)
class Sampling:
    """How tokens are chosen, in this order: ``processors``, bans, ``temperature``, ``top_k``, ``top_p``.

    Attributes:
        temperature: Divides the logits; 0 is greedy: the highest logit, the first of equals.
        top_k: Draw from the k highest logits only (and whatever equals the k-th); greedy takes no notice.
        top_p: Draw from the smallest set of tokens whose probabilities reach it (nucleus sampling, arXiv
            1904.09751, 3.1); greedy takes no notice.
        seed: The same seed draws the same tokens for the same row of a batch; None draws others each time.
        stop: The token ids that end a row.
        suppress: Token ids that are never chosen.
        suppress_first: Token ids that are not chosen as a row's first.
        min_new_tokens: How many tokens a row has before ``stop`` may be chosen.
        max_new_tokens: How many tokens a row has at most; None leaves it to the room in the cache.
        processors: Functions that change the logits first, one after the other.

    Raises:
        InputError: values that make no sense. All problems are in one message.
    """

    temperature: float = 0.0
    top_k: int | None = None
    top_p: float | None = None
    seed: int | None = None
    stop: tuple[int, ...] = ()
    suppress: tuple[int, ...] = ()
    suppress_first: tuple[int, ...] = ()
    min_new_tokens: int = 0
    max_new_tokens: int | None = None
    processors: tuple[LogitProcessor, ...] = ()

    def __post_init__(self) -> None:
        problems = list(self._problems())
        if problems:
            raise InputError("\n  ".join(problems))

    def _problems(self) -> Iterator[str]:
        if not 0 <= self.temperature < math.inf:
            yield f"temperature is {self.temperature}, expected 0 (greedy) or a positive number"
        if self.top_p is not None and not 0 < self.top_p <= 1:
            yield f"top_p is {self.top_p}, expected more than 0 and at most 1"
        for name, least in (("top_k", 1), ("seed", 0), ("min_new_tokens", 0), ("max_new_tokens", 0)):
            value = getattr(self, name)
            if value is not None and value < least:
                yield f"{name} is {value}, expected at least {least}"
        for name in ("stop", "suppress", "suppress_first"):
            ids = getattr(self, name)
            if not isinstance(ids, tuple) or any(id_ < 0 for id_ in ids):
                yield f"{name} is {ids!r}, expected a tuple of token ids, which are at least 0"
        if not isinstance(self.processors, tuple):
            yield f"processors is {self.processors!r}, expected a tuple of functions"
        if self.max_new_tokens is not None and self.min_new_tokens > self.max_new_tokens >= 0:
            yield f"min_new_tokens is {self.min_new_tokens}, more than max_new_tokens, {self.max_new_tokens}"


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
        self.batched = sampling.temperature == 0 and not sampling.processors  # whether `choose_all` serves
        lists = {"stop": sampling.stop, "suppress": sampling.suppress, "suppress_first": sampling.suppress_first}
        outside = {name: max(ids) for name, ids in lists.items() if max(ids, default=0) >= vocabulary}
        if outside:
            problems = [f"{name} has {id_}; token ids end at {vocabulary - 1}" for name, id_ in outside.items()]
            raise InputError("\n  ".join(problems))
        bans = (sampling.suppress, sampling.suppress_first, sampling.stop if sampling.min_new_tokens else ())
        if len({id_ for ids in bans for id_ in ids}) == vocabulary:
            raise InputError(f"all {vocabulary} tokens are banned as a row's first")
        below = (math.inf, 1, sampling.min_new_tokens)
        self._bans = [(np.unique(np.array(ids)), count) for ids, count in zip(bans, below, strict=True) if ids]

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
        _check(logits.max(keepdims=True))
        for processor in self.sampling.processors:
            logits = self._processed(processor, tokens, logits)
        logits = self._allowed(logits[None], np.array([emitted]))[0]
        best = int(logits.argmax())
        _check(logits[best : best + 1])
        return best if self.sampling.temperature == 0 else self._drawn(row, *self._weights(logits))

    def choose_all(self, logits: NDArray[np.float32], emitted: NDArray[np.int64]) -> NDArray[np.int64]:
        """As `choose` for a whole batch, where the choice is ``batched``: [batch, vocabulary], [batch] -> [batch]."""
        if not self.batched:
            raise InputError("choose_all is greedy and knows no processors", hint="choose, row by row")
        _shaped(logits, emitted.size, self._vocabulary)
        logits = self._allowed(logits, emitted)
        chosen: NDArray[np.int64] = logits.argmax(-1)
        _check(logits[np.arange(emitted.size), chosen])
        return chosen

    def takes(self, token: int, emitted: int) -> bool:
        """Whether a row that has emitted so many tokens may go on with this one, by the bans."""
        return not any(emitted < below and token in ids for ids, below in self._bans)

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
        _check(logits.max(-1))
        rows = []
        for tokens, row in zip(texts, logits, strict=True):
            for processor in self.sampling.processors:
                row = self._processed(processor, tokens, row)
            rows.append(row)
        return self._allowed(np.stack(rows), np.full(len(rows), emitted))

    def _processed(
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

    def _allowed(self, logits: NDArray[np.float32], emitted: NDArray[np.int64]) -> NDArray[np.float32]:
        """Logits [batch, vocabulary] with minus infinity for what a row may not emit now."""
        now = [(ids, rows) for ids, below in self._bans if (rows := emitted < below).any()]
        logits = logits.copy() if now else logits
        for ids, rows in now:
            logits[np.ix_(rows, ids)] = -np.inf
        return logits

    def _weights(self, logits: NDArray[np.float32]) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
        """The tokens that may be drawn, and in which proportion."""
        top_k, top_p = self.sampling.top_k, self.sampling.top_p
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
        return ids, weights

    def _generator(self, row: int) -> np.random.Generator:
        if row not in self._generators:
            sequence = np.random.SeedSequence(self._seed, spawn_key=(row,))
            self._generators[row] = np.random.default_rng(sequence)
        return self._generators[row]

    def _drawn(self, row: int, ids: NDArray[np.int64], weights: NDArray[np.float64]) -> int:
        reached = np.cumsum(weights)
        return int(ids[np.searchsorted(reached, self._generator(row).random() * reached[-1], side="right")])


def log_probabilities(logits: NDArray[np.float32]) -> NDArray[np.float32]:
    """The logarithm of softmax over the last axis, same shape; minus infinity stays, one logit has to be finite."""
    shifted = logits - logits.max(-1, keepdims=True)
    total = np.exp(shifted).sum(-1, keepdims=True, dtype=np.float64)
    found: NDArray[np.float32] = (shifted - np.log(total)).astype(np.float32)
    return found


def _shaped(logits: NDArray[np.float32], *shape: int) -> None:
    if logits.shape != shape:
        raise ExecutionError(f"the logits have the shape {list(logits.shape)}, expected {list(shape)}")


def _check(best: NDArray[np.float32]) -> None:
    """The highest logit of each row, a NaN where there is one."""
    if not np.isfinite(best).all():
        raise ExecutionError("the model's logits are NaN or infinite, or minus infinity for all that is not banned")
