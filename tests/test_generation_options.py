"""Options of a generation: what they may be, what a bundle says by itself, and who comes first."""

from __future__ import annotations

from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import talkers
import tiny
from hypothesis import given, settings
from hypothesis import strategies as st

import offramp
from offramp.bundle import directory
from offramp.bundle.manifest import Generation
from offramp.errors import InputError, PolicyError
from offramp.runtime import Chain, Sampling, Verify
from offramp.runtime.generation.defaults import merged
from offramp.runtime.generation.sampling import Chooser

PROMPT = {"input_ids": [[5, 6]]}


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("options") / "talker"
    talkers.talker(root)
    return root


@pytest.fixture(scope="module")
def chain(root: Path) -> Chain:
    return offramp.load(root)


def told(root: Path, **own: Any) -> Chain:
    """The bundle with other ``generation``."""
    manifest, place = directory.read(root)
    return Chain(replace(manifest, generation=Generation(**own)), place)


def tokens(chain: Chain, **options: Any) -> list[list[int]]:
    return [row.tolist() for row in chain.generate(PROMPT, **options).tokens]


# Types

_ATOMS = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-3, 12),
    st.sampled_from([2**40, -(2**70), 10**400]),
    st.floats(),
    st.text(max_size=3),
    st.binary(max_size=2),
    st.integers(-3, 12).map(np.int64),
    st.floats(width=32).map(np.float32),
    st.booleans().map(np.bool_),
    st.just(object()),
)
_VALUES = st.one_of(
    _ATOMS,
    st.lists(_ATOMS, max_size=3),
    st.lists(_ATOMS, max_size=3).map(tuple),
    st.lists(st.lists(st.integers(-1, 12), max_size=2), max_size=2),
    st.lists(st.integers(-1, 12), max_size=3).map(np.array),
    st.dictionaries(st.text(max_size=2), _ATOMS, max_size=2),
    st.sets(st.integers(0, 5)),
)
_NAMES = [field.name for field in fields(Sampling)] + ["propagate", "max_pending", "tokenizer", "num_beams"]


@settings(max_examples=400)
@given(name=st.sampled_from(_NAMES), value=_VALUES, beams=st.sampled_from([1, 2]))
def test_values_of_any_type_give_tokens_or_an_input_error(chain: Chain, name: str, value: Any, beams: int) -> None:
    if name == "beams" and isinstance(value, int) and value > 12:
        return  # whose memory nobody has
    try:
        found = chain.generate(PROMPT, **{"max_new_tokens": 3, "beams": beams, name: value})
    except InputError:
        return
    assert len(found.tokens) == 1


@settings(max_examples=150)
@given(value=st.one_of(_VALUES, st.lists(_VALUES, max_size=2)), whole=st.booleans())
def test_prompts_of_any_type_give_tokens_or_an_input_error(chain: Chain, value: Any, whole: bool) -> None:
    inputs = value if whole else {"input_ids": value}
    try:
        chain.generate(inputs, max_new_tokens=2)
    except InputError:
        return
    assert not whole


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"stop": ("###",)}, r"stop is \('###',\), expected a tuple of token ids, .* \(texts: stop_strings\)"),
        ({"max_new_tokens": "2"}, "max_new_tokens is '2', expected at least 0, a whole number"),
        ({"temperature": "a"}, "temperature is 'a', expected 0"),
        ({"top_k": 1.5}, "top_k is 1.5, expected at least 1, a whole number"),
        ({"top_k": True}, "top_k is True, expected"),
        ({"beams": np.bool_(True)}, "beams is np.True_, expected"),
        ({"stop_strings": "###"}, "stop_strings is '###', expected a tuple of texts"),
        ({"bad_words": [[]]}, r"bad_words is \[\[\]\], expected a tuple of tuples"),
        ({"early_stopping": "always"}, 'expected True, False or "never"'),
        ({"max_pending": "2"}, "max_pending='2': at least 1, a whole number"),
        ({"num_beams": 2}, r"(?s)unknown options \['num_beams'\]; there are .*'beams'.*try: for num_beams, beams$"),
        (
            {"eos_token_id": 2, "do_sample": True},
            r"for do_sample, temperature \(0 is greedy\); for eos_token_id, stop$",
        ),
        ({"temprature": 2}, "for temprature, temperature$"),
        ({"pad_token_id": 0}, "for pad_token_id, nothing: rows end by themselves"),
        ({"stop": [1, tiny.WORDS]}, f"stop has {tiny.WORDS}; token ids end at {tiny.WORDS - 1}"),
        ({"forced_first": tiny.WORDS}, "forced_first has"),
        ({"bad_words": [[3, tiny.WORDS]]}, "bad_words has"),
        ({"stop_strings": ["#"]}, r"stop_strings \['#'\] are text: they need a tokenizer"),
        ({"beams": 2, "temperature": 0.5}, r"(?s)beam search draws no tokens.*try: temperature=0"),
        ({"max_length": 2}, r"the prompt has 2 tokens, and max_length=2 counts them too"),
        ({"max_new_tokens": 9999}, r"(?s)max_new_tokens=9999 after a prompt of 2: the model takes"),
    ],
)
def test_refusals(chain: Chain, options: dict[str, Any], said: str) -> None:
    with pytest.raises(InputError, match=said):
        chain.generate(PROMPT, **options)


def test_inputs_without_names(chain: Chain) -> None:
    with pytest.raises(InputError, match=r"(?s)inputs map names to arrays, this is a list.*'input_ids': \[\["):
        chain.generate([[5]])  # type: ignore[arg-type]


def test_numbers_of_numpy_and_lists(chain: Chain) -> None:
    plain = tokens(chain, stop=(3, 9), max_new_tokens=6, seed=7, temperature=1.0, top_k=4)
    given = {"max_new_tokens": np.int32(6), "seed": np.uint8(7), "temperature": np.float32(1), "top_k": np.int64(4)}
    assert tokens(chain, stop=[3, np.int64(9)], **given) == plain
    assert tokens(chain, stop=np.array([3, 9]), **given) == plain


# What a bundle says by itself


def test_own_options_and_who_comes_first(root: Path, chain: Chain) -> None:
    full = tokens(chain, max_new_tokens=8)
    own = told(root, stop=(full[0][2],), max_new_tokens=8, repetition_penalty=1.5)
    assert tokens(own) == tokens(chain, stop=(full[0][2],), max_new_tokens=8, repetition_penalty=1.5)
    assert tokens(own, repetition_penalty=1.0) == [full[0][: full[0].index(full[0][2]) + 1]]
    assert tokens(own, repetition_penalty=None, stop=None) == full
    assert tokens(own, stop=(), repetition_penalty=1) == full


def test_own_draws_are_left_by_temperature_0(root: Path, chain: Chain) -> None:
    own = told(root, temperature=5.0, top_k=9, max_length=9)
    assert tokens(own, temperature=0) == tokens(chain, max_new_tokens=7)
    assert len({str(tokens(own)) for _ in range(5)}) > 1
    with pytest.raises(InputError, match=r"(?s)beams=2 with temperature=5.0.*temperature=0"):
        own.generate(PROMPT, beams=2)


def test_own_beams(root: Path, chain: Chain) -> None:
    own = told(root, beams=3, max_new_tokens=5, length_penalty=0.5)
    found, wanted = own.generate(PROMPT), chain.generate(PROMPT, beams=3, max_new_tokens=5, length_penalty=0.5)
    assert found.tokens[0].tolist() == wanted.tokens[0].tolist()
    assert found.scores == wanted.scores
    assert tokens(own, beams=1) == tokens(chain, max_new_tokens=5)
    with pytest.raises(InputError, match=r"(?s)the bundle's own beams=3: .* not one by one.*try: beams=1; or generate"):
        own.stream(PROMPT)
    with pytest.raises(InputError, match=r"^beams=2: beam search"):
        chain.stream(PROMPT, beams=2)
    assert len(list(own.stream(PROMPT, beams=1))) == 5
    with pytest.raises(PolicyError, match="beams=1"):
        own.generate(PROMPT, Verify(1))
    with pytest.raises(InputError, match=r"(?s)beams=3 with temperature=1.0.*try: beams=1"):
        own.generate(PROMPT, temperature=1.0)


def test_own_ids_that_the_vocabulary_lacks_are_never_chosen_anyway(root: Path, chain: Chain) -> None:
    own = told(root, stop=(50256,), suppress=(3, 99), bad_words=((4, 77), (2,)), max_new_tokens=6)
    assert tokens(own) == tokens(chain, suppress=(3,), bad_words=((2,),), max_new_tokens=6)


def sampling(own: dict[str, Any], longest: int = 1, room: int | None = None, **options: Any) -> Sampling:
    return merged(Generation(**own), options, longest, tiny.WORDS, room)


def test_lengths() -> None:
    assert sampling({}).max_new_tokens == 256
    assert sampling({}, 4, 10).max_new_tokens == 7
    assert sampling({"max_length": 12}, 5).max_new_tokens == 7
    assert sampling({"max_length": 12}, 5, 10).max_new_tokens == 6
    assert sampling({"max_length": 12, "max_new_tokens": 3}, 5).max_new_tokens == 3
    assert sampling({"max_new_tokens": 3}, 5, max_length=9).max_new_tokens == 4
    assert sampling({"max_length": 4}, 5, max_new_tokens=2).max_new_tokens == 2
    assert sampling({"max_length": 9}, 5, 20, max_length=None).max_new_tokens == 16
    assert sampling({"min_length": 9}, 5).min_new_tokens == 4
    assert sampling({"min_length": 9, "min_new_tokens": 1}, 5).min_new_tokens == 1
    assert sampling({"min_length": 9}, 5, min_new_tokens=0).min_new_tokens == 0
    assert sampling({"min_length": 56}, 1, max_new_tokens=10).min_new_tokens == 10
    assert sampling({"min_new_tokens": 56}, 1, max_new_tokens=10).min_new_tokens == 10
    with pytest.raises(InputError, match="max_length=5 counts them too"):
        sampling({"max_length": 5}, 5)


def test_forced_first_is_for_prompts_of_one_token() -> None:
    assert sampling({"forced_first": 3}).forced_first == 3
    assert sampling({"forced_first": 3}, 2).forced_first is None


def test_what_is_forced_and_what_is_not_taken() -> None:
    options: dict[str, Any] = {"forced_first": 3, "forced_last": (5, 4), "suppress_first": (2,), "max_new_tokens": 4}
    chooser = Chooser(Sampling(**options, bad_words=((6,),), stop=(5,), min_new_tokens=4), tiny.WORDS)
    logits = np.zeros((4, tiny.WORDS), np.float32)
    logits[:, [6, 2, 5]] = 9, 8, 10
    assert chooser.choose_all(logits, np.arange(4)).tolist() == [3, 0, 2, 4]
    assert [chooser.choose(0, np.array([1]), logits[0], at) for at in range(4)] == [3, 0, 2, 4]
    taken = [[token for token in range(7) if chooser.takes(token, at)] for at in range(4)]
    assert taken == [[3], [0, 1, 3, 4], [0, 1, 2, 3, 4], [4]]


@pytest.mark.parametrize(
    "options",
    [
        {"repetition_penalty": 1.4, "no_repeat_ngram_size": 2},
        {"forced_last": (3,), "bad_words": ((1, 2), (7,))},
        {"forced_first": 4, "suppress_first": (1,), "min_length": 5, "stop": (2, 8)},
    ],
)
def test_policies_keep_to_the_options(chain: Chain, options: dict[str, Any]) -> None:
    """Drafts that full depth checks are its own tokens, whatever looks at the text."""
    for prompt in ([[5]], [[1], [2], [3]], [[5, 6], [1]]):
        inputs = {"input_ids": prompt}
        expected = chain.generate(inputs, offramp.Never(), max_new_tokens=9, **options).tokens
        found = chain.generate(inputs, Verify(2, 0.2, drafts=3), max_new_tokens=9, **options).tokens
        assert [row.tolist() for row in found] == [row.tolist() for row in expected]
