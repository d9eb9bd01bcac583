"""A text that goes with an image to token ids, as a bundle's settings say, and what else follows from the ids.

::

    ids("what is this?", manifest.preprocessing.image_text, Places("<image>", 5, 256), encode)    [5, 5, ..., 1, 87]
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from offramp.bundle.manifest import Manifest
from offramp.bundle.preprocessing import ImageText, Marked
from offramp.errors import InputError

Encode = Callable[[str, bool], list[int]]


class Places(NamedTuple):
    """What stands for an image among the tokens: the text of one, its id, and how many features the image has."""

    name: str
    token: int
    features: int


def chat(text: str, settings: ImageText, template: str | None) -> str | None:
    """The text inside a template, None where there is none.

    That is the one of the settings, or ``template`` where the text has the mark already or they have none.
    """
    known = settings.template
    found = template if known is None or (settings.mark is not None and settings.mark in text) else known
    return None if found is None else found.replace("{text}", text)


def ids(
    text: str, settings: ImageText, places: Places | None, encode: Encode, special: bool | None = None
) -> list[int]:
    """The token ids of a text and its image.

    Args:
        text: The user's, or what `chat` made of it.
        settings: The bundle's.
        places: What stands for the image; None where nothing does.
        encode: A text to ids, with or without the tokenizer's special tokens.
        special: With them or without; None for what the settings say.

    Raises:
        InputError: the text has the mark several times, or not at all where it needs it.
    """
    image = places.name * places.features if places else ""
    special = settings.special if special is None else special
    mark, bare = settings.mark, settings.bare
    if mark is not None and places and mark * places.features in text:
        text = text.replace(mark * places.features, mark)
    found = text.count(mark) if mark is not None else 0
    if mark is not None and found == 1:
        return encode(_around(settings.marked, text.replace(mark, _filled(settings.place, image)), image), special)
    if bare is None or found:
        each = f", or once for each of {places.features} features" if places else ""
        raise InputError(
            f"the text has {mark!r} {found} times; it stands there once{each}, where the image goes",
            hint=f'--text "{mark} ..."',
        )
    made = encode(_around(bare, text, image), special)
    return [places.token] * places.features + made if settings.ahead and places else made


def prompt(made: Sequence[int], settings: ImageText) -> list[int]:
    """What generation starts from, of the ids of a text and its image."""
    found = list(made[: len(made) - settings.dropped])
    if settings.first is not None and found:
        found[0] = settings.first
    return found


def completed(manifest: Manifest, inputs: Mapping[str, Any]) -> Mapping[str, Any]:
    """The inputs of one pass, and those beside that follow from the token ids and are not given."""
    settings = manifest.preprocessing.image_text
    if settings is None or not settings.inputs or not isinstance(inputs, Mapping):
        return inputs
    tokens = next((item.input for item in manifest.placeholders if item.input in inputs), None)
    if tokens is None:
        return inputs
    return {**{name: values(inputs[tokens], item) for name, item in settings.inputs.items()}, **inputs}


def values(ids: Any, marked: Marked) -> NDArray[np.int64]:
    """What an input holds over tokens with these ids."""
    return np.where(np.isin(ids, marked.ids), marked.value, marked.other).astype(np.int64)


def _filled(text: str, image: str) -> str:
    return text.replace("{image}", image)


def _around(frame: str, text: str, image: str) -> str:
    """A text inside a frame; what looks like a part of the frame in the text stays as it is."""
    before, _, behind = frame.partition("{text}")
    return _filled(before, image) + text + _filled(behind, image)
