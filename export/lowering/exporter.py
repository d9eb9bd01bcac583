"""torch's exporter to ONNX, with its registry of translations built once and not for every call."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import cache
from typing import Any

import torch
from onnxscript import ir, version_converter
from torch.export.exported_program import ExportedProgram
from torch.fx.experimental import _config as symbolic_shapes_config

OPSET = 23

Functions = Mapping[Any, Callable[..., Any]]


def to_onnx(exported: ExportedProgram, functions: Functions) -> ir.Model:
    """The program as an ONNX model of opset 23, not optimized; ``functions`` are translations of our own, by operator.

    These are the steps of ``torch.onnx.export``, which builds its registry (0.4 s) in every call and traces the graph
    anew (0.4 s for a block) although nothing in it is left to decompose. A torch whose exporter is made of other
    parts gets that call.
    """
    parts = _parts(tuple(functions.items()))
    if parts is None:
        made = torch.onnx.export(
            exported,
            dynamo=True,
            opset_version=OPSET,
            verbose=False,
            optimize=False,
            custom_translation_table=dict(functions),
        )
        assert made is not None
        return made.model
    registry, decompositions, passes, core = parts
    with symbolic_shapes_config.patch(backed_size_oblivious=True):
        if any(node.target in decompositions for node in exported.graph.nodes):
            exported = exported.run_decompositions(dict(decompositions))
        passes.insert_type_promotion_nodes(exported.graph_module)
        model: ir.Model = core._exported_program_to_onnx_program(exported, registry=registry).model
    version_converter.convert_version(model, OPSET, fallback=True)
    return model


@cache
def _parts(functions: tuple[tuple[Any, Callable[..., Any]], ...]) -> tuple[Any, Any, Any, Any] | None:
    """The registry, how to decompose what is not in it, and the modules with the exporter's steps; None if unknown."""
    try:
        from torch.onnx._internal.exporter import _core, _decomp, _fx_passes, _registration

        registry = _registration.ONNXRegistry.from_torchlib(OPSET)
        for operator, function in functions:
            registry.register_op(operator, function)
        known = set(_decomp.get_onnx_implemented_overloads(registry))
        decompositions = _decomp.create_onnx_friendly_decomposition_table(known)
        steps = (_fx_passes.insert_type_promotion_nodes, _core._exported_program_to_onnx_program)
    except (ImportError, AttributeError, TypeError):
        return None
    return (registry, decompositions, _fx_passes, _core) if all(map(callable, steps)) else None
