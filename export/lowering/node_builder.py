"""Writing nodes into the graph of a computation: calls of torch's operators, and of ONNX's own."""

from __future__ import annotations

import operator
from collections.abc import Mapping, Sequence
from math import prod
from typing import Any, Literal

import torch
from torch import fx
from torch.fx.experimental.symbolic_shapes import compute_unbacked_bindings
from torch.onnx.ops import _dtype_mappings, _symbolic_impl

from offramp.program.graph import add_call, aten, expression, fake_mode, shape

Target = Literal["ort", "portable"]
TARGETS = ("ort", "portable")
_PLACE = ("nn_module_stack", "stack_trace")
_KINDS = {dtype: kind for kind, dtype in _dtype_mappings.ONNX_DTYPE_TO_TORCH_DTYPE.items()}


class Builder:
    """Writes nodes with their shapes into a graph.

    Attributes:
        graph: Where to.
        target: What runs the ONNX model: ``ort`` (ONNX Runtime, whose own operators may be taken) or ``portable``.
        origin: What is lowered: new nodes have its place in the user's model.
    """

    def __init__(self, graph: fx.Graph, target: Target = "ort", origin: fx.Node | None = None) -> None:
        self.graph, self.target, self.origin = graph, target, origin

    def call(self, target: Any, *args: Any, **kwargs: Any) -> fx.Node:
        """A call of one of torch's operators."""
        node = add_call(fake_mode(self.graph), self.graph, target, *args, **kwargs)
        if self.origin is not None:
            node.meta |= {key: self.origin.meta[key] for key in _PLACE if key in self.origin.meta}
        return node

    def size(self, node: fx.Node, axis: int) -> Any:
        """A size of a tensor: a number, or the node that reads it."""
        found = expression(shape(node)[axis])
        return found if isinstance(found, int) else self.call(aten.sym_size.int, node, axis)

    def product(self, *sizes: Any) -> Any:
        """The product of sizes as `size` has them: a number, if all are."""
        number = prod(size for size in sizes if isinstance(size, int))
        found: Any = None
        for node in (size for size in sizes if not isinstance(size, int)):
            found = node if found is None else self.call(operator.mul, found, node)
        return number if found is None else found if number == 1 else self.call(operator.mul, found, number)

    def sizes(self, node: fx.Node) -> list[Any]:
        """The shape of a tensor, as `size` has it."""
        return [self.size(node, axis) for axis in range(len(shape(node)))]

    def number(self, tensor: fx.Node) -> fx.Node:
        """What a tensor of one integer holds, as a size that only a run tells."""
        node, env = self.call(aten._local_scalar_dense.default, tensor), fake_mode(self.graph).shape_env
        if found := compute_unbacked_bindings(env, node.meta["val"]):
            node.meta["unbacked_bindings"] = found
        return node

    def onnx(
        self,
        name: str,
        inputs: Sequence[fx.Node | None],
        attributes: Mapping[str, Any],
        outputs: Sequence[Sequence[Any]],
        like: fx.Node | None = None,
        domain: str = "",
        version: int | None = None,
    ) -> list[fx.Node]:
        """A call of an ONNX operator with outputs of the given sizes, float32 or of the dtype of ``like``."""
        kind = _KINDS[like.meta["val"].dtype if like else torch.float32]
        encoded = _symbolic_impl.EncodedAttrs.from_dict(dict(attributes))
        # missing inputs at the end are left out
        given = list(inputs)
        while given and given[-1] is None:
            given.pop()
        called = self.call(
            torch.ops.onnx_symbolic._symbolic_multi_out.default,
            given,
            name,
            [kind] * len(outputs),
            shapes=[list(sizes) for sizes in outputs],
            attr_keys=encoded.attr_keys,
            attr_types=encoded.attr_types,
            attr_pos=encoded.attr_pos,
            attr_ints=encoded.attr_ints,
            attr_floats=encoded.attr_floats,
            attr_strs=encoded.attr_strs,
            metadata_props_keys=[],
            metadata_props_values=[],
            domain=domain,
            version=version,
        )
        return [self.call(operator.getitem, called, i) for i in range(len(outputs))]
