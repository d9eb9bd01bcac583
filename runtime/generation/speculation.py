"""Drafts from an exit that full depth checks: `Verify` while it generates.

A row that leaves early writes drafts; nobody hears of them before a token goes deep and takes all that wait along. The
positions that a piece of the stack has seen are a prefix, so forgetting drafts shortens it and nothing else.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from time import perf_counter
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from offramp.bundle.manifest import Exit
from offramp.errors import PolicyError
from offramp.runtime.generation.decision import Wanted
from offramp.runtime.generation.results import RowResult
from offramp.runtime.generation.sampling import Chooser
from offramp.runtime.generation.session import Session
from offramp.runtime.generation.tokens import Token
from offramp.runtime.policies.base import Policy, Rows, State
from offramp.runtime.policies.builtin import Each, Verify
from offramp.runtime.policies.stack_policy import StackPolicy
from offramp.runtime.result import Timing

Array = NDArray[Any]


def refuse(policy: Policy, why: str) -> None:
    """Raise PolicyError where a policy verifies drafts: ``why`` this cannot be done."""
    inside = policy.stacks.values() if isinstance(policy, Each) else (policy,)
    if any(isinstance(one, Verify) for one in inside):
        raise PolicyError(
            f"{why}: {policy!r} checks what it has generated", hint="offramp.ShallowDeep leaves there, unchecked"
        )


def in_last(policy: Policy, stack: str) -> tuple[Policy, Verify | None]:
    """The policy by stacks if it verifies, and what verifies in the last ``stack``; PolicyError if others do."""
    if isinstance(policy, Verify):
        policy = Each({stack: policy})
    if not isinstance(policy, Each):
        return policy, None
    refuse(Each({name: one for name, one in policy.stacks.items() if name != stack}), f"only {stack!r} makes tokens")
    last = policy.stacks.get(stack)
    return policy, last if isinstance(last, Verify) else None


@dataclass(frozen=True, slots=True)
class _Drafting(Policy):
    """What an exit is asked instead of `Verify`: rows that have drafts enough go deep."""

    policy: Verify
    full: Rows  # by place in the batch

    def measures(self, stack: str, exit_: Exit) -> tuple[str, ...] | None:
        return self.policy.measures(stack, exit_)

    def picks(self, stack: str, exit_: Exit) -> tuple[str, ...] | None:
        return None  # what checks drafts is the whole head

    def leave(self, state: State) -> Rows:
        leaving: Rows = self.policy.leave(state) & ~self.full[state.rows]
        return leaving


class _Draft(NamedTuple):
    token: int
    scores: Mapping[str, float]
    chances: Array | None


@dataclass(slots=True)
class _Text:
    """One row: its tokens, of which the first ``given`` are the prompt, its drafts, and what these took so far."""

    row: int
    tokens: list[int]
    given: int
    drafts: list[_Draft] = field(default_factory=list)
    milliseconds: float = 0.0
    trace: list[Timing] = field(default_factory=list)

    @property
    def all(self) -> list[int]:
        """Its tokens and drafts."""
        return [*self.tokens, *(draft.token for draft in self.drafts)]

    def draft(self, left: RowResult, output: str, chooser: Chooser) -> _Draft:
        """One more draft: what an exit picked, or from its logits, the output of that name."""
        if left.pick is not None:
            self.drafts.append(_Draft(left.pick, left.scores, None))
            return self.drafts[-1]
        before, emitted = self._before(len(self.drafts))
        logits = left.outputs[output].reshape(-1)
        if chooser.sampling.temperature == 0:
            made = _Draft(chooser.choose(self.row, before, logits, emitted), left.scores, None)
        else:
            chances = chooser.chances(before, logits, emitted)
            made = _Draft(chooser.draw(self.row, chances), left.scores, chances)
        self.drafts.append(made)
        return made

    def judged(self, logits: Array, chooser: Chooser) -> tuple[int, int | None]:
        """How many drafts full depth keeps, and its own next token, by its logits [tokens, vocabulary].

        Those start where the first draft was made; without one more than there are drafts it may have no next token.
        """
        for at, draft in enumerate(self.drafts):
            before, emitted = self._before(at)
            if draft.chances is None:
                token = chooser.choose(self.row, before, logits[at], emitted)
            else:
                true = chooser.chances(before, logits[at], emitted)
                token = chooser.accept(self.row, draft.token, draft.chances, true)
            if token != draft.token:
                return at, token
        count = len(self.drafts)
        if len(logits) == count:
            return count, None
        before, emitted = self._before(count)
        return count, chooser.choose(self.row, before, logits[-1], emitted)

    def released(
        self, kept: int, own: int | None, left: RowResult, early: Mapping[str, int], full: Mapping[str, int]
    ) -> list[Token]:
        """The records of the drafts that are kept and of full depth's own token, which become the text."""
        made = [(draft.token, early, draft.scores) for draft in self.drafts[:kept]]
        if own is not None:
            scores = self.drafts[kept].scores if kept < len(self.drafts) else left.scores
            made.append((own, full, scores))
        self.tokens += [token for token, _, _ in made]
        each = self.milliseconds / len(made)
        found = []
        for token, at, scores in made:
            (exit_,) = at.values()
            found.append(Token(self.row, token, exit_, {**left.exits, **at}, scores, each, 0, False, ()))
        found[-1] = found[-1]._replace(trace=tuple(self.trace))
        self.drafts, self.milliseconds, self.trace = [], 0.0, []
        return found

    def _before(self, drafts: int) -> tuple[NDArray[np.int64], int]:
        """The text with its first so many drafts, and how many tokens that has more than the prompt."""
        text = [*self.tokens, *(draft.token for draft in self.drafts[:drafts])]
        return np.array(text), len(text) - self.given


def verified(session: Session, policy: Verify) -> Iterator[Token]:
    """Generate until every row has ended; what is yielded, full depth has seen.

    Drafts that were kept have the exit and the scores that made them. Of the tokens that a row gets at once the last
    has the whole ``trace`` since the row's last ones, and ``caught_up``; ``milliseconds`` are shared out equally.
    """
    sampling, plan, decoder = session.sampling, session.plan, session.decoder
    name = plan.stacks[-1]
    stack = plan.manifest.stacks[name]
    first = next(at for at, span in enumerate(decoder.spans) if span.stack == name)
    chooser = Chooser(sampling, plan.vocabulary)
    limit = sampling.max_new_tokens
    assert limit is not None
    if limit == 0:
        return
    texts = [_Text(row, prompt.tolist(), prompt.size) for row, prompt in enumerate(session.prompts)]
    full = np.zeros(len(texts), np.bool_)
    drafting = {**session.policies, name: StackPolicy(_Drafting(policy, full), stack, decoder.store.slots)}
    tokens = session.prompts

    def picks(slot: int, token: int) -> bool:
        text = texts[session.rows[slot]]
        return chooser.takes(token, len(text.tokens) + len(text.drafts) - text.given)

    wanted = Wanted(_always, picks if chooser.batched else None, deep=False)
    while session.rows:
        started = perf_counter()
        ran = session.step(tokens, drafting, wanted)
        here = [texts[row] for row in session.rows]
        deep: dict[int, Array] = {}
        closing = []  # rows that no draft can follow: they are checked without a token that goes deep
        for slot, (item, text) in enumerate(zip(ran.rows, here, strict=True)):
            if item.exits[name] == stack.blocks:
                deep[slot] = (item.whole or item.outputs)[plan.output].reshape(-1, plan.vocabulary)
                continue
            text.draft(item, plan.output, chooser)
            if session.ends(text.all) or len(text.tokens) + len(text.drafts) - text.given == limit:
                closing.append(slot)
        for slot, outputs in decoder.flush(np.array(closing, np.int64), first, _always).items():
            deep[slot] = outputs[plan.output].reshape(-1, plan.vocabulary)
        caught_up = sum(len(here[slot].drafts) for slot in deep)
        judged = {slot: here[slot].judged(logits, chooser) for slot, logits in deep.items()}
        trace = ran.trace + decoder.runner.trace()
        spent = (perf_counter() - started) * 1e3
        for text in here:
            text.milliseconds += spent
            text.trace += trace
        records: list[Token] = []
        for slot, (kept, own) in judged.items():
            session.rollback(slot, len(here[slot].tokens) + kept)
            released = here[slot].released(kept, own, ran.rows[slot], {name: policy.after}, {name: stack.blocks})
            finished = session.ends(here[slot].tokens) or len(here[slot].tokens) - here[slot].given >= limit
            records += [*released[:-1], released[-1]._replace(caught_up=caught_up, finished=finished)]
        ended = [slot for slot, row in enumerate(session.rows) if any(r.finished for r in records if r.row == row)]
        yield from sorted(records, key=lambda record: record.row)
        session.drop(ended)
        here = [texts[row] for row in session.rows]
        tokens = [np.array([text.drafts[-1].token if text.drafts else text.tokens[-1]]) for text in here]
        for text in here:
            full[text.row] = len(text.drafts) >= policy.drafts


def _always() -> bool:
    return True
