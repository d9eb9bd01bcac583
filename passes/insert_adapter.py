"""``insert-adapter``: a small trained module between an exit's hidden state and its tail."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import ClassVar, Literal

import torch
from torch import fx

from offramp.bundle.measures import OF_OWN_HEAD
from offramp.errors import SpecError
from offramp.passes.infra.contract import Pass, PassResult, blocks_named, stack_named
from offramp.passes.infra.editor import Editor
from offramp.program.exit import Exit
from offramp.program.graph import aten, shape
from offramp.program.program import Program
from offramp.program.record import exchanged

KINDS = ("identity", "linear", "norm-linear", "bottleneck", "mlp", "block")


@dataclass(frozen=True, repr=False)
class InsertAdapter(Pass):
    """An adapter at each named exit (DEED, arXiv 2311.08623, calls it adaptation module).

    ``h2 -> state -> tail'``  becomes  ``h2 -> state -> adapter -> tail'``

    Options: ``stack``; ``after``, counts of blocks that have an exit, or "all" for every exit; ``kind``:

    - identity: nothing; linear: ``W h + b`` (starts as the identity); norm-linear: layer norm, then linear
    - bottleneck, mlp: ``h + W2 gelu(W1 h)`` through ``width`` features (a quarter, four times the width); W2
      starts at zero, so the exit starts as it was
    - block: a copy of the stack's last block, weights too

    Weights are named ``exits.STACK.AFTER.adapter.*``.

    Requires: an exit after each count (``insert-exits``).
    Ensures: exits that have an adapter already keep it, and are noted.
    Invalidates: thresholds that were chosen for the exit.
    """

    name: ClassVar[str] = "insert-adapter"
    stack: str | None = None
    after: tuple[int, ...] | int | Literal["all"] = "all"
    kind: str = "norm-linear"
    width: int | None = None

    def requires(self, program: Program) -> None:
        """The kind is known and every count has an exit."""
        stack = stack_named(program, self.stack)
        if program.groups_of(stack):
            raise SpecError(
                f"tokens leave stack {stack!r} in groups, each at another exit, and go through one tail",
                hint="leave insert-adapter out; or split-modalities{form=separate}",
            )
        if self.kind not in KINDS:
            raise SpecError(f"kind={self.kind!r}: there are {', '.join(KINDS)}")
        if self.width is not None and (not isinstance(self.width, int) or self.width < 1):
            raise SpecError(f"width={self.width}: a number of features, 1 or more")
        have = [item.after for item in program.exits_of(stack)]
        wanted = have if self.after == "all" else blocks_named(program, stack, self.after)
        missing = sorted(set(wanted) - set(have))
        if missing or not have:
            raise SpecError(
                f"stack {stack!r} has exits after {have or 'no block'}, not after {missing or 'any'}",
                hint=f"insert-exits{{stack={stack},after=...}} first",
            )
        late = [e.after for e in program.exits_of(stack) if e.after in wanted and set(e.scores) & set(OF_OWN_HEAD)]
        if late and self.kind != "identity":
            raise SpecError(
                f"the exits after {late} have scores of heads of their own, which read the state without an adapter",
                hint="insert-adapter before insert-scores",
            )

    def run(self, program: Program) -> PassResult:
        """Insert the adapters."""
        name = stack_named(program, self.stack)
        editor = Editor(program, repr(self))
        exits, notes = [], []
        for item in program.exits:
            chosen = self.after == "all" or item.after in blocks_named(program, name, self.after)
            if item.stack != name or not chosen or item.after == program.stacks[name].blocks:
                exits.append(item)
                continue
            if item.adapter != "identity" or self.kind == "identity":
                notes.append(f"the exit after block {item.after} has the adapter {item.adapter} already")
                exits.append(item)
                continue
            state = editor[item.state]
            readers = list(state.users)
            if self.kind == "block":
                adapted = _block(editor, program, name, state, f"exits.{name}.{item.after}.adapter")
            else:
                adapted = self._small(editor, state, f"exits.{name}.{item.after}.adapter")
            editor.replace_uses(state, adapted, readers)
            exits.append(replace(item, state=adapted.name, adapter=self.kind))
        return editor.finish(tuple(notes), records=exchanged(program.records, Exit, exits))

    def _small(self, editor: Editor, state: fx.Node, prefix: str) -> fx.Node:
        features, dtype = int(shape(state)[-1]), state.meta["val"].dtype

        def parameter(name: str, value: torch.Tensor) -> fx.Node:
            return editor.parameter(f"{prefix}.{name}", value.to(dtype), state)

        def linear(name: str, weight: torch.Tensor) -> Callable[[fx.Node], fx.Node]:
            w = parameter(f"{name}.weight", weight)
            b = parameter(f"{name}.bias", torch.zeros(weight.shape[0]))
            return lambda x: editor.call(aten.linear.default, x, w, b, at=x)

        if self.kind == "linear":
            return linear("linear", torch.eye(features))(state)
        if self.kind == "norm-linear":
            w, b = parameter("norm.weight", torch.ones(features)), parameter("norm.bias", torch.zeros(features))
            normed = editor.call(aten.layer_norm.default, state, [features], w, b, at=state)
            return linear("linear", torch.eye(features))(normed)
        width = self.width or (max(1, features // 4) if self.kind == "bottleneck" else 4 * features)
        first = torch.empty(width, features)
        torch.nn.init.xavier_uniform_(first, generator=torch.Generator().manual_seed(0))
        inner = linear("down" if self.kind == "bottleneck" else "fc1", first)(state)
        inner = editor.call(aten.gelu.default, inner, at=inner)
        inner = linear("up" if self.kind == "bottleneck" else "fc2", torch.zeros(features, width))(inner)
        return editor.call(aten.add.Tensor, state, inner, at=inner)


def _block(editor: Editor, program: Program, name: str, state: fx.Node, prefix: str) -> fx.Node:
    """A copy of the stack's last block that reads ``state``."""
    stack = program.stacks[name]
    nodes = [editor[node.name] for node in program.block_nodes(stack, stack.blocks - 1)]
    mapping = {editor[stack.cuts[-2]]: state, **editor.copied_weights(nodes, prefix, state)}
    order = {node: i for i, node in enumerate(editor.graph.nodes)}
    outside = {arg for node in nodes for arg in node.all_input_nodes if arg not in nodes and arg not in mapping}
    editor.clone(nodes, mapping, max({state, *outside}, key=order.__getitem__))
    return mapping[editor[stack.output]]
