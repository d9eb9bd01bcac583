"""A program as text that a person likes to read."""

from __future__ import annotations

from collections.abc import Iterable

from torch import fx

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
    blocks = [program.block_nodes(stack, index) for index in range(stack.blocks)]
    own = [_own(program, nodes) for nodes in blocks]
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
    tail = program.tail_nodes(stack)
    following = program.next_stack(stack.name)
    shared = "" if different == stack.blocks else f", {different} set{'s' * (different > 1)} of weights"
    lines = [
        f"  stack   {stack.name:<18} {stack.blocks} blocks ({stack.role}{shared})  {stack.path or '(no module path)'}",
        f"            hidden     {_type(program, hidden)}",
        f"            parameters {_runs(sizes)} a block; tail {_count(_weights(program, tail))}"
        + (f", then stack {following}" if following else ""),
        f"            context    {', '.join(context) or 'none'}",
    ]
    for item in _records(program, stack.name):
        lines.append(f"            {item.kind:<10} {item.summary(program)}")
    return lines


def _records(program: Program, section: str | None) -> list[Record]:
    """The records of a stack, or of none, in the graph's order."""
    order = {name: place for place, name in enumerate(program.nodes)}
    found = [item for item in program.records if item.section == section]
    return sorted(found, key=lambda item: min(map(order.__getitem__, item.pinned_nodes), default=0))


def _own(program: Program, block: Iterable[fx.Node]) -> list[fx.Node]:
    """A block's nodes, and those that nothing but the block uses (a bias made from its own table, say)."""
    inside = set(block)
    cuts = {name for stack in program.stacks.values() for name in stack.cuts}
    for node in reversed(list(program.graph.nodes)):
        private = node.op == "call_function" and node.name not in cuts
        if private and node not in inside and node.users and all(user in inside for user in node.users):
            inside.add(node)
    return [node for node in program.graph.nodes if node in inside]


def _crosses(node: fx.Node) -> bool:
    return node.op != "get_attr" and is_tensor(node) and any(arg.op == "placeholder" for arg in ancestors([node]))


def _storages(program: Program, nodes: Iterable[fx.Node]) -> dict[object, int]:
    found: dict[object, int] = {}
    for node in nodes:
        for arg in node.all_input_nodes:
            if arg.op == "get_attr":
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


def _runs(items: list[str]) -> str:
    return items[0] if len(set(items)) == 1 else ", ".join(items)


def _type(program: Program, node: fx.Node) -> str:
    sizes = ", ".join(str(program.axes.describe(size)) for size in shape(node))
    return f"{str(node.meta['val'].dtype).removeprefix('torch.')}[{sizes}]"
