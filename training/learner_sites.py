"""Sites that are split into learners, as training sees them: what they read, and what each number of learners makes."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx

from offramp.errors import SpecError
from offramp.program.analysis.flattening import unflattened
from offramp.program.analysis.sites import attentions, mlp
from offramp.program.graph import (
    ancestors,
    data_inputs,
    dependents,
    is_tensor,
    placeholders,
    results,
    sizes_of,
    source,
    symbols,
)
from offramp.program.learners import WIDTH, Learners
from offramp.program.ops import learner_bounds
from offramp.program.program import Program
from offramp.training.losses import Values

_TEACHER = "the program before insert-acm"
MASK = "attention_mask"  # what most models call it; those without go without


@dataclass(frozen=True)
class LearnerSite:
    """A site by the names of its nodes.

    ``input`` is what it reads, ``[..., features]``; ``hidden`` the units of all learners, ``[..., units]``; ``output``
    its last product ``hidden @ weight + bias``; ``units_axis`` that of the weight along which lies what it makes.
    ``flops`` are the floating-point operations of one learner for one token.
    """

    learners: Learners
    input: str
    hidden: str
    output: str
    weight: str
    bias: str | None
    units_axis: int
    flops: float

    @property
    def counts(self) -> range:
        """How many learners a token may take."""
        return range(self.learners.least, self.learners.learners + 1)

    @property
    def parts(self) -> list[str]:
        """The nodes that `outputs` needs."""
        return [name for name in (self.hidden, self.weight, self.bias) if name is not None]

    def outputs(self, values: Values) -> Iterator[tuple[int, Tensor]]:
        """``h(z, k)`` for each ``k`` of `counts` (ACM, arXiv 2312.10193, sec. 3.1), each float ``[..., out]``.

        Each learner's product is computed once and added up: all ``k`` cost as much as the last one.
        """
        hidden, weight = values[self.hidden], values[self.weight]
        columns = weight if self.units_axis == 0 else weight.t()
        total = hidden.new_zeros(()) if self.bias is None else values[self.bias]
        total = total.float().expand(*hidden.shape[:-1], columns.shape[0])
        bounds = learner_bounds(hidden.shape[-1], self.learners.learners)
        sizes = [stop - start for start, stop in pairwise(bounds)]
        pieces = zip(hidden.split(sizes, -1), columns.split(sizes, 1), strict=True)
        for count in range(self.learners.learners + 1):
            if count:
                units, its = next(pieces)
                total = total + torch.nn.functional.linear(units, its).float()
            if count in self.counts:
                yield count, total


def learner_sites(program: Program) -> list[LearnerSite]:
    """The sites of a program that have learners, in the order of their records.

    Raises:
        SpecError: there are none.
    """
    found = [_site(program, item) for item in program.learners]
    if not found:
        raise SpecError("the program has no learners", hint="insert-acm first")
    return found


def _site(program: Program, item: Learners) -> LearnerSite:
    masked = program.nodes[item.hidden]
    found = next((site for user in masked.users if (site := mlp(user)) is not None), None)
    if found is None:
        raise SpecError(
            f"{item.site} of block {item.block} of stack {item.stack!r} is no MLP any more",
            hint="train right after insert-acm, other passes then",
        )
    hidden: Any = masked.args[0]
    last = found.last
    bias = None if last.bias is None else last.bias.name
    flops = found.token_flops / item.learners
    return LearnerSite(
        item, found.input.name, hidden.name, last.node.name, last.weight.name, bias, last.units_axis, flops
    )


class Rest(NamedTuple):
    """What becomes of what a site makes: the hidden state ``end`` behind its block, of it and the nodes ``beside`` it.

    ``beside`` is None where tokens meet on the way there, so that what comes of one token is no longer its own.
    """

    end: str
    beside: tuple[str, ...] | None


def rest_of(teacher: Program, site: LearnerSite) -> Rest:
    """The part of the teacher's block behind a site."""
    stack = teacher.stacks[site.learners.stack]
    end = teacher.nodes[stack.cuts[site.learners.block]]
    between = dependents([teacher.nodes[site.output]], teacher.graph) & ancestors([end])
    if any(item.weights in between or item.output in between for item in attentions(teacher.graph)):
        return Rest(end.name, None)
    read = {node for each in between for node in data_inputs(each)} - between
    kept = {node for node in read if node.op == "call_function" and is_tensor(node)}
    return Rest(end.name, tuple(sorted(node.name for node in kept if node.name != site.output)))


def require_teacher(teacher: Any) -> None:
    """Raise a SpecError where this is no program."""
    if not isinstance(teacher, Program):
        raise SpecError(f"the teacher is a {type(teacher).__name__}; a program is needed", hint=_TEACHER)


def check_teacher(program: Program, teacher: Program) -> None:
    """Raise a SpecError where the teacher has no values for the program's sites, or has learners there itself."""
    require_teacher(teacher)
    split = {(item.stack, item.block) for item in teacher.learners}
    for site in learner_sites(program):
        item, stack = site.learners, teacher.stacks.get(site.learners.stack)
        where = f"{item.site} of block {item.block} of stack {item.stack!r}"
        hint = _TEACHER
        if (item.stack, item.block) in split:
            raise SpecError(f"the teacher has learners itself: {where}", hint=hint)
        if stack is None or item.block >= len(stack.cuts):
            raise SpecError(f"the teacher has no {where}", hint=hint)
        for name in (site.input, site.output):
            sizes, found = _named_sizes(program, name), _named_sizes(teacher, name)
            if found != sizes:
                there = "there is none" if found is None else f"it has {found}"
                raise SpecError(f"the teacher's {where} has no value {name} of shape {sizes}: {there}", hint=hint)


def _named_sizes(program: Program, name: str) -> list[int | str] | None:
    """The shape of a node's value in the names of its program's axes; None where there is no such tensor."""
    value = program.nodes[name].meta.get("val") if name in program.nodes else None
    return [program.axes.describe(size) for size in value.shape] if isinstance(value, torch.Tensor) else None


def width(program: Program, share: float, like: Tensor) -> dict[str, Tensor]:
    """What makes the gates read that share: the value of the node that holds the width, on the device of ``like``."""
    node = next(node for node in program.graph.find_nodes(op="get_attr") if node.target == WIDTH)
    return {node.name: torch.full((1,), share, dtype=node.meta["val"].dtype, device=like.device)}


def counting(program: Program, batch: Values, mask: str | None, name: str, tokens: Tensor) -> Tensor:
    """Which tokens of a node's (or output's) value ``[..., features]`` count, ``bool [...]``: not where the mask is 0.

    A mask of other places than the tokens' (samples of a signal, tokens of another stack) is not read. Tokens may lie
    time first, and some models (GPT-2) have those of all rows one after another. A mask that is no input of the program
    lies as an input of its shape does, or rows first.

    Raises:
        SpecError: the batch has no such mask, it is no tensor, no token counts, or nothing says how they lie.
    """
    found, places = batch.get(mask) if mask else None, tokens.shape[:-1]
    if found is None and mask not in (None, MASK):
        raise SpecError(
            f"mask={mask!r}: a batch has {', '.join(sorted(batch))}", hint="one of these, or None for all tokens"
        )
    if found is not None and not isinstance(found, Tensor):
        raise SpecError(
            f"{mask} is a {type(found).__name__}; a tensor says which tokens count",
            hint="rows that are padded to one length; mask=None for all tokens",
        )
    if found is not None and not found.any():
        raise SpecError(
            f"{mask} is 0 everywhere: no token of the batch counts",
            hint="1 for tokens that count, 0 for padding; a mask the other way round can stand beside the model's own: "
            f"batch['counts'] = batch[{mask!r}] == 0, and mask='counts'",
        )
    if found is not None:
        found = _as_tokens_lie(program, batch, found, str(mask), _ordered_sizes(program, name), places)
    if found is None or not (found.shape == places or (len(places) == 1 and found.numel() == places[0])):
        return torch.ones(places, dtype=torch.bool, device=tokens.device)
    return found.reshape(places) != 0


def _as_tokens_lie(
    program: Program, batch: Values, mask: Tensor, its_name: str, sizes: list[Any], places: torch.Size
) -> Tensor | None:
    """A mask with its axes in the order of the tokens', which have ``sizes``; None if it is of other places."""
    nodes = placeholders(program.graph)
    if its_name in nodes:
        its = sizes_of(nodes[its_name])
        return arranged(mask, its, sizes) if math.prod(its) == math.prod(sizes) else None
    alike = [sizes_of(node) for name, node in nodes.items() if name in batch and batch[name].shape == mask.shape]
    rows = program.sizes(batch).get(program.axes.names.get(program.axes.batch, ""))
    if mask.shape != places and mask.dim() == len(sizes) and mask.shape[0] == rows:
        alike.append(sorted(sizes, key=lambda size: program.axes.batch not in symbols(size)))
    its = next((each for each in alike if {*each} == {*sizes}), [])
    return arranged(mask, its, sizes)


def token_sizes(program: Program, name: str) -> list[Any]:
    """The sizes of the axes along which the tokens of a node's (or output's) value lie, ``[..., features]``.

    Where the value has those of all rows one after another, they are those of the value before, if that is found.
    """
    node = _node(program, name)
    sizes, rows = sizes_of(node)[:-1], program.axes.batch
    if rows in sizes or (rows is None and len(sizes) > 1):
        return sizes
    before = unflattened(node)
    return sizes if before is None else sizes_of(before)[:-1]


def token_names(program: Program, name: str) -> list[int | str]:
    """The same in the names of its program's axes, which another program of the model has too."""
    return [program.axes.describe(size) for size in token_sizes(program, name)]


def _ordered_sizes(program: Program, name: str) -> list[Any]:
    """Those of `token_sizes`; a SpecError where nothing says how they lie, and hidden states have no rows first."""
    sizes = token_sizes(program, name)
    if len(sizes) != 1:
        return sizes
    cuts = {cut for stack in program.stacks.values() for cut in stack.cuts}
    states = [its for cut in cuts if math.prod(its := sizes_of(program.nodes[cut])[:-1]) == sizes[0]]
    if any(_along(program, its) not in (0, None) for its in states):
        node = _node(program, name)
        raise SpecError(
            f"{node.name} ({source(node)}) has the tokens of all rows one after another; nothing says in which order",
            hint="flatten right before what reads them so: norms and products may lie between",
        )
    return sizes


def arranged(value: Tensor, its: list[Any], sizes: list[Any]) -> Tensor:
    """A value with axes of sizes ``its`` in the order of ``sizes``; as it is where they do not tell its axes apart."""
    apart = value.dim() == len({*its}) == len(its) and {*its} == {*sizes}
    return value.permute([its.index(size) for size in sizes]) if apart else value


def by_row(program: Program, batch: Values, name: str, value: Tensor) -> Tensor:
    """A node's value ``[..., features]`` as ``[rows, tokens, features]``; one row where the program has no batch."""
    sizes = _ordered_sizes(program, name)
    axis = _along(program, sizes)
    if axis is None:
        return value.reshape(1, -1, value.shape[-1])
    known = program.sizes(batch)
    lengths = {symbol: known[axis_name] for symbol, axis_name in program.axes.names.items() if axis_name in known}
    if axis and len(sizes) >= value.dim():
        counts = (size if isinstance(size, int) else int(size.subs(lengths)) for size in sizes)
        value = value.reshape(*counts, value.shape[-1])
    return value.movedim(axis, 0).reshape(lengths[program.axes.batch], -1, value.shape[-1])


def _along(program: Program, sizes: list[Any]) -> int | None:
    """Along which of axes of these sizes rows lie."""
    return next((axis for axis, size in enumerate(sizes) if program.axes.batch in symbols(size)), None)


def _node(program: Program, name: str) -> fx.Node:
    """A node by its name, or that of an output: torch calls what returns them all "output"."""
    return results(program.graph).get(name) or program.nodes[name]
