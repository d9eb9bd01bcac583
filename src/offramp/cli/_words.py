"""Tokens become text on the terminal as they come, coloured by the depth at which they were made."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Sequence
from time import perf_counter
from typing import TYPE_CHECKING, NamedTuple, TypeAlias

if TYPE_CHECKING:
    from tokenizers import Tokenizer

    from offramp.bundle.manifest import Stack
    from offramp.runtime import Chain
    from offramp.runtime.generation.tokens import Token

Decode: TypeAlias = Callable[[Sequence[int]], str]
Paint: TypeAlias = Callable[[str, int], str]

_COLOURS = (34, 70, 106, 142, 178, 172, 166, 160)  # of 256: from green to red
_INCOMPLETE = "\N{REPLACEMENT CHARACTER}"  # what decoders make of bytes that are no whole character


class Text:
    """The text of one row's tokens as it grows, in pieces that never split a character.

    Args:
        decode: the text of token ids; all of them, since what one token adds depends on those before.
    """

    def __init__(self, decode: Decode) -> None:
        self._decode = decode
        self._ids: list[int] = []
        self._shown = self._deepest = 0

    def add(self, token: int, depth: int, *, last: bool = False) -> tuple[str, int]:
        """What one more token adds, and how deep the deepest token went that it is made of.

        While a character lacks bytes that is nothing, unless the token is the ``last``.
        """
        self._ids.append(token)
        self._deepest = max(self._deepest, depth)
        text = self._decode(self._ids)
        if text.endswith(_INCOMPLETE) and not last:
            return "", self._deepest
        piece, deepest = text[self._shown :], self._deepest
        self._shown, self._deepest = max(self._shown, len(text)), 0
        return piece, deepest


def decoder_of(tokenizer: Tokenizer | None) -> Decode:
    """Text without special tokens; the ids themselves where there is no tokenizer."""
    if tokenizer is None:
        return lambda ids: "".join(f"{id_} " for id_ in ids)
    return lambda ids: str(tokenizer.decode(list(ids), skip_special_tokens=True))


def token_stack(chain: Chain) -> Stack:
    """The last stack that runs for each token, whose exits tokens leave by."""
    stages = chain.manifest.stages
    return chain.stacks[[stage.stack for stage in stages if stage.stack and stage.when == "chunk"][-1]]


def plain(text: str, depth: int) -> str:
    """The text alone."""
    return text


def painter(stack: Stack) -> Paint:
    """Colours by depth on a terminal, ``text|depth`` elsewhere."""
    if not sys.stdout.isatty():
        return lambda text, depth: f"{text}|{depth}" if text else ""
    depths = [exit_.after for exit_ in stack.exits]
    step = (len(_COLOURS) - 1) / max(1, len(depths) - 1)
    colours = {depth: _COLOURS[-1 - round(i * step)] for i, depth in enumerate(reversed(depths))}
    return lambda text, depth: f"\033[38;5;{colours[depth]}m{text}\033[0m" if text else ""


def legend(stack: Stack) -> str:
    """The colours of all depths on a terminal, empty elsewhere."""
    if not sys.stdout.isatty():
        return ""
    paint = painter(stack)
    return f"after {' '.join(paint(str(item.after), item.after) for item in stack.exits)} of {stack.blocks} blocks\n"


class Printed(NamedTuple):
    """What was generated: token ids and depths by row, seconds to the first token and for all later ones."""

    tokens: list[list[int]]
    exits: list[list[int]]
    first: float
    later: float

    def summary(self, stack: Stack) -> str:
        """One line: how many tokens, how fast, how deep."""
        depths = [depth for row in self.exits for depth in row]
        if not depths:
            return "no tokens"
        later = len(depths) - len(self.exits)
        rate = f", then {later / self.later:.1f} tokens/s" if later > 0 and self.later > 0 else ""
        mean = sum(depths) / len(depths)
        return (
            f"{len(depths)} token{'s' * (len(depths) != 1)}, the first after {self.first:.2f} s{rate}; "
            f"{mean:.1f} of {stack.blocks} blocks on average"
        )


def print_tokens(start: Callable[[], Iterable[Token]], rows: int, decode: Decode, paint: Paint = plain) -> Printed:
    """Print what is generated: one row as it comes, of several each when it ends."""
    started = perf_counter()
    texts, lines = [Text(decode) for _ in range(rows)], [""] * rows
    printed = Printed([[] for _ in texts], [[] for _ in texts], 0.0, 0.0)
    first = inside = 0.0
    for token in start():
        inside += token.milliseconds / 1e3 if first else 0.0
        first = first or perf_counter() - started
        printed.tokens[token.row].append(token.token)
        printed.exits[token.row].append(token.exit)
        piece = paint(*texts[token.row].add(token.token, token.exit, last=token.finished))
        if rows == 1:
            print(piece, end="\n" if token.finished else "", flush=True)
            continue
        lines[token.row] += piece
        if token.finished:
            print(f"row {token.row}: {lines[token.row]}", flush=True)
    # of one row several tokens may come at once, which share their time
    return printed._replace(first=first, later=inside if rows == 1 else perf_counter() - started - first)
