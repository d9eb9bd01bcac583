"""One block's keys and values in the place of deeper ones': what MuE's released code does where a token leaves.

It is here to compare with. Deeper blocks then read what is not theirs, which costs much quality (CALM, arXiv
2207.07061, sec. 3.3); attention over an encoder's output reads each block's own, as ever.
"""

from __future__ import annotations

from collections.abc import Sequence

from offramp.bundle.manifest import Manifest
from offramp.errors import InputError
from offramp.runtime.generation.buffers import Store
from offramp.runtime.generation.chunk_spans import ChunkSpan


class CopiedCaches:
    """The caches of each block of each stack that runs for chunks, in the order of the blocks.

    Raises:
        InputError: blocks do not all have as many caches, of the same shapes.
    """

    def __init__(self, manifest: Manifest, spans: Sequence[ChunkSpan]) -> None:
        assert manifest.cache is not None
        self._of: dict[str, list[list[str]]] = {}
        for stack in dict.fromkeys(span.stack for span in spans if span.stack is not None):
            read = {name for span in spans if span.stack == stack for call in span.calls for _, name in call.buffers}
            names = [name for name in manifest.cache.buffers if name in read]  # by blocks, as attention comes
            blocks = manifest.stacks[stack].blocks
            each = len(names) // blocks
            found = [names[start : start + each] for start in range(0, each * blocks, each or 1)]
            shapes = {tuple(manifest.values[name].shape for name in block) for block in found}
            if len(names) != each * blocks or len(shapes) > 1:
                raise InputError(
                    f"propagate='kv': the {blocks} blocks of stack {stack!r} have {len(names)} caches of "
                    f"{len({manifest.values[name].shape for name in names})} shapes, so one's cannot stand for another",
                    hint="propagate='defer', which is exact",
                )
            self._of[stack] = found

    def copy(self, store: Store, stack: str, after: int, slot: int, tokens: slice) -> None:
        """Give all blocks behind the first ``after`` what the last of these has of a row's tokens."""
        for block in self._of[stack][after:]:
            for source, target in zip(self._of[stack][after - 1], block, strict=True):
                store.copy(source, target, slot, tokens)
