"""Directories of models that read an image and a text, with their own processors; ``READERS`` writes them by name."""

# mypy: disable-error-code="no-untyped-call, no-any-return"
from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import directories as base
import torch
import transformers

VOCAB, WIDTH, PIXELS = base.VOCAB, base.WIDTH, 16
TINY = {"hidden_size": WIDTH, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
VISION = {**TINY, "image_size": PIXELS, "patch_size": 8}
TEXT: dict[str, Any] = {
    **TINY,
    "vocab_size": VOCAB,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "bos_token_id": base.START,
    "eos_token_id": base.END,
    "pad_token_id": base.PAD,
}
CHAT = (
    "{% for message in messages %}USER: {% for part in message.content %}{% if part.type == 'image' %}MARK\n"
    "{% else %}{{ part.text }}{% endif %}{% endfor %}{% endfor %}{% if add_generation_prompt %} ASSISTANT:{% endif %}"
)
NEW = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": base.PAD, "eos_token_id": base.END}


def _images(kind: str = "CLIPImageProcessor", **settings: Any) -> Any:
    size = {"height": PIXELS, "width": PIXELS}
    if kind == "CLIPImageProcessor":
        return transformers.CLIPImageProcessor(size={"shortest_edge": PIXELS}, crop_size=size, **settings)
    return getattr(transformers, kind)(size=size, **settings)


def _saved(folder: Path, model: Any, processor: Any) -> None:
    base._save(folder, model.eval(), **NEW)
    processor.save_pretrained(folder)


def llava(folder: Path, template: str | None = None) -> None:
    """``<image>`` in the text becomes as many as there are features."""
    vision = transformers.CLIPVisionConfig(**{**VISION, "num_hidden_layers": 3}, projection_dim=WIDTH)
    config = transformers.LlavaConfig(
        vision_config=vision,
        text_config=transformers.LlamaConfig(**TEXT),
        image_token_index=base.IMAGE,
        vision_feature_layer=-1,
    )
    torch.manual_seed(0)
    processor = transformers.LlavaProcessor(
        _images(),
        base._tokenizer(folder, "start"),
        patch_size=8,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=template,
    )
    _saved(folder, transformers.LlavaForConditionalGeneration(config), processor)


def llava_chat(folder: Path) -> None:
    """The same with a template that says where the image goes."""
    llava(folder, CHAT.replace("MARK", "<image>"))


def paligemma(folder: Path) -> None:
    """The image goes before the start of the text, whose tokens see each other."""
    vision = transformers.SiglipVisionConfig(**VISION, vision_use_head=False)
    tokenizer = base._tokenizer(folder, "start")
    images = _images("SiglipImageProcessor")
    images.image_seq_length = 4
    processor = transformers.PaliGemmaProcessor(images, tokenizer)
    config = transformers.PaliGemmaConfig(
        vision_config=vision,
        text_config=transformers.GemmaConfig(**{**TEXT, "vocab_size": len(tokenizer)}, head_dim=8),
        image_token_index=base.IMAGE,
        vocab_size=len(tokenizer),
        projection_dim=WIDTH,
        hidden_size=WIDTH,
    )
    torch.manual_seed(0)
    _saved(folder, transformers.PaliGemmaForConditionalGeneration(config), processor)


def gemma3(folder: Path, template: str | None = None) -> None:
    """The image's tokens, which see each other, lie between two others and empty lines."""
    marks = {"boi_token": "[INST]", "eoi_token": "[/INST]", "image_token": "<image>"}
    processor = transformers.Gemma3Processor(
        _images("Gemma3ImageProcessor"),
        base._tokenizer(folder, "start", extra_special_tokens=marks),
        image_seq_length=4,
        chat_template=template,
    )
    config = transformers.Gemma3Config(
        vision_config=transformers.SiglipVisionConfig(**VISION, vision_use_head=False),
        text_config=transformers.Gemma3TextConfig(**TEXT, head_dim=8, sliding_window=6),
        image_token_index=base.IMAGE,
        mm_tokens_per_image=4,
        boi_token_index=base.IMAGE + 1,
        eoi_token_index=base.IMAGE + 2,
    )
    torch.manual_seed(0)
    _saved(folder, transformers.Gemma3ForConditionalGeneration(config), processor)


def gemma3_chat(folder: Path) -> None:
    """The same with a template, which begins with the start token."""
    gemma3(folder, "{{ bos_token }}" + CHAT.replace("MARK", "[INST]"))


def blip2(folder: Path, kind: str = "OPT") -> None:
    """The image's tokens come before everything, the start of the text included."""
    former = {**TINY, "vocab_size": VOCAB, "encoder_hidden_size": WIDTH}
    text: Any = base._t5_config() if kind == "T5" else transformers.OPTConfig(
        vocab_size=VOCAB, hidden_size=WIDTH, ffn_dim=64, num_hidden_layers=2, num_attention_heads=4,
        max_position_embeddings=128, word_embed_proj_dim=WIDTH, eos_token_id=base.END, bos_token_id=base.START,
        pad_token_id=base.PAD,
    )  # fmt: skip
    config = transformers.Blip2Config(
        vision_config=VISION,
        qformer_config=former,
        text_config=text,
        num_query_tokens=4,
        image_token_index=base.IMAGE,
    )
    torch.manual_seed(0)
    processor = transformers.Blip2Processor(
        _images("BlipImageProcessor"), base._tokenizer(folder, "end" if kind == "T5" else "start"), num_query_tokens=4
    )
    _saved(folder, transformers.Blip2ForConditionalGeneration(config), processor)


def blip2_t5(folder: Path) -> None:
    """The same before the text of an encoder."""
    blip2(folder, "T5")


def internvl(folder: Path) -> None:
    """The image's tokens lie between two others; without torchvision its processor cannot be loaded."""
    marks = {
        "start_image_token": "[INST]",
        "end_image_token": "[/INST]",
        "context_image_token": "<image>",
        "video_token": "<mask>",
    }
    size = {"height": PIXELS, "width": PIXELS}
    vision = {**VISION, "image_size": [PIXELS, PIXELS], "patch_size": [4, 4]}
    config = transformers.InternVLConfig(
        vision_config=vision,
        text_config=transformers.Qwen2Config(**TEXT),
        image_token_id=base.IMAGE,
        downsample_ratio=0.5,
    )
    torch.manual_seed(0)
    base._save(folder, transformers.InternVLForConditionalGeneration(config).eval(), **NEW)
    base._tokenizer(folder, "plain", extra_special_tokens=marks)
    transformers.GotOcr2ImageProcessor(size=size, crop_to_patches=False).save_pretrained(folder)


def git(folder: Path) -> None:
    """The image stands before the text and has no tokens there."""
    base._git_reader(folder)
    processor = transformers.GitProcessor(
        transformers.AutoImageProcessor.from_pretrained(folder), base._tokenizer(folder, "start")
    )
    processor.save_pretrained(folder)


def blip(folder: Path) -> None:
    """The decoder sees the image; its generate exchanges the first token, drops the last one and has its own end."""
    base._blip_captioner(folder)
    config = json.loads((folder / "config.json").read_text())
    config["text_config"] |= {"bos_token_id": base.MASK, "sep_token_id": 122}  # one that it writes
    (folder / "config.json").write_text(json.dumps(config))
    processor = transformers.BlipProcessor(
        transformers.AutoImageProcessor.from_pretrained(folder), base._tokenizer(folder, "ends")
    )
    processor.save_pretrained(folder)


def blip_answers(folder: Path) -> None:
    """Its forward gives no logits unless it is given labels."""
    text = {
        **TEXT, "encoder_hidden_size": WIDTH, "projection_dim": WIDTH, "sep_token_id": base.END,
        "bos_token_id": base.MASK,
    }  # fmt: skip
    config = transformers.BlipConfig(
        text_config=text, vision_config={**VISION, "projection_dim": WIDTH}, projection_dim=WIDTH
    )
    torch.manual_seed(0)
    processor = transformers.BlipProcessor(_images("BlipImageProcessor"), base._tokenizer(folder, "ends"))
    _saved(folder, transformers.BlipForQuestionAnswering(config), processor)


def florence2(folder: Path) -> None:
    """Features stand before the text, in an encoder; the configuration has no size of images, the processor has."""
    stages = {"embed_dim": [8, 16, 32, 32], "num_heads": [1, 2, 4, 4], "num_groups": [1, 2, 4, 4], "depths": [1] * 4}
    patches = {"patch_size": [7, 3, 3, 3], "patch_stride": [4, 2, 2, 2], "patch_padding": [3, 1, 1, 1]}
    config = transformers.Florence2Config(
        vision_config={**stages, **patches, "window_size": 2, "projection_dim": WIDTH},
        text_config=base._bart_config(max_position_embeddings=128, forced_eos_token_id=None),
        image_token_id=base.IMAGE,
    )
    torch.manual_seed(0)
    model = transformers.Florence2ForConditionalGeneration(config)
    model.generation_config.decoder_start_token_id = base.END
    size = {"height": 64, "width": 64}
    images = transformers.CLIPImageProcessor(size=size, crop_size=size, do_center_crop=False, image_seq_length=5)
    tokenizer = base._tokenizer(folder, "ends", extra_special_tokens={"image_token": "<image>"})
    _saved(folder, model, transformers.Florence2Processor(images, tokenizer, num_additional_image_tokens=0))


READERS: dict[str, Callable[[Path], None]] = {
    make.__name__: make
    for make in (llava, llava_chat, paligemma, gemma3, gemma3_chat, blip2, blip2_t5, git, blip, florence2)
}
