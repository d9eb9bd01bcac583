"""Text for a bundle: rows of token ids by its tokenizer, padded as its model takes padding."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from offramp.bundle.preprocessing import ImageText, Text
from offramp.errors import InputError

if TYPE_CHECKING:
    from tokenizers import Encoding, Tokenizer

    from offramp.runtime.chain import Chain
    from offramp.runtime.preprocess.image_text import Places

Inputs = dict[str, Any]
TOKENIZER = "tokenizer.json"
_MASK, _TYPES = "attention_mask", "token_type_ids"
_NO_TEXT = ("mask", "type", "segment", "position", "bbox", "label")  # in names of whole numbers beside token ids


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


def encode(
    chain: Chain,
    bundle: Path,
    texts: Sequence[str],
    tokenizer: Tokenizer | None = None,
    pairs: Sequence[str] = (),
    *,
    truncate: bool = False,
    sizes: Mapping[str, int] | None = None,
) -> list[Inputs]:
    """Token ids, and where the bundle takes them masks and types, [rows, tokens], by its own tokenizer.

    All texts are one batch where they have as many tokens, or where it is known how the model takes padding; else each
    is a batch of its own. ``tokenizer`` is the bundle's where it is at hand already. With ``pairs`` each row holds a
    text and its pair; with ``truncate`` what is too long is cut. ``sizes`` are the lengths of axes that are known,
    of an image say, for whose features a text keeps places.

    Raises:
        InputError: the bundle takes no text, there are not as many pairs as texts, or a text is too long.
    """
    ids = text_input(chain)
    if TOKENIZER not in chain.manifest.files or ids is None:
        raise InputError(
            f"{bundle} does not turn text into inputs: {_why_not(chain)}",
            hint=_instead(chain),
        )
    if pairs and len(pairs) != len(texts):
        raise InputError(
            f"{len(texts)} of --text and {len(pairs)} of --pair: a row needs one of each",
            hint="--text A --pair B --text C --pair D",
        )
    tokenizer = tokenizer or tokenizer_of(chain, bundle)
    settings = chain.manifest.preprocessing.text or _by_tokenizer(chain, tokenizer)
    size, longest = _lengths(chain, ids, settings)
    asked: list[Any] = list(zip(texts, pairs, strict=True)) if pairs else list(texts)
    rows: Sequence[Encoding | Row] = (
        [_with_image(chain, ids, text, sizes or {}, tokenizer, longest) for text in texts]
        if not pairs and any(item.input == ids for item in chain.manifest.placeholders)
        else _encoded(tokenizer, asked, longest, settings.cut_side if truncate else None)
    )
    lengths = {len(row.ids) for row in rows}
    if settings.needs_mask and _MASK not in chain.inputs:
        settings = replace(settings, pad=None)
    if settings.pad is None and (lengths != {size} if size is not None else False):
        raise InputError(
            f"the texts have {sorted(lengths)} tokens, the model takes {size} exactly, and how it takes padding is "
            "not known"
        )
    together = settings.pad is not None or len(lengths) == 1
    return [_arrays(chain, ids, batch, settings, size) for batch in ([rows] if together else [[row] for row in rows])]


def _instead(chain: Chain) -> str:
    made = chain.manifest.preprocessing
    if made.audio or made.image:
        return "--audio FILE.wav" if made.audio else "--image FILE"
    more = "" if TOKENIZER in chain.manifest.files else f"; or offramp export --file {TOKENIZER}"
    return f"--input name=file.npy{more}"


def _why_not(chain: Chain) -> str:
    if reason := chain.manifest.preprocessing.refused.get("text"):
        return reason
    if TOKENIZER not in chain.manifest.files:
        return f"it has no {TOKENIZER}"
    written = ", ".join(map(repr, chain.manifest.cache.tokens)) if chain.manifest.cache is not None else ""
    return f"it reads none, {written} is what it writes" if written else "it has not one input of token ids"


def _by_tokenizer(chain: Chain, tokenizer: Tokenizer) -> Text:
    """What the tokenizer's own file says about padding, where the model takes a mask of it."""
    own = tokenizer.padding
    if not own or _MASK not in chain.inputs:
        return Text()
    return Text(
        pad=int(own.get("pad_id", 0)), pad_side=own.get("direction", "right"), pad_type=int(own.get("pad_type_id", 0))
    )


def _lengths(chain: Chain, ids: str, settings: Text) -> tuple[int | None, int | None]:
    """How many tokens a row of the input ``ids`` has to have, and has at most; None for any number."""
    size = chain.inputs[ids].shape[-1]
    if isinstance(size, int):
        return size, size
    limits = (chain.manifest.axes.get(size, (1, None))[1], settings.limit)
    return None, min((limit for limit in limits if limit is not None), default=None)


def _encoded(tokenizer: Tokenizer, rows: list[Any], longest: int | None, cut: str | None) -> list[Encoding]:
    """The rows' tokens; those that are too long are cut on the side ``cut``, an error where that is None."""
    tokenizer.no_padding()
    tokenizer.no_truncation()
    found = tokenizer.encode_batch(rows)
    for place, row in enumerate(found):
        if longest is None or len(row.ids) <= longest:
            continue
        if cut is None:
            raise InputError(
                f"text {place} has {len(row.ids)} tokens, the model takes {longest}", hint="--truncate cuts it"
            )
        tokenizer.enable_truncation(longest, direction=cut)
        found[place] = tokenizer.encode_batch([rows[place]])[0]
        tokenizer.no_truncation()
    return found


class Row(NamedTuple):
    """The tokens of a text, as `tokenizers.Encoding` has them."""

    ids: list[int]
    attention_mask: list[int]
    type_ids: list[int]


def _with_image(
    chain: Chain, ids: str, text: str, sizes: Mapping[str, int], tokenizer: Tokenizer, longest: int | None
) -> Row:
    """A text that keeps places for an image, whole."""
    found = ids_with_image(chain, ids, text, sizes, tokenizer)
    if longest is not None and len(found) > longest:
        raise InputError(f"{text!r} and its image have {len(found)} tokens, the model takes {longest}")
    return Row(found, [1] * len(found), [0] * len(found))


def ids_with_image(
    chain: Chain, ids: str, text: str, sizes: Mapping[str, int], tokenizer: Tokenizer, special: bool | None = None
) -> list[int]:
    """The ids of a text for the input ``ids``, with as many that stand for an image as the image has features.

    ``special`` says whether the tokenizer adds its special tokens; None for what the bundle says.
    """
    from offramp.bundle.expressions import evaluate, names
    from offramp.runtime.preprocess import image_text

    def encode(text: str, special: bool) -> list[int]:
        return list(tokenizer.encode(text, add_special_tokens=special).ids)

    kept = [item for item in chain.manifest.placeholders if item.input == ids and not item.masks]
    known = all(names(item.count) <= sizes.keys() for item in kept)  # else the run says which input is missing
    places = [
        image_text.Places(tokenizer.id_to_token(item.token) or "", item.token, evaluate(item.count, sizes))
        for item in (kept if known else ())
    ]
    settings = chain.manifest.preprocessing.image_text
    if settings is not None:
        return image_text.ids(text, settings, places[0] if places else None, encode, special)
    row = encode(text, ImageText().special if special is None else special)
    for item in places:
        row = _with_places(row, item)
    return row


def _with_places(row: list[int], places: Places) -> list[int]:
    """A row in which the token that stands for an image is there as often as the image has features."""
    found = row.count(places.token)
    if found == 1:
        at = row.index(places.token)
        return [*row[:at], *[places.token] * places.features, *row[at + 1 :]]
    if found != places.features:
        name = places.name or f"the token {places.token}"
        raise InputError(
            f"the text has {name!r} {found} times; it stands there once, or once for each of {places.features} "
            "features",
            hint=f'--text "{name} ..."',
        )
    return row


def _arrays(chain: Chain, ids: str, rows: Sequence[Encoding | Row], settings: Text, size: int | None) -> Inputs:
    """Rows as one batch, filled up to the longest, or to ``size``."""
    import numpy as np

    longest = size or max(len(row.ids) for row in rows)
    parts = {ids: ("ids", settings.pad or 0), _MASK: ("attention_mask", 0), _TYPES: ("type_ids", settings.pad_type)}
    inputs: Inputs = {}
    together = chain.manifest.preprocessing.image_text
    for name, (part, filler) in parts.items():
        if name not in chain.inputs or (together and name in together.inputs):  # the run makes those of the ids
            continue
        filled = np.full((len(rows), longest), filler, chain.inputs[name].dtype)
        for line, row in zip(filled, rows, strict=True):
            values = getattr(row, part)
            line[: len(values)] = values
            if settings.pad_side == "left":
                line[:] = np.roll(line, longest - len(values))
        inputs[name] = filled
    return inputs
