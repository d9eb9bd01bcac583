"""A stack for each group of tokens, with the same weights."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from offramp.passes.infra.contract import PassResult
from offramp.passes.infra.editor import Editor
from offramp.program.groups import Group


def run_apart(editor: Editor, name: str, groups: Sequence[Group]) -> PassResult:
    raise NotImplementedError
