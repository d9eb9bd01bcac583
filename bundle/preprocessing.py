"""How text, sound and images become a bundle's inputs: settings as data, part of its manifest."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

FILTERS = ("nearest", "lanczos", "bilinear", "bicubic", "box", "hamming")  # by Pillow's numbers
SIDES = ("right", "left")
SOUNDS = ("log-mel", "waveform")


@dataclass(frozen=True)
class Text:
    """How rows of text become token ids; the tokenizer is a file of the bundle.

    Attributes:
        pad: The id that fills rows of one batch up, found to change nothing; None where rows of other lengths run
            apart.
        pad_side: Where it goes, "right" or "left".
        pad_type: The token type of padding.
        needs_mask: Whether padding changes nothing only where a mask says what it is.
        limit: Tokens that the model takes at most, special ones included; None for any number.
        cut_side: Where a text that is too long is cut.
    """

    pad: int | None = None
    pad_side: str = "right"
    pad_type: int = 0
    needs_mask: bool = True
    limit: int | None = None
    cut_side: str = "right"


@dataclass(frozen=True)
class Audio:
    """How a row of samples becomes an input.

    Attributes:
        kind: "log-mel" features ``[1, mels, frames]`` (`offramp.runtime.preprocess.audio.log_mel`), or the "waveform"
            ``[1, samples]`` itself.
        rate: Samples a second.
        n_fft: Samples of a frame; ``hop`` from one frame to the next.
        mels: Bands.
        seconds: The length that sound is filled up to with silence, and the greatest.
        normalize: Whether a waveform gets the mean 0 and the variance 1.
    """

    kind: str = "log-mel"
    rate: int = 16000
    n_fft: int = 400
    hop: int = 160
    mels: int = 80
    seconds: int = 30
    normalize: bool = False


@dataclass(frozen=True)
class Image:
    """How an image becomes pixels, float32 ``[1, channels, height, width]``; what is None or False is left out.

    In this order: colours, square, size, crop, scale, normal form, order of channels, padding.

    Attributes:
        rgb: Whether what is transparent becomes white; without it transparency is dropped.
        square: Fill the shorter side up to a square of this colour, the image in the middle.
        shortest: Pixels of the shorter side after resizing; then ``longest`` is the greatest number of the other.
        height: Size after resizing, with ``width``.
        max_height: The greatest size with the same proportions, with ``max_width``.
        resample: The filter of resizing, one of Pillow's.
        crop: Height and width of the middle that is kept, filled up with 0.
        scale: Factor of all values, which are 0 to 255; then ``offset`` is added.
        mean: Of each channel, which is subtracted; then it is divided by its ``std``.
        bgr: Whether blue comes first.
        pad: Height and width that zeros to the right and below fill up.
    """

    rgb: bool = False
    square: tuple[int, ...] | None = None
    shortest: int | None = None
    longest: int | None = None
    height: int | None = None
    width: int | None = None
    max_height: int | None = None
    max_width: int | None = None
    resample: str = "bilinear"
    crop: tuple[int, ...] | None = None
    scale: float | None = None
    offset: float = 0.0
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None
    bgr: bool = False
    pad: tuple[int, ...] | None = None


@dataclass(frozen=True)
class Marked:
    """An input over tokens that follows from their ids: it holds ``value`` at those in ``ids``, ``other`` elsewhere."""

    ids: tuple[int, ...] = ()
    value: int = 0
    other: int = 0


@dataclass(frozen=True)
class ImageText:
    """How a text that goes with an image becomes token ids.

    In these texts ``{text}`` is the user's, and ``{image}`` the ids that stand for the image, one for each feature.

    Attributes:
        mark: What a user writes, once, where the image goes.
        place: What stands there instead.
        marked: What stands around a text with the mark.
        bare: The same for a text without; None where there has to be one.
        ahead: Whether the ids for the image come before all others then, special tokens included.
        special: Whether the tokenizer adds its special tokens.
        template: What a text without the mark is put into first, unless it is taken as it is: a chat with the mark.
        template_special: Whether the tokenizer adds its special tokens to what a template makes.
        first: The id that a prompt's first one becomes.
        dropped: How many ids at the end of a prompt are left out.
        inputs: Further inputs over the tokens.
    """

    mark: str | None = None
    place: str = "{image}"
    marked: str = "{text}"
    bare: str | None = "{text}"
    ahead: bool = False
    special: bool = True
    template: str | None = None
    template_special: bool = False
    first: int | None = None
    dropped: int = 0
    inputs: Mapping[str, Marked] = field(default_factory=dict)


@dataclass(frozen=True)
class Preprocessing:
    """How text, sound and images become inputs; None where nobody has said.

    ``image_text`` is there where a text with an image becomes other ids than alone. ``refused`` says why, by "text",
    "audio", "image" and "image_text", where the model's own way cannot be followed.
    """

    text: Text | None = None
    audio: Audio | None = None
    image: Image | None = None
    image_text: ImageText | None = None
    refused: Mapping[str, str] = field(default_factory=dict)


def preprocessing_problems(preprocessing: Preprocessing) -> Iterator[str]:
    """What is wrong with values whose types are right."""
    if preprocessing.text is not None:
        yield from _within("text", preprocessing.text, {"pad": 0, "pad_type": 0, "limit": 1})
        yield from _among("text", preprocessing.text, {"pad_side": SIDES, "cut_side": SIDES})
    if preprocessing.audio is not None:
        yield from _within("audio", preprocessing.audio, dict.fromkeys(("rate", "n_fft", "hop", "mels", "seconds"), 1))
        yield from _among("audio", preprocessing.audio, {"kind": SOUNDS})
    if preprocessing.image is not None:
        yield from _image(preprocessing.image)
    if preprocessing.image_text is not None:
        yield from _image_text(preprocessing.image_text)


def _image_text(settings: ImageText) -> Iterator[str]:
    yield from _within("image_text", settings, {"first": 0, "dropped": 0})
    for name in ("marked", "bare", "template"):
        value = getattr(settings, name)
        if value is not None and value.count("{text}") != 1:
            yield f"preprocessing.image_text.{name} is {value!r}, expected {{text}} in it once"
    if settings.mark is None and (settings.bare is None or settings.template is not None):
        yield "preprocessing.image_text has no mark, expected one where a text needs it or a template has it"
    if settings.mark == "":
        yield "preprocessing.image_text.mark is empty"


def _image(image: Image) -> Iterator[str]:
    sizes = ("shortest", "longest", "height", "width", "max_height", "max_width")
    yield from _within("image", image, dict.fromkeys(sizes, 1))
    yield from _among("image", image, {"resample": FILTERS})
    for name in ("crop", "pad"):
        value = getattr(image, name)
        if value is not None and (len(value) != 2 or min(value) < 1):
            yield f"preprocessing.image.{name} is {list(value)}, expected a height and a width"
    for name in ("height", "max_height"):
        other = name.replace("height", "width")
        if (getattr(image, name) is None) != (getattr(image, other) is None):
            yield f"preprocessing.image has {name} or {other}, expected both"
    if (image.mean is None) != (image.std is None) or len(image.mean or ()) != len(image.std or ()):
        yield "preprocessing.image has not as many numbers in mean as in std"
    if image.mean is not None and len(image.mean) not in (1, 3):
        yield f"preprocessing.image.mean has {len(image.mean)} numbers, expected one a channel, 1 or 3"
    if image.std is not None and 0 in image.std:
        yield "preprocessing.image.std has a 0"
    if image.square is not None and len(image.square) not in (1, 3):
        yield f"preprocessing.image.square has {len(image.square)} numbers, expected a colour"


def _within(kind: str, settings: object, least: Mapping[str, int]) -> Iterator[str]:
    for name, low in least.items():
        value = getattr(settings, name)
        if value is not None and value < low:
            yield f"preprocessing.{kind}.{name} is {value}, expected at least {low}"


def _among(kind: str, settings: object, known: Mapping[str, tuple[str, ...]]) -> Iterator[str]:
    for name, values in known.items():
        value = getattr(settings, name)
        if value not in values:
            yield f"preprocessing.{kind}.{name} is {value!r}, expected one of {', '.join(values)}"
