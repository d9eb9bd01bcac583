"""Rewrites of an ONNX model that leave fewer nodes to run for each token, where shapes are known well enough."""

from __future__ import annotations

from typing import Any

from onnxscript import ir
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


def tidy(model: ir.Model) -> None:
    """Rewrite in place, and drop what nothing reads any more."""
    rewrite(model, _RULES)
