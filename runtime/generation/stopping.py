"""Where a text ends: at tokens, or once it spells a text."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from offramp.bundle.directory import verified
from offramp.bundle.manifest import Manifest
from offramp.errors import InputError

TOKENIZER_FILE = "tokenizer.json"
_BEFORE = "abcdef"  # decoded before a piece of text, since the blank of a first token may go missing


class Ends:
    """Whether a text ends with its last token.

    Args:
        stop: the tokens that end one.
        strings: the texts that do: they may begin anywhere, also inside a token or in the prompt, and end in the last
            token.
        tokenizer: with ``encode(text, add_special_tokens=False)`` and ``decode(ids, skip_special_tokens=False)``, as
            tokenizers and transformers have them; only ``strings`` need it.

    Raises:
        InputError: there are strings, and no tokenizer.
    """

    def __init__(self, stop: Sequence[int], strings: Sequence[str] = (), tokenizer: Any = None) -> None:
        self._stop, self._strings, self._tokenizer = frozenset(stop), tuple(strings), tokenizer
        self._before: list[int] = []
        if not strings:
            return
        if not callable(getattr(tokenizer, "encode", None)) or not callable(getattr(tokenizer, "decode", None)):
            raise InputError(
                f"stop_strings {list(strings)} are text: they need a tokenizer that encodes and decodes, not "
                f"{tokenizer!r}",
                hint="tokenizer=..., a bundle with one (offramp export --file tokenizer.json), or stop_strings=()",
            )
        encoded = tokenizer.encode(_BEFORE, add_special_tokens=False)
        self._before = list(getattr(encoded, "ids", encoded))
        self._skipped = len(self._text(self._before))
        self._longest = max(len(text.encode()) for text in strings)

    @property
    def stop(self) -> frozenset[int] | None:
        """The tokens that end a text; None where texts do too."""
        return None if self._strings else self._stop

    def __call__(self, tokens: Sequence[int]) -> bool:
        """Whether the text of these tokens, prompt included, ends with the last one."""
        if tokens[-1] in self._stop:
            return True
        if not self._strings:
            return False
        tail = [*self._before, *map(int, tokens[-self._longest :])]  # each token adds at least a byte
        before, now = self._text(tail[:-1]), self._text(tail)
        same = next((at for at, (a, b) in enumerate(zip(before, now, strict=False)) if a != b), len(before))
        return any(now.find(text, max(self._skipped, same - len(text) + 1)) >= 0 for text in self._strings)

    def _text(self, tokens: list[int]) -> str:
        return str(self._tokenizer.decode(tokens, skip_special_tokens=False))


def own_tokenizer(manifest: Manifest, root: Path) -> Any:
    """The tokenizer in a bundle's directory, None where it has none; BundleError where its file is another by now."""
    if TOKENIZER_FILE not in manifest.files:
        return None
    try:
        from tokenizers import Tokenizer
    except ModuleNotFoundError as error:
        raise InputError("stop_strings need the package tokenizers", hint="pip install tokenizers") from error
    verified(root, manifest, root, [TOKENIZER_FILE])
    return Tokenizer.from_file(str(root / TOKENIZER_FILE))
