"""Tokens by every option of a generation, greedy and by beams, against ``generate`` of transformers."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import tiny
import tokenizers
import torch
import transformers
from numpy.typing import NDArray

import offramp
from offramp.bundle import directory
from offramp.bundle.json_text import section
from offramp.bundle.manifest import Generation
from offramp.errors import InputError
from offramp.runtime import Chain, Never
from offramp.runtime.generation.beams import search
from offramp.runtime.generation.defaults import merged
from offramp.runtime.generation.generator import stream
from offramp.runtime.generation.results import RowResult, StepResult
from offramp.runtime.generation.sampling import Chooser
from offramp.runtime.generation.stopping import Ends

WORDS, PAD = 41, 3
NAMES = {
    "stop": "eos_token_id",
    "suppress": "suppress_tokens",
    "suppress_first": "begin_suppress_tokens",
    "forced_first": "forced_bos_token_id",
    "forced_last": "forced_eos_token_id",
    "bad_words": "bad_words_ids",
    "beams": "num_beams",
}
_SMALL: dict[str, Any] = {
    "vocab_size": WORDS,
    "pad_token_id": PAD,
    "bos_token_id": 1,
    "eos_token_id": None,
    "tie_word_embeddings": False,
}


def _gpt2() -> Any:
    return transformers.GPT2LMHeadModel(
        transformers.GPT2Config(n_embd=16, n_layer=2, n_head=2, n_positions=64, initializer_range=0.4, **_SMALL)
    )


def _t5() -> Any:
    return transformers.T5ForConditionalGeneration(
        transformers.T5Config(
            d_model=16, d_kv=8, d_ff=32, num_layers=2, num_heads=2, decoder_start_token_id=PAD,
            initializer_factor=2.0, **_SMALL,
        )
    )  # fmt: skip


def _bart() -> Any:
    sides = {f"{side}_{what}": 2 for side in ("encoder", "decoder") for what in ("layers", "attention_heads")}
    return transformers.BartForConditionalGeneration(
        transformers.BartConfig(
            d_model=16, encoder_ffn_dim=32, decoder_ffn_dim=32, max_position_embeddings=64, init_std=0.8,
            decoder_start_token_id=2, forced_eos_token_id=None, **sides, **_SMALL,
        )
    )  # fmt: skip


def _whisper() -> Any:
    sides = {f"{side}_{what}": 2 for side in ("encoder", "decoder") for what in ("layers", "attention_heads")}
    sides |= {"encoder_ffn_dim": 32, "decoder_ffn_dim": 32, "max_source_positions": 10, "max_target_positions": 64}
    return transformers.WhisperForConditionalGeneration(
        transformers.WhisperConfig(
            d_model=16, num_mel_bins=4, decoder_start_token_id=2, init_std=0.4,
            suppress_tokens=None, begin_suppress_tokens=None, **sides, **_SMALL,
        )
    )  # fmt: skip


MODELS: Mapping[str, Callable[[], Any]] = {"gpt2": _gpt2, "t5": _t5, "bart": _bart, "whisper": _whisper}

#: In offramp's names. Stops are likely, so that rows and beams end at different lengths.
TABLE: Sequence[dict[str, Any]] = [
    {"max_new_tokens": 12},
    {"stop": [26], "max_length": 16},
    {"stop": [5, 33, 19], "max_new_tokens": 14, "length_penalty": 2.0, "early_stopping": True},
    {"stop": [35, 8, 23], "max_new_tokens": 14, "length_penalty": -1.0, "early_stopping": "never"},
    {"stop": [5, 9, 18, 33], "max_new_tokens": 14, "length_penalty": 0.6, "early_stopping": "never", "beams": 3},
    {"stop": [9, 33, 11], "min_length": 9, "max_new_tokens": 12, "repetition_penalty": 1.7},
    {"stop": [30, 5, 16], "min_new_tokens": 4, "max_length": 18, "repetition_penalty": 0.6, "length_penalty": 0.0},
    {"stop": [9, 8, 7], "no_repeat_ngram_size": 2, "max_new_tokens": 15, "early_stopping": True},
    {"stop": [20, 21], "no_repeat_ngram_size": 1, "max_new_tokens": 12, "beams": 2},
    {"stop": [6, 16, 26], "bad_words": [[4], [6], [10, 12], [8, 8], [17, 1, 5]], "max_new_tokens": 12},
    {"stop": [6, 16, 26, 36], "forced_first": 22, "forced_last": [16], "suppress_first": [1, 8], "max_new_tokens": 8},
    {"forced_last": [9], "suppress": [10, 11, 12], "suppress_first": [14, 17, 25], "max_length": 13, "beams": 5},
    {"stop": [1, 15, 29], "repetition_penalty": 1.2, "no_repeat_ngram_size": 3, "min_length": 12, "bad_words": [[2, 2]],
     "forced_last": [15], "max_length": 17, "length_penalty": 1.4, "beams": 6},
]  # fmt: skip


class TorchSession:
    """What generation reads of a `Session`, with a model of transformers that reads each text anew."""

    def __init__(
        self, logits: Callable[[int, list[int]], NDArray[np.float32]], prompts: list[Any], sampling: Any
    ) -> None:
        self.sampling, self.ends, self.policy = sampling, Ends(sampling.stop), Never()
        self.plan = SimpleNamespace(output="logits", stacks=["decoder"], vocabulary=WORDS)
        self.prompts, self.rows = prompts, list(range(len(prompts)))
        self._logits = logits
        self._texts: list[tuple[int, list[int]]] = [(row, []) for row in self.rows]

    def freely(self, tokens: NDArray[np.bool_]) -> None:
        """It runs one token at a time."""

    def step(self, tokens: Sequence[NDArray[np.int64]], wanted: Any = None, most: int = 1) -> StepResult:
        found = []
        for slot, new in enumerate(tokens):
            row, text = self._texts[slot]
            self._texts[slot] = row, [*text, *new.tolist()]
            found.append(RowResult(slot, {"logits": self._logits(*self._texts[slot])}, {"decoder": 2}, {}, {}))
        return StepResult(found, (), 0)

    def rearrange(self, sources: Sequence[int]) -> None:
        self._texts = [self._texts[source] for source in sources]

    def drop(self, slots: Sequence[int]) -> None:
        self.rows = [row for slot, row in enumerate(self.rows) if slot not in slots]
        self._texts = [text for slot, text in enumerate(self._texts) if slot not in slots]


class Case:
    """A model, what it reads for each of three rows, and the prompts, as rows and as transformers takes them."""

    def __init__(self, name: str) -> None:
        self.model = tiny.seeded(MODELS[name])
        random = torch.Generator().manual_seed(4)
        self.prompts = [[4, 17, 8], [21], [13, 5, 5, 30, 2]]
        self.alone: list[dict[str, torch.Tensor]] = [{} for _ in self.prompts]
        if name == "gpt2":
            return
        self.prompts = [[self.model.config.decoder_start_token_id]] * 3
        if name == "whisper":
            self.alone = [{"input_features": torch.randn(1, 4, 20, generator=random)} for _ in range(3)]
        else:
            self.alone = [{"input_ids": torch.randint(4, WORDS, (1, size), generator=random)} for size in (6, 3, 9)]

    def logits(self, row: int, text: list[int]) -> NDArray[np.float32]:
        name = "decoder_input_ids" if self.alone[row] else "input_ids"
        with torch.no_grad():
            found = self.model(**self.alone[row], **{name: torch.tensor([text])}, use_cache=False).logits[0, -1]
        return np.asarray(found.float().numpy())

    def padded(self, rows: Sequence[int]) -> dict[str, torch.Tensor]:
        """Rows of different lengths beside padding: before prompts, behind what an encoder reads."""
        if "input_features" in self.alone[0]:
            return {"input_features": torch.cat([self.alone[row]["input_features"] for row in rows])}
        texts = [self.alone[row]["input_ids"][0].tolist() if self.alone[row] else self.prompts[row] for row in rows]
        width, left = max(map(len, texts)), not self.alone[0]
        gaps = [[PAD] * (width - len(text)) for text in texts]
        ids = [gap + text if left else text + gap for gap, text in zip(gaps, texts, strict=True)]
        masks = [[0] * len(gap) + [1] * len(text) for gap, text in zip(gaps, texts, strict=True)]
        mask = torch.tensor(masks if left else [one[::-1] for one in masks])
        return {"input_ids": torch.tensor(ids), "attention_mask": mask}

    def theirs(self, rows: Sequence[int], options: Mapping[str, Any]) -> tuple[list[list[int]], list[float] | None]:
        """New tokens up to the end, and beam search's scores."""
        given = {NAMES.get(name, name): value for name, value in options.items()}
        given["suppress_tokens"] = [*given.get("suppress_tokens", ()), PAD]  # so that padding tells where a row ends
        start = getattr(self.model.config, "decoder_start_token_id", None)
        config = transformers.GenerationConfig(
            pad_token_id=PAD, decoder_start_token_id=start, do_sample=False, output_scores=True,
            return_dict_in_generate=True, **given,
        )  # fmt: skip
        self.model.generation_config = config
        inputs = self.padded(rows)
        generate = self.model.generate
        if "input_features" in inputs:  # Whisper's own is for long sound
            generate = transformers.GenerationMixin.generate.__get__(self.model)
        with torch.no_grad():
            made = generate(**inputs)
        skipped = 1 if self.alone[0] else inputs["input_ids"].shape[1]
        texts = [row[skipped:].tolist() for row in made.sequences]
        scores = getattr(made, "sequences_scores", None)
        return [text[: text.index(PAD)] if PAD in text else text for text in texts], (
            None if scores is None else scores.tolist()
        )

    def ours(self, rows: Sequence[int], options: Mapping[str, Any]) -> tuple[list[list[int]], Sequence[float]]:
        generation = section(Generation, {**options, "suppress": [*options.get("suppress", ()), PAD]})
        prompts = [np.array(self.prompts[row]) for row in rows]
        sampling = merged(generation, {}, max(map(len, prompts)), WORDS)
        run: Any = TorchSession(lambda row, text: self.logits(rows[row], text), prompts, sampling)
        if sampling.beams > 1:
            found = search(run)
            return [row.tolist() for row in found.tokens], found.scores
        texts: list[list[int]] = [[] for _ in rows]
        for token in stream(run):
            texts[token.row].append(token.token)
        return texts, ()


@functools.cache
def case(name: str) -> Case:
    return Case(name)


CASES = [("gpt2", at) for at in range(len(TABLE))]  # a third of the table for each of the others
CASES += [(name, at) for first, name in enumerate(("t5", "bart", "whisper")) for at in range(first, len(TABLE), 3)]


@pytest.mark.parametrize("beams", [1, 4])
@pytest.mark.parametrize(("name", "at"), CASES)
def test_tokens(name: str, at: int, beams: int) -> None:
    options = dict(TABLE[at])
    options["beams"] = options.get("beams", beams) if beams > 1 else 1
    for rows in ([0], [0, 1, 2]):
        expected, scores = case(name).theirs(rows, options)
        found, own = case(name).ours(rows, options)
        assert found == expected, rows
        assert scores is None or own == pytest.approx(scores, rel=1e-4, abs=1e-4)


class Logits(torch.nn.Module):
    """A model of transformers as a function of its tokens, of sources and their masks."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        decoder_input_ids: torch.Tensor | None = None,
    ) -> torch.Tensor:
        given = {"input_ids": input_ids, "attention_mask": attention_mask, "decoder_input_ids": decoder_input_ids}
        found: torch.Tensor = self.model(**{k: v for k, v in given.items() if v is not None}, use_cache=False).logits
        return found


@pytest.fixture(scope="module", params=["gpt2", "bart"])
def bundled(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Case, Path]:
    """A case and its bundle."""
    made = case(request.param)
    ids = torch.randint(4, WORDS, (2, 7), generator=torch.Generator().manual_seed(1))
    inputs = {"input_ids": ids}
    if request.param == "bart":
        inputs |= {"attention_mask": torch.ones_like(ids), "decoder_input_ids": ids[:, :5]}
    path = tmp_path_factory.mktemp("generation") / request.param
    offramp.save(offramp.apply(offramp.capture(Logits(made.model), inputs), "insert-cache"), path, segments=1)
    return made, path


@pytest.mark.parametrize("at", [3, 7, 10, 12])
def test_bundles_choose_by_themselves(bundled: tuple[Case, Path], at: int) -> None:
    """Without options, by what the manifest says; ``beams=1`` and ``temperature=0`` are greedy."""
    made, path = bundled
    told = {**TABLE[at], "beams": 3}
    read = directory.read(path)
    chain = Chain(replace(read[0], generation=section(Generation, {**told, "suppress": [PAD]})), read[1])
    for rows in ([0], [0, 1, 2]):
        inputs: dict[str, Any] = {"input_ids": [made.prompts[row] for row in rows]}
        if made.alone[0]:
            inputs = {name: value.numpy() for name, value in made.padded(rows).items()}
            inputs["decoder_input_ids"] = [made.prompts[row] for row in rows]
        expected, scores = made.theirs(rows, told)
        found = chain.generate(inputs)
        assert [row.tolist() for row in found.tokens] == expected
        assert list(found.scores) == pytest.approx(scores, rel=1e-4, abs=1e-4)
        greedy = [row.tolist() for row in chain.generate(inputs, beams=1, temperature=0).tokens]
        assert greedy == made.theirs(rows, {**told, "beams": 1})[0]


def test_the_table_says_something() -> None:
    """Each option changes the text, and rows end at different lengths."""
    plain = case("gpt2").ours([0, 1, 2], {"max_new_tokens": 14})[0]
    for at, options in enumerate(TABLE[1:]):
        found, _ = case("gpt2").ours([0, 1, 2], {**options, "beams": 1})
        assert found != plain, at
    assert len({len(row) for row in case("gpt2").ours([0, 1, 2], TABLE[2])[0]}) > 1


def test_of_several_last_tokens_the_first_of_equals() -> None:
    options = {"forced_last": [9, 4], "max_new_tokens": 5}
    assert case("gpt2").ours([0], options)[0] == case("gpt2").theirs([0], options)[0]


WARPERS = [
    {"temperature": 0.7},
    {"temperature": 1.8, "top_k": 5},
    {"temperature": 0.5, "top_p": 0.8},
    {"temperature": 1.0, "min_p": 0.3},
    {"temperature": 1.5, "top_k": 9, "top_p": 0.9, "min_p": 0.2},
    {"temperature": 0.9, "top_k": 7, "repetition_penalty": 1.6, "no_repeat_ngram_size": 2, "bad_words": [[5], [3, 3]]},
]


@pytest.mark.parametrize("options", WARPERS)
def test_chances(options: dict[str, Any]) -> None:
    """What is drawn from is what is left by transformers' processors and warpers, in their order."""
    given = {NAMES.get(name, name): value for name, value in options.items()}
    config = transformers.GenerationConfig(**{"top_k": None, **given}, do_sample=True, max_length=99, pad_token_id=PAD)
    config._eos_token_tensor = None
    text = torch.tensor([[3, 7, 3, 9, 3]])
    processors = case("gpt2").model._get_logits_processor(config, input_ids_seq_length=5, device="cpu")
    sampling = merged(section(Generation, options), {}, 5, WORDS)
    random = np.random.default_rng(0)
    for _ in range(20):
        logits = random.normal(0, 2, WORDS).astype(np.float32)
        expected = processors(text, torch.from_numpy(logits)[None]).softmax(-1)[0].numpy()
        found = Chooser(sampling, WORDS).chances(text[0].numpy(), logits, 0)
        assert (found > 0).tolist() == (expected > 0).tolist()
        np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-6)


# Texts that end a row


def _tokenizer(kind: str) -> Any:
    letters = "ab#é\n xy"
    if kind == "bytes":
        level = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
        signs = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
        merges = [("a", "b"), ("#", "#"), ("##", "#"), ("Ġ", "x"), ("ab", "##")]
        vocabulary = {sign: at for at, sign in enumerate([*signs, *(a + b for a, b in merges)])}
        made = tokenizers.Tokenizer(tokenizers.models.BPE(vocabulary, merges))
        made.pre_tokenizer, made.decoder = level, tokenizers.decoders.ByteLevel()
    else:
        pieces = [*"abcdef#éxy", "▁", "▁x", "##", "b#", "▁ab"]
        made = tokenizers.Tokenizer(tokenizers.models.Unigram([("<unk>", -9.0), *((p, -1.0) for p in pieces)], 0))
        made.pre_tokenizer, made.decoder = tokenizers.pre_tokenizers.Metaspace(), tokenizers.decoders.Metaspace()
    made.add_special_tokens(["</s>"])
    ids = sorted({id_ for sign in letters for id_ in made.encode(sign).ids} | {*range(made.get_vocab_size())[-7:]})
    return transformers.PreTrainedTokenizerFast(tokenizer_object=made, eos_token="</s>"), made, ids


@pytest.mark.parametrize("kind", ["bytes", "pieces"])
@pytest.mark.parametrize("strings", [["###"], ["ab#", " x"], ["é"], ["#", "xy"], ["</s>"], ["b##a"]])
def test_texts_that_end_a_row(kind: str, strings: list[str]) -> None:
    theirs, made, ids = _tokenizer(kind)
    criterion = transformers.StopStringCriteria(theirs, strings)
    random = np.random.default_rng(1)
    seen = set()
    for ends in (Ends((), strings, made), Ends((), strings, theirs)):
        for _ in range(60):
            text = random.choice(ids, 9).tolist()
            for length in range(1, 10):
                expected = bool(criterion(torch.tensor([text[:length]]), None))
                assert ends(text[:length]) == expected, (text[:length], made.decode(text[:length]))
                seen.add(expected)
    assert seen == {True, False}


def test_texts_need_a_tokenizer() -> None:
    for tokenizer in (None, 3, len):
        with pytest.raises(InputError, match=r"stop_strings \['#'\] are text: they need a tokenizer"):
            Ends((1,), ["#"], tokenizer)
    assert Ends((1,))([3, 1])
    assert not Ends((1,))([1, 3])
