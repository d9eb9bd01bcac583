"""``offramp run --figure`` of a bundle with exits: after how many blocks each patch, word and written token left."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from offramp.bundle.expressions import evaluate
from offramp.bundle.expressions import names as _names
from offramp.cli import _figures, _inputs, _words
from offramp.cli._learners_figure import names_of
from offramp.cli._learners_picture import grid_of, several, shown
from offramp.errors import InputError

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.image import AxesImage
    from tokenizers import Tokenizer

    from offramp.runtime import Chain

_WIDE = 40  # inches at most


@dataclass(frozen=True)
class Left:
    """Where the tokens of a stack, or of a group of one's tokens, left.

    Attributes:
        name: Of the stack, ``STACK.GROUP``, or what was written.
        blocks: How many the stack has.
        depths: After how many each token left, int [tokens]; of patches [height, width].
        names: Of the tokens, where they are known.
        source: The image that patches are of, float [height, width, 3] from 0 to 1.
    """

    name: str
    blocks: int
    depths: NDArray[np.int64]
    names: tuple[str, ...] = ()
    source: NDArray[np.float64] | None = None


def check(chain: Chain) -> None:
    """Raise `InputError` where there is nothing to draw, or nothing to draw it with."""
    if all(len(stack.exits) < 2 for stack in chain.stacks.values()):
        if chain.manifest.learners:
            raise InputError(
                "--figure draws where tokens left, and this bundle has no exits", hint="--once, for learners"
            )
        raise InputError(
            "--figure draws where tokens left, or how many learners they took; this bundle has neither",
            hint='offramp export -p "insert-exits,..." or "insert-acm,..."',
        )
    _figures.need_matplotlib()


def write(
    chain: Chain,
    bundle: Path,
    batches: Sequence[Mapping[str, Any]],
    exits: Mapping[str, NDArray[np.int64]],
    file: Path,
    *more: Left,
) -> None:
    """Draw the one row that was run. Raises `InputError` where there are several, or the file cannot be written."""
    if len(batches) > 1:
        raise several(len(batches))
    draw([*left(chain, batches[0], exits, names_of(chain, bundle, batches[0])), *more], file)


def left(
    chain: Chain, inputs: Mapping[str, Any], exits: Mapping[str, NDArray[np.int64]], names: Sequence[str]
) -> Iterator[Left]:
    """Where the tokens of one row left the stacks that run once.

    Args:
        chain: The bundle.
        inputs: What it was given.
        exits: As `Result.exits` and `Generator.exits` have them.
        names: Of the tokens of its text.
    """
    arrays = {name: np.asarray(value) for name, value in inputs.items() if name in chain.inputs}
    for name, array in arrays.items():
        if (place := chain.rows_of(name)) is not None and array.shape[place[0]] != place[1]:
            raise several(array.shape[place[0]] // place[1])
    counts = _counts(chain, arrays)
    settings = chain.manifest.preprocessing.image
    images = [array for array in arrays.values() if array.dtype.kind == "f" and array.ndim == 4]
    for stack in chain.manifest.stacks.values():
        for name in stack.by_group:
            if name not in exits:
                continue
            depths = np.asarray(exits[name]).reshape(-1)
            if depths.size == 1:
                depths = depths.repeat(counts.get(name, 1))
            grids = [(at, grid) for at, image in enumerate(images) if (grid := grid_of(depths.size, *image.shape[2:]))]
            if depths.size == len(names):
                yield Left(name, stack.blocks, depths, tuple(names))
            elif grids:
                (at, grid), *_ = grids
                patches = depths[depths.size - grid[0] * grid[1] :].reshape(grid)
                yield Left(name, stack.blocks, patches, source=shown(images.pop(at)[0], settings))
            else:
                yield Left(name, stack.blocks, depths)


def written(chain: Chain, tokenizer: Tokenizer | None, tokens: Sequence[int], exits: Sequence[int]) -> Left:
    """Where the tokens that were generated left; special ones by their names."""
    decode = _words.decoder_of(tokenizer)
    others = {token: tokenizer and tokenizer.id_to_token(token) for token in tokens}
    names = tuple(decode([token]).strip() or others[token] or str(token) for token in tokens)
    return Left("written", _words.token_stack(chain).blocks, np.array(exits, np.int64), names)


def _counts(chain: Chain, arrays: _inputs.Inputs) -> dict[str, int]:
    """How many tokens stacks and groups have, where inputs say it."""
    sizes = _inputs.sizes(chain, arrays)
    found: dict[str, int | str] = {}
    for stack in chain.manifest.stacks.values():
        shape = chain.manifest.values[stack.input].shape
        found |= {stack.name: shape[1]} if len(shape) == 3 else {}
        found |= {name: group.tokens for name, group in zip(stack.by_group, stack.groups, strict=False)}
    return {name: evaluate(count, sizes) for name, count in found.items() if _names(count) <= sizes.keys()}


def draw(found: Sequence[Left], file: Path) -> None:
    """Write a figure, a line for each. Raises `InputError` where that fails."""
    from matplotlib.figure import Figure

    widest = max((item.depths.size for item in found if item.source is None), default=0)
    heights = [1.6 if item.source is None else 4.0 for item in found]
    figure = Figure(figsize=(min(_WIDE, max(8.0, 3 + 0.4 * widest)), sum(heights)), layout="constrained")
    parts: Any = figure.subfigures(len(found), 1, height_ratios=heights, squeeze=False)
    for (part,), item in zip(parts, found, strict=True):
        part.suptitle(f"{item.name}: left after so many of {item.blocks} blocks", fontsize=9)
        drawn = _tokens(part.subplots(), item) if item.source is None else _image(part.subplots(1, 2), item)
        part.colorbar(drawn, ax=part.axes, ticks=range(1, item.blocks + 1))
    _figures.save(figure, file)


def _image(places: Sequence[Axes], item: Left) -> AxesImage:
    """The image, and beside it under the colours of its patches."""
    assert item.source is not None
    height, width = item.source.shape[:2]
    for axes in places:
        axes.imshow(item.source)
        axes.set_axis_off()
    return places[1].imshow(item.depths, vmin=1, vmax=item.blocks, extent=(0, width, height, 0), alpha=0.6)


def _tokens(axes: Axes, item: Left) -> AxesImage:
    """A cell for each token, with its number in it."""
    drawn = axes.imshow(item.depths[None], vmin=1, vmax=item.blocks, aspect="auto", alpha=0.6)
    for at, depth in enumerate(item.depths.tolist()):
        axes.text(at, 0, str(depth), ha="center", va="center", fontsize=8)
    axes.set_xticks(range(len(item.names)), item.names, rotation=45, parse_math=False)
    axes.set_yticks(())
    return drawn
