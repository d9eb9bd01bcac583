"""What is rewritten before a program is cut, for what a subgraph alone does not show."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from types import MappingProxyType

from offramp.export.lowering.merged_products import merge_products
from offramp.export.lowering.pipeline import Step, rewrite
from offramp.export.lowering.rotary import fuse_rotary
from offramp.passes.infra.editor import Editor
from offramp.passes.infra.verifier import verify
from offramp.program.graph import attribute
from offramp.program.learners import FORMS, WIDTH, Learners
from offramp.program.program import Program

_log = logging.getLogger(__name__)


def prepared(program: Program, forms: Mapping[str, str] = MappingProxyType({})) -> Program:
    """The program as it is lowered: the same computation, with the operators that have an ONNX form of their own.

    Names of cuts, inputs and outputs stay, and the nodes that records pin. Programs with caches change, since they are
    run token by token, where time goes by the number of operators; and those with learners, whose width becomes an
    input. ``forms`` are by the names of the nodes with their units, dense for those that are left out. What looks like
    a rotation and is none is written to the log (debug).
    """
    known = program.learners
    if program.cache is None and not known:
        return program
    editor, steps = Editor(program, "export"), dict[str, Step[Editor]]()
    if known:
        steps["width"] = partial(_execution, records=known, forms=forms)
    if program.cache is not None:
        steps |= {"merge-products": merge_products, "fuse-rotary": _fuse_rotary}
    rewrite(editor, steps, "lowering", text=lambda edited: str(edited.graph))
    editor.drop_dead(keep=program.pinned)
    width = {WIDTH: attribute(program.graph_module, WIDTH)} if known else {}
    made = editor.finish(example_inputs={**program.example_inputs, **width}).program
    made = replace(made, history=program.history)
    verify(made, "before it is cut")
    return made


def _execution(editor: Editor, records: Sequence[Learners], forms: Mapping[str, str]) -> None:
    """The learners in their forms, and their width as an input."""
    for item in records:
        node = editor[item.hidden]
        node.args = (*node.args, forms.get(item.hidden, FORMS[0]))
    for width in editor.graph.find_nodes(op="get_attr"):
        if width.target == WIDTH:
            given = editor.input(WIDTH, attribute(editor.module, WIDTH))
            editor.replace_uses(width, given, list(width.users))


def _fuse_rotary(editor: Editor) -> None:
    for note in fuse_rotary(editor):
        _log.debug("not one operator: %s", note)
