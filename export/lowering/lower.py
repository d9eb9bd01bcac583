"""Lowering: a subgraph of a program becomes an ONNX model, once for all that compute the same."""

from __future__ import annotations

import operator
import traceback
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial

import onnx
import onnx_ir as ir
from torch import fx
from torch.fx.experimental.symbolic_shapes import PendingUnbackedSymbolNotFound, free_unbacked_symbols

from offramp.errors import ExportError
from offramp.export.lowering import cached_attention, cleanup, learners, operators
from offramp.export.lowering.attention import keep_heads_beside
from offramp.export.lowering.axes import generic_axes
from offramp.export.lowering.exporter import OPSET, to_onnx
from offramp.export.lowering.layouts import cancel_layout, merge_calls, plain_reshapes, read_sizes
from offramp.export.lowering.masks import finite_fills, widen_masks
from offramp.export.lowering.node_builder import Target
from offramp.export.lowering.outline import Computation, fingerprint, outline
from offramp.export.lowering.pipeline import GraphCheck, Step, rewrite
from offramp.export.lowering.rms_norm import fuse_norms
from offramp.export.lowering.table import lower_operators, onnx_functions
from offramp.export.subgraph import Subgraph
from offramp.program.graph import is_tensor, source
from offramp.program.silence import quiet

OWN = (cached_attention, learners, operators)  # modules whose lowerings are in the table


def lower(subgraph: Subgraph, target: Target = "ort") -> Computation:
    """The subgraph as a computation of operators that ONNX has, over axes of its own where that can be."""
    return lowered(outline(subgraph), subgraph.name, target)


def lowered(computation: Computation, name: str, target: Target) -> Computation:
    """The computation (of a subgraph of that name) in operators that ONNX has."""
    graph = generic_axes(computation.graph)
    rewrite(graph, _steps(target), f"lowering/{name}", GraphCheck(graph))
    return replace(computation, graph=graph, key=fingerprint(graph))


def _steps(target: Target) -> dict[str, Step[fx.Graph]]:
    """How the graph of a computation becomes one that the exporter takes, in this order."""
    return {
        "lower-operators": partial(lower_operators, target=target),
        "merge-equal": merge_calls,
        "widen-masks": widen_masks,
        "finite-fills": finite_fills,
        "keep-heads-beside": keep_heads_beside,
        "cancel-layout": cancel_layout,
        "fuse-norms": fuse_norms,
        "plain-reshapes": plain_reshapes,
        "read-sizes": read_sizes,
    }


def translate(computation: Computation, name: str) -> onnx.ModelProto:
    """The computation as an ONNX model: inputs ``in0...``, then ``w0...``; outputs ``out0...``.

    Raises:
        ExportError: an operator has no ONNX form; the message names it and its place in the model.
    """
    try:
        with quiet():
            model = to_onnx(computation.graph, onnx_functions)
            rewrite(model, cleanup.steps(), f"lowering/{name}/onnx")
            cleanup.check(model)
    except Exception as error:
        raise _refusal(computation, name, error) from error
    return ir.to_proto(model)


def _refusal(computation: Computation, name: str, error: Exception) -> ExportError:
    text = str(error)
    named = [n for n in computation.graph.nodes if n.op == "call_function" and f"{n.target}" in text]
    for node in (*named, *_at_work(error)):
        if node.target is not operator.getitem:
            return ExportError(
                f"segment {name}: {node.target} cannot be lowered to ONNX opset {OPSET} ({source(node)})",
                hint="rewrite this line of the model with operators that ONNX has",
            )
    if isinstance(error, PendingUnbackedSymbolNotFound) and (node := _selecting(computation.graph)) is not None:
        return ExportError(
            f"segment {name}: how much {node.target} gives depends on its data, not on sizes ({source(node)})",
            hint="a factory around the part of the model behind it, or one whose code keeps all and masks",
        )
    cause: BaseException = error
    while cause.__cause__ is not None:
        cause = cause.__cause__
    return ExportError(
        f"segment {name} cannot be lowered to ONNX opset {OPSET}: {type(cause).__name__}: {cause}".splitlines()[0]
    )


def _selecting(graph: fx.Graph) -> fx.Node | None:
    """The first call that gives something whose size nothing before it has said."""
    calls: Sequence[fx.Node] = [node for node in graph.nodes if is_tensor(node)]
    known = {symbol for node in calls if node.op == "placeholder" for symbol in free_unbacked_symbols(node.meta["val"])}
    found = next((node for node in calls if free_unbacked_symbols(node.meta["val"]) - known), None)
    while found is not None and found.target is operator.getitem:  # one of several results
        (found,) = found.all_input_nodes
    return found


def _at_work(error: BaseException | None) -> Iterator[fx.Node]:
    """The nodes (of the exporter's own, decomposed graph) at which it was when it failed."""
    while error is not None:
        for frame, _ in traceback.walk_tb(error.__traceback__):
            node = frame.f_locals.get("node")
            if isinstance(node, fx.Node) and node.op == "call_function":
                yield node
        error = error.__cause__
