"""Results of a run for a reader: rows put together, classes by name, what was said."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from offramp.cli import _common, _text

if TYPE_CHECKING:
    from offramp.runtime import Chain, Result

_BEST = 3


def outputs(chain: Chain, results: Sequence[Result]) -> dict[str, Any]:
    """The outputs of all batches, rows put together; where sizes differ by row, each as ``NAME-ROW``."""
    import numpy as np

    found: dict[str, Any] = {}
    for name in results[0].outputs:
        arrays = [result.outputs[name] for result in results]
        axis, _ = chain.rows_of(name) or (None, 1)
        if len(arrays) == 1 or axis is None:
            found[name] = arrays[0]
        elif len({array.shape[:axis] + array.shape[axis + 1 :] for array in arrays}) == 1:
            found[name] = np.concatenate(arrays, axis)
        else:
            found |= {f"{name}-{row}": array for row, array in enumerate(arrays)}
    return found


def meanings(
    chain: Chain, bundle: Path, outputs: Mapping[str, Any], texts: Sequence[str], batches: Sequence[Mapping[str, Any]]
) -> Iterator[str]:
    """A table of the likeliest classes of each row, where the bundle names them; the text of a CTC model's logits.

    Of tokens those that the masks in ``batches`` call padding have none.
    """
    masks = [mask for batch in batches for mask in batch.get("attention_mask", ())]
    for name, labels in chain.manifest.labels.items():
        arrays = [(key, array) for key, array in outputs.items() if key == name or key.startswith(f"{name}-")]
        rows = [row for _, array in arrays for row in array if array.ndim == 2]
        if rows:
            lines = [(at, _likeliest(row, labels), *texts[at : at + 1]) for at, row in enumerate(rows)]
            yield _common.table(("row", name, "text")[: len(lines[0])], lines)
        places = [row for _, array in arrays for row in array if array.ndim == 3]
        if places:
            if [len(mask) for mask in masks] == [len(row) for row in places]:
                places = [row[mask != 0] for mask, row in zip(masks, places, strict=True)]
            yield _common.table(
                ("row", name), [(at, " ".join(labels[i] for i in row.argmax(-1))) for at, row in enumerate(places)]
            )
    decode = _ctc(chain, bundle)
    if decode is not None:
        rows = [
            row for name, array in outputs.items() for row in array if array.ndim == 3 and name.startswith("logits")
        ]
        yield _common.table(("row", "text"), [(at, decode(row.argmax(-1).tolist())) for at, row in enumerate(rows)])


def _likeliest(logits: Any, labels: Sequence[str]) -> str:
    import numpy as np

    chances = np.exp(logits.astype(np.float64) - logits.max())
    chances /= chances.sum()
    return ", ".join(f"{labels[i]} {chances[i]:.1%}" for i in np.argsort(-chances, kind="stable")[:_BEST])


def _ctc(chain: Chain, bundle: Path) -> Callable[[list[int]], str] | None:
    """How a tokenizer of characters reads the likeliest ones, frame by frame; None where the bundle has no such one."""
    if _text.TOKENIZER not in chain.manifest.files or chain.manifest.preprocessing.audio is None:
        return None
    decoder = json.loads((bundle / _text.TOKENIZER).read_text(encoding="utf-8")).get("decoder") or {}
    if "CTC" not in [item.get("type") for item in (decoder, *decoder.get("decoders", ()))]:
        return None
    tokenizer = _text.tokenizer_of(chain, bundle)
    return lambda ids: tokenizer.decode(ids, skip_special_tokens=False).strip()
