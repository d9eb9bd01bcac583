"""The operators of caches: in any chunks, rows apart, they compute what attention over the whole text computes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch._dynamo.source import ConstantSource
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import ShapeEnv

from offramp.program import ops

FEATURES, VALUES = 4, 3  # of keys, of values


def normal(*sizes: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(sizes, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def plain(query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None, scale: float, window: int) -> Tensor:
    """Causal attention of one row over its whole text: ``[heads, tokens, features]``, bias [heads, tokens, tokens]."""
    groups, tokens = query.shape[0] // key.shape[0], query.shape[1]
    out = torch.empty(*query.shape[:2], value.shape[-1], dtype=query.dtype)
    for head in range(query.shape[0]):
        for here in range(tokens):
            first = max(0, here - window + 1) if window else 0
            seen = list(range(first, here + 1))
            if bias is not None and bias.dtype == torch.bool:
                seen = [at for at in seen if bias[head, here, at]]
            scores = scale * key[head // groups, seen] @ query[head, here]
            if bias is not None and bias.dtype != torch.bool:
                scores = scores + bias[head, here, seen]
            out[head, here] = scores.softmax(-1) @ value[head // groups, seen]
    return out


class Texts:
    """Whole texts of several rows, and how they are cut: ``counts[step][row]`` tokens at a time."""

    def __init__(self, totals: list[int], steps: list[list[int]], groups: int, seed: int = 0) -> None:
        self.totals, self.rows, self.longest = totals, len(totals), max(totals)
        self.counts = self._cut(steps)
        self.widest = max(max(counts) for counts in self.counts)
        self.capacity = self.longest + self.widest
        self.query = normal(self.rows, 2 * groups, self.longest, FEATURES, seed=seed)
        self.key = normal(self.rows, 2, self.longest, FEATURES, seed=seed + 1)
        self.value = normal(self.rows, 2, self.longest, VALUES, seed=seed + 2)

    def _cut(self, steps: list[list[int]]) -> list[list[int]]:
        left, counts = list(self.totals), []
        for step in [*steps, *[[1] * self.rows] * self.longest]:
            here = [min(count, rest) for count, rest in zip(step, left, strict=False)]
            if any(here):
                counts.append(here)
            left = [rest - count for rest, count in zip(left, here, strict=True)]
        return counts

    def caches(self) -> tuple[Tensor, Tensor]:
        """Full of what must not be read."""
        return tuple(
            torch.full((self.rows, 2, self.capacity, size), 1e3, dtype=torch.float64) for size in (FEATURES, VALUES)
        )  # type: ignore[return-value]

    def chunk(self, whole: Tensor, lengths: Tensor, chunk: int, axis: int = 2) -> Tensor:
        """Each row's next tokens, with the last token again where a row has fewer."""
        places = (lengths[:, None] + torch.arange(chunk)).clamp(max=whole.shape[axis] - 1)
        return torch.stack([row.index_select(axis - 1, at) for row, at in zip(whole, places, strict=True)])


def in_chunks(texts: Texts, bias: Tensor | None, scale: float, window: int) -> tuple[Tensor, Tensor, Tensor]:
    lengths = torch.zeros(texts.rows, dtype=torch.int64)
    caches = texts.caches()
    out = torch.zeros(*texts.query.shape[:3], VALUES, dtype=torch.float64)
    for counts in texts.counts:
        chunk = max(counts)
        new = [texts.chunk(whole, lengths, chunk) for whole in (texts.query, texts.key, texts.value)]
        some = None
        if bias is not None:
            wide = torch.cat([bias, bias[..., :1].expand(*bias.shape[:-1], texts.widest)], -1)
            some = texts.chunk(wide.expand(texts.rows, *wide.shape[1:]), lengths, chunk)
        made, *kept = ops.ATTENTION(*new, *caches, lengths, some, scale, window)
        caches = (kept[0], kept[1])
        for row, (start, count) in enumerate(zip(lengths.tolist(), counts, strict=True)):
            out[row, :, start : start + count] = made[row, :, :count]
        lengths = lengths + torch.tensor(counts)
    return out, *caches


def biased(kind: str, texts: Texts, rows: int, heads: int) -> Tensor | None:
    """A bias of all positions; a bool one lets every token see itself."""
    if kind == "none":
        return None
    found = normal(rows, heads, texts.longest, texts.longest, seed=9)
    return found if kind == "float" else (found > 0) | torch.eye(texts.longest, dtype=torch.bool)


cases = st.integers(1, 3).flatmap(
    lambda rows: st.tuples(
        st.lists(st.integers(1, 7), min_size=rows, max_size=rows),
        st.lists(st.lists(st.integers(0, 4), min_size=rows, max_size=rows), max_size=4),
    )
)


@given(
    case=cases,
    groups=st.sampled_from([1, 2, 3]),
    window=st.sampled_from([0, 1, 3]),
    kind=st.sampled_from(["none", "float", "bool"]),
    shared=st.tuples(st.booleans(), st.booleans()),
)
def test_chunks_give_what_the_whole_text_gives(
    case: tuple[list[int], list[list[int]]], groups: int, window: int, kind: str, shared: tuple[bool, bool]
) -> None:
    texts = Texts(*case, groups)
    bias = biased(kind, texts, 1 if shared[0] else texts.rows, 1 if shared[1] else 2 * groups)
    found, keys, values = in_chunks(texts, bias, 0.7, window)
    for row, total in enumerate(texts.totals):
        query, key, value = (whole[row, :, :total] for whole in (texts.query, texts.key, texts.value))
        one = None
        if bias is not None:
            one = bias[0 if shared[0] else row].expand(2 * groups, -1, -1)
        torch.testing.assert_close(found[row, :, :total], plain(query, key, value, one, 0.7, window))
        torch.testing.assert_close(keys[row, :, :total], key, rtol=0, atol=0)
        torch.testing.assert_close(values[row, :, :total], value, rtol=0, atol=0)


@given(
    rows=st.integers(1, 3),
    places=st.integers(1, 3),
    axis=st.sampled_from([1, 2]),
    chunk=st.integers(1, 3),
    data=st.data(),
)
def test_append_writes_behind_each_rows_own_length(rows: int, places: int, axis: int, chunk: int, data: Any) -> None:
    capacity = 6
    lengths = data.draw(st.lists(st.integers(0, capacity - chunk), min_size=rows, max_size=rows))
    sizes = [rows * places, 2, 2]
    sizes[axis] = capacity
    cache, new = normal(*sizes), normal(*[chunk if i == axis else size for i, size in enumerate(sizes)], seed=1)
    found = ops.APPEND(cache, new, torch.tensor(lengths), axis)
    expected = cache.clone()
    for place in range(rows * places):  # rows lie one behind the other, each with its places
        start = lengths[place // places]
        expected[place].movedim(axis - 1, 0)[start : start + chunk] = new[place].movedim(axis - 1, 0)
    torch.testing.assert_close(found, expected, rtol=0, atol=0)


def test_what_was_given_stays_as_it_was() -> None:
    texts = Texts([4, 2], [[4, 2]], 1)
    caches = texts.caches()
    before = [cache.clone() for cache in caches]
    lengths = torch.tensor([0, 0])
    ops.ATTENTION(texts.query, texts.key, texts.value, *caches, lengths, None, 1.0, 0)
    for cache, old in zip(caches, before, strict=True):
        torch.testing.assert_close(cache, old, rtol=0, atol=0)


def arguments(grad: bool = False, bias: str = "float") -> list[Any]:
    """Two rows that have 2 and 0 tokens, two more of each; 4 heads of 2 key heads; capacity 5."""
    tensors = [normal(2, 4, 2, FEATURES), *(normal(2, 2, 2, size, seed=1) for size in (FEATURES, VALUES))]
    tensors += [normal(2, 2, 5, size, seed=2) for size in (FEATURES, VALUES)]
    table = normal(1, 4, 2, 5, seed=3)
    return [
        *(tensor.requires_grad_(grad) for tensor in tensors),
        torch.tensor([2, 0]),
        None if bias == "none" else table.requires_grad_(grad) if bias == "float" else table > -9,
        0.5,
        0,
    ]


def test_gradients_are_those_of_finite_differences() -> None:
    assert torch.autograd.gradcheck(ops.ATTENTION, arguments(grad=True))
    cache, new = normal(4, 5, 2).requires_grad_(), normal(4, 2, 2, seed=1).requires_grad_()
    assert torch.autograd.gradcheck(lambda *given: ops.APPEND(*given, torch.tensor([1, 3]), 1), (cache, new))


def test_gradients_reach_earlier_tokens_through_the_caches() -> None:
    texts = Texts([4], [[2], [2]], 2)
    whole = [t.requires_grad_() for t in (texts.query, texts.key, texts.value)]
    plain(whole[0][0], whole[1][0], whole[2][0], None, 0.5, 0).square().sum().backward()
    expected = [t.grad for t in whole]
    for t in whole:
        t.grad = None
    in_chunks(texts, None, 0.5, 0)[0].square().sum().backward()
    torch.testing.assert_close([t.grad for t in whole], expected)


@pytest.mark.parametrize("fixed", [True, False], ids=["fixed", "symbolic"])
@pytest.mark.parametrize("bias", ["none", "float", "bool"])
def test_shapes_of_fake_tensors(fixed: bool, bias: str) -> None:
    mode, given = FakeTensorMode(shape_env=ShapeEnv()), arguments(bias=bias)
    fake = [
        mode.from_tensor(value, static_shapes=fixed, source=ConstantSource(f"given{at}"))
        if isinstance(value, Tensor)
        else value
        for at, value in enumerate(given)
    ]
    with mode:
        made = ops.ATTENTION(*fake)
    for tensor, real in zip(made, ops.ATTENTION(*given), strict=True):
        assert (tuple(map(int, tensor.shape)), tensor.dtype) == (tuple(real.shape), real.dtype)
        assert fixed == all(isinstance(size, int) for size in tensor.shape)


def test_positions_end_at_the_last_place() -> None:
    found = ops.positions(torch.tensor([0, 3, 4]), 3, 5)
    assert found.tolist() == [[0, 1, 2], [3, 4, 4], [4, 4, 4]]


def test_float32_stays_float32() -> None:
    given = [
        value.float() if isinstance(value, Tensor) and value.is_floating_point() else value for value in arguments()
    ]
    assert [made.dtype for made in ops.ATTENTION(*given)] == [torch.float32] * 3
