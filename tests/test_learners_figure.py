"""``offramp run --figure``: what is drawn of tokens and their learners, for images, sound and text."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import architectures
import numpy as np
import pytest
import tiny
from numpy.typing import NDArray
from test_cli import reading_bundle, refused, run
from test_insert_acm import undecided

import offramp
from offramp.bundle.manifest import Learners, Manifest, Stack, Value
from offramp.bundle.preprocessing import Audio, Image, Preprocessing
from offramp.cli._learners_figure import draw, names_of
from offramp.cli._learners_picture import Picture, grid_of, picture, shares_of, shown
from offramp.errors import InputError
from offramp.passes import apply


def manifest(
    *sites: tuple[str, int], shape: tuple[str, ...] = ("batch", "tokens"), **preprocessing: object
) -> Manifest:
    """Blocks of stacks, each with an MLP of four learners."""
    names = {f"{stack}.{block}.mlp": (stack, block) for stack, block in sites}
    return Manifest(
        model="m",
        inputs=(),
        outputs={},
        batch="batch",
        axes={},
        values={f"count {name}": Value("int64", shape) for name in names},
        segments={},
        stacks={},
        stages=(),
        files={},
        learners={
            name: Learners(stack, block, "mlp", 4, 0, f"count {name}", 10, "grouped")
            for name, (stack, block) in names.items()
        },
        preprocessing=Preprocessing(**preprocessing),  # type: ignore[arg-type]
    )


def counts(*rows: list[int]) -> NDArray[np.int64]:
    return np.array(rows, np.int64)


# What is drawn


def test_shares_of_blocks_and_tokens() -> None:
    found = shares_of(
        manifest(("encoder", 2), ("encoder", 4), ("decoder", 1)),
        {"encoder.2.mlp": counts([0, 2, 4]), "decoder.1.mlp": counts([1])},  # it left before block 4
    )
    assert list(found) == ["encoder", "decoder"]
    blocks, shares = found["encoder"]
    assert blocks == (2,)
    np.testing.assert_array_equal(shares, [[0.0, 0.5, 1.0]])
    np.testing.assert_array_equal(found["decoder"][1], [[0.25]])


def test_sites_of_a_block_count_by_their_operations() -> None:
    both = manifest(("encoder", 1))
    wide = Learners("encoder", 1, "out", 2, 0, "count encoder.1.mlp", 30, "grouped")
    both = Manifest(**{**vars(both), "learners": {**both.learners, "encoder.1.out": wide}})
    taken = {"encoder.1.mlp": counts([4]), "encoder.1.out": counts([1])}
    assert shares_of(both, taken)["encoder"][1].tolist() == [[(40 + 30) / (40 + 60)]]


def test_tokens_that_lie_first() -> None:
    found = shares_of(manifest(("encoder", 1), shape=("tokens", "batch")), {"encoder.1.mlp": counts([4], [2], [0])})
    assert found["encoder"][1].tolist() == [[1.0, 0.5, 0.0]]


@pytest.mark.parametrize(
    ("tokens", "size", "grid"),
    [
        (196, (224, 224), (14, 14)),
        (197, (224, 224), (14, 14)),  # and a class
        (201, (224, 224), (14, 14)),  # and registers
        (257, (224, 224), (16, 16)),
        (393, (224, 448), (14, 28)),
        (26, (40, 40), (5, 5)),
        (10, (70, 70), (3, 3)),  # patches of 20, and what is left is cut off
        (1, (224, 224), None),
        (130, (32, 32), None),
    ],
)
def test_patches(tokens: int, size: tuple[int, int], grid: tuple[int, int] | None) -> None:
    assert grid_of(tokens, *size) == grid


def test_an_image() -> None:
    pixels = np.random.default_rng(0).normal(size=(1, 3, 8, 8)).astype(np.float32)
    taken = {"encoder.1.mlp": counts([1, 0, 1, 2, 4]), "encoder.2.mlp": counts([4, 4, 4, 4, 4])}
    found = picture(manifest(("encoder", 1), ("encoder", 2)), {"pixel_values": pixels}, taken)
    assert (found.kind, found.stack, found.blocks) == ("image", "encoder", (1, 2))
    np.testing.assert_array_equal(found.shares[0], [[0, 0.25], [0.5, 1]])
    np.testing.assert_array_equal(found.mean, [[0.5, 0.625], [0.75, 1]])
    np.testing.assert_array_equal(found.others, [[0.25], [1.0]])
    assert found.source is not None
    assert found.source.shape == (8, 8, 3)
    assert (found.source.min(), found.source.max()) == (0, 1)


def test_pixels_as_people_see_them() -> None:
    colour = np.random.default_rng(0).random((4, 5, 3))
    settings = Image(mean=(0.5, 0.4, 0.3), std=(0.2, 0.3, 0.4), bgr=False)
    normal = np.moveaxis((colour - settings.mean) / settings.std, -1, 0)  # type: ignore[operator]
    np.testing.assert_allclose(shown(normal, settings), colour)
    np.testing.assert_allclose(shown(np.moveaxis(colour, -1, 0)[::-1], Image(bgr=True)), colour)
    assert shown(np.zeros((1, 4, 5)), None).shape == (4, 5, 3)


@pytest.mark.parametrize(
    ("sound", "settings", "seconds"),
    [((1, 8000), Audio(kind="waveform", rate=16000), 0.5), ((1, 80, 300), Audio(rate=16000, hop=160), 3.0)],
)
def test_sound(sound: tuple[int, ...], settings: Audio, seconds: float) -> None:
    taken = {"encoder.1.mlp": counts([0, 2, 4])}
    found = picture(manifest(("encoder", 1), audio=settings), {"x": np.ones(sound, np.float32)}, taken)
    assert (found.kind, found.seconds, found.shares.tolist()) == ("sound", seconds, [[0.0, 0.5, 1.0]])
    assert found.source is not None
    assert found.source.shape == sound[1:]


def test_words_are_no_patches_and_no_sound() -> None:
    """However many there are."""
    audio = Audio(rate=16000, hop=160)
    both = manifest(("decoder", 1), shape=("batch", "words"), audio=audio)
    given = {"ids": Value("int64", ("batch", "words")), "pixels": Value("float32", ("batch", 3, 8, 8))}
    both = replace(both, inputs=tuple(given), values={**both.values, **given})
    taken = {"decoder.1.mlp": counts([0, 2, 4, 1])}
    for source in (np.zeros((1, 3, 8, 8), np.float32), np.zeros((1, 80, 300), np.float32)):
        for names in ((), ("a", "b", "c", "d")):
            found = picture(both, {"ids": counts([5, 6, 7, 8]), "pixels": source}, taken, names)
            assert (found.kind, found.shares.tolist()) == ("text", [[0, 0.5, 1, 0.25]])
    named = picture(manifest(("decoder", 1), audio=audio), {"x": source}, taken, ("a", "b", "c", "d"))
    assert named.kind == "text"


@pytest.mark.parametrize(("other", "rows"), [(("batch", "read"), 1), (("16*batch", 4), 16)])
def test_sites_that_read_other_tokens_are_left_out(other: tuple[int | str, ...], rows: int) -> None:
    """What attention reads of an encoder; windows of an image, whose order is another."""
    two = manifest(("decoder", 1), ("decoder", 2))
    stack = Stack("decoder", "decoder", 2, "hidden", "left", (), ())
    values = {"count decoder.2.mlp": Value("int64", other), "left": Value("float32", ("batch", "tokens", 8))}
    two = replace(two, stacks={"decoder": stack}, values={**two.values, **values})
    elsewhere = {"decoder.2.mlp": np.zeros((rows, 4), np.int64)}
    blocks, shares = shares_of(two, {"decoder.1.mlp": counts([0, 4]), **elsewhere})["decoder"]
    assert (blocks, shares.tolist()) == ((1,), [[0, 1]])
    with pytest.raises(InputError, match=r"decoder.2.mlp read other tokens than their stack's, or in another order"):
        shares_of(two, elsewhere)


def test_text_goes_to_the_stack_that_reads_it() -> None:
    two = manifest(("encoder", 1), ("decoder", 1))
    taken = {"encoder.1.mlp": counts([0, 2, 4]), "decoder.1.mlp": counts([0, 4])}
    found = picture(two, {"input_ids": counts([5, 6])}, taken, ["he", "llo"])
    assert (found.kind, found.stack, found.names) == ("text", "decoder", ("he", "llo"))
    unnamed = picture(two, {"x": np.zeros((1, 3, 8), np.float32)}, taken)
    assert (unnamed.stack, unnamed.names) == ("encoder", ("0", "1", "2"))


def test_one_row() -> None:
    with pytest.raises(InputError, match="draws one row, these are 2"):
        shares_of(manifest(("encoder", 1)), {"encoder.1.mlp": counts([1], [1])})
    with pytest.raises(InputError, match="the row left before all learners"):
        shares_of(manifest(("encoder", 1)), {})


# What comes out


def pictures() -> list[Picture]:
    shares = np.random.default_rng(0).random((7, 6))
    patches, none = shares.reshape(7, 2, 3), shares[:, :0]
    blocks = tuple(range(1, 8))
    return [
        Picture("image", "encoder", blocks, patches, shares[:, :1], np.zeros((20, 30, 3))),
        Picture("sound", "encoder", blocks, shares, none, np.zeros(900), 2.0),
        Picture("sound", "encoder", blocks, shares, none, np.zeros((80, 30)), 2.0),
        Picture("text", "encoder", blocks, shares, none, names=("$a$", "b", "[SEP]", "d", "e", "f")),
    ]


@pytest.mark.parametrize("found", pictures(), ids=lambda found: found.kind)
def test_it_is_drawn(found: Picture, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    draw(found, tmp_path / "x.png")
    assert (tmp_path / "x.png").read_bytes().startswith(b"\x89PNG")
    with pytest.raises(InputError, match="cannot be written"):
        draw(found, tmp_path / "gone" / "x.png")


def test_an_image_through_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("matplotlib")
    module, inputs = architectures.REQUIRED["vit"]()
    program = undecided(apply(offramp.capture(module, inputs), "insert-acm"))
    offramp.save(program, tmp_path / "vit.offramp", learners="grouped")
    pixels = inputs["pixel_values"][:1].numpy()
    np.save(tmp_path / "x.npy", pixels)
    given = ("run", tmp_path / "vit.offramp", "--input", f"pixel_values={tmp_path / 'x.npy'}", "--policy", "width:0.5")
    shown_ = run(capsys, *given, "--figure", tmp_path / "x.png")
    assert shown_.startswith("output")
    assert re.search(r"\n\n\d+% of the learners ran\n\n", shown_)
    assert (tmp_path / "x.png").read_bytes().startswith(b"\x89PNG")
    chain = offramp.load(tmp_path / "vit.offramp")
    learners = chain.run({"pixel_values": pixels}, offramp.Width(0.5)).learners
    found = picture(chain.manifest, {"pixel_values": pixels}, learners)
    assert found.kind == "image"
    assert found.shares.shape[1] * found.shares.shape[2] + found.others.shape[1] == learners[next(iter(learners))].size
    np.save(tmp_path / "x.npy", inputs["pixel_values"].numpy())
    assert "draws one row, these are 2" in refused(capsys, *given, "--figure", tmp_path / "x.png")


def test_names_of_a_text(tmp_path: Path) -> None:
    root = reading_bundle(tmp_path / "reading.offramp")
    chain = offramp.load(root)
    assert names_of(chain, root, {"input_ids": [[5, 6]]}) == ["w5", "w6"]
    assert names_of(chain, root, {}) == []


def test_bundles_without_learners_or_exits_and_bundles_that_generate(
    decoder: tiny.Captured, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    offramp.save(decoder.program, tmp_path / "plain.offramp")
    np.save(tmp_path / "x.npy", tiny.ids(5, 1).numpy())
    plain = ("run", tmp_path / "plain.offramp", "--input", f"input_ids={tmp_path / 'x.npy'}", "--figure", "x.png")
    said = refused(capsys, *plain)
    assert 'this bundle has neither\n  try: offramp export -p "insert-exits,..." or "insert-acm,..."' in said
    offramp.save(apply(decoder.program, "insert-acm,insert-cache"), tmp_path / "m.offramp")
    np.save(tmp_path / "x.npy", tiny.ids(5, 1).numpy())
    given = (
        "run",
        tmp_path / "m.offramp",
        "--input",
        f"input_ids={tmp_path / 'x.npy'}",
        "--figure",
        tmp_path / "x.png",
    )
    assert "this bundle has no exits\n  try: --once, for learners" in refused(capsys, *given)
    pytest.importorskip("matplotlib")
    run(capsys, *given, "--once")
    assert (tmp_path / "x.png").read_bytes().startswith(b"\x89PNG")
