"""``offramp run --figure`` of bundles with exits: where patches, words and written tokens left."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import bundles
import numpy as np
import pytest
from numpy.typing import NDArray
from test_cli import reading_bundle, refused, run
from test_cli_generate import generate
from two_modalities import captured, inputs

import offramp
from offramp import cli
from offramp.cli._exits_figure import Left, draw, left, written
from offramp.errors import InputError

PNG = b"\x89PNG"
WORDS = ["a", "b", "c", "d", "e"]


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model that reads patches (and a class token) and words, and writes; its tokens leave alone."""
    path = tmp_path_factory.mktemp("bundle") / "m.offramp"
    passes = "split-modalities{tokens=token},insert-exits{stack=encoder},insert-scores{stack=encoder,measure=cosine}"
    program = offramp.apply(captured(), f"{passes},insert-exits{{stack=decoder}},insert-cache")
    offramp.save(program, path)
    return path


def arrays(rows: int = 1) -> dict[str, NDArray[Any]]:
    given = {name: value[:rows].numpy() for name, value in inputs().items() if name != "decoder_input_ids"}
    given["input_ids"], given["attention_mask"] = (given[name][:, :5] for name in ("input_ids", "attention_mask"))
    return given


def files(folder: Path, rows: int = 1) -> list[str]:
    given = arrays(rows) | {"decoder_input_ids": np.ones((rows, 1), np.int64)}
    for name, array in given.items():
        np.save(folder / f"{name}.npy", array)
    return [part for name in given for part in ("--input", f"{name}={folder / name}.npy")]


def test_where_patches_and_words_left(root: Path) -> None:
    chain = offramp.load(root)
    exits = {"encoder.image": np.array([[3, 1, 2, 3, 1]]), "encoder.text": np.array([[1, 2, 3, 1, 2]])}
    image, text = left(chain, arrays(), exits, ["a", "b", "c", "d", "e", "f"])
    assert (image.name, image.blocks, image.depths.tolist()) == ("encoder.image", 3, [[1, 2], [3, 1]])
    assert image.source is not None
    assert image.source.shape[2] == 3
    assert (text.depths.tolist(), text.names) == ([1, 2, 3, 1, 2], ())
    image, text = left(chain, arrays(), {name: depths[:, :1] for name, depths in exits.items()}, [])
    assert image.depths.tolist() == [[3, 3], [3, 3]]
    assert text.depths.tolist() == [1] * 5
    with pytest.raises(InputError, match="draws one row, these are 2"):
        list(left(chain, arrays(2), exits, WORDS))


def test_where_a_text_left_that_leaves_as_one(tmp_path: Path) -> None:
    bundles.classifier(tmp_path / "m.offramp")
    chain = offramp.load(tmp_path / "m.offramp")
    (found,) = left(chain, {"ids": [[1, 2, 3]]}, {"encoder": np.array([2])}, ["x", "y", "z"])
    assert (found.depths.tolist(), found.names) == ([2, 2, 2], ("x", "y", "z"))


def test_what_was_written(root: Path) -> None:
    tokenizers = pytest.importorskip("tokenizers")
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel({f"w{i}": i for i in range(9)}, unk_token="w0"))
    tokenizer.add_special_tokens(["w2"])
    chain = offramp.load(root)
    found = written(chain, tokenizer, [5, 2], [1, 2])
    assert (found.names, found.depths.tolist(), found.blocks) == (("w5", "w2"), [1, 2], 2)
    assert written(chain, None, [5, 2], [1, 2]).names == ("5", "2")


def test_it_is_drawn(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    patches = Left("encoder.image", 3, np.array([[1, 2], [3, 1]]), source=np.zeros((8, 8, 3)))
    words = Left("encoder.text", 3, np.array([1, 2]), ("$a$", "b"))
    for parts in ([patches, words], [words], [patches], [Left("encoder", 3, np.array([2]))]):
        draw(parts, tmp_path / "x.png")
        assert (tmp_path / "x.png").read_bytes().startswith(PNG)
    with pytest.raises(InputError, match="cannot be written"):
        draw([words], tmp_path / "gone" / "x.png")


def test_a_generation_through_the_command(root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("matplotlib")
    given: list[str | Path] = [root, *files(tmp_path)]
    plain, _ = generate(capsys, *given, "--max-new-tokens", "3")
    figure, _ = generate(capsys, *given, "--max-new-tokens", "3", "--figure", tmp_path / "x.png")
    assert figure == plain
    assert (tmp_path / "x.png").read_bytes().startswith(PNG)
    policy = ("--policy", "confidence:0.9,measure=cosine")
    run(capsys, "run", *given, "--once", "--figure", tmp_path / "y.png", *policy)
    assert (tmp_path / "y.png").read_bytes().startswith(PNG)
    said = refused(capsys, "run", root, *files(tmp_path, 2), "--figure", tmp_path / "x.png")
    assert "draws one row, these are 2" in said


def test_one_pass_through_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("matplotlib")
    given = ("run", reading_bundle(tmp_path / "m.offramp"), "--text", "w5 w6")
    run(capsys, *given, "--figure", tmp_path / "x.png")
    assert (tmp_path / "x.png").read_bytes().startswith(PNG)
    assert "draws one row, these are 2" in refused(capsys, *given, "--text", "w7 w8", "--figure", tmp_path / "x.png")
    assert "draws one row, these are 2" in refused(capsys, *given, "--text", "w7", "--figure", tmp_path / "x.png")


def test_several_rows_are_refused_before_they_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("matplotlib")
    given = ["run", str(reading_bundle(tmp_path / "m.offramp")), "--text", "w5 w6", "--figure", str(tmp_path / "x.png")]
    for second in ("w7 w8", "w7"):
        assert cli.main([*given, "--text", second]) == 1
        assert capsys.readouterr().out == ""
