"""The verifier: small named checks that every program passes before and after every pass."""

from __future__ import annotations

from collections.abc import Callable

from offramp.errors import PassError
from offramp.program.graph import (
    ancestors,
    attribute,
    dependents,
    is_symint,
    is_tensor,
    placeholders,
    results,
    shape_key,
)
from offramp.program.program import Program

Check = Callable[[Program], str | None]


def graph_is_sound(program: Program) -> str | None:
    """Nodes are in order, and every weight that is read exists."""
    try:
        program.graph.lint()
        for node in program.graph.find_nodes(op="get_attr"):
            attribute(program.graph_module, str(node.target))
    except (RuntimeError, AttributeError, AssertionError) as error:
        return str(error)
    return None


def values_have_shapes(program: Program) -> str | None:
    """Every node knows the shape and dtype of its value."""
    bare = [
        node.name
        for node in program.graph.nodes
        if node.op != "output"
        and not is_tensor(node)
        and not is_symint(node)
        and not isinstance(node.meta.get("val"), (tuple, list))
    ]
    return f"nodes without a shape: {bare[:5]}" if bare else None


def outputs_are_there(program: Program) -> str | None:
    """The graph returns the model's outputs and everything that records name."""
    known = set(results(program.graph))
    named = {*program.outputs}.union(*(item.graph_outputs for item in program.records))
    missing = sorted(named - known)
    unnamed = sorted(known - named)
    if missing or unnamed:
        return f"missing outputs {missing}, outputs that nothing names {unnamed}"
    return None


def cuts_are_closed(program: Program) -> str | None:
    """What comes after a cut reads from before it only through the cut (or values made before the stack)."""
    returned = results(program.graph)
    for stack in program.stacks.values():
        missing = [name for name in stack.cuts if name not in program.nodes]
        if missing:
            return f"stack {stack.name} has lost the nodes {missing}"
        for index, name in enumerate(stack.cuts[1:], 1):
            before = dependents([program.nodes[stack.cuts[index - 1]]], program.graph)
            inside = before & ancestors([program.nodes[name]]) - {program.nodes[name]}
            after = ancestors(
                [node for output, node in returned.items() if output in program.outputs], stop=[program.nodes[name]]
            )
            leaks = (inside & after) - {program.nodes[name]}
            if leaks:
                node = min(leaks, key=lambda leak: leak.name)
                return f"{node.name} is made in block {index - 1} of stack {stack.name} and used after it"
    return None


def records_have_their_nodes(program: Program) -> str | None:
    """Every node that a record pins is in the graph."""
    for item in program.records:
        if missing := [name for name in item.pinned_nodes if name not in program.nodes]:
            return f"{item.kind} {item.summary(program)}: has lost the nodes {missing}"
    return None


def exits_are_early(program: Program) -> str | None:
    """An exit reads nothing that deeper blocks of its stack make."""
    for item in program.exits:
        stack = program.stacks[item.stack]
        if item.hidden != stack.cuts[item.after]:
            return f"exit {item.stack}.{item.after} does not leave at its block"
        if item.after == stack.blocks or item.state not in program.nodes:
            continue
        deeper = {program.nodes[name] for name in stack.cuts[item.after + 1 :]}
        made = [node for name, node in results(program.graph).items() if name in item.graph_outputs]
        late = ancestors([program.nodes[item.state], *made]) & deeper
        if late:
            return f"exit {item.stack}.{item.after} waits for {sorted(node.name for node in late)}"
    return None


def caches_are_there(program: Program) -> str | None:
    """Inputs of a program with caches exist, and a cache and what replaces it have one shape and dtype."""
    if program.cache is None:
        return None
    cache, inputs, returned = program.cache, placeholders(program.graph), results(program.graph)
    missing = [name for name in (*cache.tokens, cache.lengths, cache.places, *cache.buffers) if name not in inputs]
    if missing:
        return f"the graph has no inputs {missing}"
    for name, made in cache.buffers.items():
        if made in returned and shape_key(inputs[name]) != shape_key(returned[made]):
            return f"{name} is {shape_key(inputs[name])}, and {made} that replaces it is {shape_key(returned[made])}"
    return None


CHECKS: dict[str, Check] = {
    check.__name__.replace("_", "-"): check
    for check in (
        graph_is_sound,
        values_have_shapes,
        outputs_are_there,
        cuts_are_closed,
        records_have_their_nodes,
        exits_are_early,
        caches_are_there,
    )
}


def verify(program: Program, where: str) -> None:
    """Run every check.

    Raises:
        PassError: naming each check that failed, what it found, and ``where``.
    """
    failed = {name: found for name, check in CHECKS.items() if (found := check(program)) is not None}
    if failed:
        text = "; ".join(f"{name}: {found}" for name, found in failed.items())
        raise PassError(f"{where}: {text}", hint="set OFFRAMP_DUMP=dir to see the graph before and after each pass")
