"""Writing scores into a graph: reductions to one number per row, or per token of a causal stack."""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import fx

from offramp.bundle.measures import Measure
from offramp.passes.groups.bounds import group_bounds
from offramp.passes.infra.editor import Editor
from offramp.program.analysis.attention import HIDDEN, AttentionSite, Mask, padding_mask, together
from offramp.program.analysis.attention_search import attention_sites
from offramp.program.graph import aten, expression, shape, sizes_of, symbols
from offramp.program.groups import Groups, token_axis
from offramp.program.program import Program, evaluate


class ScoreBuilder:
    """Writes scores into a graph, at its end; ``here`` is the node after which the next one goes.

    ``tokens`` is the symbol of the token axis whose tokens have a score each; None where rows have.
    """

    def __init__(self, editor: Editor, program: Program, tokens: Any) -> None:
        self.editor, self.program, self.tokens = editor, program, tokens
        self.here = editor.graph.output_node().prev

    def call(self, target: Any, *args: Any, **kwargs: Any) -> fx.Node:
        """A new call, after the one before."""
        self.here = self.editor.call(target, *args, at=self.here, **kwargs)
        return self.here

    def new_call(self, target: Any, *args: Any) -> fx.Node:
        """`call` with nodes of the given graph."""
        return self.call(target, *fx.node.map_arg(args, lambda arg: self.editor[arg.name]))

    def by_rows(self, node: fx.Node) -> fx.Node:
        """The node in float32, with an axis that counts rows only (a row may take several places of one)."""
        if node.meta["val"].is_floating_point() and node.meta["val"].dtype != torch.float32:
            node = self.call(aten._to_copy.default, node, dtype=torch.float32)
        found = self.program.axes.batch_axis(node)
        return node if found is None or found[1] == 1 else self.call(aten.unflatten.int, node, found[0], [-1, found[1]])

    def batch_axis(self, node: fx.Node) -> int | None:
        """The axis of rows."""
        found = self.program.axes.batch_axis(node)
        return found[0] if found else None

    def per_row(self, node: fx.Node, reduce: Callable[..., Any]) -> fx.Node:
        """Reduce all axes but the batch's (and a causal stack's tokens'); without one, to a single row."""
        axis, tokens = self.batch_axis(node), self.token_axis(node)
        others = [i for i in range(len(shape(node))) if i not in (axis, tokens)]
        reduced = self.call(reduce, node, others) if others else node
        if axis is None:
            return self.call(aten.reshape.default, reduced, [1] if tokens is None else [1, -1])
        return reduced if tokens is None or axis < tokens else self.call(aten.transpose.int, reduced, 0, 1)

    def token_axis(self, node: fx.Node) -> int | None:
        """The axis of tokens that have a score each; logits may be of the text alone, without what stands before it."""
        wanted: set[Any] = getattr(self.tokens, "free_symbols", set())
        return next((axis for axis, size in enumerate(shape(node)) if symbols(size) & wanted), None)

    def padding(self, name: str) -> fx.Node | None:
        """Which tokens of each row are real, ``bool[batch, tokens]``, from the first block's attention mask.

        None where nothing tells: no mask, or one that says who sees later tokens.
        """
        stack = self.program.stacks[name]
        inside = {node.name for node in self.program.block_nodes(stack, 0)}
        for site in attention_sites(self.program.graph):
            mask = padding_mask(site, self.program.axes.batch) if site.weights.name in inside else None
            if mask is not None and not (self.tokens is not None and self._prefixed(site)):
                node = self.visible(mask)
                rows = next(i for i, s in enumerate(shape(node)) if expression(s) == self.program.axes.batch)
                others = [i for i in range(len(shape(node)) - 1) if i != rows]
                return self.call(aten.any.dims, node, others) if others else node
        return None

    def _prefixed(self, site: AttentionSite) -> bool:
        """Whether some tokens of a causal attention see later ones, so that its mask is not one of padding."""
        masks = [mask.node for mask in site.masks]
        module, example = self.program.graph_module, self.program.example_inputs
        return bool(together(site, evaluate(module, masks, example)))

    def visible(self, mask: Mask) -> fx.Node:
        """Which keys a mask lets through, as ``Mask.visible`` computes it."""
        node = self.editor[mask.node.name]
        if mask.kind == "subtracted":
            return self.call(aten.lt.Scalar, node, -HIDDEN)
        if mask.kind == "added" and node.meta["val"].dtype != torch.bool:
            return self.call(aten.gt.Scalar, node, HIDDEN)
        return self.call(aten.eq.Scalar if mask.kind == "drops" else aten.ne.Scalar, node, 0)

    def spread(self, valid: fx.Node | None, like: fx.Node) -> fx.Node | None:
        """``valid`` with axes that broadcast over ``like``; None where ``like`` has no such token axis."""
        if valid is None:
            return None
        sizes = sizes_of(like)
        rows, tokens = sizes_of(valid)
        if sizes.count(rows) != 1 or sizes.count(tokens) != 1:
            return None
        a, t = sizes.index(rows), sizes.index(tokens)
        node = valid if a < t else self.call(aten.transpose.int, valid, 0, 1)
        for axis in range(len(sizes)):
            if axis not in (a, t):
                node = self.call(aten.unsqueeze.default, node, axis)
        return node

    def of_logits(self, logits: fx.Node, measure: Measure, valid: fx.Node | None) -> fx.Node:
        """A measure of logits whose last axis counts classes."""
        if not measure.gates:
            return self._best(logits)
        places = {"top1": self._top1, "margin": self._margin, "entropy": self._entropy}[measure.computes](logits)
        if len(shape(places)) == 1 and self.batch_axis(places) is not None:
            return places
        real = self.spread(valid, places)
        sure, least_sure = (0.0, aten.amax.default) if measure.surer == "less" else (1.0, aten.amin.default)
        if real is not None:
            places = self.call(aten.where.ScalarOther, real, places, sure)
        return self.per_row(places, least_sure)

    def _best(self, logits: fx.Node) -> fx.Node:
        """The index of the greatest logit, [batch], or [batch, tokens]."""
        best = self.call(aten.argmax.default, logits, -1)
        if len(shape(best)) > 1 and self.token_axis(best) is None:  # of the last token, whose axis was kept
            return self.per_row(best, aten.amax.default)
        turned = self.tokens is not None and self.batch_axis(best) == 1
        return self.call(aten.transpose.int, best, 0, 1) if turned else best

    def _top1(self, logits: fx.Node) -> fx.Node:
        return self.call(aten.amax.default, self.call(aten.softmax.int, logits, -1, torch.float32), [-1])

    def _margin(self, logits: fx.Node) -> fx.Node:
        chances = self.call(aten.softmax.int, logits, -1, torch.float32)
        best = self.call(operator.getitem, self.call(aten.topk.default, chances, 2), 0)
        first, second = (self.call(aten.select.int, best, -1, place) for place in (0, 1))
        return self.call(aten.sub.Tensor, first, second)

    def _entropy(self, logits: fx.Node) -> fx.Node:
        logs = self.call(aten.log_softmax.int, logits, -1, torch.float32)
        products = self.call(aten.mul.Tensor, self.call(aten.exp.default, logs), logs)
        return self.call(aten.neg.default, self.call(aten.sum.dim_IntList, products, [-1]))

    def cosine(self, before: fx.Node, after: fx.Node, valid: fx.Node | None, groups: Groups | None = None) -> fx.Node:
        """Similarity of two states, all values of a row (of one of its tokens, of a group of them) as one vector."""
        before, after = self.by_rows(before), self.by_rows(after)
        real = self.spread(valid, after)
        bounds = group_bounds(self.program, groups.groups, self.new_call) if groups else []

        def dot(a: fx.Node, b: fx.Node) -> fx.Node:
            product = self.call(aten.mul.Tensor, a, b)
            if real is not None:
                product = self.call(aten.where.ScalarOther, real, product, 0.0)
            if groups is None:
                return self.per_row(product, aten.sum.dim_IntList)
            return self._by_group(product, groups, bounds)

        lengths = self.call(aten.sqrt.default, self.call(aten.mul.Tensor, dot(before, before), dot(after, after)))
        found = self.call(aten.div.Tensor, dot(before, after), self.call(aten.clamp_min.default, lengths, 1e-12))
        if real is None or groups is None:
            return found
        nobody = self.call(aten.eq.Scalar, lengths, 0)  # what is padding alone leaves at once
        return self.call(aten.masked_fill.Scalar, found, nobody, 1.0)

    def _by_group(self, product: fx.Node, groups: Groups, bounds: Sequence[tuple[Any, Any]]) -> fx.Node:
        """Sums of a product of states, [batch, groups]; of tokens that leave alone there is one for each."""
        axis = token_axis(self.program, self.program.stacks[groups.stack].input)
        sums: list[fx.Node] = []
        for group, (start, end) in zip(groups.groups, bounds, strict=True):
            part = self.call(aten.slice.Tensor, product, axis, start, end)
            if group.alone:
                part = self.call(aten.sum.dim_IntList, part, [-1])
                sums.append(part if axis == 1 else self.call(aten.transpose.int, part, 0, 1))
            else:
                sums.append(self.call(aten.unsqueeze.default, self.per_row(part, aten.sum.dim_IntList), 1))
        return self.call(aten.cat.default, sums, 1) if len(sums) > 1 else sums[0]

    def learned(self, hidden: fx.Node, valid: fx.Node | None, prefix: str) -> fx.Node:
        """A gate on the state's mean over tokens, with new weights named ``prefix`` + weight and bias."""
        features = int(shape(hidden)[-1])
        weight = self.editor.parameter(f"{prefix}.weight", torch.zeros(features), hidden)
        bias = self.editor.parameter(f"{prefix}.bias", torch.zeros(()), hidden)
        hidden = self.by_rows(hidden)
        axis = self.batch_axis(hidden)
        places = self.call(aten.sum.dim_IntList, self.call(aten.mul.Tensor, hidden, weight), [-1])
        real = self.spread(valid, places)
        if self.token_axis(places) is not None:
            pooled = places if axis == 0 else self.call(aten.transpose.int, places, 0, 1)
        elif real is None:
            others = [i for i in range(len(shape(places))) if i != axis]
            pooled = self.call(aten.mean.dim, places, others) if others else places
        else:
            total = self.per_row(self.call(aten.where.ScalarOther, real, places, 0.0), aten.sum.dim_IntList)
            count = self.per_row(self.call(aten._to_copy.default, real, dtype=torch.float32), aten.sum.dim_IntList)
            pooled = self.call(aten.div.Tensor, total, self.call(aten.clamp_min.default, count, 1.0))
        logit = self.call(aten.add.Tensor, pooled, bias)
        if axis is None:
            logit = self.call(aten.reshape.default, logit, [1])
        return self.call(aten.sigmoid.default, logit)
