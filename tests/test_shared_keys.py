"""The last blocks of a decoder attend to keys and values of an earlier one: these go with the tokens, exits between."""

# mypy: disable-error-code="no-any-return, override"
from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import pytest
import tiny
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import offramp
from offramp.bundle.whole import divided
from offramp.errors import InputError, StructureError
from offramp.export import save
from offramp.passes.default import with_caches
from offramp.runtime.chain import Chain
from offramp.runtime.policies.base import State

OWN, SHARING = 2, 3
Pair: TypeAlias = tuple[Tensor, Tensor]


class Block(nn.Module):
    """Takes keys and values, ``[rows, heads, tokens, features]``, and ``own`` ones make them.

    Keys have a norm, before heads are turned to the front or (``turned``) after that.
    """

    def __init__(self, own: bool, turned: bool) -> None:
        super().__init__()
        width, self.turned = tiny.WIDTH, turned
        self.q, self.out = nn.Linear(width, width), nn.Linear(width, width)
        self.kv = nn.Linear(width, 2 * width) if own else None
        self.key_norm = nn.LayerNorm(width // tiny.HEADS) if own else None
        self.mlp = nn.Sequential(nn.Linear(width, 24), nn.GELU(), nn.Linear(24, width))
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(2))

    def pair(self, x: Tensor) -> Pair:
        assert self.kv is not None
        assert self.key_norm is not None
        k, v = self.kv(self.norms[0](x)).unflatten(-1, (2, tiny.HEADS, -1)).unbind(2)
        k = self.key_norm(k.transpose(1, 2)) if self.turned else self.key_norm(k).transpose(1, 2)
        return k, v.transpose(1, 2)

    def forward(self, x: Tensor, pair: Pair) -> Tensor:
        q = self.q(self.norms[0](x)).unflatten(-1, (tiny.HEADS, -1)).transpose(1, 2)
        x = x + self.out(F.scaled_dot_product_attention(q, *pair, is_causal=True).transpose(1, 2).flatten(2))
        return x + self.mlp(self.norms[1](x))


class Sharing(tiny.Talker):
    """Two blocks with keys and values of their own, then three that read those of the second one."""

    def __init__(self, turned: bool, sharing: int = SHARING) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block(at < OWN, turned) for at in range(OWN + sharing))

    def forward(self, input_ids: Tensor, after: int = SHARING) -> Tensor:
        x, pair = self.embed(input_ids), None
        for block in self.blocks[: OWN + after]:
            pair = pair if block.kv is None else block.pair(x)
            x = block(x, pair)
        return self.head(self.leave(x))


def model(turned: bool) -> Sharing:
    return tiny.seeded(lambda: Sharing(turned), seed=4)


@pytest.fixture(scope="module", params=[("ort", False), ("portable", True)], ids=["normed", "turned"])
def target(request: pytest.FixtureRequest) -> tuple[Any, bool]:
    return request.param


@pytest.fixture(scope="module")
def root(target: tuple[Any, bool], tmp_path_factory: pytest.TempPathFactory) -> Path:
    captured = offramp.capture(model(target[1]), {"input_ids": tiny.ids()})
    assert {name: stack.blocks for name, stack in captured.stacks.items()} == {"decoder": SHARING}
    program, reason = with_caches(captured)
    assert reason is None
    root = tmp_path_factory.mktemp("sharing") / "m.offramp"
    save(offramp.apply(program, "insert-exits,insert-scores{measure=prediction}"), root, target=target[0])
    return root


@pytest.fixture(scope="module")
def chain(root: Path) -> Chain:
    return offramp.load(root)


def test_what_is_shared_is_made_once(chain: Chain) -> None:
    """By the first segment, with its caches; the others read of it what has rows and tokens first."""
    manifest = divided(chain.manifest)
    cache = manifest.cache
    assert cache is not None
    first, *others = (manifest.segments[f"decoder.{depth}"] for depth in range(1, SHARING + 1))
    assert len(cache.buffers.keys() & first.inputs.values()) == 2 * (OWN + 1)
    for segment in others:
        read = {name for name in segment.inputs.values() if name not in cache.buffers and name != cache.lengths}
        assert len(cache.buffers.keys() & segment.inputs.values()) == 2
        assert len(read) > 1
        assert {manifest.values[name].shape[:2] for name in read} == {("batch", "tokens")}


class Depths:
    """The n-th token of each row leaves after ``depths[n]`` blocks."""

    def __init__(self, depths: Sequence[int]) -> None:
        self.depths = depths
        self.steps: dict[int, int] = {}

    def __call__(self, state: State) -> Any:
        if state.after == 1:
            self.steps |= {row: self.steps.get(row, -1) + 1 for row in state.rows.tolist()}
        wanted = [self.depths[self.steps[row] % len(self.depths)] for row in state.rows.tolist()]
        return np.array(wanted) <= state.after


@torch.no_grad()
def written(model: Sharing, prompt: Sequence[int], depths: Sequence[int], count: int = 12) -> list[int]:
    """What follows a prompt of several tokens, which goes to full depth; each token's logits from the whole text."""
    ids = torch.tensor([prompt])
    for after in (SHARING, *(depths[step % len(depths)] for step in range(count - 1))):
        ids = torch.cat([ids, model(ids, after)[:, -1:].argmax(-1)], 1)
    return ids[0, len(prompt) :].tolist()


MIXED = (1, 3, 1, 1, 2, 1, 3)
POLICIES: dict[str, tuple[Callable[[], Any], Sequence[int]]] = {
    "none": (lambda: None, [SHARING]),
    "never": (offramp.Never, [SHARING]),
    "first exit": (lambda: offramp.Depth(1), [1]),
    "second exit": (lambda: offramp.Depth(2), [2]),
    "mixed": (lambda: Depths(MIXED), MIXED),
}


@pytest.mark.parametrize("policy", POLICIES)
def test_tokens_are_those_of_the_whole_text(target: tuple[Any, bool], chain: Chain, policy: str) -> None:
    """Of one row, and of a batch of two whose prompts differ in length."""
    make, depths = POLICIES[policy]
    for prompts in ([[1, 2, 3, 4, 5]], [[6, 7]], [[1, 2, 3, 4, 5], [6, 7]]):
        found = chain.generate({"input_ids": prompts}, make(), propagate="defer", max_new_tokens=12)
        assert [row.tolist() for row in found.tokens] == [written(model(target[1]), row, depths) for row in prompts]
    assert len({tuple(row.tolist()) for row in found.tokens}) == 2


def test_a_layout_that_rows_cannot_be_taken_of_is_refused(chain: Chain, root: Path) -> None:
    """Of a value that is made and read between two exits, too."""
    manifest = divided(chain.manifest)
    stack = manifest.stacks["decoder"]
    stacks = {"decoder": replace(stack, exits=stack.exits[1:])}
    Chain(replace(manifest, stacks=stacks), root).generate({"input_ids": [[1]]}, max_new_tokens=2)
    values = {**manifest.values, "decoder.1": replace(manifest.values["decoder.1"], shape=("batch", 16, "tokens"))}
    with pytest.raises(InputError, match=r"'decoder.1' of shape .* does not have rows and tokens on its first two"):
        Chain(replace(manifest, stacks=stacks, values=values), root).generate({"input_ids": [[1]]})


def test_too_few_blocks_behind_the_keys() -> None:
    program = offramp.capture(Sharing(turned=False, sharing=1), {"input_ids": tiny.ids()})
    with pytest.raises(StructureError, match="1 of 3 attentions read keys of earlier ones"):
        program.require_stacks()
