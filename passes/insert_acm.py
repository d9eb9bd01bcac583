"""``insert-acm``: ordered learners in the place of MLPs, and a gate that says how many of them a token needs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import fx

from offramp.errors import PassError, SpecError
from offramp.passes.infra.contract import Pass, PassResult, numbers, stack_named
from offramp.passes.infra.editor import Editor
from offramp.program.analysis.attention import AttentionSite
from offramp.program.analysis.sites import Site, attentions, find_sites
from offramp.program.compare import TOLERANCE, relative_error
from offramp.program.graph import aten, attribute, expression, shape, weights
from offramp.program.learners import WIDTH, Learners
from offramp.program.ops import FIRST_LEARNERS
from offramp.program.program import Program

_GATE = 16  # hidden units of a gate
_ORDERS = ("importance", "given")


@dataclass(frozen=True, repr=False)
class InsertAcm(Pass):
    """Adaptive width (ACM, arXiv 2312.10193): hidden units become learners, of which each token takes the first.

    ``x -> up -> gelu -> down``  becomes  ``x -> up -> gelu -> first learners -> down;  x -> gate -> choice``

    The learners are the MLP's own hidden units, the most important ones first, split in equal parts; with all of them
    it computes what it did, and that is where the gate starts: every token takes all. What is to be saved comes from
    training. Weights are copies, named ``learners.STACK.BLOCK.SITE.*``; the gate is ``gate.*`` among them.

    Options: ``stack``; ``blocks``, numbers of blocks from 1 or "all"; ``learners``, how many; ``least``, how many each
    token takes at least (0 where a residual goes around the MLP); ``order`` of the hidden units: importance (the
    norm of what a unit reads times the norm of what it writes) or given (as they are).

    Requires: an MLP in each block, whose hidden units are changed one by one between its products.
    Ensures: the model's outputs are what they were; an MLP that has learners keeps them, and is noted.
    Invalidates: thresholds that were chosen for exits, once the gates are trained.
    """

    name: ClassVar[str] = "insert-acm"
    stack: str | None = None
    blocks: tuple[int, ...] | int | Literal["all"] = "all"
    learners: int = 4
    least: int = 0
    order: Literal["importance", "given"] = "importance"

    def requires(self, program: Program) -> None:
        """The stack, the blocks and the numbers of learners exist, and each block has an MLP that has or gets some."""
        name = stack_named(program, self.stack)
        if not isinstance(self.learners, int) or self.learners < 2:
            raise SpecError(f"learners={self.learners}: a whole number, 2 or more")
        if not isinstance(self.least, int) or not 0 <= self.least < self.learners:
            raise SpecError(f"least={self.least}: from 0 to {self.learners - 1}, one less than there are learners")
        if self.order not in _ORDERS:
            raise SpecError(f"order={self.order!r}: there are {', '.join(_ORDERS)}")
        mixing = attentions(program.graph)
        for block in self._blocks(program, name):
            if not _known(program, name, block):
                for site in _mlps(program, name, block, mixing):
                    self._fits(site, f"the MLP of block {block} of stack {name!r}")

    def _fits(self, site: Site, where: str) -> None:
        if site.last.features < self.learners:
            raise SpecError(f"learners={self.learners}: {where} has {site.last.features} hidden units")
        leading = [[expression(size) for size in shape(node)[:-1]] for node in (site.input, site.last.data)]
        if leading[0] != leading[1]:
            raise SpecError(f"{where} reads tokens of shape {leading[0]}, and its hidden units lie as {leading[1]}")
        if self.least == 0 and not site.residual:
            raise SpecError(f"least=0: no residual goes around {where}", hint="least=1")

    def _blocks(self, program: Program, stack: str) -> tuple[int, ...]:
        last = program.stacks[stack].blocks
        found, wrong = numbers(self.blocks, last)
        if wrong or not found:
            raise SpecError(f"blocks={'|'.join(map(str, wrong))}: stack {stack!r} has the blocks 1 to {last}")
        return found

    def run(self, program: Program) -> PassResult:
        """Split the MLPs that are whole."""
        name = stack_named(program, self.stack)
        editor, mixing = Editor(program, repr(self)), attentions(program.graph)
        copies: dict[Any, fx.Node] = {}
        added: list[Learners] = []
        notes = []
        for block in self._blocks(program, name):
            if _known(program, name, block):
                notes.append(f"block {block} of stack {name!r} has learners already")
                continue
            for index, site in enumerate(_mlps(program, name, block, mixing)):
                kind = site.kind if index == 0 else f"{site.kind}{index + 1}"
                prefix = f"learners.{name}.{block}.{kind}"
                self._split(editor, site, prefix, copies)
                nodes = self._gated(editor, site, f"{prefix}.gate")
                added.append(Learners(name, block, kind, self.learners, self.least, *(node.name for node in nodes)))
        return editor.finish(tuple(notes), records=(*program.records, *added))

    def _split(self, editor: Editor, site: Site, prefix: str, copies: dict[Any, fx.Node]) -> None:
        """Let the site read copies of its weights, hidden units in the order of their learners.

        ``copies`` are those that have been made, by weight and order: sites that share weights share them.
        """
        module, units = editor.module, site.last.features
        order = torch.arange(units)
        if self.order == "importance":
            order = site.importance(module).argsort(descending=True, stable=True)
        changed = [(item.reader, item.weight, item.units_axis) for item in site.first]
        changed += [(item.node, item.bias, 0) for item in site.first if item.bias is not None]
        for node in site.inner:
            changed += [(node, weight, 0) for weight in weights(node) if shape(weight) == (units,)]
        changed.append((site.last.reader, site.last.weight, 1 - site.last.units_axis))
        for node, weight, axis in changed:
            target, key = str(weight.target), (weight.target, *order.tolist())
            if key not in copies:
                value = attribute(module, target)
                places = torch.cat([order + start for start in range(0, value.shape[axis], units)])
                make = editor.parameter if isinstance(value, torch.nn.Parameter) else editor.buffer
                copies[key] = make(f"{prefix}.{target}", value.detach().index_select(axis, places), editor[node.name])
            editor.replace_uses(editor[weight.name], copies[key], [editor[node.name]])

    def _gated(self, editor: Editor, site: Site, prefix: str) -> tuple[fx.Node, fx.Node, fx.Node]:
        """The gate's logits, the number that it picks, and the units of the learners that it lets through.

        ``W1 gelu(W0 x + b0 + width u0) + b1 + width u1``, whose last two make ``-(k - width learners)^2``, a constant
        aside: until it is trained, each token takes as many as the width says, and all at width 1.
        """
        hidden, x = editor[site.last.data.name], editor[site.input.name]
        features, dtype = int(shape(x)[-1]), x.meta["val"].dtype
        first = torch.empty(_GATE, features)
        torch.nn.init.xavier_uniform_(first, generator=torch.Generator().manual_seed(0))
        numbers_ = torch.arange(self.least, self.learners + 1.0)
        values = {"0.weight": first, "0.bias": torch.zeros(_GATE), "0.width": torch.zeros(_GATE)}
        values["1.weight"] = torch.zeros(len(numbers_), _GATE)
        values |= {"1.bias": -(numbers_**2), "1.width": 2 * self.learners * numbers_}
        made: dict[str, Any] = {
            name: editor.parameter(f"{prefix}.{name}", value.to(dtype), hidden) for name, value in values.items()
        }
        given, at = x, hidden
        for layer in ("0", "1"):
            by_width = editor.call(aten.mul.Tensor, made[f"{layer}.width"], self._width(editor, dtype), at=at)
            bias = editor.call(aten.add.Tensor, made[f"{layer}.bias"], by_width, at=by_width)
            choice = editor.call(aten.linear.default, given, made[f"{layer}.weight"], bias, at=bias)
            given = at = editor.call(aten.gelu.default, choice, at=choice) if layer == "0" else choice
        count = editor.call(aten.argmax.default, choice, -1, at=choice)
        count = editor.call(aten.add.Tensor, count, self.least, at=count)
        kept = editor.call(FIRST_LEARNERS, hidden, choice, self.learners, self.least, at=count)
        editor.replace_uses(hidden, kept, [editor[site.output.name]])
        return choice, count, kept

    def _width(self, editor: Editor, dtype: torch.dtype) -> fx.Node:
        """What all gates read, made by the first."""
        known = [node for node in editor.graph.find_nodes(op="get_attr") if node.target == WIDTH]
        first = next(node for node in editor.graph.nodes if node.op == "call_function")
        return known[0] if known else editor.buffer(WIDTH, torch.ones(1, dtype=dtype), first)

    def ensures(self, before: Program, result: PassResult) -> None:
        """With all learners, the model computes on the example what it did."""
        if not result.modified:
            return
        with torch.no_grad():
            given = before.fresh({name: before.example_inputs[name] for name in before.inputs})
            wanted, found = before.module(**given), result.program.module(**given)
        for name in before.outputs:
            error = relative_error(found[name], wanted[name]) if wanted[name].is_floating_point() else 0.0
            if not error <= TOLERANCE:
                raise PassError(
                    f"{self!r} changed the output {name!r} by {error:.1e}",
                    hint="the model is sensitive to the order in which it adds up; order=given keeps that",
                )


def _known(program: Program, stack: str, block: int) -> bool:
    """Whether a block has learners."""
    return any(isinstance(item, Learners) and (item.stack, item.block) == (stack, block) for item in program.records)


def _mlps(program: Program, stack: str, block: int, mixing: Sequence[AttentionSite]) -> list[Site]:
    """The MLPs of a block (from 1) of a program with these attentions.

    Raises:
        SpecError: there is none; the message says what is there.
    """
    sites = find_sites(program.own_nodes(program.stacks[stack], block - 1), mixing)
    found = [site for site in sites if site.kind == "mlp"]
    if not found:
        raise SpecError(
            f"block {block} of stack {stack!r} has no MLP: {', '.join(site.kind for site in sites) or 'no products'}",
            hint="an MLP is two products (three in a gated one) with hidden units between them that are changed one by "
            "one; `offramp inspect` shows what is there",
        )
    return found
