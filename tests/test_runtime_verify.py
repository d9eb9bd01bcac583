"""Drafts that full depth checks: tokens are those of full depth, or of its distribution."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import talkers
import tiny
from bundles import classifier
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

import offramp
from offramp.bundle import directory
from offramp.errors import InputError, PolicyError
from offramp.runtime import Chain
from offramp.runtime.generation.sampling import Chooser, Sampling
from offramp.runtime.generation.session import Session
from offramp.runtime.generation.speculation import in_last
from offramp.runtime.generation.tokens import Token
from offramp.runtime.policies.builtin import Depth, Each, Never, ShallowDeep, Verify


@pytest.fixture(scope="module")
def chains(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Chain]:
    """The talker for ONNX Runtime's own attention and the standard one, that on a "device", and two causal stacks."""
    root = tmp_path_factory.mktemp("verify")
    return {
        "ort": talkers.talker(root / "ort", "ort"),
        "portable": talkers.talker(root / "portable"),
        "device": Chain(*directory.read(root / "portable"), _device=("cpu", 0)),
        "halves": talkers.written(root / "halves", tiny.Halves, talkers.HALVES, "portable"),
    }


def prompts(least: int = 1) -> st.SearchStrategy[list[list[int]]]:
    prompt = st.lists(st.integers(0, tiny.WORDS - 1), min_size=1, max_size=6)
    return st.lists(prompt, min_size=least, max_size=4)


VERIFY = st.builds(Verify, st.integers(1, 3), st.sampled_from([0.0, 0.2, 0.3, 0.4, 0.6, 1.0]), drafts=st.integers(1, 9))


def rows(tokens: list[Token], count: int) -> list[list[Token]]:
    return [[token for token in tokens if token.row == row] for row in range(count)]


# Greedy


@settings(max_examples=60)
@given(
    target=st.sampled_from(["ort", "portable", "device"]),
    texts=prompts(),
    policy=VERIFY,
    count=st.integers(0, 30),
    stop=st.sets(st.integers(0, tiny.WORDS - 1), max_size=3).map(sorted),
    least=st.integers(0, 4),
)
def test_greedy_tokens_are_those_of_full_depth(
    chains: dict[str, Chain],
    target: str,
    texts: list[list[int]],
    policy: Verify,
    count: int,
    stop: set[int],
    least: int,
) -> None:
    chain, inputs = chains[target], {"input_ids": texts}
    options: dict[str, Any] = {"max_new_tokens": count, "stop": stop, "min_new_tokens": min(least, count)}
    expected = chain.generate(inputs, Never(), **options).tokens
    found = rows(list(chain.stream(inputs, policy, **options)), len(texts))
    for row, wanted in zip(found, expected, strict=True):
        assert [token.token for token in row] == wanted.tolist()
        assert [token.finished for token in row] == [False] * (wanted.size - 1) + [True] * bool(wanted.size)
        assert all(token.exit == token.exits["decoder"] in (policy.after, 4) for token in row)
        drafts = "".join("d" if token.exit == policy.after else "F" for token in row)
        assert "d" * (policy.drafts + 1) not in drafts
        assert all(token.scores["top1"] > policy.threshold for token in row if token.exit == policy.after)


@settings(max_examples=15)
@given(texts=prompts(), after=st.integers(1, 2), drafts=st.integers(1, 5), threshold=st.sampled_from([0.1, 0.2, 0.3]))
def test_the_last_of_two_stacks_verifies(
    chains: dict[str, Chain], texts: list[list[int]], after: int, drafts: int, threshold: float
) -> None:
    """The first has tokens that wait too, and those behind a rejected draft are forgotten there."""
    first, inputs = Depth({"decoder": after}), {"input_ids": texts}
    policy = Each({"decoder": first, "more": Verify(1, threshold, drafts=drafts)})
    expected = chains["halves"].generate(inputs, Each({"decoder": first}), max_new_tokens=25)
    found = chains["halves"].generate(inputs, policy, max_new_tokens=25)
    for row, wanted in zip(found.tokens, expected.tokens, strict=True):
        assert row.tolist() == wanted.tolist()


def test_drafts_are_kept_and_rejected(chains: dict[str, Chain]) -> None:
    """The cases above are not all of one kind."""
    inputs = {"input_ids": [[1], [2], [3, 4]]}
    found = list(chains["portable"].stream(inputs, Verify(3, 0.2, drafts=4), max_new_tokens=40))
    drafted = [token for token in found if token.exit == 3]
    assert 20 < len(drafted) < len(found) - 20
    assert {token.token for token in drafted} != {drafted[0].token}


def test_a_processor_sees_the_text_with_its_drafts(chains: dict[str, Chain]) -> None:
    def no_repeats(tokens: NDArray[np.int64], logits: NDArray[np.float32]) -> NDArray[np.float32]:
        logits[tokens[-3:]] = -np.inf
        return logits

    inputs, options = {"input_ids": [[1, 2, 3], [4]]}, {"max_new_tokens": 30, "processors": (no_repeats,)}
    expected = chains["portable"].generate(inputs, Never(), **options).tokens  # type: ignore[arg-type]
    found = chains["portable"].generate(inputs, Verify(2, 0.2), **options).tokens  # type: ignore[arg-type]
    assert [row.tolist() for row in found] == [row.tolist() for row in expected]


def test_up_to_the_last_place(chains: dict[str, Chain]) -> None:
    inputs = {"input_ids": [[1, 2, 3], [4]]}
    expected = chains["portable"].generate(inputs, Never()).tokens
    found = chains["portable"].generate(inputs, Verify(3, 0.1, drafts=9)).tokens
    assert [row.size for row in found] == [148, 148]
    assert [row.tolist() for row in found] == [row.tolist() for row in expected]


# What the records say


def test_records(chains: dict[str, Chain]) -> None:
    """Everything drafts: rounds of three drafts and full depth's own token, or up to the first that is wrong."""
    policy = Verify(2, 0.0, drafts=3)
    tokens = list(chains["portable"].stream({"input_ids": [[1, 2]]}, policy, max_new_tokens=30))
    assert tokens[0].exit == 4  # the prompt
    rounds: list[list[Token]] = [[]]
    for token in tokens[1:]:
        rounds[-1].append(token)
        if token.trace:
            rounds.append([])
    assert rounds.pop() == []
    assert len(rounds) > 3
    for step in rounds:
        assert [token.exit for token in step[:-1]] == [2] * (len(step) - 1)
        assert [token.caught_up for token in step[:-1]] == [0] * (len(step) - 1)
        assert len({token.milliseconds for token in step}) == 1
        launched = [timing.segment for timing in step[-1].trace]
        assert launched.count("decoder.4") == 1  # all drafts at once
        assert sum(timing.milliseconds for timing in step[-1].trace) < sum(token.milliseconds for token in step)
    for step in rounds[:-3]:  # the last ones have less to draft
        assert step[-1].exit == 4
        assert step[-1].caught_up == 3
        assert [timing.segment for timing in step[-1].trace].count("decoder.1") == 4


def test_what_is_forgotten_is_no_longer_in_the_caches(
    chains: dict[str, Chain], monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[tuple[list[int], int]] = []
    drop = Session.drop

    def watched(run: Session, slots: Any) -> None:
        seen.append(
            (
                run.decoder.seen[:, 0].tolist(),
                sum(run.decoder.waiting.count(at, 0) for at in range(len(run.decoder.spans))),
            )
        )
        drop(run, slots)

    monkeypatch.setattr(Session, "drop", watched)
    tokens = list(chains["portable"].stream({"input_ids": [[1, 2]]}, Verify(2, 0.0, drafts=3), max_new_tokens=20))
    told = [at for at, token in enumerate(tokens, start=1) if token.trace]
    checked = [lengths for lengths, waiting in seen if not waiting]
    assert len(checked) == len(told)
    for at, lengths in zip(told[:-1], checked[:-1], strict=True):
        assert set(lengths) == {2 + at - 1}  # the prompt and what was told, but for the token that comes next


# Drawn


@pytest.mark.slow
def test_drawn_tokens_have_full_depths_distribution(chains: dict[str, Chain]) -> None:
    """Pairs of tokens behind a prompt, against what full depth's probabilities make of them; chi-squared."""
    count, chain, prompt = 2000, chains["portable"], [1, 5]
    options: dict[str, Any] = {"temperature": 1.3, "top_k": 6, "top_p": 0.95, "suppress_first": [7]}
    policy = Verify(2, 0.1, drafts=2)
    drawn = chain.generate({"input_ids": [prompt] * count}, policy, max_new_tokens=4, seed=1, **options)
    assert 0.2 < np.mean([row[1:] == 2 for row in drawn.exits]) < 0.9
    chooser = Chooser(Sampling(**{**options, "suppress_first": (7,)}), tiny.WORDS)

    def chances(text: list[int], emitted: int) -> NDArray[np.float64]:
        logits = chain.run({"input_ids": [text]}, Never()).outputs["output"][0, -1]
        return chooser.chances(np.array(text), logits, emitted)

    first = chances(prompt, 0)
    second = np.stack(
        [chances([*prompt, token], 1) if first[token] else np.zeros(tiny.WORDS) for token in range(tiny.WORDS)]
    )
    expected = np.zeros((tiny.WORDS, tiny.WORDS))
    for one in np.flatnonzero(first):
        for two in np.flatnonzero(second[one]):
            expected[two] += first[one] * second[one, two] * chances([*prompt, int(one), int(two)], 2)
    found = np.zeros_like(expected)
    for row in drawn.tokens:
        found[row[1], row[2]] += 1
    likely = expected * count >= 5
    assert found[expected == 0].sum() == 0
    wanted = np.append(expected[likely] * count, (expected[~likely]).sum() * count)
    seen = np.append(found[likely], found[~likely].sum())
    statistic, freedom = ((seen - wanted) ** 2 / wanted).sum(), wanted.size - 1
    assert freedom > 20
    assert statistic < freedom + 3 * np.sqrt(2 * freedom)
    shallow = chain.generate(
        {"input_ids": [prompt] * count}, ShallowDeep(2, 0.1, "top1"), max_new_tokens=4, seed=1, **options
    )
    biased = np.zeros_like(expected)
    for row in shallow.tokens:
        biased[row[1], row[2]] += 1
    unlike = np.append(biased[likely], biased[~likely].sum())
    assert ((unlike - wanted) ** 2 / wanted).sum() > 2 * statistic + 100  # which the test would have seen


def test_a_row_draws_what_it_draws_alone(chains: dict[str, Chain]) -> None:
    options: dict[str, Any] = {"temperature": 1.0, "seed": 3, "max_new_tokens": 25}
    policy = Verify(3, 0.3)
    together = chains["portable"].generate({"input_ids": [[1, 2], [3], [4]]}, policy, **options).tokens
    alone = chains["portable"].generate({"input_ids": [[1, 2]]}, policy, **options).tokens
    assert together[0].tolist() == alone[0].tolist()


def test_a_draft_that_is_accepted_has_the_true_distribution() -> None:
    chooser = Chooser(Sampling(temperature=1.0, seed=0), 4)
    draft, true = np.array([0.7, 0.3, 0.0, 0.0]), np.array([0.2, 0.3, 0.0, 0.5])
    found = [chooser.accept(0, chooser.draw(0, draft), draft, true) for _ in range(4000)]
    np.testing.assert_allclose(np.bincount(found, minlength=4) / 4000, true, atol=0.025)
    assert {chooser.accept(0, 0, true, true) for _ in range(100)} == {0}


# Refusals


def test_what_cannot_be_verified_is_refused(chains: dict[str, Chain], tmp_path: Path) -> None:
    chain, inputs = chains["portable"], {"input_ids": [[1, 2]]}
    with pytest.raises(PolicyError, match="generates nothing: Verify") as caught:
        chain.run(inputs, Verify(2))
    assert "ShallowDeep" in (caught.value.hint or "")
    with pytest.raises(PolicyError, match="beam search keeps several texts"):
        chain.generate(inputs, Verify(2), beams=2, max_new_tokens=3)
    with pytest.raises(PolicyError, match="only 'more' makes tokens"):
        in_last(Each({"decoder": Verify(1)}), "more")
    with pytest.raises(PolicyError, match="a generation by hand"):
        chain.generator(inputs, Verify(2))
    wrong: list[dict[str, Any]] = [{"propagate": "hidden"}, {"max_pending": 3}]
    for options in wrong:
        with pytest.raises(InputError, match="checked by full depth"):
            chain.stream(inputs, Verify(2), **options)
    with pytest.raises(PolicyError, match="no exit after 4 blocks with the score 'top1'"):
        chain.stream(inputs, Verify(4))
    plain = offramp.load(classifier(tmp_path / "plain"))
    with pytest.raises(PolicyError, match="generates nothing"):
        plain.run({"ids": [[1]]}, Each({"encoder": Verify(1)}))
