"""torch's exporter to ONNX, with its registry of translations built once and not for every call."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from functools import cache
from typing import Any

import onnx_ir as ir
import torch
import torch.utils._pytree as pytree
from onnxscript import version_converter
from torch import fx
from torch._dispatch.python import enable_python_dispatcher
from torch.export.exported_program import ExportedProgram, ModuleCallEntry, ModuleCallSignature
from torch.export.graph_signature import (
    ExportGraphSignature,
    InputKind,
    InputSpec,
    OutputKind,
    OutputSpec,
    TensorArgument,
)
from torch.fx.experimental import _config as symbolic_shapes_config
from torch.fx.traceback import preserve_node_meta

from offramp.program.graph import copied, expression, fake_mode, shape

OPSET = 23


def to_onnx(graph: fx.Graph, functions: Mapping[str, Callable[..., Any]]) -> ir.Model:
    """A computation's graph as an ONNX model of opset 23, not optimized.

    ``functions`` are translations of our own, by the name of the operator. These are the steps of
    ``torch.onnx.export``, which builds its registry in every call (0.4 s), traces the graph anew (0.4 s for a block)
    although nothing in it is left to decompose, and runs it to promote dtypes although all of them are known. A torch
    whose exporter is made of other parts gets that call.
    """
    exported, names = _program(graph), [node.name for node in graph.find_nodes(op="placeholder")]
    targets = dict.fromkeys(node.target for node in graph.nodes if node.op == "call_function")
    overloads = [target for target in targets if isinstance(target, torch._ops.OpOverload)]
    own: dict[Any, Any] = {target: functions[target.name()] for target in overloads if target.name() in functions}
    parts = _parts(tuple(own.items()))
    if parts is None:
        made = torch.onnx.export(
            exported, dynamo=True, opset_version=OPSET, verbose=False, optimize=False, custom_translation_table=own
        )
        assert made is not None
        return _named(made.model, names)
    registry, decompositions, promote, passes, core = parts
    with symbolic_shapes_config.patch(backed_size_oblivious=True):  # type: ignore[attr-defined]
        if any(target in decompositions for target in targets):
            exported = exported.run_decompositions(dict(decompositions))
        with fake_mode(exported.graph), enable_python_dispatcher(), preserve_node_meta():
            promote(exported.graph_module).run(*[None for node in exported.graph.find_nodes(op="placeholder")])
        passes.remove_assertion_nodes(exported.graph_module)
        model: ir.Model = core._exported_program_to_onnx_program(exported, registry=registry).model
    version_converter.convert_version(model, OPSET, fallback=True)
    return _named(model, names)


def _named(model: ir.Model, names: Iterable[str]) -> ir.Model:
    """The model with inputs of these names: a graph that was decomposed has others."""
    for value, name in zip(model.graph.inputs, names, strict=True):
        value.name = name
    return model


@cache
def _parts(functions: tuple[tuple[Any, Callable[..., Any]], ...]) -> tuple[Any, Any, Any, Any, Any] | None:
    """The registry, how to decompose what is not in it, and what has the exporter's steps; None if unknown."""
    try:
        from torch.onnx._internal.exporter import _core, _decomp, _fx_passes, _registration

        registry = _registration.ONNXRegistry.from_torchlib(OPSET)
        for target, function in functions:
            registry.register_op(target, function)
        known = set(_decomp.get_onnx_implemented_overloads(registry))
        decompositions = _decomp.create_onnx_friendly_decomposition_table(known)
        promote = _promotion()
        steps = (_fx_passes.remove_assertion_nodes, _core._exported_program_to_onnx_program)
    except (ImportError, AttributeError, TypeError):
        return None
    return (registry, decompositions, promote, _fx_passes, _core) if all(map(callable, steps)) else None


@cache
def _promotion() -> Callable[[fx.GraphModule], fx.Interpreter]:
    """The exporter's promotion of dtypes, which runs the whole graph for values that its nodes have already."""
    from torch.onnx._internal.fx.passes import type_promotion

    table, rule_of = type_promotion.TypePromotionTable(), type_promotion.get_type_promotion_rule

    class Promotion(type_promotion._TypePromotionInterpreter):
        def run_node(self, n: fx.Node) -> Any:
            with self._set_current_node(n):
                if rule := rule_of(n, table):
                    self._maybe_promote_node(n, rule)
            return n.meta.get("val")

    return lambda module: Promotion(module, table)


def _program(graph: fx.Graph) -> ExportedProgram:
    """The graph, copied (the exporter changes it), as torch.export would give it."""
    graph = copied(graph)
    given = list(graph.find_nodes(op="placeholder"))
    returned: Any = graph.output_node().args[0]
    signature = ExportGraphSignature(
        [InputSpec(InputKind.USER_INPUT, TensorArgument(node.name), None) for node in given],
        [OutputSpec(OutputKind.USER_OUTPUT, TensorArgument(node.name), None) for node in returned],
    )
    call = ModuleCallSignature(
        [], [], pytree.tree_structure((tuple(given), {})), pytree.tree_structure(tuple(returned))
    )
    ranges: dict[Any, Any] = {}
    for node in given:
        for size in shape(node):
            if not isinstance(expression(size), int):
                ranges |= {s: size.node.shape_env.var_to_range[s] for s in expression(size).free_symbols}
    return ExportedProgram(
        root=torch.nn.Module(),
        graph=graph,
        graph_signature=signature,
        state_dict={},
        range_constraints=ranges,
        module_call_graph=[ModuleCallEntry(fqn="", signature=call)],
    )
