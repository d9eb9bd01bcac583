"""What is rewritten before a program is cut, for what a subgraph alone does not show."""

from __future__ import annotations

import logging
from dataclasses import replace

from offramp.export.lowering.merged_products import merge_products
from offramp.export.lowering.pipeline import rewrite
from offramp.export.lowering.rotary import fuse_rotary
from offramp.passes.infra.editor import Editor
from offramp.passes.infra.verifier import verify
from offramp.program.program import Program

_log = logging.getLogger(__name__)


def prepared(program: Program) -> Program:
    """The program as it is lowered: the same computation, with the operators that have an ONNX form of their own.

    Names of cuts, inputs and outputs stay, and the nodes that records pin. Only programs with caches change: theirs are
    run token by token, where time goes by the number of operators. What looks like a rotation and is none is written to
    the log (debug).
    """
    if program.cache is None:
        return program
    editor = Editor(program, "export")
    steps = {"merge-products": merge_products, "fuse-rotary": _fuse_rotary}
    rewrite(editor, steps, "lowering", text=lambda edited: str(edited.graph))
    editor.drop_dead(keep=program.pinned)
    made = replace(editor.finish().program, history=program.history)
    verify(made, "before it is cut")
    return made


def _fuse_rotary(editor: Editor) -> None:
    for note in fuse_rotary(editor):
        _log.debug("not one operator: %s", note)
