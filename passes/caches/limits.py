"""How many tokens a causal program can be rebuilt for."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import fx

from offramp.errors import PassError
from offramp.passes.caches.kinds import CONSTANT, DATA, POSITIONAL
from offramp.program.analysis.lookups import looked_up
from offramp.program.graph import (
    aten,
    dependents,
    expression,
    is_pointwise,
    is_symint,
    is_tensor,
    read_by,
    shape,
    source,
    symbols,
)

if TYPE_CHECKING:
    from offramp.passes.caches.causal import Causal

_LEAST, _FAR = 2, 1 << 17  # tokens: so few, behind places for features, and so many are tried


def limit(facts: Causal) -> int | None:
    """The least of all limits: of the captured range of the axis, of tables of positions, of choices by length.

    Where there may be fewer features before the text than in the example, it is one for the fewest.

    Raises:
        PassError: the example is longer than that.
    """
    captured = facts.program.axes.ranges.get(facts.tokens, (1, None))[1]
    least = min((found for found in (captured, *_tables(facts)) if found is not None), default=None)
    found = _choices(facts, _FAR if least is None else least)
    least = found if found is not None else least
    if least is None:
        return None
    if least - facts.fewer < facts.example:
        most = least - facts.fewer - facts.ahead
        raise PassError(
            f"insert-cache: the model has places for {least - facts.ahead} tokens of text, and the example so many of "
            f"them ({facts.example - facts.ahead}) that none is left where its {facts.ahead} features are fewer",
            hint=f"example inputs of at most {most} tokens of text" if most > 0 else "an example of fewer features",
        )
    return least - facts.fewer


def _tables(facts: Causal) -> list[int]:
    """From tables that positions are looked up in."""
    limits = []
    cuts = [facts.program.nodes[name] for stack in facts.program.stacks.values() for name in stack.cuts[1:]]
    behind = dependents(cuts, facts.program.graph)  # where no position is looked up any more
    found = (item for node in facts.program.graph.nodes for item in looked_up(node))
    for table, axis, index, _ in found:
        if index in behind or facts.kinds[table] != CONSTANT:
            continue
        rows = expression(shape(table)[axis])
        if not isinstance(rows, int):  # made as long as it has to be
            continue
        words: list[int | None] = [None] if facts.kinds[index] == POSITIONAL else []
        if not words and any(_counts(facts, inner) for inner in read_by([index])):
            words += _words(facts)  # of which one is no padding
        for word in words:
            size = rows + 1 + facts.ahead  # more than it has room for, places in front of the text included
            beyond = int(facts.values([index], size, word)[index].max()) - (rows - 1)
            limits += [size - beyond] if beyond > 0 else []
    return limits


def _counts(facts: Causal, node: fx.Node) -> bool:
    """Whether a node counts tokens of every row."""
    if node.target is not aten.cumsum.default or len(shape(node)) != 2:
        return False
    return bool(expression(shape(node)[node.args[1]]) == facts.tokens)  # type: ignore[index]


def _words(facts: Causal) -> list[int]:
    """Two different token ids of the example (or one, if there are no more)."""
    ids = facts.program.example_inputs[next(str(n.target) for n in facts.own if n not in facts.implied)]
    return [int(word) for word in ids.unique()[-2:]]


def _choices(facts: Causal, most: int) -> int | None:
    """The greatest number of tokens, below ``most``, for which what it alone decides is what it is for the example.

    That is one of two tables of frequencies, say, by whether a text is longer than those that the model has seen. What
    is another for each number (a count of tokens) is no choice.

    Raises:
        PassError: the example is longer than where a choice changes.
    """
    nodes, least = [node for node in facts.program.graph.nodes if _decided(facts, node)], facts.ahead + _LEAST
    first = facts.values(nodes, facts.example)

    def others(size: int) -> list[fx.Node]:
        found = facts.values(nodes, size)
        return [node for node in nodes if not torch.equal(*map(torch.as_tensor, (found[node], first[node])))]

    near = [others(facts.example + more) for more in (-1, 1) if least <= facts.example + more <= most]
    nodes = [node for node in nodes if not all(node in other for other in near)]

    if changed := others(least):
        raise PassError(
            f"insert-cache: for the example's {facts.example} tokens the model takes other numbers than for few tokens "
            f"({source(changed[0])}), so that those of a text's first tokens would change with its length",
            hint="example inputs of fewer tokens: what is cached is then for texts up to where the numbers change",
        )
    return _last(lambda size: not others(size), facts.example, most) if nodes else None


def _decided(facts: Causal, node: fx.Node) -> bool:
    """Whether a value depends on the number of tokens, has no axis of them, and is read by what has, or by data."""
    if is_symint(node):
        return facts.tokens in symbols(node.meta["val"]) and any(map(is_pointwise, node.users))
    if facts.kinds.get(node) != POSITIONAL or not is_tensor(node) or _axes(facts, node):
        return False
    if not any(facts.kinds.get(user) == DATA or _axes(facts, user) for user in node.users):
        return False
    return all(_axes(facts, inner) < 2 for inner in read_by([node]))  # of many tokens those are too large


def _axes(facts: Causal, node: fx.Node) -> int:
    """How many axes of tokens a node's value has."""
    return sum(facts.tokens in symbols(size) for size in shape(node)) if is_tensor(node) else 0


def _last(holds: Callable[[int], bool], known: int, most: int) -> int | None:
    """The last number up to which it holds, as it does for ``known``; None if that is ``most`` or more."""
    beyond = known
    while holds(beyond):
        if beyond >= most:
            return None
        known, beyond = beyond, min(2 * beyond, most)
    while beyond - known > 1:
        middle = (known + beyond) // 2
        known, beyond = (middle, beyond) if holds(middle) else (known, middle)
    return known
