"""``offramp run --figure``: where a network with learners looks harder.

`draw` draws a `Picture`:

=====  ==========================================================================================
image  the image, beside it patches in the colour of the mean over the blocks, below each block
sound  the waveform or spectrogram, below it blocks and frames on the same axis of time
text   blocks and tokens, named where the bundle has a tokenizer; so are tokens of any other kind
=====  ==========================================================================================
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from offramp.cli import _figures, _text
from offramp.cli._learners_picture import Picture, picture, several
from offramp.errors import InputError

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from offramp.runtime import Chain, Result

_COLUMNS = 6


def check(chain: Chain) -> None:
    """Raise `InputError` where there is nothing to draw, or nothing to draw it with."""
    if not chain.manifest.learners:
        raise InputError(
            "--figure draws how many learners each token took; this bundle has none",
            hint='offramp export -p "insert-acm,..."',
        )
    _figures.need_matplotlib()


def write(
    chain: Chain, bundle: Path, batches: Sequence[Mapping[str, Any]], results: Sequence[Result], file: Path
) -> None:
    """Draw the one row that was run. Raises `InputError` where there are several, or the file cannot be written."""
    if len(batches) > 1:
        raise several(len(batches))
    draw(picture(chain.manifest, batches[0], results[0].learners, names_of(chain, bundle, batches[0])), file)


def names_of(chain: Chain, bundle: Path, inputs: Mapping[str, Any]) -> list[str]:
    """The tokens of the first row of a text as the bundle's tokenizer spells them, else their ids."""
    name = _text.text_input(chain)
    if name is None or name not in inputs:
        return []
    ids = np.asarray(inputs[name]).reshape(-1).tolist()
    if _text.TOKENIZER not in chain.manifest.files:
        return list(map(str, ids))
    tokenizer = _text.tokenizer_of(chain, bundle)
    return [tokenizer.id_to_token(token) or str(token) for token in ids]


def draw(found: Picture, file: Path) -> None:
    """Write a picture to a file. Raises `InputError` where that fails."""
    _figures.save({"image": _image, "sound": _sound, "text": _text_figure}[found.kind](found), file)


def _image(found: Picture) -> Figure:
    from matplotlib.figure import Figure

    assert found.source is not None
    columns = min(_COLUMNS, len(found.blocks))
    lines = -(-len(found.blocks) // columns)
    figure = Figure(figsize=(8, 4 + 1.5 * lines), layout="constrained")
    parts: Any = figure.subfigures(2, 1, height_ratios=(4, 1.5 * lines))
    above, below = parts
    left, right = above.subplots(1, 2)
    left.imshow(found.source)
    left.set_title("input")
    height, width = found.source.shape[:2]
    drawn = right.imshow(found.mean, extent=(0, width, height, 0))  # its own colours: means lie close together
    right.set_title(f"{found.stack}: mean of {len(found.blocks)} blocks")
    above.colorbar(drawn, ax=right, label="share of the learners")
    small = list(below.subplots(lines, columns, squeeze=False).flat)
    for block, shares, axes in zip(found.blocks, found.shares, small, strict=False):
        drawn = axes.imshow(shares, vmin=0, vmax=1)
        axes.set_title(f"block {block}", fontsize=8)
    for axes in (left, right, *small):
        axes.set_axis_off()
    below.colorbar(drawn, ax=small, label="share")
    return figure


def _sound(found: Picture) -> Figure:
    from matplotlib.figure import Figure

    assert found.source is not None
    figure = Figure(figsize=(9, 3 + 0.25 * len(found.blocks)), layout="constrained")
    above, below = figure.subplots(2, 1, sharex=True)
    if found.source.ndim == 1:
        above.plot(np.linspace(0, found.seconds, found.source.size), found.source, linewidth=0.5)
        above.set_ylabel("sample")
    else:
        bands = found.source.shape[0]
        above.imshow(found.source, aspect="auto", origin="lower", extent=(0, found.seconds, 0, bands), cmap="magma")
        above.set_ylabel("band")
    _blocks(below, found, (0, found.seconds))
    below.set_xlabel("seconds")
    return figure


def _text_figure(found: Picture) -> Figure:
    from matplotlib.figure import Figure

    tokens = len(found.names)
    figure = Figure(figsize=(min(40, 3 + 0.3 * tokens), 2 + 0.25 * len(found.blocks)), layout="constrained")
    axes = figure.subplots()
    _blocks(axes, found, (-0.5, tokens - 0.5))
    axes.set_xticks(range(tokens), found.names, rotation=90, parse_math=False)
    return figure


def _blocks(axes: Axes, found: Picture, across: tuple[float, float]) -> None:
    """Blocks from top to bottom, tokens across."""
    count = len(found.blocks)
    drawn = axes.imshow(
        found.shares, aspect="auto", interpolation="nearest", vmin=0, vmax=1, extent=(*across, count - 0.5, -0.5)
    )
    axes.set_yticks(range(count), [str(block) for block in found.blocks])
    axes.set_ylabel(f"block of {found.stack}")
    axes.figure.colorbar(drawn, ax=axes, label="share of its learners")
