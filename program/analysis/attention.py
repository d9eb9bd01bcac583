"""Attention sites: where tokens mix, and what of that a query sees."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from offramp.program.graph import aten, expression, shape, sizes_of

SOFTMAX = (aten.softmax.int, aten._softmax.default, aten._safe_softmax.default)


@dataclass(frozen=True)
class Mask:
    """A tensor that decides which keys a query sees, and how it does that.

    ``kind`` is "added" or "subtracted" (a bias on the scores), "keeps" or "drops" (selects among them), or
    "times" (a factor of their exponentials).
    """

    node: fx.Node
    kind: str = "added"

    def visible(self, value: torch.Tensor) -> torch.Tensor:
        """Which keys the mask lets through, bool of the value's shape."""
        if self.kind == "subtracted":
            return value < -HIDDEN
        if self.kind == "added" and value.dtype != torch.bool:
            return value > HIDDEN
        return value == 0 if self.kind == "drops" else value != 0

    def visible_exactly(self, value: torch.Tensor) -> torch.Tensor | None:
        """``visible``, or None where the mask changes scores of keys that it lets through too."""
        found = self.visible(value)
        if self.kind in ("added", "subtracted") and value.dtype != torch.bool and bool(value[found].any()):
            return None
        return found


#: Added to a score, this or less hides the key: models use -inf, the dtype's minimum or -1e4, never a bias so low.
HIDDEN = -1e3


@dataclass(frozen=True)
class AttentionSite:
    """One attention: ``softmax(scale * q k' + mask) v``.

    ``form`` is "sdpa" for the fused operator, "decomposed" for a contraction, then scale, soft-cap, bias or
    mask in any order, then a softmax, then a contraction. ``weights`` is the node of the attention weights
    (the fused operator itself for "sdpa") and ``output`` the node that mixes v. ``masks`` are the nodes added
    to the scores, or that select among them. ``scale`` is 1.0 where it is folded into q or k.
    """

    form: str
    query: fx.Node
    key: fx.Node
    value: fx.Node
    masks: tuple[Mask, ...]
    scale: float
    softcap: float | None
    causal_flag: bool
    weights: fx.Node
    output: fx.Node
    query_axis: int
    key_axis: int

    @property
    def token_sizes(self) -> tuple[Any, Any]:
        """The sizes of the query and the key axis."""
        if self.form == "sdpa":
            return shape(self.query)[-2], shape(self.key)[-2]
        sizes = shape(self.weights)
        return sizes[self.query_axis], sizes[self.key_axis]


def is_causal(site: AttentionSite, values: Mapping[fx.Node, torch.Tensor], whole: bool = True) -> bool:
    """Whether no query of the site sees a later key; ``values`` holds the masks' values on some input.

    ``whole`` if some later token has to see itself, which tells a causal mask from one of padding.
    """
    if site.causal_flag:
        return True
    seen = _seen(site, values)
    # a later token that sees itself tells causal from padded down to the first token
    causal = seen is not None and not bool(seen.triu(1).any())
    return causal and (not whole or (seen is not None and bool(seen.diagonal()[1:].any())))


def together(site: AttentionSite, values: Mapping[fx.Node, torch.Tensor]) -> int | None:
    """How many tokens at the beginning must be there together, since some see later ones of them (a prefix, an image).

    0 for a causal attention; None for an encoder's, where a token sees the last one.
    """
    if is_causal(site, values):
        return 0
    seen = _seen(site, values)
    if seen is None or not bool(seen[-1, -1]) or bool(seen[:-1, -1].any()):
        return None
    return int(seen.triu(1).any(0).nonzero().max()) + 1


def _seen(site: AttentionSite, values: Mapping[fx.Node, torch.Tensor]) -> torch.Tensor | None:
    """Which keys a query sees in some row and head, bool [tokens, tokens]; None where no mask tells."""
    seen: torch.Tensor | None = None
    for mask in site.masks:
        value = values[mask.node]
        if value.dim() >= 2 and value.shape[-2] == value.shape[-1] > 1:
            visible = mask.visible(value).reshape(-1, *value.shape[-2:]).any(0)
            seen = visible if seen is None else seen & visible
    return seen


def padding_mask(site: AttentionSite, batch: Any) -> Mask | None:
    """The mask of a site that tells rows' padding: an axis counts rows, the last one counts keys."""
    for mask in site.masks:
        sizes = sizes_of(mask.node)
        if len(sizes) > 1 and batch in sizes[:-1] and sizes[-1] == expression(site.token_sizes[1]):
            return mask
    return None
