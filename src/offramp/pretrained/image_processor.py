"""An image processor of transformers as the settings of a bundle: read, then tried on images.

Classes of processors differ in what they do with the same settings. So the settings are read in every way known here,
and that one is taken by which the runtime makes of some images what the processor makes of them.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
import PIL.Image

from offramp.bundle.preprocessing import FILTERS, Image
from offramp.errors import InputError
from offramp.pretrained.tokenization import reason
from offramp.runtime.preprocess.image import pixels

if TYPE_CHECKING:
    from PIL.Image import Image as Picture

PIXELS = "pixel_values"
_TOLERANCE = 1e-5
_SIZES = ((37, 53), (301, 203), (64, 64), (448, 611))  # width and height: small and large, upright and lying
SQUARES = ((64, 64), (96, 96))


def image_settings(processor: Any) -> Image:
    """What the processor does with an image.

    Raises:
        ValueError: no way of reading its settings gives what it gives; the message says what is different.
    """
    found = {key: value for key, value in processor.to_dict().items() if value is not None}
    images = [noise(size, "RGB") for size in _SIZES]
    expected = [_processed(processor, image) for image in images]
    least = float("inf")
    for settings in _readings(found):
        error = _difference(settings, images, expected)
        if error <= _TOLERANCE:
            return replace(settings, rgb=_is_composed(processor, settings))
        least = min(least, error)
    how = f"values differ by {least:.1e}" if np.isfinite(least) else "shapes differ"
    raise ValueError(f"{type(processor).__name__} does more than resize, crop, scale and normalize ({how})")


def size(processor: Any, images: Sequence[tuple[int, int]] = _SIZES) -> tuple[int, int] | None:
    """Height and width of what the processor makes of images, of any size or of these; None where those differ.

    Raises:
        ValueError: it fails on an image.
    """
    sizes = {_processed(processor, noise(size, "RGB")).shape[2:] for size in images}
    return sizes.pop() if len(sizes) == 1 else None


def fits(processor: Any, pixels: Sequence[int]) -> str | None:
    """What is to be said where only some images become pixels of this height and width; None where all do.

    Raises:
        ValueError: none does.
    """
    made, (height, width) = size(processor), pixels
    if made == (height, width):
        return None
    if made is not None:
        raise ValueError(
            f"{type(processor).__name__} makes {made[0]}x{made[1]} pixels of one, and the model has {height}x{width}"
        )
    return (
        f"{type(processor).__name__} makes {PIXELS} of other sizes of images of other shapes, and the bundle takes "
        f"those that become {height}x{width}: a size of height and width in preprocessor_config.json makes all alike"
    )


def noise(size: tuple[int, int], mode: str) -> Picture:
    """An image of this width and height, the same every time."""
    random = np.random.default_rng(sum(size))
    values = random.integers(0, 256, (*size[::-1], len(mode)), np.uint8)
    return PIL.Image.fromarray(values, mode) if len(mode) > 1 else PIL.Image.fromarray(values[..., 0])


def _processed(processor: Any, image: Picture) -> Any:
    """What the processor makes of an image, float32 ``[1, channels, height, width]``."""
    try:
        values = np.asarray(processor(images=image, return_tensors="np")[PIXELS])
    except Exception as error:
        raise ValueError(f"{type(processor).__name__} fails on an image: {reason(error)}") from error
    if values.ndim != 4 or values.shape[0] != 1:
        raise ValueError(f"{type(processor).__name__} makes {PIXELS} {list(values.shape)} of an image")
    return values


def _difference(settings: Image, images: list[Picture], expected: list[Any]) -> float:
    """The greatest difference from what is expected; infinite where shapes differ."""
    greatest = 0.0
    for image, values in zip(images, expected, strict=True):
        try:
            made = pixels(image, settings)
        except (InputError, ValueError):
            return float("inf")
        if made.shape != values.shape:
            return float("inf")
        greatest = max(greatest, float(np.abs(made - values).max()))
    return greatest


def _is_composed(processor: Any, settings: Image) -> bool:
    """Whether transparency becomes white; it is dropped where the processor does so, or takes no such images."""
    image = noise(_SIZES[0], "RGBA")
    try:
        expected = _processed(processor, image)
    except ValueError:
        return bool(processor.to_dict().get("do_convert_rgb"))
    return _difference(replace(settings, rgb=True), [image], [expected]) <= _TOLERANCE


def _readings(found: dict[str, Any]) -> Iterator[Image]:
    """The ways to read the settings, the plainest first."""
    plain = _plain(found)
    for resized in _resized(plain, found):
        yield resized
        yield from _scaled(resized, found)
        if found.get("do_flip_channel_order"):
            yield replace(resized, bgr=True)
        if found.get("do_pad"):
            colour = tuple(int(value * 255) for value in resized.mean or (0.0, 0.0, 0.0))
            yield replace(resized, square=colour, pad=None)


def _plain(found: dict[str, Any]) -> Image:
    size = _sides(found.get("size")) if found.get("do_resize") else {}
    crop = _sides(found.get("crop_size")) if found.get("do_center_crop") else {}
    pad = _sides(found.get("pad_size")) if found.get("do_pad") else {}
    normalize = bool(found.get("do_normalize"))
    filter_ = int(found.get("resample", FILTERS.index("bilinear")))
    return Image(
        shortest=size.get("shortest_edge"),
        longest=size.get("longest_edge"),
        height=size.get("height"),
        width=size.get("width"),
        max_height=size.get("max_height"),
        max_width=size.get("max_width"),
        resample=FILTERS[filter_] if 0 <= filter_ < len(FILTERS) else "bilinear",
        crop=_pair(crop),
        scale=float(found.get("rescale_factor", 1 / 255)) if found.get("do_rescale") else None,
        mean=_numbers(found.get("image_mean")) if normalize else None,
        std=_numbers(found.get("image_std")) if normalize else None,
        pad=_pair(pad),
    )


def _resized(plain: Image, found: dict[str, Any]) -> Iterator[Image]:
    """The size as it stands; larger by the share that a crop is to leave; or of the same share for all."""
    yield plain
    share = float(found.get("crop_pct") or 0)
    if plain.shortest and share:
        larger = replace(plain, shortest=int(plain.shortest / share))
        yield larger
        yield replace(larger, crop=(plain.shortest, plain.shortest))
        yield replace(plain, shortest=None, height=plain.shortest, width=plain.shortest)
    elif plain.height and plain.height == plain.width and share:
        yield replace(plain, shortest=int(plain.height / share), height=None, width=None)
    if plain.shortest:
        yield replace(plain, shortest=int(256 / 224 * plain.shortest))


def _scaled(plain: Image, found: dict[str, Any]) -> Iterator[Image]:
    """Scaled to [-1, 1], and divided by the deviation twice, where there are switches for that."""
    offsets = [-1.0, 0.0] if found.get("rescale_offset") else [0.0]
    twice = tuple(value**2 for value in plain.std or ())
    for offset in offsets:
        if offset:
            yield replace(plain, offset=offset)
        if found.get("include_top") and twice:
            yield replace(plain, offset=offset, std=twice)


def _sides(size: Any) -> dict[str, int]:
    """A size in any of the forms that configurations have had."""
    if isinstance(size, int):
        return {"height": size, "width": size}
    if isinstance(size, (list, tuple)):
        return {"height": int(size[0]), "width": int(size[1])}
    return {key: int(value) for key, value in dict(size or {}).items() if value is not None}


def _pair(sides: dict[str, int]) -> tuple[int, int] | None:
    return (sides["height"], sides["width"]) if {"height", "width"} <= sides.keys() else None


def _numbers(values: Any) -> tuple[float, ...] | None:
    if values is None:
        return None
    items = values if isinstance(values, (list, tuple)) else [values]
    return tuple(float(value) for value in items)
