"""Tokens that see no key at all: padding whose own queries are masked too.

With a mask of a large finite number their weights are the same for all keys, those of later tokens too: one pass
gives them something else than generation does, where they are the last token.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, fx

from offramp.passes.caches.causal import Causal
from offramp.passes.caches.kinds import DATA
from offramp.program.analysis.attention import AttentionSite
from offramp.program.graph import expression, results, shape, sizes_of
from offramp.program.program import Program, evaluate


def comparable_outputs(
    program: Program,
    inputs: Mapping[str, Tensor],
    expected: Mapping[str, Tensor],
    found: Mapping[str, Tensor],
    *,
    behind: bool = True,
) -> tuple[dict[str, Tensor], dict[str, Tensor]] | None:
    """Outputs of one pass and those with caches, such that they can be compared; None where all tokens see something.

    Of a row's first token that sees nothing, the pass has what it gives where that token is the last. What follows from
    it depends on the number of tokens however the program runs: further such tokens are 0 in both.

    Args:
        program: A causal program without caches.
        inputs: All inputs of its graph.
        expected: What one pass made of them.
        found: What is compared with that, by the same names; some may be missing.
        behind: Whether the other tokens behind such a one are compared.
    """
    facts = Causal(program)
    masked = _fully_masked(facts, inputs)
    if masked is None or not masked.any():
        return None
    made = results(program.graph)
    names = [name for name, value in expected.items() if name in found and _by_token(facts, made[name])]
    wanted, others = ({name: values[name].clone() for name in names} for values in (expected, found))
    first = masked & (masked.cumsum(1) == 1)
    for at in first.any(0).nonzero().flatten().tolist():
        with torch.no_grad():
            prefix = program.module(**{name: _first(facts, name, value, at + 1) for name, value in inputs.items()})
        for name in names:
            wanted[name][first[:, at], at] = prefix[name][first[:, at], at]
    for values in (wanted, others):
        for value in values.values():
            value[(masked if behind else masked.cumsum(1) > 0) & ~first] = 0
    return {**expected, **wanted}, {**found, **others}


def _first(facts: Causal, name: str, value: Tensor, count: int) -> Tensor:
    """An input of the first ``count`` tokens."""
    for node in facts.own:
        for axis, size in enumerate(shape(node)) if str(node.target) == name else ():
            if expression(size) == facts.tokens:
                value = value.narrow(axis, 0, count)
    return value


def _by_token(facts: Causal, node: fx.Node) -> bool:
    return sizes_of(node)[:2] == [facts.program.axes.batch, facts.tokens]


def _fully_masked(facts: Causal, inputs: Mapping[str, Tensor]) -> Tensor | None:
    """Which tokens see nothing in some attention, bool [rows, tokens]; None where no mask depends on contents."""
    sites = [site for site in facts.sites if facts.kinds[site.output] == DATA and facts.contents(site)]
    values = evaluate(facts.program.graph_module, [mask.node for site in sites for mask in site.masks], inputs)
    found: Tensor | None = None
    rows = _rows(facts, inputs)
    for site in sites:
        unseen = _unseen(site, values)
        if unseen is not None and unseen.shape[0] % rows == 0:
            here = unseen.reshape(rows, -1, unseen.shape[-1]).any(1)
            found = here if found is None else found | here
    return found


def _unseen(site: AttentionSite, values: Mapping[fx.Node, Tensor]) -> Tensor | None:
    """Which queries see no key, bool [rows or more, tokens]; None for a mask of another layout."""
    rank = len(shape(site.weights))
    if (site.query_axis % rank, site.key_axis % rank) != (rank - 2, rank - 1):
        return None
    seen = torch.ones((), dtype=torch.bool)
    for mask in site.masks:
        seen = seen & mask.visible(values[mask.node])
    if seen.dim() < 3:
        return None
    size = max(seen.shape[-2:])
    seen = seen.expand(*seen.shape[:-2], size, size)
    if site.causal_flag:
        seen = seen.tril()
    return ~seen.any(-1).reshape(seen.shape[0], -1, size).any(1)


def _rows(facts: Causal, inputs: Mapping[str, Tensor]) -> int:
    for node in facts.own:
        place = facts.program.axes.batch_axis(node)
        if place is not None:
            return inputs[str(node.target)].shape[place[0]]
    return 1
