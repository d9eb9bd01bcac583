"""Inputs for a bundle from files, from text, sound and images, or made up."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from offramp.bundle.preprocessing import Audio, Image
from offramp.cli import _text
from offramp.errors import InputError

if TYPE_CHECKING:
    from offramp.runtime.chain import Chain

Inputs = dict[str, Any]
MASK = "attention_mask"


def given(
    chain: Chain,
    bundle: Path,
    files: Sequence[str],
    texts: Sequence[str] = (),
    sounds: Sequence[Path] = (),
    pairs: Sequence[str] = (),
    images: Sequence[Path] = (),
    *,
    truncate: bool = False,
) -> list[Inputs]:
    """What ``--text``, ``--pair``, ``--audio``, ``--image`` and ``--input name=file.npy`` say, the last on top.

    One batch; or one for each row, where sounds have different lengths, or texts do and it is not known how the model
    takes padding.
    """
    import numpy as np

    if texts:
        check_rows(chain, texts, sounds, images)
    others: Inputs = {}
    heard = hear(chain, bundle, sounds) if sounds else [{}]
    if images:
        others |= see(chain, bundle, images)
    for item in files:
        name, sign, file = item.partition("=")
        if not sign:
            raise InputError(f"cannot read the input {item!r}", hint="--input name=file.npy")
        try:
            others[name] = np.load(file, allow_pickle=False)
        except (OSError, ValueError, EOFError) as error:
            raise InputError(f"input {name!r}: {file} cannot be read: {error}", hint="numpy.save writes one") from error
        if not isinstance(others[name], np.ndarray):
            raise InputError(f"input {name!r}: {file} has several arrays", hint="numpy.save writes one")
    if len(heard) > 1:
        if texts or others:
            raise _different(heard)
        return heard
    others = heard[0] | others
    batches: list[Inputs] = [{}]
    if texts or pairs:
        batches = _text.encode(chain, bundle, texts, pairs=pairs, truncate=truncate, sizes=sizes(chain, others))
    if len(batches) == 1 or chain.manifest.batch is None:  # rows that mix cannot run apart
        return [one(chain, batches) | others]
    return [batch | _row(chain, others, at) for at, batch in enumerate(batches)]


def check_rows(chain: Chain, texts: Sequence[str], sounds: Sequence[Path], images: Sequence[Path]) -> None:
    """Refuse other numbers of texts than of the images or sounds that share rows with them."""
    text = _text.text_input(chain)
    for flag, files, settings in (
        ("--image", images, chain.manifest.preprocessing.image),
        ("--audio", sounds, chain.manifest.preprocessing.audio),
    ):
        names = _candidates(chain, _rank(settings)) if settings is not None else []
        together = text is not None and len(names) == 1 and chain.rows_of(text) and chain.rows_of(names[0])
        if files and together and len(files) != len(texts):
            raise InputError(
                f"{len(texts)} of --text and {len(files)} of {flag}: a row has one of each",
                hint=f"--text A {flag} FILE --text B {flag} FILE",
            )


def check_complete(chain: Chain, batches: Sequence[Inputs]) -> None:
    """Refuse batches without the image, sound or text that the bundle makes inputs of, by the option that gives it."""
    made = chain.manifest.preprocessing
    for flag, what, settings in (("--image FILE", "an image", made.image), ("--audio FILE.wav", "a sound", made.audio)):
        names = _candidates(chain, _rank(settings)) if settings is not None else []
        if len(names) == 1 and any(names[0] not in batch for batch in batches):
            raise InputError(f"{names[0]!r} is missing: the model takes {what}", hint=flag)
    text = _text.text_input(chain)
    written = chain.manifest.cache.tokens if chain.manifest.cache is not None else ()
    reads = text is not None and text not in written and _text.TOKENIZER in chain.manifest.files
    if reads and any(text not in batch for batch in batches):
        raise InputError(f"{text!r} is missing: the model reads a text", hint='--text "..."')
    beside = {*(made.image_text.inputs if made.image_text else ()), *written}
    if missing := [name for name in chain.inputs if name not in beside and any(name not in item for item in batches)]:
        raise InputError(
            f"{', '.join(map(repr, missing))} {'is' if len(missing) == 1 else 'are'} missing: no text, sound or image "
            "makes this",
            hint=" ".join(f"--input {name}=file.npy" for name in missing),
        )


def asked(chain: Chain, args: argparse.Namespace) -> list[Inputs]:
    """What the arguments of `add_arguments` say, as `given`."""
    return given(chain, args.bundle, args.input, args.text, args.audio, args.pair, args.image, truncate=args.truncate)


def one(chain: Chain, batches: Sequence[Inputs]) -> Inputs:
    """The only batch; InputError where rows have to run apart."""
    if len(batches) == 1:
        return batches[0]
    if _text.text_input(chain) in batches[0]:
        raise InputError(
            f"the {len(batches)} texts have different lengths, and it is not known how the model takes padding",
            hint="one --text, or texts of as many tokens",
        )
    raise _different(batches)


def rows(chain: Chain, batches: Sequence[Inputs]) -> int:
    """How many rows batches have, as far as their shapes tell."""
    found = 0
    for batch in batches:
        places = [(array.shape, chain.rows_of(name)) for name, array in batch.items() if name in chain.inputs]
        found += max(
            (shape[place[0]] // place[1] for shape, place in places if place and place[0] < len(shape)), default=1
        )
    return found


def _row(chain: Chain, inputs: Inputs, at: int) -> Inputs:
    """The arrays of one row; those that have none are whole."""
    found = {}
    for name, array in inputs.items():
        axis, factor = (chain.rows_of(name) if name in chain.inputs else None) or (None, 1)
        if axis is None or array.ndim <= axis:
            found[name] = array
            continue
        places = range(at * factor, (at + 1) * factor)
        if places.stop > array.shape[axis]:
            raise InputError(f"input {name!r} has {array.shape[axis] // factor} rows", hint="as many as texts")
        found[name] = array.take(places, axis)
    return found


def hear(chain: Chain, bundle: Path, sounds: Sequence[Path]) -> list[Inputs]:
    """Wav files as the bundle's ``preprocessing.audio`` has them, and a mask of ones where the bundle takes one.

    One batch; or one for each sound, where their features have different lengths.

    Raises:
        InputError: the bundle hears nothing, a file cannot be read, or lasts longer than the model's window; or rows of
            different lengths cannot run apart.
    """
    import numpy as np

    from offramp.runtime.preprocess.audio import features, read_wav, resample

    settings = chain.manifest.preprocessing.audio
    name = _input_of(chain, bundle, "audio", "sound", settings)
    assert settings is not None
    rows = [features(resample(*read_wav(sound), settings.rate), settings) for sound in sounds]
    apart = len({row.shape for row in rows}) > 1
    batches: list[Inputs] = [{name: row} for row in rows] if apart else [{name: np.concatenate(rows)}]
    if MASK in chain.inputs and _text.text_input(chain) is None:
        for batch in batches:
            batch[MASK] = np.ones((len(batch[name]), batch[name].shape[-1]), chain.inputs[MASK].dtype)
    if apart and chain.manifest.batch is None:
        raise _different(batches)
    return batches


def _different(batches: Sequence[Inputs]) -> InputError:
    lengths = [next(iter(batch.values())).shape[-1] for batch in batches]
    return InputError(
        f"the {len(batches)} sounds have different lengths, {lengths}", hint="one --audio, or sounds of one length"
    )


def see(chain: Chain, bundle: Path, images: Sequence[Path]) -> Inputs:
    """Images as the bundle's ``preprocessing.image`` has them, a row each.

    Raises:
        InputError: the bundle sees nothing, a file cannot be read, or the images come out at several sizes.
    """
    import numpy as np

    from offramp.runtime.preprocess.image import pixels, read_image

    settings = chain.manifest.preprocessing.image
    name = _input_of(chain, bundle, "image", "images", settings)
    assert settings is not None
    rows = [pixels(read_image(image), settings) for image in images]
    if len({row.shape for row in rows}) > 1:
        sizes = ", ".join(f"{image.name} {list(row.shape[2:])}" for image, row in zip(images, rows, strict=True))
        raise InputError(f"the images come out at several sizes: {sizes}", hint="one --image at a time")
    return {name: np.concatenate(rows)}


def _rank(settings: Audio | Image | None) -> int:
    """How many axes the input has that the settings are for."""
    if isinstance(settings, Audio):
        return 2 if settings.kind == "waveform" else 3
    return 4


def _candidates(chain: Chain, rank: int) -> list[str]:
    return [name for name, value in chain.inputs.items() if value.dtype == "float32" and len(value.shape) == rank]


def _input_of(chain: Chain, bundle: Path, kind: str, what: str, settings: Audio | Image | None) -> str:
    """The one input of floats that the settings are for."""
    names = _candidates(chain, _rank(settings))
    if settings is not None and len(names) == 1:
        return names[0]
    reason = chain.manifest.preprocessing.refused.get(kind)
    if reason is None:
        reason = (
            f"it has no settings for {what}" if settings is None else f"{names or 'none'} of its inputs could be it"
        )
    floats = [name for name, value in chain.inputs.items() if value.dtype == "float32"]
    name = floats[0] if len(floats) == 1 else "name"
    raise InputError(f"{bundle} does not turn {what} into inputs: {reason}", hint=f"--input {name}=file.npy")


def sizes(chain: Chain, arrays: Inputs) -> dict[str, int]:
    """The lengths of axes, as far as arrays of inputs tell."""
    found: dict[str, int] = {}
    for name in arrays.keys() & chain.inputs.keys():
        shape = chain.inputs[name].shape
        found |= {str(size): length for size, length in zip(shape, arrays[name].shape, strict=False)}
    return found


def made_up(chain: Chain, batch: int, tokens: int) -> Inputs:
    """Arrays that fit the bundle: masks of ones, other whole numbers 0, noise for the rest.

    Every axis but the batch's has ``tokens`` places, or as near to that as its limits allow.
    """
    import numpy as np

    from offramp.bundle.expressions import evaluate

    sizes: dict[str, int] = {}
    for axis, (low, high) in chain.manifest.axes.items():
        wanted = batch if axis == chain.manifest.batch else tokens
        sizes[axis] = max(low, wanted if high is None else min(wanted, high))
    random = np.random.default_rng(0)
    inputs: Inputs = {}
    for name, value in chain.inputs.items():
        shape = [evaluate(size, sizes) for size in value.shape]
        if value.dtype.startswith("float"):
            inputs[name] = random.standard_normal(shape).astype(value.dtype)
        else:
            keep = "mask" in name and "padding" not in name
            inputs[name] = np.full(shape, keep, value.dtype)
    return inputs


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """BUNDLE, --input, --text, --pair, --audio, --image, --truncate, --threads and --provider."""
    parser.add_argument("bundle", metavar="BUNDLE", type=Path, help="a directory that offramp export wrote")
    parser.add_argument(
        "-i", "--input", metavar="NAME=FILE.npy", action="append", default=[], help="an input; may be repeated"
    )
    parser.add_argument(
        "-t",
        "--text",
        metavar="TEXT",
        action="append",
        default=[],
        help=f"a row of text, for a bundle with {_text.TOKENIZER} (needs the package tokenizers); may be repeated",
    )
    parser.add_argument(
        "--pair",
        metavar="TEXT",
        action="append",
        default=[],
        help="the second text of a row, for a model of two texts; once for each --text",
    )
    parser.add_argument(
        "--audio",
        metavar="FILE.wav",
        type=Path,
        action="append",
        default=[],
        help="a row's sound, for a bundle with settings for audio, such as an export of zoo:whisper_tiny_en; may be "
        "repeated",
    )
    parser.add_argument(
        "--image",
        metavar="FILE",
        type=Path,
        action="append",
        default=[],
        help="a row's image, for a bundle with settings for images (needs the package pillow); may be repeated",
    )
    parser.add_argument("--truncate", action="store_true", help="cut a text that is longer than the model takes")
    parser.add_argument("--threads", metavar="N", type=int, help="of ONNX Runtime; as many as cores if left out")
    parser.add_argument(
        "--provider",
        metavar="NAME",
        action="append",
        help="of ONNX Runtime, CUDAExecutionProvider for example; may be repeated, best first",
    )
