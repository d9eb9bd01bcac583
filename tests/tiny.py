"""Models in a few lines each, whose every block changes the output.

Two rows of 7 tokens (12 of a second sequence), 11 words, width 16, 2 heads of 8, 4 blocks, 3 classes. The last two
tokens of the second row are padding. The same weights every time.
"""

# mypy: disable-error-code="no-any-return"
from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar

import shared
import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F

from offramp.program import Program, capture

ROWS, TOKENS, SOURCES, WORDS, WIDTH, HEADS, BLOCKS, CLASSES = 2, 7, 12, 11, 16, 2, 4, 3

Inputs = dict[str, Tensor]
Module = TypeVar("Module", bound=nn.Module)


def seeded(make: Callable[[], Module], seed: int = 0) -> Module:
    """The module with the same weights every time, norms off their neutral values."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        module = make().eval()
        for weight in module.parameters():
            if weight.ndim < 2:
                weight.data += torch.randn_like(weight) / 4
    return module


def ids(tokens: int = TOKENS, rows: int = ROWS, seed: int = 1) -> Tensor:
    return torch.randint(WORDS, (rows, tokens), generator=torch.Generator().manual_seed(seed))


def padding(tokens: int = TOKENS, rows: int = ROWS) -> Tensor:
    """Ones, but for the last two tokens of the last row."""
    mask = torch.ones(rows, tokens, dtype=torch.int64)
    mask[-1, -2:] = 0
    return mask


def text(tokens: int = TOKENS, rows: int = ROWS) -> Inputs:
    return {"input_ids": ids(tokens, rows), "attention_mask": padding(tokens, rows)}


def signal() -> Tensor:
    return torch.randn(TOKENS, ROWS, WIDTH, generator=torch.Generator().manual_seed(3))


def two_texts() -> Inputs:
    return {"source_ids": ids(SOURCES, seed=2), "source_mask": padding(SOURCES), "input_ids": ids()}


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q, self.kv, self.out = (
            nn.Linear(WIDTH, WIDTH),
            nn.Linear(WIDTH, 2 * WIDTH),
            nn.Linear(WIDTH, WIDTH),
        )

    def forward(self, x: Tensor, memory: Tensor, mask: Tensor | None, causal: bool = False) -> Tensor:
        q = self.q(x).unflatten(-1, (HEADS, -1)).transpose(1, 2)
        k, v = self.kv(memory).unflatten(-1, (2, HEADS, -1)).permute(2, 0, 3, 1, 4).unbind()
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=causal)
        return self.out(y.transpose(1, 2).flatten(2))


class Block(nn.Module):
    """``norm`` says where the norms lie: pre, post, sandwich, or parallel (attention beside the MLP)."""

    def __init__(self, norm: str = "pre", causal: bool = False, cross: bool = False) -> None:
        super().__init__()
        self.norm, self.causal, self.attention = norm, causal, Attention()
        self.mlp = nn.Sequential(nn.Linear(WIDTH, 24), nn.GELU(), nn.Linear(24, WIDTH))
        self.norms = nn.ModuleList(nn.LayerNorm(WIDTH) for _ in range({"parallel": 1, "sandwich": 4}.get(norm, 2)))
        self.cross = Attention() if cross else None
        self.cross_norm = nn.LayerNorm(WIDTH) if cross else None

    def attend(self, x: Tensor, mask: Tensor | None) -> Tensor:
        return self.attention(x, x, mask, self.causal)

    def forward(
        self, x: Tensor, mask: Tensor | None, memory: Tensor | None = None, reach: Tensor | None = None
    ) -> Tensor:
        norms = self.norms
        if self.norm == "parallel":
            y = norms[0](x)
            return x + self.attend(y, mask) + self.mlp(y)
        if self.norm == "sandwich":
            x = x + norms[1](self.attend(norms[0](x), mask))
            return x + norms[3](self.mlp(norms[2](x)))
        if self.norm == "post":
            x = norms[0](x + self.attend(x, mask))
            return norms[1](x + self.mlp(x))
        x = x + self.attend(norms[0](x), mask)
        if self.cross is not None and self.cross_norm is not None and memory is not None:
            x = x + self.cross(self.cross_norm(x), memory, reach)
        return x + self.mlp(norms[1](x))


class Encoder(nn.Module):
    """Words and places, perhaps a norm, blocks, perhaps a norm, a class of every row or of every token."""

    blocks: Any  # an nn.ModuleList of Block

    def __init__(
        self, norm: str = "pre", *, enter: bool = False, leave: bool = True, pooled: bool = True, **block: bool
    ) -> None:
        super().__init__()
        self.words, self.places = nn.Embedding(WORDS, WIDTH), nn.Embedding(64, WIDTH)
        self.enter = nn.LayerNorm(WIDTH) if enter else nn.Identity()
        self.leave = nn.LayerNorm(WIDTH) if leave else nn.Identity()
        self.blocks = nn.ModuleList(Block(norm, **block) for _ in range(BLOCKS))
        self.head, self.pooled = nn.Linear(WIDTH, CLASSES), pooled

    def embed(self, input_ids: Tensor) -> Tensor:
        return self.enter(self.words(input_ids) + self.places(torch.arange(input_ids.shape[1])))

    def run(self, x: Tensor, mask: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x, mask)
        return x

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> dict[str, Tensor]:
        x = self.leave(self.run(self.embed(input_ids), attention_mask.bool()[:, None, None]))
        if self.pooled:
            x = (x * attention_mask[..., None]).sum(1) / attention_mask.sum(1, keepdim=True)
        return {"logits": self.head(x)}


class Decoder(Encoder):
    """Causal by the flag of the fused operator; the head is the table of words."""

    def __init__(self) -> None:
        super().__init__(causal=True, pooled=False)
        self.head = nn.Linear(WIDTH, WORDS, bias=False)
        self.head.weight = self.words.weight

    def forward(self, input_ids: Tensor) -> Tensor:  # type: ignore[override]
        x = self.embed(input_ids)
        for block in self.blocks:
            x = block(x, None)
        return self.head(self.leave(x))


class Talker(Decoder):
    """Room for 150 tokens, and a head of its own: with seed 4 what it writes varies, and with the depth."""

    def __init__(self) -> None:
        super().__init__()
        self.places, self.head = nn.Embedding(150, WIDTH), nn.Linear(WIDTH, WORDS)


class Short(Decoder):
    """Room for 16 tokens, and a head of its own."""

    ROOM = 16

    def __init__(self) -> None:
        super().__init__()
        self.places, self.head = nn.Embedding(self.ROOM, WIDTH), nn.Linear(WIDTH, WORDS)


class Halves(Talker):
    """Two causal stacks, of 3 blocks and of 2, with a layer between them."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = self.blocks[:3]
        self.bridge = nn.Linear(WIDTH, WIDTH)
        self.more = nn.ModuleList(Block("parallel", causal=True) for _ in range(2))

    def forward(self, input_ids: Tensor) -> Tensor:  # type: ignore[override]
        x = self.embed(input_ids)
        for block in self.blocks:
            x = block(x, None)
        x = self.bridge(x)
        for block in self.more:
            x = block(x, None)
        return self.head(self.leave(x))


class Joined(Halves):
    """Two causal stacks of 3 blocks back to back: what the first gives is what the second takes."""

    def __init__(self) -> None:
        super().__init__()
        self.bridge = nn.Identity()  # type: ignore[assignment]
        self.more.append(Block("parallel", causal=True))


class TwoStacks(nn.Module):
    """An encoder of 4 blocks, and a causal decoder of 3 that attends to its output."""

    def __init__(self, target_first: bool = False) -> None:
        super().__init__()
        self.encoder, self.decoder = Encoder(), Encoder(causal=True, cross=True)
        self.decoder.blocks = self.decoder.blocks[:3]
        self.target_first = target_first

    def forward(self, source_ids: Tensor, source_mask: Tensor, input_ids: Tensor) -> Tensor:
        x = self.decoder.embed(input_ids) if self.target_first else None
        reach = source_mask.bool()[:, None, None]
        memory = self.encoder.leave(self.encoder.run(self.encoder.embed(source_ids), reach))
        x = x if x is not None else self.decoder.embed(input_ids)
        for block in self.decoder.blocks:
            x = block(x, None, memory, reach)
        return self.decoder.head(self.decoder.leave(x))


class TimeFirst(nn.Module):
    """``[time, rows, features]`` throughout, attention by ``bmm`` over rows and heads together."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks: Any = nn.ModuleList(Block("post") for _ in range(3))
        self.head = nn.Linear(WIDTH, CLASSES)

    def attend(self, attention: Attention, x: Tensor) -> Tensor:
        time, rows, _ = x.shape
        q = attention.q(x) * (WIDTH // HEADS) ** -0.5
        k, v = attention.kv(x).chunk(2, -1)
        q, k, v = (y.reshape(time, rows * HEADS, -1).transpose(0, 1) for y in (q, k, v))
        y = torch.bmm(torch.bmm(q, k.transpose(1, 2)).softmax(-1), v)
        return attention.out(y.transpose(0, 1).reshape(time, rows, WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block.norms[0](x + self.attend(block.attention, x))
            x = block.norms[1](x + block.mlp(x))
        return self.head(x.mean(0))


class Mixing(Encoder):
    """The mean over the rows of a batch is taken from every row."""

    def embed(self, input_ids: Tensor) -> Tensor:
        x = super().embed(input_ids)
        return x - x.mean(0, keepdim=True)


def cut(model: nn.Module, blocks: int, path: str = "blocks") -> nn.Module:
    """A copy of the model whose list of blocks at ``path`` ends after so many."""
    owner, _, leaf = path.rpartition(".")
    short = copy.deepcopy(model)
    holder = short.get_submodule(owner)
    setattr(holder, leaf, getattr(holder, leaf)[:blocks])
    return short


@dataclass(frozen=True, repr=False)
class Captured:
    """A model, the inputs that it was captured with, and the program."""

    model: nn.Module
    inputs: Inputs
    program: Program

    @property
    def stack(self) -> str:
        """The name of the only stack."""
        (name,) = self.program.stacks
        return name

    def eager(self, inputs: Mapping[str, Tensor] | None = None) -> dict[str, Tensor]:
        return outputs(self.model, self.inputs if inputs is None else inputs)

    def truncated(
        self, blocks: int, path: str = "blocks", inputs: Mapping[str, Tensor] | None = None
    ) -> dict[str, Tensor]:
        """What the model gives with fewer blocks."""
        return outputs(cut(self.model, blocks, path), self.inputs if inputs is None else inputs)


def captured(make: Callable[[], nn.Module], inputs: Inputs, *, seed: int = 0, **options: Any) -> Captured:
    """Captured once for each class, or ``partial`` of one, with the same inputs, seed and options.

    ``dynamic={}`` fixes all sizes, which takes a third of the time.
    """

    def fresh() -> Captured:
        model = seeded(make, seed)
        return Captured(model, inputs, shared.lent(capture(model, inputs, **options)))

    whose, given = (make.func, (make.args, tuple(make.keywords.items()))) if isinstance(make, partial) else (make, ())
    if not isinstance(whose, type) or "<locals>" in whose.__qualname__:
        return fresh()
    which = whose.__module__.rpartition(".")[2], whose.__qualname__  # a file that tests import is there twice
    values = tuple((name, str(value.dtype), repr(value.tolist())) for name, value in inputs.items())
    found: Captured = shared.once((which, given, values, seed, repr(options)), fresh)
    return found


def outputs(model: nn.Module, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """What a model or a program's module returns, by name."""
    with torch.no_grad():
        found = model(**inputs)
    return {"output": found} if isinstance(found, Tensor) else dict(found)


def assert_same(
    found: Mapping[str, Tensor], expected: Mapping[str, Tensor], rtol: float = 1e-5, atol: float = 2e-6
) -> None:
    """The tensors of ``expected`` are in ``found``, to float32 rounding."""
    torch.testing.assert_close({name: found[name] for name in expected}, dict(expected), rtol=rtol, atol=atol)


def added(before: Program, after: Program) -> list[fx.Node]:
    """The nodes of ``after`` that ``before`` has not."""
    return [node for name, node in after.nodes.items() if name not in before.nodes]


def assert_provenance(before: Program, after: Program, text: str) -> None:
    """Every new node tells the pass that made it, and a node that was there for which it was made."""
    new = added(before, after)
    assert new
    for node in new:
        assert node.meta["provenance"]["pass"] == text, node.name
        assert node.meta["provenance"]["from"] in after.nodes, node.name


def operators(program: Program) -> list[str]:
    """The operators of the graph in order, ``linear.default`` and so on."""
    calls = [node for node in program.graph.nodes if node.op == "call_function"]
    return [str(node.target).removeprefix("aten.") for node in calls]
