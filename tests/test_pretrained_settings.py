"""Directories as `save_pretrained` writes them: what they bring along is in the bundle, and `run` uses it."""

from __future__ import annotations

import json
import re
import shutil
import wave
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import PIL.Image
import pytest
import tokenizers
import torch
import transformers

import offramp
from offramp import cli, models
from offramp.check import check
from offramp.cli import _data, _results, _text
from offramp.errors import PretrainedModelError
from offramp.pretrained import settings as directory_settings
from offramp.pretrained import tokenization

SPECIAL = ["<unk>", "<pad>", "<s>", "</s>"]
WORDS = [*SPECIAL, *"hello world a good movie this is test of longer text".split()]  # noqa: SIM905
TEXTS = ("a good movie", "hello world this is a test of a longer text", "hello")
WIDTH = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 16}


def tokenizer(**settings: Any) -> Any:
    made = tokenizers.Tokenizer(tokenizers.models.WordLevel({word: i for i, word in enumerate(WORDS)}, "<unk>"))
    made.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    made.post_processor = tokenizers.processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 3)])
    special = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>"}
    return transformers.PreTrainedTokenizerFast(tokenizer_object=made, **special, **settings)


def saved(root: Path, model: Any, *others: Any) -> Path:
    for item in (model, *others):
        item.save_pretrained(root)
    return root


def seeded(kind: Any, config: Any) -> Any:
    torch.manual_seed(0)
    model = kind(config).eval()
    with torch.no_grad():
        for weights in model.parameters():
            weights.mul_(3)  # as they come, everything is nearly 0, and padding too
    return model


def exported(directory: Path, capsys: pytest.CaptureFixture[str], *argv: str) -> tuple[Path, str]:
    """The bundle of a directory by the command line, and what that said on stderr."""
    bundle = directory.with_suffix(".offramp")
    status = cli.main(["export", f"hf:{directory}", "-o", str(bundle), *argv])
    said = capsys.readouterr().err
    assert status == 0, said
    return bundle, said


def run(capsys: pytest.CaptureFixture[str], *argv: object) -> str:
    assert cli.main([str(item) for item in argv]) == 0
    return capsys.readouterr().out


def refused(capsys: pytest.CaptureFixture[str], *argv: object) -> str:
    assert cli.main([str(item) for item in argv]) == 1
    return capsys.readouterr().err


def logits(bundle: Path, texts: Sequence[str]) -> list[Any]:
    """The logits of every text, by the bundle's own tokenizer and padding."""
    chain = offramp.load(bundle)
    return [
        row
        for batch in _text.encode(chain, bundle, texts)
        for row in chain.run(batch, offramp.Never()).outputs["logits"]
    ]


# Padding


@pytest.fixture(scope="module")
def judge(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A classifier on a decoder whose padding is 3, the end: it reads the last token that is no padding."""
    config = transformers.GPT2Config(
        n_layer=2,
        n_embd=16,
        n_head=2,
        vocab_size=20,
        n_positions=12,
        pad_token_id=3,
        id2label={0: "bad", 1: "good"},
        label2id={"bad": 0, "good": 1},
    )
    model = seeded(transformers.GPT2ForSequenceClassification, config)
    return saved(tmp_path_factory.mktemp("judge") / "judge", model, tokenizer(pad_token="</s>"))


@pytest.mark.parametrize(
    ("kind", "names", "found"),
    [
        (None, ["bad", "good"], {"logits": ["bad", "good"]}),
        ("single_label_classification", ["bad", "good"], {"logits": ["bad", "good"]}),
        ("multi_label_classification", ["loud", "long"], {}),
        ("regression", ["price", "size"], {}),
        (None, ["price"], {}),
    ],
)
def test_only_classes_that_exclude_each_other_have_names(kind: Any, names: list[str], found: Any) -> None:
    sizes = {"n_layer": 1, "n_embd": 8, "n_head": 1, "vocab_size": 5, "n_positions": 4, "pad_token_id": 0}
    labels = {"id2label": dict(enumerate(names)), "label2id": {name: at for at, name in enumerate(names)}}
    config = transformers.GPT2Config(**sizes, **labels, problem_type=kind)
    model = transformers.GPT2ForSequenceClassification(config).eval()
    assert directory_settings._labels(model, {"input_ids": torch.tensor([[1, 2]])}) == found


def bundle_of(directory: Path) -> Path:
    bundle = directory.with_suffix(".offramp")
    if not bundle.exists():
        name = f"hf:{directory}"
        module, inputs = models.resolve(name)()
        offramp.save(offramp.capture(module, inputs), bundle, **models.settings(name, module, inputs))
    return bundle


def test_rows_that_are_padded_give_what_they_give_alone(judge: Path) -> None:
    bundle = bundle_of(judge)
    settings = offramp.load(bundle).manifest.preprocessing.text
    assert settings is not None
    assert (settings.pad, settings.pad_side, settings.limit, settings.needs_mask) == (3, "right", 12, False)
    model = transformers.AutoModelForSequenceClassification.from_pretrained(judge)
    encoded = transformers.AutoTokenizer.from_pretrained(judge)(list(TEXTS), padding=True, return_tensors="pt")
    expected = model(**encoded).logits.detach().numpy()
    together, alone = logits(bundle, TEXTS), [logits(bundle, [text])[0] for text in TEXTS]
    np.testing.assert_allclose(together, expected, atol=1e-5)
    np.testing.assert_allclose(alone, expected, atol=1e-5)


def test_padding_that_needs_a_mask_is_left_out_where_the_bundle_takes_none(judge: Path) -> None:
    chain = offramp.load(bundle_of(judge))
    bare = {name: value for name, value in chain.inputs.items() if name != "attention_mask"}
    settings = chain.manifest.preprocessing
    assert settings.text is not None
    strict = replace(settings, text=replace(settings.text, needs_mask=True))
    for text, batches in ((settings, 1), (strict, len(TEXTS))):
        manifest = replace(chain.manifest, preprocessing=text)
        double: Any = SimpleNamespace(manifest=manifest, inputs=bare)
        assert len(_text.encode(double, bundle_of(judge), TEXTS)) == batches


def test_text_that_is_too_long_is_an_error_or_cut(judge: Path, capsys: pytest.CaptureFixture[str]) -> None:
    bundle, long = bundle_of(judge), "hello " * 20
    said = refused(capsys, "run", bundle, "-t", "a good movie", "-t", long)
    assert "text 1 has 21 tokens, the model takes 12" in said
    assert "--truncate" in said
    assert "good" in run(capsys, "run", bundle, "-t", "a good movie", "-t", long, "--truncate")
    chain = offramp.load(bundle)
    (found,) = _text.encode(chain, bundle, [long], truncate=True)
    expected = transformers.AutoTokenizer.from_pretrained(judge)(long, truncation=True, max_length=12)["input_ids"]
    assert found["input_ids"].tolist() == [expected]


@pytest.mark.parametrize(
    ("kind", "settings", "limit"),
    [
        ("bert", {"max_seq_length": 8}, 8),
        ("bert", {"max_seq_length": 20}, 12),
        ("bert", {"max_seq_length": None}, 12),
        ("roberta", {"max_seq_length": 8}, 8),
        ("bert", {"max_seq_length": None, "tokenizer_args": {"model_max_length": 7}}, 7),
    ],
)
def test_texts_end_where_sentence_transformers_ends_them(
    judge: Path, tmp_path: Path, kind: str, settings: dict[str, Any], limit: int
) -> None:
    directory = shutil.copytree(judge, tmp_path / "judge")
    (directory / f"sentence_{kind}_config.json").write_text(json.dumps(settings))
    module, inputs = models.resolve(f"hf:{directory}")()
    found = models.settings(f"hf:{directory}", module, inputs)["preprocessing"]
    assert found["text"]["limit"] == limit


def test_padding_has_no_class() -> None:
    nothing = SimpleNamespace(audio=None)
    manifest = SimpleNamespace(labels={"logits": ("no", "yes")}, files={}, preprocessing=nothing)
    logits, masks = np.eye(2)[[[0, 1, 1], [1, 0, 0]]], np.array([[1, 1, 1], [0, 1, 1]])
    chain: Any = SimpleNamespace(manifest=manifest)
    (shown,) = _results.meanings(chain, Path(), {"logits": logits}, (), [{"attention_mask": masks}])
    assert [line.split()[1:] for line in shown.splitlines()[-2:]] == [["no", "yes", "yes"], ["no", "no"]]


@pytest.mark.parametrize("lower", [False, True])
def test_letters_are_written_as_the_tokenizer_writes_them(tmp_path: Path, lower: bool) -> None:
    letters = ["<pad>", "<s>", "</s>", "<unk>", "|", *"ÉTAO"]
    (tmp_path / "vocab.json").write_text(json.dumps({letter: i for i, letter in enumerate(letters)}))
    reader = transformers.Wav2Vec2CTCTokenizer(str(tmp_path / "vocab.json"), do_lower_case=lower)
    ids = [5, 5, 0, 6, 4, 7, 0, 7, 8]
    made = tokenizers.Tokenizer.from_str(tokenization.as_json(reader))
    assert made.decode(ids, skip_special_tokens=False).strip() == reader.decode(ids)


def test_classes_are_called_by_their_names(judge: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shown = run(capsys, "run", bundle_of(judge), "-t", "a good movie", "-t", "hello")
    expected = torch.tensor(np.array(logits(bundle_of(judge), ["a good movie", "hello"]))).softmax(-1)
    for row, chances in enumerate(expected.tolist()):
        best = int(np.argmax(chances))
        assert re.search(rf"^ *{row}  {['bad', 'good'][best]} {chances[best]:.1%}, ", shown, re.MULTILINE)


def test_rows_run_apart_where_it_is_not_known_how_to_pad(
    judge: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bundle, expected = tmp_path / "apart.offramp", logits(bundle_of(judge), TEXTS)
    shutil.copytree(bundle_of(judge), bundle)
    manifest = json.loads((bundle / "manifest.json").read_text())
    manifest["preprocessing"]["text"]["pad"] = None
    (bundle / "manifest.json").write_text(json.dumps(manifest))
    chain = offramp.load(bundle)
    assert [batch["input_ids"].shape for batch in _text.encode(chain, bundle, TEXTS)] == [(1, 4), (1, 11), (1, 2)]
    assert len(_text.encode(chain, bundle, ["a good movie", "this is test"])) == 1
    out = tmp_path / "out"
    shown = run(capsys, "run", bundle, "-o", out, *(part for text in TEXTS for part in ("-t", text)))
    np.testing.assert_allclose(np.load(out / "logits.npy"), expected, atol=1e-5)
    assert re.findall(r"^ *(\d)  decoder .*?((?:hello|a) .*|hello)$", shown, re.MULTILINE) == [
        (str(row), text) for row, text in enumerate(TEXTS)
    ]
    assert "it is not known how the model takes padding" in refused(capsys, "bench", bundle, "-t", "a", "-t", "a good")


# Images and sound


@pytest.fixture(scope="module")
def viewer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    names = {0: "cat", 1: "dog", 2: "cow"}
    label2id = {name: i for i, name in names.items()}
    config = transformers.ViTConfig(**WIDTH, image_size=32, patch_size=8, id2label=names, label2id=label2id)
    processor = transformers.ViTImageProcessorPil(size={"height": 32, "width": 32})
    return saved(
        tmp_path_factory.mktemp("viewer") / "viewer", seeded(transformers.ViTForImageClassification, config), processor
    )


def picture(path: Path, width: int, height: int) -> Path:
    values = np.random.default_rng(0).integers(0, 256, (height, width, 3), np.uint8)
    PIL.Image.fromarray(values).save(path)
    return path


def test_run_sees(viewer: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    images = [picture(tmp_path / "a.png", 55, 40), picture(tmp_path / "b.png", 20, 70)]
    processor = transformers.AutoImageProcessor.from_pretrained(viewer)
    model = transformers.AutoModelForImageClassification.from_pretrained(viewer)
    inputs = processor([PIL.Image.open(image) for image in images], return_tensors="pt")
    expected = model(**inputs).logits.detach()
    shown = run(
        capsys, "run", bundle_of(viewer), "-o", tmp_path, *(part for image in images for part in ("--image", image))
    )
    np.testing.assert_allclose(np.load(tmp_path / "logits.npy"), expected, atol=1e-5)
    for row, chances in enumerate(expected.softmax(-1)):
        assert f"{row}  {model.config.id2label[int(chances.argmax())]} {float(chances.max()):.1%}" in shown


def test_run_says_why_it_sees_nothing(viewer: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    blind = tmp_path / "blind.offramp"
    shutil.copytree(bundle_of(viewer), blind)
    manifest = json.loads((blind / "manifest.json").read_text())
    manifest["preprocessing"] |= {"image": None, "refused": {"image": "FooImageProcessor does more than that"}}
    (blind / "manifest.json").write_text(json.dumps(manifest))
    image = picture(tmp_path / "a.png", 8, 8)
    assert "images into inputs: FooImageProcessor does more than that" in refused(
        capsys, "run", blind, "--image", image
    )
    assert "no settings for sound" in refused(capsys, "run", blind, "--audio", tmp_path / "a.wav")
    assert "gone.png cannot be read" in refused(capsys, "run", bundle_of(viewer), "--image", tmp_path / "gone.png")


@pytest.mark.slow
def test_run_writes_down_what_it_hears(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    letters = ["<pad>", "<s>", "</s>", "<unk>", "|", *"ETAO"]
    (tmp_path / "vocab.json").write_text(json.dumps({letter: i for i, letter in enumerate(letters)}))
    reader = transformers.Wav2Vec2CTCTokenizer(str(tmp_path / "vocab.json"))
    config = transformers.Wav2Vec2Config(
        **WIDTH,
        vocab_size=len(letters),
        conv_dim=(16, 16),
        conv_kernel=(10, 3),
        conv_stride=(5, 2),
        num_conv_pos_embeddings=16,
        num_conv_pos_embedding_groups=2,
    )
    model = seeded(transformers.Wav2Vec2ForCTC, config)
    extractor = transformers.Wav2Vec2FeatureExtractor()
    bundle = bundle_of(saved(tmp_path / "writer", model, reader, extractor))
    samples = (3000 * np.random.default_rng(1).standard_normal(2000)).astype("<i2")
    for name, count in (("a.wav", 2000), ("b.wav", 1700)):
        with wave.open(str(tmp_path / name), "wb") as file:
            file.setnchannels(1)
            file.setsampwidth(2)
            file.setframerate(16000)
            file.writeframes(samples[:count].tobytes())
    made = extractor(samples.astype(np.float32) / 32768, sampling_rate=16000, return_tensors="pt")
    expected = reader.decode(model(**made).logits.argmax(-1)[0])
    assert len(set(expected)) > 3
    twice = run(capsys, "run", bundle, "--audio", tmp_path / "a.wav", "--audio", tmp_path / "a.wav")
    assert f"  0  {expected}\n" in twice
    assert f"  1  {expected}\n" in twice
    made = extractor(samples[:1700].astype(np.float32) / 32768, sampling_rate=16000, return_tensors="pt")
    shorter = reader.decode(model(**made).logits.argmax(-1)[0])
    both = ("--audio", tmp_path / "a.wav", "--audio", tmp_path / "b.wav")
    apart = run(capsys, "run", bundle, *both)
    assert f"  0  {expected}\n" in apart
    assert f"  1  {shorter}\n" in apart
    said = refused(capsys, "bench", bundle, *both)
    assert "the 2 sounds have different lengths, [2000, 1700]" in said

    (tmp_path / "examples.jsonl").write_text('{"audio": "a.wav"}\n{"audio": "b.wav"}\n')
    examples = _data.read(offramp.load(bundle), bundle, tmp_path / "examples.jsonl")
    assert [example["input_values"].shape for example in examples] == [(1, 2000), (1, 1700)]
    np.testing.assert_allclose(examples[1]["input_values"], made["input_values"], rtol=0, atol=1e-5)


# What is taken along


def small_writer(blocks: int = 1, **generation: Any) -> Any:
    config = transformers.GPT2Config(n_layer=blocks, n_embd=8, n_head=2, vocab_size=20, n_positions=32, bos_token_id=2)
    model = transformers.GPT2LMHeadModel(config).eval()
    model.generation_config = transformers.GenerationConfig(**generation)
    return model


def settings_of(directory: Path, **options: Any) -> tuple[dict[str, Any], list[str]]:
    notes: list[str] = []
    name = f"hf:{directory}"
    module, inputs = models.resolve(name)()
    return models.settings(name, module, inputs, note=notes.append, **options), notes


CHAT = "{% for m in messages %}<s>{{m.content|trim}}</s>{% endfor %}{% if add_generation_prompt %}hello{% endif %}"
PARTS = "<s>{{messages[0].content[0].text}}</s>"


@pytest.mark.parametrize(
    ("chat", "template", "said"),
    [
        (CHAT, "<s>{text}</s>hello", []),
        (PARTS, "<s>{text}</s>", []),
        (None, None, []),
        ("hello", None, ["the bundle has no chat template: it has a user's message 0 times"]),
        ("{{messages[0].content}} {{messages[0].content}}", None, ["the bundle has no chat template: it has a"]),
        ("{{raise_exception('not you')}}", None, ["the bundle has no chat template: it fails: not you"]),
        ("{% endfor %}", None, ["the bundle has no chat template: it fails: "]),
        ("{{strftime_now('%Y')[:0]}}{{messages[0].content}}", "{text}", ["the chat template writes the day"]),
    ],
)
def test_chat_templates(chat: str | None, template: str | None, said: list[str], tmp_path: Path) -> None:
    words = tokenizer()
    words.chat_template = chat
    found, notes = settings_of(saved(tmp_path, small_writer(eos_token_id=[0, 4]), words))
    assert found["generation"].get("template") == template
    assert found["generation"]["stop"] == [0, 4]
    assert [note[: len(start)] for note, start in zip(notes, said, strict=True)] == said


def test_a_prompt_in_a_chat_template_is_what_the_tokenizer_makes(tmp_path: Path) -> None:
    words = tokenizer()
    words.chat_template = CHAT
    found, _ = settings_of(saved(tmp_path, small_writer(), words))
    made = tokenizers.Tokenizer.from_str(found["files"]["tokenizer.json"].decode())
    text = found["generation"]["template"].replace("{text}", "a good movie")
    expected = words.apply_chat_template([{"role": "user", "content": "a good movie"}], add_generation_prompt=True)
    assert made.encode(text, add_special_tokens=False).ids == expected["input_ids"]


def test_a_tokenizer_without_a_file_of_its_own_is_converted(tmp_path: Path) -> None:
    words = {word: i for i, word in enumerate(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "good", "##ness", "!"])}
    made = transformers.BertTokenizer(vocab=words)
    directory = saved(tmp_path, small_writer(), made)
    (directory / "tokenizer.json").unlink()
    (directory / "vocab.txt").write_text("\n".join(words))
    found, notes = settings_of(directory)
    assert notes == []
    encoded = tokenizers.Tokenizer.from_str(found["files"]["tokenizer.json"].decode()).encode("Goodness! good")
    assert encoded.ids == made("Goodness! good")["input_ids"] == [2, 5, 6, 7, 5, 3]


def test_a_tokenizer_that_has_no_such_form_is_said_and_left_out(tmp_path: Path) -> None:
    found, notes = settings_of(saved(tmp_path, small_writer(), transformers.ByT5Tokenizer()))
    assert "tokenizer.json" not in found["files"]
    assert notes == ["the bundle takes no text: ByT5Tokenizer has no form that the package tokenizers reads"]
    assert found["preprocessing"]["refused"] == {"text": notes[0].removeprefix("the bundle takes no text: ")}


def test_a_directory_without_a_tokenizer_is_no_reason_for_a_note(tmp_path: Path) -> None:
    found, notes = settings_of(saved(tmp_path, small_writer()))
    assert (found["files"], found["preprocessing"], notes) == ({}, {}, [])


def test_the_command_line_refuses_a_generation_config_before_it_captures(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    directory = saved(tmp_path / "beams", small_writer(num_beams=4, num_beam_groups=2, diversity_penalty=0.5))
    said = refused(capsys, "export", f"hf:{directory}", "-o", tmp_path / "b.offramp")
    assert "offramp: model: the generation_config of GPT2LMHeadModel asks for what a bundle cannot do" in said
    assert "--ignore-generation diversity_penalty --ignore-generation num_beam_groups" in said
    found, _ = settings_of(directory, ignore_generation=["num_beam_groups", "diversity_penalty"])
    assert found["generation"]["beams"] == 4


@pytest.mark.slow
def test_a_check_refuses_a_generation_config_as_an_export_does(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    directory = saved(tmp_path / "beams", small_writer(2, encoder_no_repeat_ngram_size=2))
    assert cli.main(["check", f"hf:{directory}"]) == 1
    shown = capsys.readouterr().out
    with pytest.raises(PretrainedModelError) as caught:
        settings_of(directory)
    assert f"model: {' '.join(caught.value.reason.split())}; try: --ignore-generation encoder_no_repeat_" in shown
    assert cli.main(["check", f"hf:{directory}", "--ignore-generation", "encoder_no_repeat_ngram_size"]) == 0
    report = check(f"hf:{directory}", ignore_generation=["luck"])
    assert (report.stage, report.seconds["capture"]) == ("model", None)
    assert "the generation_config has no luck" in str(report.reason)


def test_ordinary_numbered_classes_have_no_names(tmp_path: Path) -> None:
    config = transformers.BertConfig(**WIDTH, vocab_size=20)
    found, _ = settings_of(saved(tmp_path, transformers.BertForSequenceClassification(config)))
    assert found["labels"] == {}


def test_classes_that_do_not_exclude_each_other_are_said_to(tmp_path: Path) -> None:
    config = transformers.BertConfig(
        **WIDTH, vocab_size=20, problem_type="multi_label_classification", id2label={0: "bad", 1: "long"}
    )
    found, notes = settings_of(saved(tmp_path, transformers.BertForSequenceClassification(config)))
    assert found["labels"] == {}
    assert any(
        "the classes of BertForSequenceClassification do not exclude each other: scores of exits, and calibrate" in note
        for note in notes
    )
