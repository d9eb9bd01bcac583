"""Nodes of a block for fewer tokens: what has all of them along an axis becomes what has some."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import sympy
from torch import fx

from offramp.errors import PassError
from offramp.passes.caches.mixing import mixes_tokens
from offramp.passes.caches.roles import broadcasts
from offramp.passes.infra.editor import Editor
from offramp.program.graph import aten, expression, is_symint, is_tensor, shape, source
from offramp.program.ops import TAKE_TOKENS

_RESHAPES = (aten.reshape.default, aten.view.default, aten._unsafe_view.default)
#: Takes of a node's axis the tokens that are meant.
Take = Callable[[fx.Node, int], fx.Node]
#: The error for a reason.
Refusal = Callable[[str], PassError]


def leaving_alone(reason: str) -> PassError:
    """Why tokens cannot leave one by one."""
    return PassError(
        f"tokens cannot leave one by one: {reason}", hint="exits of rows as a whole: leave split-modalities out"
    )


def taken(editor: Editor, places: fx.Node, end: fx.Node, node: fx.Node, axis: int) -> fx.Node:
    """The tokens of a value at some places, before node ``end``."""
    node = turned(editor, node, end) if axis == 0 else node
    node = editor.call(TAKE_TOKENS, node, places, axis or 1, at=end.prev)
    return turned(editor, node, end) if axis == 0 else node


def turned(editor: Editor, node: fx.Node, end: fx.Node) -> fx.Node:
    """Rows before tokens, or tokens before rows."""
    return editor.call(aten.transpose.int, node, 0, 1, at=end.prev)


class Resized:
    """Copies of nodes before node ``end``: along their axes of ``tokens`` they have ``count`` of them.

    ``made`` maps nodes to their copies; what is not there is taken from outside by ``take``. With ``both`` queries and
    keys become fewer; else the keys of attention are all tokens, and ``count`` is a size like no other, which tells
    axes of queries. ``refusal`` makes the error where a node has no copy.
    """

    def __init__(
        self,
        editor: Editor,
        tokens: Any,
        count: fx.Node | int,
        end: fx.Node,
        take: Take,
        both: bool,
        refusal: Refusal = leaving_alone,
    ) -> None:
        self.refusal = refusal
        self.editor, self.tokens, self.count, self.end, self.take, self.both = editor, tokens, count, end, take, both
        self.made: dict[fx.Node, fx.Node] = {}

    def copy(self, node: fx.Node, others: Mapping[fx.Node, fx.Node]) -> fx.Node:
        """The copy of a node; ``others`` of its arguments stand for themselves (all keys, say)."""
        args, kwargs = fx.node.map_arg((node.args, node.kwargs), lambda arg: others.get(arg, self._argument(node, arg)))
        if node.target in _RESHAPES or node.target is aten.expand.default:
            copied: Any = args[0]
            args = (copied, self._sizes(node, copied))
        try:
            made = self.editor.call(node.target, *args, at=self.end.prev, **kwargs)
        except Exception as error:
            raise self._refusal(node, f"does not fit some of the tokens: {str(error).splitlines()[0]}") from error
        made.meta |= {key: node.meta[key] for key in ("nn_module_stack", "stack_trace") if key in node.meta}
        self._check(node, made)
        self.made[node] = made
        return made

    def _argument(self, node: fx.Node, arg: fx.Node) -> Any:
        """What a copy reads: copies, and of what is made outside its tokens."""
        if arg in self.made:
            return self.made[arg]
        if is_symint(arg):
            return self.count if expression(arg.meta["val"]) == self.tokens else arg
        if not is_tensor(arg) or arg.op == "get_attr":
            return arg
        if self.both:
            for axis, size in enumerate(shape(arg)):
                if expression(size) == self.tokens:
                    arg = self.take(arg, axis)
            return arg
        return self._aligned(node, arg)

    def _aligned(self, node: fx.Node, arg: fx.Node) -> fx.Node:
        """Of what meets queries the queries' rows."""
        if node.target is aten.scaled_dot_product_attention.default:
            rank, behind = len(shape(node)), 2
        elif broadcasts(node) or node.target in (aten.cat.default, aten.stack.default, aten.baddbmm.default):
            copies = [self.made[other] for other in node.all_input_nodes if other in self.made]
            places = {len(shape(copy)) - axis for copy in copies for axis in self._axes(copy)}
            if len(places) != 1:
                return arg
            rank, (behind,) = max(len(shape(copy)) for copy in copies), places
        else:
            return arg
        axis = len(shape(arg)) - behind
        if axis < 0 or expression(shape(arg)[axis]) != self.tokens:
            return arg
        for _ in range(rank - len(shape(arg))):
            arg = self.editor.call(aten.unsqueeze.default, arg, 0, at=self.end.prev)
        return self.take(arg, rank - behind)

    def _axes(self, copy: fx.Node) -> list[int]:
        """The axes of fewer tokens in a copy."""
        size = self.count.meta["val"] if isinstance(self.count, fx.Node) else self.count
        return [axis for axis, found in enumerate(shape(copy)) if self._has(found, expression(size))]

    def _has(self, size: Any, tokens: Any) -> bool:
        """Whether a size is that of tokens, or a multiple of it."""
        found = expression(size)
        if isinstance(found, int) or isinstance(tokens, int) or found == tokens:
            return bool(found == tokens)
        ratio = sympy.cancel(found / tokens)
        return bool(sympy.fraction(ratio)[1] == 1)

    def _sizes(self, node: fx.Node, copy: fx.Node) -> list[Any]:
        """The sizes that a copy of a reshape or an expansion has."""
        first: Any = node.args[0]
        wanted: list[Any] = list(node.args[1])  # type: ignore[arg-type]
        before = [axis for axis, size in enumerate(shape(first)) if self._has(size, self.tokens)]
        after = [axis for axis, size in enumerate(shape(node)) if self._has(size, self.tokens)]
        if node.target is aten.expand.default:
            shift = len(shape(node)) - len(shape(first))
            fewer = {axis + shift for axis in self._axes(copy)} if not self.both else set(after)
        elif self.both:
            fewer = set(after)
        else:
            resized = set(self._axes(copy))
            if len(before) != len(after) or not resized <= set(before):
                raise self._refusal(node, "leaves it open which axis counts tokens")
            fewer = {there for here, there in zip(before, after, strict=True) if here in resized}
        found: list[Any] = []
        for axis, (size, given) in enumerate(zip(shape(node), wanted, strict=True)):
            if axis not in fewer:
                found.append(given)
            elif expression(size) == self.tokens:
                found.append(self.count)
            elif -1 in wanted[:axis] + wanted[axis + 1 :] or -1 in found:
                raise self._refusal(node, "joins tokens with another axis")
            else:
                found.append(-1)
        return found

    def _check(self, node: fx.Node, made: fx.Node) -> None:
        """Raise where a copy goes over tokens, as nothing but attention may."""
        if self.both or not is_tensor(made):
            return
        size = self.count.meta["val"] if isinstance(self.count, fx.Node) else self.count
        if reason := mixes_tokens(node, made.args, size):
            raise self._refusal(node, reason)

    def _refusal(self, node: fx.Node, reason: str) -> PassError:
        return self.refusal(f"{node.target} {reason} ({source(node)})")
