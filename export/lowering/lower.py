"""Lowering: a subgraph of a program becomes an ONNX model, once for all that compute the same."""

from __future__ import annotations

import operator
import traceback
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import onnx
import onnxscript.optimizer
import torch
import torch.utils._pytree as pytree
from onnxscript import ir, opset23
from torch import fx
from torch.export.exported_program import ExportedProgram, ModuleCallEntry, ModuleCallSignature
from torch.export.graph_signature import (
    ExportGraphSignature,
    InputKind,
    InputSpec,
    OutputKind,
    OutputSpec,
    TensorArgument,
)

from offramp.errors import ExportError
from offramp.export.lowering.axes import generic_axes
from offramp.export.lowering.cached_attention import Target, lower_attention
from offramp.export.lowering.cleanup import tidy
from offramp.export.lowering.exporter import OPSET, to_onnx
from offramp.export.lowering.layouts import cancel_layout
from offramp.export.lowering.outline import Computation, fingerprint, outline
from offramp.export.lowering.rms_norm import fuse_norms
from offramp.export.partition import Subgraph
from offramp.program.canonical.simplify import sizes_from_inputs
from offramp.program.graph import aten, copied, expression, shape, source
from offramp.program.silence import quiet

OPSET_OF_CACHES = 24  # TensorScatter; nothing else differs

#: What was lowered, by what it was before.
Lowered = dict[str, Computation]


def lower(subgraph: Subgraph, target: Target = "ort", known: Lowered | None = None) -> Computation:
    """The subgraph as a computation of operators that ONNX has, over axes of its own where that can be.

    Nothing is done twice for equal ones where the caller keeps what is ``known``.
    """
    given, known = outline(subgraph), {} if known is None else known
    if given.key not in known:
        graph = generic_axes(given.graph)
        lower_attention(graph, target)
        cancel_layout(graph)
        fuse_norms(graph)
        _widen_masks(graph)
        _plain_reshapes(graph)
        sizes_from_inputs(graph)  # so that no value is made for its size alone
        graph.eliminate_dead_code()
        known[given.key] = replace(given, graph=graph, key=fingerprint(graph))
    made = known[given.key]
    return replace(given, graph=made.graph, key=made.key)


def _widen_masks(graph: fx.Graph) -> None:
    """ONNX Runtime's Attention wants a mask row for every query; torch lets one row stand for all."""
    for node in graph.find_nodes(op="call_function", target=aten.scaled_dot_product_attention.default):
        mask = node.args[3] if len(node.args) > 3 else node.kwargs.get("attn_mask")
        if mask is None or len(shape(mask)) < 2 or expression(shape(mask)[-2]) != 1:
            continue
        query = node.args[0]
        rows = shape(query)[-2]
        with graph.inserting_before(node):
            if not isinstance(expression(rows), int):
                rows = graph.call_function(aten.sym_size.int, (query, len(shape(query)) - 2))
                rows.meta = {"val": shape(query)[-2]}
            wide = graph.call_function(aten.expand.default, (mask, [*[-1] * (len(shape(mask)) - 2), rows, -1]))
        with mask.meta["val"].fake_mode:
            wide.meta = {"val": mask.meta["val"].expand(*[-1] * (len(shape(mask)) - 2), shape(query)[-2], -1)}
        node.replace_input_with(mask, wide)


def _plain_reshapes(graph: fx.Graph) -> None:
    """A reshape is decomposed by the strides of its input, which decomposing others changes: copy, then view."""
    for node in graph.find_nodes(op="call_function", target=aten.reshape.default):
        with graph.inserting_before(node):
            plain = graph.call_function(aten.clone.default, (node.args[0],), {"memory_format": torch.contiguous_format})
        value = node.args[0].meta["val"]
        with value.fake_mode:
            plain.meta = {"val": torch.empty_like(value, memory_format=torch.contiguous_format)}
        node.target = aten.view.default
        node.replace_input_with(node.args[0], plain)


def translate(computation: Computation, name: str) -> onnx.ModelProto:
    """The computation as an ONNX model: inputs ``in0...``, then ``w0...``; outputs ``out0...``.

    Raises:
        ExportError: an operator has no ONNX form; the message names it and its place in the model.
    """
    graph = copied(computation.graph)  # which the exporter changes
    placeholders = list(graph.find_nodes(op="placeholder"))
    returned: Any = graph.output_node().args[0]
    signature = ExportGraphSignature(
        [InputSpec(InputKind.USER_INPUT, TensorArgument(node.name), None) for node in placeholders],
        [OutputSpec(OutputKind.USER_OUTPUT, TensorArgument(node.name), None) for node in returned],
    )
    call = ModuleCallSignature(
        [], [], pytree.tree_structure((tuple(placeholders), {})), pytree.tree_structure(tuple(returned))
    )
    ranges: dict[Any, Any] = {}
    for node in placeholders:
        for s in shape(node):
            if not isinstance(expression(s), int):
                ranges |= {symbol: s.node.shape_env.var_to_range[symbol] for symbol in expression(s).free_symbols}
    exported = ExportedProgram(
        root=torch.nn.Module(),
        graph=graph,
        graph_signature=signature,
        state_dict={},
        range_constraints=ranges,
        module_call_graph=[ModuleCallEntry(fqn="", signature=call)],
    )
    try:
        with quiet():
            made = to_onnx(exported, _translations())
            # the exporter's own optimizer also fuses rotary embeddings, which ONNX Runtime then refuses to broadcast
            onnxscript.optimizer.optimize(made)
            tidy(made)
    except Exception as error:
        raise _refusal(computation, name, error) from error
    model: onnx.ModelProto = ir.to_proto(made)
    if any(node.op_type == "TensorScatter" for node in model.graph.node):
        next(item for item in model.opset_import if not item.domain).version = OPSET_OF_CACHES
    _rename(model, computation)
    _strip(model)
    return model


def _translations() -> dict[Any, Any]:
    """What the exporter has no translation for. The library that defines an operator need not be there."""
    found: dict[Any, Any] = {aten.sym_stride.int: _stride}
    if hasattr(torch.ops.transformers, "grouped_mm_fallback"):
        found[torch.ops.transformers.grouped_mm_fallback.default] = _grouped_product
    return found


def _grouped_product(rows: Any, weights: Any, ends: Any) -> Any:
    """Experts' products, ``[n, in] x [experts, in, out] -> [n, out]``: rows lie expert by expert, up to its end."""
    ends = opset23.Cast(ends, to=onnx.TensorProto.INT64)
    start = opset23.Constant(value_ints=[0])
    axis = opset23.Constant(value_ints=[0])
    made = []
    for expert in range(weights.shape[0]):
        here: Any = opset23.Constant(value_ints=[expert])
        end = opset23.Gather(ends, here)
        weight: Any = opset23.Gather(weights, opset23.Constant(value_int=expert))  # type: ignore[type-var]
        made.append(opset23.MatMul(opset23.Slice(rows, start, end, axis), weight))
        start = end
    return opset23.Concat(*made, axis=0)


def _stride(tensor: Any, dim: int) -> Any:
    """``aten.sym_stride``: torch may name a size of a (contiguous) input by the stride that equals it."""
    return opset23.ReduceProd(opset23.Shape(tensor, start=dim + 1), keepdims=0)


def _refusal(computation: Computation, name: str, error: Exception) -> ExportError:
    text = str(error)
    named = [n for n in computation.graph.nodes if n.op == "call_function" and f"{n.target}" in text]
    for node in (*named, *_at_work(error)):
        if node.target is not operator.getitem:
            return ExportError(
                f"segment {name}: {node.target} cannot be lowered to ONNX opset {OPSET} ({source(node)})",
                hint="rewrite this line of the model with operators that ONNX has",
            )
    cause: BaseException = error
    while cause.__cause__ is not None:
        cause = cause.__cause__
    return ExportError(
        f"segment {name} cannot be lowered to ONNX opset {OPSET}: {type(cause).__name__}: {cause}".splitlines()[0]
    )


def _at_work(error: BaseException | None) -> Iterator[fx.Node]:
    """The nodes (of the exporter's own, decomposed graph) at which it was when it failed."""
    while error is not None:
        for frame, _ in traceback.walk_tb(error.__traceback__):
            node = frame.f_locals.get("node")
            if isinstance(node, fx.Node) and node.op == "call_function":
                yield node
        error = error.__cause__


def _rename(model: onnx.ModelProto, computation: Computation) -> None:
    count = len(computation.inputs)
    names = {v.name: f"in{i}" if i < count else f"w{i - count}" for i, v in enumerate(model.graph.input)}
    for i, value in enumerate(model.graph.output):
        if value.name in names:  # returned as it came in
            node = model.graph.node.add(op_type="Identity", input=[value.name], output=[f"same_{i}"])
            value.name = node.output[0]
        names.setdefault(value.name, f"out{i}")
    for value in (*model.graph.input, *model.graph.output, *model.graph.value_info, *model.graph.initializer):
        value.name = names.get(value.name, value.name)
    _rename_nodes(model.graph, names)


def _strip(model: onnx.ModelProto) -> None:
    """Drop what only the exporter's own debugging reads."""
    del model.metadata_props[:], model.graph.metadata_props[:], model.graph.value_info[:]
    for item in (*model.graph.node, *model.graph.input, *model.graph.output, *model.graph.initializer):
        del item.metadata_props[:]
        item.doc_string = ""


def _rename_nodes(graph: onnx.GraphProto, names: dict[str, str]) -> None:
    for node in graph.node:
        node.input[:] = [names.get(name, name) for name in node.input]
        node.output[:] = [names.get(name, name) for name in node.output]
        for attribute in node.attribute:
            if attribute.type == onnx.AttributeProto.GRAPH:
                _rename_nodes(attribute.g, names)
