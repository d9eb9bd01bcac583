"""What is drawn of a run of a bundle with learners: which share of them each token took, beside what it was given."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from offramp.errors import InputError

if TYPE_CHECKING:
    from offramp.bundle.manifest import Learners, Manifest
    from offramp.bundle.preprocessing import Image

Numbers = NDArray[np.float64]
_OTHERS = 16  # tokens at most that stand before those of the patches: a class, registers


@dataclass(frozen=True)
class Picture:
    """What is drawn of one row.

    Attributes:
        kind: "image", "sound" or "text".
        stack: Whose tokens these are.
        blocks: Numbers of its blocks that have learners and ran, from 1.
        shares: Of the operations of a block's learners those that were executed for each token, float [blocks, tokens],
            of images [blocks, height, width] in patches.
        others: The same of tokens before those of the patches, float [blocks, others].
        source: An image float [height, width, 3] from 0 to 1, samples [samples], a spectrogram [mels, frames], or None.
        seconds: How long the sound is.
        names: Of the tokens of a text.
    """

    kind: str
    stack: str
    blocks: tuple[int, ...]
    shares: Numbers
    others: Numbers
    source: NDArray[Any] | None = None
    seconds: float = 0.0
    names: tuple[str, ...] = ()

    @property
    def mean(self) -> Numbers:
        """Over the blocks, float [tokens], or [height, width] in patches."""
        found: Numbers = self.shares.mean(0)
        return found


def picture(
    manifest: Manifest, inputs: Mapping[str, Any], learners: Mapping[str, NDArray[np.int64]], names: Sequence[str] = ()
) -> Picture:
    """The first stack whose tokens fit an image, a sound, or the names of a text; else the first with learners.

    Tokens that ids or a mask count are a text's, however many there are.

    Args:
        manifest: Of a bundle with learners.
        inputs: One row: an image [1, channels, height, width], a sound as ``preprocessing.audio`` has it, or others.
        learners: As `Result.learners` has them.
        names: Of the tokens of a text.
    """
    stacks = shares_of(manifest, learners)
    images, audio = manifest.preprocessing.image, manifest.preprocessing.audio
    floats = [array for array in map(np.asarray, inputs.values()) if array.dtype.kind == "f"]
    words = _axes_of_text(manifest)
    of_text = {item.stack for item in manifest.learners.values() if words & {*manifest.values[item.count].shape}}
    of_text |= {name for name, (_, shares) in stacks.items() if shares.shape[1] == len(names)}
    seen = {name: item for name, item in stacks.items() if name not in of_text}
    for array in (array for array in floats if array.ndim == 4 and (array.shape[1] >= 3 or images is not None)):
        for name, (blocks, shares) in seen.items():
            if grid := grid_of(shares.shape[1], *array.shape[2:]):
                others = shares.shape[1] - grid[0] * grid[1]
                patches = shares[:, others:].reshape(len(blocks), *grid)
                source = shown(array[0], images)
                return Picture("image", name, blocks, patches, shares[:, :others], source)
    for array in (array for array in floats if audio is not None and array.ndim in (2, 3) and seen):
        assert audio is not None
        seconds = array.shape[-1] * (1 if array.ndim == 2 else audio.hop) / audio.rate
        name, (blocks, shares) = next(iter(seen.items()))
        return Picture("sound", name, blocks, shares, shares[:, :0], array[0], seconds)
    fitting = [item for item in stacks.items() if item[1][1].shape[1] == len(names)]
    name, (blocks, shares) = next(iter(fitting or stacks.items()))
    given = names if fitting else range(shares.shape[1])
    return Picture("text", name, blocks, shares, shares[:, :0], names=tuple(map(str, given)))


def shares_of(
    manifest: Manifest, learners: Mapping[str, NDArray[np.int64]]
) -> dict[str, tuple[tuple[int, ...], Numbers]]:
    """By stack its blocks with learners, and the share of their operations that each token took, [blocks, tokens].

    Sites that read other tokens than the stack's hidden state has, or in another order, are left out: what attention
    reads of an encoder, windows of an image.

    Raises:
        InputError: there are several rows, or none of the learners ran.
    """
    taken: dict[str, dict[int, list[Numbers]]] = {}
    left_out: list[str] = []
    for name, item in manifest.learners.items():
        if name not in learners:  # the row had left
            continue
        counts = np.asarray(learners[name], np.float64)
        axis, rows = manifest.values[item.count].place(manifest.batch) or (None, 1)
        if axis is not None and counts.shape[axis] != rows:
            raise several(counts.shape[axis] // rows)
        if not _lies_as_its_stack(manifest, item):
            left_out.append(name)
            continue
        counts = counts.reshape(-1)
        taken.setdefault(item.stack, {}).setdefault(item.block, []).append(
            np.stack([counts * item.flops, np.full_like(counts, item.learners * item.flops)])
        )
    if left_out and not taken:
        sites = ", ".join(left_out[:3])
        raise InputError(f"--figure: {sites} read other tokens than their stack's, or in another order")
    if not taken:
        raise InputError("--figure: the row left before all learners", hint="--policy width:0.4")
    found = {}
    for stack, blocks in taken.items():
        sums = [np.sum(blocks[block], 0) for block in sorted(blocks)]
        found[stack] = tuple(sorted(blocks)), np.stack([executed / of for executed, of in sums])
    return found


def _lies_as_its_stack(manifest: Manifest, item: Learners) -> bool:
    """Whether a site counts the tokens of its stack's hidden state, as far as shapes say it."""
    lying = manifest.values[item.count].shape
    if item.stack not in manifest.stacks or len(lying) == 1:
        return True
    states = manifest.values[manifest.stacks[item.stack].output].shape[:-1]
    return sorted(map(str, lying)) == sorted(map(str, states))


def _axes_of_text(manifest: Manifest) -> set[int | str]:
    """Axes that whole numbers have, and no sound or image."""
    given = [manifest.values[name] for name in manifest.inputs]
    whole = {axis for value in given if value.dtype.startswith("int") for axis in value.shape}
    others = {axis for value in given if value.dtype.startswith("float") for axis in value.shape}
    return {axis for axis in whole - others - {manifest.batch} if isinstance(axis, str)}


def several(rows: int) -> InputError:
    """What to raise where there is more than one row."""
    return InputError(f"--figure draws one row, these are {rows}", hint="one image, sound or text at a time")


def grid_of(tokens: int, height: int, width: int) -> tuple[int, int] | None:
    """Rows and columns of square patches of an image, as many as there are tokens but for a few; None if none fit."""
    for size in range(1, min(height, width) + 1):
        rows, columns = height // size, width // size
        if rows * columns <= tokens:
            return (rows, columns) if tokens - rows * columns <= _OTHERS and rows * columns > 1 else None
    return None


def shown(pixels: NDArray[Any], settings: Image | None) -> NDArray[np.float64]:
    """What a model sees as a picture for people: [channels, height, width] becomes [height, width, 3], 0 to 1."""
    image = np.moveaxis(np.asarray(pixels, np.float64), 0, -1)
    if settings is not None and settings.mean is not None and settings.std is not None:
        image = image * settings.std + settings.mean
    low, high = image.min(), image.max()
    if low < 0 or high > 1:
        image = (image - low) / max(high - low, 1e-12)
    if settings is not None and settings.bgr:
        image = image[..., ::-1]
    return image[..., :3] if image.shape[-1] >= 3 else image[..., :1].repeat(3, -1)
