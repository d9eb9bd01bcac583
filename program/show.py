"""A program as text that a person likes to read."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

from torch import fx

from offramp.program.analysis.attention import AttentionSite
from offramp.program.analysis.sites import Site, attentions, block_flops, find_sites
from offramp.program.analysis.stacks import Stack
from offramp.program.graph import ancestors, attribute, is_tensor, placeholders, results, shape, storage_key
from offramp.program.program import Program
from offramp.program.record import Record


def render(program: Program) -> str:
    """Inputs, stacks with their blocks, context and parameters, exits, and outputs, a few lines each."""
    axes = program.axes
    lines = [f"program  {_count(_weights(program, program.graph.nodes))} parameters, {len(program.graph.nodes)} nodes"]
    for name, node in placeholders(program.graph).items():
        lines.append(f"  input   {name:<18} {_type(program, node)}")
    limits = [
        f"{axes.names[symbol]} {low}..{'' if high is None else high}"
        for symbol, (low, high) in axes.ranges.items()
        if symbol in axes.names
    ]
    lines.append(f"  axes    {', '.join(limits) or 'all fixed'}; rows lie on {axes.names.get(axes.batch, 'no axis')}")
    for stack in program.stacks.values():
        lines += _stack(program, stack)
    if not program.stacks:
        lines.append("  no stack (program.require_stacks() says why)")
    for name in program.outputs:
        lines.append(f"  output  {name:<18} {_type(program, results(program.graph)[name])}")
    for item in _records(program, None):
        lines.append(f"  {item.kind:<7} {item.summary(program)}")
    if program.history:
        lines.append(f"  history {', '.join(program.history)}")
    return "\n".join(lines)


def _stack(program: Program, stack: Stack) -> list[str]:
    own = [program.own_nodes(stack, index) for index in range(stack.blocks)]
    sizes = [_count(_weights(program, nodes)) for nodes in own]
    different = len({frozenset(_storages(program, nodes)) for nodes in own})
    hidden = program.nodes[stack.input]
    inside = {node for nodes in own for node in nodes}
    context = sorted(
        {
            arg.name
            for nodes in own
            for node in nodes
            for arg in node.all_input_nodes
            if arg not in inside and _crosses(arg)
        }
        - set(stack.cuts)
    )
    tail, mixing = program.tail_nodes(stack), attentions(program.graph)
    following = program.next_stack(stack.name)
    shared = "" if different == stack.blocks else f", {different} set{'s' * (different > 1)} of weights"
    lines = [
        f"  stack   {stack.name:<18} {stack.blocks} blocks ({stack.role}{shared})  {stack.path or '(no module path)'}"
        + _first(stack, own[0]),
        f"            hidden     {_type(program, hidden)}",
        f"            parameters {_runs(sizes)} a block; tail {_count(_weights(program, tail))}"
        + (f", then stack {following}" if following else ""),
        f"            sites      {_runs([_sites(nodes, mixing) for nodes in own], '; ')}",
        f"            context    {', '.join(context) or 'none'}",
    ]
    for item in _records(program, stack.name):
        lines.append(f"            {item.kind:<10} {item.summary(program)}")
    return lines


def _first(stack: Stack, block: Sequence[fx.Node]) -> str:
    """Which module the first block is, where that is not the first of its list."""
    weights = (str(arg.target) for node in block for arg in node.all_input_nodes if arg.op == "get_attr")
    places = (re.search(rf"(?:^|\.){re.escape(stack.path)}\.(\d+)\.", name) for name in weights)
    at = next((int(found[1]) for found in places if found), 0) if stack.path else 0
    return f" (block 1 is {stack.path}.{at})" if at else ""


def _sites(block: Sequence[fx.Node], mixing: Sequence[AttentionSite]) -> str:
    """The sites of a block: their parameters, and their shares of its floating-point operations."""
    total, found = block_flops(block, mixing), dict[str, list[Site]]()
    for site in find_sites(block, mixing):
        if not site.split:  # those have lines of their own
            found.setdefault(site.kind, []).append(site)
    parts = []
    for kind, sites in found.items():
        parameters, flops = sum(site.parameters for site in sites), sum(site.flops for site in sites)
        times = f"{len(sites)} " if len(sites) > 1 else ""
        parts.append(f"{times}{kind} {_count(parameters)} ({flops / total:.0%})")
    return ", ".join(parts) or "none"


def _records(program: Program, section: str | None) -> list[Record]:
    """The records of a stack, or of none, in the graph's order."""
    order = {name: place for place, name in enumerate(program.nodes)}
    found = [item for item in program.records if item.section == section]
    return sorted(found, key=lambda item: min(map(order.__getitem__, item.pinned_nodes), default=0))


def _crosses(node: fx.Node) -> bool:
    return node.op != "get_attr" and is_tensor(node) and any(arg.op == "placeholder" for arg in ancestors([node]))


def _storages(program: Program, nodes: Iterable[fx.Node]) -> dict[object, int]:
    found: dict[object, int] = {}
    for node in nodes:
        for arg in node.all_input_nodes:
            if arg.op == "get_attr" and is_tensor(arg):
                tensor = attribute(program.graph_module, str(arg.target))
                found[storage_key(tensor)] = tensor.numel()
    return found


def _weights(program: Program, nodes: Iterable[fx.Node]) -> int:
    return sum(_storages(program, nodes).values())


def _count(number: int) -> str:
    for unit, size in (("M", 10**6), ("k", 10**3)):
        if number >= size:
            return f"{number / size:.1f}{unit}"
    return str(number)


def _runs(items: list[str], between: str = ", ") -> str:
    return items[0] if len(set(items)) == 1 else between.join(items)


def _type(program: Program, node: fx.Node) -> str:
    sizes = ", ".join(str(program.axes.describe(size)) for size in shape(node))
    return f"{str(node.meta['val'].dtype).removeprefix('torch.')}[{sizes}]"
