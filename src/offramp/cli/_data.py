"""Examples from a file, for ``offramp calibrate``, ``offramp report`` and ``offramp export``.

=======  ======================================================================================================
.npz     arrays named as the bundle's inputs, and perhaps ``labels``
.tsv     a text a line, perhaps a tab and its label; a first line whose text is one of `_HEADERS` is a header
.txt     a text a line, with the same header
.jsonl   an object a line: ``text`` and perhaps its ``pair``, ``audio`` and ``image`` (files, from where it lies), or
         the bundle's inputs by name (a row each, lists of token ids for example), and perhaps ``label``
=======  ======================================================================================================
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from offramp.cli import _common, _generate, _inputs, _text
from offramp.errors import InputError

if TYPE_CHECKING:
    from tokenizers import Tokenizer

    from offramp.runtime import Chain

FORMATS = (".npz", ".tsv", ".txt", ".jsonl")
FILE = (
    "examples: .npz (arrays named as the inputs, perhaps labels), .tsv (text, perhaps a label), .txt or .jsonl (text, "
    "perhaps its pair, image and audio files, or inputs, perhaps label). Files are looked for from where FILE lies. A "
    "first line of sentence, text, prompt or source in .tsv and .txt is skipped. A label is a class id or name; of a "
    "bundle that generates, a text"
)
_HEADERS = ("sentence", "text", "prompt", "source")


def add_arguments(parser: argparse.ArgumentParser, *, required: bool) -> None:
    """BUNDLE, --data, and what is about running."""
    parser.add_argument("bundle", metavar="BUNDLE", type=Path, help="a directory that offramp export wrote")
    parser.add_argument(
        "--data",
        metavar="FILE",
        type=Path,
        required=required,
        help=FILE,
    )
    parser.add_argument(
        "--max-new-tokens", metavar="N", type=_common.positive, help="of a bundle that generates, for each example"
    )
    parser.add_argument("--truncate", action="store_true", help="cut a text that is longer than the model takes")
    parser.add_argument("--threads", metavar="N", type=int, help="of ONNX Runtime; as many as cores if left out")
    parser.add_argument("--provider", metavar="NAME", action="append", help="of ONNX Runtime; may be repeated")


def options(args: argparse.Namespace) -> dict[str, Any]:
    """What a generation is asked for."""
    return {} if args.max_new_tokens is None else {"max_new_tokens": args.max_new_tokens}


def read(chain: Chain, bundle: Path, file: Path, *, truncate: bool = False) -> list[dict[str, Any]]:
    """The examples in a file, a batch each or all in one, with "labels" where it has some.

    Text that is longer than the model takes is cut with ``truncate``.

    Raises:
        InputError: the file cannot be read, or does not fit the bundle.
    """
    rows = contents(file)
    if file.suffix == ".npz":
        return rows
    written = any("text" in row or (chain.generates and isinstance(row.get("label"), str)) for row in rows)
    tokenizer = _text.tokenizer_of(chain, bundle) if written else None
    return [_example(chain, bundle, row, tokenizer, file.parent, truncate) for row in rows]


def contents(file: Path) -> list[dict[str, Any]]:
    """What a file says, before anything is known of a bundle: arrays, or a mapping for each line.

    Raises:
        InputError: the file cannot be read, or says nothing.
    """
    if file.suffix not in FORMATS:
        raise InputError(f"data {file}: there are {', '.join(FORMATS)}")
    try:
        if file.suffix == ".npz":
            return [_arrays(file)]
        text = file.read_text(encoding="utf-8-sig")
        lines = [line for line in text.split("\n") if line.strip()]  # splitlines would split texts, at form feeds say
        rows = list(_json(lines) if file.suffix == ".jsonl" else _columns(lines, file.suffix))
    except (OSError, ValueError, EOFError) as error:
        raise InputError(f"data {file} cannot be read: {error}") from error
    if not rows:
        raise InputError(f"data {file} has no examples", hint="one on each line; a header is none")
    return rows


def _arrays(file: Path) -> dict[str, Any]:
    import numpy as np

    with np.load(file, allow_pickle=False) as arrays:
        return dict(arrays)


def _columns(lines: list[str], suffix: str) -> Iterator[dict[str, Any]]:
    for at, line in enumerate(lines):
        text, *label = line.split("\t") if suffix == ".tsv" else [line]
        if at == 0 and text.strip().lower() in _HEADERS:
            continue
        if len(label) > 1:
            raise ValueError(f"line {at + 1} has {len(label) + 1} columns, expected a text and perhaps a label")
        yield {"text": text, **({"label": label[0]} if label else {})}


def _json(lines: list[str]) -> Iterator[dict[str, Any]]:
    for at, line in enumerate(lines):
        row = json.loads(line)
        if not isinstance(row, dict):
            raise ValueError(f"line {at + 1} is no object")
        yield {name: value for name, value in row.items() if value is not None or name == "label"}


def _example(
    chain: Chain, bundle: Path, row: dict[str, Any], tokenizer: Tokenizer | None, folder: Path, truncate: bool
) -> dict[str, Any]:
    """One example as a batch of one row; its files lie in ``folder``."""
    import numpy as np

    named = {name: row[name] for name in ("audio", "image") if name not in chain.inputs and name in row}
    given = {name: [value] for name, value in row.items() if name not in ("text", "pair", "label", *named)}
    if "audio" in named:
        (heard,) = _inputs.hear(chain, bundle, [folder / str(named["audio"])])
        given |= heard
    if "image" in named:
        given |= _inputs.see(chain, bundle, [folder / str(named["image"])])
    if wrong := [name for name in ("text", "pair") if isinstance(row.get(name), list | dict)]:
        raise InputError(f"{wrong[0]} is {row[wrong[0]]!r}, expected a text", hint="a line for each example")
    if "text" in row:
        pairs = [str(row["pair"])] if "pair" in row else []
        sizes = _inputs.sizes(chain, {name: np.asarray(value) for name, value in given.items()})
        given |= _read(chain, bundle, str(row["text"]), tokenizer, pairs, sizes, truncate)
    if "label" in row:
        given["labels"] = [_label(chain, row["label"], tokenizer)]
    return given


def _read(
    chain: Chain,
    bundle: Path,
    text: str,
    tokenizer: Tokenizer | None,
    pairs: list[str],
    sizes: Mapping[str, int],
    truncate: bool,
) -> dict[str, Any]:
    """A text as the prompt of a model that takes one text, else as what it reads, perhaps with a second one.

    It keeps places for an image whose ``sizes`` are known.
    """
    if chain.generates is not None and chain.generates == _text.text_input(chain) and not pairs:
        _generate.refuse_truncate(truncate)
        return {chain.generates: [_generate.prompt(chain, bundle, text, sizes, tokenizer=tokenizer)]}
    (row,) = _text.encode(chain, bundle, [text], tokenizer, pairs, truncate=truncate, sizes=sizes)
    return row


def _label(chain: Chain, label: Any, tokenizer: Tokenizer | None) -> Any:
    """A class id, by its name too, or for a generation the reference's token ids, the mark of the end behind them."""
    import numpy as np

    if chain.generates is None:
        known = {name: at for names in chain.manifest.labels.values() for at, name in enumerate(names)}
        few = ", ".join([*known][:5]) + (", ..." if len(known) > 5 else "")
        expected = "class id" + (f" and none of {few}" if known else "")
        label = known.get(label, label) if isinstance(label, str) else label
    elif isinstance(label, str) and tokenizer is not None:
        ids = tokenizer.encode(label, add_special_tokens=False).ids
        return np.array([*ids, *chain.manifest.generation.stop[:1]], np.int64)
    else:
        expected = "text, and no token ids"
    try:
        found = np.asarray(int(label) if isinstance(label, str) else label)
        if found.size and found.dtype.kind not in "iub":
            raise TypeError(f"dtype {found.dtype}")
    except (TypeError, ValueError) as error:
        raise InputError(
            f"label {label!r} is no {expected}",
            hint="examples without labels, which are compared with the answers at full depth",
        ) from error
    return found.astype(np.int64)
