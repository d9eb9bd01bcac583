"""What is rewritten before a program is cut, for what a subgraph alone does not show."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from types import MappingProxyType

import torch
from torch import fx

from offramp.errors import PassError
from offramp.export.asked import score_asked
from offramp.export.dataflow import Dataflow
from offramp.export.filled import made_early, of_sizes
from offramp.export.lowering.merged_products import merge_products
from offramp.export.lowering.pipeline import Step, rewrite
from offramp.export.lowering.rotary import fuse_rotary
from offramp.passes.groups.active import run_on_active
from offramp.passes.infra.editor import Editor
from offramp.passes.infra.verifier import verify
from offramp.program.exit import asked_of
from offramp.program.graph import attribute, expression, placeholders, shape
from offramp.program.groups import Groups
from offramp.program.learners import FORMS, WIDTH, Learners
from offramp.program.program import Program

_log = logging.getLogger(__name__)


def prepared(program: Program, forms: Mapping[str, str] = MappingProxyType({})) -> Program:
    """The program as it is lowered: the same computation, with the operators that have an ONNX form of their own.

    Names of cuts, inputs and outputs stay, and the nodes that records pin. Programs with caches change, since they are
    run token by token, where time goes by the number of operators; those with learners, whose width becomes an input;
    and those that need sizes of what a stack makes before it is made. ``forms`` are by the names of the nodes with
    their units, dense for those that are left out. What looks like a rotation and is none is written to the log
    (debug), and scores that cannot be of some tokens alone.
    """
    try:
        return _prepared(program, forms, asked=True)
    except PassError as error:
        _log.debug("scores are of all tokens: %s", error)
        return _prepared(program, forms, asked=False)


def _prepared(program: Program, forms: Mapping[str, str], *, asked: bool) -> Program:
    known = program.learners
    leaving = [item for item in program.groups if _first(program, item) is not None]
    early = made_early(program)
    if program.cache is None and not known and not leaving and not early:
        return program
    editor, steps = Editor(program, "export"), dict[str, Step[Editor]]()
    places = {item.places: _active(editor, item) for item in leaving}
    if program.cache is not None and asked:
        flow = Dataflow(program)
        found = {asked_of(stack.name): score_asked(editor, stack, flow) for stack in program.stacks.values()}
        places |= {name: node for name, node in found.items() if node is not None}
    if early:
        steps["filled"] = partial(_filled, names=early)
    if known:
        steps["width"] = partial(_execution, records=known, forms=forms)
    if program.cache is not None:
        steps |= {"merge-products": merge_products, "fuse-rotary": _fuse_rotary}
    rewrite(editor, steps, "lowering", text=lambda edited: str(edited.graph))
    editor.drop_dead(keep=program.pinned)
    width = {WIDTH: attribute(program.graph_module, WIDTH)} if known else {}
    axes = program.axes
    for name, node in places.items():
        axis = expression(shape(node)[1])
        least = 1 if name in {item.places for item in leaving} else 0
        axes = replace(axes, names={**axes.names, axis: f"{name}_1"}, ranges={**axes.ranges, axis: (least, None)})
    totals = {item.places: item.total(program) for item in leaving}
    everywhere = {name: _everywhere(program, totals.get(name)) for name in places}
    made = editor.finish(example_inputs={**program.example_inputs, **width, **everywhere}, axes=axes).program
    made = replace(made, history=program.history)
    verify(made, "before it is cut")
    return made


def _first(program: Program, item: Groups) -> int | None:
    """After how many blocks a group can first leave; None where there is no exit."""
    blocks = program.stacks[item.stack].blocks
    return min((exit_.after for exit_ in program.exits_of(item.stack) if exit_.after < blocks), default=None)


def _active(editor: Editor, item: Groups) -> fx.Node:
    """Let the blocks behind the first exit run on the tokens that have not left."""
    first = _first(editor.program, item)
    assert first is not None
    return run_on_active(editor, item, first)


def _everywhere(program: Program, count: int | None) -> torch.Tensor:
    """The places of all tokens, in the example; of a chunk's where their number is None."""
    rows = 1
    for name, node in placeholders(program.graph).items():
        if place := program.axes.batch_axis(node):
            rows = program.example_inputs[name].shape[place[0]] // place[1]
            break
    if count is None:
        assert program.cache is not None
        count = program.example_inputs[program.cache.tokens[0]].shape[program.chunk_axis]
    return torch.arange(count).repeat(rows, 1)


def _execution(editor: Editor, records: Sequence[Learners], forms: Mapping[str, str]) -> None:
    """The learners in their forms, and their width as an input."""
    for item in records:
        node = editor[item.hidden]
        node.args = (*node.args, forms.get(item.hidden, FORMS[0]))
    for width in editor.graph.find_nodes(op="get_attr"):
        if width.target == WIDTH:
            value = attribute(editor.module, WIDTH)
            given = editor.input(WIDTH, value.shape, value.dtype)
            editor.replace_uses(width, given, list(width.users))


def _filled(editor: Editor, names: Sequence[str]) -> None:
    for name in names:
        of_sizes(editor, editor[name])


def _fuse_rotary(editor: Editor) -> None:
    for note in fuse_rotary(editor):
        _log.debug("not one operator: %s", note)
