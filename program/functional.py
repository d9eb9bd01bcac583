"""A graph of torch.export becomes functional: no operator changes a tensor, or may give back a view of one."""

from __future__ import annotations

import operator
from collections.abc import Hashable, Iterator
from typing import Any

import sympy
import torch
from torch import fx
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.export import ExportedProgram
from torch.fx.experimental.proxy_tensor import make_fx

from offramp.errors import CaptureError
from offramp.program.fake_values import call_shapes
from offramp.program.graph import WRAPPERS, add_call, aten, expression, fake_mode, is_symint, is_tensor, shape, source

#: They stay: canonical form has them, or drops them.
_KEPT = (aten.reshape.default, aten.contiguous.default, aten.detach_.default, aten.dropout.default)
#: What writes to a part of a tensor, by what reads it.
_SCATTERS: dict[Any, Any] = {
    aten.slice.Tensor: aten.slice_scatter.default,
    aten.select.int: aten.select_scatter.default,
}
_CONTROL = ("cond", "while_loop", "scan", "associative_scan", "map_impl")
_UNSAFE = torch.Tag.maybe_aliasing_or_mutating


def functional(exported: ExportedProgram) -> ExportedProgram:
    """What ``exported.run_decompositions({})`` gives, up to names of nodes and what canonical form removes.

    That traces the whole model twice more, and is needed only where an operator changes what has views, or has a
    body that torch alone knows, or where torch found late that two sizes are one. Elsewhere what works in place is
    replaced by what does not, and the few operators that torch calls implicit composites are decomposed one by one.
    ``exported`` itself is changed.

    Raises:
        CaptureError: it has a loop that is an operator.
    """
    graphs = list(_graphs(exported.graph_module))
    for graph in graphs:
        for node in list(graph.nodes):
            _check_control(node)
            if _in_place(node):
                _out_of_place(graph, node)
            elif node.target is aten.batch_norm.default:
                _without_statistics(graph, node)
        graph.eliminate_dead_code(_counts)  # reads of constants, say, which torch knows no more when it traces again
    known = all(_known(node) for graph in graphs for node in graph.nodes)
    if not known or _sizes_are_one(exported.graph):
        exported.graph_module.recompile()
        made: ExportedProgram = exported.run_decompositions({})
        return made
    _sizes_first(exported.graph)
    traces: dict[Hashable, fx.Graph] = {}
    for graph in graphs:
        sizes: dict[str, fx.Node] = {}
        for node in list(graph.nodes):
            if _composite(node):
                _decompose(graph, node, sizes, traces)
            elif is_symint(node):
                sizes.setdefault(str(expression(node.meta["val"])), node)
    return exported


def _sizes_are_one(graph: fx.Graph) -> bool:
    """Whether a guard says that two symbols are equal, which the shapes in the graph do not say yet."""
    env = fake_mode(graph).shape_env
    guards = [env.replace(guard.expr) for guard in env.guards] if env is not None else []
    return any(isinstance(guard, sympy.Eq) and all(side.is_Symbol for side in guard.args) for guard in guards)


def _graphs(module: fx.GraphModule) -> Iterator[fx.Graph]:
    """The graph, and those of the regions in it."""
    yield module.graph
    for node in module.graph.find_nodes(op="get_attr"):
        inner = getattr(module, str(node.target), None)
        if isinstance(inner, fx.GraphModule):
            yield from _graphs(inner)


def _counts(node: fx.Node) -> bool:
    """Whether a node counts though nobody reads it: it changes something, asserts, or is no operator (of vmap, say)."""
    plain = isinstance(node.target, torch._ops.OpOverload) or getattr(node.target, "__module__", "") == "_operator"
    return node.is_impure() or (node.op == "call_function" and not plain)


def _check_control(node: fx.Node) -> None:
    """Raise where an operator decides how often, or whether, a graph runs."""
    if isinstance(node.target, torch._ops.HigherOrderOperator) and node.target.name() in _CONTROL:
        raise CaptureError(
            f"{node.target} ({source(node)}) runs a graph of its own, which no pass reads",
            hint="a Python loop of as many steps as the example has; a condition as torch.cond, by that name",
        )


def _known(node: fx.Node) -> bool:
    """Whether the node leaves its arguments alone, and its operator says all that it does."""
    if node.op != "call_function" or node.target in _KEPT:
        return True
    if not isinstance(node.target, torch._ops.OpOverload):
        regions = isinstance(node.target, torch._ops.HigherOrderOperator)
        return not regions or getattr(node.target, "__name__", "") in WRAPPERS
    return not node.target._schema.is_mutable and _UNSAFE not in node.target.tags


def _in_place(node: fx.Node) -> bool:
    """Whether the node changes its first argument, and is made for that."""
    if not isinstance(node.target, torch._ops.OpOverload) or node.target in _KEPT:
        return False
    changed = [argument.is_write for argument in node.target._schema.arguments if argument.alias_info is not None]
    return changed == [True] and node.target._schema.name.endswith("_")


def _out_of_place(graph: fx.Graph, node: fx.Node) -> None:
    """Readers of the tensor that is changed here read a new one from here on, if nobody reads it by another name.

    ``fill_(select(x, ...))`` becomes ``y = select_scatter(x, fill(select(x, ...)), ...)``, and ``select(y, ...)``.
    """
    changed: Any = node.args[0]
    inplace: Any = node.target
    space, _, name = inplace._schema.name.partition("::")
    target = getattr(getattr(getattr(torch.ops, space), name[:-1], None), inplace._overloadname, None)
    views: list[Any] = []
    whole = changed
    while whole.target in _SCATTERS:
        views.append(whole)
        whole = whole.args[0]
    aliases = _aliases(changed)
    before = set(_before(graph, node))
    others = {user for alias in aliases & before - {*views, whole} for user in alias.users}
    if not aliases or target is None or not others <= {*before, node}:
        return
    with graph.inserting_before(node):
        made = _called(graph, node, target, *node.args, **node.kwargs)
        if [str(made.meta["val"].dtype), len(shape(made))] != [str(changed.meta["val"].dtype), len(shape(changed))]:
            graph.erase_node(made)
            return
        new = made
        for view in views:
            new = _called(graph, node, _SCATTERS[view.target], view.args[0], new, *view.args[1:])
        again = {whole: new}
        for view in reversed(views):  # views of what is new, so that what is written to them reaches it
            again[view] = _called(graph, node, view.target, again[view.args[0]], *view.args[1:])
    after = {*graph.nodes} - {*_before(graph, node), node}
    for old, new in again.items():
        old.replace_all_uses_with(new, after.__contains__)
    node.replace_all_uses_with(again[changed])
    graph.erase_node(node)


def _without_statistics(graph: fx.Graph, node: fx.Node) -> None:
    """A batch norm that only reads what training has counted; one that counts is left."""
    value, weight, bias, mean, variance, counts, momentum, epsilon, _ = node.args
    if counts is not False or mean is None:
        return
    target = aten._native_batch_norm_legit_no_training.default
    with graph.inserting_before(node):
        made = _called(graph, node, target, value, weight, bias, mean, variance, momentum, epsilon)
        normed = graph.call_function(operator.getitem, (made, 0))
    normed.meta = dict(node.meta)
    node.replace_all_uses_with(normed)
    graph.erase_node(node)


def _called(graph: fx.Graph, node: fx.Node, target: Any, *args: Any, **kwargs: Any) -> fx.Node:
    """A call in the place of a node."""
    made = add_call(fake_mode(graph), graph, target, *args, **kwargs)
    made.meta = {**node.meta, **made.meta}
    return made


def _before(graph: fx.Graph, node: fx.Node) -> Iterator[fx.Node]:
    for other in graph.nodes:
        if other is node:
            return
        yield other


def _aliases(node: fx.Node) -> set[fx.Node]:
    """The nodes whose values share the node's memory, itself included; none if that is not the graph's own."""
    root: Any = node
    while isinstance(root, fx.Node) and root.op == "call_function" and _views(root):
        root = root.args[0]
    silent = aten.type_as.default  # gives back its argument, and does not say so
    if not isinstance(root, fx.Node) or root.op != "call_function" or root.target is silent:
        return set()
    found, todo = {root}, [root]
    while todo:
        new = {user for user in todo.pop().users if _views(user)} - found
        found |= new
        todo += new
    return found


def _views(node: fx.Node) -> bool:
    """Whether the node's value may be a view of an argument."""
    if node.op != "call_function":
        return False
    if not isinstance(node.target, torch._ops.OpOverload):
        return is_tensor(node)
    return _UNSAFE in node.target.tags or any(item.alias_info is not None for item in node.target._schema.arguments)


def _composite(node: fx.Node) -> bool:
    """Whether torch makes the node's operator of others, and its value may be a view."""
    if node.op != "call_function" or not isinstance(node.target, torch._ops.OpOverload):
        return False
    if node.target in _KEPT:
        return node.target is aten.reshape.default and -1 in node.args[1]  # type: ignore[operator]
    return _views(node) and node.target._can_decompose()


def _decompose(graph: fx.Graph, node: fx.Node, sizes: dict[str, fx.Node], traces: dict[Hashable, fx.Graph]) -> None:
    """The operators that the node's operator is made of take its place.

    ``sizes`` are nodes to be read by them, and ``traces`` what calls on other values of the same shapes are made of.
    """
    read, whole, mode = node.all_input_nodes, node.target, fake_mode(graph)
    shapes = call_shapes(mode, whole, *fx.node.map_arg((node.args, node.kwargs), lambda arg: arg.meta["val"]))
    places = str(fx.node.map_arg((node.args, node.kwargs), lambda arg: f"argument {read.index(arg)}"))
    inner_graph = traces.get((shapes, places)) or _traced(mode, node)
    if shapes is not None:
        traces[shapes, places] = inner_graph
    env = dict(zip(inner_graph.find_nodes(op="placeholder"), read, strict=True))
    with graph.inserting_before(node):
        for inner in inner_graph.nodes:
            if inner.op != "call_function":
                continue
            known = sizes.get(str(expression(inner.meta["val"]))) if is_symint(inner) else None
            if known is not None:
                env[inner] = known
            else:
                env[inner] = graph.node_copy(inner, env.__getitem__)
                env[inner].meta = {**node.meta, "val": inner.meta["val"]}
    returned: Any = inner_graph.output_node().args[0]
    if isinstance(returned, fx.Node):
        node.replace_all_uses_with(env[returned])
    else:
        for user in list(node.users):
            assert user.target is operator.getitem
            user.replace_all_uses_with(env[returned[user.args[1]]])
            graph.erase_node(user)
    graph.erase_node(node)


def _traced(mode: FakeTensorMode, node: fx.Node) -> fx.Graph:
    """What the node's operator is made of, as a graph of what it reads."""
    read = node.all_input_nodes

    def call(*values: Any) -> Any:
        args, kwargs = fx.node.map_arg((node.args, node.kwargs), dict(zip(read, values, strict=True)).__getitem__)
        return node.target(*args, **kwargs)  # type: ignore[operator]

    with mode, torch.no_grad():
        made: fx.GraphModule = make_fx(call)(*[arg.meta["val"] for arg in read])
    return made.graph


def _sizes_first(graph: fx.Graph) -> None:
    """Sizes of the inputs are read in the inputs' order, whatever the model needs first."""
    inputs = graph.find_nodes(op="placeholder")
    last = inputs[-1]
    for node in filter(is_tensor, inputs):
        first = next(iter(node.users), node)  # says where in the model the input is read
        for axis, size in enumerate(shape(node)):
            if isinstance(expression(size), int):
                continue
            with graph.inserting_after(last):
                last = graph.call_function(aten.sym_size.int, (node, axis))
            last.meta = {**first.meta, "val": size}
