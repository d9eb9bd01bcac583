"""Tells a policy what full depth says of tokens that left early."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from offramp.runtime.generation.decoder import Decoder
from offramp.runtime.generation.results import RowResult
from offramp.runtime.policies.base import Agreement, Policy


class _Said(NamedTuple):
    after: int
    scores: Mapping[str, float]
    token: int


class Feedback:
    """What exits said of the tokens that wait, by slot, until full depth has its say.

    Compared are the likeliest tokens, whatever was drawn or banned: so the model is judged, not the way of choosing.
    """

    def __init__(self, policy: Policy, decoder: Decoder, stack: str, output: str) -> None:
        self._policy, self._decoder, self._stack, self._output = policy, decoder, stack, output
        spans = [at for at, span in enumerate(decoder.spans) if span.stack == stack]
        self._first, self._last = spans[0], spans[-1]
        self._full = decoder.manifest.stacks[stack].blocks
        self._waiting: list[list[list[_Said]]] = [[] for _ in range(decoder.store.slots)]

    def wants(self) -> bool:
        """Whether the policy wants to know of the tokens that go deep now."""
        return self._policy.compares(self._stack)

    def see(self, left: Sequence[RowResult], counts: Sequence[int]) -> None:
        """Note what exits said in a step that had so many new tokens of each row, and tell of what was caught up."""
        known: dict[int, list[tuple[_Said, bool]]] = {}
        for item, count in zip(left, counts, strict=True):
            waiting = self._waiting[item.slot]
            if count > 1:
                waiting += [[] for _ in range(count - 1)]
            waiting += map(self._said, (*item.before, item))
            deep = item.deep
            if item.whole is not None:
                deep = self._best(item.whole[self._output]).tolist()
            if deep:
                for said, token in zip(waiting[-len(deep) :], deep, strict=True):
                    for one in said:
                        known.setdefault(one.after, []).append((one, one.token == token))
            del waiting[: len(waiting) - self._lacking(item.slot)]
        for after, found in known.items():
            scores = {name: np.array([s.scores[name] for s, _ in found], np.float32) for name in found[0][0].scores}
            self._policy.observe(Agreement(self._stack, after, scores, np.array([same for _, same in found])))

    def rollback(self, slot: int) -> None:
        """Forget what exits said of tokens that the decoder has forgotten."""
        del self._waiting[slot][self._lacking(slot) :]

    def _lacking(self, slot: int) -> int:
        """How many tokens of a row wait for full depth."""
        seen = self._decoder.seen[:, slot]
        return int(seen[self._first] - seen[self._last])

    def rearrange(self, sources: Sequence[int]) -> None:
        """Slot ``i`` gets what slot ``sources[i]`` had."""
        self._waiting[: len(sources)] = [list(self._waiting[source]) for source in sources]

    def _said(self, item: RowResult) -> list[_Said]:
        """What exits said of a row's new token; nothing of those that neither picked one nor made their outputs."""
        exit_, found = item.exits[self._stack], []
        for after, asked in item.asked.items():
            if after == self._full:
                continue
            outputs = item.outputs if after == exit_ else asked.outputs
            if asked.pick is not None:
                found.append(_Said(after, asked.scores, asked.pick))
            elif outputs is not None:
                found.append(_Said(after, asked.scores, int(self._best(outputs[self._output])[-1])))
        return found

    def _best(self, logits: NDArray[Any]) -> NDArray[np.int64]:
        best: NDArray[np.int64] = logits.reshape(-1, logits.shape[-1]).argmax(-1)
        return best
