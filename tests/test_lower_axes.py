"""Axes of computations: what is equal over other axes, or captured with other sizes, is one computation."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from breadth import slow_but
from torch import Tensor, fx, nn

import offramp
from offramp.bundle import directory
from offramp.export import partition
from offramp.export.lowering.lower import lower
from offramp.export.lowering.outline import fingerprint
from offramp.export.subgraph import Subgraph
from offramp.program import Program, capture
from offramp.program.graph import aten, storage_key
from offramp.runtime.engine import sessions

BLOCKS, PATCHES, TOKENS = 3, 9, 6


class Towers(nn.Module):
    """Images and texts through the same blocks: two stacks, over token axes of their own."""

    def __init__(self, shared: bool = True, *, extra: int = 0, strided: bool = False) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(tiny.Block() for _ in range(BLOCKS))
        self.others = self.blocks if shared else nn.ModuleList(tiny.Block() for _ in range(BLOCKS))
        self.first = nn.Parameter(torch.randn(1, extra, tiny.WIDTH))
        self.strided = strided

    def forward(self, image: Tensor, text: Tensor) -> Tensor:
        image = torch.cat([self.first.expand(image.shape[0], -1, -1), image], 1) if self.first.numel() else image
        image = image[:, ::2] if self.strided else image
        for block in self.blocks:
            image = block(image, None)
        for block in self.others:
            text = block(text, None)
        return (image.mean(1) * text.mean(1)).sum(-1)


def inputs(patches: int = PATCHES, tokens: int = TOKENS, rows: int = 2) -> tiny.Inputs:
    random = torch.Generator().manual_seed(0)
    sizes = {"image": patches, "text": tokens}
    return {name: torch.randn(rows, size, tiny.WIDTH, generator=random) for name, size in sizes.items()}


def blocks(program: Program) -> list[list[Subgraph]]:
    return [[block for _, block in stack.blocks] for stack in partition(program).stacks]


def keys(program: Program) -> list[list[str]]:
    return [[lower(block).key for block in stack] for stack in blocks(program)]


@pytest.mark.parametrize(
    "make",
    slow_but([Towers], [Towers, partial(Towers, extra=1), partial(Towers, strided=True)]),
    ids=["plain", "one more", "every other"],
)
def test_two_stacks_of_the_same_blocks_share_files_weights_and_sessions(
    make: Callable[[], nn.Module], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    program = tiny.captured(make, inputs()).program
    assert [stack.blocks for stack in program.stacks.values()] == [BLOCKS, BLOCKS]
    offramp.save(program, tmp_path / "towers")
    manifest, root = directory.read(tmp_path / "towers")
    files = [
        [manifest.segments[name].file for part in stack.parts for name in part.segments]
        for stack in manifest.stacks.values()
    ]
    assert files[0] == files[1]
    assert len(set(files[0])) == BLOCKS
    weights = {storage_key(p): p.nbytes for p in program.graph_module.parameters()}
    assert (root / "weights.bin").stat().st_size <= sum(size + 63 for size in weights.values())
    opened: list[str] = []

    def counted(path: Path, *args: Any) -> Any:
        opened.append(path.name)
        return original(path, *args)

    original = sessions._open
    monkeypatch.setattr(sessions, "_open", counted)
    offramp.load(root)
    assert [file for file in opened if file in files[0]] == list(dict.fromkeys(files[0]))


def test_blocks_of_other_weights_are_translated_once(tmp_path: Path) -> None:
    ((first, *others), second) = keys(tiny.captured(partial(Towers, shared=False), inputs()).program)
    assert {first, *others, *second} == {first}


@pytest.mark.slow
def test_the_sizes_of_examples_do_not_matter() -> None:
    module = tiny.seeded(Towers)
    found = {keys(capture(module, inputs(*sizes)))[0][0] for sizes in ((9, 6, 2), (5, 8, 2), (4, 7, 3))}
    assert len(found) == 1


class Few(tiny.Encoder):
    """A table of fewer rows than the lengths that axes have for torch."""

    def __init__(self) -> None:
        super().__init__()
        self.places = nn.Embedding(12, tiny.WIDTH)

    def embed(self, input_ids: Tensor) -> Tensor:
        words: Tensor = self.words(input_ids)
        return words + self.places.weight[: input_ids.shape[1]]


@pytest.mark.slow
def test_shapes_that_follow_from_the_example_keep_its_sizes(tmp_path: Path) -> None:
    programs = [tiny.captured(Few, tiny.text(tokens)).program for tokens in (7, 8)]
    entries = [lower(entry) for program in programs for entry in partition(program).before if entry]
    assert len({entry.key for entry in entries}) == 2
    assert keys(programs[0]) == keys(programs[1])
    figures = offramp.save(programs[0], tmp_path / "m")
    assert max(figures["segments"], figures["other_shapes"]) < 1e-5


def test_what_is_a_weight_is_part_of_the_computation() -> None:
    def product(*names: str) -> fx.Graph:
        graph = fx.Graph()
        given = [graph.placeholder(name) for name in names]
        for node in given:
            node.meta["val"] = torch.ones(2, 2)
        graph.output((graph.call_function(aten.mm.default, tuple(given)),))
        return graph

    assert fingerprint(product("in0", "w0")) != fingerprint(product("in0", "in1"))
