"""A text with an image from the command line: the ids of the model's own processor, and the tokens of its generate."""

# mypy: disable-error-code="no-untyped-call"
from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
import vision_directories
from breadth import slow_but
from directory_cases import picture

import offramp
from offramp.bundle.preprocessing import ImageText, Marked, Preprocessing, preprocessing_problems
from offramp.cli import _data, _generate, _inputs, build_parser, main
from offramp.errors import InputError
from offramp.runtime.preprocess.image_text import Places, ids

TEXTS = ("a cat", "what is the dog doing?")
NEW = 8


@dataclass
class Reader:
    """A directory that was exported, and the same model and processor in transformers."""

    folder: Path
    bundle: Path
    images: list[str]
    said: str
    model: Any
    processor: Any
    chain: Any

    @property
    def settings(self) -> ImageText:
        return self.chain.manifest.preprocessing.image_text or ImageText()

    def given(self, *texts: str, options: tuple[str, ...] = ()) -> Mapping[str, Any]:
        """What the command line makes of texts, with an image each."""
        flags = [
            part for image, text in zip(self.images, texts, strict=False) for part in ("--image", image, "-t", text)
        ]
        args = build_parser().parse_args(["run", str(self.bundle), *flags, *options])
        return _inputs.one(self.chain, _generate.prompted(self.chain, args))

    def wanted(self, text: str, row: int = 0) -> Mapping[str, torch.Tensor]:
        """What the processor makes of a text with an image."""
        made = self.processor(images=picture(row), text=text, return_tensors="np")
        return {name: torch.from_numpy(np.array(value)) for name, value in made.items() if name != "labels"}

    def chat(self, *content: Mapping[str, Any]) -> Mapping[str, torch.Tensor]:
        """What it makes of a message."""
        return dict(
            self.processor.apply_chat_template(
                [{"role": "user", "content": list(content)}],
                add_generation_prompt=True,
                tokenize=True,
                return_dict=True,
                return_tensors="pt",
            )
        )

    def generated(self, inputs: Mapping[str, torch.Tensor]) -> list[int]:
        """The new tokens of transformers."""
        with torch.no_grad():
            copies = {name: value.clone() for name, value in inputs.items()}
            found: list[int] = self.model.generate(**copies, max_new_tokens=NEW, do_sample=False)[0].tolist()
        return found


def _exported(name: str, root: Path, capsys: Any = None) -> tuple[Path, Path]:
    (root / "saved").mkdir()
    getattr(vision_directories, name)(root / "saved")
    assert main(["export", f"hf:{root / 'saved'}", "-o", str(root / "bundle")]) == 0
    return root / "saved", root / "bundle"


KINDS = {"llava"}  # a mark in the text; the others are breadth


@pytest.fixture(
    scope="module",
    params=slow_but(KINDS, vision_directories.READERS),
)
def reader(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Reader:
    root = tmp_path_factory.mktemp(request.param)
    folder, bundle = _exported(request.param, root)
    images = []
    for row in range(2):
        picture(row).save(root / f"{row}.png")
        images.append(str(root / f"{row}.png"))
    config = transformers.AutoConfig.from_pretrained(folder)
    model = getattr(transformers, config.architectures[0]).from_pretrained(folder).eval()
    processor = transformers.AutoProcessor.from_pretrained(folder)
    return Reader(folder, bundle, images, "", model, processor, offramp.load(bundle))


def _same(found: list[int], whole: list[int]) -> bool:
    """Whether tokens are the last ones of what transformers made, which may end with padding or start with a prompt."""
    return whole[-len(found) :] == found or whole[1 : len(found) + 1] == found


def test_the_ids_are_those_of_the_processor_and_the_tokens_those_of_the_model(reader: Reader) -> None:
    marks = [] if reader.settings.mark is None else [f"{reader.settings.mark} {text}" for text in TEXTS]
    marks += [] if reader.settings.mark is None else [f"what {reader.settings.mark}\nis it", str(reader.settings.mark)]
    for text in [*marks, *(TEXTS if reader.settings.bare is not None else ())]:
        wanted, given = reader.wanted(text), reader.given(text, options=("--raw",))
        expected = wanted["input_ids"][0].tolist()
        if reader.settings.dropped:
            expected = [reader.settings.first, *expected[1 : -reader.settings.dropped]]
        assert np.asarray(given["input_ids"])[0].tolist() == expected
        found = reader.chain.generate(given, max_new_tokens=NEW).tokens[0].tolist()
        assert _same(found, reader.generated(wanted)), text


def test_rows_have_an_image_each(reader: Reader) -> None:
    texts = TEXTS if reader.settings.bare is not None else [f"{reader.settings.mark}{text}" for text in TEXTS]
    found = reader.chain.generate(reader.given(*texts, options=("--raw",)), max_new_tokens=NEW).tokens
    for row, text in enumerate(texts):
        assert _same(found[row].tolist(), reader.generated(reader.wanted(text, row)))


def test_examples_of_a_file_are_read_as_the_command_line_reads_them(reader: Reader, tmp_path: Path) -> None:
    text = TEXTS[0] if reader.settings.mark is None else f"{reader.settings.mark} {TEXTS[0]}"
    data = Path(reader.images[0]).parent / "data.jsonl"
    data.write_text(json.dumps({"image": Path(reader.images[0]).name, "text": text, "label": "a dog"}) + "\n")
    (found,), wanted = _data.read(reader.chain, reader.bundle, data), reader.given(text)
    assert found.pop("labels")[0].size > 0
    assert {name: np.asarray(value).tolist() for name, value in found.items()} == {
        name: np.asarray(value).tolist() for name, value in wanted.items()
    }


def test_one_pass_is_the_model(reader: Reader, tmp_path: Path) -> None:
    text = TEXTS[0] if reader.settings.bare is not None else f"{reader.settings.mark} {TEXTS[0]}"
    wanted = dict(reader.wanted(text))
    flags = ["--image", reader.images[0], "--text", text]
    if "decoder_input_ids" in reader.chain.inputs:
        wanted["decoder_input_ids"] = torch.tensor([[0, 7, 8]])
        np.save(tmp_path / "ids.npy", wanted["decoder_input_ids"].numpy())
        flags += ["--input", f"decoder_input_ids={tmp_path / 'ids.npy'}"]
    assert main(["run", str(reader.bundle), *flags, "--once", "-o", str(tmp_path / "out")]) == 0
    with torch.no_grad():
        logits = reader.model(**wanted).logits
    np.testing.assert_allclose(np.load(tmp_path / "out" / "logits.npy"), logits.numpy(), rtol=1e-3, atol=1e-4)


def test_without_a_text_it_says_what_to_give_or_starts_as_the_model_does(
    reader: Reader, capsys: pytest.CaptureFixture[str]
) -> None:
    status = main(["run", str(reader.bundle), "--image", reader.images[0], "--max-new-tokens", str(NEW)])
    said = capsys.readouterr().err
    pixels = reader.wanted(reader.settings.mark or "a")["pixel_values"]
    if status:
        assert "'input_ids' is missing" in said
        assert '--text "' + (f"{reader.settings.mark} ..." if reader.settings.bare is None else "...") in said
        return
    found = reader.chain.generate({"pixel_values": pixels.numpy()}, max_new_tokens=NEW).tokens[0].tolist()
    assert _same(found, reader.generated({"pixel_values": pixels}))


@pytest.mark.parametrize(("texts", "images"), [(1, 2), (2, 1)])
def test_a_row_has_one_text_and_one_image(
    reader: Reader, texts: int, images: int, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = [part for image in reader.images[:images] for part in ("--image", image)]
    flags += [part for _ in range(texts) for part in ("--text", f"{reader.settings.mark or ''}a")]
    assert main(["run", str(reader.bundle), *flags]) == 1
    said = capsys.readouterr().err
    assert f"{texts} of --text and {images} of --image: a row has one of each" in said
    assert "--text A --image FILE --text B --image FILE" in said


def test_an_image_is_asked_for(reader: Reader, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["run", str(reader.bundle), "--text", f"{reader.settings.mark or ''}a"]) == 1
    said = capsys.readouterr().err
    assert "'pixel_values' is missing: the model takes an image" in said
    assert "--image FILE" in said


@pytest.mark.parametrize("reader", ["paligemma", "gemma3"], indirect=True)
@pytest.mark.slow
def test_types_follow_from_the_ids_in_python_too(reader: Reader) -> None:
    wanted = reader.wanted(f"{reader.settings.mark} a cat")
    bare = {name: wanted[name].numpy() for name in ("input_ids", "pixel_values")}
    whole = {**bare, "token_type_ids": wanted["token_type_ids"].numpy()}
    one, other = (reader.chain.generate(given, max_new_tokens=NEW).tokens[0].tolist() for given in (bare, whole))
    assert one == other
    assert _same(one, reader.generated(wanted))
    logits, same = (reader.chain.run(given).outputs["logits"] for given in (bare, whole))
    np.testing.assert_array_equal(logits, same)


@pytest.mark.parametrize("reader", ["llava_chat", "gemma3_chat"], indirect=True)
@pytest.mark.slow
def test_a_chat_says_where_the_image_goes(reader: Reader) -> None:
    mark = reader.settings.mark
    image = {"type": "image", "image": picture(0)}
    for text, content in (
        ("a cat", [image, {"type": "text", "text": "a cat"}]),
        (f"what {mark} is it", None),
    ):
        wanted = reader.chat(*content) if content else _marked_chat(reader, text)
        given = reader.given(text)
        assert np.asarray(given["input_ids"])[0].tolist() == wanted["input_ids"][0].tolist()
        found = reader.chain.generate(given, max_new_tokens=NEW).tokens[0].tolist()
        assert _same(found, reader.generated(wanted))


def _marked_chat(reader: Reader, text: str) -> Mapping[str, torch.Tensor]:
    """A message whose text has the mark itself."""
    whole = reader.processor.apply_chat_template(
        [{"role": "user", "content": [{"type": "text", "text": text}]}], add_generation_prompt=True, tokenize=False
    )
    special = not whole.startswith(reader.processor.tokenizer.bos_token)
    return dict(reader.processor(images=picture(0), text=whole, add_special_tokens=special, return_tensors="pt"))


@pytest.mark.slow
def test_a_processor_that_cannot_be_loaded_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("PIL")
    if transformers.utils.is_torchvision_available():
        pytest.skip("its processor can be loaded where torchvision is installed")
    _, bundle = _exported("internvl", tmp_path)
    said = capsys.readouterr().err
    assert "how the model takes a text with an image is not known, so the text is encoded alone: " in said
    manifest = offramp.load(bundle).manifest
    assert manifest.preprocessing.image_text is None
    assert "torchvision" in manifest.preprocessing.refused["image_text"]


@pytest.mark.slow
def test_types_that_do_not_follow_from_the_ids_are_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    make = transformers.Gemma3Processor.__call__

    def counted(self: Any, *args: Any, **options: Any) -> Any:
        made = make(self, *args, **options)
        if "token_type_ids" in made:
            made["token_type_ids"] = np.arange(np.asarray(made["input_ids"]).size).reshape(1, -1) % 2
        return made

    monkeypatch.setattr(transformers.Gemma3Processor, "__call__", counted)
    _, bundle = _exported("gemma3", tmp_path)
    assert "Gemma3Processor makes a token_type_ids that does not follow from the token ids" in capsys.readouterr().err
    picture(0).save(tmp_path / "0.png")
    assert main(["run", str(bundle), "--image", str(tmp_path / "0.png"), "--text", "<image> a"]) == 1
    said = capsys.readouterr().err
    assert "'token_type_ids' is missing: no text, sound or image makes this" in said
    assert "--input token_type_ids=file.npy" in said
    given = {"input_ids": [[5, 5, 5, 5, 9]], "pixel_values": np.zeros((1, 3, 16, 16), np.float32)}
    with pytest.raises(InputError, match=r"(?s)'token_type_ids' is missing: it has .*as the model's processor"):
        offramp.load(bundle).generate(given)


@pytest.mark.slow
def test_a_generate_with_an_end_of_its_own_is_followed_without_a_note(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    _, bundle = _exported("blip", tmp_path)
    generation = offramp.load(bundle).manifest.generation
    assert (generation.stop, generation.prompt, generation.max_new_tokens) == ((122,), (4,), 20)
    assert "generate of its own" not in capsys.readouterr().err


@pytest.mark.slow
def test_a_forward_without_what_generates_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    _exported("blip_answers", tmp_path)
    said = capsys.readouterr().err
    assert (
        "the bundle does not generate: its model does, but what its forward returns (image_embeds, last_hidden" in said
    )


def encode(text: str, special: bool) -> list[int]:
    return [1] * special + [ord(letter) for letter in text]


def test_what_looks_like_a_frame_in_a_text_stays_as_it_is() -> None:
    settings = ImageText(mark="#", place="<{image}>", marked="{text}.", bare=None)
    made = ids("{text} # {image}", settings, Places("i", ord("i"), 2), encode)
    assert made == encode("{text} <ii> {image}.", True)
    assert ids("##a", settings, Places("i", ord("i"), 2), encode) == encode("<ii>a.", True)
    with pytest.raises(InputError, match="the text has '#' 3 times; it stands there once, or once for each of 2"):
        ids("a#b#c#", settings, Places("i", ord("i"), 2), encode)


def test_the_settings_are_checked_and_read_back() -> None:
    for settings, problem in (
        (ImageText(bare="a"), "preprocessing.image_text.bare is 'a', expected {text} in it once"),
        (ImageText(bare=None), "preprocessing.image_text has no mark"),
        (ImageText(mark=""), "preprocessing.image_text.mark is empty"),
        (ImageText(dropped=-1), "preprocessing.image_text.dropped is -1, expected at least 0"),
    ):
        (found,) = preprocessing_problems(Preprocessing(image_text=settings))
        assert problem in found
    good = ImageText(mark="#", bare=None, inputs={"types": Marked((5,), 1, 0)})
    assert list(preprocessing_problems(Preprocessing(image_text=good))) == []
