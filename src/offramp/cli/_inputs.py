"""Inputs for a bundle from files, from text, from sound, or made up."""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from offramp.runtime.errors import InputError

if TYPE_CHECKING:
    from tokenizers import Tokenizer

    from offramp.runtime.chain import Chain

Inputs = dict[str, Any]
TOKENIZER = "tokenizer.json"
_PARTS = {"attention_mask": "attention_mask", "token_type_ids": "type_ids"}
_NO_TEXT = ("mask", "type", "segment", "position", "bbox", "label")  # in names of whole numbers beside token ids


def given(
    chain: Chain,
    bundle: Path,
    files: Sequence[str],
    texts: Sequence[str] = (),
    sound: Path | None = None,
    pairs: Sequence[str] = (),
) -> Inputs:
    """What ``--input name=file.npy``, ``--text``, ``--pair`` and ``--audio`` say, the first on top of the others."""
    import numpy as np

    inputs = encode(chain, bundle, texts, pairs=pairs) if texts or pairs else {}
    if sound is not None:
        inputs |= hear(chain, bundle, sound)
    for item in files:
        name, sign, file = item.partition("=")
        if not sign:
            raise InputError(f"cannot read the input {item!r}", hint="--input name=file.npy")
        try:
            inputs[name] = np.load(file, allow_pickle=False)
        except (OSError, ValueError, EOFError) as error:
            raise InputError(f"input {name!r}: {file} cannot be read: {error}", hint="numpy.save writes one") from error
    return inputs


def text_input(chain: Chain) -> str | None:
    """The input that holds the token ids of a text, None where there is none, or several that could be.

    It is called ``input_ids``, or is the only one of whole numbers [batch, tokens] that is, by its name, no mask, type
    or position. The tokens that a model writes are a text of its inputs only where it reads nothing else.
    """
    if "input_ids" in chain.inputs:
        return "input_ids"
    beside = {name for name in chain.inputs if any(word in name for word in _NO_TEXT)}
    cache = chain.manifest.cache
    written = set(cache.tokens) if cache is not None else set()
    read = [name for name in chain.inputs if name not in beside | written] or sorted(written - beside)
    found = [
        name for name in read if chain.inputs[name].dtype in ("int64", "int32") and len(chain.inputs[name].shape) == 2
    ]
    return found[0] if len(found) == 1 else None


def encode(
    chain: Chain,
    bundle: Path,
    texts: Sequence[str],
    tokenizer: Tokenizer | None = None,
    pairs: Sequence[str] = (),
) -> Inputs:
    """Token ids, and where the bundle takes them masks and types, [texts, tokens], by its own tokenizer.

    ``tokenizer`` is that one where it is at hand already. With ``pairs`` each row holds a text and its pair.

    Raises:
        InputError: the bundle takes no text, or there are not as many pairs as texts.
    """
    import numpy as np

    ids = text_input(chain)
    if TOKENIZER not in chain.manifest.files or ids is None:
        raise InputError(
            f"{bundle} does not turn text into inputs: it has no {TOKENIZER}, or not one input of token ids",
            hint="--audio FILE.wav"
            if chain.manifest.preprocessing.audio
            else "--input name=file.npy; or offramp export --file tokenizer.json",
        )
    if pairs and len(pairs) != len(texts):
        raise InputError(
            f"{len(texts)} of --text and {len(pairs)} of --pair: a row needs one of each",
            hint="--text A --pair B --text C --pair D",
        )
    tokenizer = tokenizer or tokenizer_of(chain, bundle)
    length, longest = _lengths(chain, ids)
    known: Mapping[str, Any] = tokenizer.padding or {"pad_id": 0, "pad_token": "[PAD]"}
    kept = {key: known[key] for key in ("pad_id", "pad_token", "pad_type_id", "direction") if key in known}
    tokenizer.enable_padding(**kept, length=length)
    if longest is not None:
        tokenizer.enable_truncation(longest)
    rows = tokenizer.encode_batch(list(zip(texts, pairs, strict=True)) if pairs else list(texts))
    return {
        name: np.array([getattr(row, part) for row in rows], chain.inputs[name].dtype)
        for name, part in {ids: "ids", **_PARTS}.items()
        if name in chain.inputs
    }


def tokenizer_of(chain: Chain, bundle: Path) -> Tokenizer:
    """The bundle's own tokenizer, that neither pads nor cuts.

    Raises:
        InputError: the bundle has none, or the package tokenizers is not installed.
    """
    if TOKENIZER not in chain.manifest.files:
        raise InputError(f"{bundle} has no {TOKENIZER}", hint="offramp export --file tokenizer.json")
    try:
        from tokenizers import Tokenizer
    except ModuleNotFoundError as error:
        raise InputError("text needs the package tokenizers", hint="pip install 'offramp[text]'") from error
    return Tokenizer.from_file(str(bundle / TOKENIZER))


def hear(chain: Chain, bundle: Path, sound: Path) -> Inputs:
    """The features of a wav file, as the bundle's ``preprocessing.audio`` has them.

    Raises:
        InputError: the bundle hears nothing, the file cannot be read, or lasts longer than the model's window.
    """
    from offramp.runtime.audio import log_mel, read_wav, resample

    settings = chain.manifest.preprocessing.audio
    names = [name for name, value in chain.inputs.items() if value.dtype == "float32" and len(value.shape) == 3]
    if not settings or len(names) != 1:
        raise InputError(
            f"{bundle} does not turn sound into inputs: it has no audio settings, or not one input of features",
            hint="--input name=file.npy",
        )
    try:
        return {names[0]: log_mel(resample(*read_wav(sound), settings["rate"]), **settings)}
    except (TypeError, KeyError) as error:
        raise InputError(f"{bundle} has settings for audio that make no sense: {settings}") from error


def _lengths(chain: Chain, ids: str) -> tuple[int | None, int | None]:
    """How many tokens a row of the input ``ids`` has to have, and has at most; None for any number."""
    size = chain.inputs[ids].shape[-1]
    if isinstance(size, int):
        return size, size
    return None, chain.manifest.axes.get(size, (1, None))[1]


def made_up(chain: Chain, batch: int, tokens: int) -> Inputs:
    """Arrays that fit the bundle: masks of ones, other whole numbers 0, noise for the rest.

    Every axis but the batch's has ``tokens`` places, or as near to that as its limits allow.
    """
    import numpy as np

    from offramp.runtime.axes import evaluate

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
    """BUNDLE, --input, --text, --pair, --audio, --threads and --provider."""
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
        help=f"a row of text, for a bundle with {TOKENIZER} (needs the package tokenizers); may be repeated",
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
        help="sound, for a bundle with settings for audio, such as an export of zoo:whisper_tiny_en",
    )
    parser.add_argument("--threads", metavar="N", type=int, help="of ONNX Runtime; as many as cores if left out")
    parser.add_argument(
        "--provider",
        metavar="NAME",
        action="append",
        help="of ONNX Runtime, CUDAExecutionProvider for example; may be repeated, best first",
    )
