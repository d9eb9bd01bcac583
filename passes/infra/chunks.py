"""A program with caches, run in chunks that differ from row to row: what ``insert-cache`` is checked with."""

from __future__ import annotations

import torch
from torch import fx

from offramp.program.graph import dependents, expression, placeholders, results, shape
from offramp.program.program import Program
from offramp.runtime.errors import PassError

TOLERANCE = 1e-4


def check_chunks(before: Program, after: Program) -> float:
    """The largest relative error of the incremental program in random chunks against one pass.

    Raises:
        PassError: it is above 1e-4.
    """
    assert after.cache is not None
    inputs = {name: value for name, value in after.example_inputs.items() if name in after.inputs}
    with torch.no_grad():
        expected = before.module(**inputs, **after.implied(inputs))
    hint = "something else than attention mixes the tokens, or positions depend on the number of tokens"
    try:
        found = in_chunks(after, inputs)
    except (RuntimeError, IndexError) as cause:
        raise PassError(f"insert-cache: the program does not run on chunks of tokens: {cause}", hint=hint) from cause
    worst = 0.0
    for name in after.outputs:
        if found[name].shape != expected[name].shape:
            sizes = list(found[name].shape), list(expected[name].shape)
            raise PassError(f"insert-cache: in chunks, output {name!r} has shape {sizes[0]}, not {sizes[1]}", hint=hint)
        scale = float(expected[name].abs().max()) or 1.0
        error = float((found[name] - expected[name]).abs().max()) / scale
        worst = max(worst, error)
        if not error <= TOLERANCE:
            raise PassError(
                f"insert-cache: in chunks, output {name!r} differs from one pass: relative error {error:.1e}", hint=hint
            )
    return worst


def in_chunks(program: Program, inputs: dict[str, torch.Tensor], seed: int = 0) -> dict[str, torch.Tensor]:
    """The outputs of a program with caches, the tokens given in random chunks that differ from row to row."""
    cache = program.cache
    assert cache is not None
    nodes = placeholders(program.graph)
    token_axis = {
        name: next(i for i, size in enumerate(shape(nodes[name])) if expression(size) in program.axes.tokens)
        for name in cache.tokens
    }
    first = inputs[cache.tokens[0]]
    total = first.shape[token_axis[cache.tokens[0]]]
    widest = min(total, 4)
    capacity = total + widest if cache.limit is None else min(total + widest, cache.limit)
    state = program.fresh(inputs, capacity)
    rows = state[cache.lengths].shape[0]
    generator = torch.Generator().manual_seed(seed)
    wholes: dict[str, torch.Tensor] = {}
    while int(state[cache.lengths].min()) < total:
        lengths = state[cache.lengths]
        counts = torch.minimum(torch.randint(1, widest + 1, (rows,), generator=generator), total - lengths)
        if int(lengths.max() + counts.max()) > capacity:  # what a shorter row is filled up with must have room
            unfinished = lengths < total
            together = min(int(counts[unfinished].min()), total - int(lengths[unfinished].max()))
            counts = torch.where(unfinished, together, 0)
        chunk = int(counts.max())
        places = (lengths[:, None] + torch.arange(chunk)).clamp(max=total - 1)
        given = dict(state)
        for name in cache.tokens:
            given[name] = _taken(program, nodes[name], inputs[name], places, token_axis[name])
        with torch.no_grad():
            made = program.module(**given)
        for name in program.outputs:
            _put(wholes, name, made[name], program, total, lengths, counts)
        state |= {name: made[output] for name, output in cache.buffers.items()}
        state[cache.lengths] = lengths + counts
    return wholes


def _axes_of(program: Program, node: fx.Node) -> tuple[int | None, int | None]:
    """The batch axis of a node, and the axis of the chunk."""
    place = program.axes.batch_axis(node)
    chunk = [i for i, size in enumerate(shape(node)) if expression(size) in program.axes.tokens]
    return (place[0] if place else None), (chunk[0] if chunk else None)


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
    program: Program,
    total: int,
    lengths: torch.Tensor,
    counts: torch.Tensor,
) -> None:
    batch, axis = _axes_of(program, results(program.graph)[name])
    if axis is None or batch is None:
        wholes[name] = made
        return
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
