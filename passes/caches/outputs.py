"""Which output of a causal program generation reads: logits of the next token, from the causal stack alone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import fx

from offramp.errors import PassError
from offramp.passes.caches.causal import Causal
from offramp.passes.caches.kinds import CHUNK, CONSTANT, DATA, POSITIONAL
from offramp.program.graph import (
    ancestors,
    aten,
    expression,
    is_tensor,
    placeholders,
    results,
    shape,
    sizes_of,
    symbols,
)
from offramp.program.program import Program


def logits_of(facts: Causal, last: set[fx.Node]) -> str:
    """The output that generation reads: float [rows, tokens, V], or of the last token alone [rows, V], [rows, 1, V].

    ``last`` are the nodes that take the last token's place. Where several outputs fit, it is the one called "logits",
    or else the only one that has a class for each token id.

    Raises:
        PassError: no output fits, or several do; a stack reads the tokens that does not make the logits.
    """
    program = facts.program
    returned = results(program.graph)
    stacks = [stack for stack in program.stacks.values() if facts.kinds[program.nodes[stack.input]] == DATA]
    ends = [program.nodes[stack.output] for stack in stacks]
    causal = {end for stack, end in zip(stacks, ends, strict=True) if stack.role == "decoder"}
    known = vocabulary(facts.own)
    found = {name: int(shape(returned[name])[-1]) for name in program.outputs if _fits(facts, returned[name], last)}
    found = {name: size for name, size in found.items() if causal & ancestors([returned[name]])}
    if "logits" in program.outputs and "logits" not in found:  # pooled: what lies beside them are hidden states
        found = {name: size for name, size in found.items() if size == known}
    if not found:
        sizes = [f"{name} {[program.axes.describe(s) for s in shape(returned[name])]}" for name in program.outputs]
        raise PassError(
            f"insert-cache: no output is logits of each token, or of the last one, from a causal stack: "
            f"{', '.join(sizes)}",
            hint="leave insert-cache out, unless the model generates text: then return logits "
            "[batch, tokens, vocabulary]",
        )
    name = _chosen(found, known)
    inside = ancestors([returned[name]])
    if apart := [stack.name for stack, end in zip(stacks, ends, strict=True) if end not in inside]:
        raise PassError(
            f"insert-cache: the stacks {apart} read the tokens, but {name!r}, which generation reads, does not depend "
            "on them",
            hint="leave insert-cache out, or return what one stack of causal blocks makes",
        )
    return name


def vocabulary(inputs: Sequence[fx.Node]) -> int | None:
    """How many token ids there are: the rows of the smallest table that inputs are looked up in; None if in none."""
    tables = [user.args[0] for node in inputs for user in node.users if user.target is aten.embedding.default]
    return min((int(shape(table)[0]) for table in tables if isinstance(table, fx.Node)), default=None)


def why_no_generation(program: Program) -> str | None:
    """Why a program with caches does not generate text: all that ``save`` refuses; None where it does.

    A caller who has not asked for caches wants them only where ``logits`` have a class for (about) every token id.
    """
    cache = program.cache
    assert cache is not None
    nodes = placeholders(program.graph)
    inputs = [nodes[name] for name in cache.tokens]
    if len(inputs) != 1 or inputs[0].meta["val"].dtype not in (torch.int64, torch.int32):
        return f"generation extends one input of token ids; the tokens of this model are {list(cache.tokens)}"
    known, node = vocabulary(inputs), results(program.graph)[cache.logits]
    classes = int(shape(node)[-1])
    if known is not None and abs(classes - known) > max(4, known // 10):  # heads are padded, ids of padding added
        return f"output {cache.logits!r} has {classes} classes, not one for each of the {known} token ids"
    rows = 1 if program.axes.batch is None else program.axes.batch
    first = [rows, expression(shape(inputs[0])[program.chunk_axis])]
    for stack in program.stacks.values():
        hidden = program.nodes[stack.input]
        sizes = [program.axes.describe(size) for size in shape(hidden)]
        if stack.role == "decoder" and (sizes_of(hidden)[:2] != first or len(sizes) != 3):
            return f"the hidden state of stack {stack.name}, of shape {sizes}, does not have rows and tokens first"
    return None


def _chosen(found: Mapping[str, int], known: int | None) -> str:
    if "logits" in found or len(found) == 1:
        return "logits" if "logits" in found else next(iter(found))
    full = [name for name, size in found.items() if size == known]
    if len(full) != 1:
        raise PassError(
            f"insert-cache: which output is the logits of the next token? {full or list(found)} could be",
            hint='a dictionary in which one of them is called "logits"',
        )
    return full[0]


def _fits(facts: Causal, node: fx.Node, last: set[fx.Node]) -> bool:
    """Whether a node holds numbers for a fixed set of classes, of each token or of the last one."""
    if not is_tensor(node) or facts.kinds.get(node) != DATA or not node.meta["val"].is_floating_point():
        return False
    sizes = sizes_of(node)
    batch = facts.program.axes.batch
    if len(sizes) < 2 or not isinstance(sizes[-1], int) or sizes[-1] < 2:
        return False
    if facts.tokens in sizes:
        return len(sizes) == 3 or batch is None
    if batch is None or sizes[:-1] not in ([batch], [batch, 1]):
        return False
    inner = ancestors([node], stop=last)
    cuts = {facts.program.nodes[cut] for stack in facts.program.stacks.values() for cut in stack.cuts}
    behind = {cut for cut in cuts if facts.kinds[cut] == DATA} - last
    return bool(inner & last) and not inner & behind


def last_places(facts: Causal) -> set[fx.Node]:
    """The nodes behind all attention that take the place of the last token: ``x[:, -1]``, ``x[:, [-1]]`` and so on."""
    mixed = [site.output for site in facts.sites if facts.kinds[site.output] == DATA]
    before = ancestors([node for node in mixed if facts.tokens in {s for size in shape(node) for s in symbols(size)}])
    return {node for node in facts.program.graph.nodes if node not in before and _takes_last(facts, node)}


def _takes_last(facts: Causal, node: fx.Node) -> bool:
    if node.op != "call_function" or facts.kinds.get(node) != DATA or not node.args:
        return False
    first: Any = node.args[0]
    if not isinstance(first, fx.Node) or not is_tensor(first):
        return False
    axes = [axis for axis, size in enumerate(shape(first)) if expression(size) == facts.tokens]
    if len(axes) != 1:
        return False
    args: Any = node.args
    if node.target is aten.select.int:
        return bool(int(args[1]) % len(shape(first)) == axes[0] and _is_last(facts, args[2]))
    if node.target is aten.slice.Tensor and len(args) > 2:
        whole = len(args) < 4 or args[3] is None or _beyond(facts, args[3])
        return bool(int(args[1]) % len(shape(first)) == axes[0] and whole and _is_last(facts, args[2]))
    if node.target is aten.index.Tensor and len(args[1]) > axes[0]:
        index = args[1][axes[0]]
        return index is not None and _names_last(facts, index)
    return False


def _is_last(facts: Causal, place: Any) -> bool:
    if isinstance(place, fx.Node):
        return bool(expression(place.meta["val"]) - facts.tokens == -1)
    return bool(place == -1)


def _beyond(facts: Causal, end: Any) -> bool:
    if isinstance(end, fx.Node):
        return bool(expression(end.meta["val"]) == facts.tokens)
    return bool(end > 2**40)


def _names_last(facts: Causal, index: fx.Node) -> bool:
    """Whether an index is the last place, however many tokens there are."""
    if facts.kinds[index] not in (CONSTANT, POSITIONAL, CHUNK):
        return False
    for size in (facts.example, facts.example + 1):
        if facts.limit is not None and size > facts.limit:
            continue
        places = facts.values([index], size)[index]
        if places.dtype not in (torch.int64, torch.int32) or not bool(((places == -1) | (places == size - 1)).all()):
            return False
    return True
