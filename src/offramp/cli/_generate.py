"""``offramp run`` on a bundle with caches: a prompt or sound in, text out token by token."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from offramp.bundle.preprocessing import ImageText
from offramp.cli import _common, _inputs, _text, _words
from offramp.errors import InputError

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray
    from tokenizers import Tokenizer

    from offramp.runtime import Chain, Policy, Token
    from offramp.runtime.generation.generator import Generator

_SAMPLING = {  # flags by the option that they set
    "max_new_tokens": "max_new_tokens",
    "temperature": "temperature",
    "top_k": "top_k",
    "top_p": "top_p",
    "min_p": "min_p",
    "seed": "seed",
    "repetition_penalty": "repetition_penalty",
    "no_repeat_ngram_size": "no_repeat_ngram_size",
    "stop_strings": "stop",
    "beams": "beams",
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Everything that is about generation."""
    group = parser.add_argument_group("generation", "of a bundle that was exported with insert-cache")
    group.add_argument("--once", action="store_true", help="run one pass over the inputs instead")
    group.add_argument(
        "--max-new-tokens",
        metavar="N",
        type=_common.positive,
        help="the bundle's own, else up to the room in the caches, or where these have no limit 256",
    )
    group.add_argument(
        "--temperature", metavar="T", type=float, help="of drawing tokens; 0 is greedy (the bundle's own, else 0)"
    )
    group.add_argument("--top-k", metavar="K", type=int, help="draw from the K likeliest tokens only")
    group.add_argument(
        "--top-p", metavar="P", type=float, help="draw from the likeliest tokens of probability P in all"
    )
    group.add_argument(
        "--min-p", metavar="P", type=float, help="draw from tokens at least P times as likely as the best"
    )
    group.add_argument("--seed", metavar="N", type=int, help="the same seed draws the same tokens")
    group.add_argument(
        "--repetition-penalty", metavar="X", type=float, help="tokens that were there are less likely; 1 is off"
    )
    group.add_argument(
        "--no-repeat-ngram-size", metavar="N", type=int, help="no N tokens come twice in the same order; 0 is off"
    )
    group.add_argument(
        "--stop", metavar="TEXT", action="append", help="end a row once its tokens spell this; may be repeated"
    )
    group.add_argument("--beams", metavar="N", type=_common.positive, help="search with N beams; 1 is none")
    group.add_argument("--raw", action="store_true", help="take --text as it is, without the bundle's template")
    group.add_argument(
        "--propagate",
        choices=("defer", "hidden", "kv"),  # as `bundle.options` has them, which imports numpy
        help="deeper blocks of tokens that left early: computed when a later token goes deep (defer, exact, the "
        "default), from the hidden state at the exit (hidden), or with the keys and values there for theirs (kv)",
    )
    group.add_argument(
        "--show-exits", action="store_true", help="colour tokens by depth; text|depth where stdout is no terminal"
    )


def wanted(chain: Chain, args: argparse.Namespace) -> bool:
    """Whether to generate; InputError where options say so and the bundle, or ``--once``, says no."""
    if chain.manifest.cache is not None and not args.once:
        return True
    given = [name for name in (*_SAMPLING.values(), "propagate") if getattr(args, name) is not None]
    given += [name for name in ("raw", "show_exits") if getattr(args, name)]
    if given:
        flags = ", ".join(f"--{name.replace('_', '-')}" for name in given)
        why = "with --once nothing is generated" if args.once else "this bundle has no caches, so it does not generate"
        raise InputError(f"{flags}: {why}", hint="leave --once out" if args.once else 'export -p "insert-cache,..."')
    return False


def run(chain: Chain, args: argparse.Namespace, policy: Policy | None) -> int:
    """Generate and print."""
    import numpy as np

    if args.output:
        raise InputError("--output writes the outputs of one pass, not text", hint="--once")
    if args.figure:
        from offramp.cli import _exits_figure, _learners_picture

        _exits_figure.check(chain)
    batches = prompted(chain, args)
    _inputs.check_complete(chain, batches)
    stack, ids = _words.token_stack(chain), chain.manifest.cache.tokens[0]  # type: ignore[union-attr]
    tokenizer = _text.tokenizer_of(chain, args.bundle) if _text.TOKENIZER in chain.manifest.files else None
    options = {name: value for name, flag in _SAMPLING.items() if (value := getattr(args, flag)) is not None}
    options |= {"propagate": args.propagate or "defer", "tokenizer": tokenizer}
    searches = (args.beams or chain.manifest.generation.beams or 1) > 1
    if args.show_exits:
        print(_words.legend(stack), end="")
    sizes = [len(inputs[ids]) if np.iterable(inputs.get(ids)) else _inputs.rows(chain, [inputs]) for inputs in batches]
    if args.figure and sum(sizes) > 1:
        raise _learners_picture.several(sum(sizes))
    encoders: dict[str, NDArray[np.int64]] = {}

    def tokens() -> Iterator[Token]:
        for at, inputs in enumerate(batches):
            if args.figure:
                made = _by_hand(chain.generator(inputs, policy, **options), encoders)
            elif searches:
                made = _searched(chain, inputs, policy, options)
            else:
                made = chain.stream(inputs, policy, **options)
            for token in made:
                yield token._replace(row=token.row + sum(sizes[:at]))

    printed = _words.print_tokens(
        tokens,
        sum(sizes),
        _words.decoder_of(tokenizer),
        _words.painter(stack) if args.show_exits else _words.plain,
    )
    if searches:  # all tokens of a row come at its end
        printed = printed._replace(later=0.0)
    print(printed.summary(stack), file=sys.stderr)
    if args.figure:
        said = _exits_figure.written(chain, tokenizer, printed.tokens[0], printed.exits[0])
        _exits_figure.write(chain, args.bundle, batches, encoders, args.figure, said)
    return 0


def _by_hand(generator: Generator, encoders: dict[str, NDArray[np.int64]]) -> Iterator[Token]:
    """The tokens of a generation, and where its row left the stacks that ran once."""
    encoders |= generator.exits
    while generator.rows:
        yield from generator.next()
    generator.end()


def _searched(
    chain: Chain, inputs: _inputs.Inputs, policy: Policy | None, options: Mapping[str, Any]
) -> Iterator[Token]:
    """What beam search finds, as a stream has it."""
    from offramp.runtime import Token

    found = chain.generate(inputs, policy, **options)
    for row, (tokens, exits) in enumerate(zip(found.tokens, found.exits, strict=True)):
        for at, (token, after) in enumerate(zip(tokens.tolist(), exits.tolist(), strict=True), 1):
            yield Token(row, token, after, {}, {}, 0.0, 0, at == tokens.size, ())


def prompted(chain: Chain, args: argparse.Namespace) -> list[_inputs.Inputs]:
    """The batches that a user gave; text is the prompt of a model that takes one text, else what it reads."""
    assert chain.manifest.cache is not None
    (tokens, *_) = chain.manifest.cache.tokens
    if not args.text or tokens != _text.text_input(chain):
        return _inputs.asked(chain, args)
    if args.pair:
        raise InputError("--pair: a prompt is one text", hint="one --text with all of it, or --once for one pass")
    refuse_truncate(args.truncate)
    _inputs.check_rows(chain, args.text, args.audio, args.image)
    others = _inputs.one(chain, _inputs.given(chain, args.bundle, args.input, (), args.audio, (), args.image))
    sizes = _inputs.sizes(chain, others)
    return [{tokens: [prompt(chain, args.bundle, text, sizes, raw=args.raw) for text in args.text]} | others]


def refuse_truncate(asked: bool) -> None:
    """Raise where a prompt is to be cut."""
    if asked:
        raise InputError(
            "--truncate: a prompt is not cut, for the model would answer another one", hint="a shorter text"
        )


def prompt(
    chain: Chain,
    bundle: Any,
    text: str,
    sizes: Mapping[str, int] | None = None,
    *,
    raw: bool = False,
    tokenizer: Tokenizer | None = None,
) -> list[int]:
    """The token ids of a text, inside the bundle's template where there is one, unless ``raw``.

    ``sizes`` are the lengths of axes that are known, of an image say, for whose features the text keeps places.
    ``tokenizer`` is the bundle's own where it is at hand already.
    """
    from offramp.runtime.preprocess import image_text

    tokenizer = tokenizer or _text.tokenizer_of(chain, bundle)
    tokenizer.no_padding()
    tokenizer.no_truncation()
    settings = chain.manifest.preprocessing.image_text or ImageText()
    template = chain.manifest.generation.template
    inside = None if raw else image_text.chat(text, settings, template)
    special = None if inside is None else settings.template_special
    assert chain.manifest.cache is not None
    (tokens, *_) = chain.manifest.cache.tokens
    whole = text if inside is None else inside
    return image_text.prompt(_text.ids_with_image(chain, tokens, whole, sizes or {}, tokenizer, special), settings)
