"""Reading an ``fx`` graph: what its nodes hold, who depends on whose data, and running a piece of it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import fx
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

from offramp.errors import PassError
from offramp.program.fake_values import fake_result

aten = torch.ops.aten
_TORCH = str(Path(torch.__file__).parent)

#: One number everywhere, in the shape of a tensor or in the dtype of one; None where an argument says which (and any
#: will do where the operator leaves it open).
FILLED: Mapping[Any, int | None] = {
    aten.zeros_like.default: 0,
    aten.ones_like.default: 1,
    aten.full_like.default: None,
    aten.new_zeros.default: 0,
    aten.new_ones.default: 1,
    aten.new_full.default: None,
    aten.empty_like.default: 0,
    aten.new_empty.default: 0,
}
#: Results depend on the shape of their tensor argument, never on what is in it.
SHAPE_ONLY: frozenset[Any] = frozenset({*FILLED, aten.sym_size.int, aten.sym_numel.default, aten.sym_stride.int})

#: Regions whose bodies are graphs of their own, which canonical form puts in their place.
WRAPPERS = ("wrap_with_set_grad_enabled", "wrap_with_autocast")


def is_tensor(node: fx.Node) -> bool:
    """Whether the node's value is one tensor."""
    return isinstance(node.meta.get("val"), torch.Tensor)


def is_symint(node: fx.Node) -> bool:
    """Whether the node's value is a size: an integer that depends on shapes only."""
    return isinstance(node.meta.get("val"), (torch.SymInt, torch.SymFloat, torch.SymBool, int, float, bool))


def is_pointwise(node: fx.Node) -> bool:
    """Whether the node changes values one by one, as torch tags its operator (some it leaves out, hardswish say)."""
    return torch.Tag.pointwise in getattr(node.target, "tags", ())


def is_weight(node: fx.Node) -> bool:
    """Whether the node is a tensor of the model: in a program's graph, or in that of a computation of its own."""
    return node.op == "get_attr" or bool(node.meta.get("weight"))


def shape(node: fx.Node) -> tuple[Any, ...]:
    """The (symbolic) shape of a tensor node."""
    return tuple(node.meta["val"].shape)


def expression(size: Any) -> Any:
    """A size, or a number made of sizes, as a sympy expression; as the plain int where it is one."""
    if not isinstance(size, (torch.SymInt, torch.SymFloat)):
        return size
    found = size.node.expr
    return int(found) if found.is_Integer else found


def sizes_of(node: fx.Node) -> list[Any]:
    """The shape of a tensor node, each size as an `expression`: equal lists are provably equal shapes."""
    return [expression(size) for size in shape(node)]


def symbols(size: Any) -> set[Any]:
    """The symbols that a size is made of."""
    return set(getattr(expression(size), "free_symbols", ()))


def shape_key(node: fx.Node) -> str:
    """The shape and dtype of a tensor node as text, equal where the shapes are provably equal."""
    return f"{[str(size) for size in sizes_of(node)]}:{node.meta['val'].dtype}"


def copied(graph: fx.Graph) -> fx.Graph:
    """A copy of a graph, whose nodes have the same names."""
    made = fx.Graph()
    returned: Any = made.graph_copy(graph, {})
    made.output(returned)
    return made


def data_inputs(node: fx.Node) -> list[fx.Node]:
    """The nodes whose *contents* this node reads: shapes and weights do not count."""
    if node.op != "call_function" and node.op != "output":
        return []
    if node.target in SHAPE_ONLY:
        return []
    return [arg for arg in node.all_input_nodes if not is_weight(arg) and not is_symint(arg)]


def filling(node: fx.Node) -> Any:
    """What a call of one of ``FILLED`` has everywhere."""
    value = FILLED[node.target]
    return node.kwargs.get("fill_value", node.args[-1]) if value is None else value


def weights(node: fx.Node) -> list[fx.Node]:
    """The weights that this node reads."""
    return [arg for arg in node.all_input_nodes if is_weight(arg)]


def attribute(module: torch.nn.Module, target: str) -> torch.Tensor:
    """The tensor that a ``get_attr`` node names."""
    value: Any = module
    for part in target.split("."):
        value = getattr(value, part)
    assert isinstance(value, torch.Tensor), target
    return value


def storage_key(tensor: torch.Tensor) -> tuple[Any, ...]:
    """Equal for two tensors exactly when they are the same view of the same memory."""
    return (
        tensor.untyped_storage().data_ptr() if tensor.numel() else id(tensor),
        tensor.storage_offset(),
        tuple(tensor.shape),
        tuple(tensor.stride()),
        tensor.dtype,
    )


def ancestors(targets: Iterable[fx.Node], stop: Iterable[fx.Node] = ()) -> set[fx.Node]:
    """``targets`` and everything they are computed from, not going past the nodes of ``stop`` (kept)."""
    barrier, seen, todo = set(stop), set(), list(targets)
    while todo:
        node = todo.pop()
        if node in seen:
            continue
        seen.add(node)
        if node not in barrier:
            todo.extend(node.all_input_nodes)
    return seen


def read_by(nodes: Iterable[fx.Node]) -> set[fx.Node]:
    """``nodes`` and every node whose contents they depend on."""
    found, todo = set[fx.Node](), list(nodes)
    while todo:
        node = todo.pop()
        if node not in found:
            found.add(node)
            todo += data_inputs(node)
    return found


def dependents(sources: Iterable[fx.Node], graph: fx.Graph, shapes: bool = False) -> set[fx.Node]:
    """Every call that reads, directly or not, the contents of ``sources`` (which are not in the result).

    With ``shapes`` also those that read their shapes (but sizes of the graph's inputs are everybody's).
    """
    reached = set(sources)
    found = set()
    for node in graph.nodes:
        if node.op != "call_function" or node in reached:
            continue
        everybodys = is_symint(node) and all(arg.op == "placeholder" for arg in node.all_input_nodes)
        if any(arg in reached for arg in (node.all_input_nodes if shapes and not everybodys else data_inputs(node))):
            reached.add(node)
            found.add(node)
    return found


def source(node: fx.Node) -> str:
    """Where a node comes from: ``module path, file:line`` of the user's model, as far as known."""
    parts = []
    stack = node.meta.get("nn_module_stack")
    if stack:
        path, kind = list(stack.values())[-1]
        kind = kind if isinstance(kind, str) else kind.__name__
        parts.append(f"{path or 'the model'} ({kind.rsplit('.', 1)[-1]})")
    trace = node.meta.get("stack_trace")
    if trace:
        frames = [line.strip() for line in trace.splitlines() if line.strip().startswith("File ")]
        own = [frame for frame in frames if _TORCH not in frame] or frames
        if own:
            file, line = own[-1].split(",")[:2]
            parts.append(f"{file[5:].strip(chr(34))}:{line.strip().removeprefix('line ')}")
    return ", ".join(parts) or f"node {node.name}"


def run(
    module: torch.nn.Module,
    nodes: Sequence[fx.Node],
    values: dict[fx.Node, Any],
    keep: Callable[[fx.Node], bool] = lambda node: True,
) -> dict[fx.Node, Any]:
    """Compute ``nodes`` (in graph order) from ``values``; the values of kept nodes are added to it.

    Values that are not kept are freed after their last use.
    """
    last = {arg: node for node in nodes for arg in node.all_input_nodes}
    ending: dict[fx.Node, list[fx.Node]] = {}
    for arg, node in last.items():
        ending.setdefault(node, []).append(arg)
    for node in nodes:
        if node in values:
            continue
        if node.op == "get_attr":
            values[node] = attribute(module, str(node.target))
        elif node.op == "call_function":
            args = fx.node.map_arg(node.args, values.__getitem__)
            kwargs = fx.node.map_arg(node.kwargs, values.__getitem__)
            values[node] = node.target(*args, **kwargs)  # type: ignore[operator]
        for arg in ending.get(node, ()):
            if not keep(arg):
                values.pop(arg, None)
    return values


def fake_mode(graph: fx.Graph) -> FakeTensorMode:
    """The mode in which the shapes of the graph's values were computed.

    Raises:
        PassError: its nodes have no shapes.
    """
    for node in graph.nodes:
        value = node.meta.get("val")
        if isinstance(value, FakeTensor):
            return value.fake_mode
    raise PassError("the graph carries no shapes: capture it with offramp.capture")


def add_call(mode: FakeTensorMode, graph: fx.Graph, target: Any, /, *args: Any, **kwargs: Any) -> fx.Node:
    """A new call where the graph inserts nodes, whose value's shape and dtype are computed in ``mode``."""
    value = fake_result(mode, target, args, kwargs)
    node = graph.call_function(target, args, kwargs)
    node.meta["val"] = value
    return node


def placeholders(graph: fx.Graph) -> dict[str, fx.Node]:
    """The graph's inputs by name."""
    return {str(node.target): node for node in graph.nodes if node.op == "placeholder"}


def results(graph: fx.Graph) -> Mapping[str, fx.Node]:
    """The graph's outputs by name (a program's graph returns a dictionary)."""
    found: Mapping[str, fx.Node] = graph.output_node().args[0]  # type: ignore[assignment]
    return found
