"""The editor: every change is counted, stamped, and made to a copy."""

# mypy: disable-error-code="no-any-return"
from __future__ import annotations

from dataclasses import replace

import pytest
import tiny
import torch
from torch import fx, nn

from offramp.errors import PassError
from offramp.passes.infra.editor import Editor
from offramp.program import Program, capture
from offramp.program.graph import aten, results, shape


@pytest.fixture
def editor(encoder: tiny.Captured) -> Editor:
    return Editor(encoder.program, "a-pass{option=1}")


def _logits(editor: Editor) -> fx.Node:
    return results(editor.graph)["logits"]


def test_the_copy_has_the_names_and_weights_of_the_original(encoder: tiny.Captured, editor: Editor) -> None:
    assert [node.name for node in editor.graph.nodes] == [node.name for node in encoder.program.graph.nodes]
    assert not {id(node) for node in editor.graph.nodes} & {id(node) for node in encoder.program.graph.nodes}
    own, copied = (dict(m.named_parameters()) for m in (encoder.program.module, editor.module))
    assert set(own) == set(copied)
    assert all(weight is copied[name] for name, weight in own.items())


def test_a_call_knows_its_shape_and_origin(editor: Editor) -> None:
    logits = _logits(editor)
    node = editor.call(aten.cat.default, [logits, logits], 1, at=logits)
    assert editor[node.name] is node
    assert node.prev is logits
    assert (shape(node)[0], int(shape(node)[1])) == (shape(logits)[0], 2 * tiny.CLASSES)
    assert node.meta["provenance"] == {"pass": "a-pass{option=1}", "from": logits.name}
    assert node.meta["nn_module_stack"] == logits.meta["nn_module_stack"]
    assert editor.edits == {"inserted": 1}


def test_a_call_that_does_not_fit_raises_where_it_is_made(editor: Editor) -> None:
    with pytest.raises(RuntimeError):
        editor.call(aten.mm.default, _logits(editor), _logits(editor), at=_logits(editor))


def test_a_parameter_is_added_to_the_copy_alone(encoder: tiny.Captured, editor: Editor) -> None:
    value = torch.ones(3)
    node = editor.parameter("exits.encoder.2.scale", value, _logits(editor))
    assert node.next is _logits(editor)
    made = editor.module.get_parameter("exits.encoder.2.scale")
    assert isinstance(made, nn.Parameter)
    assert made.data_ptr() != value.data_ptr()
    assert not hasattr(encoder.program.module, "exits")
    editor.parameter("blocks.0.scale", value, _logits(editor))
    assert not hasattr(encoder.program.module.get_submodule("blocks.0"), "scale")
    editor.parameter("alone", value, _logits(editor))
    assert editor.edits == {"inserted": 3}


def test_a_name_of_a_weight_is_taken_once(editor: Editor) -> None:
    editor.parameter("exits.encoder.2.scale", torch.ones(3), _logits(editor))
    for name in ("exits.encoder.2.scale", "head.weight", "exits.encoder"):
        with pytest.raises(PassError, match=f"already has a weight named {name}"):
            editor.parameter(name, torch.ones(3), _logits(editor))


def test_clones_read_through_the_mapping(editor: Editor, encoder: tiny.Captured) -> None:
    stack = encoder.program.stacks["encoder"]
    tail = [editor[node.name] for node in encoder.program.tail_nodes(stack)]
    end, start = editor[stack.output], editor[stack.cuts[1]]
    mapping = editor.clone(tail, {end: start}, tail[-1])
    copies = [mapping[node] for node in tail]
    assert [node.target for node in copies] == [node.target for node in tail]
    assert end not in {arg for node in copies for arg in node.all_input_nodes}
    assert copies[0].prev is tail[-1]
    assert [node.meta["provenance"]["from"] for node in copies] == [node.name for node in tail]
    editor.returns({"short": mapping[_logits(editor)]})
    program = editor.finish().program
    expected = encoder.truncated(1)["logits"]
    tiny.assert_same(tiny.outputs(program.module, encoder.inputs), {"short": expected})


def test_copied_weights_are_those_that_train(encoder: tiny.Captured) -> None:
    model = tiny.seeded(Buffered)
    program = capture(model, tiny.text(), dynamic={})
    editor = Editor(program, "a-pass")
    stack = program.stacks["encoder"]
    tail = [editor[node.name] for node in program.tail_nodes(stack)]
    mapping = editor.copied_weights(tail, "own", tail[0])
    copies = {str(old.target): str(new.target) for old, new in mapping.items()}
    assert copies == {name: f"own.{name}" for name in ("leave.weight", "leave.bias", "head.weight", "head.bias")}
    for old, new in copies.items():
        assert editor.module.get_parameter(new).equal(model.get_parameter(old))
        assert editor.module.get_parameter(new) is not model.get_parameter(old)


class Buffered(tiny.Encoder):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("scale", torch.ones(tiny.CLASSES))
        self.scale: torch.Tensor

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"logits": super().forward(input_ids, attention_mask)["logits"] * self.scale}


def test_uses_are_replaced_where_asked(editor: Editor) -> None:
    mask = editor["attention_mask"]
    readers = list(mask.users)
    assert len(readers) > 1
    other = editor.call(aten.neg.default, mask, at=mask)
    editor.replace_uses(mask, other, readers[:1])
    assert readers[0] in other.users
    assert readers[1] in mask.users
    assert editor.edits == {"inserted": 1, "replaced": 1}


def test_outputs_are_added_and_dropped(editor: Editor) -> None:
    editor.returns({"again": _logits(editor)})
    with pytest.raises(PassError, match=r"already returns \['again'\]"):
        editor.returns({"again": _logits(editor)})
    editor.returns({"other": _logits(editor)}, dropped=["again"])
    assert list(results(editor.graph)) == ["logits", "other"]


def test_what_nothing_reads_is_dropped_but_inputs_and_kept_nodes_stay(editor: Editor) -> None:
    ids = editor["input_ids"]
    kept, lost = (editor.call(target, ids, at=ids) for target in (aten.sin.default, aten.cos.default))
    editor.drop_dead(keep={kept.name})
    left = {node.name for node in editor.graph.nodes}
    assert kept.name in left
    assert lost.name not in left
    assert {"input_ids", "attention_mask"} <= left
    assert editor.edits == {"inserted": 2, "erased": 1}


def test_without_edits_the_program_is_returned(encoder: tiny.Captured, editor: Editor) -> None:
    editor.drop_dead()
    result = editor.finish(("nothing to do",))
    assert not result.modified
    assert result.program is encoder.program
    assert result.notes == ("nothing to do",)


def test_with_edits_a_new_program_is_returned(encoder: tiny.Captured, editor: Editor) -> None:
    editor.returns({"sine": editor.call(aten.sin.default, _logits(editor), at=_logits(editor))})
    result = editor.finish()
    assert result.modified
    assert result.program.history == ("a-pass{option=1}",)
    assert result.program.outputs == ("logits",)
    eager = encoder.eager()["logits"]
    tiny.assert_same(tiny.outputs(result.program.module, encoder.inputs), {"logits": eager, "sine": eager.sin()})


def test_a_graph_without_shapes_is_refused(encoder: tiny.Captured) -> None:
    bare = fx.symbolic_trace(nn.Linear(2, 2))
    program: Program = replace(encoder.program, graph_module=bare)
    with pytest.raises(PassError, match="the graph carries no shapes"):
        Editor(program, "a-pass")
