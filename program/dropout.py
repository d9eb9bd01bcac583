"""Dropout: kept in the graph of a program that was captured for training, switched on by its module's mode.

In the graph it is off, so that a program computes the same whoever runs it. ``kept_dropout`` in a node's meta is the
probability that `Trainable` gives back to it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, fx

from offramp.errors import CaptureError
from offramp.program.compare import TOLERANCE, relative_error
from offramp.program.graph import aten, copied, source

_DROPS = (aten.dropout.default, aten.feature_dropout.default)
_ATTENDS = aten.scaled_dot_product_attention.default


def switch_off(graph: fx.Graph) -> None:
    """Switch dropout off in a graph that was exported in training mode, and note where it was."""
    for node in graph.find_nodes(op="call_function", target=aten.native_dropout.default):
        with graph.inserting_before(node):
            plain = graph.call_function(aten.dropout.default, (node.args[0], node.args[1], node.args[2] is not False))
        plain.meta = {**node.meta, "val": node.meta["val"][0]}
        for user in list(node.users):
            user.replace_all_uses_with(plain)
            graph.erase_node(user)
        graph.erase_node(node)
    for node in graph.nodes:
        probability: Any = 0.0
        if node.target in _DROPS:
            probability = node.args[1] if node.args[2] else 0.0
            node.args = (*node.args[:2], False)
        elif node.target is _ATTENDS:
            probability = node.args[4] if len(node.args) > 4 else node.kwargs.get("dropout_p", 0.0)
            node.args = (*node.args[:4], 0.0, *node.args[5:]) if len(node.args) > 4 else node.args
            node.kwargs = {key: value for key, value in node.kwargs.items() if key != "dropout_p"}
        if probability:
            node.meta["kept_dropout"] = float(probability)


def keeps(node: fx.Node) -> bool:
    """Whether this node drops values when its program's module trains."""
    return "kept_dropout" in node.meta


def drawing(graph: fx.Graph) -> list[fx.Node]:
    """The nodes that draw random numbers; dropout that is off draws none."""
    return [
        node
        for node in graph.nodes
        if torch.Tag.nondeterministic_seeded in getattr(node.target, "tags", ()) and not _is_off(node)
    ]


def _is_off(node: fx.Node) -> bool:
    if node.target in _DROPS:
        return not (node.args[1] and node.args[2])
    if node.target is _ATTENDS:
        return not (node.args[4] if len(node.args) > 4 else node.kwargs.get("dropout_p", 0.0))
    return False


def same_as_eval(
    module: fx.GraphModule, inputs: Mapping[str, Tensor], expected: Mapping[str, Tensor], tolerance: float = TOLERANCE
) -> None:
    """Raise a CaptureError where a graph captured for training is not the eval forward once dropout is off."""
    for node in drawing(module.graph):
        if node.target not in (*_DROPS, _ATTENDS):
            raise CaptureError(
                f"in training mode the forward draws random numbers with {node.target}: {source(node)}",
                hint="set layer dropping and noise to zero for training, or capture without training=True",
            )
    with torch.no_grad():
        found = module(**{str(n.target): inputs[str(n.target)] for n in module.graph.find_nodes(op="placeholder")})
    for name, value in expected.items():
        error = relative_error(found[name], value, least=1.0) if value.is_floating_point() else 0.0
        if not error <= tolerance:
            raise CaptureError(
                f"in training mode the forward differs from eval mode by more than dropout: {name} by {error:.1e}",
                hint="batch normalisation and the like must be frozen; or capture without training=True",
            )


def strip(graph: fx.Graph) -> dict[str, str]:
    """Remove dropout from a graph; returns the names of removed nodes and of those that stand for them now."""
    renamed: dict[str, str] = {}
    for node in list(graph.nodes):
        if not keeps(node):
            continue
        del node.meta["kept_dropout"]
        if node.target in _DROPS:
            value = node.args[0]
            assert isinstance(value, fx.Node)
            node.replace_all_uses_with(value)
            graph.erase_node(node)
            renamed[node.name] = value.name
    return renamed


class Trainable(fx.GraphModule):
    """A program's graph whose dropout follows the module's mode; weights are shared with the program."""

    def __init__(self, graph_module: fx.GraphModule) -> None:
        graph = copied(graph_module.graph)
        root = torch.nn.Module()
        root.__dict__.update(graph_module.__dict__)
        root._modules = dict(graph_module._modules)
        for node in list(graph.nodes):
            if not keeps(node):
                continue
            name = f"dropout_{node.name}"
            probability = node.meta["kept_dropout"]
            kind = _Attention if node.target is _ATTENDS else torch.nn.Dropout
            root._modules[name] = kind(probability)
            node.op, node.target = "call_module", name
            if kind is torch.nn.Dropout:
                node.args = node.args[:1]
        super().__init__(root, graph, "Trainable")
        self.eval()


class _Attention(torch.nn.Module):
    """torch's attention with dropout while training."""

    def __init__(self, probability: float) -> None:
        super().__init__()
        self.probability = probability

    def forward(
        self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None = None, *args: Any, **kwargs: Any
    ) -> Tensor:
        dropped = self.probability if self.training else 0.0
        return torch.nn.functional.scaled_dot_product_attention(query, key, value, mask, dropped, *args[1:], **kwargs)
