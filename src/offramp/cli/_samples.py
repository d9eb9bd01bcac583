"""``offramp export --samples``: what weights of 4 bits are rounded by, and encoded bundles are compared on."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from offramp.cli import _data, _text

if TYPE_CHECKING:
    from offramp.calibration.examples import Example
    from offramp.runtime import Chain

Inputs = dict[str, Any]


def reader(file: Path) -> Callable[[Chain, Path], list[Inputs]]:
    """What ``offramp.save`` takes as samples: it reads them once the bundle is there, by its own preprocessing.

    A row each. What a model reads is cut to what it takes; tokens that it writes are those of a label behind the
    prompt, and without labels those that it writes itself at full depth.

    Raises:
        InputError: the file cannot be read.
    """
    _data.contents(file)  # before what takes long

    def read(chain: Chain, bundle: Path) -> list[Inputs]:
        from offramp.calibration import examples

        cut = chain.generates is None or chain.generates != _text.text_input(chain)
        found = examples.read(chain, _data.read(chain, bundle, file, truncate=cut))
        if chain.generates is None:
            return [dict(example) for example in found.inputs]
        labels = found.labels or [None] * len(found)
        return [_written(chain, example, label) for example, label in zip(found.inputs, labels, strict=True)]

    return read


def _written(chain: Chain, example: Example, label: Any) -> Inputs:
    """An example with all tokens that the model is to have read or written."""
    import numpy as np

    from offramp.calibration.quality import IGNORED
    from offramp.runtime import Never

    tokens, cache = chain.generates, chain.manifest.cache
    assert tokens is not None
    assert cache is not None
    if tokens in example:
        (read,) = example[tokens]
    else:
        session = chain.session(example, Never())
        (read,) = session.prompts  # the bundle's own
        session.end()
    if label is not None:
        written = np.atleast_1d(label)
        written = written[written != IGNORED]
    elif tokens in example:
        written = read[:0]
    else:
        written = chain.generate(example, Never(), temperature=0, beams=1).tokens[0]
    return {**example, tokens: [np.concatenate([read, written])[: cache.limit]]}
