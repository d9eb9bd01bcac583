"""Bundles as ``save`` writes them: what lies in them, and that the chain computes what torch does."""

from __future__ import annotations

import hashlib
import itertools
import json
import sys
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import jsonschema
import numpy as np
import onnx
import pytest
import tiny
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import offramp
from offramp.bundle import directory
from offramp.bundle.manifest import MANIFEST_FILE, WEIGHTS_FILE
from offramp.errors import ExportError, OfframpError, PolicyError, SpecError
from offramp.export import save, validate, write
from offramp.passes import InsertAdapter, InsertExits, InsertScores, Truncate, apply
from offramp.program import Program
from offramp.program.exit import Exit
from offramp.program.graph import attribute, storage_key
from offramp.program.sizes import other_sizes
from offramp.runtime.card import CARD_FILE
from offramp.runtime.chain import Chain
from offramp.runtime.policies.base import State

Arrays = Mapping[str, np.ndarray[Any, Any]]
ALIGNMENT = 64
MEASURES = ("top1", "margin", "entropy", "prediction", "cosine", "learned")
SCHEMA = json.loads((Path(__file__).parent.parent / "docs" / "manifest.schema.json").read_text())


class Saved:
    """A program and its bundle, loaded on the host and on a device (the CPU)."""

    def __init__(self, program: Program, root: Path, **options: Any) -> None:
        self.program, self.root = program, root
        self.figures = save(program, root, **options)
        self.manifest, _ = directory.read(root)
        self.chains = {"host": offramp.load(root), "device": Chain(self.manifest, root, _device=("cpu", 0))}

    @property
    def chain(self) -> Chain:
        return self.chains["host"]

    @property
    def raw(self) -> dict[str, Any]:
        found: dict[str, Any] = json.loads((self.root / MANIFEST_FILE).read_text())
        return found

    def run(self, inputs: Mapping[str, Tensor], policy: Any = None, path: str = "host") -> Arrays:
        return self.chains[path].run(arrays(inputs), policy or offramp.Never()).outputs


def arrays(inputs: Mapping[str, Tensor]) -> dict[str, Any]:
    return {name: value.numpy() for name, value in inputs.items()}


def perturbed(program: Program, seed: int = 0) -> Program:
    """The program, with the weights of its exits away from where passes start them."""
    random = torch.Generator().manual_seed(seed)
    for name, weight in program.module.named_parameters():
        if name.startswith("exits."):
            weight.data += torch.randn(weight.shape, generator=random) / 4
    return program


def exits(*steps: Any) -> Callable[[tiny.Captured], Program]:
    return lambda captured: perturbed(apply(captured.program, list(steps)))


class Looped(tiny.Encoder):
    """One block, run four times."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = self.blocks[:1]

    def run(self, x: Tensor, mask: Tensor) -> Tensor:
        for _ in range(tiny.BLOCKS):
            x = self.blocks[0](x, mask)
        return x


@pytest.fixture(scope="module")
def looped() -> tiny.Captured:
    return tiny.captured(Looped, tiny.text())


SCORED = InsertScores(measure=MEASURES)
MAKE: dict[str, tuple[str, Callable[[tiny.Captured], Program]]] = {
    "plain": ("encoder", lambda captured: captured.program),
    "shared": ("encoder", exits(InsertExits())),
    "own": ("encoder", exits(InsertExits(head="own"), SCORED)),
    "adapters": (
        "encoder",
        exits(
            InsertExits(),
            InsertAdapter(after=1, kind="linear"),
            InsertAdapter(after=2, kind="bottleneck"),
            InsertAdapter(after=3, kind="block"),
            SCORED,
        ),
    ),
    "others": (
        "encoder",
        exits(
            InsertExits(after=1, head="own"),
            InsertExits(after=(2, 3)),
            InsertAdapter(after=1, kind="mlp"),
            InsertAdapter(after=3, kind="norm-linear"),
        ),
    ),
    "labeller": ("labeller", exits(InsertExits(after=2), InsertScores(measure=("top1", "margin", "entropy")))),
    "decoder": ("decoder", exits(InsertExits(after=(1, 2)))),
    "looped": ("looped", exits(InsertExits(after=(2, 3)))),
    "time_first": ("time_first", exits(InsertExits(), InsertAdapter(after=1, kind="block"), SCORED)),
    "mixing": ("mixing", exits(InsertExits(after=2))),
    "two_stacks": (
        "two_stacks",
        exits(
            InsertExits("encoder", after=(1, 3)),
            InsertAdapter("encoder", after=3, kind="linear"),
            InsertExits("decoder", after=1, head="own"),
            InsertExits("decoder", after=2),
        ),
    ),
}  # fmt: skip


@pytest.fixture(scope="module")
def saved(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Saved]:
    """A bundle of `MAKE`, written when first asked for."""
    known: dict[str, Saved] = {}

    def get(name: str) -> Saved:
        if name not in known:
            fixture, make = MAKE[name]
            program = make(request.getfixturevalue(fixture))
            known[name] = Saved(program, tmp_path_factory.mktemp("bundles") / f"{name}.offramp")
        return known[name]

    return get


Get = Callable[[str], Saved]


# Files


@pytest.mark.parametrize("name", MAKE)
def test_the_manifest_keeps_to_its_schema(saved: Get, name: str) -> None:
    jsonschema.Draft202012Validator(SCHEMA).validate(saved(name).raw)


@pytest.mark.parametrize("name", ["own", "two_stacks"])
def test_every_file_is_listed_with_its_hash(saved: Get, name: str) -> None:
    root, files = saved(name).root, saved(name).raw["files"]
    assert {path.name for path in root.iterdir()} == {*files, MANIFEST_FILE, CARD_FILE}
    for file, known in files.items():
        content = (root / file).read_bytes()
        assert known == {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    assert list(root.parent.iterdir()) == [root]


@pytest.mark.parametrize("name", MAKE)
def test_every_weight_is_stored_once(saved: Get, name: str) -> None:
    program, root = saved(name).program, saved(name).root
    tensors = {}
    for node in program.graph.find_nodes(op="get_attr"):
        if node.users:
            tensor = attribute(program.graph_module, str(node.target))
            tensors[storage_key(tensor)] = tensor
    size = sum(tensor.nbytes for tensor in tensors.values())
    assert size <= (root / WEIGHTS_FILE).stat().st_size < size + ALIGNMENT * len(tensors)
    places: set[tuple[int, int]] = set()
    content = (root / WEIGHTS_FILE).read_bytes()
    arrays = [tensor.detach().numpy() for tensor in tensors.values()]
    known = {each.tobytes() for array in arrays for each in (array, array.T)}
    for file in root.glob("*.onnx"):
        for item in onnx.load(file, load_external_data=False).graph.initializer:
            where = {entry.key: entry.value for entry in item.external_data}
            if where:
                assert where["location"] == WEIGHTS_FILE
                offset, length = int(where["offset"]), int(where["length"])
                assert offset % ALIGNMENT == 0
                assert content[offset : offset + length] in known
                places.add((offset, length))
    assert len(places) == len(tensors)
    assert all(a + b <= c for (a, b), (c, _) in itertools.pairwise(sorted(places)))


def test_autocast_around_it_changes_nothing(decoder: tiny.Captured, tmp_path: Path) -> None:
    """Neither a pass that runs operators to see what they make, nor what is compared with torch."""
    with torch.autocast("cpu", dtype=torch.bfloat16):
        save(apply(decoder.program, "insert-exits{after=1},insert-cache"), tmp_path / "bundle")


def test_a_tied_head_is_stored_with_the_words(saved: Get) -> None:
    program = saved("decoder").program
    assert any(node.target == "words.weight" for node in program.graph.find_nodes(op="get_attr"))
    assert not any(node.target == "head.weight" for node in program.graph.find_nodes(op="get_attr"))


def test_blocks_that_share_their_weights_share_their_file(saved: Get) -> None:
    segments = saved("looped").manifest.segments
    assert len({segments[f"encoder.{depth}"].file for depth in range(1, 5)}) == 1
    segments = saved("shared").manifest.segments
    assert len({segments[f"encoder.{depth}"].file for depth in range(1, 5)}) == 4


def test_a_shared_head_is_one_file(saved: Get) -> None:
    for name in ("shared", "adapters", "decoder"):
        segments = saved(name).manifest.segments
        assert {segment.file for key, segment in segments.items() if key.endswith("tail")} == {"tail.onnx"}
    own = saved("own").manifest.segments
    assert len({own[f"encoder.{after}-head"].file for after in (1, 2, 3)}) == 3


def test_no_file_tells_where_the_model_came_from(saved: Get) -> None:
    for file in saved("own").root.iterdir():
        content = file.read_bytes()
        for word in (b"tiny.py", b"site-packages", str(Path(__file__).parent).encode()):
            assert word not in content, file.name


def test_the_same_program_gives_the_same_files(saved: Get, tmp_path: Path) -> None:
    again = Saved(saved("others").program, tmp_path / "others.offramp")
    assert again.raw == saved("others").raw


# The manifest


def test_segments_have_an_encoding(saved: Get) -> None:
    assert {segment["encoding"] for segment in saved("own").raw["segments"].values()} == {"fp32"}


def test_provenance_and_figures(saved: Get) -> None:
    for name in MAKE:
        made = saved(name)
        assert made.raw["validation"] == made.figures
        assert made.figures["tolerance"] == 1e-4
        assert set(made.figures) == {"segments", "chain", "exits", "rows", "other_shapes", "tolerance"}
        assert all(0.0 <= figure <= 1e-4 for figure in made.figures.values())
        assert made.figures["chain"] > 0.0
        assert made.raw["provenance"]["pipeline"] == list(made.program.history)
        assert made.raw["model"] == name
        assert made.raw["precision"] == "fp32"
    assert saved("others").raw["provenance"]["pipeline"] == [
        "insert-exits{after=1,head=own}",
        "insert-exits{after=2|3}",
        "insert-adapter{after=1,kind=mlp}",
        "insert-adapter{after=3}",
    ]
    assert saved("plain").raw["provenance"]["pipeline"] == []
    versions = saved("plain").raw["provenance"]["versions"]
    assert versions["torch"] == torch.__version__
    assert versions["onnx"] == onnx.__version__


def test_stacks_and_exits(saved: Get) -> None:
    stack = saved("others").manifest.stacks["encoder"]
    assert (stack.role, stack.blocks) == ("encoder", 4)
    found = [(item.after, item.head, item.adapter) for item in stack.exits]
    assert found == [
        (1, "own", "mlp"),
        (2, "shared", "identity"),
        (3, "shared", "norm-linear"),
        (4, "shared", "identity"),
    ]
    two = saved("two_stacks").manifest.stacks
    assert [(name, stack.role, stack.blocks) for name, stack in two.items()] == [
        ("encoder", "encoder", 4), ("decoder", "decoder", 3),
    ]  # fmt: skip
    assert [(item.after, item.adapter, dict(item.outputs)) for item in two["encoder"].exits] == [
        (1, "identity", {}), (3, "linear", {}), (4, "identity", {}),
    ]  # fmt: skip


def test_axes(saved: Get) -> None:
    manifest = saved("plain").manifest
    assert manifest.batch == "batch"
    assert {name: manifest.values[name].shape for name in manifest.inputs} == {
        "input_ids": ("batch", "tokens"), "attention_mask": ("batch", "tokens"),
    }  # fmt: skip
    time_first = saved("time_first").manifest
    (stack,) = time_first.stacks.values()
    hidden = time_first.values[stack.exits[0].state]
    assert (hidden.shape[1:], hidden.place("batch")) == (("batch", tiny.WIDTH), (1, 1))
    assert saved("mixing").manifest.batch is None


# Where it is written


def test_what_is_no_bundle_is_left_alone(encoder: tiny.Captured, tmp_path: Path) -> None:
    folder = tmp_path / "work"
    folder.mkdir()
    (folder / "notes.txt").write_text("mine")
    file = tmp_path / "file"
    file.write_text("mine")
    for path in (folder, file):
        with pytest.raises(ExportError, match=rf"{path.name} exists and is no bundle\n  try: another path"):
            save(encoder.program, path)
    assert (folder / "notes.txt").read_text() == file.read_text() == "mine"
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["file", "notes.txt", "work"]


def test_a_place_that_cannot_be_written(encoder: tiny.Captured, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    with pytest.raises(ExportError, match=r"file.deep.m.offramp cannot be written: Not a directory\n  try: a path in"):
        save(encoder.program, tmp_path / "file" / "deep" / "m.offramp")
    assert [path.name for path in tmp_path.rglob("*")] == ["file"]


def test_an_empty_directory_and_missing_parents_are_used(encoder: tiny.Captured, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    for path in (tmp_path / "empty", tmp_path / "a" / "b" / "c.offramp"):
        save(encoder.program, path)
        assert list(offramp.load(path).outputs) == ["logits"]
        assert path.stat().st_mode & 0o777 == 0o755


def test_a_bundle_is_replaced(saved: Get, encoder: tiny.Captured, tmp_path: Path) -> None:
    target = tmp_path / "m.offramp"
    save(saved("others").program, target)
    (target / "left-over.txt").write_text("")
    save(encoder.program, target)
    assert offramp.load(target).stacks["encoder"].exits[-1].after == 4
    assert len(offramp.load(target).stacks["encoder"].exits) == 1
    assert not (target / "left-over.txt").exists()
    assert [path.name for path in tmp_path.iterdir()] == ["m.offramp"]


@pytest.mark.parametrize("there", [False, True])
def test_a_failure_leaves_nothing_behind(
    encoder: tiny.Captured, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, there: bool
) -> None:
    target = tmp_path / "m.offramp"
    if there:
        save(encoder.program, target)
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules[validate.__module__].TOLERANCES, "fp32", -1.0)
        with pytest.raises(ExportError, match="segment before-encoder differs from torch: relative error"):
            save(encoder.program, target)
    with pytest.raises((OSError, ExportError), match="no-such-file"):
        save(encoder.program, target, files=[tmp_path / "no-such-file"])
    with pytest.raises(OfframpError, match="no policy 'nonsense'"):
        save(encoder.program, target, policy={"name": "nonsense"})
    for options, kind in (
        ({"segments": 0}, SpecError),
        ({"segments": "2"}, SpecError),
        ({"precision": None}, ExportError),
        ({"precision": "int8", "loss": "0.1"}, ExportError),
    ):
        name, value = list(options.items())[-1]
        with pytest.raises(kind, match=f"{name}={value!r}"):
            save(encoder.program, target, **options)
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before
    assert [path.name for path in tmp_path.iterdir()] == (["m.offramp"] if there else [])


def test_a_default_policy_is_one_or_what_it_is_written_as(encoder: tiny.Captured, tmp_path: Path) -> None:
    program = apply(encoder.program, [InsertExits(after=2), InsertScores()])
    policy = offramp.Confidence(0.5, thresholds={2: 0.75})
    numpys: Any = {"name": "confidence", "threshold": np.float64(0.5), "thresholds": {"2": 0.75}}
    for item in (policy, policy.to_dict(), numpys):
        save(program, tmp_path / "m.offramp", policy=item)
        chain = offramp.load(tmp_path / "m.offramp")
        assert (chain.policy, chain.manifest.policy) == (policy, policy.to_dict())


FUNCTION: Any = lambda state: state.rows > 0  # noqa: E731


@pytest.mark.parametrize(
    ("policy", "said"),
    [
        (offramp.Width(0.5, FUNCTION), "JSON cannot hold it"),
        (FUNCTION, "is no policy that JSON has"),
        ("confidence:0.5", "'confidence:0.5' is no policy that JSON has"),
        (offramp.Confidence(float("inf")), "has numbers that JSON does not have"),
        ({"name": "confidence"}, "has no threshold"),
    ],
)
def test_a_default_policy_that_cannot_be_written_down(
    encoder: tiny.Captured, tmp_path: Path, policy: Any, said: str
) -> None:
    with pytest.raises(PolicyError, match=said):
        save(encoder.program, tmp_path / "m.offramp", policy=policy)


def test_wrong_weights_do_not_pass(encoder: tiny.Captured, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    close = write.Writer.close

    def spoiled(self: write.Writer) -> Any:
        self._weights.seek(self._placed[max(self._placed, key=lambda key: self._placed[key])][0])
        self._weights.write(np.float32(32.0).tobytes())
        return close(self)

    monkeypatch.setattr(write.Writer, "close", spoiled)
    with pytest.raises(ExportError, match="differs from torch"):
        save(encoder.program, tmp_path / "m.offramp")
    assert not any(tmp_path.iterdir())


def test_a_wrong_exit_does_not_pass(saved: Get) -> None:
    """The exit after block 2 applies the head to the hidden state after block 1."""
    made = saved("shared")
    tail = made.manifest.segments["encoder.2/tail"]
    inputs = {key: value.replace("encoder.2", "encoder.1") for key, value in tail.inputs.items()}
    assert inputs != tail.inputs
    segments = {**made.manifest.segments, tail.name: replace(tail, inputs=inputs)}
    with pytest.raises(ExportError, match="the exit after block 2 of stack encoder differs from torch"):
        validate(made.program, replace(made.manifest, segments=segments), made.root, {})


def test_weights_that_cannot_be_stored_are_refused(tmp_path: Path) -> None:
    program = offramp.capture(tiny.seeded(tiny.Encoder), tiny.text(), dynamic={})
    program.graph_module.to(torch.bfloat16)  # which capture would have undone
    with pytest.raises(ExportError, match=r"dtype torch\.bfloat16 cannot be exported\n  try: module\.float\(\)"):
        save(program, tmp_path / "m.offramp")
    assert not any(tmp_path.iterdir())


def test_further_files_lie_in_the_bundle(encoder: tiny.Captured, tmp_path: Path) -> None:
    tokenizer = tmp_path / "tokenizer.json"
    tokenizer.write_text('{"words": 11}')
    made = Saved(encoder.program, tmp_path / "m.offramp", files=[tokenizer], name="words")
    assert (made.root / "tokenizer.json").read_text() == '{"words": 11}'
    assert made.manifest.files["tokenizer.json"].bytes == 13
    assert made.raw["model"] == "words"


@pytest.mark.parametrize("name", [MANIFEST_FILE, WEIGHTS_FILE, "tail.onnx"])
def test_a_further_file_must_not_replace_the_bundles_own(encoder: tiny.Captured, tmp_path: Path, name: str) -> None:
    (tmp_path / "given").mkdir()
    (tmp_path / "given" / name).write_text("{}")
    with pytest.raises(ExportError, match=name):
        save(encoder.program, tmp_path / "m.offramp", files=[tmp_path / "given" / name])
    assert not (tmp_path / "m.offramp").exists()


def test_two_further_files_of_one_name_are_refused(encoder: tiny.Captured, tmp_path: Path) -> None:
    files = [tmp_path / folder / "tokenizer.json" for folder in "ab"]
    for file in files:
        file.parent.mkdir()
        file.write_text(str(file))
    with pytest.raises(ExportError, match=r"tokenizer\.json"):
        save(encoder.program, tmp_path / "m.offramp", files=files)


def test_another_precision_is_refused(encoder: tiny.Captured, tmp_path: Path) -> None:
    with pytest.raises(ExportError, match=r"precision='fp8': there are fp32, fp16, int8, int4"):
        save(encoder.program, tmp_path / "m.offramp", precision="fp8")
    assert not any(tmp_path.iterdir())


def test_progress_is_told(saved: Get, tmp_path: Path) -> None:
    for name in ("plain", "shared", "others", "two_stacks"):
        told: list[tuple[str, int, int]] = []
        save(saved(name).program, tmp_path / name, progress=lambda *step: told.append(step))  # noqa: B023
        (total,) = {total for _, _, total in told}
        assert [done for _, done, _ in told] == list(range(total)), name
        assert len({segment for segment, _, _ in told}) == total


def test_the_default_policy_is_in_the_bundle(saved: Get, encoder: tiny.Captured, tmp_path: Path) -> None:
    policy = offramp.Depth({"encoder": 2})
    chain = Saved(saved("shared").program, tmp_path / "m.offramp", policy=policy.to_dict()).chain
    assert chain.policy == policy
    assert chain.run(arrays(encoder.inputs)).exits["encoder"].tolist() == [2, 2]


# What it computes


def forced(program: Program) -> list[tuple[str, int]]:
    return [(item.stack, item.after) for item in program.exits if item.after < program.stacks[item.stack].blocks]


@pytest.mark.parametrize("path", ["host", "device"])
@pytest.mark.parametrize("name", MAKE)
def test_full_depth_is_the_model(saved: Get, request: pytest.FixtureRequest, name: str, path: str) -> None:
    captured: tiny.Captured = request.getfixturevalue(MAKE[name][0])
    for inputs in [captured.inputs, *other_sizes(captured.program)]:
        assert_close(saved(name).run(inputs, path=path), captured.eager(inputs))


def assert_close(found: Arrays, expected: Mapping[str, Tensor]) -> None:
    for name, value in expected.items():
        np.testing.assert_allclose(found[name], value.numpy(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("path", ["host", "device"])
@pytest.mark.parametrize("name", [name for name in MAKE if name != "plain"])
def test_a_forced_exit_is_the_truncated_program(saved: Get, name: str, path: str) -> None:
    program = saved(name).program
    assert forced(program)
    full = tiny.outputs(program.module, program.example_inputs)
    for stack, after in forced(program):
        cut = apply(program, [Truncate(stack, after)])
        for inputs in [program.example_inputs, *other_sizes(program)]:
            made = tiny.outputs(cut.module, inputs)
            expected = {output: made[output] for output in program.outputs}
            assert_close(saved(name).run(inputs, offramp.Depth({stack: after}), path), expected)
        made = tiny.outputs(cut.module, program.example_inputs)
        for output in program.outputs:  # the exit is not what full depth gives
            assert not torch.allclose(full[output], made[output], rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("after", [1, 2, 3])
def test_a_forced_exit_with_the_shared_head_is_the_model_with_fewer_blocks(
    saved: Get, encoder: tiny.Captured, after: int
) -> None:
    assert_close(saved("shared").run(encoder.inputs, offramp.Depth(after)), encoder.truncated(after))


def test_exits_of_both_stacks_together(saved: Get) -> None:
    program = saved("two_stacks").program
    for source, target in itertools.product((1, 3), (1, 2)):
        cut = apply(program, [Truncate("encoder", source), Truncate("decoder", target)])
        policy = offramp.Depth({"encoder": source, "decoder": target})
        found = tiny.outputs(cut.module, program.example_inputs)
        expected = {name: found[name] for name in program.outputs}
        assert_close(saved("two_stacks").run(program.example_inputs, policy), expected)


def test_stacks_are_left_at_different_places(two_stacks: tiny.Captured, tmp_path: Path) -> None:
    passes = [InsertExits("encoder", after=1), InsertExits("decoder", after=2)]
    figures = save(apply(two_stacks.program, passes), tmp_path / "m.offramp")
    assert figures["rows"] < 1e-4  # and nobody asks the encoder where the decoder is left


@pytest.mark.parametrize("segments", [1, 2, 3])
def test_fewer_segments_compute_the_same(saved: Get, tmp_path: Path, segments: int) -> None:
    program = saved("others").program
    made = Saved(apply(program, []), tmp_path / "m.offramp", segments=segments)
    assert [part.depth for part in made.manifest.stacks["encoder"].parts] == [1, 2, 3, 4]
    plain = saved("plain").program
    made = Saved(plain, tmp_path / "plain.offramp", segments=segments)
    assert len(made.manifest.stacks["encoder"].parts) == segments
    for inputs in other_sizes(plain):
        assert_close(made.run(inputs), tiny.outputs(plain.module, inputs))


# Outputs that no stack has a part in


class _Lengths(tiny.Encoder):
    """Besides logits, returns something made of the mask alone, and an input as it came."""

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> dict[str, Tensor]:
        made = super().forward(input_ids, attention_mask)
        return {**made, "lengths": attention_mask.sum(1), "mask": attention_mask, "again": made["logits"]}


@pytest.mark.parametrize("head", ["shared", "own"])
def test_outputs_beside_the_stack(tmp_path: Path, head: Literal["shared", "own"]) -> None:
    captured = tiny.captured(_Lengths, tiny.text())
    program = perturbed(apply(captured.program, [InsertExits(after=2, head=head)]))
    made = Saved(program, tmp_path / "m.offramp")
    assert_close(made.run(captured.inputs), captured.eager())
    expected = tiny.outputs(apply(program, [Truncate(after=2)]).module, captured.inputs)
    assert list(expected) == ["logits", "lengths", "mask", "again"]
    assert_close(made.run(captured.inputs, offramp.Depth(2)), expected)


class _Constant(tiny.Encoder):
    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> dict[str, Tensor]:
        return {**super().forward(input_ids, attention_mask), "ones": torch.ones(3)}


class _Weight(tiny.Encoder):
    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> dict[str, Tensor]:
        return {**super().forward(input_ids, attention_mask), "scale": self.head.bias}


def test_an_output_that_is_constant(tmp_path: Path) -> None:
    captured = tiny.captured(_Constant, tiny.text())
    for head in ("shared", "own"):
        program = apply(captured.program, [InsertExits(after=2, head=head)])
        made = Saved(program, tmp_path / f"{head}.offramp")
        assert_close(made.run(captured.inputs), captured.eager())
        assert_close(made.run(captured.inputs, offramp.Depth(2)), captured.truncated(2))


def test_an_output_that_is_a_weight_is_refused(tmp_path: Path) -> None:
    program = tiny.captured(_Weight, tiny.text()).program
    with pytest.raises(ExportError, match="scale"):
        save(program, tmp_path / "m.offramp")


# Scores


class Watch:
    """A policy that lets no row go, and keeps what it was shown."""

    def __init__(self) -> None:
        self.seen: dict[int, State] = {}

    def __call__(self, state: State) -> Any:
        self.seen[state.after] = state
        return np.zeros(state.rows.size, np.bool_)


@pytest.mark.parametrize("path", ["host", "device"])
@pytest.mark.parametrize("name", ["own", "adapters", "labeller", "time_first"])
def test_scores_of_the_chain_are_those_of_torch(saved: Get, name: str, path: str) -> None:
    program = saved(name).program
    for inputs in [program.example_inputs, *other_sizes(program)]:
        watch = Watch()
        saved(name).chains[path].run(arrays(inputs), watch)
        made = _scores(program, inputs)
        assert list(watch.seen) == [after for _, after in forced(program)]
        for after, state in watch.seen.items():
            assert set(state.scores) == set(made[after])
            for measure, values in made[after].items():
                np.testing.assert_allclose(state.scores[measure], values, rtol=1e-4, atol=1e-5)
                assert values.shape == state.rows.shape


def _scores(program: Program, inputs: Mapping[str, Tensor]) -> dict[int, dict[str, Any]]:
    """By exit and measure. With an adapter before a shared head the scores are those of the truncated model."""
    found: dict[int, dict[str, Any]] = {}
    returned = tiny.outputs(program.module, inputs)
    for item in program.exits:
        if item.after < program.stacks[item.stack].blocks:
            found[item.after] = {measure: returned[key].numpy() for measure, key in item.scores.items()}
    return found


def test_a_score_that_no_segment_makes_is_refused(encoder: tiny.Captured, tmp_path: Path) -> None:
    """An exit with the shared head has the score of full depth's, without which it would be lost."""
    program = apply(encoder.program, [InsertExits(after=1), InsertScores(measure="top1")])
    early = tuple(item for item in program.records if not isinstance(item, Exit) or item.after < tiny.BLOCKS)
    with pytest.raises(ExportError, match="no segment makes the score top1 of the exit after block 1 of stack encoder"):
        save(replace(program, records=early), tmp_path / "m")


def test_scores_follow_from_logits_and_hidden_states(saved: Get) -> None:
    program = saved("own").program
    watch = Watch()
    saved("own").chain.run(arrays(program.example_inputs), watch)
    for after, state in watch.seen.items():
        logits = saved("own").run(program.example_inputs, offramp.Depth(after))["logits"]
        chances = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
        ordered = np.sort(chances, -1)
        np.testing.assert_allclose(state.scores["top1"], ordered[:, -1], rtol=1e-4)
        np.testing.assert_allclose(state.scores["margin"], ordered[:, -1] - ordered[:, -2], rtol=1e-3, atol=1e-5)
        np.testing.assert_allclose(state.scores["entropy"], -(chances * np.log(chances)).sum(-1), rtol=1e-3)
        assert state.scores["prediction"].tolist() == logits.argmax(-1).tolist()
        assert state.scores["prediction"].dtype == np.int64
        assert (np.abs(state.scores["cosine"]) <= 1.0 + 1e-6).all()
        assert ((state.scores["learned"] > 0.0) & (state.scores["learned"] < 1.0)).all()
        assert (state.scores["learned"] != 0.5).all()


@pytest.mark.parametrize("measure", MEASURES)
def test_scores_do_not_depend_on_padding(saved: Get, encoder: tiny.Captured, measure: str) -> None:
    """Row 1 is two tokens shorter: alone and without them it scores the same."""
    long, short = Watch(), Watch()
    saved("own").chain.run(arrays(encoder.inputs), long)
    saved("own").chain.run({name: value.numpy()[1:, :-2].copy() for name, value in encoder.inputs.items()}, short)
    for after, state in short.seen.items():
        np.testing.assert_allclose(state.scores[measure], long.seen[after].scores[measure][1:], rtol=1e-4, atol=1e-5)


# Rows


class Schedule:
    """A policy as a function: row r leaves each stack after ``at[stack][r]`` blocks."""

    def __init__(self, at: Mapping[str, list[int]]) -> None:
        self.at = at

    def __call__(self, state: State) -> Any:
        return np.array([self.at[state.stack][row] <= state.after for row in state.rows])


@given(data=st.data())
@pytest.mark.parametrize("path", ["host", "device"])
@pytest.mark.parametrize("name", ["own", "adapters", "others", "labeller", "looped", "time_first", "two_stacks"])
def test_each_row_gets_what_it_gets_alone(saved: Get, name: str, path: str, data: st.DataObject) -> None:
    made = saved(name)
    rows, tokens = data.draw(st.integers(1, 5)), data.draw(st.integers(2, 9))
    inputs = _inputs(name, rows, tokens, data.draw(st.integers(0, 9)))
    at = {
        stack.name: data.draw(
            st.lists(st.sampled_from([item.after for item in stack.exits]), min_size=rows, max_size=rows)
        )
        for stack in made.manifest.stacks.values()
    }
    result = made.chains[path].run(inputs, Schedule(at))
    assert {stack: found.tolist() for stack, found in result.exits.items()} == at
    axis = 1 if name == "time_first" else 0
    for row in range(rows):
        one = {key: np.take(value, [row], axis) for key, value in inputs.items()}
        alone = made.chain.run(one, offramp.Depth({stack: depths[row] for stack, depths in at.items()}))
        for output, value in result.outputs.items():
            np.testing.assert_allclose(value[row], alone.outputs[output][0], rtol=1e-4, atol=1e-5)


def _inputs(name: str, rows: int, tokens: int, seed: int) -> dict[str, np.ndarray[Any, Any]]:
    """Rows that differ, padded on the right by as many tokens as the row's number, at most half."""
    if name == "time_first":
        return {"x": np.random.default_rng(seed).standard_normal((tokens, rows, tiny.WIDTH)).astype(np.float32)}
    mask = np.arange(tokens) < np.maximum(tokens - np.arange(rows), (tokens + 1) // 2)[:, None]
    ids = tiny.ids(tokens, rows, seed).numpy()
    if name != "two_stacks":
        return {"input_ids": ids, "attention_mask": mask.astype(np.int64)}
    return {"source_ids": ids, "source_mask": mask.astype(np.int64), "input_ids": tiny.ids(5, rows, seed + 1).numpy()}


@pytest.mark.parametrize("path", ["host", "device"])
def test_a_row_that_has_left_costs_nothing_more(saved: Get, path: str) -> None:
    inputs = _inputs("others", 4, 6, 0)
    result = saved("others").chains[path].run(inputs, Schedule({"encoder": [1, 3, 2, 4]}))
    rows = {
        step.segment: step.rows
        for step in result.trace
        if step.segment.startswith("encoder.") and "/" not in step.segment
    }
    assert [rows[f"encoder.{depth}"] for depth in range(1, 5)] == [4, 3, 2, 1]


class Drawing(tiny.Encoder):
    """Hides some of its tokens at random, unless it is given the numbers."""

    def forward(self, input_ids: Tensor, noise: Tensor | None = None) -> Tensor:  # type: ignore[override]
        torch.rand(1)  # of which nothing depends
        x = self.embed(input_ids)
        x = x * ((torch.rand(x.shape[:2]) if noise is None else noise) > 0.2)[..., None]
        for block in self.blocks:
            x = block(x, None)
        return x


def test_random_numbers_are_refused_with_the_line_that_draws_them_and_are_an_input(tmp_path: Path) -> None:
    model, ids = tiny.seeded(Drawing), torch.randint(0, 9, (2, 7))
    with pytest.raises(ExportError, match=r"numbers with aten.rand.default, .*test_export_bundle.py:\d+") as caught:
        offramp.save(offramp.capture(model, {"input_ids": ids}), tmp_path / "m.offramp")
    assert "numbers as an input" in str(caught.value)
    assert not list(tmp_path.iterdir())
    given = {"input_ids": ids, "noise": torch.rand(2, 7, generator=torch.Generator().manual_seed(0))}
    offramp.save(offramp.capture(model, given), tmp_path / "m.offramp")
    found = offramp.load(tmp_path / "m.offramp").run({name: value.numpy() for name, value in given.items()})
    with torch.no_grad():
        torch.testing.assert_close(torch.from_numpy(found.outputs["output"]), model(**given), rtol=1e-4, atol=1e-5)
