"""Generation step by step: tokens in, the next ones out, and back again."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from time import perf_counter
from typing import Any

import numpy as np
from numpy.typing import NDArray

from offramp.errors import ExecutionError, InputError
from offramp.runtime.generation.batching import Array
from offramp.runtime.generation.decision import Wanted
from offramp.runtime.generation.multistep import MOST
from offramp.runtime.generation.results import StepResult
from offramp.runtime.generation.sampling import Chooser, check_best
from offramp.runtime.generation.session import Session
from offramp.runtime.generation.tokens import Token
from offramp.runtime.result import Timing


class Generator:
    """A generation by hand: take the `next` tokens, `append` others, `rewind`; `Chain.generator` makes one.

    What was appended is run when something is asked of it. A row whose one new token is run leaves where the policy
    says so; several new tokens of a row, a prompt's, go to full depth. Nothing is shared with other generations.
    """

    def __init__(self, session: Session, *, all_taken: bool = False) -> None:
        self._session = session
        self._chooser = Chooser(session.sampling, session.plan.vocabulary)
        self._texts = [prompt.tolist() for prompt in session.prompts]
        self._given = [len(text) for text in self._texts]
        self._run = [0] * len(self._texts)
        self._ran = deque[StepResult]()  # of the last forward, for each token of it that is still to be chosen
        self._several = False  # whether those are of tokens that have followed by themselves
        self._each = 0.0  # milliseconds that each of those took
        self._ended: list[int] = []  # slots, which are emptied before the next step
        several = all_taken or not session.policy.observes  # which cannot forget tokens that are not taken
        self._most = MOST if several and len(session.rows) == 1 else 1
        if self._most > 1:
            session.freely(self._chooser)
        if session.sampling.max_new_tokens == 0:
            session.drop(list(range(len(session.rows))))

    @property
    def rows(self) -> list[int]:
        """The rows that have not ended, in the order in which their tokens are taken and given."""
        return sorted(row for slot, row in enumerate(self._session.rows) if slot not in self._ended)

    @property
    def exits(self) -> Mapping[str, NDArray[np.int64]]:
        """After how many blocks each row left the stacks that run once (an encoder), int64 [rows]."""
        return self._session.exits

    @property
    def scores(self) -> Mapping[str, Mapping[int, Mapping[str, NDArray[Any]]]]:
        """What their exits scored that were asked, by stack, ``after`` and measure, as in `Result`."""
        return self._session.scores

    @property
    def trace(self) -> tuple[Timing, ...]:
        """The segments that ran once, before the first token."""
        return self._session.trace

    def tokens(self, row: int) -> NDArray[np.int64]:
        """All token ids of a row so far, its prompt included, int64 [n]."""
        return np.array(self._texts[row], np.int64)

    def append(self, tokens: Sequence[Sequence[int]]) -> None:
        """Put token ids behind the texts of `rows`, whatever the model would have chosen.

        Raises:
            InputError: there are more or fewer rows, an empty one, or ids that the model does not know; or, behind a
                `rewind` into a prompt that is more than its tokens (an image among them), others than it had there.
        """
        self._settle()
        plan, rows = self._session.plan, self.rows
        found = plan.known(plan.rows_of_ids(tokens))
        if len(found) != len(rows) or any(row.size == 0 for row in found):
            raise InputError(f"tokens for {len(found)} rows; there are {len(rows)}, and each needs at least one")
        for row, new in zip(rows, found, strict=True):
            self._session.check_prompt(row, len(self._texts[row]), new)
        if self._ran and self._several:
            self._again()
        for row, new in zip(rows, found, strict=True):
            self._texts[row] += new.tolist()
        self._ran.clear()

    def logits(self) -> NDArray[Any]:
        """Of the token that follows each of `rows`, as the exit where it left has them: float [rows, vocabulary].

        Raises:
            InputError: every row has ended.
            ExecutionError: ONNX Runtime failed in a segment, or they are NaN or infinite: the generation has ended.
        """
        self._settle()
        if not self.rows:
            raise InputError("every row has ended")
        if self._ran and any(item.pick is not None for item in self._ran[0].rows):
            self._again()  # an exit has picked the token without any: the last one runs once more
        self._several, self._each = False, 0.0
        with self._ended_by_failure():
            if not self._ran:
                self._ran.extend(self._forward(Wanted()))
            outputs = {self._session.rows[item.slot]: item.outputs for item in self._ran[0].rows}
            found = np.stack([outputs[row][self._session.plan.output].reshape(-1) for row in self.rows])
            check_best(found.max(-1))
        return found

    def next(self) -> list[Token]:
        """Choose the next token of each of `rows`, and append it; a row that ends with it is there no more.

        Raises:
            InputError: behind a `rewind` into a prompt that is more than its tokens a row went on otherwise.
            ExecutionError: ONNX Runtime failed in a segment, or logits are NaN or infinite: the generation has ended.
        """
        self._settle()
        session, limit = self._session, self._session.sampling.max_new_tokens
        if not session.rows:
            return []
        started = perf_counter()
        with self._ended_by_failure():
            if not self._ran:
                # a Wanted that this object kept would keep this object, and all the memory of its generation
                wanted = Wanted(accepts=self._accepts if self._chooser.batched else None)
                self._ran.extend(self._forward(wanted, self._most))
                self._each, started = (perf_counter() - started) * 1e3 / len(self._ran), perf_counter()
            ran = self._ran.popleft()
            chosen = self._chosen(ran)
        milliseconds = self._each + (perf_counter() - started) * 1e3
        records = []
        for item, token in zip(ran.rows, chosen, strict=True):
            row = session.rows[item.slot]
            self._texts[row].append(token)
            finished = session.ends(self._texts[row]) or (limit is not None and self._new(row) >= limit)
            if finished:
                self._ended.append(item.slot)
            exit_ = item.exits[session.plan.stacks[-1]]
            records.append(
                Token(row, token, exit_, item.exits, item.scores, milliseconds, ran.caught_up, finished, ran.trace)
            )
        return records if len(records) == 1 else sorted(records, key=lambda record: record.row)

    def rewind(self, length: int) -> None:
        """Cut the text of each of `rows` back to ``length`` tokens, prompt included; what they have computed stays.

        Raises:
            InputError: a row would be empty, or has no more than that.
        """
        self._settle()
        shortest = min((len(self._texts[row]) for row in self.rows), default=0)
        if not 1 <= length <= shortest:
            raise InputError(f"rewind to {length}: the rows have 1 to {shortest} tokens to keep")
        if self._ran and self._several:
            self._again()
        for row in self.rows:
            del self._texts[row][length:]
        self._back(dict.fromkeys(self.rows, length - 1))
        self._ran.clear()

    def end(self) -> None:
        """Leave this generation's memory to others, unless it failed; it cannot go on."""
        self._session.end()

    @contextmanager
    def _ended_by_failure(self) -> Iterator[None]:
        """End the generation where the model fails: what its caches hold then, NaN say, is for nobody."""
        try:
            yield
        except ExecutionError:
            self._session.end(reused=False)
            raise

    def _forward(self, wanted: Wanted, most: int = 1) -> Iterator[StepResult]:
        """Run what has been appended; what follows it is next, and then what follows that where more ran."""
        rows, limit = self._session.rows, self._session.sampling.max_new_tokens
        tokens = [np.array(self._texts[row][self._run[row] :], np.int64) for row in rows]
        new = self._new(rows[0])
        if new < self._chooser.settled:
            most = 1
        elif limit is not None:
            most = min(most, limit - new)
        ran = self._session.step(tokens, wanted=wanted, most=most)
        before = ran.rows[0].before
        self._several = bool(before)
        for row in rows:
            self._run[row] = len(self._texts[row]) + len(before)
        own = min(1, len(before))  # what ran for all of them
        for at, item in enumerate(before):
            yield StepResult([item], ran.trace[:own] if at == 0 else (), 0)
        yield ran._replace(trace=ran.trace[own:])

    def _settle(self) -> None:
        """Take out the rows that have ended."""
        if self._ended:
            self._session.drop(self._ended)
            self._ended = []

    def _again(self) -> None:
        """Forget what was run from each row's last token on, and run no tokens ahead any more."""
        self._most = 1
        self._back({row: len(self._texts[row]) - 1 for row in self.rows})
        self._ran.clear()

    def _back(self, lengths: Mapping[int, int]) -> None:
        """Forget what was run of rows behind so many tokens."""
        for slot, row in enumerate(self._session.rows):
            self._run[row] = min(self._run[row], lengths[row])
            self._session.rollback(slot, lengths[row])

    def _new(self, row: int) -> int:
        return len(self._texts[row]) - self._given[row]

    def _accepts(self, slot: int, token: int) -> bool:
        return self._chooser.takes(token, self._new(self._session.rows[slot]))

    def _chosen(self, ran: StepResult) -> list[int]:
        """The next token of each slot: what an exit has picked, or by logits."""
        chosen = [-1 if item.pick is None else item.pick for item in ran.rows]
        open_ = [slot for slot, item in enumerate(ran.rows) if item.pick is None]
        if not open_:
            return chosen
        rows = [self._session.rows[slot] for slot in open_]
        logits = _stacked([ran.rows[slot].outputs[self._session.plan.output].reshape(-1) for slot in open_])
        if self._chooser.batched:
            made = self._chooser.choose_all(logits, np.array([self._new(row) for row in rows])).tolist()
        else:
            pairs = zip(rows, logits, strict=True)
            made = [self._chooser.choose(row, self.tokens(row), own, self._new(row)) for row, own in pairs]
        for slot, token in zip(open_, made, strict=True):
            chosen[slot] = token
        return chosen


def stream(session: Session) -> Iterator[Token]:
    """Generate token by token until every row has ended."""
    generator = Generator(session, all_taken=True)
    while found := generator.next():
        yield from found


def _stacked(arrays: Sequence[Array]) -> Array:
    """Arrays of one shape as rows of one; no copy where there is one."""
    return arrays[0][None] if len(arrays) == 1 else np.stack(arrays)
