"""Images to pixels: a file, resized, cropped, scaled and normalized as a bundle's settings say.

::

    pixels(read_image("cat.png"), manifest.preprocessing.image)      float32 [1, 3, 224, 224]

Needs Pillow, which is imported when an image is read.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from offramp.bundle.preprocessing import FILTERS
from offramp.bundle.preprocessing import Image as Settings
from offramp.errors import InputError

if TYPE_CHECKING:
    from PIL.Image import Image


def read_image(path: str | Path) -> Image:
    """The image in a file, upright.

    Raises:
        InputError: Pillow is not installed, or the file cannot be read as an image.
    """
    try:
        import PIL.Image
        from PIL import ImageOps
    except ModuleNotFoundError as error:
        raise InputError("images need Pillow, which is not installed", hint="pip install 'offramp[image]'") from error
    try:
        with PIL.Image.open(path) as image:
            return ImageOps.exif_transpose(image)
    except (OSError, SyntaxError, ValueError, PIL.Image.DecompressionBombError) as error:
        raise InputError(f"{path} cannot be read as an image: {error}", hint="png or jpeg") from error


def pixels(image: Image, settings: Settings) -> NDArray[np.float32]:
    """An image as a model takes it, float32 ``[1, channels, height, width]``.

    As the image processors of transformers that use Pillow do it, bit for bit: resizing works on whole numbers.

    Raises:
        InputError: the image is larger than what the settings pad to, or so long that resizing leaves nothing of it.
    """
    image = _coloured(image, settings)
    if settings.square is not None:
        image = _squared(image, settings.square)
    size = _size(image.height, image.width, settings)
    if size is not None:
        if min(size) < 1:
            raise InputError(
                f"the image has {[image.height, image.width]} pixels, of which the model's size leaves {list(size)}",
                hint="a part of it that is not so long",
            )
        image = image.resize(size[::-1], FILTERS.index(settings.resample))
    values: NDArray[Any] = np.array(image)
    values = values[None] if values.ndim == 2 else np.moveaxis(values, -1, 0)
    if settings.crop is not None:
        values = _cropped(values, *settings.crop)
    if settings.scale is not None:
        values = (values.astype(np.float64) * settings.scale).astype(np.float32)
    values = values.astype(np.float32)
    if settings.offset:
        values = values + np.float32(settings.offset)
    if settings.mean is not None and settings.std is not None:
        mean, std = (np.array(item, np.float32)[:, None, None] for item in (settings.mean, settings.std))
        values = (values - mean) / std
    if settings.bgr:
        values = values[::-1]
    if settings.pad is not None:
        values = _padded(values, *settings.pad)
    return np.ascontiguousarray(values[None], np.float32)


def _coloured(image: Image, settings: Settings) -> Image:
    """In as many channels as the settings have means, three where they have none."""
    if settings.mean is not None and len(settings.mean) == 1:
        return image.convert("L")
    if not settings.rgb or not ("A" in image.getbands() or image.info.get("transparency") is not None):
        return image.convert("RGB")
    import PIL.Image

    image = image.convert("RGBA")
    white = PIL.Image.new("RGBA", image.size, (255, 255, 255, 255))
    return PIL.Image.alpha_composite(white, image).convert("RGB")


def _squared(image: Image, colour: tuple[int, ...]) -> Image:
    import PIL.Image

    side = max(image.size)
    square = PIL.Image.new(image.mode, (side, side), colour if len(colour) > 1 else colour[0])
    square.paste(image, ((side - image.width) // 2, (side - image.height) // 2))
    return square


def _size(height: int, width: int, settings: Settings) -> tuple[int, int] | None:
    """Height and width after resizing, None to leave them."""
    if settings.shortest is not None:
        return _by_shortest(height, width, settings.shortest, settings.longest)
    if settings.max_height is not None and settings.max_width is not None:
        factor = min(settings.max_height / height, settings.max_width / width)
        return int(height * factor), int(width * factor)
    if settings.height is not None and settings.width is not None:
        return settings.height, settings.width
    return None


def _by_shortest(height: int, width: int, shortest: int, longest: int | None) -> tuple[int, int]:
    short, long = min(height, width), max(height, width)
    other = int(shortest * long / short)
    if longest is not None and long / short * shortest > longest:
        exact = longest * short / long
        shortest, other = round(exact), int(exact * long / short)
        if short == shortest:
            other = long
    return (shortest, other) if height <= width else (other, shortest)


def _cropped(values: NDArray[Any], height: int, width: int) -> NDArray[Any]:
    """The middle of ``[channels, height, width]``; an image that is smaller lies in the middle of zeros."""
    for axis, wanted in ((1, height), (2, width)):
        found = values.shape[axis]
        if found < wanted:
            before = -(-(wanted - found) // 2)
            around = [(0, 0)] * 3
            around[axis] = (before, wanted - found - before)
            values = np.pad(values, around)
        else:
            values = np.take(values, range((found - wanted) // 2, (found - wanted) // 2 + wanted), axis)
    return values


def _padded(values: NDArray[np.float32], height: int, width: int) -> NDArray[np.float32]:
    missing = (height - values.shape[1], width - values.shape[2])
    if min(missing) < 0:
        raise InputError(f"the image has {list(values.shape[1:])} pixels, the model takes at most {[height, width]}")
    return np.pad(values, [(0, 0), (0, missing[0]), (0, missing[1])])
