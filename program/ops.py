"""The operators that passes insert; torch runs and differentiates them, ``export`` lowers them."""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

_library = torch.library.Library("offramp", "DEF")
_library.define("append(Tensor cache, Tensor new, Tensor lengths, int axis) -> Tensor")
_library.define(
    "attention(Tensor query, Tensor key, Tensor value, Tensor key_cache, Tensor value_cache, Tensor lengths, "
    "Tensor? bias, float scale, int window, bool causal=True) -> (Tensor, Tensor, Tensor)"
)
_library.define("fill_places(Tensor tokens, Tensor places, Tensor rows, Tensor? kept=None) -> Tensor")
_library.define("take_tokens(Tensor tokens, Tensor places, int axis) -> Tensor")
_library.define("put_tokens(Tensor tokens, Tensor places, Tensor taken, int axis) -> Tensor")
_library.define("first_learners(Tensor hidden, Tensor choice, int learners, int least, str form='dense') -> Tensor")


def positions(lengths: Tensor, chunk: int, capacity: int) -> Tensor:
    """Where a chunk of new tokens lies in each row, int64 [rows, chunk]; not past the last place."""
    return (lengths.unsqueeze(1) + torch.arange(chunk, device=lengths.device)).clamp(max=capacity - 1)


def append(cache: Tensor, new: Tensor, lengths: Tensor, axis: int) -> Tensor:
    """The cache with a chunk of new values written behind what each row has.

    ``cache`` has ``capacity`` places along ``axis``, ``new`` has the chunk's; all else is equal. Rows lie on axis
    0, which may hold several places of each row (its size is a multiple of ``lengths``'s). ``lengths`` is int64
    [rows]: how many places of each row are filled.
    """
    if isinstance(new, FakeTensor):  # the shape is all that is asked for
        return torch.empty_like(cache)
    places = positions(lengths, new.shape[axis], cache.shape[axis])
    places = places.repeat_interleave(new.shape[0] // lengths.shape[0], 0)
    sizes = [1] * new.dim()
    sizes[0], sizes[axis] = new.shape[0], new.shape[axis]
    return cache.scatter(axis, places.reshape(sizes).expand(new.shape), new)


def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    lengths: Tensor,
    bias: Tensor | None,
    scale: float,
    window: int,
    causal: bool = True,
) -> tuple[Tensor, Tensor, Tensor]:
    """Causal attention of a chunk of new tokens over all tokens so far; also returns both caches, appended to.

    Args:
        query: ``[rows, heads, chunk, features]``; token ``i`` of row ``b`` is at position ``lengths[b] + i`` and
            sees the keys up to that position (causal alignment at the bottom right).
        key: ``[rows, key heads, chunk, features]``; each serves ``heads / key heads`` query heads in a row.
        value: as ``key``, perhaps of other features.
        key_cache: ``[rows, key heads, capacity, features]``; places from ``lengths`` on are not read.
        value_cache: the same for values.
        lengths: int64 ``[rows]``, how many tokens each row has already.
        bias: float (added to the scores) or bool (keeps) ``[1 or rows, 1 or heads, chunk, capacity]``.
        scale: factor of the scores.
        window: how many keys, its own included, a token sees; 0 for all before it.
        causal: if not, a token sees later ones of its chunk too, where ``bias`` lets it.
    """
    key_cache = append(key_cache, key, lengths, 2)
    value_cache = append(value_cache, value, lengths, 2)
    if isinstance(query, FakeTensor):  # shapes are all that is asked for
        scores = query.new_empty((*query.shape[:-1], key_cache.shape[2]))
        scores = scores if bias is None else scores + bias
        return query.new_empty((*scores.shape[:-1], value.shape[-1])), key_cache, value_cache
    groups = query.shape[1] // key.shape[1]
    keys, values = key_cache, value_cache
    if groups > 1:
        keys, values = keys.repeat_interleave(groups, 1), values.repeat_interleave(groups, 1)
    scores = torch.matmul(query, keys.transpose(-1, -2)) * scale
    if bias is not None:
        scores = torch.where(bias, scores, -torch.inf) if bias.dtype == torch.bool else scores + bias
    here = positions(lengths, query.shape[2], key_cache.shape[2])[:, None, :, None]
    there = torch.arange(key_cache.shape[2], device=lengths.device)
    unseen = there > (here if causal else here[:, :, -1:])
    if window:
        unseen = unseen | (there <= here - window)
    scores = scores.masked_fill(unseen, -torch.inf)
    # a query whose every key is hidden gets 0, as from torch's fused attention
    weights = torch.softmax(scores, -1) if bias is None else torch.ops.aten._safe_softmax(scores, -1)
    return torch.matmul(weights, values), key_cache, value_cache


def learner_bounds(units: int, learners: int) -> list[int]:
    """Where each learner's hidden units begin, and behind them where the last one's end."""
    return [-(-learner * units // learners) for learner in range(learners + 1)]


def first_learners(hidden: Tensor, choice: Tensor, learners: int, least: int, form: str = "dense") -> Tensor:
    """The hidden units of each token's first ``k`` learners, zeros in the place of the others (ACM, arXiv 2312.10193).

    Unlike the released code, ``k`` gets the gradient of what the learners are for: a learner's units are multiplied
    by the probability that it takes part, straight through.

    Args:
        hidden: ``[..., units]``; unit ``j`` is learner ``j * learners // units``'s (from 0).
        choice: ``[..., learners + 1 - least]``, logits of ``k`` from ``least`` on; the greatest is taken.
        learners: how many there are.
        least: the smallest ``k``.
        form: how it is exported (`offramp.program.learners.FORMS`); what it computes is the same.
    """
    if isinstance(hidden, FakeTensor):  # the shape is all that is asked for
        return hidden.new_empty(hidden.shape)
    soft = choice.softmax(-1)
    hard = torch.nn.functional.one_hot(choice.argmax(-1), choice.shape[-1]).to(soft.dtype)
    chosen = hard + (soft - soft.detach())
    at_least = chosen.flip(-1).cumsum(-1).flip(-1)  # at place i: that k is least + i or more
    units = hidden.shape[-1]
    parts = hidden.split([stop - start for start, stop in pairwise(learner_bounds(units, learners))], -1)
    takes = [at_least[..., max(0, learner - least), None].to(hidden.dtype) for learner in range(1, learners + 1)]
    return torch.cat([part * takes_part for part, takes_part in zip(parts, takes, strict=True)], -1)


def fill_places(tokens: Tensor, places: Tensor, rows: Tensor, kept: Tensor | None = None) -> Tensor:
    """The tokens, others in some places: the ``k``-th place of a row that is marked gets the ``k``-th of its ``rows``.

    That is how the features of an image take the places that a text keeps for them.

    Args:
        tokens: ``[batch, tokens, features]``.
        places: bool ``[batch, tokens]``, in each row as many as there are ``rows``.
        rows: ``[batch, n, features]``.
        kept: bool ``[batch, n]``: the others are no rows (padding of a shorter recording, say); None where all are.

    Raises:
        IndexError: a row has more places, or fewer; ``kept`` is not of the rows.
    """
    if isinstance(tokens, FakeTensor):  # the shape is all that is asked for
        return tokens.new_empty(tokens.shape)
    batch, count = rows.shape[:2]
    if kept is not None and kept.shape != rows.shape[:2]:
        raise IndexError(f"a mask {list(kept.shape)} of rows {list(rows.shape)}")
    at = places.long().cumsum(1)
    wanted = count if kept is None else kept.sum(1, keepdim=True)
    beyond = (at[:, -1:] != wanted) * (batch * count)
    at = torch.where(places, at - 1, 0)
    if kept is not None:
        first = (kept.long() * count - torch.arange(count, device=at.device)).topk(count, 1).indices
        at = first.gather(1, at.clamp(max=count - 1))
    at = at + beyond + count * torch.arange(batch, device=at.device)[:, None]
    return torch.where(places[..., None], rows.flatten(0, 1)[at], tokens)


def take_tokens(tokens: Tensor, places: Tensor, axis: int) -> Tensor:
    """Of each row the tokens at some places.

    Args:
        tokens: ``[rows, ...]`` with tokens along ``axis``; one row stands for all, several may be one row's (heads).
        places: int64 ``[batch, taken]``; one may come repeatedly.
        axis: the axis of tokens, not the first.
    """
    batch, count = places.shape
    if isinstance(tokens, FakeTensor):  # the shape is all that is asked for
        rows = batch if tokens.shape[0] == 1 else tokens.shape[0]
        return tokens.new_empty((rows, *tokens.shape[1:axis], count, *tokens.shape[axis + 1 :]))
    wide = tokens.expand(batch, *tokens.shape[1:]) if tokens.shape[0] == 1 else tokens
    return wide.gather(axis, _spread(places, wide, axis))


def put_tokens(tokens: Tensor, places: Tensor, taken: Tensor, axis: int) -> Tensor:
    """The tokens, with ``taken`` at the places where `take_tokens` had taken them; equal where a place repeats."""
    if isinstance(tokens, FakeTensor):  # the shape is all that is asked for
        return torch.empty_like(tokens)
    return tokens.scatter(axis, _spread(places, taken, axis), taken)


def _spread(places: Tensor, like: Tensor, axis: int) -> Tensor:
    """The places of tokens along ``axis``, as ``gather`` and ``scatter`` have them."""
    places = places.repeat_interleave(like.shape[0] // places.shape[0], 0)
    sizes = [1] * like.dim()
    sizes[0], sizes[axis] = places.shape
    return places.reshape(sizes).expand(*like.shape[:axis], places.shape[1], *like.shape[axis + 1 :])


_library.impl("append", append, "CompositeImplicitAutograd")
_library.impl("attention", attention, "CompositeImplicitAutograd")
_library.impl("fill_places", fill_places, "CompositeImplicitAutograd")
_library.impl("take_tokens", take_tokens, "CompositeImplicitAutograd")
_library.impl("put_tokens", put_tokens, "CompositeImplicitAutograd")
_library.impl("first_learners", first_learners, "CompositeImplicitAutograd")

APPEND = torch.ops.offramp.append.default
ATTENTION = torch.ops.offramp.attention.default
FILL_PLACES = torch.ops.offramp.fill_places.default
FIRST_LEARNERS = torch.ops.offramp.first_learners.default
TAKE_TOKENS = torch.ops.offramp.take_tokens.default
PUT_TOKENS = torch.ops.offramp.put_tokens.default
