"""Complex numbers become pairs of real ones: what comes after capture, and ONNX, knows only those."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from offramp.errors import CaptureError
from offramp.program.canonical.complex_rules import real_form
from offramp.program.canonical.pairs import Pair, PairWriter
from offramp.program.graph import attribute


def made_real(module: fx.GraphModule) -> int:
    """Rewrite the graph of ``module`` in place so that no value of it is complex; returns how many were.

    ``view_as_complex(x)`` is ``x[..., 0]`` and ``x[..., 1]``, and from there on every operator works on both, up to
    ``view_as_real`` or another one that gives real numbers again. Complex weights become two real ones.

    Raises:
        CaptureError: an input or output is complex, or an operator has no real form here; it is named, with its line.
    """
    rewriter = _Rewriter(module)
    for node in list(module.graph.nodes):
        rewriter.visit(node)
    for node in reversed(rewriter.replaced):
        module.graph.erase_node(node)
    for target in {str(node.target) for node in rewriter.replaced if node.op == "get_attr"}:
        owner, _, leaf = target.rpartition(".")
        delattr(module.get_submodule(owner), leaf)
    return len(rewriter.replaced)


def _is_complex(node: fx.Node) -> bool:
    value = node.meta.get("val")
    values = value if isinstance(value, list | tuple) else [value]
    return any(isinstance(item, torch.Tensor) and item.is_complex() for item in values)


class _Rewriter:
    def __init__(self, module: fx.GraphModule) -> None:
        self.module, self.graph = module, module.graph
        self.writer = PairWriter(module.graph)
        self.replaced: list[fx.Node] = []

    def visit(self, node: fx.Node) -> None:
        """Give a node that makes or reads complex numbers its parts, or its real replacement."""
        pairs = self.writer.pairs
        reads = [arg for arg in node.all_input_nodes if arg in pairs]
        if not reads and not _is_complex(node):
            return
        self.writer.node = node
        if node.op == "placeholder":
            raise CaptureError(
                f"the input {node.target!r} is complex",
                hint="real inputs: torch.view_as_complex inside the forward, on an input with a last axis of two",
            )
        if node.op == "output":
            returned: Any = node.args[0]
            named = [name for name, value in returned.items() if value in pairs]
            raise CaptureError(f"the outputs {named} are complex", hint="torch.view_as_real of them")
        with self.graph.inserting_before(node):
            made = self._weight(node) if node.op == "get_attr" else real_form(self.writer, node)
        if isinstance(made, Pair) and _is_complex(node):
            pairs[node] = made
        else:
            node.replace_all_uses_with(made.real if isinstance(made, Pair) else made)
        self.replaced.append(node)

    def _weight(self, node: fx.Node) -> Pair:
        value = attribute(self.module, str(node.target))
        kind = torch.nn.Parameter if isinstance(value, torch.nn.Parameter) else torch.nn.Buffer
        owner, _, leaf = str(node.target).rpartition(".")
        made = []
        for name, part in (("real", value.detach().real), ("imag", value.detach().imag)):
            holder = self.module.get_submodule(owner)
            while hasattr(holder, f"{leaf}_{name}"):
                leaf += "_"
            setattr(holder, f"{leaf}_{name}", kind(part.clone(memory_format=torch.contiguous_format)))
            target = f"{owner}.{leaf}_{name}" if owner else f"{leaf}_{name}"
            read = self.graph.create_node("get_attr", target)
            read.meta["val"] = self.writer.mode.from_tensor(part, static_shapes=True)
            made.append(self.writer.stamped(read))
        return Pair(*made)
