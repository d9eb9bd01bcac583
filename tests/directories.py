"""Directories as `save_pretrained` writes them: models with their configuration, tokenizer, processor and all.

``DIRECTORIES`` has one `Directory` for each; ``make(folder)`` writes it. Weights are random, the same every time, and
large enough that every block counts. Nothing is wrapped: a classifier is the class with its head, a generator has a
generation configuration of its own.
"""

# mypy: disable-error-code="no-untyped-call"
from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from torch import nn

SPECIAL = ("<pad>", "<s>", "</s>", "<unk>", "<mask>", "<image>", "[INST]", "[/INST]")
PAD, START, END, UNKNOWN, MASK, IMAGE = range(6)
WIDTH, HEADS, BLOCKS, INNER, POSITIONS = 32, 4, 3, 64, 48
TEXTS = (
    "a good movie",
    "hello world this is a test of a longer text",
    "the cat sat on the mat and the dog ran",
    "never the best, always a pity",
)
_CORPUS = [
    *TEXTS,
    "who what where when why how",
    "he sees a small house",
    "they were here",
    "a b c d e f g h i j k l m",
] * 3


@dataclass(frozen=True)
class Directory:
    """One saved directory.

    ``task`` is what it is for; ``make`` writes it. ``given`` says what the command line gives it: ``text``, ``pair``,
    ``image``, ``audio``, or ``features`` where it takes no sound itself. ``stacks`` is how many blocks each stack has,
    ``rows`` how many rows can be given at once, ``asked`` what generation is asked for in every case.
    """

    name: str
    task: str
    make: Callable[[Path], None]
    given: tuple[str, ...]
    stacks: Mapping[str, int]
    generates: bool = False
    rows: tuple[int, ...] = (1, 2)
    asked: Mapping[str, int] = field(default_factory=dict)


DIRECTORIES: dict[str, Directory] = {}


def _directory(
    task: str, given: str, stacks: Mapping[str, int] | None = None, *, generates: bool = False, **settings: Any
) -> Callable[[Callable[[Path], None]], Callable[[Path], None]]:
    def register(make: Callable[[Path], None]) -> Callable[[Path], None]:
        name = make.__name__.removeprefix("_")
        found = {"encoder": BLOCKS} if stacks is None else stacks
        DIRECTORIES[name] = Directory(name, task, make, tuple(given.split("+")), found, generates, **settings)
        return make

    return register


ENCODER, DECODER = {"encoder": BLOCKS}, {"decoder": BLOCKS}
BOTH = {"encoder": 2, "decoder": BLOCKS}


# Weights and tokenizers


def _save(folder: Path, model: Any, **generation: Any) -> None:
    """Write a model with weights that matter, and its generation configuration with these settings."""
    random = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.dim() > 1:
                weight.copy_(torch.randn(weight.shape, generator=random) * (1.2 / weight.shape[-1] ** 0.5))
            elif "norm" not in name.lower() and "layer_scale" not in name:
                weight.copy_(torch.randn(weight.shape, generator=random) * 0.1)
        for part in model.modules():
            if isinstance(part, nn.Embedding):
                part.weight.copy_(torch.randn(part.weight.shape, generator=random) * 0.25)
    if generation:
        for name, value in generation.items():
            setattr(model.generation_config, name, value)
    model.save_pretrained(folder)


def _tokenizer(folder: Path, style: str, **settings: Any) -> Any:
    """A tokenizer of about 200 pieces: ``style`` is how a text is framed (plain, start, ends, bert or end)."""
    import transformers

    tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(Regex(r"\[/?INST\]"), "isolated"), pre_tokenizers.Metaspace()]
    )
    tokenizer.decoder = decoders.Metaspace()
    trainer = trainers.BpeTrainer(vocab_size=200, special_tokens=list(SPECIAL), show_progress=False)
    tokenizer.train_from_iterator(_CORPUS, trainer)
    frames = {
        "start": ("<s> $A", "<s> $A $B:1"),
        "ends": ("<s> $A </s>", "<s> $A </s> </s> $B </s>"),
        "bert": ("<s> $A </s>", "<s> $A </s> $B:1 </s>:1"),
        "end": ("$A </s>", "$A </s> $B </s>"),
    }
    if style in frames:
        single, pair = frames[style]
        tokenizer.post_processor = processors.TemplateProcessing(
            single=single, pair=pair, special_tokens=[("<s>", START), ("</s>", END)]
        )
    names = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    inputs = ["input_ids", "attention_mask"] + (["token_type_ids"] if style == "bert" else [])
    made = transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        **{
            **names,
            "mask_token": "<mask>",
            "cls_token": "<s>",
            "sep_token": "</s>",
            "model_input_names": inputs,
            "model_max_length": POSITIONS,
            **settings,
        },
    )
    made.save_pretrained(folder)
    return made


VOCAB = 200
_IDS = {"pad_token_id": PAD, "bos_token_id": START, "eos_token_id": END}
_SIZES = {
    "vocab_size": VOCAB,
    "hidden_size": WIDTH,
    "num_hidden_layers": BLOCKS,
    "num_attention_heads": HEADS,
    "intermediate_size": INNER,
    "max_position_embeddings": POSITIONS,
}


def _config(name: str, **settings: Any) -> Any:
    import transformers

    return getattr(transformers, name)(**{**_IDS, **settings})


def _model(name: str, config: Any) -> Any:
    import transformers

    torch.manual_seed(0)
    return getattr(transformers, name)(config).eval()


# Encoders of text


def _labels(count: int) -> dict[str, Any]:
    names = ("negative", "neutral", "positive", "other", "none")[:count]
    return {"id2label": dict(enumerate(names)), "label2id": {name: i for i, name in enumerate(names)}}


@_directory("sequence classification", "text+pair")
def _bert_classifier(folder: Path) -> None:
    _save(folder, _model("BertForSequenceClassification", _config("BertConfig", **_SIZES, **_labels(3))))
    _tokenizer(folder, "bert")


@_directory("sequence classification", "text")
def _roberta_classifier(folder: Path) -> None:
    sizes = {**_SIZES, "max_position_embeddings": POSITIONS + 2}
    _save(folder, _model("RobertaForSequenceClassification", _config("RobertaConfig", **sizes, **_labels(2))))
    _tokenizer(folder, "ends")


@_directory("sequence classification", "text")
def _distilbert_classifier(folder: Path) -> None:
    config = _config(
        "DistilBertConfig",
        vocab_size=VOCAB,
        dim=WIDTH,
        n_layers=BLOCKS,
        n_heads=HEADS,
        hidden_dim=INNER,
        max_position_embeddings=POSITIONS,
        **_labels(2),
    )
    _save(folder, _model("DistilBertForSequenceClassification", config))
    _tokenizer(folder, "ends")


@_directory("sequence classification", "text", DECODER)
def _gpt2_classifier(folder: Path) -> None:
    config = _config(
        "GPT2Config",
        vocab_size=VOCAB,
        n_embd=WIDTH,
        n_layer=BLOCKS,
        n_head=HEADS,
        n_positions=POSITIONS,
        **_labels(3),
        pad_token_id=END,
    )
    _save(folder, _model("GPT2ForSequenceClassification", config))
    _tokenizer(folder, "plain", pad_token="</s>")


@_directory("sequence classification", "text", DECODER)
def _llama_classifier(folder: Path) -> None:
    config = _config("LlamaConfig", **_SIZES, num_key_value_heads=2, **_labels(3))
    _save(folder, _model("LlamaForSequenceClassification", config))
    _tokenizer(folder, "start", padding_side="left")


@_directory("sequence classification", "text", BOTH)
def _bart_classifier(folder: Path) -> None:
    _save(folder, _model("BartForSequenceClassification", _bart_config(**_labels(3))))
    _tokenizer(folder, "ends")


@_directory("token classification", "text")
def _bert_tagger(folder: Path) -> None:
    _save(folder, _model("BertForTokenClassification", _config("BertConfig", **_SIZES, **_labels(5))))
    _tokenizer(folder, "bert")


@_directory("token classification", "text")
def _electra_tagger(folder: Path) -> None:
    config = _config("ElectraConfig", **_SIZES, embedding_size=16, **_labels(5))
    _save(folder, _model("ElectraForTokenClassification", config))
    _tokenizer(folder, "bert")


@_directory("question answering", "text+pair")
def _bert_reader(folder: Path) -> None:
    _save(folder, _model("BertForQuestionAnswering", _config("BertConfig", **_SIZES)))
    _tokenizer(folder, "bert")


@_directory("question answering", "text+pair")
def _mpnet_reader(folder: Path) -> None:
    sizes = {**_SIZES, "max_position_embeddings": POSITIONS + 2}
    _save(folder, _model("MPNetForQuestionAnswering", _config("MPNetConfig", **sizes)))
    _tokenizer(folder, "ends")


@_directory("masked language model", "text")
def _albert_filler(folder: Path) -> None:
    _save(folder, _model("AlbertForMaskedLM", _config("AlbertConfig", **_SIZES, embedding_size=16)))
    _tokenizer(folder, "bert")


@_directory("masked language model", "text", {"encoder": BLOCKS})
def _bert_filler(folder: Path) -> None:
    _save(folder, _model("BertForMaskedLM", _config("BertConfig", **_SIZES)))
    _tokenizer(folder, "bert")


@_directory("embeddings", "text")
def _bert_embedder(folder: Path) -> None:
    _save(folder, _model("BertModel", _config("BertConfig", **_SIZES)))
    _tokenizer(folder, "bert")


@_directory("embeddings", "text")
def _mpnet_embedder(folder: Path) -> None:
    sizes = {**_SIZES, "max_position_embeddings": POSITIONS + 2}
    _save(folder, _model("MPNetModel", _config("MPNetConfig", **sizes)))
    _tokenizer(folder, "ends")


@_directory("embeddings", "text")
def _t5_embedder(folder: Path) -> None:
    _save(folder, _model("T5EncoderModel", _t5_config()))
    _tokenizer(folder, "end")


# Decoders


@_directory("causal language model", "text", DECODER, generates=True)
def _gpt2_writer(folder: Path) -> None:
    config = _config("GPT2Config", vocab_size=VOCAB, n_embd=WIDTH, n_layer=BLOCKS, n_head=HEADS, n_positions=POSITIONS)
    _save(folder, _model("GPT2LMHeadModel", config), eos_token_id=[PAD, 4, 9, 17], pad_token_id=PAD, max_new_tokens=14)
    _tokenizer(folder, "plain", padding_side="left")


TEMPLATE = (
    "{% for message in messages %}{% if message.role == 'user' %}<s>[INST]{{ message.content }}[/INST]"
    "{% else %}{{ message.content }}</s>{% endif %}{% endfor %}"
)


@_directory("causal language model (chat)", "text", DECODER, generates=True)
def _llama_chat(folder: Path) -> None:
    config = _config("LlamaConfig", **_SIZES, num_key_value_heads=2)
    _save(
        folder,
        _model("LlamaForCausalLM", config),
        eos_token_id=[END, 30, 31],
        repetition_penalty=1.3,
        max_new_tokens=12,
        pad_token_id=PAD,
    )
    _tokenizer(folder, "start", padding_side="left", chat_template=TEMPLATE)


@_directory("causal language model", "text", DECODER, generates=True)
def _qwen3_writer(folder: Path) -> None:
    config = _config("Qwen3Config", **_SIZES, num_key_value_heads=2, head_dim=8)
    _save(
        folder,
        _model("Qwen3ForCausalLM", config),
        no_repeat_ngram_size=2,
        suppress_tokens=[20, 21, 22],
        max_length=30,
        pad_token_id=PAD,
    )
    _tokenizer(folder, "plain", padding_side="left")


@_directory("causal language model", "text", DECODER, generates=True)
def _gemma2_writer(folder: Path) -> None:
    config = _config("Gemma2Config", **_SIZES, num_key_value_heads=2, head_dim=8, sliding_window=5)
    _save(folder, _model("Gemma2ForCausalLM", config), num_beams=3, length_penalty=0.6, max_new_tokens=10)
    _tokenizer(folder, "start", padding_side="left")


@_directory("causal language model", "text", DECODER, generates=True)
def _opt_writer(folder: Path) -> None:
    config = _config(
        "OPTConfig",
        vocab_size=VOCAB,
        hidden_size=WIDTH,
        num_hidden_layers=BLOCKS,
        num_attention_heads=HEADS,
        ffn_dim=INNER,
        max_position_embeddings=POSITIONS,
        word_embed_proj_dim=WIDTH,
    )
    _save(folder, _model("OPTForCausalLM", config), bad_words_ids=[[25], [40, 41]], min_new_tokens=6, max_new_tokens=12)
    _tokenizer(folder, "start", padding_side="left")


@_directory("causal language model", "text", DECODER, generates=True)
def _neox_writer(folder: Path) -> None:
    _save(
        folder,
        _model("GPTNeoXForCausalLM", _config("GPTNeoXConfig", **_SIZES)),
        forced_eos_token_id=END,
        max_new_tokens=9,
    )
    _tokenizer(folder, "plain", padding_side="left")


@_directory("causal language model", "text", DECODER, generates=True)
def _bloom_writer(folder: Path) -> None:
    config = _config("BloomConfig", vocab_size=VOCAB, hidden_size=WIDTH, n_layer=BLOCKS, n_head=HEADS)
    _save(folder, _model("BloomForCausalLM", config), max_new_tokens=10)
    _tokenizer(folder, "plain", padding_side="left")


# Encoder-decoders


def _bart_config(name: str = "BartConfig", **settings: Any) -> Any:
    return _config(
        name,
        **{
            "vocab_size": VOCAB,
            "d_model": WIDTH,
            "encoder_layers": 2,
            "decoder_layers": BLOCKS,
            "encoder_attention_heads": HEADS,
            "decoder_attention_heads": HEADS,
            "encoder_ffn_dim": INNER,
            "decoder_ffn_dim": INNER,
            "max_position_embeddings": POSITIONS,
            "decoder_start_token_id": END,
            "forced_eos_token_id": None,
            **settings,
        },
    )


def _t5_config(**settings: Any) -> Any:
    return _config(
        "T5Config",
        **{
            "vocab_size": VOCAB,
            "d_model": WIDTH,
            "d_kv": 8,
            "d_ff": INNER,
            "num_layers": BLOCKS,
            "num_heads": HEADS,
            "decoder_start_token_id": PAD,
            **settings,
        },
    )


@_directory("sequence to sequence", "text", {"encoder": BLOCKS, "decoder": BLOCKS}, generates=True)
def _t5_translator(folder: Path) -> None:
    _save(folder, _model("T5ForConditionalGeneration", _t5_config()), max_new_tokens=10)
    _tokenizer(folder, "end")


@_directory("sequence to sequence", "text", BOTH, generates=True)
def _bart_summarizer(folder: Path) -> None:
    _save(
        folder,
        _model("BartForConditionalGeneration", _bart_config()),
        forced_bos_token_id=START,
        forced_eos_token_id=END,
        num_beams=4,
        length_penalty=2.0,
        early_stopping=True,
        no_repeat_ngram_size=3,
        min_length=4,
        max_length=16,
    )
    _tokenizer(folder, "ends")


@_directory("sequence to sequence", "text", BOTH, generates=True)
def _marian_translator(folder: Path) -> None:
    config = _bart_config("MarianConfig", decoder_start_token_id=PAD)
    _save(folder, _model("MarianMTModel", config), bad_words_ids=[[PAD]], num_beams=2, max_length=14)
    _tokenizer(folder, "end")


@_directory("sequence to sequence", "text", BOTH, generates=True)
def _m2m_translator(folder: Path) -> None:
    _save(
        folder,
        _model("M2M100ForConditionalGeneration", _bart_config("M2M100Config", scale_embedding=False)),
        forced_bos_token_id=12,
        max_new_tokens=9,
    )
    _tokenizer(folder, "ends")


# Sound


def _whisper_processor(folder: Path) -> None:
    import transformers

    transformers.WhisperFeatureExtractor(feature_size=16, chunk_length=2, n_fft=400, hop_length=160).save_pretrained(
        folder
    )


@_directory("speech recognition", "audio", BOTH, generates=True)
def _whisper_listener(folder: Path) -> None:
    config = _bart_config(
        "WhisperConfig",
        num_mel_bins=16,
        max_source_positions=100,
        max_target_positions=POSITIONS,
        decoder_start_token_id=START,
        suppress_tokens=None,
        begin_suppress_tokens=None,
    )
    _save(
        folder,
        _model("WhisperForConditionalGeneration", config),
        suppress_tokens=[18, 19],
        begin_suppress_tokens=[END, 20],
        max_new_tokens=9,
        is_multilingual=False,
    )
    _tokenizer(folder, "plain")
    _whisper_processor(folder)


@_directory("speech recognition", "features", BOTH, generates=True)
def _speech_to_text(folder: Path) -> None:
    import transformers

    config = _bart_config(
        "Speech2TextConfig",
        input_feat_per_channel=16,
        conv_channels=24,
        num_conv_layers=2,
        max_source_positions=80,
        max_target_positions=POSITIONS,
    )
    _save(folder, _model("Speech2TextForConditionalGeneration", config), max_new_tokens=8)
    transformers.Speech2TextFeatureExtractor(feature_size=16, num_mel_bins=16).save_pretrained(folder)
    _tokenizer(folder, "end")


def _wave_config(name: str, **settings: Any) -> Any:
    return _config(
        name,
        **{
            **{key: value for key, value in _SIZES.items() if key != "max_position_embeddings"},
            "conv_dim": (16, 16, 16),
            "conv_kernel": (10, 3, 2),
            "conv_stride": (5, 2, 2),
            "num_feat_extract_layers": 3,
            "num_conv_pos_embeddings": 16,
            "num_conv_pos_embedding_groups": 4,
            **settings,
        },
    )


@_directory("speech recognition (CTC)", "audio")
def _wav2vec2_listener(folder: Path) -> None:
    import transformers

    _save(folder, _model("Wav2Vec2ForCTC", _wave_config("Wav2Vec2Config")))
    transformers.Wav2Vec2FeatureExtractor(do_normalize=True).save_pretrained(folder)


@_directory("audio classification", "audio")
def _hubert_classifier(folder: Path) -> None:
    import transformers

    config = _wave_config("HubertConfig", classifier_proj_size=16, **_labels(4))
    _save(folder, _model("HubertForSequenceClassification", config))
    transformers.Wav2Vec2FeatureExtractor(do_normalize=False).save_pretrained(folder)


# Images


def _vit_sizes(**settings: Any) -> dict[str, Any]:
    return {
        **{key: value for key, value in _SIZES.items() if key not in ("vocab_size", "max_position_embeddings")},
        "image_size": 32,
        "patch_size": 8,
        **settings,
    }


def _images(folder: Path, size: int = 32, **settings: Any) -> None:
    import transformers

    transformers.ViTImageProcessor(size={"height": size, "width": size}, **settings).save_pretrained(folder)


@_directory("image classification", "image")
def _vit_classifier(folder: Path) -> None:
    _save(folder, _model("ViTForImageClassification", _config("ViTConfig", **_vit_sizes(**_labels(5)))))
    _images(folder)


@_directory("image classification", "image")
def _deit_classifier(folder: Path) -> None:
    _save(folder, _model("DeiTForImageClassification", _config("DeiTConfig", **_vit_sizes(**_labels(3)))))
    _images(folder, image_mean=[0.4, 0.5, 0.6], image_std=[0.2, 0.3, 0.25])


@_directory("image embeddings", "image")
def _dinov2_embedder(folder: Path) -> None:
    import transformers

    sizes = _vit_sizes(image_size=56)  # of its table of positions; images are as large as the processor makes them
    sizes.pop("intermediate_size")
    _save(folder, _model("Dinov2Model", _config("Dinov2Config", **sizes)))
    transformers.BitImageProcessor(
        size={"shortest_edge": 40}, crop_size={"height": 32, "width": 32}, image_mean=[0.4, 0.5, 0.6]
    ).save_pretrained(folder)


@_directory("image to text", "image", BOTH, generates=True)
def _vit_gpt2_captioner(folder: Path) -> None:
    import transformers

    vision = transformers.ViTConfig(**{**_vit_sizes(), "num_hidden_layers": 2})
    text = transformers.GPT2Config(
        vocab_size=VOCAB,
        n_embd=WIDTH,
        n_layer=BLOCKS,
        n_head=HEADS,
        n_positions=POSITIONS,
        is_decoder=True,
        add_cross_attention=True,
        **_IDS,
    )
    config = transformers.VisionEncoderDecoderConfig.from_encoder_decoder_configs(vision, text)
    config.decoder_start_token_id, config.pad_token_id, config.eos_token_id = START, PAD, END
    _save(
        folder,
        _model("VisionEncoderDecoderModel", config),
        decoder_start_token_id=START,
        pad_token_id=PAD,
        eos_token_id=END,
        max_new_tokens=8,
        num_beams=2,
    )
    _images(folder)
    _tokenizer(folder, "plain")


BLIP = {"vision_model": 2, "encoder": BLOCKS}


@_directory("image to text", "image", BLIP, generates=True, asked={"max_new_tokens": 8})  # it sets another itself
def _blip_captioner(folder: Path) -> None:
    import transformers

    text = {
        "vocab_size": VOCAB,
        "hidden_size": WIDTH,
        "num_hidden_layers": BLOCKS,
        "num_attention_heads": HEADS,
        "intermediate_size": INNER,
        "max_position_embeddings": POSITIONS,
        "encoder_hidden_size": WIDTH,
        "projection_dim": WIDTH,
        "bos_token_id": START,
        "eos_token_id": END,
        "sep_token_id": END,
        "pad_token_id": PAD,
    }
    vision = {**_vit_sizes(), "num_hidden_layers": 2, "projection_dim": WIDTH}
    config = transformers.BlipConfig(text_config=text, vision_config=vision, projection_dim=WIDTH)
    _save(folder, _model("BlipForConditionalGeneration", config), max_new_tokens=8)
    _tokenizer(folder, "ends")
    transformers.BlipImageProcessor(size={"height": 32, "width": 32}).save_pretrained(folder)


# The image stands before the text, whose first token the model knows.
@_directory("image to text", "image", {"vision_model": 2, "encoder": BLOCKS}, generates=True)
def _git_reader(folder: Path) -> None:
    import transformers

    sizes = {"hidden_size": WIDTH, "num_attention_heads": HEADS, "intermediate_size": INNER}
    vision = {**sizes, "num_hidden_layers": 2, "image_size": 32, "patch_size": 8}
    config = transformers.GitConfig(
        vision_config=vision,
        vocab_size=VOCAB,
        num_hidden_layers=BLOCKS,
        max_position_embeddings=POSITIONS,
        **sizes,
        **_IDS,
    )
    _save(folder, _model("GitForCausalLM", config), max_new_tokens=8, eos_token_id=END, pad_token_id=PAD)
    _tokenizer(folder, "start")
    transformers.CLIPImageProcessor(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32}).save_pretrained(
        folder
    )


# Two towers


def _towers(name: str) -> Any:
    import transformers

    text = {**_SIZES, "projection_dim": WIDTH, **_IDS}
    vision = _vit_sizes(projection_dim=WIDTH)
    return getattr(transformers, name)(text_config=text, vision_config=vision, projection_dim=WIDTH)


@_directory("two towers", "text+image", {"encoder": BLOCKS, "vision_model": BLOCKS})
def _clip_towers(folder: Path) -> None:
    import transformers

    _save(folder, _model("CLIPModel", _towers("CLIPConfig")))
    _tokenizer(folder, "ends")
    transformers.CLIPImageProcessor(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32}).save_pretrained(
        folder
    )


# Its last token says what a text is, so rows of different lengths are not padded; and rows meet in its logits.
@_directory("two towers", "text+image", {"encoder": BLOCKS, "vision_model": BLOCKS}, rows=(1,))
def _siglip_towers(folder: Path) -> None:
    import transformers

    _save(folder, _model("SiglipModel", _towers("SiglipConfig")))
    _tokenizer(folder, "end")
    transformers.SiglipImageProcessor(size={"height": 32, "width": 32}).save_pretrained(folder)
