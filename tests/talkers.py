"""Bundles that generate, of the tiny models in `tiny`, for tests of what the runtime does with them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Literal, TypeAlias

import tiny
from torch import nn

import offramp
from offramp.export import save
from offramp.passes import apply
from offramp.runtime import Chain

Target: TypeAlias = Literal["ort", "portable"]

SCORES = "insert-scores{measure=top1|margin|prediction}"
TALKER = f"insert-cache,insert-exits,{SCORES}"
HALVES = "insert-cache,insert-exits{stack=decoder},insert-exits{stack=more},insert-scores{stack=more}"


def written(root: Path, make: Callable[[], nn.Module], passes: str, target: Target) -> Chain:
    """The bundle of a model with seed 4, whose text varies with the depth, loaded."""
    captured = tiny.captured(make, {"input_ids": tiny.ids()}, seed=4)
    save(apply(captured.program, passes), root, target=target)
    return offramp.load(root)


def talker(root: Path, target: Target = "portable") -> Chain:
    """Four blocks, an exit after each of the first three."""
    return written(root, tiny.Talker, TALKER, target)
