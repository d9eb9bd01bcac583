"""The same generation at full depth and with early exits: both texts, how they differ, and how long they take."""

from __future__ import annotations

import difflib
import statistics
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from time import perf_counter
from typing import TYPE_CHECKING, Any

from offramp.cli import _text, _words
from offramp.runtime import Never

if TYPE_CHECKING:
    from offramp.runtime import Chain, Confidence, Policy

_REPEAT = 5


def build(
    model: str,
    path: Path,
    pipeline: tuple[str, ...],
    policy: Policy,
    segments: int | None = None,
    progress: Callable[[str, int, int], None] | None = None,
) -> None:
    """Export a model of the zoo with its tokenizer and what it needs to generate."""
    import offramp
    from offramp import models, zoo

    program = offramp.apply(offramp.capture(*zoo.load(model)), ",".join(pipeline))
    offramp.save(
        program,
        path,
        segments=segments,
        **models.settings(f"zoo:{model}"),
        policy=policy.to_dict(),
        name=model,
        progress=progress,
    )


def show(chain: Chain, path: Path, inputs: Mapping[str, Any], policy: Confidence, **options: Any) -> None:
    """Print both texts as they come, coloured by depth; then what leaving early changed and what it saved."""
    stack = _words.token_stack(chain)
    decode = _words.decoder_of(_text.tokenizer_of(chain, path))
    asked = ", ".join(
        f"after block {after} where {policy.measure} >= {least}" for after, least in policy.thresholds.items()
    )
    ways: dict[str, Policy] = {"full depth": Never(), f"leaving {asked}": policy}
    for way in ways.values():  # the first run of all pays for what the others find done
        list(chain.stream(inputs, way, max_new_tokens=2))
    print(_words.legend(stack), end="")
    told = []
    for title, way in ways.items():
        print(f"\n{title}:")
        told.append(_words.tell(partial(chain.stream, inputs, way, **options), 1, decode, _words.painter(stack)))
    full, early = told
    print(f"\n{difference(decode(full.tokens[0]), decode(early.tokens[0]))}")
    spent = measure(chain, inputs, list(ways.values()), options)
    for name, one, milliseconds in zip(("full depth", "leaving early"), told, spent, strict=True):
        depths = one.exits[0]
        print(
            f"{name:13}  {len(depths)} tokens, {statistics.fmean(depths):.1f} of {stack.blocks} blocks on average, "
            f"{milliseconds:.0f} ms, {milliseconds / len(depths):.1f} ms a token"
        )
    ratio = spent[1] / len(early.exits[0]) / (spent[0] / len(full.exits[0]))
    print(f"Where tokens may leave early, one takes {ratio:.2f}x the time. Which share of them has to, to pay:")
    print(f"\n  offramp bench {path} --depths")


def measure(chain: Chain, inputs: Mapping[str, Any], policies: list[Policy], options: Mapping[str, Any]) -> list[float]:
    """Median milliseconds of all that runs for each token, by policy; they take turns."""
    times: list[list[float]] = [[] for _ in policies]
    for _ in range(_REPEAT):
        for policy, found in zip(policies, times, strict=True):
            stream = chain.stream(inputs, policy, **options)  # by now, an encoder has run
            started = perf_counter()
            list(stream)
            found.append((perf_counter() - started) * 1e3)
    return [statistics.median(found) for found in times]


def difference(full: str, early: str) -> str:
    """Which words of one text another has otherwise."""
    left, right = full.split(), early.split()
    changes = [
        f'"{" ".join(left[a:b])}" became "{" ".join(right[c:d])}"'
        for kind, a, b, c, d in difflib.SequenceMatcher(None, left, right, autojunk=False).get_opcodes()
        if kind != "equal"
    ]
    if not changes:
        return f"The texts are the same, all {len(left)} words." if left else "Both texts are empty."
    return f"The texts differ in {len(changes)} place{'s' * (len(changes) != 1)}: {'; '.join(changes)}."
