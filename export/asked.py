"""Scores of the tokens that somebody asks about: of a chunk's last ones as a rule, of none where nobody asks."""

from __future__ import annotations

from functools import partial

import torch
from torch import fx

from offramp.export.dataflow import Dataflow
from offramp.export.requests import scores_of
from offramp.passes.groups.resized import Resized, taken
from offramp.passes.infra.editor import Editor
from offramp.program.analysis.stacks import Stack
from offramp.program.exit import asked_of
from offramp.program.graph import ancestors, dependents, expression, is_tensor, results, shape
from offramp.program.groups import token_axis


def score_asked(editor: Editor, stack: Stack, flow: Dataflow) -> fx.Node | None:
    """Let what exits score by hidden states alone be of tokens at some places; returns the input that says which.

    ``state -> scores [batch, tokens]``  becomes  ``take(state, places) -> scores [batch, places]``

    None where no exit of the stack scores tokens so.

    Raises:
        PassError: a score of a token depends on others.
    """
    program = editor.program
    if program.nodes[stack.input] not in flow.chunked:
        return None
    axis = token_axis(program, stack.input)
    sizes = shape(program.nodes[stack.input])
    tokens = expression(sizes[axis])
    wanted = [node for item in program.exits_of(stack.name) for node in scores_of(flow, item)[0]]
    wanted = [node for node in wanted if expression(shape(node)[-1]) == tokens]
    if not wanted or isinstance(tokens, int):
        return None
    count = editor.new_size(asked_of(stack.name), 2)
    places = editor.input(asked_of(stack.name), (sizes[1 - axis], count), torch.int64)
    states = [editor[name] for name in stack.cuts]
    scores = [editor[node.name] for node in wanted]
    end = editor.graph.output_node()
    some = editor.call(torch.ops.aten.sym_size.int, places, 1, at=end.prev)
    copies = Resized(editor, tokens, some, end, partial(taken, editor, places, end), both=False)
    inside = ancestors(scores, stop=states) & dependents(states, editor.graph) - set(states)
    read = {arg for node in inside for arg in node.all_input_nodes}
    for state in states:
        if state in read:
            copies.made[state] = taken(editor, places, end, state, axis)
    for node in [node for node in editor.graph.nodes if node in inside and is_tensor(node)]:
        copies.copy(node, {})
    given = {name: node for name, node in results(editor.graph).items() if node in scores}
    editor.returns({name: copies.made[node] for name, node in given.items()}, dropped=given)
    return places
