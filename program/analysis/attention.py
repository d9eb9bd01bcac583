"""Attention sites: where tokens mix, in either form that a captured graph has."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import fx

from offramp.program.graph import aten, data_inputs, expression, is_tensor, shape

_SDPA = (aten.scaled_dot_product_attention.default,)
SOFTMAX = (aten.softmax.int, aten._softmax.default, aten._safe_softmax.default)
_CONTRACTION = (aten.matmul.default, aten.bmm.default, aten.einsum.default, aten.baddbmm.default)
_GUARDS = (aten.clamp.default, aten.clamp_min.default, aten.add.Tensor)
_DROPPING = (aten.masked_fill.Scalar, aten.masked_fill.Tensor)
_SELECTING = (aten.where.self, aten.where.ScalarOther, aten.where.ScalarSelf, aten.where.Scalar)
_WEIGHTED = (
    aten.linear.default,
    aten.addmm.default,
    aten.mm.default,
    aten.conv1d.default,
    aten.conv2d.default,
)


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


def attention_sites(graph: fx.Graph) -> list[AttentionSite]:
    """Every attention of the graph, in graph order."""
    found = []
    for node in graph.nodes:
        if node.op != "call_function":
            continue
        site = None
        if node.target in _SDPA:
            site = _fused(node)
        elif node.target in SOFTMAX:
            site = _decomposed(node, node.args[0], int(node.args[1]))
        elif node.target is aten.div.Tensor:
            site = _written_out(node)
        if site is not None:
            found.append(site)
    return found


def _fused(node: fx.Node) -> AttentionSite:
    bound = {arg.name: arg.default_value for arg in node.target._schema.arguments}  # type: ignore[union-attr]
    bound |= dict(zip(bound, node.args, strict=False)) | dict(node.kwargs)
    query, key, mask = bound["query"], bound["key"], bound["attn_mask"]
    scale = bound["scale"] if bound["scale"] is not None else float(shape(query)[-1]) ** -0.5
    return AttentionSite(
        "sdpa", query, key, bound["value"], (Mask(mask),) if mask is not None else (), scale, None,
        bool(bound["is_causal"]), node, node, -2, -1,
    )  # fmt: skip


def _written_out(node: fx.Node) -> AttentionSite | None:
    """A softmax written as ``e / sum(e)`` with ``e = exp(x)``, or ``exp(x)`` times a mask."""
    top, bottom = node.args[0], node.args[1]
    while isinstance(bottom, fx.Node) and bottom.target in _GUARDS and bottom.args[0] is not top:
        bottom = bottom.args[0]
    if not isinstance(bottom, fx.Node) or bottom.target is not aten.sum.dim_IntList or bottom.args[0] is not top:
        return None
    assert isinstance(top, fx.Node)
    masks = []
    if top.target is aten.mul.Tensor:
        factors = [arg for arg in top.all_input_nodes if arg.target is not aten.exp.default]
        masks = [Mask(arg, "times") for arg in factors]
        top = next((arg for arg in top.all_input_nodes if arg.target is aten.exp.default), top)
    if top.target is not aten.exp.default:
        return None
    site = _decomposed(node, top.args[0], int(bottom.args[1][0]))  # type: ignore[index,arg-type]
    return replace(site, masks=(*site.masks, *masks)) if site else None


def _decomposed(weights: fx.Node, scores: Any, axis: int) -> AttentionSite | None:
    """Walk up from the scores to the contraction of two activations, and down from the weights to the next."""
    masks: list[Mask] = []
    scale, softcap = 1.0, None
    product = None
    todo, seen = [scores], set()
    while todo:
        node = todo.pop(0)
        if node in seen or node.op != "call_function":
            continue
        seen.add(node)
        inputs = data_inputs(node)
        if node.target in _CONTRACTION and not _reads_weight(node):
            if product is None and node.target is aten.baddbmm.default:
                masks += _masks(node, node.args[1], [node.args[0]])
                scale *= float(node.kwargs.get("alpha", 1.0))
            product = product or node
            continue
        if node.target in _WEIGHTED or node.target in SOFTMAX or node.target in _SDPA:
            continue
        if node.target is aten.tanh.default:
            softcap = _constant_factor(node.args[0])
        scale *= _factor(node)
        if len(inputs) > 1 and product is None:
            carrying = [arg for arg in inputs if _has_contraction(arg)]
            if carrying:
                masks += _masks(node, carrying[0], [arg for arg in inputs if arg not in carrying])
                inputs = carrying
        todo += inputs
    if product is None:
        return None
    output = _consumer(weights)
    if output is None:
        return None
    query, key = _operands(product)[-2:]  # baddbmm has what it adds to before them
    value = next((arg for arg in _operands(output) if not _leads(weights, arg)), output)
    rank = len(shape(weights))
    key_axis = axis % rank
    query_axis = rank - 2 if key_axis == rank - 1 else rank - 1
    return AttentionSite(
        "decomposed",
        query,
        key,
        value,
        tuple(masks),
        scale,
        softcap,
        False,
        weights,
        output,
        query_axis,
        key_axis,
    )


def _masks(node: fx.Node, scores: Any, others: Sequence[Any]) -> list[Mask]:
    """What ``node`` does to the scores with its other arguments; constants of one element do nothing of note."""
    kind = "added"
    if node.target in _DROPPING:
        kind = "drops"
    elif node.target is aten.sub.Tensor and node.args[0] is scores:
        kind = "subtracted"
    elif node.target in _SELECTING:
        kind = "keeps" if node.args[1] is scores else "drops"
        others = [arg for arg in others if arg is node.args[0]]
    return [Mask(arg, kind) for arg in others]


def _reads_weight(node: fx.Node) -> bool:
    return any(arg.op == "get_attr" for arg in _operands(node))


def _operands(node: fx.Node) -> list[fx.Node]:
    found = [arg for arg in node.all_input_nodes if is_tensor(arg)]
    return found if len(found) > 1 else found * 2


def _has_contraction(node: fx.Node, limit: int = 40) -> bool:
    todo, seen = [node], set()
    while todo and limit:
        limit -= 1
        here = todo.pop(0)
        if here in seen:
            continue
        seen.add(here)
        if here.target in _CONTRACTION and not _reads_weight(here):
            return True
        if here.target not in _WEIGHTED and here.target not in SOFTMAX and here.target not in _SDPA:
            todo += data_inputs(here)
    return False


def _factor(node: fx.Node) -> float:
    value = node.args[1] if len(node.args) > 1 else None
    if isinstance(value, (int, float)) and value:
        if node.target is aten.mul.Tensor or node.target is aten.mul.Scalar:
            return float(value)
        if node.target is aten.div.Tensor or node.target is aten.div.Scalar:
            return 1.0 / float(value)
    return 1.0


def _constant_factor(node: fx.Node) -> float | None:
    factor = _factor(node) if isinstance(node, fx.Node) else 1.0
    return 1.0 / factor if factor != 1.0 else None


def _consumer(weights: fx.Node, limit: int = 40) -> fx.Node | None:
    """The contraction that applies the attention weights to the values."""
    todo, seen = list(weights.users), set()
    while todo and limit:
        limit -= 1
        node = todo.pop(0)
        if node in seen or node.op != "call_function" or not is_tensor(node):
            continue
        seen.add(node)
        if node.target in _CONTRACTION and not _reads_weight(node):
            return node
        if node.target not in _WEIGHTED:
            todo += node.users
    return None


def _leads(start: fx.Node, end: fx.Node) -> bool:
    todo, seen = [end], set[fx.Node]()
    while todo:
        node = todo.pop()
        if node is start:
            return True
        if node not in seen and len(seen) < 40:
            seen.add(node)
            todo += data_inputs(node)
    return False


def is_causal(site: AttentionSite, values: Mapping[fx.Node, torch.Tensor], whole: bool = True) -> bool:
    """Whether no query of the site sees a later key; ``values`` holds the masks' values on some input.

    ``whole`` if some later token has to see itself, which tells a causal mask from one of padding.
    """
    if site.causal_flag:
        return True
    seen: torch.Tensor | None = None
    for mask in site.masks:
        value = values[mask.node]
        if value.dim() >= 2 and value.shape[-2] == value.shape[-1] > 1:
            visible = mask.visible(value).reshape(-1, *value.shape[-2:]).any(0)
            seen = visible if seen is None else seen & visible
    # a later token that sees itself tells causal from padded down to the first token
    causal = seen is not None and not bool(seen.triu(1).any())
    return causal and (not whole or (seen is not None and bool(seen.diagonal()[1:].any())))


def padding_mask(site: AttentionSite, batch: Any) -> Mask | None:
    """The mask of a site that tells rows' padding: an axis counts rows, the last one counts keys."""
    for mask in site.masks:
        sizes = [expression(size) for size in shape(mask.node)]
        if len(sizes) > 1 and batch in sizes[:-1] and sizes[-1] == expression(site.token_sizes[1]):
            return mask
    return None
