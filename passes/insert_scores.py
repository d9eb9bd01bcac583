"""``insert-scores``: numbers per row that tell how sure an exit is."""

from __future__ import annotations

import operator
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal

import torch
from torch import fx

from offramp.passes.infra.base import Pass, PassResult, blocks_named, stack_named
from offramp.passes.infra.editor import Editor
from offramp.program.attention import HIDDEN, Mask, attention_sites, padding_mask
from offramp.program.graph import aten, expression, results, shape
from offramp.program.program import Exit, Program
from offramp.runtime.errors import SpecError

OF_LOGITS = ("top1", "margin", "entropy", "prediction")
OF_STATE = ("cosine", "learned")


@dataclass(frozen=True, repr=False)
class InsertScores(Pass):
    """Scores at exits, float32 (``prediction``: int64): [batch], and [batch, tokens] in a causal stack.

    ``state -> tail' -> logits'``  becomes  ``state -> tail' -> logits' -> top1``

    Options: ``stack``; ``after``, counts of blocks that have an exit, or "all"; ``output``, the model's output
    that holds logits (may be left out where one is named so, or there is one); ``measure``, any of

    - top1, margin: the greatest probability, and its distance to the second (CALM, arXiv 2207.07061, sec. 3.1)
    - entropy: of the probabilities, in nats (DeeBERT, arXiv 2004.12993); low is sure
    - prediction: the index of the greatest logit, which PABEE's patience compares (arXiv 2006.04152)
    - cosine: similarity of the last block's input and output, all its values as one vector (MuE, arXiv
      2211.11152, sec. 3.2), but per row, and without padding
    - learned: ``sigmoid(w h + b)`` of the hidden state's mean over tokens; trained later, starts at 0.5

    The first four need the exit's tail to run, the last two only the block. Where logits have more axes than
    rows and classes, the least sure place that is not padding decides; in a causal stack each token has a score of
    its own, since each may leave at another exit.

    Requires: exits; for the first four, a stack whose tail ends in logits.
    Ensures: full depth gets the scores of logits too.
    Invalidates: nothing.
    """

    name: ClassVar[str] = "insert-scores"
    stack: str | None = None
    measure: tuple[str, ...] | str = "top1"
    after: tuple[int, ...] | int | Literal["all"] = "all"
    output: str | None = None

    @property
    def measures(self) -> tuple[str, ...]:
        """The measures as a tuple."""
        return (self.measure,) if isinstance(self.measure, str) else tuple(self.measure)

    def requires(self, program: Program) -> None:
        """The measures are known, the exits exist, and there are logits where a measure needs them."""
        stack = stack_named(program, self.stack)
        wrong = [name for name in self.measures if name not in OF_LOGITS + OF_STATE]
        if wrong or not self.measures:
            raise SpecError(f"measure={'|'.join(map(str, wrong))}: there are {', '.join(OF_LOGITS + OF_STATE)}")
        have = {item.after for item in program.exits_of(stack)}
        if not have or (self.after != "all" and not set(blocks_named(program, stack, self.after)) <= have):
            raise SpecError(
                f"stack {stack!r} has exits after {sorted(have) or 'no block'}",
                hint=f"insert-exits{{stack={stack}}} first",
            )
        if set(self.measures) & set(OF_LOGITS):
            if following := program.next_stack(stack):
                raise SpecError(
                    f"measure={'|'.join(self.measures)}: stack {stack!r} ends in stack {following!r}, not in logits",
                    hint="measure=cosine or learned",
                )
            self._logits(program)
        if set(self.measures) & set(OF_STATE):
            hidden = program.nodes[program.stacks[stack].input]
            try:
                program.axes.batch_axis(hidden)
            except ValueError as error:
                raise SpecError(
                    f"measure={'|'.join(self.measures)}: batch and tokens share an axis of the hidden state ({error})",
                    hint="measure=top1, margin or entropy",
                ) from error

    def _logits(self, program: Program) -> str:
        returned = results(program.graph)
        stack = stack_named(program, self.stack)
        made = {name for item in program.exits_of(stack) for name in item.outputs}
        usable = [name for name in program.outputs if name in made and returned[name].meta["val"].is_floating_point()]
        name = self.output or ("logits" if "logits" in usable else usable[0] if len(usable) == 1 else None)
        if name not in usable:
            raise SpecError(
                f"which output holds logits? The program has {usable} behind stack {stack!r}"
                + (f", not {self.output!r}" if self.output else ""),
                hint=f"output={usable[0]}" if usable else "measure=cosine or learned",
            )
        node = returned[name]
        classes = shape(node)[-1]
        if len(shape(node)) < 2 or not isinstance(classes, int) or classes < 2:
            raise SpecError(f"output {name!r} of shape {shape(node)} has no classes on its last axis")
        axes = len(shape(node)) - (self._tokens(program) is not None)
        if "prediction" in self.measures and (axes > 2 or program.axes.batch is None):
            raise SpecError(f"measure=prediction: output {name!r} of shape {shape(node)} has many per row")
        return name

    def _tokens(self, program: Program) -> Any:
        """The symbol of the token axis of a causal stack, each of whose tokens has a score; None for others."""
        stack = program.stacks[stack_named(program, self.stack)]
        if stack.role != "decoder" or program.axes.batch is None:
            return None
        sizes = [expression(size) for size in shape(program.nodes[stack.input])]
        return next((size for size in sizes if size in program.axes.tokens), None)

    def run(self, program: Program) -> PassResult:
        """Insert the scores that are not there yet."""
        name = stack_named(program, self.stack)
        stack = program.stacks[name]
        editor = Editor(program, repr(self))
        exits = list(program.exits)
        if set(self.measures) & set(OF_LOGITS) and not any(e.after == stack.blocks for e in program.exits_of(name)):
            outputs = {output: output for item in program.exits_of(name) for output in item.outputs}
            exits.append(Exit(name, stack.blocks, stack.output, stack.output, outputs=outputs))
        notes = []
        for at, item in enumerate(exits):
            full = item.after == stack.blocks
            if item.stack != name or (
                self.after != "all" and not full and item.after not in blocks_named(program, name, self.after)
            ):
                continue
            scores = dict(item.scores)
            for measure in self.measures:
                if measure in scores:
                    notes.append(f"the exit after block {item.after} has {measure} already")
                elif not (full and measure in OF_STATE):
                    node = self._score(editor, program, item, measure)
                    scores[measure] = f"{name}.{item.after}/{measure}"
                    editor.returns({scores[measure]: node})
            exits[at] = replace(item, scores=scores)
        return editor.finish(tuple(notes), exits=tuple(exits))

    def _score(self, editor: Editor, program: Program, item: Exit, measure: str) -> fx.Node:
        stack = program.stacks[item.stack]
        builder = _Builder(editor, program, self._tokens(program))
        if measure in OF_LOGITS:
            logits = results(editor.graph)[item.outputs[self._logits(program)]]
            return builder.of_logits(logits, measure, builder.padding(stack.name))
        hidden = editor[item.hidden]
        valid = builder.padding(stack.name)
        if measure == "cosine":
            return builder.cosine(editor[stack.cuts[item.after - 1]], hidden, valid)
        return builder.learned(hidden, valid, f"exits.{item.stack}.{item.after}.gate")


class _Builder:
    """Writes scores into the graph; ``here`` is the node after which the next one goes."""

    def __init__(self, editor: Editor, program: Program, tokens: Any) -> None:
        self.editor, self.program, self.tokens = editor, program, tokens
        self.here = editor.graph.output_node().prev

    def call(self, target: Any, *args: Any, **kwargs: Any) -> fx.Node:
        self.here = self.editor.call(target, *args, at=self.here, **kwargs)
        return self.here

    def by_rows(self, node: fx.Node) -> fx.Node:
        """The node in float32, with an axis that counts rows only (a row may take several places of one)."""
        if node.meta["val"].is_floating_point() and node.meta["val"].dtype != torch.float32:
            node = self.call(aten._to_copy.default, node, dtype=torch.float32)
        found = self.program.axes.batch_axis(node)
        return node if found is None or found[1] == 1 else self.call(aten.unflatten.int, node, found[0], [-1, found[1]])

    def batch_axis(self, node: fx.Node) -> int | None:
        found = self.program.axes.batch_axis(node)
        return found[0] if found else None

    def per_row(self, node: fx.Node, reduce: Callable[..., Any]) -> fx.Node:
        """Reduce all axes but the batch's (and a causal stack's tokens'); without one, to a single row."""
        axis, tokens = self.batch_axis(node), self.token_axis(node)
        others = [i for i in range(len(shape(node))) if i not in (axis, tokens)]
        reduced = self.call(reduce, node, others) if others else node
        if axis is None:
            return self.call(aten.reshape.default, reduced, [1])
        return reduced if tokens is None or axis < tokens else self.call(aten.transpose.int, reduced, 0, 1)

    def token_axis(self, node: fx.Node) -> int | None:
        sizes = [expression(size) for size in shape(node)]
        return sizes.index(self.tokens) if self.tokens in sizes else None

    def padding(self, name: str) -> fx.Node | None:
        """Which tokens of each row are real, ``bool[batch, tokens]``, from the first block's attention mask."""
        stack = self.program.stacks[name]
        inside = {node.name for node in self.program.block_nodes(stack, 0)}
        for site in attention_sites(self.program.graph):
            mask = padding_mask(site, self.program.axes.batch) if site.weights.name in inside else None
            if mask is not None:
                node = self.visible(mask)
                rows = next(i for i, s in enumerate(shape(node)) if expression(s) == self.program.axes.batch)
                others = [i for i in range(len(shape(node)) - 1) if i != rows]
                return self.call(aten.any.dims, node, others) if others else node
        return None

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
        sizes = [expression(s) for s in shape(like)]
        rows, tokens = (expression(s) for s in shape(valid))
        if sizes.count(rows) != 1 or sizes.count(tokens) != 1:
            return None
        a, t = sizes.index(rows), sizes.index(tokens)
        node = valid if a < t else self.call(aten.transpose.int, valid, 0, 1)
        for axis in range(len(sizes)):
            if axis not in (a, t):
                node = self.call(aten.unsqueeze.default, node, axis)
        return node

    def of_logits(self, logits: fx.Node, measure: str, valid: fx.Node | None) -> fx.Node:
        if measure == "prediction":
            best = self.call(aten.argmax.default, logits, -1)
            turned = self.tokens is not None and self.batch_axis(best) == 1
            return self.call(aten.transpose.int, best, 0, 1) if turned else best
        if measure == "entropy":
            logs = self.call(aten.log_softmax.int, logits, -1, torch.float32)
            chances = self.call(aten.exp.default, logs)
            places = self.call(
                aten.neg.default,
                self.call(aten.sum.dim_IntList, self.call(aten.mul.Tensor, chances, logs), [-1]),
            )
        else:
            chances = self.call(aten.softmax.int, logits, -1, torch.float32)
            if measure == "top1":
                places = self.call(aten.amax.default, chances, [-1])
            else:
                best = self.call(operator.getitem, self.call(aten.topk.default, chances, 2), 0)
                first, second = (
                    self.call(aten.select.int, best, -1, 0),
                    self.call(aten.select.int, best, -1, 1),
                )
                places = self.call(aten.sub.Tensor, first, second)
        if len(shape(places)) == 1 and self.batch_axis(places) is not None:
            return places
        real = self.spread(valid, places)
        sure = 0.0 if measure == "entropy" else 1.0
        if real is not None:
            places = self.call(aten.where.ScalarOther, real, places, sure)
        return self.per_row(places, aten.amax.default if measure == "entropy" else aten.amin.default)

    def cosine(self, before: fx.Node, after: fx.Node, valid: fx.Node | None) -> fx.Node:
        before, after = self.by_rows(before), self.by_rows(after)
        real = self.spread(valid, after)

        def dot(a: fx.Node, b: fx.Node) -> fx.Node:
            product = self.call(aten.mul.Tensor, a, b)
            if real is not None:
                product = self.call(aten.where.ScalarOther, real, product, 0.0)
            return self.per_row(product, aten.sum.dim_IntList)

        lengths = self.call(aten.sqrt.default, self.call(aten.mul.Tensor, dot(before, before), dot(after, after)))
        return self.call(aten.div.Tensor, dot(before, after), self.call(aten.clamp_min.default, lengths, 1e-12))

    def learned(self, hidden: fx.Node, valid: fx.Node | None, prefix: str) -> fx.Node:
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
