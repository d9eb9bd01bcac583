"""Image processors of transformers as settings: the runtime makes of any image what the processor makes of it."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import pytest
import transformers

from offramp.bundle.preprocessing import Image
from offramp.errors import InputError
from offramp.pretrained.image_processor import SQUARES, fits, image_settings, size
from offramp.runtime.preprocess.image import pixels, read_image

# class, and settings that make its results small
PROCESSORS: list[tuple[str, dict[str, Any]]] = [
    ("ViT", {"size": {"height": 30, "width": 20}}),
    ("ViT", {"size": 32, "do_rescale": False, "do_normalize": False}),
    ("ViT", {"do_resize": False, "do_normalize": False}),
    ("CLIP", {"size": {"shortest_edge": 25}, "crop_size": 21}),
    ("CLIP", {"size": {"shortest_edge": 20}, "crop_size": {"height": 31, "width": 24}}),
    ("CLIP", {"size": {"height": 20, "width": 28}, "do_center_crop": False, "resample": 1}),
    ("Siglip", {"size": {"height": 32, "width": 32}, "resample": 0}),
    ("DeiT", {"size": 40, "crop_size": 33}),
    ("Beit", {"size": 32}),
    ("Segformer", {"size": 32}),
    ("Blip", {"size": {"height": 32, "width": 32}}),
    ("ConvNext", {"size": {"shortest_edge": 32}}),
    ("ConvNext", {"size": {"shortest_edge": 384}}),
    ("PoolFormer", {"size": {"shortest_edge": 32}, "crop_size": 32}),
    ("Levit", {"size": {"shortest_edge": 32}, "crop_size": 32}),
    ("EfficientNet", {"size": 32, "rescale_offset": True}),
    ("EfficientNet", {"size": 32, "include_top": False}),
    ("MobileViT", {"size": {"shortest_edge": 40}, "crop_size": 32}),
    ("Llava", {"size": {"shortest_edge": 32}, "crop_size": 32, "do_pad": True}),
    ("Detr", {"size": {"shortest_edge": 30, "longest_edge": 37}, "do_pad": False}),
    ("Gemma3", {"size": {"height": 32, "width": 32}}),
]


def processor(name: str, settings: dict[str, Any]) -> Any:
    return getattr(transformers, f"{name}ImageProcessorPil")(**settings)


def noise(width: int, height: int, mode: str = "RGB") -> PIL.Image.Image:
    random = np.random.default_rng(width * height)
    bands = len(PIL.Image.new(mode, (1, 1)).getbands())
    values = random.integers(0, 256, (height, width, bands), np.uint8)
    return PIL.Image.fromarray(values if bands > 1 else values[..., 0], mode)


@pytest.mark.parametrize(("name", "settings"), PROCESSORS)
def test_pixels_are_those_of_the_processor(name: str, settings: dict[str, Any]) -> None:
    made = processor(name, settings)
    found = image_settings(made)
    for width, height in ((61, 35), (35, 61), (500, 377), (33, 33), (101, 7)):
        image = noise(width, height)
        expected = made(images=image, return_tensors="np")["pixel_values"]
        np.testing.assert_allclose(pixels(image, found), expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("mode", ["L", "LA", "RGBA", "P", "1", "CMYK"])
def test_other_modes_of_colour(mode: str, tmp_path: Path) -> None:
    made = processor("CLIP", {"size": {"shortest_edge": 25}, "crop_size": 21})
    image = noise(45, 37, "RGBA" if mode == "P" else "L" if mode == "1" else mode).convert(mode)
    expected = made(images=image, return_tensors="np")["pixel_values"]
    np.testing.assert_allclose(pixels(image, image_settings(made)), expected, rtol=0, atol=1e-6)


def test_without_a_rule_for_transparency_it_is_dropped() -> None:
    made = processor("ViT", {"size": 32})  # which fails on other images than RGB: what callers convert them to
    for mode in ("L", "RGBA"):
        image = noise(45, 37, mode)
        expected = made(images=image.convert("RGB"), return_tensors="np")["pixel_values"]
        np.testing.assert_allclose(pixels(image, image_settings(made)), expected, rtol=0, atol=1e-6)


def test_padding_to_a_size() -> None:
    made = processor("ViT", {"do_resize": False, "do_normalize": False, "do_pad": True, "pad_size": 700})
    found = image_settings(made)
    assert found.pad == (700, 700)
    image = noise(45, 37)
    np.testing.assert_array_equal(pixels(image, found), made(images=image, return_tensors="np")["pixel_values"])
    with pytest.raises(InputError, match=r"\[37, 45\].*at most \[30, 30\]"):
        pixels(image, Image(pad=(30, 30)))


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("Donut", "more than resize"),
        ("Qwen2VL", r"makes pixel_values \[24, 1176\]"),
        ("Pix2Struct", "fails on an image"),
    ],
)
def test_processors_that_do_something_else_are_refused_by_name(name: str, reason: str) -> None:
    with pytest.raises(ValueError, match=f"{name}ImageProcessorPil .*{reason}"):
        image_settings(processor(name, {}))


def test_images_that_become_another_size_than_the_models_are_said() -> None:
    alike = processor("ViT", {"size": {"height": 30, "width": 20}})
    by_shape = processor("Detr", {"size": {"shortest_edge": 30, "longest_edge": 37}, "do_pad": False})
    assert (size(alike), size(by_shape), size(by_shape, SQUARES)) == ((30, 20), None, (30, 30))
    assert fits(alike, (30, 20)) is None
    assert "the bundle takes those that become 30x30" in (fits(by_shape, (30, 30)) or "")
    with pytest.raises(ValueError, match="makes 30x20 pixels of one, and the model has 20x30"):
        fits(alike, (20, 30))


@pytest.mark.parametrize(
    "settings", [Image(max_height=224, max_width=224), Image(shortest=30, longest=40)], ids=["within", "longest"]
)
def test_an_image_so_long_that_nothing_is_left_of_it(settings: Image) -> None:
    for width, height in ((3000, 3), (3, 3000)):
        with pytest.raises(InputError, match=rf"\[{height}, {width}\] pixels, .* leaves .*0"):
            pixels(noise(width, height), settings)


def test_files_are_read_upright(tmp_path: Path) -> None:
    noise(20, 30).save(tmp_path / "lying.png", exif=_turned())
    assert read_image(tmp_path / "lying.png").size == (30, 20)


def _turned() -> PIL.Image.Exif:
    exif = PIL.Image.Exif()
    exif[0x0112] = 6  # orientation: to be turned by 90 degrees
    return exif


def test_a_file_that_is_no_image(tmp_path: Path) -> None:
    (tmp_path / "text.png").write_text("no image")
    for name in ("text.png", "nowhere.png"):
        with pytest.raises(InputError, match=f"{name} cannot be read"):
            read_image(tmp_path / name)


def test_without_pillow(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(sys.modules, "PIL", None)
    with pytest.raises(InputError, match=r"offramp\[image\]"):
        read_image(tmp_path / "image.png")
