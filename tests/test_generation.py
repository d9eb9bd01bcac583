"""Generation: whatever leaves where, tokens and caches are those of a model that sees the whole text at once."""

# mypy: disable-error-code="no-any-return"
from __future__ import annotations

import itertools
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import onnxruntime
import pytest
import tiny
import torch
from bundles import classifier
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from torch import Tensor, nn

import offramp
from offramp.bundle import directory
from offramp.bundle.manifest import Generation
from offramp.bundle.options import PROPAGATE
from offramp.bundle.whole import divided
from offramp.errors import ExecutionError, InputError, PolicyError
from offramp.export import save
from offramp.passes import Truncate, apply
from offramp.program import Program
from offramp.runtime.chain import Chain
from offramp.runtime.engine.engine import Engine
from offramp.runtime.engine.sessions import open_sessions
from offramp.runtime.generation.copied_caches import CopiedCaches
from offramp.runtime.generation.decoder import Decoder
from offramp.runtime.generation.session import Session
from offramp.runtime.generation.tokens import Token
from offramp.runtime.policies.base import Function as Plain
from offramp.runtime.policies.base import State

few = settings(max_examples=12)
CLOSE: dict[str, Any] = {"rtol": 1e-4, "atol": 1e-5}
LIMIT = 150
Depths = Mapping[str, Sequence[Sequence[int]]]  # by stack and row, after how many blocks each token leaves, cycled

EXITS = {
    "talker": "insert-exits,insert-scores{measure=top1|prediction}",
    "two_stacks": "insert-exits{stack=encoder},insert-exits{stack=decoder},insert-scores{stack=decoder}",
    "halves": "insert-exits{stack=decoder},insert-exits{stack=more},insert-scores{stack=more}",
    "joined": "insert-exits{stack=decoder},insert-exits{stack=more},insert-scores{stack=decoder,measure=cosine},"
    "insert-scores{stack=more,measure=top1|entropy|prediction}",
}
MAKE: dict[str, tuple[Callable[[], nn.Module], tiny.Inputs, int]] = {
    "talker": (tiny.Talker, {"input_ids": tiny.ids()}, 4),
    "halves": (tiny.Halves, {"input_ids": tiny.ids()}, 4),
    "joined": (tiny.Joined, {"input_ids": tiny.ids()}, 4),
}
BLOCKS = {
    "talker": {"decoder": 4},
    "two_stacks": {"decoder": 3},
    "halves": {"decoder": 3, "more": 2},
    "joined": {"decoder": 3, "more": 3},
}
#: Model and target; on a "device" (the CPU) all rows run together.
WHERE = [
    *((name, target) for name in ("talker", "two_stacks") for target in ("ort", "portable", "device")),
    *(("halves", "portable"), ("halves", "device"), ("joined", "ort")),
]


class Bundle:
    """A model, its program with caches and exits, and the bundle at ``root``, loaded."""

    def __init__(self, name: str, captured: tiny.Captured, program: Program, root: Path, device: bool) -> None:
        self.name, self.captured, self.program, self.root = name, captured, program, root
        self.chain = Chain(*directory.read(root), _device=("cpu", 0) if device else None)

    def inputs(self, prompts: Sequence[Sequence[int]]) -> dict[str, Any]:
        """The prompts, with sources where the model takes some (those of row i are the i-th)."""
        given: dict[str, Any] = {"input_ids": [list(prompt) for prompt in prompts]}
        if self.name == "two_stacks":
            given |= {key: value[: len(prompts)].numpy() for key, value in sources().items()}
        return given

    def of_row(self, inputs: Mapping[str, Any], row: int) -> dict[str, Any]:
        return {key: value[row : row + 1] for key, value in inputs.items()}

    def oracle(
        self, inputs: Mapping[str, Any], row: int, encoder: int = tiny.BLOCKS, propagate: str = "defer"
    ) -> Oracle:
        return Oracle(self, self.of_row(inputs, row), encoder, propagate)


def sources(rows: int = 4) -> tiny.Inputs:
    ids = tiny.ids(tiny.SOURCES, rows, seed=6)
    return {"source_ids": ids, "source_mask": (torch.arange(tiny.SOURCES) < 8 + torch.arange(rows)[:, None]).long()}


@pytest.fixture(scope="session")
def bundles(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Bundle]:
    """Bundles by model and target, written when first asked for; both targets share the pieces without attention."""
    known: dict[tuple[str, str], Bundle] = {}
    models: dict[str, tuple[tiny.Captured, Program]] = {}

    def model(name: str) -> tuple[tiny.Captured, Program]:
        if name not in models:
            make = MAKE.get(name)
            captured = tiny.captured(*make[:2], seed=make[2]) if make else request.getfixturevalue(name)
            models[name] = captured, apply(captured.program, f"insert-cache,{EXITS[name]}")
        return models[name]

    def get(name: str, target: str | None = None) -> Bundle:
        target = target or ("portable" if name == "halves" else "ort")
        if (name, target) not in known and target == "device":
            known[name, target] = Bundle(name, *model(name), get(name, "portable").root, device=True)
        elif (name, target) not in known:
            root = tmp_path_factory.mktemp("generation") / f"{name}-{target}"
            save(model(name)[1], root, target="ort" if target == "ort" else "portable")
            known[name, target] = Bundle(name, *model(name), root, device=False)
        return known[name, target]

    return get


Get = Callable[..., Bundle]


# What is expected


class Oracle:
    """One row in torch, all blocks on all tokens at every step.

    ``read[stack][i]`` is what block ``i`` has read so far, ``[tokens, width]``: its keys and values are made of
    that. With "defer" the states of tokens that left early are those of full depth; with "hidden" the state at the
    exit stands for all deeper ones. ``pairs[stack][i]`` are its keys and values, ``[tokens, 2 * width]``: with "kv"
    those of the last block that ran stand for those of all deeper ones.
    """

    def __init__(self, made: Bundle, inputs: Mapping[str, Any], encoder: int, propagate: str) -> None:
        model: Any = made.captured.model
        self.propagate = propagate
        self.links: list[Callable[[Tensor], Tensor]]
        around: tuple[Any, ...] = (None,)
        if made.name == "two_stacks":
            side, reach = model.encoder, torch.as_tensor(inputs["source_mask"]).bool()[:, None, None]
            x = side.embed(torch.as_tensor(inputs["source_ids"]))
            for block in side.blocks[:encoder]:
                x = block(x, reach)
            around, model = (None, side.leave(x), reach), model.decoder
        self.embed, self.around = model.embed, around
        self.stacks = {"decoder": list(model.blocks)}
        self.links = [lambda x: model.head(model.leave(x))]
        if made.name in ("halves", "joined"):
            self.stacks["more"] = list(model.more)
            self.links.insert(0, model.bridge)
        self.ids: list[int] = []
        self.read = {stack: [torch.empty(0, tiny.WIDTH)] * len(blocks) for stack, blocks in self.stacks.items()}
        self.pairs = {stack: [torch.empty(0, 2 * tiny.WIDTH)] * len(blocks) for stack, blocks in self.stacks.items()}

    @torch.no_grad()
    def feed(self, ids: Sequence[int], exits: Mapping[str, int]) -> Tensor:
        """Logits behind new tokens, which leave each stack at ``exits``."""
        self.ids += ids
        x = self.embed(torch.tensor([self.ids]))[0, -len(ids) :]
        for (stack, blocks), link in zip(self.stacks.items(), self.links, strict=True):
            after, read = exits.get(stack, len(blocks)), self.read[stack]
            if self.propagate == "kv":
                x = link(self._with_pairs(blocks, self.pairs[stack], x, after))
                continue
            whole = torch.cat([read[0], x])
            for at, block in enumerate(blocks):
                if self.propagate == "hidden":
                    whole = torch.cat([read[at], x])
                read[at] = whole
                if self.propagate == "hidden" and at >= after:
                    continue
                whole = block(whole[None], *self.around)[0]
                x = whole[-len(ids) :] if at < after else x
            x = link(x)
        return x[-1]

    def _with_pairs(self, blocks: Sequence[Any], pairs: list[Tensor], x: Tensor, after: int) -> Tensor:
        """New tokens through the first ``after`` blocks, each of which reads its keys and values where they are."""
        made = torch.empty(0)
        for at, block in enumerate(blocks):
            if at < after:
                made = block.attention.kv(block.norms[0](x))
            before, pairs[at] = pairs[at], torch.cat([pairs[at], made])
            if at < after:
                both = pairs[at][None]
                with mock.patch.object(block.attention.kv, "forward", lambda _, both=both: both):
                    x = block(torch.cat([torch.zeros(len(before), tiny.WIDTH), x])[None], *self.around)[
                        0, len(before) :
                    ]
        return x

    def caches(self) -> Iterator[tuple[str, NDArray[np.float32]]]:
        """The contents of every cache, [heads, tokens, features], by its name."""
        number = itertools.count()
        for stack, blocks in self.stacks.items():
            for block, read, pair in zip(blocks, self.read[stack], self.pairs[stack], strict=True):
                if self.propagate != "kv":
                    with torch.no_grad():
                        pair = block.attention.kv(block.norms[0](read))
                at = next(number)
                split = pair.unflatten(-1, (2, tiny.HEADS, -1)).permute(1, 2, 0, 3)
                for name, values in zip(("key", "value"), split, strict=True):
                    yield f"{name}_cache_{at}", values.numpy()

    def write(self, prompt: Sequence[int], depths: Mapping[str, Sequence[int]], count: int) -> list[int]:
        """The tokens that follow, each leaving where ``depths`` says (behind a prompt of several at full depth)."""
        turns = ({stack: at[step % len(at)] for stack, at in depths.items()} for step in itertools.count())
        logits, found = self.feed(prompt, next(turns) if len(prompt) == 1 else {}), list[int]()
        for step in range(count):
            found.append(int(logits.argmax()))
            if step + 1 < count:
                logits = self.feed(found[-1:], next(turns))
        return found


def greedy(model: nn.Module, inputs: Mapping[str, Any], count: int) -> list[int]:
    """The tokens that follow one prompt, the model run on the whole text for each."""
    ids = torch.tensor(inputs["input_ids"])
    start = ids.shape[1]
    around = {key: torch.as_tensor(value) for key, value in inputs.items() if key != "input_ids"}
    with torch.no_grad():
        for _ in range(count):
            logits = model(**around, input_ids=ids)
            ids = torch.cat([ids, logits[:, -1:].argmax(-1)], 1)
    return ids[0, start:].tolist()


# What happens


class Schedule:
    """A policy as a function: the n-th token of row r leaves a stack after ``depths[stack][r][n]`` blocks."""

    def __init__(self, depths: Depths) -> None:
        self.depths = depths
        self.steps: dict[tuple[str, int], int] = {}
        self.seen: list[State] = []

    def __call__(self, state: State) -> Any:
        self.seen.append(state)
        return np.array([self.at(state.stack, int(row), state.after) <= state.after for row in state.rows], np.bool_)

    def at(self, stack: str, row: int, after: int) -> int:
        if after == 1:
            self.steps[stack, row] = self.steps.get((stack, row), -1) + 1
        if stack not in self.depths:
            return 99
        depths = self.depths[stack][row]
        return depths[self.steps[stack, row] % len(depths)]


class Failing(Schedule):
    """Raises when it is asked for the sixth time."""

    def __call__(self, state: State) -> Any:
        found = super().__call__(state)
        return found if len(self.seen) < 6 else 1 / 0


@dataclass
class Moment:
    """The state of a run behind one of its steps."""

    rows: list[int]
    seen: NDArray[np.int64]
    waiting: NDArray[np.int64]


@dataclass
class Played:
    """A whole run: its tokens by step, and its state behind each."""

    run: Session
    steps: list[list[Token]] = field(default_factory=list)
    moments: list[Moment] = field(default_factory=list)

    def row(self, row: int) -> list[Token]:
        return [token for step in self.steps for token in step if token.row == row]

    def tokens(self, row: int) -> list[int]:
        return [token.token for token in self.row(row)]

    def exits(self, row: int, stack: str = "decoder") -> list[int]:
        return [token.exits[stack] for token in self.row(row)]


def play(
    chain: Chain,
    inputs: Mapping[str, Any],
    policy: Any = None,
    propagate: str = "defer",
    max_pending: int | None = None,
    check: Callable[[Session, list[Token]], None] | None = None,
    **options: Any,
) -> Played:
    generator = chain.generator(inputs, policy, propagate=propagate, max_pending=max_pending, **options)
    run = generator._session
    played = Played(run)
    while generator.rows:
        step = generator.next()
        played.steps.append(step)  # rows that end leave the session before the next step
        played.moments.append(moment(run))
        if check:
            check(run, step)
    generator._settle()
    return played


def moment(run: Session) -> Moment:
    decoder, slots = run.decoder, range(len(run.rows))
    waiting = [[decoder.waiting.count(span, slot) for slot in slots] for span in range(len(decoder.spans))]
    return Moment(list(run.rows), decoder.seen[:, : len(run.rows)].copy(), np.array(waiting))


def assert_caches(run: Session, oracles: Mapping[int, Oracle]) -> None:
    """What every piece of the stack has seen lies in its caches, computed as the oracles of the rows have it."""
    decoder = run.decoder
    for slot, row in enumerate(run.rows):
        expected = dict(oracles[row].caches())
        for span, seen in zip(decoder.spans, decoder.seen[:, slot], strict=True):
            for name in {name for call in span.calls for _, name in call.buffers}:
                found = decoder.store.buffer(name)[slot]
                np.testing.assert_allclose(found[:, :seen], expected.pop(name)[:, :seen], err_msg=name, **CLOSE)
        assert not expected


class Following:
    """Checks the caches behind each step from ``start`` on: oracles are fed what the run was."""

    def __init__(
        self, made: Bundle, prompts: Sequence[Sequence[int]], propagate: str = "defer", start: int = 0
    ) -> None:
        inputs = made.inputs(prompts)
        self.oracles = {row: made.oracle(inputs, row, propagate=propagate) for row in range(len(prompts))}
        self.following = {row: list(prompt) for row, prompt in enumerate(prompts)}
        self.steps = -start

    def __call__(self, run: Session, step: list[Token]) -> None:
        for token in step:
            self.oracles[token.row].feed(self.following[token.row], token.exits)
            self.following[token.row] = [token.token]
        if self.steps >= 0:
            assert_caches(run, self.oracles)
        self.steps += 1


def pieces(decoder: Decoder) -> dict[str, list[int]]:
    """The spans of each stack, in order."""
    found: dict[str, list[int]] = {}
    for at, span in enumerate(decoder.spans):
        if span.stack:
            found.setdefault(span.stack, []).append(at)
    return found


@st.composite
def batches(
    draw: Any, name: str, most: int = 25, least: int = 1, rows: int = 1
) -> tuple[list[list[int]], dict[str, list[list[int]]], int]:
    """Prompts of ``rows`` to 4 rows, where each of their tokens leaves, and how many there are."""
    prompt = st.lists(st.integers(0, tiny.WORDS - 1), min_size=1, max_size=6)
    prompts = draw(st.lists(prompt, min_size=rows, max_size=4), label="prompts")
    depths = {
        stack: [
            draw(st.lists(st.integers(1, blocks), min_size=1, max_size=7), label=f"{stack}, row {row}")
            for row in range(len(prompts))
        ]
        for stack, blocks in BLOCKS[name].items()
    }
    return prompts, depths, draw(st.integers(least, most), label="new tokens")


def of_row(depths: Depths, row: int) -> dict[str, Sequence[int]]:
    return {stack: rows[row] for stack, rows in depths.items()}


# Full depth


@few
@given(where=st.sampled_from(WHERE), data=st.data())
def test_never_leaving_is_greedy_decoding(bundles: Get, where: tuple[str, str], data: Any) -> None:
    made = bundles(*where)
    prompts, _, count = data.draw(batches(where[0]))
    inputs = made.inputs(prompts)
    found = made.chain.generate(inputs, offramp.Never(), max_new_tokens=count)
    for row in range(len(prompts)):
        assert found.tokens[row].tolist() == greedy(made.captured.model, made.of_row(inputs, row), count)
        assert found.exits[row].tolist() == [list(BLOCKS[where[0]].values())[-1]] * count
        assert found.tokens[row].dtype == found.exits[row].dtype == np.int64


# Exits


@settings(max_examples=80)
@given(where=st.sampled_from(WHERE), propagate=st.sampled_from(PROPAGATE), data=st.data())
def test_tokens_and_caches_are_those_of_the_whole_text(
    bundles: Get, where: tuple[str, str], propagate: str, data: Any
) -> None:
    made = bundles(*where)
    prompts, depths, count = data.draw(batches(where[0]))
    inputs = made.inputs(prompts)
    bound = data.draw(st.none() | st.integers(1, 4), label="max_pending")
    encoder = data.draw(st.integers(1, tiny.BLOCKS), label="encoder")
    oracles = {row: made.oracle(inputs, row, encoder, propagate) for row in range(len(prompts))}
    policy = Schedule({**depths, "encoder": [[encoder]] * len(prompts)})
    expected = [oracle.write(prompts[row], of_row(depths, row), count) for row, oracle in oracles.items()]
    played = play(made.chain, inputs, policy, propagate, bound, max_new_tokens=count)
    for row in range(len(prompts)):
        assert played.tokens(row) == expected[row]
        for stack, blocks in BLOCKS[where[0]].items():
            at, first = depths[stack][row], [blocks] if len(prompts[row]) > 1 else []
            assert played.exits(row, stack) == [*first, *(at[step % len(at)] for step in range(count - len(first)))]
    for before, now in itertools.pairwise(played.moments):
        assert (before.seen <= now.seen).all()
    for now in played.moments:
        for spans in pieces(played.run.decoder).values():
            seen, waiting = now.seen[spans], now.waiting[spans]
            assert (np.diff(seen, axis=0) <= 0).all()  # what a piece has seen, the pieces before it have seen
            if propagate == "defer":
                np.testing.assert_array_equal(seen[1:] + waiting[1:], seen[:-1])
            else:
                np.testing.assert_array_equal(seen[1:] + waiting[1:], np.broadcast_to(seen[0], seen[1:].shape))
            if propagate == "kv":
                assert not waiting.any()
            if bound is not None:
                assert (seen[0] - seen[-1] < bound).all()


@settings(max_examples=30)
@given(where=st.sampled_from(WHERE), propagate=st.sampled_from(PROPAGATE), data=st.data())
def test_caches_behind_every_step(bundles: Get, where: tuple[str, str], propagate: str, data: Any) -> None:
    """While rows end, and others take over their slots."""
    made = bundles(*where)
    prompts, depths, count = data.draw(batches(where[0], most=14, least=4, rows=2))
    inputs, follow = made.inputs(prompts), Following(made, prompts, propagate)
    words = 3 if where[0] == "two_stacks" else tiny.WORDS
    stop = data.draw(st.sets(st.integers(0, words - 1), max_size=2), label="stop")
    play(made.chain, inputs, Schedule(depths), propagate, check=follow, max_new_tokens=count, stop=list(stop))


POLICIES = st.one_of(
    st.builds(offramp.Confidence, st.sampled_from([0.2, 0.3, 0.4, 0.5, 0.6])),
    st.builds(offramp.Patience, st.integers(1, 2)),
    st.builds(offramp.Depth, st.integers(1, 4)),
)


@few
@given(target=st.sampled_from(["ort", "portable"]), policy=POLICIES, stops=st.booleans(), data=st.data())
def test_a_row_gets_what_it_gets_alone(bundles: Get, target: str, policy: Any, stops: bool, data: Any) -> None:
    made = bundles("talker", target)
    prompts, _, count = data.draw(batches("talker"))
    inputs, options = made.inputs(prompts), {"max_new_tokens": count, "stop": [8] if stops else []}
    together = made.chain.generate(inputs, policy, **options)
    for row in range(len(prompts)):
        alone = made.chain.generate(made.of_row(inputs, row), policy, **options)
        assert together.tokens[row].tolist() == alone.tokens[0].tolist()
        assert together.exits[row].tolist() == alone.exits[0].tolist()


@settings(max_examples=40)
@given(where=st.sampled_from(WHERE), data=st.data())
def test_rows_keep_their_numbers_when_others_end(bundles: Get, where: tuple[str, str], data: Any) -> None:
    made = bundles(*where)
    prompts, depths, count = data.draw(batches(where[0], least=6, rows=2))
    words = 1 if where[0] == "two_stacks" else tiny.WORDS
    stop = data.draw(st.sets(st.integers(0, words - 1), min_size=1, max_size=3), label="stop")
    inputs, policy = made.inputs(prompts), Schedule(depths)
    played = play(made.chain, inputs, policy, max_new_tokens=count, stop=list(stop))
    for row in range(len(prompts)):
        expected = made.oracle(inputs, row).write(prompts[row], of_row(depths, row), count)
        cut = next((at + 1 for at, token in enumerate(expected) if token in stop), count)
        assert played.tokens(row) == expected[:cut]
        assert [token.finished for token in played.row(row)] == [False] * (cut - 1) + [True]
    assert all(set(state.rows) <= set(range(len(prompts))) for state in policy.seen)
    assert [[token.row for token in step] for step in played.steps] == [
        sorted(token.row for token in step) for step in played.steps
    ]
    assert played.run.rows == []


@pytest.mark.parametrize("name", ["talker", "halves"])
def test_rows_run_no_wider_than_their_own_tokens(bundles: Get, name: str) -> None:
    """Row 0 takes a token along to its exit; the rows behind it, with one token each, run on together."""
    made = bundles(name)
    prompts = [[1, 1], [2, 1], [3, 1]]
    inputs, depths = made.inputs(prompts), {"decoder": [[1, 2], [3, 3], [3, 3]]}
    played = play(made.chain, inputs, Schedule(depths), max_new_tokens=3)
    for row in range(3):
        assert played.tokens(row) == made.oracle(inputs, row).write(prompts[row], of_row(depths, row), 3)
    rows = [timing.rows for timing in played.steps[2][0].trace if timing.segment == "decoder.3"]
    assert rows == [2]


def test_what_a_policy_sees(bundles: Get) -> None:
    """The rows that are still there, under their own numbers, with their scores at the exits before."""
    made = bundles("talker")
    prompts = [[1], [2], [3], [4]]
    depths = {"decoder": [[4], [1], [2], [3]]}
    policy = Schedule(depths)
    played = play(made.chain, made.inputs(prompts), policy, max_new_tokens=3)
    first, second, third = policy.seen[:3]
    assert (first.stack, first.after, first.blocks, first.rows.tolist(), first.history) == (
        "decoder",
        1,
        4,
        [0, 1, 2, 3],
        {},
    )
    assert (second.after, second.rows.tolist(), list(second.history)) == (2, [0, 2, 3], [1])
    assert (third.after, third.rows.tolist(), list(third.history)) == (3, [0, 3], [1, 2])
    for measure in ("top1", "prediction"):
        np.testing.assert_array_equal(second.history[1][measure], first.scores[measure][[0, 2, 3]])
        np.testing.assert_array_equal(third.history[1][measure], first.scores[measure][[0, 3]])
        np.testing.assert_array_equal(third.history[2][measure], second.scores[measure][[0, 2]])
    assert first.scores["top1"].dtype == np.float32
    assert first.scores["prediction"].dtype == np.int64
    for row, after in enumerate([4, 1, 2, 3]):
        model = tiny.cut(made.captured.model, after)
        with torch.no_grad():
            chances = model(torch.tensor([[*prompts[row], played.tokens(row)[0]]]))[0, -1].softmax(-1)
        token = played.row(row)[1]
        assert token.exit == after
        assert int(chances.argmax()) == token.token
        if after < 4:
            assert token.scores["top1"] == pytest.approx(float(chances.max()), rel=1e-4)
            assert token.scores["prediction"] == token.token
    assert policy.seen[3].history == {}


@dataclass(frozen=True)
class Watched(offramp.Policy):
    """Another policy, and what it sees of each row: its steps, the exit, and the scores by exit and measure."""

    policy: offramp.Policy
    seen: list[list[Any]]

    @property
    def observes(self) -> Any:
        return self.policy.observes

    def observe(self, seen: Any) -> None:
        self.policy.observe(seen)

    def measures(self, stack: str, exit_: Any) -> tuple[str, ...] | None:
        return self.policy.measures(stack, exit_)

    def leave(self, state: State) -> Any:
        every = {**state.history, state.after: state.scores}
        assert state.steps is not None
        assert list(every) == sorted(every)
        assert all(score.shape == state.rows.shape for scores in every.values() for score in scores.values())
        for place, row in enumerate(state.rows.tolist()):
            said = {(at, name): float(score[place]) for at, past in every.items() for name, score in past.items()}
            self.seen[row].append((int(state.steps[place]), state.after, said))
        return self.policy.leave(state)


FROZEN = (
    Plain(lambda state: state.scores["top1"] > 0.28 - 0.1 * len(state.history)),
    Plain(lambda state: state.history[1]["top1"] < 0.2 if state.history else state.scores["top1"] > 0.3),
    offramp.Patience(1),
    offramp.Confidence(0.25),
    offramp.Entropy(2.2),
)


def watched(
    made: Bundle, policy: offramp.Policy, prompts: Mapping[int, list[int]], depths: Mapping[int, list[int]]
) -> tuple[Any, list[list[Any]]]:
    """What rows generate that leave the first stack at ``depths``, and what the policy of the second sees of each."""
    watching = Watched(policy, [[] for _ in prompts])
    schedule = Plain(Schedule({"decoder": list(depths.values())}))
    both = offramp.Each({"decoder": schedule, "more": watching})
    return made.chain.generate(made.inputs(list(prompts.values())), both, max_new_tokens=8), watching.seen


@pytest.mark.parametrize("policy", FROZEN, ids=lambda policy: type(policy).__name__)
def test_rows_that_left_a_stack_apart_are_asked_in_the_next_as_if_alone(bundles: Get, policy: offramp.Policy) -> None:
    made = bundles("joined")
    prompts = dict(enumerate([[1], [2, 3], [3, 5, 1], [4]]))
    depths = dict(enumerate([[1, 3], [2, 1, 3], [3, 2], [1, 2, 2]]))
    together, seen = watched(made, policy, prompts, depths)
    exits = set()
    for row, prompt in prompts.items():
        alone, (own,) = watched(made, policy, {row: prompt}, {row: depths[row]})
        assert together.tokens[row].tolist() == alone.tokens[0].tolist()
        assert together.exits[row].tolist() == alone.exits[0].tolist()
        assert [(step, after, list(said)) for step, after, said in seen[row]] == [
            (step, after, list(said)) for step, after, said in own
        ]
        for (_, _, said), (_, _, expected) in zip(seen[row], own, strict=True):
            assert said == pytest.approx(expected, rel=1e-3)
        exits |= set(alone.exits[0].tolist())
    assert len(exits) > 1


@pytest.mark.parametrize("policy", [offramp.Budget(2.0), offramp.Adaptive(1, 0.3, "top1", least=2, every=1)], ids=repr)
def test_policies_that_learn_see_rows_that_left_a_stack_apart_once_a_step(bundles: Get, policy: offramp.Policy) -> None:
    prompts, depths = {0: [1], 1: [2, 3], 2: [4]}, {0: [1, 3], 1: [2, 1, 3], 2: [3, 2]}
    found, seen = watched(bundles("joined"), policy, prompts, depths)
    assert [len(row) for row in found.tokens] == [8, 8, 8]
    for row, prompt in enumerate(prompts.values()):
        asked = [step for step, after, _ in seen[row] if after == 1]
        assert asked == list(range(len(prompt) > 1, 8))


def test_scores_are_those_of_the_last_exit_that_was_asked(bundles: Get) -> None:
    made = bundles("talker")
    played = play(made.chain, made.inputs([[1, 0], [2, 0]]), Schedule({"decoder": [[4], [2]]}), max_new_tokens=2)
    deep, early = played.steps[1]
    for token, after in ((deep, 3), (early, 2)):
        with torch.no_grad():
            ids = [[token.row + 1, 0, played.tokens(token.row)[0]]]
            chances = tiny.cut(made.captured.model, after)(torch.tensor(ids))[0, -1].softmax(-1)
        assert token.scores["top1"] == pytest.approx(float(chances.max()), rel=1e-4)
    assert played.steps[0][0].scores == {}  # a prompt of several tokens runs to full depth, and nobody is asked
    never = play(made.chain, made.inputs([[1]]), offramp.Never(), max_new_tokens=2)
    assert [token.scores for token in never.row(0)] == [{}, {}]


# Propagation and what waits


@pytest.mark.parametrize("target", ["ort", "portable"])
def test_hidden_states_for_deeper_ones_differ_once_a_token_goes_deep(bundles: Get, target: str) -> None:
    made = bundles("talker", target)
    inputs, depths = made.inputs([[1, 5]]), {"decoder": [[1, 1, 1, 4, 1, 1, 4, 4]]}
    caches: dict[str, list[dict[str, NDArray[Any]]]] = {}
    written = {}
    for propagate in ("defer", "hidden"):
        kept = caches.setdefault(propagate, [])

        def check(run: Session, step: list[Token], kept: list[dict[str, NDArray[Any]]] = kept) -> None:
            store = run.decoder.store
            kept.append({name: store.buffer(name)[0].copy() for name in store.cache.buffers})

        played = play(made.chain, inputs, Schedule(depths), propagate, check=check, max_new_tokens=9)
        written[propagate] = played.tokens(0)
        assert played.exits(0) == [4, 1, 1, 1, 4, 1, 1, 4, 4]
    for step in range(4):  # the first token of the schedule, and the three that leave early
        for name, array in caches["defer"][step].items():
            np.testing.assert_allclose(caches["hidden"][step][name], array, **CLOSE)
    assert written["defer"][:4] == written["hidden"][:4]
    deep = [name for name in caches["defer"][4] if name.endswith(("_1", "_2", "_3"))]
    assert any(np.abs(caches["hidden"][4][name] - caches["defer"][4][name]).max() > 1e-2 for name in deep[2:])
    np.testing.assert_allclose(caches["hidden"][4]["key_cache_1"], caches["defer"][4]["key_cache_1"], **CLOSE)


@pytest.mark.parametrize("name", ["talker", "two_stacks", "halves", "joined"])
def test_nothing_differs_where_all_go_deep(bundles: Get, name: str) -> None:
    made = bundles(name)
    inputs = made.inputs([[1, 2], [2]])
    deep = {stack: [[blocks]] * 2 for stack, blocks in BLOCKS[name].items()}
    found = [made.chain.generate(inputs, Schedule(deep), propagate=how, max_new_tokens=12).tokens for how in PROPAGATE]
    for defer, hidden, kv in zip(*found, strict=True):
        assert defer.tolist() == hidden.tolist() == kv.tolist()


def test_caches_that_differ_cannot_stand_for_each_other(bundles: Get) -> None:
    chain = bundles("talker").chain
    assert chain.manifest.cache is not None
    wider = replace(chain.manifest.values["key_cache_2"], shape=("batch", 1, "capacity", 8))
    uneven = replace(chain.manifest, values={**chain.manifest.values, "key_cache_2": wider})
    with pytest.raises(InputError, match="4 blocks of stack 'decoder' have 8 caches of 2 shapes"):
        CopiedCaches(uneven, chain._loaded.plan.spans)  # type: ignore[union-attr]
    fewer = dict(list(chain.manifest.cache.buffers.items())[:-1])
    lacking = replace(chain.manifest, cache=replace(chain.manifest.cache, buffers=fewer))
    with pytest.raises(InputError, match="4 blocks of stack 'decoder' have 7 caches of 1 shapes"):
        CopiedCaches(lacking, chain._loaded.plan.spans)  # type: ignore[union-attr]


def test_bounding_what_waits_takes_more_steps_and_gives_the_same(bundles: Get) -> None:
    made = bundles("talker")
    inputs, depths = made.inputs([[1, 2], [3]]), {"decoder": [[1, 1, 2, 1, 3, 1], [3, 2, 1]]}
    free = play(made.chain, inputs, Schedule(depths), max_new_tokens=20)
    assert max(now.waiting.sum(0).max() for now in free.moments) > 10
    for bound in (1, 2, 5):
        bounded = play(made.chain, inputs, Schedule(depths), max_pending=bound, max_new_tokens=20)
        assert [bounded.tokens(row) for row in (0, 1)] == [free.tokens(row) for row in (0, 1)]
        assert max(now.waiting.sum(0).max() for now in bounded.moments) == bound - 1


# What a token tells


@pytest.mark.parametrize(("name", "target"), [("talker", "ort"), ("talker", "device"), ("two_stacks", "portable")])
def test_the_records_of_a_known_schedule(bundles: Get, name: str, target: str) -> None:
    made = bundles(name, target)
    blocks = BLOCKS[name]["decoder"]
    depths = {"decoder": [[1, 1, 1, blocks, 2, 1, blocks]]}
    played = play(made.chain, made.inputs([[1, 2]]), Schedule(depths), max_new_tokens=8)
    tokens = played.row(0)
    assert [token.exit for token in tokens] == [blocks, 1, 1, 1, blocks, 2, 1, blocks]
    assert [dict(token.exits) for token in tokens] == [{"decoder": token.exit} for token in tokens]
    assert [token.caught_up for token in tokens] == [0, 0, 0, 0, 3, 0, 0, 2]
    assert [token.finished for token in tokens] == [False] * 7 + [True]
    assert all(token.milliseconds > 0 for token in tokens)
    stack = [f"decoder.{i}" for i in range(1, blocks + 1)]
    tails = {blocks: "tail"} | {after: f"decoder.{after}/tail" for after in range(1, blocks)}
    for token in tokens[:1] + tokens[4:5]:
        names = [timing.segment for timing in token.trace]
        assert [n for n in names if n in stack] == stack
        assert names[-1] == tails[blocks]
    for token in tokens[1:4]:
        names = [timing.segment for timing in token.trace]
        assert [n for n in names if n.startswith(("decoder", "tail"))] == [stack[0], tails[1]]
        assert all(timing.rows == 1 and timing.milliseconds > 0 for timing in token.trace)
    assert tokens[0].trace is not tokens[1].trace


def test_caught_up_counts_tokens_of_all_rows(bundles: Get) -> None:
    made = bundles("talker")
    depths = {"decoder": [[1, 1, 4, 4], [3, 2, 1, 4]]}
    played = play(made.chain, made.inputs([[1, 2], [2, 3]]), Schedule(depths), max_new_tokens=5)
    assert [[token.caught_up for token in step] for step in played.steps] == [[n] * 2 for n in (0, 0, 0, 2, 3)]


def test_a_bound_catches_up_by_itself(bundles: Get) -> None:
    made = bundles("talker")
    played = play(made.chain, made.inputs([[1, 2]]), Schedule({"decoder": [[1]]}), max_pending=3, max_new_tokens=8)
    assert [step[0].caught_up for step in played.steps] == [0, 0, 0, 3, 0, 0, 3, 0]
    assert [step[0].exit for step in played.steps] == [4] + [1] * 7


# Room


@pytest.mark.parametrize("target", ["ort", "portable", "device"])
def test_caches_grow_up_to_the_models_last_place(bundles: Get, target: str) -> None:
    made = bundles("talker", target)
    prompt = [1, 2, 3, 4, 5, 6]
    count = LIMIT - len(prompt) + 1
    played = play(made.chain, made.inputs([prompt]), offramp.Never(), max_new_tokens=count)
    assert played.tokens(0) == greedy(made.captured.model, {"input_ids": [prompt]}, count)
    assert played.run.decoder.store.capacity == LIMIT
    assert played.moments[-1].seen.max() == LIMIT
    assert made.chain.generate(made.inputs([prompt])).tokens[0].size == count


@pytest.mark.parametrize("target", ["ort", "portable", "device"])
@pytest.mark.parametrize("propagate", PROPAGATE)
def test_caches_grow_while_tokens_wait(bundles: Get, target: str, propagate: str) -> None:
    made = bundles("talker", target)
    prompts = [[1, 2, 3, 4, 5, 6], [7]]
    depths = {"decoder": [[*[1] * 30, 2, *[1] * 35, 4], [*[2] * 40, 3, *[1] * 50, 4]]}
    count = LIMIT - 5
    inputs = made.inputs(prompts)
    played = play(made.chain, inputs, Schedule(depths), propagate, max_new_tokens=count)
    oracles = {row: made.oracle(inputs, row, propagate=propagate) for row in (0, 1)}
    for row in (0, 1):
        assert played.tokens(row) == oracles[row].write(prompts[row], of_row(depths, row), count)
    capacities = {64, 128, LIMIT}
    assert played.run.decoder.store.capacity == max(capacities)


def test_a_full_row_keeps_its_caches_while_others_run_on(bundles: Get) -> None:
    """On a device all slots run: row 0 has entered the second stack's 64 places before row 1 gets there."""
    made, prompts = bundles("halves", "device"), [[1], [2]]
    follow = Following(made, prompts, start=60)
    depths = {"decoder": [[1], [2]], "more": [[2], [2]]}
    played = play(made.chain, made.inputs(prompts), Schedule(depths), check=follow, max_new_tokens=67)
    assert follow.steps == 7
    assert played.run.decoder.store.capacity == 128


def ending(tokens: NDArray[np.int64], logits: NDArray[np.float32]) -> NDArray[np.float32]:
    """0 is the fourth token of texts that begin with 1, and no other."""
    ends = tokens[0] == 1 and tokens.size > 3
    return np.where((np.arange(logits.size) == 0) == ends, logits, -np.inf).astype(np.float32)


@pytest.mark.parametrize("target", ["ort", "portable", "device"])
@pytest.mark.parametrize("beams", [1, 2])
def test_rows_keep_what_ran_once_for_them_when_caches_grow(bundles: Get, target: str, beams: int) -> None:
    """The first one has ended by then, so that the last has its slot; beams lie row by row."""
    made = bundles("two_stacks", target)

    def seen(capacity: int) -> list[NDArray[np.float32]]:
        found = list[NDArray[np.float32]]()

        def noting(tokens: NDArray[np.int64], logits: NDArray[np.float32]) -> NDArray[np.float32]:
            found.append(logits)
            return ending(tokens, logits)

        with mock.patch("offramp.runtime.generation.session._FIRST_CAPACITY", capacity):
            inputs = made.inputs([[1], [2], [3]])
            made.chain.generate(inputs, processors=(noting,), stop=(0,), beams=beams, max_new_tokens=12)
        return found

    for grown, roomy in zip(seen(2), seen(16), strict=True):
        np.testing.assert_allclose(grown, roomy, **CLOSE)


def test_a_prompt_longer_than_the_first_caches(bundles: Get) -> None:
    made = bundles("talker")
    prompts = [tiny.ids(100, 1, seed=9)[0].tolist(), [1, 2]]
    found = made.chain.generate(made.inputs(prompts), max_new_tokens=5)
    for row in (0, 1):
        assert found.tokens[row].tolist() == greedy(made.captured.model, {"input_ids": prompts[row : row + 1]}, 5)


@pytest.mark.parametrize(
    ("prompt", "options", "reason"),
    [
        ([1] * (LIMIT + 1), {}, rf"the prompt has {LIMIT + 1} tokens; the model takes {LIMIT}"),
        ([1] * 6, {"max_new_tokens": LIMIT - 4}, rf"after a prompt of 6: the model takes {LIMIT} tokens"),
        ([1, tiny.WORDS], {}, rf"'input_ids' has the ids \[{tiny.WORDS}\]; they go from 0 to {tiny.WORDS - 1}"),
        ([1, -1], {}, r"'input_ids' has the ids \[-1\]"),
        ([1.0, 2.0], {}, "rows of token ids"),
        ([True, False], {}, "rows of token ids"),
        ([[1, 2]], {}, "rows of token ids"),
        (3, {}, "rows of token ids"),
        ([], {}, "every row needs at least one token"),
        ([1], {"propagate": "copy"}, "propagate='copy': there are defer, hidden, kv"),
        ([1], {"max_pending": 0}, "max_pending=0: at least 1"),
        ([1], {"max_new_tokens": -1}, "max_new_tokens is -1"),
        ([1], {"beam": 3}, r"unknown options \['beam'\]; there are .*'max_new_tokens'"),
        ([1], {"temperature": -1.0}, "temperature is -1.0"),
        ([1], {"stop": [tiny.WORDS]}, rf"stop has {tiny.WORDS}; token ids end at {tiny.WORDS - 1}"),
    ],
    ids=str,
)  # fmt: skip
def test_what_does_not_fit_is_said_before_anything_runs(
    bundles: Get, monkeypatch: pytest.MonkeyPatch, prompt: Any, options: dict[str, Any], reason: str
) -> None:
    chain = bundles("talker").chain
    monkeypatch.setattr(Decoder, "step", lambda *args: pytest.fail("something ran"))
    for call in (chain.stream, chain.generate):
        with pytest.raises(InputError, match=reason):
            call({"input_ids": [[1, 2], prompt]}, **options)


@pytest.mark.parametrize(
    ("changed", "reason"),
    [
        ({"input_ids": None}, "'input_ids' is missing, and the bundle has no prompt of its own"),
        ({"source_ids": None}, "'source_ids' is missing"),
        ({"more": [1]}, "'more' is not an input"),
        ({"source_ids": tiny.ids(5, 2).numpy()}, r"axis 1 of 'source_.*' has"),
        ({"source_ids": tiny.ids(tiny.SOURCES, 3).numpy()}, r"axis 0 of 'source_.*' has"),
        ({"source_ids": tiny.ids(tiny.SOURCES, 2).numpy().astype(np.float32)}, "'source_ids' is float32, expected"),
        ({"source_ids": tiny.ids(tiny.SOURCES, 2).numpy()[0]}, r"'source_ids' has the shape \[12\]"),
        ({"input_ids": [[1], [2], [0]]}, r"axis 0 of '.*' has"),
        ({"input_ids": np.ones((2, 3), np.float32)}, "rows of token ids, of any lengths: dtype float32"),
        ({"input_ids": []}, "every row needs at least one token"),
        ({"input_ids": 7}, "rows of token ids"),
    ],
    ids=str,
)  # fmt: skip
def test_inputs_beside_the_tokens_have_to_fit(
    bundles: Get, monkeypatch: pytest.MonkeyPatch, changed: dict[str, Any], reason: str
) -> None:
    made = bundles("two_stacks")
    monkeypatch.setattr(Engine, "run", lambda *args: pytest.fail("something ran"))
    inputs = {**made.inputs([[1], [2]]), **changed}
    with pytest.raises(InputError, match=reason):
        made.chain.stream({key: value for key, value in inputs.items() if value is not None})


def test_a_bundle_without_caches_does_not_generate(tmp_path: Path) -> None:
    chain = offramp.load(classifier(tmp_path / "plain"))
    assert chain.generates is None
    with pytest.raises(InputError, match="has no caches") as caught:
        chain.generate({"ids": [[1]]})
    assert caught.value.hint == "insert-cache before export"


def test_a_policy_that_does_not_fit(bundles: Get) -> None:
    chain = bundles("two_stacks").chain
    inputs = bundles("two_stacks").inputs([[1]])
    wrong: list[tuple[Any, str]] = [
        (offramp.Patience(1), "has the score 'prediction'"),
        (offramp.Depth(9), "no exit after 9 blocks"),
        (lambda state: np.ones(7, np.bool_), r"has to return bool \[1\] after 1 blocks of 'encoder'"),
        (0.9, "is no policy"),
    ]
    for policy, reason in wrong:
        with pytest.raises(PolicyError, match=reason):
            list(chain.stream(inputs, policy, max_new_tokens=3))


# How it ends


def test_no_tokens(bundles: Get) -> None:
    made = bundles("talker")
    assert list(made.chain.stream(made.inputs([[1], [2]]), max_new_tokens=0)) == []
    found = made.chain.generate(made.inputs([[1], [2]]), max_new_tokens=0)
    assert [row.tolist() for row in (*found.tokens, *found.exits)] == [[]] * 4


def test_stop_tokens(bundles: Get) -> None:
    made = bundles("talker")
    whole = made.chain.generate(made.inputs([[1], [2], [3]]), max_new_tokens=20).tokens
    for stop in ([8], [3, 9], list(range(tiny.WORDS))):
        found = made.chain.generate(made.inputs([[1], [2], [3]]), max_new_tokens=20, stop=stop).tokens
        for row, tokens in zip(found, whole, strict=True):
            cut = next((i + 1 for i, token in enumerate(tokens) if token in stop), 20)
            assert row.tolist() == tokens[:cut].tolist()


def test_prompts_of_any_kind(bundles: Get) -> None:
    chain = bundles("talker").chain
    wanted = [row.tolist() for row in chain.generate({"input_ids": [[1, 2], [3, 4]]}, max_new_tokens=4).tokens]
    for prompts in (
        np.array([[1, 2], [3, 4]]),
        np.array([[1, 2], [3, 4]], np.int32),
        ((1, 2), (3, 4)),
        [np.array([1, 2], np.uint8), [3, 4]],
    ):
        assert [row.tolist() for row in chain.generate({"input_ids": prompts}, max_new_tokens=4).tokens] == wanted


def test_the_bundles_own_prompt_and_way_of_choosing(bundles: Get) -> None:
    made = bundles("two_stacks")
    own = Generation(prompt=(2, 0), stop=(1,), suppress_first=(2,), max_length=9)
    chain = Chain(replace(made.chain.manifest, generation=own), made.root)
    around = {key: value for key, value in made.inputs([[1]] * 3).items() if key != "input_ids"}
    found = chain.generate(around).tokens
    assert len(found) == 3
    options: dict[str, Any] = {"stop": [1], "suppress_first": [2], "max_new_tokens": 7}
    expected = made.chain.generate({**around, "input_ids": [[2, 0]] * 3}, **options).tokens
    assert [row.tolist() for row in found] == [row.tolist() for row in expected]
    with pytest.raises(InputError, match="the batch is empty: 'source_ids' has no rows"):
        chain.generate({key: value[:0] for key, value in around.items()})
    with pytest.raises(InputError, match=r"^axis 0 of 'source_mask' has 3 places; batch is 2 .*\n  .this bundle takes"):
        chain.generate({**around, "source_ids": around["source_ids"][:2]})


def test_hidden_states_whose_rows_lie_elsewhere(bundles: Get) -> None:
    made = bundles("talker")
    manifest = divided(made.chain.manifest)
    turned = {"decoder.2": replace(manifest.values["decoder.2"], shape=("tokens", "batch", tiny.WIDTH))}
    chain = Chain(replace(manifest, values={**manifest.values, **turned}), made.root)
    assert (chain.generates, made.chain.generates) == (None, "input_ids")
    with pytest.raises(InputError, match=r"'decoder.2' of shape .* does not have rows and tokens on its first two"):
        chain.stream({"input_ids": [[1]]})


@few
@given(prompt=st.lists(st.integers(0, tiny.WORDS - 1), min_size=1, max_size=4), after=st.integers(1, 4))
def test_as_many_beams_as_words_find_the_best_of_all(bundles: Get, prompt: list[int], after: int) -> None:
    """Of two tokens, the second left early, and the first behind a prompt of one; rows get what they get alone."""
    made = bundles("talker")
    inputs = made.inputs([prompt, [1], prompt])
    found = made.chain.generate(inputs, offramp.Depth(after), beams=tiny.WORDS, max_new_tokens=2)
    for row in range(3):
        first, at = made.oracle(inputs, row), {"decoder": 4 if len(inputs["input_ids"][row]) > 1 else after}
        total = first.feed(inputs["input_ids"][row], at).log_softmax(-1)[:, None].repeat(1, tiny.WORDS)
        for token in range(tiny.WORDS):
            oracle = made.oracle(inputs, row)
            oracle.feed(inputs["input_ids"][row], at)
            total[token] += oracle.feed([token], {"decoder": after}).log_softmax(-1)
        assert found.tokens[row].tolist() == list(divmod(int(total.argmax()), tiny.WORDS))
        assert found.exits[row].tolist() == [at["decoder"], after]
        assert found.scores[row] == pytest.approx(float(total.max()) / 2, rel=1e-4)


# Interruptions, neighbours, threads


def test_a_stream_that_is_left_leaves_nothing_behind(bundles: Get) -> None:
    for name, target in (("talker", "ort"), ("two_stacks", "device")):
        made = bundles(name, target)
        inputs, depths = made.inputs([[1], [2]]), {"decoder": [[1, 2, 3], [2, 1]]}
        wanted = play(made.chain, inputs, Schedule(depths), max_new_tokens=10)
        left = made.chain.stream(inputs, Schedule(depths), max_new_tokens=10)
        for _ in range(7):  # in the middle of a step
            next(left)
        left.close()  # type: ignore[attr-defined]
        with pytest.raises(StopIteration):
            next(left)

        with pytest.raises(ZeroDivisionError):
            made.chain.generate(inputs, Failing(depths), max_new_tokens=10)
        again = play(made.chain, inputs, Schedule(depths), max_new_tokens=10)
        assert [again.tokens(row) for row in (0, 1)] == [wanted.tokens(row) for row in (0, 1)]


@pytest.mark.parametrize("asked", ["next", "logits"])
@pytest.mark.parametrize("target", ["ort", "portable", "device"])
def test_what_broke_in_one_generation_does_not_break_the_next(target: str, asked: str, tmp_path: Path) -> None:
    model, last = tiny.seeded(tiny.Talker, 4), tiny.WORDS - 1
    program = offramp.capture(model, {"input_ids": tiny.ids().clamp(max=last - 1)})
    with torch.no_grad():
        model.words.weight[last] = torch.nan
    save(apply(program, "insert-cache"), tmp_path / "m", target="ort" if target == "ort" else "portable")
    chain = Chain(*directory.read(tmp_path / "m"), _device=("cpu", 0) if target == "device" else None)
    wanted = chain.generate({"input_ids": [[1, 2]]}, max_new_tokens=3).tokens[0]
    broken = chain.generator({"input_ids": [[1, 2, 3, last]]}, offramp.Never())
    with pytest.raises(ExecutionError, match="NaN"):
        getattr(broken, asked)()
    broken.rewind(2)
    with pytest.raises(InputError, match="was ended, or has failed"):
        getattr(broken, asked)()
    broken.end()
    assert np.array_equal(chain.generate({"input_ids": [[1, 2]]}, max_new_tokens=3).tokens[0], wanted)


def test_runs_side_by_side(bundles: Get) -> None:
    """Two streams of one chain, and one of another chain of the same bundle, token by token in turn."""
    made = bundles("talker")
    other = Chain(made.chain.manifest, made.root)
    given = [
        (made.chain, [[1], [2]], [[1, 4], [2]]),
        (made.chain, [[5, 6, 7], [8]], [[4], [1]]),
        (other, [[9], [3]], [[3], [1]]),
    ]
    alone = [play(c, made.inputs(p), Schedule({"decoder": d}), max_new_tokens=12) for c, p, d in given]
    streams = [c.stream(made.inputs(p), Schedule({"decoder": d}), max_new_tokens=12) for c, p, d in given]
    for tokens in zip(*streams, strict=True):
        for played, token in zip(alone, tokens, strict=True):
            step = token.row, token.token, token.exit
            assert step in [(t.row, t.token, t.exit) for t in played.row(token.row)]
    turns = [[(t.row, t.token, t.exit) for t in s] for s in zip(*(played.row(0) for played in alone), strict=True)]
    assert len(turns) == 12


@pytest.mark.parametrize("target", ["ort", "portable", "device"])
def test_threads_may_share_a_chain(bundles: Get, target: str) -> None:
    made = bundles("two_stacks", target)
    prompts = [[[1], [2], [0]], [[2], [2]], [[0], [1], [1], [2]]]
    depths = {"decoder": [[1, 3, 2], [2], [1, 1, 3], [3, 1]]}

    def written(n: int) -> list[list[int]]:
        found = made.chain.generate(made.inputs(prompts[n]), Schedule(depths), max_new_tokens=15)
        return [row.tolist() for row in (*found.tokens, *found.exits)]

    wanted = [written(n) for n in range(3)]
    wrong: list[object] = []

    def work(n: int) -> None:
        try:
            for _ in range(6):
                assert written(n) == wanted[n]
        except BaseException as error:
            wrong.append(error)
            raise

    threads = [threading.Thread(target=work, args=(n,)) for n in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


class Copying:
    """A binding that keeps what an array held when it was bound, as ONNX Runtime's do for inputs on a GPU."""

    def __init__(self, binding: Any) -> None:
        self._binding = binding

    def __getattr__(self, name: str) -> Any:
        return getattr(self._binding, name)

    def bind_ortvalue_input(self, name: str, value: onnxruntime.OrtValue) -> None:
        self.bind_cpu_input(name, value.numpy())

    def bind_cpu_input(self, name: str, array: NDArray[Any]) -> None:
        self._binding.bind_ortvalue_input(name, onnxruntime.OrtValue.ortvalue_from_numpy(array.copy()))


class Elsewhere:
    """A session on a provider with memory of its own."""

    def __init__(self, session: Any) -> None:
        self._session = session

    def __getattr__(self, name: str) -> Any:
        return getattr(self._session, name)

    def get_providers(self) -> list[str]:
        return ["ElsewhereExecutionProvider", "CPUExecutionProvider"]

    def io_binding(self) -> Any:
        return Copying(self._session.io_binding())

    def run_with_iobinding(self, binding: Any, options: Any) -> None:
        self._session.run_with_iobinding(getattr(binding, "_binding", binding), options)


@pytest.mark.parametrize(("name", "target"), [where for where in WHERE if where[0] in ("talker", "two_stacks")])
def test_inputs_that_are_copied_when_they_are_bound(bundles: Get, name: str, target: str) -> None:
    """Rows leave, end and move meanwhile, and caches grow."""
    made = bundles(name, target)
    inputs, depths = made.inputs([[1], [2], [3, 4, 5]]), {"decoder": [[1], [2, 3], [3, 1, 2]]}
    files = {segment.file for segment in divided(made.chain.manifest).segments.values()}
    files |= set(made.chain.manifest.take.values())
    sessions = {file: Elsewhere(each) for file, each in open_sessions(made.root, files, None, None).items()}
    device = ("cpu", 0) if target == "device" else None
    elsewhere = Chain(*directory.read(made.root), _device=device, _sessions=sessions)
    with mock.patch("offramp.runtime.generation.session._FIRST_CAPACITY", 4):
        wanted, found = (
            chain.generate(inputs, Schedule(depths), processors=(ending,), stop=(0,), max_new_tokens=12)
            for chain in (made.chain, elsewhere)
        )
    assert [row.tolist() for row in found.tokens] == [row.tolist() for row in wanted.tokens]
    assert [row.size for row in wanted.tokens] == [4, 12, 12]


def test_on_a_device_one_row_at_a_time_is_refused(bundles: Get) -> None:
    """GroupQueryAttention takes prompts row by row, and on a device all rows run together."""
    made = bundles("talker")
    chain = Chain(made.chain.manifest, made.root, _device=("cpu", 0))
    assert chain.generate({"input_ids": [[1, 2]]}, max_new_tokens=5).tokens[0].size == 5
    with pytest.raises(ExecutionError, match="takes one row at a time") as caught:
        chain.generate({"input_ids": [[1, 2], [3, 4]]}, max_new_tokens=5)
    assert 'target="portable"' in (caught.value.hint or "")


# One pass


@few
@given(where=st.sampled_from(WHERE), rows=st.integers(1, 4), tokens=st.integers(1, 12), data=st.data())
def test_one_pass_is_eager(bundles: Get, where: tuple[str, str], rows: int, tokens: int, data: Any) -> None:
    made = bundles(*where)
    ids = tiny.ids(tokens, rows, seed=data.draw(st.integers(0, 99)))
    inputs = made.inputs(ids.tolist()) | {"input_ids": ids.numpy()}
    given = {key: torch.as_tensor(value) for key, value in inputs.items()}
    tiny.assert_same(
        {k: torch.as_tensor(v) for k, v in made.chain.run(inputs, offramp.Never()).outputs.items()},
        made.captured.eager(given),
        atol=1e-5,
    )
    stack = data.draw(st.sampled_from(list(made.chain.stacks)))
    after = data.draw(st.integers(1, made.chain.stacks[stack].blocks - 1))
    result = made.chain.run(inputs, offramp.Depth({stack: after}))
    short = apply(made.program, [Truncate(stack, after)])
    expected = tiny.outputs(short.module, short.fresh(given))["output"].numpy()
    np.testing.assert_allclose(result.outputs["output"], expected, **CLOSE)
    assert result.exits[stack].tolist() == [after] * rows
