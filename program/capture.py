"""A model becomes a program: its forward traced, brought into canonical form, compared with eager torch, analysed."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

import torch
from torch import fx

from offramp.errors import CaptureError
from offramp.program.canonical.complex_pairs import made_real
from offramp.program.canonical.equal_lengths import equal_lengths
from offramp.program.canonical.simplify import canonicalize
from offramp.program.canonical.wide import made_wide
from offramp.program.compare import unlike
from offramp.program.dropout import same_as_eval, switch_off
from offramp.program.forward import ExampleInputs, doubled, eager, named_inputs, returning_tensors
from offramp.program.graph import expression, results, shape
from offramp.program.of_mapping import by_names
from offramp.program.program import Program, analyse
from offramp.program.sizes import where_the_same, with_limits
from offramp.program.tracing import Dynamic, exported, flattened
from offramp.program.unwrap import as_captured, plain

log = logging.getLogger(__name__)


def capture(
    module: Any, example_inputs: ExampleInputs, dynamic: Dynamic | None = None, *, training: bool = False
) -> Program:
    """Capture the forward of ``module`` as a program, and find its axes and stacks.

    Args:
        module: any ``nn.Module`` (a ``torch.fx.GraphModule`` too) whose forward takes and returns tensors, or what
            `offramp.program.unwrap.plain` makes one of: a compiled or data-parallel module, an ``ExportedProgram``, a
            pipeline. It is captured in eval mode and, where a ``config`` says otherwise, without a cache, hidden states
            and tuples; its mode and its configuration are restored. Its weights are shared, except those of a model in
            half or double precision or on another device: it is captured as a float32 copy on the CPU.
        example_inputs: tensors by the names of the forward's parameters, or in their order (floating point becomes
            float32, None is left out); of a forward that takes one mapping, what is in that. Use a batch of at
            least two rows and sizes that differ from each other; a batch of one row is doubled for capture, unless the
            model's code fixes the number of rows.
        dynamic: names of the axes that may vary, ``{"input_ids": {0: "batch", 1: "tokens"}}``; every other
            axis is then fixed. None lets every axis vary that the model lets vary (of inputs with four or
            more axes, such as images, only the first).
        training: keep the model's dropout, for ``program.module`` in training mode; all else sees the model as it
            is in eval mode.

    Raises:
        CaptureError: the forward cannot be captured (control flow that depends on data, say), returns
            something that is no tensor, number or text, or changes its buffers; or, for ``training``, it differs
            from the eval forward by more than dropout.
        ForwardError: the forward fails on the example inputs, whoever calls it.
    """
    module, example_inputs = by_names(plain(module), example_inputs)
    inputs = named_inputs(module, example_inputs)
    if dynamic is not None:
        dynamic = _counted(dynamic, inputs)
    with as_captured(module), returning_tensors(module, inputs) as left_out:
        given = inputs
        if dynamic is None:
            inputs = doubled(module, inputs)
        module.train(training)
        traced = exported(module, inputs, dynamic)  # before any call: models cache tables of the first length
        if inputs is not given and fixes_rows(traced.graph, inputs):
            inputs, traced = given, exported(module, given, dynamic)
        module.eval()

        def answers(inputs: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
            return {name: value for name, value in eager(module, inputs).items() if name not in left_out}

        expected = answers(inputs)
        if broken := [name for name, value in expected.items() if value.isnan().any()]:
            log.warning("for the example inputs the model gives NaN: %s", ", ".join(broken))
        graph_module = flattened(traced, inputs, list(expected))
        if training:
            switch_off(graph_module.graph)
        canonicalize(graph_module)
        if made_real(graph_module) | made_wide(graph_module.graph) | equal_lengths(graph_module.graph):
            canonicalize(graph_module)
        _rename_like_outputs(graph_module)
        if training:
            same_as_eval(graph_module, inputs, expected)
        else:
            _same_as_eager(graph_module, inputs, expected)
        example = {
            name: inputs[name] for name in [str(n.target) for n in graph_module.graph.find_nodes(op="placeholder")]
        }
        names = _axis_names(graph_module, dynamic)
        return where_the_same(with_limits(analyse(graph_module, example, expected, names)), answers)


def fixes_rows(graph: fx.Graph, inputs: Mapping[str, torch.Tensor]) -> bool:
    """Whether all inputs have several rows, and the graph takes so many of some and no others."""
    nodes = {str(node.target): node for node in graph.find_nodes(op="placeholder")}
    return all(value.dim() and value.shape[0] > 1 for value in inputs.values()) and any(
        isinstance(expression(shape(nodes[name])[0]), int) for name in inputs if name in nodes
    )


def _counted(dynamic: Dynamic, inputs: Mapping[str, torch.Tensor]) -> Dynamic:
    """``dynamic`` with axes counted from the front; names and axes that are not there are errors."""
    unknown = sorted(set(dynamic) - set(inputs))
    if unknown:
        raise CaptureError(f"dynamic names inputs {unknown}, the example inputs are {sorted(inputs)}")
    places = [(name, axis, inputs[name].dim()) for name, axes in dynamic.items() for axis in axes]
    if wrong := [f"axis {axis} of {name}" for name, axis, rank in places if not -rank <= axis < rank]:
        raise CaptureError(f"dynamic names axes that are not there: {', '.join(wrong)}")
    return {name: {axis % inputs[name].dim(): word for axis, word in axes.items()} for name, axes in dynamic.items()}


def _rename_like_outputs(graph_module: fx.GraphModule) -> None:
    """No inner node has the name of an output that is another node: objectives ask for both by name."""
    returned = results(graph_module.graph)
    nodes = [node for node in graph_module.graph.nodes if node.op == "call_function"]
    if alike := [node for node in nodes if returned.get(node.name, node) is not node]:
        for node in alike:
            node._rename(f"{node.name}_inside")
        graph_module.recompile()


def _same_as_eager(
    graph_module: fx.GraphModule, inputs: Mapping[str, torch.Tensor], expected: Mapping[str, torch.Tensor]
) -> None:
    """Raise where the graph computes something else than the model: some code asks whether it is being traced.

    A model that draws random numbers is let through: no two of its answers are the same.
    """
    given = {str(n.target): inputs[str(n.target)] for n in graph_module.graph.find_nodes(op="placeholder")}
    with torch.no_grad():
        errors = unlike(graph_module(**given), lambda: graph_module(**given), expected)
    if not errors:
        return
    raise CaptureError(
        f"the captured graph computes something else than the model: {', '.join(errors)}",
        hint="the model's code takes another way while it is traced, for masks that are left out for example: "
        "give every input that the model's own processor makes",
    )


def _axis_names(graph_module: fx.GraphModule, dynamic: Dynamic | None) -> dict[Any, str]:
    """The names that the user gave to axes, by symbol; an axis that the model fixes is an error."""
    names: dict[Any, str] = {}
    if dynamic is None:
        return names
    for node in graph_module.graph.find_nodes(op="placeholder"):
        for axis, name in dynamic.get(str(node.target), {}).items():
            size = shape(node)[axis]
            if isinstance(expression(size), int):
                raise CaptureError(
                    f"axis {axis} of {node.target} ({name}) is fixed at {expression(size)} by the model",
                    hint="leave it out of dynamic, or give example inputs whose sizes are larger than one",
                )
            others = [symbol for symbol, known in names.items() if known == name and symbol != expression(size)]
            if others:
                raise CaptureError(
                    f"the axes called {name!r} are not the same for the model: axis {axis} of {node.target} is another",
                    hint="give axes that vary apart names of their own",
                )
            names[expression(size)] = name
    return names
