"""Finding attention in a captured graph: the fused operator, or two contractions with a softmax between them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from torch import fx

from offramp.program.analysis.attention import SOFTMAX, AttentionSite, Mask
from offramp.program.graph import aten, data_inputs, is_tensor, shape

_SDPA = (aten.scaled_dot_product_attention.default,)
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
