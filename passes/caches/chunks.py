"""A program with caches, run in chunks that differ from row to row: what ``insert-cache`` is checked with."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import fx

from offramp.errors import PassError
from offramp.passes.caches.ahead import with_places_ahead
from offramp.passes.caches.fully_masked import comparable_outputs
from offramp.program.compare import TOLERANCE, relative_error
from offramp.program.graph import dependents, placeholders, results, run, sizes_of
from offramp.program.program import Program

_BLIND = (
    "; some tokens see no key (padding whose own queries are masked), so all weigh the same, later ones too",
    "hide padding as keys, (ids != pad)[:, None, None, :], not as queries; or padding at the end of examples only",
)
_HINT = "something else than attention mixes the tokens, or positions depend on the number of tokens"


def check_chunks(before: Program, after: Program) -> float:
    """The largest relative error of the incremental program against one pass of ``before``.

    All its outputs in one pass with empty caches, and those of each token in random chunks; logits of the last token
    alone at the end of every chunk, against as many tokens in one pass; tokens that see nothing as in
    `comparable_outputs`.

    Raises:
        PassError: it is above 1e-4.
    """
    assert after.cache is not None
    before, *_ = with_places_ahead(before)
    inputs = {name: value for name, value in after.example_inputs.items() if name in after.inputs}
    expected = _pass(before, after, inputs)
    try:
        found = in_chunks(after, inputs)
        ends = _ends(before, after, inputs) if after.cache.logits not in found else []
    except (RuntimeError, IndexError) as cause:
        raise PassError(f"insert-cache: the program does not run on chunks of tokens: {cause}", hint=_HINT) from cause
    with torch.no_grad():
        made = after.module(**after.fresh(inputs))
    errors = [_error(after.cache.logits, "in chunks", *pair) for pair in ends]
    one = {name: made[name] for name in after.outputs}
    for how, values in (("in chunks", found), ("in one chunk", one)):
        try:
            errors += [_error(name, how, value, expected[name]) for name, value in values.items()]
        except PassError:
            pair = comparable_outputs(before, {**inputs, **after.implied(inputs)}, expected, values)
            if pair is None:
                raise
            errors += [_error(name, how, pair[1][name], pair[0][name], _BLIND) for name in values]
    return max(errors)


def _pass(before: Program, after: Program, inputs: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    with torch.no_grad():
        found: dict[str, torch.Tensor] = before.module(**inputs, **after.implied(inputs))
    return found


def _error(
    name: str, how: str, found: torch.Tensor, expected: torch.Tensor, reason: Sequence[str] = ("", _HINT)
) -> float:
    """The error of an output, relative to its scale."""
    if found.shape != expected.shape:
        sizes = list(found.shape), list(expected.shape)
        raise PassError(f"insert-cache: {how}, output {name!r} has shape {sizes[0]}, not {sizes[1]}", hint=_HINT)
    error = relative_error(found, expected)
    if not error <= TOLERANCE:
        raise PassError(
            f"insert-cache: {how}, output {name!r} differs from one pass: relative error {error:.1e}{reason[0]}",
            hint=reason[1],
        )
    return error


def in_chunks(program: Program, inputs: dict[str, torch.Tensor], seed: int = 0) -> dict[str, torch.Tensor]:
    """The outputs of each token, and those made once, in random chunks of the tokens that differ from row to row."""
    cache = program.cache
    assert cache is not None
    chunk, total = _tokens(program, inputs)
    returned = results(program.graph)
    wholes: dict[str, torch.Tensor] = {}
    for lengths, counts, made in _steps(program, inputs, seed):
        for name in program.outputs:
            sizes = sizes_of(returned[name])
            if name in cache.whole or (name == cache.logits and chunk not in sizes):
                continue
            place = program.axes.batch_axis(returned[name]) or _only_row(program, sizes)
            if chunk not in sizes or place is None:
                wholes[name] = made[name]
            else:
                _put(wholes, name, made[name], (place[0], sizes.index(chunk)), total, lengths, counts)
    return wholes


def _only_row(program: Program, sizes: Sequence[Any]) -> tuple[int, int] | None:
    """The axis that the one row has of a program without a batch axis."""
    return (0, 1) if program.axes.batch is None and sizes[0] == 1 else None


def _ends(before: Program, after: Program, inputs: dict[str, torch.Tensor]) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Logits of the last token of each chunk that fills its row, and those of one pass over the tokens up to it."""
    assert after.cache is not None
    nodes, (chunk, _) = placeholders(after.graph), _tokens(after, inputs)
    found = []
    for lengths, counts, made in _steps(after, inputs, 0):
        for row in torch.nonzero((counts == counts.max()) & (lengths + counts >= after.cache.least)).flatten().tolist():
            cut = dict(inputs)
            for name in after.cache.tokens:
                axis = sizes_of(nodes[name]).index(chunk)
                cut[name] = inputs[name].narrow(axis, 0, int(lengths[row] + counts[row]))
            expected = _pass(before, after, cut)[after.cache.logits]
            found.append((made[after.cache.logits][row], expected[row]))
    return found


def _tokens(program: Program, inputs: dict[str, torch.Tensor]) -> tuple[Any, int]:
    """The symbol of the chunk's axis, and how many tokens the inputs have."""
    assert program.cache is not None
    name = program.cache.tokens[0]
    sizes = sizes_of(placeholders(program.graph)[name])
    chunk = next(size for size in sizes if size in program.axes.tokens)
    return chunk, inputs[name].shape[sizes.index(chunk)]


def _steps(
    program: Program, inputs: dict[str, torch.Tensor], seed: int
) -> Iterator[tuple[torch.Tensor, torch.Tensor, dict[str, torch.Tensor]]]:
    """Random chunks: how many tokens each row had, how many it gets, and what the program made of them."""
    cache = program.cache
    assert cache is not None
    chunk, total = _tokens(program, inputs)
    module = _without_whole(program)
    nodes = placeholders(module.graph)
    axes = {name: sizes_of(nodes[name]).index(chunk) for name in cache.tokens}
    widest = min(total, 4)
    generator = torch.Generator().manual_seed(seed)
    first = cache.least if cache.prompt is not None and cache.prompt.whole else 1
    widest = max(widest, first)
    capacity = total + widest if cache.limit is None else min(total + widest, cache.limit)
    state = program.fresh(inputs, capacity)
    state |= _prompt(program, state, total, generator)
    rows = state[cache.lengths].shape[0]
    step = _Step(module, state, {*cache.tokens, cache.lengths, *cache.buffers})
    while int(state[cache.lengths].min()) < total:
        lengths = state[cache.lengths]
        counts = torch.randint(1, widest + 1, (rows,), generator=generator)
        counts = torch.minimum(torch.where(lengths == 0, counts.clamp(min=first), counts), total - lengths)
        if int(lengths.max() + counts.max()) > capacity:  # what a shorter row is filled up with must have room
            unfinished = lengths < total
            together = min(int(counts[unfinished].min()), total - int(lengths[unfinished].max()))
            counts = torch.where(unfinished, together, 0)
        places = (lengths[:, None] + torch.arange(int(counts.max()))).clamp(max=total - 1)
        given = dict(state)
        for name in cache.tokens:
            given[name] = _taken(program, nodes[name], inputs[name], places, axes[name])
        made = step(given)
        yield lengths, counts, made
        state |= {name: made[output] for name, output in cache.buffers.items()}
        state[cache.lengths] = lengths + counts


def _prompt(
    program: Program, state: Mapping[str, torch.Tensor], total: int, generator: torch.Generator
) -> dict[str, torch.Tensor]:
    """A prompt of random length for each row; the tokens behind it are text."""
    assert program.cache is not None
    prompt = program.cache.prompt
    if prompt is None:
        return {}
    lengths = torch.randint(program.cache.least, total + 1, state[prompt.lengths].shape, generator=generator)
    inside = torch.arange(total) < lengths[:, None]
    fillers = {prompt.tokens: prompt.filler, **prompt.given}
    made = {name: torch.where(inside, state[name], filler) for name, filler in fillers.items()}
    return {prompt.lengths: lengths, **made}


class _Step:
    """A graph that runs again and again on inputs of which few change: what is made of the others is made once."""

    def __init__(self, module: fx.GraphModule, inputs: Mapping[str, torch.Tensor], changing: set[str]) -> None:
        self._module, self._returned = module, results(module.graph)
        self._nodes = placeholders(module.graph)
        changed = {self._nodes[name] for name in changing}
        for node in module.graph.nodes:
            if node.op == "call_function" and not changed.isdisjoint(node.all_input_nodes):
                changed.add(node)
        calls = [node for node in module.graph.nodes if node.op not in ("placeholder", "output")]
        self._again = [node for node in calls if node in changed]
        needed = {arg for node in self._again for arg in node.all_input_nodes}.union(self._returned.values())
        given: dict[fx.Node, Any] = {node: inputs[name] for name, node in self._nodes.items()}
        with torch.no_grad():
            made = run(module, [node for node in calls if node not in changed], given, needed.__contains__)
        self._once = {node: value for node, value in made.items() if node not in changed}

    def __call__(self, inputs: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """What the graph returns."""
        values = self._once | {node: inputs[name] for name, node in self._nodes.items()}
        with torch.no_grad():
            made = run(self._module, self._again, values, {*self._returned.values()}.__contains__)
        return {name: made[node] for name, node in self._returned.items()}


def _without_whole(program: Program) -> fx.GraphModule:
    """The program's module without the outputs that need all tokens at once."""
    assert program.cache is not None
    if not program.cache.whole:
        return program.graph_module
    gone = {*program.cache.whole}
    gone |= {item.outputs[name] for item in program.exits for name in program.cache.whole if name in item.outputs}
    kept = {name: node for name, node in results(program.graph).items() if name not in gone}
    graph = fx.Graph()
    copies: dict[fx.Node, fx.Node] = {}
    graph.graph_copy(program.graph, copies)
    graph.output({name: copies[node] for name, node in kept.items()})
    graph.eliminate_dead_code(lambda node: node.op in ("placeholder", "output"))
    return fx.GraphModule(program.graph_module, graph, "Chunks")


def _taken(program: Program, node: fx.Node, value: torch.Tensor, places: torch.Tensor, axis: int) -> torch.Tensor:
    place = program.axes.batch_axis(node)
    if place is None:
        return value.index_select(axis, places[0])
    rows = [value.select(place[0], row).index_select(axis - (axis > place[0]), at) for row, at in enumerate(places)]
    return torch.stack(rows, place[0])


def _put(
    wholes: dict[str, torch.Tensor],
    name: str,
    made: torch.Tensor,
    axes: tuple[int, int],
    total: int,
    lengths: torch.Tensor,
    counts: torch.Tensor,
) -> None:
    batch, axis = axes
    if name not in wholes:
        sizes = list(made.shape)
        sizes[axis] = total
        wholes[name] = made.new_zeros(sizes)
    for row, (start, count) in enumerate(zip(lengths.tolist(), counts.tolist(), strict=True)):
        whole = wholes[name].select(batch, row).movedim(axis - (axis > batch), 0)
        whole[start : start + count] = made.select(batch, row).movedim(axis - (axis > batch), 0)[:count]


def cached_stacks(program: Program) -> set[str]:
    """The stacks whose blocks keep keys and values."""
    if program.cache is None:
        return set()
    reached = dependents([program.nodes[name] for name in program.cache.buffers], program.graph)
    return {name for name, stack in program.stacks.items() if program.nodes[stack.output] in reached}
