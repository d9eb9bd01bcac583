"""A generation_config as a bundle's settings: what is read, what `model.generate` does unasked, what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from offramp.errors import PretrainedModelError
from offramp.pretrained import generation_config

torch.manual_seed(0)
GPT = transformers.GPT2LMHeadModel(
    transformers.GPT2Config(
        n_layer=1, n_embd=8, n_head=2, vocab_size=40, n_positions=32, bos_token_id=1, eos_token_id=2, pad_token_id=3
    )
)
BART = transformers.BartForConditionalGeneration(
    transformers.BartConfig(
        d_model=8,
        encoder_layers=1,
        decoder_layers=1,
        encoder_attention_heads=2,
        decoder_attention_heads=2,
        encoder_ffn_dim=8,
        decoder_ffn_dim=8,
        vocab_size=40,
        max_position_embeddings=32,
        decoder_start_token_id=2,
    )
)
WHISPER = transformers.WhisperForConditionalGeneration(
    transformers.WhisperConfig(
        d_model=8,
        encoder_layers=1,
        decoder_layers=1,
        encoder_attention_heads=2,
        decoder_attention_heads=2,
        encoder_ffn_dim=8,
        decoder_ffn_dim=8,
        vocab_size=40,
        num_mel_bins=8,
        max_source_positions=16,
        max_target_positions=24,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        decoder_start_token_id=3,
        suppress_tokens=None,
        begin_suppress_tokens=None,
    )
)
LANGUAGES = {"lang_to_id": {"<|en|>": 10, "<|de|>": 11}, "task_to_id": {"transcribe": 20, "translate": 21}}


def read(model: Any, *ignore: str, **settings: Any) -> dict[str, Any]:
    """The bundle's settings of the model with this generation_config."""
    model.generation_config = transformers.GenerationConfig(**settings)
    return generation_config.generation(model, ignore)


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"eos_token_id": [0, 4]}, {"stop": [0, 4], "pad": 0}),
        ({"eos_token_id": 4, "pad_token_id": 7}, {"stop": [4], "pad": 7}),
        ({"eos_token_id": -1, "pad_token_id": -1}, {}),
        ({"bos_token_id": 1, "decoder_start_token_id": 5}, {"prompt": [1]}),
        ({"suppress_tokens": [5, 6], "begin_suppress_tokens": [7]}, {"suppress": [5, 6], "suppress_first": [7]}),
        ({"forced_bos_token_id": 5, "forced_eos_token_id": 2}, {"forced_first": 5, "forced_last": [2]}),
        ({"forced_eos_token_id": [2, 3]}, {"forced_last": [2, 3]}),
        ({"bad_words_ids": [[5, 6], [2]], "eos_token_id": 2}, {"bad_words": [[5, 6]], "stop": [2], "pad": 2}),
        (
            {"repetition_penalty": 1.3, "no_repeat_ngram_size": 2},
            {"repetition_penalty": 1.3, "no_repeat_ngram_size": 2},
        ),
        ({"repetition_penalty": 1.0, "no_repeat_ngram_size": 0}, {}),
        ({"stop_strings": "###"}, {"stop_strings": ["###"]}),
        ({"num_beams": 3, "length_penalty": 2.0}, {"beams": 3, "length_penalty": 2.0}),
        ({"num_beams": 2, "early_stopping": "never"}, {"beams": 2, "early_stopping": "never"}),
        ({"num_beams": 2, "early_stopping": True}, {"beams": 2, "early_stopping": True}),
    ],
)
def test_reads(settings: dict[str, Any], expected: dict[str, Any]) -> None:
    assert read(GPT, **settings) == {"temperature": 0.0, "max_new_tokens": 20} | expected


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({}, {"max_new_tokens": 20}),
        ({"max_length": 9}, {"max_length": 9}),
        ({"max_length": 9, "max_new_tokens": 5}, {"max_new_tokens": 5}),
        ({"max_length": 9, "min_length": 3}, {"max_length": 9, "min_length": 3}),
        ({"max_length": 9, "min_length": 3, "min_new_tokens": 2}, {"max_length": 9, "min_new_tokens": 2}),
        ({"max_length": 9, "min_length": 0}, {"max_length": 9}),
    ],
)
def test_lengths(settings: dict[str, Any], expected: dict[str, Any]) -> None:
    assert read(GPT, **settings) == {"temperature": 0.0} | expected


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"temperature": 0.5, "top_k": 3, "top_p": 0.9, "min_p": 0.1}, {"temperature": 0.0}),
        ({"do_sample": True}, {"temperature": 1.0, "top_k": 50}),
        (
            {"do_sample": True, "temperature": 0.5, "top_k": 3, "top_p": 0.9, "min_p": 0.1},
            {"temperature": 0.5, "top_k": 3, "top_p": 0.9, "min_p": 0.1},
        ),
        ({"do_sample": True, "top_k": 0, "top_p": 1.0}, {"temperature": 1.0}),
    ],
)
def test_greedy_unless_told_to_draw(settings: dict[str, Any], expected: dict[str, Any]) -> None:
    assert read(GPT, max_new_tokens=4, **settings) == {"max_new_tokens": 4} | expected


def test_an_encoder_decoder_starts_with_its_start_token() -> None:
    assert read(BART, decoder_start_token_id=2, bos_token_id=0)["prompt"] == [2]
    assert read(BART, bos_token_id=0)["prompt"] == [0]


def test_settings_in_the_model_configuration_count_where_there_is_no_generation_config(tmp_path: Path) -> None:
    GPT.save_pretrained(tmp_path)
    (tmp_path / "generation_config.json").unlink()
    model = transformers.GPT2LMHeadModel.from_pretrained(tmp_path)
    found = generation_config.generation(model)
    assert (found["stop"], found["pad"], found["prompt"]) == ([2], 3, [1])


@pytest.mark.parametrize(
    "settings",
    [
        {"no_timestamps_token_id": 30},
        {"forced_decoder_ids": [[1, 10], [2, 20], [3, 30]], "no_timestamps_token_id": 30},
        {"forced_decoder_ids": [[1, None], [2, 20]], "no_timestamps_token_id": 30},
        {**LANGUAGES, "language": "de", "no_timestamps_token_id": 30},
        {**LANGUAGES, "language": "<|de|>", "task": "translate"},
        {**LANGUAGES, "language": "German"},
        {**LANGUAGES, "forced_decoder_ids": [[1, 10], [2, 21]]},
        {"task_to_id": LANGUAGES["task_to_id"], "task": "translate", "no_timestamps_token_id": 30},
        {},
    ],
)
def test_prompts_from_tables(settings: dict[str, Any]) -> None:
    found = read(WHISPER, decoder_start_token_id=3, **settings)
    config = transformers.GenerationConfig(decoder_start_token_id=3, **settings)
    config.return_timestamps = None
    expected = WHISPER._retrieve_init_tokens(torch.zeros(1, 8, 32), 1, config, WHISPER.config, 32, {})
    assert found["prompt"] == expected[0].tolist()


def test_a_prompt_from_a_table_does_not_count_for_the_greatest_length() -> None:
    table = {"decoder_start_token_id": 3, "no_timestamps_token_id": 30}
    assert read(WHISPER, max_length=7, **table)["max_length"] == 9
    assert read(WHISPER, max_length=448, **table)["max_length"] == 24
    assert read(WHISPER, **table)["max_length"] == 22


def test_a_language_that_has_to_be_detected_is_refused() -> None:
    with pytest.raises(PretrainedModelError, match=r'(?s)lang_to_id.*try: "language": "en", say, in generation_config'):
        read(WHISPER, decoder_start_token_id=3, forced_decoder_ids=[[1, None], [2, 20]], **LANGUAGES)
    found = read(WHISPER, "lang_to_id", decoder_start_token_id=3, forced_decoder_ids=[[1, None], [2, 20]], **LANGUAGES)
    assert found["prompt"] == [3, 20]


UNSAID: list[tuple[str, dict[str, Any]]] = [
    ("num_beam_groups", {"num_beams": 4, "num_beam_groups": 2, "diversity_penalty": 0.5}),
    ("diversity_penalty", {"num_beams": 4, "num_beam_groups": 2, "diversity_penalty": 0.5}),
    ("penalty_alpha", {"penalty_alpha": 0.6, "top_k": 4}),
    ("typical_p", {"do_sample": True, "typical_p": 0.5}),
    ("epsilon_cutoff", {"do_sample": True, "epsilon_cutoff": 3e-4}),
    ("eta_cutoff", {"do_sample": True, "eta_cutoff": 3e-4}),
    ("do_sample", {"do_sample": True, "num_beams": 2}),
    ("renormalize_logits", {"renormalize_logits": True, "num_beams": 2}),
    ("num_return_sequences", {"num_return_sequences": 2, "num_beams": 2}),
    ("exponential_decay_length_penalty", {"exponential_decay_length_penalty": (5, 1.5)}),
    ("sequence_bias", {"sequence_bias": [[[4], -1.0]]}),
    ("guidance_scale", {"guidance_scale": 1.5}),
    ("encoder_no_repeat_ngram_size", {"encoder_no_repeat_ngram_size": 2}),
    ("encoder_repetition_penalty", {"encoder_repetition_penalty": 1.5}),
    ("watermarking_config", {"watermarking_config": {"bias": 2.5}}),
    ("dola_layers", {"dola_layers": "low"}),
    ("force_words_ids", {"force_words_ids": [[5]], "num_beams": 2}),
    ("return_timestamps", {"return_timestamps": True}),
]


@pytest.mark.parametrize(("name", "settings"), UNSAID)
def test_what_a_bundle_cannot_say_is_refused_by_name(name: str, settings: dict[str, Any]) -> None:
    with pytest.raises(PretrainedModelError, match=f"{name} = .*(\n.*)*--ignore-generation {name}"):
        read(GPT, **settings)


def test_ignored_settings_count_as_not_set() -> None:
    settings = {"num_beams": 4, "num_beam_groups": 2, "diversity_penalty": 0.5}
    assert read(GPT, "num_beam_groups", "diversity_penalty", **settings)["beams"] == 4
    assert "stop" not in read(GPT, "eos_token_id", eos_token_id=4)
    assert read(GPT, "do_sample", do_sample=True)["temperature"] == 0.0


def test_a_name_that_is_no_setting_is_refused() -> None:
    with pytest.raises(PretrainedModelError, match=r"no beems(\n.*)*num_beams"):
        read(GPT, "beems", num_beams=2)


@pytest.mark.parametrize(
    "settings",
    [
        {"typical_p": 0.5, "epsilon_cutoff": 3e-4},  # of sampling, which is off
        {"renormalize_logits": True},  # the likeliest stays so
        {"use_cache": False, "cache_implementation": "static"},
        {"output_scores": True, "return_dict_in_generate": True},
        {"prompt_lookup_num_tokens": 3},
        {"a_setting_of_somebody": 5},
    ],
)
def test_what_changes_no_token_is_left_out(settings: dict[str, Any]) -> None:
    assert read(GPT, **settings) == {"temperature": 0.0, "max_new_tokens": 20}


def test_a_model_that_does_not_generate_has_no_settings() -> None:
    config = transformers.BertConfig(
        num_hidden_layers=1, hidden_size=8, num_attention_heads=2, intermediate_size=8, vocab_size=20
    )
    assert generation_config.generation(transformers.BertModel(config)) == {}


class OwnRules(transformers.GPT2LMHeadModel):  # type: ignore[misc]
    def generate(self, *args: Any, **options: Any) -> Any:
        return super().generate(*args, bos_token_id=7, **options)


def test_a_class_with_a_generate_of_its_own_is_known() -> None:
    assert generation_config.is_all(GPT)
    assert not generation_config.is_all(OwnRules(GPT.config))
    WHISPER.generation_config = transformers.GenerationConfig(no_timestamps_token_id=30)
    assert generation_config.is_all(WHISPER)
