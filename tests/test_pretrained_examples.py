"""Example inputs of hf: models: what the forward, the configuration and the processors ask for."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from offramp import errors, models
from offramp.pretrained.example_inputs import Listed, example_inputs

Shapes = dict[str, tuple[int, ...]]

SIZES = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
IMAGES = {"image_size": 32, "patch_size": 16}
MARKS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
LLAMA = {"vocab_size": 60, "max_position_embeddings": 64, "num_key_value_heads": 2, **SIZES}
BART = {
    "vocab_size": 60,
    "d_model": 16,
    "encoder_layers": 1,
    "decoder_layers": 1,
    "encoder_attention_heads": 2,
    "decoder_attention_heads": 2,
    "encoder_ffn_dim": 32,
    "decoder_ffn_dim": 32,
    "max_position_embeddings": 64,
    "decoder_start_token_id": 2,
    **MARKS,
}
T5 = {"vocab_size": 60, "d_model": 16, "d_kv": 8, "d_ff": 32, "num_layers": 1, "num_heads": 2}
WAVES = {
    "vocab_size": 30,
    "conv_dim": (16, 16),
    "conv_stride": (10, 8),
    "conv_kernel": (10, 8),
    "num_conv_pos_embeddings": 4,
    "num_conv_pos_embedding_groups": 2,
    **SIZES,
}
MOONSHINE = {
    "vocab_size": 60,
    "hidden_size": 16,
    "intermediate_size": 32,
    "decoder_start_token_id": 1,
    **{f"{part}_num_{what}": 2 for part in ("encoder", "decoder") for what in ("attention_heads", "key_value_heads")},
    **{f"{part}_num_hidden_layers": 1 for part in ("encoder", "decoder")},
    **MARKS,
}
BLIP = {
    "text_config": {
        "vocab_size": 60,
        "encoder_hidden_size": 16,
        "projection_dim": 8,
        "sep_token_id": 2,
        **MARKS,
        **SIZES,
    },
    "vision_config": {"projection_dim": 8, **IMAGES, **SIZES},
    "projection_dim": 8,
}
SIGLIP = {"text_config": {"vocab_size": 60, **MARKS, **SIZES}, "vision_config": {**IMAGES, **SIZES}}


def made(kind: str, **config: Any) -> transformers.PreTrainedModel:
    """A small model of the class with random weights."""
    torch.manual_seed(0)
    model_class = getattr(transformers, kind)
    return model_class(model_class.config_class(**config)).eval()


def joined(encoder: Any, decoder: Any, kind: str) -> transformers.PreTrainedModel:
    """An encoder and a decoder of kinds of their own."""
    config = getattr(transformers, f"{kind}Config").from_encoder_decoder_configs(encoder, decoder)
    config.decoder_start_token_id, config.pad_token_id = 1, 0
    return getattr(transformers, f"{kind}Model")(config).eval()


def shapes(inputs: dict[str, torch.Tensor]) -> Shapes:
    return {name: tuple(value.shape) for name, value in inputs.items()}


TEXT: Shapes = {"input_ids": (2, 9), "attention_mask": (2, 9)}
TYPED: Shapes = {**TEXT, "token_type_ids": (2, 9)}
IMAGE: Shapes = {"pixel_values": (2, 3, 32, 32)}
TARGET: Shapes = {"decoder_input_ids": (2, 7)}
CASES: dict[str, tuple[Callable[[], Any], Shapes]] = {
    "types": (lambda: made("BertForSequenceClassification", vocab_size=60, **SIZES), TYPED),
    "one type": (lambda: made("RobertaModel", vocab_size=60, type_vocab_size=1, **MARKS, **SIZES), TEXT),
    "boxes": (lambda: made("LayoutLMModel", vocab_size=60, **SIZES), {**TYPED, "bbox": (2, 9, 4)}),
    "kinds of types": (
        lambda: made("TapasForQuestionAnswering", vocab_size=60, **SIZES),
        {**TEXT, "token_type_ids": (2, 9, 7)},
    ),
    "characters": (lambda: made("CanineModel", **SIZES), TYPED),
    "source and target": (lambda: made("BartForConditionalGeneration", **BART), {**TEXT, **TARGET}),
    "classifier of what both stacks read": (lambda: made("BartForSequenceClassification", **BART), TEXT),
    "answers of what both stacks read": (lambda: made("T5ForQuestionAnswering", decoder_start_token_id=0, **T5), TEXT),
    "no head, and a target that it asks for": (lambda: made("T5Model", **T5), {**TEXT, **TARGET}),
    "embedder": (lambda: made("T5EncoderModel", **T5), TEXT),
    "one row": (
        lambda: made("GPT2ForSequenceClassification", vocab_size=60, n_embd=16, n_layer=1, n_head=2),
        {"input_ids": (1, 9), "attention_mask": (1, 9)},
    ),
    "caption": (lambda: made("BlipForConditionalGeneration", **BLIP), {**IMAGE, **TEXT}),
    "answer about an image": (lambda: made("BlipForQuestionAnswering", **BLIP), {**TEXT, **IMAGE, **TARGET}),
    "two towers": (lambda: made("SiglipModel", **SIGLIP), {**TEXT, **IMAGE}),
    "video": (
        lambda: made("TimesformerModel", num_frames=4, **IMAGES, **SIZES),
        {"pixel_values": (2, 4, 3, 32, 32)},
    ),
    "image of a text": (
        lambda: joined(
            transformers.ViTConfig(**IMAGES, **SIZES),
            transformers.GPT2Config(vocab_size=60, n_embd=16, n_layer=1, n_head=2),
            "VisionEncoderDecoder",
        ),
        {**IMAGE, **TARGET},
    ),
    "sound of a text": (
        lambda: joined(transformers.Wav2Vec2Config(**WAVES), transformers.BartConfig(**BART), "SpeechEncoderDecoder"),
        {"input_values": (2, 4000), **TARGET},
    ),
    "speech": (lambda: made("MoonshineForConditionalGeneration", **MOONSHINE), {"input_values": (2, 4000), **TARGET}),
}


@pytest.mark.parametrize("case", CASES)
def test_inputs_follow_the_forward_and_the_model_runs_on_them(case: str) -> None:
    make, expected = CASES[case]
    model = make()
    inputs = example_inputs(model)
    assert shapes(inputs) == expected
    model(**inputs)


def test_types_are_of_two_segments() -> None:
    inputs = example_inputs(made("BertModel", vocab_size=60, **SIZES))
    assert inputs["token_type_ids"].tolist() == [[0] * 4 + [1] * 5] * 2


@pytest.mark.parametrize(
    ("kind", "named", "expected"),
    [
        ("BertModel", {"input_ids", "attention_mask"}, {"input_ids", "attention_mask"}),
        ("BertModel", {"input_ids", "token_type_ids"}, {"input_ids", "token_type_ids"}),
        ("LlamaModel", {"input_ids"}, {"input_ids"}),
        ("LlamaModel", {"input_ids", "token_type_ids"}, {"input_ids"}),
    ],
)
def test_what_a_tokenizer_makes_is_what_the_model_gets(kind: str, named: set[str], expected: set[str]) -> None:
    model = made(kind, **LLAMA) if kind == "LlamaModel" else made(kind, vocab_size=60, **SIZES)
    assert set(example_inputs(model, Listed(frozenset(named)))) == expected


SEGFORMER = {
    "num_labels": 3,
    "hidden_sizes": [8, 16, 16, 16],
    "num_attention_heads": [1, 2, 2, 2],
    "depths": [1, 1, 1, 1],
    "decoder_hidden_size": 16,
}


@pytest.mark.parametrize(("size", "expected"), [({"height": 64, "width": 32}, (64, 32)), (None, (224, 224))])
def test_images_are_as_large_as_the_processor_makes_them(
    size: dict[str, int] | None, expected: tuple[int, int], tmp_path: Path
) -> None:
    """The configuration does not say it."""
    made("SegformerForImageClassification", **SEGFORMER).save_pretrained(tmp_path)
    if size is not None:
        transformers.SegformerImageProcessor(size=size).save_pretrained(tmp_path)
    _, inputs = models.resolve(f"hf:{tmp_path}")()
    assert isinstance(inputs, dict)
    assert inputs["pixel_values"].shape == (2, 3, *expected)


def test_images_that_are_left_out_are_said(tmp_path: Path) -> None:
    text = {**LLAMA, "vocab_size": 160, "rope_parameters": {"rope_type": "default", "mrope_section": [1, 1, 2]}}
    vision = {"depth": 1, "embed_dim": 16, "hidden_size": 16, "num_heads": 2}
    ids = {f"{name}_token_id": at for at, name in enumerate(("vision_start", "vision_end", "image", "video"), 150)}
    model = made("Qwen2VLForConditionalGeneration", text_config=text, vision_config=vision, **ids)
    model.save_pretrained(tmp_path)
    notes: list[str] = []
    _, inputs = models.resolve(f"hf:{tmp_path}", notes.append)()
    assert isinstance(inputs, dict)
    assert set(inputs) == {"input_ids", "attention_mask"}
    assert len(notes) == 1
    assert "takes pixel_values too, for which no example is known: what follows is its text alone" in notes[0]


def test_the_end_stands_once_in_every_row_before_the_padding() -> None:
    inputs = example_inputs(made("BartForSequenceClassification", **BART))
    assert (inputs["input_ids"] == 2).sum(1).tolist() == [1, 1]
    assert inputs["input_ids"][0, -1] == 2
    assert inputs["input_ids"][1, -3:].tolist() == [2, 0, 0]


@pytest.mark.parametrize("kind", ["Llava", "PaliGemma"])
def test_as_many_image_tokens_as_the_model_has_features(kind: str) -> None:
    if kind == "Llava":
        vision = transformers.CLIPVisionConfig(projection_dim=8, **IMAGES, **SIZES)
        text = transformers.LlamaConfig(**LLAMA)
        model = made(
            "LlavaForConditionalGeneration",
            vision_config=vision,
            text_config=text,
            image_token_id=59,
            vision_feature_layer=-1,
        )
    else:
        vision = transformers.SiglipVisionConfig(vision_use_head=False, **IMAGES, **SIZES)
        text = transformers.GemmaConfig(head_dim=8, **LLAMA)
        model = made(
            "PaliGemmaForConditionalGeneration",
            vision_config=vision,
            text_config=text,
            image_token_id=59,
            projection_dim=16,
        )
    inputs = example_inputs(model)
    types: Shapes = {} if kind == "Llava" else {"token_type_ids": (2, 13)}
    assert shapes(inputs) == {"input_ids": (2, 13), **IMAGE, "attention_mask": (2, 13), **types}
    assert (inputs["input_ids"] == 59).sum(1).tolist() == [4, 4]
    assert int(inputs["input_ids"].max()) == 59


@pytest.mark.parametrize("masked", [False, True])
def test_a_mask_of_sounds_where_the_feature_extractor_makes_one(tmp_path: Path, masked: bool) -> None:
    made("Wav2Vec2ForCTC", **WAVES).save_pretrained(tmp_path)
    transformers.Wav2Vec2FeatureExtractor(return_attention_mask=masked).save_pretrained(tmp_path)
    _, inputs = models.resolve(f"hf:{tmp_path}")()
    assert isinstance(inputs, dict)
    assert shapes(inputs) == {"input_values": (2, 4000)} | ({"attention_mask": (2, 4000)} if masked else {})


def test_a_model_that_does_not_run_on_what_was_made_up_says_why() -> None:
    model = made("LlamaForCausalLM", **LLAMA)

    def forward(input_ids: torch.Tensor, attention_mask: torch.Tensor | None = None) -> None:
        raise RuntimeError("this model wants more")

    model.forward = forward
    with pytest.raises(
        errors.PretrainedModelError,
        match=r"(?s)LlamaForCausalLM does not run on the inputs .*input_ids \[2, 9\].*wants more.*file.py:factory",
    ) as caught:
        example_inputs(model)
    assert caught.value.stage == "model"


def test_a_sound_beside_a_text_is_named() -> None:
    model = made("LlamaForCausalLM", **LLAMA)

    def forward(input_ids: torch.Tensor, input_features: torch.Tensor | None = None) -> None:
        raise AttributeError("'NoneType' object has no attribute 'transpose'")

    model.forward = forward
    with pytest.raises(
        errors.PretrainedModelError,
        match=r"(?s)none is known for input_features\): AttributeError.*try: .*, with input_features",
    ):
        example_inputs(model)


def test_a_main_input_of_an_unknown_kind() -> None:
    model = made("PatchTSTModel", d_model=16, num_attention_heads=2, num_hidden_layers=1, ffn_dim=32)
    with pytest.raises(errors.PretrainedModelError, match="no example is known for 'past_values'"):
        example_inputs(model)


def test_outputs_that_a_configuration_asks_for_beside_the_answer_are_left_out(tmp_path: Path) -> None:
    saved = made("LlamaForCausalLM", output_hidden_states=True, return_dict=False, use_cache=True, **LLAMA)
    saved.save_pretrained(tmp_path)
    model, inputs = models.resolve(f"hf:{tmp_path}")()
    assert isinstance(inputs, dict)
    assert list(model(**inputs)) == ["logits"]
