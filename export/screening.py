"""Screening: which class is the greatest is seen by products of 8 bits, and by exact ones for the few that may be.

For a state ``x``, and a class's weights ``w`` that are ``v`` in 8 bits, in blocks ``b`` of both, each of which has a
scale of its own, an 8-bit product ``a`` is off by no more than::

    |x w - a| <= sum over b of  |x_b| |w_b - v_b| + max(abs(x_b)) / 254 * sum(abs(v_b))

The first term is the weights' rounding (Cauchy and Schwarz), the second that of ``x``, by half a step. So classes whose
upper bound is less than another one's lower bound are not the greatest, and the exact products of the others decide:
the same class as by all of them, from a quarter of the bytes. (SVD-softmax, Shim et al., NeurIPS 2017, screens so
without a bound.) The answer is -1, nobody knows, of a state that is no number or says little, so that too many may be
the greatest, and where a machine's kernel rounds in another way, so that an exact product lies outside of its bounds.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, fields
from typing import Any, TypeGuard

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray
from onnx_ir.passes.common import RemoveUnusedNodesPass

from offramp.export.quantize import SCREENING, packed_rows

_MICROSOFT = "com.microsoft"
_LEAST = 1 << 19  # weights: below, screening takes longer than what it spares
_MANY = 4096  # exact products of a run: beyond, all of them are quicker
_ROUNDING = 2.0**-22  # of float32 for each term of a product, of the four that are compared
_HALF = 2.0**-11  # of weights in float16, if they are stored so
_RISING = ("Tanh", "Identity")  # these keep the greatest the greatest, as do products with a positive constant


@dataclass(frozen=True)
class Screen:
    """What is known of a head's weights.

    Attributes:
        blocks: the weights in 8 bits, uint8 [classes, blocks, block].
        scales: of each block, float32 [classes, blocks].
        bounds: float32 [2 * blocks, classes]: what a block's length, then its greatest value, may be off for.
    """

    blocks: NDArray[np.uint8]
    scales: NDArray[np.float32]
    bounds: NDArray[np.float32]

    @classmethod
    def of(cls, weight: NDArray[np.float32]) -> Screen:
        """Of weights [classes, features]."""
        blocks, scales = packed_rows(weight)
        whole = weight.reshape(blocks.shape)
        coarse = (blocks.astype(np.float32) - 128) * scales.reshape(*blocks.shape[:2], 1)
        lengths, wrong = (np.linalg.norm(array, axis=-1) for array in (whole, whole - coarse))
        rounded = wrong + (_HALF + _ROUNDING * weight.shape[1]) * lengths
        bounds = np.concatenate([rounded, np.abs(coarse).sum(-1) / 254], 1).T
        return cls(blocks, scales, np.ascontiguousarray(np.nextafter(bounds, np.float32(np.inf)), np.float32))


@dataclass(frozen=True)
class Head:
    """A product with a weight of many classes, of which a model reads the greatest place alone."""

    argmax: ir.Node
    data: ir.Value
    weight: ir.Value
    bias: ir.Value | None


def heads(outputs: Iterable[ir.Value]) -> Iterator[Head]:
    """Of a model's outputs, which may be -1, the heads of those that can be screened, and are worth it."""
    for value in outputs:
        node = value.producer()
        if node is not None and node.op_type == "ArgMax" and (found := _head(node)) is not None:
            yield found


def _head(argmax: ir.Node) -> Head | None:
    if argmax.attributes.get_int("axis", 0) != -1 or argmax.attributes.get_int("keepdims", True):
        return None
    value: ir.Value | None = argmax.inputs[0]
    bias: ir.Value | None = None
    while value is not None and (node := value.producer()) is not None and len(value.uses()) == 1:
        value, other = node.inputs[0], node.inputs[1] if len(node.inputs) > 1 else None
        if node.op_type == "MatMul" and other is not None and (turned := other.producer()) is not None:
            weight = turned.inputs[0] if turned.op_type == "Transpose" else None
            if value is None or not _large(weight) or not _of_classes(bias, weight):
                return None
            return Head(argmax, value, weight, bias)
        if bias is not None:
            return None  # of a product that is scaled before
        if node.op_type == "Add" and other is not None and other.is_initializer():
            bias = other
        elif node.op_type not in _RISING and not _scaled(node, other):
            return None
    return None


def _large(weight: ir.Value | None) -> TypeGuard[ir.Value]:
    known = None if weight is None else weight.const_value
    if known is None or len(known.shape) != 2 or known.dtype != ir.DataType.FLOAT:
        return False
    return known.size >= _LEAST and known.shape.numpy()[1] % 16 == 0


def _of_classes(bias: ir.Value | None, weight: ir.Value) -> bool:
    """Whether a bias has a number for each class, if there is one."""
    if bias is None:
        return True
    known, classes = bias.const_value, weight.const_value
    return known is not None and classes is not None and known.size == classes.shape.numpy()[0]


def _scaled(node: ir.Node, factor: ir.Value | None) -> bool:
    """Whether a value is multiplied by one positive number."""
    known = None if factor is None or node.op_type not in ("Mul", "Div") else factor.const_value
    return known is not None and known.size == 1 and bool(known.numpy().item() > 0)


def insert(model: ir.Model, head: Head, known: Mapping[str, ir.Value]) -> None:
    """Put screening in the place of a head's product.

    ``ArgMax(x @ w' + bias)``  becomes  products in 8 bits, bounds, exact products of those that may be the greatest.
    ``known`` has initializers of the model: a `Screen`'s arrays by their names. The head of another output is another.
    """
    blocks, scales, bounds = (known[item.name] for item in fields(Screen))
    assert blocks.shape is not None
    classes, count, block = blocks.shape.numpy()
    nodes: list[ir.Node] = []

    def op(kind: str, *inputs: ir.Value, domain: str = "", **attributes: Any) -> ir.Value:
        nodes.append(ir.node(kind, inputs, attributes, domain=domain, name=f"{SCREENING}_{len(nodes)}"))
        return nodes[-1].outputs[0]

    def sizes(*values: int) -> ir.Value:
        return op("Constant", value_ints=values)

    weights = {"K": count * block, "N": classes, "bits": 8, "block_size": block, "accuracy_level": 4}
    x = op("Reshape", head.data, sizes(-1, count * block))
    coarse = op("MatMulNBits", x, blocks, scales, domain=_MICROSOFT, **weights)
    parts = op("Reshape", x, sizes(0, count, block))
    lengths = op("ReduceL2", parts, sizes(2), keepdims=0)
    greatest = op("ReduceMax", op("Abs", parts), sizes(2), keepdims=0)
    wrong = op("MatMul", op("Concat", lengths, greatest, axis=1), bounds)
    if head.bias is not None:
        coarse = op("Add", coarse, head.bias)
    low = op("Sub", coarse, wrong)
    best = op("ReduceMax", low, sizes(1), keepdims=1)
    every = op("Transpose", op("NonZero", op("GreaterOrEqual", op("Add", coarse, wrong), best)), perm=[1, 0])
    places = op("Slice", every, sizes(0), sizes(_MANY), sizes(0))
    row, column = (op("Squeeze", op("Gather", places, sizes(axis), axis=1), sizes(1)) for axis in (0, 1))
    exact = op("Mul", op("Gather", x, row, axis=0), op("Gather", head.weight, column, axis=0))
    exact = op("ReduceSum", exact, sizes(1), keepdims=0)
    if head.bias is not None:
        exact = op("Add", exact, op("Gather", op("Reshape", head.bias, sizes(-1)), column, axis=0))
    found = op("ArgMax", op("ScatterND", low, places, exact), axis=1, keepdims=0)
    off = op("Greater", op("Abs", op("Sub", exact, op("GatherND", coarse, places))), op("GatherND", wrong, places))
    none, many = op("Reshape", op("IsNaN", best), sizes(-1)), op("Greater", op("Shape", every, end=1), sizes(_MANY))
    off = op("ReduceMax", op("Cast", op("Concat", off, none, many, axis=0), to=int(ir.DataType.INT64)), keepdims=1)
    found = op("Where", op("Cast", off, to=int(ir.DataType.BOOL)), sizes(-1), found)
    made = op("Reshape", found, op("Shape", head.data, end=-1), allowzero=1)
    made.name, made.type, made.shape = head.argmax.outputs[0].name, head.argmax.outputs[0].type, None
    ir.convenience.replace_nodes_and_values(model.graph, head.argmax, [head.argmax], nodes, head.argmax.outputs, [made])
    RemoveUnusedNodesPass()(model)
    model.opset_imports.setdefault(_MICROSOFT, 1)
