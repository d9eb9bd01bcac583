"""Outputs of which only a run tells how many rows they have (``features[mask]``): generation does without them."""

from __future__ import annotations

from dataclasses import replace

from torch import fx
from torch.fx.experimental.symbolic_shapes import free_unbacked_symbols

from offramp.program.analysis.attention_search import attention_sites
from offramp.program.analysis.token_axes import find_axes
from offramp.program.graph import copied, is_tensor, placeholders, results, shape
from offramp.program.program import Program


def without_unknown_rows(program: Program) -> tuple[Program, tuple[str, ...]]:
    """The program without such outputs, and their names, where rows are computed apart but for them.

    No row of a batch could be taken out of them. Where that helps nothing, or an exit gives them too, it is the given
    program.
    """
    returned = results(program.graph)
    left_out = [name for name in program.outputs if _unknown(returned[name])]
    elsewhere = {name for item in program.exits for name in item.outputs}
    if program.axes.batch is not None or not left_out or elsewhere.intersection(left_out):
        return program, ()
    graph = copied(program.graph)
    graph.output_node().args = ({name: node for name, node in results(graph).items() if name not in left_out},)
    graph.eliminate_dead_code(lambda node: node.op in ("placeholder", "output") or node.name in program.pinned)
    module = fx.GraphModule(program.graph_module, graph, "Program")
    own = {f"{name}_{axis}" for name, node in placeholders(graph).items() for axis in range(len(shape(node)))}
    given = {symbol: name for symbol, name in program.axes.names.items() if name not in own}
    axes = find_axes(module, program.example_inputs, attention_sites(graph), given)
    if axes.batch is None:
        return program, ()
    kept = tuple(name for name in program.outputs if name not in left_out)
    expected = {name: program.example_outputs[name] for name in kept}
    made = replace(program, graph_module=module, outputs=kept, example_outputs=expected, axes=axes)
    return made, tuple(left_out)


def _unknown(node: fx.Node) -> bool:
    return is_tensor(node) and bool(shape(node)) and bool(free_unbacked_symbols(shape(node)[0]))
