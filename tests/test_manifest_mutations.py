"""Whatever is done to a manifest, reading it ends in a manifest or in a BundleError; loading it in one of offramp's."""

from __future__ import annotations

import contextlib
import copy
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import bundles
import pytest
import tiny
from hypothesis import given, settings
from hypothesis import strategies as st

import offramp
from offramp.bundle import directory
from offramp.bundle.json_text import from_json
from offramp.bundle.manifest import MANIFEST_FILE
from offramp.errors import BundleError, OfframpError
from offramp.export import assemble
from offramp.export.assemble import _take_place
from offramp.passes import apply
from offramp.program import capture
from offramp.runtime.chain import Chain

SCORED = "insert-cache,insert-exits{stack=decoder},insert-exits{stack=more},insert-scores{stack=more,measure=top1}"

#: What a field is replaced with: every type of JSON, numbers off the scale, and texts that are nearly right.
STRANGE: st.SearchStrategy[Any] = st.sampled_from(
    [
        *(None, True, False, 0, 1, -1, 7, 10**30, 1.5, -0.0, float("nan"), float("inf")),
        *("", "x", "batch", "tokens", "2*batch", "batch//0", "batch*", "max(batch)", "batch//(tokens-tokens)", "9**9"),
        *("/", "../x", "float32", "float32/0", "input", "(" * 250, "\ud800", "top1"),
        *([], {}, [1], ["x"], {"a": 1}, [[]], {"top1": "missing"}, {"name": "never"}, {"name": "each", "stacks": 1}),
    ]
)


@pytest.fixture(scope="module")
def roots(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Bundles without caches, and one with, which has exits in two stacks, scores and a policy."""
    folder = tmp_path_factory.mktemp("bundles")
    made = {"classifier": bundles.classifier(folder / "classifier", adapters=True, policy={"name": "never"})}
    made["translator"] = bundles.translator(folder / "translator")
    program = apply(capture(tiny.seeded(tiny.Halves), {"input_ids": tiny.ids()}), SCORED)
    policy = {"name": "each", "stacks": {"more": offramp.Confidence(0.9, thresholds={1: 0.8}).to_dict()}}
    offramp.save(program, folder / "generator", generation={"stop": [1], "max_length": 20}, policy=policy)
    return made | {"generator": folder / "generator"}


def places(tree: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The paths of everything in a JSON value but itself."""
    items = tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else ()
    for key, item in items:
        yield (*path, key)
        yield from places(item, (*path, key))


def at(tree: Any, path: tuple[Any, ...]) -> Any:
    for key in path:
        tree = tree[key]
    return tree


@st.composite
def mutated(draw: Any, data: Any) -> str:
    """The text of a manifest of which a few fields, at any depth, are gone, other ones, or another type."""
    data = copy.deepcopy(data)
    for _ in range(draw(st.integers(1, 3))):
        known = list(places(data))
        path = draw(st.sampled_from(known))
        holder, key = at(data, path[:-1]), path[-1]
        other = draw(st.sampled_from(known))
        action = draw(st.sampled_from(["delete", "replace", "copy", "swap", "rename", "repeat"]))
        if action == "delete":
            del holder[key]
        elif action == "replace":
            holder[key] = copy.deepcopy(draw(STRANGE))
        elif action == "copy":
            holder[key] = copy.deepcopy(at(data, other))
        elif action == "swap":
            mine, theirs = copy.deepcopy(at(data, path)), copy.deepcopy(at(data, other))
            at(data, other[:-1])[other[-1]] = mine
            holder[key] = theirs
        elif action == "rename" and isinstance(holder, dict):
            holder[str(other[-1])] = holder.pop(key)
        elif action == "repeat" and isinstance(holder, list):
            holder.insert(key, copy.deepcopy(holder[key]))
    return json.dumps(data)


@settings(max_examples=300)
@given(name=st.sampled_from(["classifier", "translator", "generator"]), data=st.data())
def test_reading_ends_in_a_manifest_or_a_bundle_error(roots: dict[str, Path], name: str, data: Any) -> None:
    given = json.loads((roots[name] / MANIFEST_FILE).read_text())
    text = data.draw(mutated(given))
    manifest = None
    with contextlib.suppress(BundleError):
        manifest = from_json(text)
    if manifest is not None:
        with contextlib.suppress(OfframpError):
            Chain(manifest, roots[name])


@pytest.mark.parametrize(
    ("path", "item"),
    [
        (("stacks", "more", "exits", 0, "scores", "top1"), "nothing"),
        (("values", "input_ids", "shape"), ["batch", "max(tokens)"]),
        (("ids", "input_ids"), [0, 10**30]),
        (("ids", "input_ids"), [10, 0]),
        (("ids",), {"x": [0, 10]}),
        (("policy", "stacks", "more", "measure"), {"top1": 1}),
        (("policy", "stacks", "more", "threshold"), [0.9]),
    ],
)
def test_what_has_gone_wrong_before(roots: dict[str, Path], path: tuple[Any, ...], item: Any) -> None:
    data = json.loads((roots["generator"] / MANIFEST_FILE).read_text())
    at(data, path[:-1])[path[-1]] = item
    with pytest.raises(OfframpError):
        Chain(from_json(json.dumps(data)), roots["generator"])


# A bundle in the place of another


@pytest.fixture
def crowded(roots: dict[str, Path], tmp_path: Path) -> tuple[Path, Path]:
    """A new bundle, and a place that has one."""
    shutil.copytree(roots["classifier"], tmp_path / "b")
    shutil.copytree(roots["translator"], tmp_path / "new")
    return tmp_path / "new", tmp_path / "b"


def model(root: Path) -> list[str]:
    return sorted(directory.read(root)[0].stacks)


OLD, NEW = ["encoder"], ["decoder", "encoder"]


def test_a_new_bundle_takes_the_place_of_an_old_one(crowded: tuple[Path, Path]) -> None:
    new, place = crowded
    assert (model(place), model(new)) == (OLD, NEW)
    _take_place(new, place)
    assert model(place) == NEW
    assert [item.name for item in place.parent.iterdir()] == ["b"]


@pytest.mark.parametrize("fails", [1, 2])
def test_a_rename_that_fails_leaves_the_old_bundle(
    crowded: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch, fails: int
) -> None:
    new, place = crowded
    renames = _failing(monkeypatch, fails, OSError("no"))
    with pytest.raises(OSError, match="no"):
        _take_place(new, place)
    assert len(renames) >= fails
    assert (model(place), model(new)) == (OLD, NEW)
    assert sorted(item.name for item in place.parent.iterdir()) == ["b", "new"]


@pytest.mark.parametrize("point", ["first rename", "second rename", "removal"])
def test_whenever_the_process_dies_a_whole_bundle_is_there(
    crowded: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch, point: str
) -> None:
    """Nothing of what comes after runs: neither rename nor removal."""
    new, place = crowded
    dead = False

    def dying(name: str, at: int, real: Any) -> Any:
        count = 0

        def call(*args: Any, **kwargs: Any) -> Any:
            nonlocal count, dead
            count += 1
            dead = dead or (point == name and count == at) or (name == "rename" and point == _POINTS.get(count))
            if dead:
                raise KeyboardInterrupt
            return real(*args, **kwargs)

        return call

    monkeypatch.setattr(Path, "rename", dying("rename", 0, Path.rename))
    monkeypatch.setattr(shutil, "rmtree", dying("removal", 1, shutil.rmtree))
    with pytest.raises(KeyboardInterrupt):
        _take_place(new, place)
    monkeypatch.undo()
    assert sorted(model(file.parent) for file in place.parent.rglob(MANIFEST_FILE)) == [NEW, OLD]
    if point != "second rename":
        assert model(place) == (NEW if point == "removal" else OLD)


_POINTS = {1: "first rename", 2: "second rename"}


@pytest.mark.parametrize("before", [True, False])
@pytest.mark.parametrize("call", range(1, 6))
def test_whenever_an_interrupt_comes_one_bundle_is_there_and_nothing_else(
    crowded: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch, call: int, before: bool
) -> None:
    """One interrupt, before or after any step: making the directory aside, the renames, the removal."""
    new, place = crowded
    steps = _interrupting(monkeypatch, call, before=before)
    if call == 5:
        _take_place(new, place)
        assert steps == ["mkdir", "rename", "rename", "rmtree"]  # there are no more
        return
    with pytest.raises(KeyboardInterrupt):
        _take_place(new, place)
    done = call - before
    assert model(place) == (NEW if done >= 3 else OLD)
    assert sorted(item.name for item in place.parent.iterdir()) == (["b"] if done >= 3 else ["b", "new"])


def _interrupting(monkeypatch: pytest.MonkeyPatch, number: int, *, before: bool) -> list[str]:
    """Let an interrupt come at the n-th step that changes directories; returns the names of those that were taken."""
    taken: list[str] = []

    def counted(name: str, real: Any) -> Any:
        def step(*args: Any, **kwargs: Any) -> Any:
            taken.append(name)
            here = len(taken) == number
            if here and before:
                raise KeyboardInterrupt
            found = real(*args, **kwargs)
            if here:
                raise KeyboardInterrupt
            return found

        return step

    monkeypatch.setattr(Path, "mkdir", counted("mkdir", Path.mkdir))
    monkeypatch.setattr(Path, "rename", counted("rename", Path.rename))
    monkeypatch.setattr(shutil, "rmtree", counted("rmtree", shutil.rmtree))
    return taken


@pytest.mark.parametrize(("step", "before"), [("Writer", True), ("_take_place", True), ("_take_place", False)])
def test_an_interrupted_save_leaves_no_directory_of_its_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: str, before: bool
) -> None:
    real = getattr(assemble, step)

    def interrupted(*args: Any) -> None:
        if not before:
            real(*args)
        raise KeyboardInterrupt

    program = capture(tiny.Encoder(), tiny.text())
    monkeypatch.setattr(assemble, step, interrupted)
    with pytest.raises(KeyboardInterrupt):
        assemble.save(program, tmp_path / "b", segments=1)
    assert [item.name for item in tmp_path.iterdir()] == ([] if before else ["b"])


@pytest.mark.parametrize("step", ["write_text", "chmod", "replace"])
def test_a_file_is_written_whole_or_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: str) -> None:
    file = tmp_path / "file"
    directory.write_whole(file, "old", 0o640)

    def interrupted(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(Path, step, interrupted)
        with pytest.raises(KeyboardInterrupt):
            directory.write_whole(file, "new", 0o640)
    assert (file.read_text(), file.stat().st_mode & 0o777) == ("old", 0o640)
    assert list(tmp_path.iterdir()) == [file]


def _failing(monkeypatch: pytest.MonkeyPatch, number: int, error: Exception) -> list[Path]:
    """Let the n-th rename raise; returns those that were tried."""
    tried: list[Path] = []
    real = Path.rename

    def rename(path: Path, target: Any) -> Path:
        tried.append(path)
        if len(tried) == number:
            raise error
        return real(path, target)

    monkeypatch.setattr(Path, "rename", rename)
    return tried
