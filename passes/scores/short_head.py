"""A head over a short list of candidates: the rows of a tail's last product that belong to a few classes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from offramp.errors import SpecError
from offramp.passes.infra.editor import Editor
from offramp.passes.scores.score_builder import ScoreBuilder
from offramp.program.graph import (
    ancestors,
    aten,
    attribute,
    data_inputs,
    dependents,
    is_pointwise,
    is_tensor,
    shape,
    source,
)
from offramp.program.program import evaluate

#: Where products have their activations and their weight, and which axis of that counts classes.
_PRODUCTS: dict[Any, tuple[int, int, int]] = {
    aten.linear.default: (0, 1, 0),
    aten.matmul.default: (0, 1, 1),
    aten.mm.default: (0, 1, 1),
    aten.addmm.default: (1, 2, 1),
}
_RESHAPES = (aten.reshape.default, aten.view.default, aten._unsafe_view.default)
_IDENTITIES = (aten._to_copy.default, aten.alias.default)
_HINT = "measure=top1 or margin, which take any logits"


@dataclass(frozen=True)
class Head:
    """The end of a tail: one product with a weight of V classes, then operators that keep classes apart."""

    product: fx.Node
    after: tuple[fx.Node, ...]


def find_head(graph: fx.Graph, logits: fx.Node) -> Head:
    """The product that ``logits``, float[..., V], are made by, and what comes after it, in graph order.

    Raises:
        SpecError: logits are made in another way; the message names the operator and its place in the model.
    """
    classes = shape(logits)[-1]
    products, after, seen, todo = [], set(), set(), [logits]
    while todo:
        node = todo.pop()
        if node in seen:
            continue
        seen.add(node)
        if node.target in _PRODUCTS:
            products.append(_checked(node, classes))
            continue
        if not _keeps_classes(node, classes):
            raise _refusal(f"{node.target if node.op == 'call_function' else node.name} at {source(node)}")
        after.add(node)
        todo += [arg for arg in data_inputs(node) if _spans(arg, classes) and not _fixed(arg)]
        if bad := [arg for arg in node.all_input_nodes if _spans(arg, classes) and _fixed(arg) and not _floats(arg)]:
            raise _refusal(f"{bad[0].meta['val'].dtype} values for every class at {source(node)}")
    if len(products) != 1:
        raise _refusal(f"{len(products)} products, {' and '.join(source(node) for node in products)}")
    return Head(products[0], tuple(node for node in graph.nodes if node in after))


def _refusal(found: str) -> SpecError:
    return SpecError(
        f"a short list of candidates needs logits that are one product with a weight, scaled or biased perhaps; found "
        f"{found}",
        hint=_HINT,
    )


def _checked(node: fx.Node, classes: int) -> fx.Node:
    _, at, axis = _PRODUCTS[node.target]
    weight: Any = node.args[at]
    if not _fixed(weight):
        raise _refusal(f"a product with a value that depends on the inputs at {source(node)}")
    if len(shape(weight)) != 2 or shape(weight)[axis] != classes:
        raise _refusal(f"a product with a weight of shape {list(shape(weight))} at {source(node)}")
    return node


def _keeps_classes(node: fx.Node, classes: int) -> bool:
    """Whether class i of the node's value depends on class i of its arguments only."""
    if node.op != "call_function" or not _spans(node, classes):
        return False
    if node.target in _RESHAPES:
        sizes: Any = node.args[1]
        return _spans(node.args[0], classes) and sizes[-1] in (classes, -1)
    return node.target in _IDENTITIES or is_pointwise(node)


def _spans(node: Any, classes: int) -> bool:
    return isinstance(node, fx.Node) and is_tensor(node) and len(shape(node)) > 0 and shape(node)[-1] == classes


def _fixed(node: Any) -> bool:
    """Whether a value is the same for all inputs."""
    return isinstance(node, fx.Node) and all(arg.op != "placeholder" for arg in ancestors([node]))


def _floats(node: fx.Node) -> bool:
    return bool(node.meta["val"].is_floating_point())


class ShortHead:
    """Writes copies of a stack's exits' tails whose head has the rows of ``candidates`` only (None: all).

    The rows are buffers named ``exits.STACK.short.`` + the name of the weight that they are from: exits with one head
    share them, and training leaves them alone.
    """

    def __init__(self, editor: Editor, stack: str, candidates: Sequence[int] | None = None) -> None:
        self.editor, self.prefix = editor, f"exits.{stack}.short"
        self.candidates = None if candidates is None else torch.tensor(candidates)
        self._made: dict[fx.Node, fx.Node] = {}
        self._rows: dict[tuple[fx.Node, int], fx.Node] = {}

    def logits(self, builder: ScoreBuilder, hidden: fx.Node, logits: fx.Node) -> fx.Node:
        """The candidates' logits, computed from ``hidden`` without any node that the exit's own tail has.

        Nothing is shared with that, since the score is asked where the row may stay.
        """
        if logits not in self._made:
            self._made[logits] = self._write(builder, hidden, logits)
        return self._made[logits]

    def classes(self, builder: ScoreBuilder, places: fx.Node) -> fx.Node:
        """The classes of the candidates at ``places``, int64 of the same shape."""
        if self.candidates is None:
            return places
        name = f"{self.prefix}.candidates"
        ids = self._known(name, self.candidates) or self.editor.buffer(name, self.candidates, builder.here)
        return builder.call(aten.index.Tensor, ids, [places])

    def _write(self, builder: ScoreBuilder, hidden: fx.Node, logits: fx.Node) -> fx.Node:
        head, classes = find_head(self.editor.graph, logits), int(shape(logits)[-1])
        place, at, axis = _PRODUCTS[head.product.target]
        env: dict[fx.Node, fx.Node] = {}

        def few(arg: fx.Node) -> fx.Node:
            if arg in env:
                return env[arg]
            return self._of(builder, arg, -1) if _spans(arg, classes) and _fixed(arg) else arg

        wanted: list[Any] = [head.product.args[place]]
        wanted += [arg for node in head.after for arg in node.all_input_nodes if not _spans(arg, classes)]
        own = {head.product, *head.after}
        moving = dependents([hidden], self.editor.graph, shapes=True) & ancestors(wanted, stop=[hidden, *own]) - own
        nodes = [node for node in self.editor.graph.nodes if node in moving]
        self.editor.clone(nodes, env, builder.here)
        builder.here = env[nodes[-1]] if nodes else builder.here
        given: list[Any] = list(head.product.args)
        env[given[at]] = self._of(builder, given[at], axis)
        for node in (head.product, *head.after):
            given = list(fx.node.map_arg(node.args, few))
            if node.target in _RESHAPES and given[1][-1] == classes and self.candidates is not None:
                given[1] = [*given[1][:-1], len(self.candidates)]
            env[node] = builder.call(node.target, *given, **dict(fx.node.map_arg(node.kwargs, few)))
        return env[logits]

    def _of(self, builder: ScoreBuilder, weight: Any, axis: int) -> Any:
        """The candidates' part of a value that is the same for all inputs."""
        if self.candidates is None:
            return weight
        axis %= len(shape(weight))
        if (weight, axis) not in self._rows:
            value = evaluate(self.editor.module, [weight], {})[weight].detach()
            value = value.index_select(axis, self.candidates.to(value.device))
            name = f"{self.prefix}.{weight.target if weight.op == 'get_attr' else weight.name}"
            self._rows[weight, axis] = self._known(name, value) or self.editor.buffer(name, value, builder.here)
        return self._rows[weight, axis]

    def _known(self, name: str, value: torch.Tensor) -> fx.Node | None:
        """The node that reads these rows already, after an earlier run of the pass."""
        node = next((n for n in self.editor.graph.find_nodes(op="get_attr") if n.target == name), None)
        if node is not None and not torch.equal(attribute(self.editor.module, name), value):
            raise SpecError(
                f"{name} holds other rows already: a stack has one list of candidates, of one state of its head",
                hint="all short scores of a stack in one insert-scores",
            )
        return node
