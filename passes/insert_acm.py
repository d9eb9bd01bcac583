"""``insert-acm``: ordered learners in the place of MLPs and projections, and gates that say how many a token needs."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, fx

from offramp.errors import PassError, SpecError
from offramp.passes.acm.factors import factorize, rank
from offramp.passes.acm.rows import by_row
from offramp.passes.acm.units import ranked, reorder
from offramp.passes.infra.contract import Pass, PassResult, numbers, stack_named
from offramp.passes.infra.editor import Editor
from offramp.program.analysis.sites import KINDS, Site, attentions, find_sites, unmatched
from offramp.program.analysis.token_axes import Axes
from offramp.program.compare import TOLERANCE, relative_error
from offramp.program.graph import aten, shape, source
from offramp.program.learners import WEIGHTS, WIDTH, Learners
from offramp.program.ops import FIRST_LEARNERS
from offramp.program.program import Program, evaluate

_GATE = 16  # hidden units of a gate
_ORDERS = ("activation", "importance", "given")
_SITES: Mapping[str, tuple[str, ...]] = {"projections": KINDS[1:], **{kind: (kind,) for kind in KINDS}}
_CONVOLUTIONS = (aten.conv1d.default, aten.conv2d.default, aten.convolution.default)
_MLP = "an MLP is two products (three in a gated one) with hidden units between them that are changed one by one"
_PROJECTION = "a projection is a product with a matrix next to an attention; one that makes several is qkv or kv"


def _why_no_mlp(block: Sequence[fx.Node], others: Sequence[str]) -> str:
    """What keeps a block's products from being an MLP, where that is known; ``others`` say why some make none."""
    chosen = next((node for node in block if node.target is aten.topk.default), None)
    if chosen is None:
        mixing = next((node for node in block if node.target in _CONVOLUTIONS), None)
        seen = "" if mixing is None else f"{mixing} ({source(mixing)}) is a convolution, and no product; "
        return "".join(f"{text}; " for text in others[-1:]) or seen
    return (
        f"{chosen} ({source(chosen)}) chooses among experts, which have no learners: sites=projections has the others; "
    )


@dataclass(frozen=True, repr=False)
class InsertAcm(Pass):
    """Adaptive width (ACM, arXiv 2312.10193): hidden units become learners, of which each token takes the first.

    ``x -> up -> gelu -> down``  becomes  ``x -> up -> gelu -> first learners -> down;  x -> gate -> choice``

    An MLP's learners are its own hidden units, the most important ones first, split in equal parts; with all of them
    it computes what it did. A projection becomes two factors of the same cost, whose inner values are its learners;
    that is another function, which has to be trained. The gates read a width, the share of the learners that a token is
    to take: until they are trained, each token takes that share. Weights are copies, named
    ``learners.STACK.BLOCK.SITE.*``; a site's gate is ``gate.*`` among them.

    Options: ``stack``; ``blocks``, numbers of blocks from 1 or "all"; ``sites``: mlp, query, key, value, qkv, kv,
    output, or projections for all but the first; ``learners``, how many; ``least``, how many each token takes at least
    (None: 0 where a residual goes around the site, else 1); ``order`` of an MLP's units: activation (what they add to
    the output in the example), importance (the norms of what they read and write) or given (as they are).

    Requires: such a site in each block.
    Ensures: with MLPs alone, the model's outputs are what they were; a site that has learners keeps them, and is noted.
    Invalidates: thresholds that were chosen for exits, once learners or gates are trained.
    """

    name: ClassVar[str] = "insert-acm"
    stack: str | None = None
    blocks: tuple[int, ...] | int | Literal["all"] = "all"
    sites: tuple[str, ...] | str = "mlp"
    learners: int = 4
    least: int | None = None
    order: Literal["activation", "importance", "given"] = "activation"

    def requires(self, program: Program) -> None:
        """The stack, the blocks, the sites and the numbers of learners exist."""
        name = stack_named(program, self.stack)
        if program.groups_of(name):
            raise SpecError(
                f"tokens leave stack {name!r} in groups, and learners are counted for all of its tokens",
                hint="leave insert-acm out; or split-modalities{form=separate}",
            )
        if not isinstance(self.learners, int) or self.learners < 2:
            raise SpecError(f"learners={self.learners}: a whole number, 2 or more")
        if self.least is not None and not (isinstance(self.least, int) and 0 <= self.least < self.learners):
            raise SpecError(f"least={self.least}: from 0 to {self.learners - 1}, one less than there are learners")
        if self.order not in _ORDERS:
            raise SpecError(f"order={self.order!r}: there are {', '.join(_ORDERS)}")
        unknown = [kind for kind in self._named if not isinstance(kind, str) or kind not in _SITES]
        if unknown or not self._named:
            raise SpecError(f"sites={'|'.join(map(str, unknown)) or '()'}: there are {', '.join(_SITES)}")
        for block, found, _ in self._found(program, name):
            for site in found:
                self._fits(program.axes, site, f"the {_word(site)} of block {block} of stack {name!r}")

    @property
    def _named(self) -> tuple[str, ...]:
        return tuple(self.sites) if isinstance(self.sites, (tuple, list)) else (self.sites,)

    def _fits(self, axes: Axes, site: Site, where: str) -> None:
        units = site.last.features if site.inner else rank(site.last)
        if units < self.learners:
            raise SpecError(f"learners={self.learners}: {where} has {units} hidden units")
        read, lie = ([axes.describe(size) for size in shape(node)[:-1]] for node in (site.input, site.last.data))
        if read != lie:
            raise SpecError(
                f"{where} reads tokens of shape {read}, and its hidden units lie as {lie}",
                hint="a model that reshapes before the first product or behind the last one, not in between",
            )
        if self.least == 0 and not site.residual:
            raise SpecError(f"least=0: no residual goes around {where}", hint="least=1")

    def _found(self, program: Program, stack: str) -> Iterator[tuple[int, list[Site], list[str]]]:
        """The sites of each block that are named and have no learners yet, and why other products are no MLP.

        Raises:
            SpecError: a block is not there, or has no such site; the message says what is there.
        """
        last, mixing = program.stacks[stack].blocks, attentions(program.graph)
        blocks, wrong = numbers(self.blocks, last)
        if wrong or not blocks:
            raise SpecError(f"blocks={'|'.join(map(str, wrong))}: stack {stack!r} has the blocks 1 to {last}")
        for block in blocks:
            own = program.own_nodes(program.stacks[stack], block - 1)
            every = find_sites(own, mixing)
            state = program.nodes[program.stacks[stack].cuts[block - 1]]
            others = [_why(*pair) for pair in unmatched(own, state, every)] if "mlp" in self._named else []
            whole = [site for site in every if not site.split]
            known = [site.rstrip("0123456789") for site in _known(program, stack, block)]
            for name in self._named:
                if not {site.kind for site in whole}.union(known).intersection(_SITES[name]):
                    why = _why_no_mlp(own, others) if name == "mlp" else ""
                    raise SpecError(
                        f"block {block} of stack {stack!r} has no {'MLP' if name == 'mlp' else name}: "
                        f"{', '.join(site.kind for site in every) or 'no products'}",
                        hint=f"{why}{_MLP if name == 'mlp' else _PROJECTION}; adapters (LoRA) and parametrizations "
                        "(weight norm) have to be merged into the weights first; `offramp inspect` shows what is there",
                    )
            kinds = {kind for name in self._named for kind in _SITES[name]}
            yield block, [site for site in whole if site.kind in kinds], others

    def run(self, program: Program) -> PassResult:
        """Split the sites that are whole."""
        name = stack_named(program, self.stack)
        found = list(self._found(program, name))
        examples = self._examples(program, [site for _, sites, _ in found for site in sites])
        editor, copies = Editor(program, repr(self)), dict[Any, fx.Node]()
        added, notes = list[Learners](), list[str]()
        for block, sites, others in found:
            notes += [f"block {block} of stack {name!r} has products that are no MLP: {text}" for text in others]
            known = Counter(site.rstrip("0123456789") for site in _known(program, name, block))
            if not sites:
                notes.append(f"block {block} of stack {name!r} has learners already")
            for site in sites:
                known[site.kind] += 1
                kind = site.kind if known[site.kind] == 1 else f"{site.kind}{known[site.kind]}"
                prefix = f"{WEIGHTS}.{name}.{block}.{kind}"
                hidden, output = self._split(editor, site, prefix, examples.get(_weights(site)), copies)
                least = self.least if self.least is not None else int(not site.residual)
                gated = self._gated(editor, site, hidden, least, f"{prefix}.gate")
                editor.replace_uses(hidden, gated[-1], [output])
                added.append(Learners(name, block, kind, self.learners, least, *(node.name for node in gated)))
        editor.drop_dead(keep={*program.pinned, *(node for item in added for node in item.pinned_nodes)})
        return editor.finish(tuple(notes), records=(*program.records, *added))

    def _examples(self, program: Program, sites: list[Site]) -> dict[tuple[str, ...], Tensor]:
        """What the last product of a site reads in the example, [tokens, values]: hidden units, a projection's input.

        It is by the site's weights: sites that share all of them have their tokens in common.
        """
        found: dict[tuple[str, ...], Tensor] = {}
        if self.order == "activation" and sites:
            given = program.fresh({name: program.example_inputs[name] for name in program.inputs})
            values = evaluate(program.graph_module, {site.last.data for site in sites}, given)
            for site in sites:
                data, key = values[site.last.data], _weights(site)
                data = data.reshape(-1, data.shape[-1])
                found[key] = torch.cat([found[key], data]) if key in found else data
        return found

    def _split(
        self, editor: Editor, site: Site, prefix: str, data: Tensor | None, copies: dict[Any, fx.Node]
    ) -> tuple[fx.Node, fx.Node]:
        """The site with its hidden units in the order of their learners: these, and the product that reads them."""
        if site.inner:
            reorder(editor, site, prefix, ranked(site, editor.module, self.order, data), copies)
            return editor[site.last.data.name], editor[site.output.name]
        return factorize(editor, site.last, prefix, data, copies)

    def _gated(
        self, editor: Editor, site: Site, hidden: fx.Node, least: int, prefix: str
    ) -> tuple[fx.Node, fx.Node, fx.Node]:
        """The gate's logits, the number that it picks, and the units of the learners that it lets through.

        ``W1 gelu(W0 x + b0 + width u0) + b1 + width u1``, whose last two make ``-(k - width learners)^2``, a constant
        aside: until it is trained, each token takes as many as the width says, and all at width 1.
        """
        x = editor[site.input.name]
        features, dtype = int(shape(x)[-1]), x.meta["val"].dtype
        first = torch.empty(_GATE, features)
        torch.nn.init.xavier_uniform_(first, generator=torch.Generator().manual_seed(0))
        counts = torch.arange(least, self.learners + 1.0)
        values = {"0.weight": first, "0.bias": torch.zeros(_GATE), "0.width": torch.zeros(_GATE)}
        values["1.weight"] = torch.zeros(len(counts), _GATE)
        values |= {"1.bias": -(counts**2), "1.width": 2 * self.learners * counts}
        made: dict[str, Any] = {
            name: editor.parameter(f"{prefix}.{name}", value.to(dtype), hidden) for name, value in values.items()
        }
        given, at = x, hidden
        for layer in ("0", "1"):
            by_width = editor.call(aten.mul.Tensor, made[f"{layer}.width"], _width(editor, dtype), at=at)
            bias = editor.call(aten.add.Tensor, made[f"{layer}.bias"], by_width, at=by_width)
            choice = editor.call(aten.linear.default, given, made[f"{layer}.weight"], bias, at=bias)
            given = at = editor.call(aten.gelu.default, choice, at=choice) if layer == "0" else choice
        count = editor.call(aten.argmax.default, choice, -1, at=choice)
        count = editor.call(aten.add.Tensor, count, least, at=count)
        count = by_row(editor, count, x)
        return choice, count, editor.call(FIRST_LEARNERS, hidden, choice, self.learners, least, at=count)

    def ensures(self, before: Program, result: PassResult) -> None:
        """With all learners of its MLPs, the model computes on the example what it did."""
        if not result.modified or self._named != ("mlp",):
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


def _known(program: Program, stack: str, block: int) -> list[str]:
    """The sites of a block that have learners."""
    return [item.site for item in program.learners if (item.stack, item.block) == (stack, block)]


def _weights(site: Site) -> tuple[str, ...]:
    return tuple(str(item.weight.target) for item in site.products)


def _why(last: fx.Node, between: fx.Node | None) -> str:
    """Why a product makes no MLP with those whose values it reads."""
    if between is None:
        return f"nothing changes what {last} ({source(last)}) reads of another product one by one"
    where = f"{last} ({source(last)})"
    return f"{between} ({source(between)}) meets hidden units of {where} and does not change them one by one"


def _word(site: Site) -> str:
    return "MLP" if site.kind == "mlp" else site.kind


def _width(editor: Editor, dtype: torch.dtype) -> fx.Node:
    """What all gates read, made by the first."""
    known = [node for node in editor.graph.find_nodes(op="get_attr") if node.target == WIDTH]
    first = next(node for node in editor.graph.nodes if node.op == "call_function")
    return known[0] if known else editor.buffer(WIDTH, torch.ones(1, dtype=dtype), first)
