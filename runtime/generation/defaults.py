"""How a bundle chooses tokens by itself, with a user's options on top."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields, replace
from typing import Any

from offramp.bundle.manifest import Generation
from offramp.bundle.options import Sampling, instead
from offramp.errors import InputError
from offramp.runtime.generation.sampling import Chooser

_NEW_TOKENS = 256  # where neither the model nor the user sets a limit


def merged(
    generation: Generation, options: Mapping[str, Any], longest: int, vocabulary: int, room: int | None = None
) -> Sampling:
    """The bundle's way of choosing tokens, with the user's ``options`` on top, for prompts of at most ``longest``.

    Lengths are counted in new tokens then, and ``max_new_tokens`` is a number. ``room`` is how many tokens the caches
    take; the last new one need not be among them.

    Raises:
        InputError: options do not exist, make no sense, or leave no room.
    """
    known = [field.name for field in fields(Sampling)]
    if unknown := sorted(set(options) - set(known)):
        raise InputError(f"unknown options {unknown}; there are {known}", hint=instead(unknown, known))
    asked = Sampling(**options)
    own = _own(generation, options, vocabulary)
    limit = own.get("max_new_tokens") if asked.max_new_tokens is None else asked.max_new_tokens
    if limit is not None:
        own["min_new_tokens"] = min(own.get("min_new_tokens", 0), limit)
    chosen = Sampling(**{**own, **{name: getattr(asked, name) for name in options}})
    if chosen.beams > 1 and chosen.temperature > 0:
        raise InputError(
            f"beams={chosen.beams} with temperature={chosen.temperature}: beam search draws no tokens",
            hint="temperature=0" if "beams" in options else "beams=1",
        )
    most = _most(chosen, longest, room, given=not {"max_new_tokens", "max_length"}.isdisjoint(options))
    least = chosen.min_new_tokens or max(0, (chosen.min_length or 0) - longest)
    Chooser(chosen, vocabulary)  # which checks the token ids
    return replace(
        chosen,
        min_new_tokens=min(least, most),
        max_new_tokens=most,
        min_length=None,
        max_length=None,
        forced_first=chosen.forced_first if longest == 1 else None,
    )


def _own(generation: Generation, options: Mapping[str, Any], vocabulary: int) -> dict[str, Any]:
    """What the bundle says of the options that a user has left open; no bans of token ids that do not exist."""
    own = {
        field.name: value
        for field in fields(Sampling)
        if (value := getattr(generation, field.name, None)) not in (None, ())
    }
    for either in ({"max_new_tokens", "max_length"}, {"min_new_tokens", "min_length"}):
        if not either.isdisjoint(options):  # one form takes the place of both
            own = {name: value for name, value in own.items() if name not in either}
    for name in ("stop", "suppress", "suppress_first"):
        own[name] = tuple(id_ for id_ in own.get(name, ()) if id_ < vocabulary)
    own["bad_words"] = tuple(word for word in generation.bad_words if max(word) < vocabulary)
    return own


def _most(chosen: Sampling, longest: int, room: int | None, given: bool) -> int:
    """How many new tokens a row has at most; InputError where lengths that were ``given`` cannot be."""
    left = None if room is None else max(0, room - longest + 1)
    wanted = chosen.max_new_tokens
    if wanted is None and chosen.max_length is not None:
        wanted = chosen.max_length - longest
        if wanted < 1:
            raise InputError(
                f"the prompt has {longest} tokens, and max_length={chosen.max_length} counts them too",
                hint="max_new_tokens=..., or --max-new-tokens ...",
            )
    if wanted is None:
        return _NEW_TOKENS if left is None else left
    if left is not None and wanted > left and given:
        raise InputError(
            f"max_new_tokens={wanted} after a prompt of {longest}: the model takes {room} tokens",
            hint=f"max_new_tokens={left}, or --max-new-tokens {left}",
        )
    return wanted if left is None else min(wanted, left)
