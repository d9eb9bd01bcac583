"""The editor: the one way in which passes change a graph. It counts edits and stamps provenance."""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import fx

from offramp.errors import PassError
from offramp.passes.infra.contract import PassResult
from offramp.program.graph import add_call, attribute, copied, fake_mode, results
from offramp.program.program import Program
from offramp.program.symbols import new_axis


class Editor:
    """A private copy of a program's graph, and the edits made to it.

    Every node made by it carries ``meta["provenance"]``: the pass, and the node that it was made for. Names of
    existing nodes do not change; node lookups go by name (``editor[name]``).
    """

    def __init__(self, program: Program, pass_text: str) -> None:
        self.program = program
        self.text = pass_text
        self.graph = copied(program.graph)
        self.module = fx.GraphModule(program.graph_module, self.graph, "Program")
        self.nodes: dict[str, fx.Node] = {node.name: node for node in self.graph.nodes}
        self.edits: Counter[str] = Counter()
        self._fake = fake_mode(program.graph)

    def __getitem__(self, name: str) -> fx.Node:
        """The node of that name."""
        return self.nodes[name]

    def parameter(self, name: str, value: torch.Tensor, like: fx.Node) -> fx.Node:
        """A new weight of the program under ``name``, read by a new node before ``like``."""
        return self._attribute(name, torch.nn.Parameter(value.clone()), like)

    def buffer(self, name: str, value: torch.Tensor, like: fx.Node) -> fx.Node:
        """A new tensor of the program that is not trained, as `parameter`."""
        return self._attribute(name, torch.nn.Buffer(value.clone()), like)

    def _attribute(self, name: str, value: torch.Tensor, like: fx.Node) -> fx.Node:
        owner, _, leaf = name.rpartition(".")
        holder = self.module
        for part in owner.split(".") if owner else ():
            if not hasattr(holder, part):
                holder.add_module(part, torch.nn.Module())
            holder = getattr(holder, part)
        if hasattr(holder, leaf):
            raise PassError(f"the program already has a weight named {name}")
        setattr(holder, leaf, value)
        with self.graph.inserting_before(like):
            node = self.graph.create_node("get_attr", name)
        node.meta["val"] = self._fake.from_tensor(value, static_shapes=True)
        return self._made(node, like)

    def input(self, name: str, sizes: Sequence[Any], dtype: torch.dtype) -> fx.Node:
        """A new input of the program; a size may be that of another value, or one of `new_size`."""
        with self.graph.inserting_before(next(node for node in self.graph.nodes if node.op != "placeholder")):
            node = self.graph.placeholder(name)
        with self._fake:
            node.meta["val"] = torch.empty(tuple(sizes), dtype=dtype)
        return self._made(node, node)

    def new_size(self, name: str, hint: int) -> torch.SymInt:
        """A size of any length that is equal to no other; ``hint`` is its length where torch looks for one."""
        assert self._fake.shape_env is not None
        return new_axis(self._fake.shape_env, name, hint)

    def call(self, target: Any, *args: Any, at: fx.Node, **kwargs: Any) -> fx.Node:
        """A new call of ``target`` right after node ``at``; the value's shape is computed from the arguments'."""
        with self.graph.inserting_after(at):
            return self._made(add_call(self._fake, self.graph, target, *args, **kwargs), at)

    def clone(self, nodes: Iterable[fx.Node], mapping: dict[fx.Node, fx.Node], at: fx.Node) -> dict[fx.Node, fx.Node]:
        """Copies of ``nodes`` (in graph order) after ``at``, reading through ``mapping``, which is extended."""
        for node in nodes:
            with self.graph.inserting_after(at):
                copy_ = self.graph.node_copy(node, lambda arg: mapping.get(arg, arg))
            mapping[node] = at = self._made(copy_, node)
        return mapping

    def copied_weights(self, nodes: Iterable[fx.Node], prefix: str, at: fx.Node) -> dict[fx.Node, fx.Node]:
        """A trained copy of every weight that ``nodes`` read, named ``prefix`` + its name."""
        mapping: dict[fx.Node, fx.Node] = {}
        for node in nodes:
            for weight in node.all_input_nodes:
                if weight.op == "get_attr" and weight not in mapping:
                    value = attribute(self.module, str(weight.target))
                    if isinstance(value, torch.nn.Parameter):
                        mapping[weight] = self.parameter(f"{prefix}.{weight.target}", value.detach(), at)
        return mapping

    def replace_uses(self, old: fx.Node, new: fx.Node, inside: Iterable[fx.Node]) -> None:
        """Let ``inside`` read ``new`` instead of ``old``."""
        for node in inside:
            if old in node.all_input_nodes:
                node.replace_input_with(old, new)
                self.edits["replaced"] += 1

    def rewrite(self, node: fx.Node, target: Any, *args: Any) -> None:
        """Let a node compute another value of its shape and dtype, under its name."""
        node.target, node.args, node.kwargs = target, args, {}
        self.edits["replaced"] += 1

    def returns(self, added: Mapping[str, fx.Node], dropped: Iterable[str] = ()) -> None:
        """Let the graph return ``added`` under their names too, and no longer ``dropped``."""
        output = self.graph.output_node()
        known = {name: node for name, node in results(self.graph).items() if name not in set(dropped)}
        taken = set(known) & set(added)
        if taken:
            raise PassError(f"the program already returns {sorted(taken)}")
        output.args = ({**known, **added},)

    def drop_dead(self, keep: Collection[str] = ()) -> None:
        """Erase nodes that nothing reads; those named in ``keep`` stay."""
        before = len(self.graph.nodes)
        self.graph.eliminate_dead_code(lambda node: node.op in ("placeholder", "output") or node.name in keep)
        self.edits["erased"] += before - len(self.graph.nodes)

    def finish(self, notes: tuple[str, ...] = (), **changes: Any) -> PassResult:
        """The rewritten program, with ``changes`` of its fields; the given program where nothing was edited."""
        if not any(self.edits.values()):
            return PassResult(self.program, dict(self.edits), notes)
        self.graph.lint()
        module = fx.GraphModule(self.module, self.graph, "Program")  # with the weights that are read, and no others
        history = (*self.program.history, self.text)
        program = replace(self.program, graph_module=module, history=history, **changes)
        return PassResult(program, dict(self.edits), notes)

    def _made(self, node: fx.Node, origin: fx.Node) -> fx.Node:
        node.meta = copy.copy(node.meta)
        node.meta["provenance"] = {"pass": self.text, "from": origin.name}
        for key in ("nn_module_stack", "stack_trace"):
            if key in origin.meta:
                node.meta.setdefault(key, origin.meta[key])
        self.nodes[node.name] = node
        self.edits["inserted"] += 1
        return node
