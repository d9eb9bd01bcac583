"""Features that are joined before the text (``cat(image, embed(ids))``): the ids get a place for each of them in front.

So the program's tokens are those that attention sees, and the features take the place of the first ones: that is a join
as any other. A place in front holds any id: what it becomes is never read.
"""

from __future__ import annotations

import operator
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import sympy
import torch
from torch import fx
from torch._dispatch.python import enable_python_dispatcher
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import ShapeEnv

from offramp.bundle.expressions import evaluate
from offramp.errors import PassError
from offramp.passes.groups.bounds import size_node
from offramp.passes.groups.joined import along, flat, joins
from offramp.passes.groups.resized import Resized
from offramp.passes.infra.editor import Editor
from offramp.program.fake_values import fake_result
from offramp.program.graph import (
    ancestors,
    aten,
    attribute,
    dependents,
    expression,
    placeholders,
    read_by,
    results,
    shape,
    sizes_of,
)
from offramp.program.groups import token_axis
from offramp.program.program import Program
from offramp.program.symbols import new_axis

_END = 2**63 - 1


def with_places_ahead(program: Program) -> tuple[Program, int | str, tuple[str, ...]]:
    """The program whose inputs over tokens have a place in front for each feature that is joined before them.

    Returns it with how many that are (over its axes), and the outputs that have none in front: of them the program
    gives those places too. Where nothing is joined so, it is the given program, and there are none.
    """
    join = _join(program)
    if join is None:
        return program, 0, ()
    *features, text = flat(join)
    ahead = sum((sympy.sympify(expression(shape(part)[1])) for part in features), sympy.Integer(0))
    longer, ahead, drops = _longer(program, expression(shape(text)[1]), ahead)
    made, cut = _all_places(longer, join.name, ahead, drops)
    return made, made.axes.describe(ahead if not ahead.is_Integer else int(ahead)), cut


def _join(program: Program) -> fx.Node | None:
    """The node that puts features before embedded tokens of a causal stack."""
    causal = [stack.input for stack in program.stacks.values() if stack.role == "decoder"]
    for start, axis in ((program.nodes[name], token_axis(program, name)) for name in causal):
        for node in joins(start, expression(shape(start)[axis])):
            if len(shape(node)) != 3 or along(node) != 1:
                continue
            *features, text = flat(node)
            tokens = expression(shape(text)[1])
            own = {n for n in placeholders(program.graph).values() if tokens in sizes_of(n)}
            if tokens in program.axes.names and features and own & read_by([text]) and not own & read_by(features):
                return node
    return None


def _no_room(reason: str) -> PassError:
    """Why what is made of the tokens cannot have places in front."""
    return PassError(
        f"insert-cache: features stand before the text, and what is made of it has no places for them: {reason}",
        hint="leave insert-cache out; or let features take the places of ids that stand for them (masked_scatter)",
    )


def _longer(program: Program, tokens: Any, ahead: Any) -> tuple[Program, Any, list[str]]:
    """The program whose inputs over ``tokens`` have ``ahead`` more of them in front; how many, and what drops them.

    Raises:
        PassError: an input has several axes of tokens, or a size that is no axis of its own.
    """
    count = evaluate(program.axes.describe(ahead), program.sizes(program.example_inputs))
    made = _Resymbolled(program, {tokens: count})
    nodes, inputs = made.nodes, placeholders(program.graph)
    start = size_node(
        program,
        ahead,
        lambda target, *args: made.call(target, *fx.node.map_arg(args, made.known)),
        "leave insert-cache out",
    )
    drops: list[str] = []
    for name, node in inputs.items():
        sizes = sizes_of(node)
        if sizes.count(tokens) > 1:
            raise PassError(
                f"insert-cache: features stand before the text, and input {name} has several axes of its tokens",
                hint="masks of the tokens alone, [batch, tokens]; or none",
            )
        if tokens in sizes:
            size = made.call(operator.sub, made.call(aten.sym_size.int, nodes[node], sizes.index(tokens)), start)
            nodes |= {
                user: size
                for user in node.users
                if user.target is aten.sym_size.int and user.args[1] == sizes.index(tokens)
            }
            nodes[node] = made.call(aten.slice.Tensor, nodes[node], sizes.index(tokens), start, _END)
            drops.append(nodes[node].name)
    for node in program.graph.nodes:
        if node not in nodes and node.op != "output":
            made.copy(node)
    made.graph.output(fx.node.map_arg(program.graph.output_node().args[0], nodes.__getitem__))
    axes, symbols = program.axes, {old: expression(new) for old, new in made.symbols.items()}
    low, high = axes.ranges[tokens]
    more = (low + (count if ahead.is_Integer else 1), high and high + count)
    ranges = {**axes.ranges, tokens: more}
    longer = replace(
        program,
        graph_module=fx.GraphModule(program.graph_module, made.graph, "Program"),
        axes=replace(
            axes,
            names={symbols[old]: name for old, name in axes.names.items()},
            batch=symbols.get(axes.batch),
            tokens=tuple(symbols[old] for old in axes.tokens),
            ranges={symbols[old]: limits for old, limits in ranges.items()},
        ),
        example_inputs={
            name: extended(program.example_inputs[name], [expression(s) == tokens for s in shape(node)], count)
            for name, node in inputs.items()
        },
    )
    return longer, ahead.xreplace(symbols), drops


def extended(value: torch.Tensor, along: Sequence[bool], ahead: int) -> torch.Tensor:
    """An input with its first place repeated ``ahead`` more times along an axis."""
    if True not in along:
        return value
    axis = list(along).index(True)
    return value.index_select(axis, (torch.arange(value.shape[axis] + ahead) - ahead).clamp(min=0))


class _Resymbolled:
    """A copy of a program's graph whose sizes are new symbols; ``longer`` says by how much some have grown."""

    def __init__(self, program: Program, longer: Mapping[Any, int]) -> None:
        self.program, self.graph = program, fx.Graph()
        self.mode = FakeTensorMode(shape_env=ShapeEnv())
        self.mode.cache_enabled = False  # `fake_result` keeps its own, which takes less
        self.symbols: dict[Any, torch.SymInt] = {}
        self.nodes: dict[fx.Node, fx.Node] = {}
        for name, node in placeholders(program.graph).items():
            for symbol, length in zip(sizes_of(node), program.example_inputs[name].shape, strict=True):
                if not isinstance(symbol, int) and not symbol.is_Symbol:
                    raise PassError(
                        f"insert-cache: features stand before the text, and input {name} has a size of {symbol}",
                        hint="inputs whose axes are of any length",
                    )
                if not isinstance(symbol, int) and symbol not in self.symbols:
                    assert self.mode.shape_env is not None
                    hint = max(2, length + longer.get(symbol, 0))
                    self.symbols[symbol] = new_axis(self.mode.shape_env, str(symbol), hint)
            sizes = [size if isinstance(size, int) else self.symbols[size] for size in sizes_of(node)]
            with self.mode:
                value = torch.empty(sizes, dtype=node.meta["val"].dtype)
            self.nodes[node] = self.graph.placeholder(str(node.target))
            self.nodes[node].meta = {**node.meta, "val": value}

    def known(self, node: fx.Node) -> fx.Node:
        """The copy of a node; what is new stands for itself."""
        return self.nodes.get(node, node)

    def copy(self, node: fx.Node) -> None:
        """Copy a weight or a call, its shape computed anew."""
        made = self.graph.node_copy(node, self.nodes.__getitem__)
        if node.op == "get_attr":
            weight = attribute(self.program.graph_module, str(node.target))
            value = self.mode.from_tensor(weight, static_shapes=True)
        else:
            value = self._value(node.target, made.args, made.kwargs)
        made.meta = {**node.meta, "val": value}
        self.nodes[node] = made

    def call(self, target: Any, *args: Any) -> fx.Node:
        """A new call."""
        made = self.graph.call_function(target, args)
        made.meta = {"val": self._value(target, args, {})}
        return made

    def _value(self, target: Any, args: Any, kwargs: Any) -> Any:
        with enable_python_dispatcher():
            return fake_result(self.mode, target, args, kwargs)


def _all_places(program: Program, join: str, ahead: Any, drops: Iterable[str]) -> tuple[Program, tuple[str, ...]]:
    """The program in which the embedded text has the places in front too, and the features are put into them.

    ``drops`` are the nodes that leave the places in front of inputs out.
    """
    editor = Editor(program, "insert-cache")
    node = editor[join]
    *features, text = flat(node)
    dropped = {editor[drop]: editor[drop].all_input_nodes[0] for drop in drops}
    start: Any = next(iter(dropped)).args[2]
    tokens, first = expression(shape(text)[1]), next(iter(dropped.values()))
    axis = next(i for i, size in enumerate(shape(first)) if expression(size) == expression(shape(node)[1]))
    count = editor.call(aten.sym_size.int, first, axis, at=first.next)
    wider = _Wider(editor, tokens, count, start)
    copies = wider.of(dropped, [text], node)
    joined = features[0] if len(features) == 1 else editor.call(aten.cat.default, features, 1, at=node.prev)
    editor.rewrite(node, aten.slice_scatter.default, copies[text], joined, 1, 0, start)
    returned, behind = dict(results(editor.graph)), dependents([node], editor.graph)
    cuts = {
        item: item.all_input_nodes[0]
        for item in editor.graph.find_nodes(op="call_function", target=aten.slice.Tensor)
        if item in behind and _drops(item, ahead) and expression(shape(item)[_axis(item)]) == tokens
    }
    inside = {*cuts, *dependents(cuts, editor.graph)}
    ended = [name for name, made in returned.items() if made in inside]
    if ended:
        copies = wider.of(cuts, [returned[name] for name in ended], editor.graph.output_node())
        editor.graph.output_node().args = ({**returned, **{name: copies[returned[name]] for name in ended}},)
    editor.drop_dead(keep=program.pinned)
    made = editor.finish().program
    return replace(made, history=program.history), tuple(name for name in ended if name in program.outputs)


def _drops(node: fx.Node, ahead: Any) -> bool:
    """Whether a node leaves out the first ``ahead`` places of an axis."""
    if node.target is not aten.slice.Tensor or len(node.args) < 3 or node.args[3:4] not in ((), (_END,)):
        return False
    start: Any = node.args[2]
    return bool(expression(start.meta["val"] if isinstance(start, fx.Node) else start) == ahead)


def _axis(node: fx.Node) -> int:
    """The axis of a slice."""
    axis: Any = node.args[1]
    return int(axis)


class _Wider:
    """Copies of what has ``tokens`` of text along an axis, with all ``count`` places, ``start`` of them in front."""

    def __init__(self, editor: Editor, tokens: Any, count: fx.Node, start: fx.Node | int) -> None:
        self.editor, self.tokens, self.count, self.start = editor, tokens, count, start

    def of(
        self, known: Mapping[fx.Node, fx.Node], wanted: Iterable[fx.Node], end: fx.Node
    ) -> Mapping[fx.Node, fx.Node]:
        """Copies of all between ``known`` nodes, which have theirs, and ``wanted`` ones, before ``end``."""
        copies = Resized(self.editor, self.tokens, self.count, end, partial(self._padded, end), True, _no_room)
        copies.made |= known
        inside = dependents(known, self.editor.graph) & ancestors(wanted)
        for node in [node for node in self.editor.graph.nodes if node in inside]:
            copies.copy(node, {})
        return copies.made

    def _padded(self, end: fx.Node, node: fx.Node, axis: int) -> fx.Node:
        """What is made of positions, its first place repeated in front: nobody reads what is there."""
        one = self.editor.call(aten.slice.Tensor, node, axis, 0, 1, at=end.prev)
        sizes = [self.start if i == axis else -1 for i in range(len(shape(node)))]
        front = self.editor.call(aten.expand.default, one, sizes, at=end.prev)
        return self.editor.call(aten.cat.default, [front, node], axis, at=end.prev)
