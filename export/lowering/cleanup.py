"""Steps on an ONNX model: fewer nodes to run for each token where shapes are known, and no names but ours."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import onnx
import onnx_ir as ir
import onnxscript.optimizer
from onnx_ir.passes.common import ClearMetadataAndDocStringPass, OutputFixPass
from onnxscript.rewriter import rewrite
from onnxscript.rewriter.pattern import MatchResult, RewriteRuleClassBase, RewriteRuleSet


class _ConstantReshape(RewriteRuleClassBase):
    """``Reshape(x, Concat(sizes that are read from tensors))``  becomes  ``Reshape(x, [0, 0, 4, -1])``."""

    def pattern(self, op: Any, data: ir.Value, sizes: ir.Value) -> Any:
        return op.Reshape(data, sizes)

    def check(self, context: Any, data: ir.Value, sizes: ir.Value, **_: Any) -> MatchResult:  # type: ignore[override]
        result = MatchResult()
        made = context.output_values[0].shape
        if sizes.const_value is not None or data.shape is None or made is None:
            return result.fail("the sizes are constant, or no shape is known")
        before = list(data.shape)
        self._sizes = [
            size if isinstance(size, int) else 0 if at < len(before) and _same(size, before[at]) else -1
            for at, size in enumerate(made)
        ]
        if self._sizes.count(-1) > 1 or any(size == 0 for size in made):
            return result.fail("more than one size is not known")
        return result

    def rewrite(self, op: Any, data: ir.Value, sizes: ir.Value) -> Any:
        return op.Reshape(data, op.Constant(value=ir.tensor(self._sizes, dtype=ir.DataType.INT64)))


def _same(one: Any, other: Any) -> bool:
    return isinstance(one, ir.SymbolicDim) and one.value is not None and one == other


class _GatherOfOneAxis(RewriteRuleClassBase):
    """``GatherND(x, Unsqueeze(places, -1))``  becomes  ``Gather(x, places)``."""

    def pattern(self, op: Any, data: ir.Value, places: ir.Value, axis: ir.Value) -> Any:
        return op.GatherND(data, op.Unsqueeze(places, axis))

    def check(  # type: ignore[override]
        self, context: Any, data: ir.Value, places: ir.Value, axis: ir.Value, **_: Any
    ) -> MatchResult:
        result = MatchResult()
        batched = context.root.attributes.get("batch_dims")
        if axis.const_value is None or places.shape is None or (batched is not None and batched.as_int()):
            return result.fail("the axis is not constant, or rows have places of their own")
        if axis.const_value.numpy().tolist() not in ([-1], [len(places.shape)]):
            return result.fail("the new axis is not the last one")
        return result

    def rewrite(self, op: Any, data: ir.Value, places: ir.Value, axis: ir.Value) -> Any:
        return op.Gather(data, places, axis=0)


_RULES = RewriteRuleSet([_ConstantReshape.rule(), _GatherOfOneAxis.rule()])  # type: ignore[no-untyped-call]


OPSET_OF_CACHES = 24  # TensorScatter; nothing else differs


def steps() -> dict[str, Callable[[ir.Model], None]]:
    """What is done to a model that the exporter made, in this order."""
    return {
        # the exporter's own optimizer also fuses rotary embeddings, which ONNX Runtime then refuses to broadcast
        "optimize": optimize,
        "tidy": tidy,
        "name-values": name_values,
        "set-opset": set_opset,
        "strip": strip,
    }


def optimize(model: ir.Model) -> None:
    """Fold constants and drop what changes nothing."""
    onnxscript.optimizer.optimize(model)


def tidy(model: ir.Model) -> None:
    """Rewrite in place, and drop what nothing reads any more."""
    rewrite(model, _RULES)


def name_values(model: ir.Model) -> None:
    """Call the outputs ``out0...``; each gets a value of its own that is no input. Inputs keep their names."""
    names = [value.name for value in model.graph.inputs]
    OutputFixPass()(model)
    for i, value in enumerate(model.graph.outputs):
        value.name = f"out{i}"
    for value, name in zip(model.graph.inputs, names, strict=True):
        value.name = name


def set_opset(model: ir.Model) -> None:
    """Raise the opset where an operator is newer."""
    if any(node.op_type == "TensorScatter" for node in model.graph):
        model.opset_imports[""] = OPSET_OF_CACHES


def strip(model: ir.Model) -> None:
    """Drop what only the exporter's own debugging reads."""
    ClearMetadataAndDocStringPass()(model)
    model.metadata_props.clear()
    model.graph.metadata_props.clear()
    for value in (*model.graph.inputs, *model.graph.outputs, *model.graph.initializers.values()):
        value.metadata_props.clear()
    for node in ir.traversal.RecursiveGraphIterator(model.graph):
        for value in node.outputs:
            value.metadata_props.clear()
            if not value.is_graph_output():
                value.shape = value.type = None


def check(model: ir.Model) -> None:
    """Raise a ValueError where ONNX says that the model is none."""
    try:
        onnx.checker.check_model(ir.to_proto(model))
    except onnx.checker.ValidationError as error:
        raise ValueError(str(error)) from error
