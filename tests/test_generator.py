"""Generation step by step: `Chain.generator` against `generate`, and against one pass over the same tokens."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny

import offramp
from offramp.errors import InputError, PolicyError
from offramp.runtime import Chain

PROMPTS = [[1, 5, 3], [2], [7, 4]]


@pytest.fixture(scope="module")
def saved(decoder: tiny.Captured, tmp_path_factory: pytest.TempPathFactory) -> Path:
    program = offramp.apply(decoder.program, "insert-cache,insert-exits{after=1|3},insert-scores{measure=top1}")
    path = tmp_path_factory.mktemp("generator") / "decoder.offramp"
    offramp.save(program, path)
    return path


@pytest.fixture(scope="module")
def chain(saved: Path) -> Chain:
    return offramp.load(saved)


def logits(chain: Chain, text: list[int]) -> Any:
    """Those that follow a text at full depth."""
    return chain.run({"input_ids": [text]}, offramp.Never()).outputs["output"][0, -1]


@pytest.mark.parametrize("policy", [offramp.Never(), offramp.Confidence(0.2), offramp.Depth({"decoder": 1})], ids=repr)
def test_next_gives_what_generate_gives(chain: Chain, policy: offramp.Policy) -> None:
    expected = chain.generate({"input_ids": PROMPTS}, policy, max_new_tokens=6)
    generator = chain.generator({"input_ids": PROMPTS}, policy, max_new_tokens=6)
    found: list[list[int]] = [[] for _ in PROMPTS]
    while generator.rows:
        for token in generator.next():
            found[token.row].append(token.token)
    assert found == [row.tolist() for row in expected.tokens]
    for row, prompt in enumerate(PROMPTS):
        assert generator.tokens(row).tolist() == [*prompt, *found[row]]
    assert generator.next() == []
    with pytest.raises(InputError, match="every row has ended"):
        generator.logits()


def test_appended_tokens_are_read_as_one_text(chain: Chain) -> None:
    generator = chain.generator({"input_ids": PROMPTS}, offramp.Never(), max_new_tokens=20)
    texts = [list(prompt) for prompt in PROMPTS]
    for new in ([[9, 9], [3], [1, 2, 3]], [[4], [5], [6]]):
        generator.append(new)
        texts = [text + more for text, more in zip(texts, new, strict=True)]
        for row, found in enumerate(generator.logits()):
            np.testing.assert_allclose(found, logits(chain, texts[row]), rtol=1e-4, atol=1e-5)
    chosen = [token.token for token in generator.next()]
    assert chosen == [int(logits(chain, text).argmax()) for text in texts]


@pytest.mark.parametrize("early", [False, True])
def test_what_was_taken_back_leaves_no_trace(chain: Chain, early: bool) -> None:
    policy = offramp.Depth({"decoder": 1}) if early else offramp.Never()
    straight = chain.generator({"input_ids": [[1, 5, 3]]}, policy, max_new_tokens=20)
    straight.append([[8]])
    expected = [straight.next()[0].token for _ in range(4)]
    generator = chain.generator({"input_ids": [[1, 5, 3]]}, policy, max_new_tokens=20)
    for _ in range(3):
        generator.next()
    generator.rewind(3)
    generator.append([[8]])
    assert [generator.next()[0].token for _ in range(4)] == expected
    assert generator.tokens(0).tolist() == [1, 5, 3, 8, *expected]


def test_a_policy_that_learns_is_told_nothing_of_what_was_taken_back(chain: Chain) -> None:
    policy = offramp.Adaptive(1, 0.5, "top1")
    generator = chain.generator({"input_ids": [[1]]}, policy, max_new_tokens=60)
    for _ in range(10):
        for _ in range(4):
            generator.next()
        generator.rewind(generator.tokens(0).size - 2)
    feedback, decoder = generator._session._feedback, generator._session.decoder
    assert feedback is not None
    assert len(feedback._waiting[0]) == decoder.seen[0, 0] - decoder.seen[-1, 0]


def test_what_does_not_fit_is_refused(chain: Chain) -> None:
    generator = chain.generator({"input_ids": PROMPTS}, max_new_tokens=4)
    wrong: list[tuple[Any, str]] = [
        ([[1]], "tokens for 1 rows; there are 3"),
        ([[1], [], [2]], "each needs at least one"),
        ([[1], [2], [tiny.WORDS]], "has the ids"),
        ("abc", "rows of token ids"),
    ]
    for tokens, reason in wrong:
        with pytest.raises(InputError, match=reason):
            generator.append(tokens)
    for length in (0, 2):
        with pytest.raises(InputError, match=rf"rewind to {length}: the rows have 1 to 1 tokens"):
            generator.rewind(length)
    with pytest.raises(InputError, match="a generator has one text of each row"):
        chain.generator({"input_ids": PROMPTS}, beams=2)
    with pytest.raises(PolicyError, match="a generation by hand"):
        chain.generator({"input_ids": PROMPTS}, offramp.Verify(1))
    assert len(generator.next()) == 3


def test_an_ended_generation_leaves_the_memory_of_others_alone(chain: Chain) -> None:
    ended = chain.generator({"input_ids": [[1, 5, 3]]}, offramp.Never(), max_new_tokens=8)
    ended.next()
    ended.end()
    first = chain.generator({"input_ids": [[2, 6, 4]]}, offramp.Never(), max_new_tokens=8)
    ended.end()
    second = chain.generator({"input_ids": [[7, 9, 8]]}, offramp.Never(), max_new_tokens=8)
    found: list[list[int]] = [[], []]
    for _ in range(4):
        for tokens, generator in zip(found, (first, second), strict=True):
            tokens += [token.token for token in generator.next()]
        with pytest.raises(InputError, match="this generation was ended"):
            ended.next()
    prompts = ([2, 6, 4], [7, 9, 8])
    assert found == [chain.generate({"input_ids": [row]}, max_new_tokens=4).tokens[0].tolist() for row in prompts]


def test_the_encoder_s_exits_and_trace_are_kept(two_stacks: tiny.Captured, tmp_path: Path) -> None:
    program = offramp.apply(two_stacks.program, "insert-cache,insert-exits{stack=encoder,after=1}")
    offramp.save(program, tmp_path / "m.offramp")
    chain = offramp.load(tmp_path / "m.offramp")
    inputs = {name: tensor.numpy() for name, tensor in two_stacks.inputs.items()}
    generator = chain.generator(inputs, lambda state: state.rows == 0, max_new_tokens=2)
    assert generator.exits["encoder"].tolist() == [1, *[chain.stacks["encoder"].blocks] * (len(generator.rows) - 1)]
    assert {timing.segment.split(".")[0] for timing in generator.trace} >= {"encoder"}


WAYS: dict[str, Callable[[Chain], object]] = {
    "run": lambda chain: chain.run({"input_ids": [[1, 5, 3]]}),
    "greedy": lambda chain: chain.generate({"input_ids": PROMPTS}, max_new_tokens=4),
    "drawn": lambda chain: chain.generate({"input_ids": PROMPTS}, temperature=1.0, seed=0, max_new_tokens=4),
    "beams": lambda chain: chain.generate({"input_ids": PROMPTS}, beams=2, max_new_tokens=4),
    "learning": lambda chain: chain.generate({"input_ids": [[2]]}, offramp.Adaptive(1, 0.3, "top1"), max_new_tokens=4),
    "drafts": lambda chain: chain.generate({"input_ids": [[2]]}, offramp.Verify(1, 0.3), max_new_tokens=4),
    "left in the middle": lambda chain: next(chain.stream({"input_ids": [[2]]}, max_new_tokens=4)),
    "by hand": lambda chain: chain.generator({"input_ids": PROMPTS}, max_new_tokens=4).next(),
}


@pytest.mark.parametrize("way", WAYS)
def test_memory_is_free_without_a_garbage_collector(chain: Chain, way: str) -> None:
    """What a generation held is large, and objects that hold each other would keep it for some generations more."""
    WAYS[way](chain)
    gc.collect()
    gc.disable()
    try:
        WAYS[way](chain)
        assert gc.collect() == 0
    finally:
        gc.enable()


def test_a_chain_that_nobody_has_is_gone(saved: Path) -> None:
    gc.collect()
    gc.disable()
    try:
        other = offramp.load(saved)
        other.generate({"input_ids": PROMPTS}, max_new_tokens=4)
        there = weakref.ref(other)
        del other
        assert there() is None
    finally:
        gc.enable()
