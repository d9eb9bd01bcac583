"""The first row of a bundle's inputs, and how much of its prompt leaves room for further tokens."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from offramp.bundle.manifest import Manifest, Value
from offramp.runtime.chain import Chain


def first_row(manifest: Manifest, inputs: Mapping[str, Any]) -> dict[str, Any]:
    """The first row of a bundle's inputs, those included that its graph makes itself; None stands for none."""
    implied = manifest.cache.implied if manifest.cache else {}
    known = {**{name: Value(item.dtype, item.shape) for name, item in implied.items()}, **manifest.values}
    row = {}
    for name, value in inputs.items():
        place = known[name].place(manifest.batch) if name in known and value is not None else None
        row[name] = value if place is None else np.take(np.asarray(value), range(place[1]), place[0])
    return row


def with_room(chain: Chain, inputs: Mapping[str, Any], tokens: int) -> tuple[dict[str, Any], int]:
    """Inputs of one row that generates, and how many of so many further tokens have room behind its prompt.

    A prompt that leaves less than that is cut at its end, but for one token, and for ids that stand for other inputs.
    """
    session, cache = chain.session(inputs, None), chain.manifest.cache
    session.end()
    assert cache is not None
    (prompt,), ahead, name = session.prompts, session.ahead, cache.tokens[0]
    if cache.limit is None or prompt.size + ahead + tokens <= cache.limit:
        return dict(inputs), tokens
    held = np.isin(prompt, [item.token for item in chain.manifest.placeholders if item.input == name])
    least = max(1, 1 + int(np.max(held.nonzero()[0], initial=-1)))
    kept = max(least, cache.limit - ahead - tokens)
    beside = cache.prompt.beside if cache.prompt else ()
    cut = {key: value for key, value in inputs.items() if key not in cache.implied} | {name: prompt[None, :kept]}
    cut |= {key: np.asarray(inputs[key])[..., :kept] for key in beside if inputs.get(key) is not None}
    return cut, max(0, min(tokens, cache.limit - ahead - kept))
