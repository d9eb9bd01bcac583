"""Lowering: a piece of a program becomes an ONNX model, once per distinct structure."""

from __future__ import annotations

import operator
import traceback
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import onnx
import onnxscript.optimizer
import sympy
import torch
import torch.utils._pytree as pytree
from onnxscript import opset23
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
from offramp.export.lowering.cached_attention import Target, lower_attention
from offramp.export.lowering.cleanup import tidy
from offramp.export.lowering.layouts import cancel_layout
from offramp.export.lowering.merged_products import merged
from offramp.export.lowering.rms_norm import fuse_norms
from offramp.export.partition import Piece
from offramp.program.canonical.simplify import sizes_from_inputs
from offramp.program.graph import aten, expression, is_symint, is_tensor, shape, source
from offramp.program.silence import quiet

OPSET = 23
OPSET_OF_CACHES = 24  # TensorScatter; nothing else differs


@dataclass(frozen=True)
class Function:
    """A piece as a closed function of tensors: its activations first, then its weights, then nothing else.

    ``key`` is equal for two functions exactly when they are the same computation of tensors of the same
    shapes and dtypes; ``weights`` are nodes of the program, in the order of the parameters: weights, or several that
    lie one behind the other (`merged`).
    """

    graph: fx.Graph
    inputs: tuple[fx.Node, ...]
    weights: tuple[fx.Node, ...]
    outputs: tuple[fx.Node, ...]
    key: str


def close(piece: Piece, target: Target = "ort") -> Function:
    """The piece as a function: sizes are read from its own inputs, weights become parameters.

    A size that none of the inputs has, and that cannot be computed from theirs, brings the tensor that it
    is read from along as one more input.
    """
    joined = {node for node in piece.nodes if merged(node)} - set(piece.outputs)
    nodes = [node for node in piece.nodes if node not in joined]
    weights = list(
        dict.fromkeys(arg for n in nodes for arg in n.all_input_nodes if arg.op == "get_attr" or arg in joined)
    )
    inputs = list(piece.inputs)
    inside = set(piece.nodes)
    for node in nodes:
        for arg in node.all_input_nodes:
            if is_symint(arg):
                inputs += [extra for extra in _unread(arg, inside, inputs) if extra not in inputs]
    graph = fx.Graph()
    env: dict[fx.Node, fx.Node] = {}
    for i, node in enumerate([*inputs, *weights]):
        env[node] = graph.placeholder(f"in{i}" if i < len(inputs) else f"w{i - len(inputs)}")
        with node.meta["val"].fake_mode:  # ONNX knows no strides, so none may come in from outside
            env[node].meta["val"] = node.meta["val"].contiguous()
    sizes: dict[str, tuple[fx.Node, int]] = {}
    for node in inputs:
        for axis, s in enumerate(shape(node)):
            if not isinstance(expression(s), int):
                sizes.setdefault(str(expression(s)), (node, axis))

    def size(node: fx.Node) -> fx.Node:
        if node not in env:
            place = sizes.get(str(expression(node.meta["val"])))
            if place is not None:
                env[node] = graph.call_function(aten.sym_size.int, (env[place[0]], place[1]))
            else:
                for arg in node.all_input_nodes:
                    if is_symint(arg):
                        size(arg)
                env[node] = graph.node_copy(node, env.__getitem__)
            env[node].meta = {"val": node.meta["val"]}
        return env[node]

    for node in nodes:
        for arg in node.all_input_nodes:
            if is_symint(arg):
                size(arg)
        env[node] = graph.node_copy(node, env.__getitem__)
    graph.output(tuple(env[node] for node in piece.outputs))
    lower_attention(graph, target)
    cancel_layout(graph)
    fuse_norms(graph)
    _widen_masks(graph)
    _plain_reshapes(graph)
    sizes_from_inputs(graph)  # so that no value is made for its size alone
    graph.eliminate_dead_code()
    return Function(graph, tuple(inputs), tuple(weights), piece.outputs, _key(graph))


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
            copied = graph.call_function(
                aten.clone.default, (node.args[0],), {"memory_format": torch.contiguous_format}
            )
        value = node.args[0].meta["val"]
        with value.fake_mode:
            copied.meta = {"val": torch.empty_like(value, memory_format=torch.contiguous_format)}
        node.target = aten.view.default
        node.replace_input_with(node.args[0], copied)


def _unread(node: fx.Node, inside: set[fx.Node], inputs: list[fx.Node]) -> list[fx.Node]:
    """The tensors outside of the piece that a size must be read from."""
    have = {str(expression(s)) for n in inputs for s in shape(n)}
    if str(expression(node.meta["val"])) in have:
        return []
    needed = []
    for arg in node.all_input_nodes:
        if is_symint(arg):
            needed += _unread(arg, inside, inputs)
        elif is_tensor(arg) and arg not in inside and arg not in inputs:
            needed.append(arg)
    return needed


def _key(graph: fx.Graph) -> str:
    """The computation as text: axes by the order in which they come, with what torch knows of their sizes."""
    index = {node: i for i, node in enumerate(graph.nodes)}
    axes: dict[Any, sympy.Symbol] = {}
    facts: list[str] = []

    def size(found: Any) -> str:
        known = expression(found)
        if isinstance(known, int):
            return str(known)
        for symbol in sorted(known.free_symbols - axes.keys(), key=str):
            env = found.node.shape_env
            facts.append(f"{env.var_to_range[symbol]} {env.backed_var_to_val.get(symbol)}")
            axes[symbol] = sympy.Symbol(f"axis{len(axes)}", integer=True, positive=True)
        return str(known.xreplace(axes))

    lines = []
    for node in graph.nodes:
        value = node.meta.get("val")
        kind = f"{[size(s) for s in value.shape]}{value.dtype}" if isinstance(value, torch.Tensor) else ""
        args = fx.node.map_arg((node.args, node.kwargs), lambda arg: f"%{index[arg]}")
        lines.append(f"{node.op} {node.target if node.op == 'call_function' else ''} {args} {kind}")
    return "\n".join(lines + facts)


def translate(function: Function, name: str) -> onnx.ModelProto:
    """The function as an ONNX model: inputs ``in0...``, then ``w0...``; outputs ``out0...``.

    Raises:
        ExportError: an operator has no ONNX form; the message names it and its place in the model.
    """
    placeholders = list(function.graph.find_nodes(op="placeholder"))
    returned: Any = function.graph.output_node().args[0]
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
        graph=function.graph,
        graph_signature=signature,
        state_dict={},
        range_constraints=ranges,
        module_call_graph=[ModuleCallEntry(fqn="", signature=call)],
    )
    try:
        with quiet():
            # the exporter's own optimizer also fuses rotary embeddings, which ONNX Runtime then refuses to broadcast
            program = torch.onnx.export(
                exported,
                dynamo=True,
                opset_version=OPSET,
                verbose=False,
                optimize=False,
                custom_translation_table=_translations(),
            )
            assert program is not None
            onnxscript.optimizer.optimize(program.model)
            tidy(program.model)
    except Exception as error:
        raise _refusal(function, name, error) from error
    model: onnx.ModelProto = program.model_proto
    if any(node.op_type == "TensorScatter" for node in model.graph.node):
        next(item for item in model.opset_import if not item.domain).version = OPSET_OF_CACHES
    _rename(model, function)
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


def _refusal(function: Function, name: str, error: Exception) -> ExportError:
    text = str(error)
    named = [n for n in function.graph.nodes if n.op == "call_function" and f"{n.target}" in text]
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


def _rename(model: onnx.ModelProto, function: Function) -> None:
    count = len(function.inputs)
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
