"""Scores of a causal stack are made of the tokens that somebody asks about, and of no others."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import torch
from breadth import slow_but
from hypothesis import given, settings
from hypothesis import strategies as st
from test_one_row import OneText
from test_short_scores import FORMS, Tailed
from torch import fx

import offramp
from offramp.bundle.whole import divided
from offramp.errors import ExportError
from offramp.export import asked
from offramp.export.prepare import prepared
from offramp.passes.groups.resized import taken
from offramp.passes.infra.editor import Editor
from offramp.program import Program
from offramp.program.exit import asked_of
from offramp.program.graph import aten, placeholders
from offramp.runtime import Chain
from offramp.runtime.generation.buffers import ChunkSegment, Store
from offramp.runtime.generation.decision import Wanted
from offramp.runtime.policies.base import Policy

MEASURES = "cosine|learned|top1-short|prediction-short"
ASKED = asked_of("decoder")


def _cached(form: str, passes: str = "") -> Program:
    program = tiny.captured(partial(Tailed, form), {"input_ids": tiny.ids()}).program
    return offramp.apply(
        program, f"insert-exits{{after=1|2}},{passes}insert-scores{{measure={MEASURES},candidates=4}},insert-cache"
    )


@pytest.mark.parametrize(
    ("form", "passes"),
    slow_but(
        [("tied", ""), ("capped", ""), ("tied", "insert-adapter,")],
        [(form, passes) for form in FORMS if form != "flat" for passes in ("", "insert-adapter,")],
    ),
)
def test_they_are_those_of_all_tokens_at_these_places(form: str, passes: str) -> None:
    program = _cached(form, passes)
    made = prepared(program)
    assert ASKED in placeholders(made.graph)
    assert made.inputs == program.inputs
    inputs = program.fresh(program.example_inputs)
    rows, tokens = program.example_inputs["input_ids"].shape
    places = torch.randint(tokens, (rows, 3), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        whole, some = program.module(**inputs), made.module(**inputs, **{ASKED: places})
    for item in program.exits:
        for measure, key in item.scores.items():
            torch.testing.assert_close(some[key], whole[key].gather(1, places), msg=f"{measure} after {item.after}")
    for name in program.outputs:
        torch.testing.assert_close(some[name], whole[name])


def test_they_are_of_one_row_that_is_all_there_is() -> None:
    program = tiny.captured(OneText, {"input_ids": tiny.ids(rows=1)}).program
    cached = offramp.apply(program, "insert-exits{after=1},insert-scores{measure=cosine},insert-cache")
    assert program.axes.batch is None
    assert ASKED in placeholders(prepared(cached).graph)


def test_what_joins_rows_and_tokens_is_scored_as_it_was() -> None:
    assert ASKED not in placeholders(prepared(_cached("flat")).graph)


def test_where_rows_leave_as_a_whole_nothing_changes(encoder: tiny.Captured) -> None:
    program = offramp.apply(encoder.program, "insert-exits{after=1},insert-scores{measure=cosine}")
    assert prepared(program) is program


def test_without_scores_nothing_is_asked() -> None:
    program = tiny.captured(partial(Tailed, "tied"), {"input_ids": tiny.ids()}).program
    assert ASKED not in placeholders(prepared(offramp.apply(program, "insert-exits{after=1},insert-cache")).graph)


@pytest.fixture(scope="module")
def chain(tmp_path_factory: pytest.TempPathFactory) -> offramp.Chain:
    path = tmp_path_factory.mktemp("asked") / "asked.offramp"
    offramp.save(_cached("tied"), path)
    return offramp.load(path)


def _widths(chain: offramp.Chain, monkeypatch: pytest.MonkeyPatch, policy: Policy) -> set[int]:
    """How many tokens of each row were asked for, in a generation of two rows."""
    seen: set[int] = set()
    run = Store.run

    def watched(store: Store, segment: ChunkSegment, low: int, high: int, values: Any, lengths: Any) -> Any:
        if segment.asked is not None:
            seen.add(values[segment.asked].shape[1])
        return run(store, segment, low, high, values, lengths)

    monkeypatch.setattr(Store, "run", watched)
    chain.generate({"input_ids": [[1, 2, 3], [4, 5]]}, policy, max_new_tokens=6, temperature=0)
    return seen


def test_nobody_asks_and_nothing_is_scored(chain: offramp.Chain, monkeypatch: pytest.MonkeyPatch) -> None:
    assert chain.manifest.stacks["decoder"].asked == ASKED
    assert _widths(chain, monkeypatch, offramp.Never()) == set()
    parts = Chain(divided(chain.manifest), chain._root)
    assert _widths(parts, monkeypatch, offramp.Never()) == {0}


@pytest.mark.parametrize("policy", [offramp.Confidence(0.3, "top1-short"), offramp.Depth(1)], ids=["scores", "pick"])
def test_an_exit_is_asked_for_the_last_token_alone(
    chain: offramp.Chain, monkeypatch: pytest.MonkeyPatch, policy: Policy
) -> None:
    assert _widths(chain, monkeypatch, policy) == {0, 1}


def test_a_run_scores_all_tokens_or_none(chain: offramp.Chain) -> None:
    ids = np.array([[1, 2, 3, 4]])
    found = chain.run({"input_ids": ids}, offramp.Confidence(0.999, "cosine"))
    program = _cached("tied")
    with torch.no_grad():
        whole = program.module(**program.fresh({"input_ids": torch.tensor(ids)}))
    wanted = whole[program.exits_of("decoder")[0].scores["cosine"]].amin(1)
    np.testing.assert_allclose(found.scores["decoder"][1]["cosine"], wanted.numpy(), rtol=1e-4)
    assert not chain.run({"input_ids": ids}, offramp.Never()).scores["decoder"]


@settings(deadline=None, max_examples=25)
@given(st.lists(st.lists(st.integers(1, 8), min_size=1, max_size=5), min_size=1, max_size=3), st.floats(0.2, 0.9))
def test_rows_are_told_what_they_are_told_alone(
    chain: offramp.Chain, prompts: list[list[int]], threshold: float
) -> None:
    policy = offramp.Confidence(threshold, "top1-short")
    together = list(chain.stream({"input_ids": prompts}, policy, max_new_tokens=4, temperature=0, stop=()))
    for row, prompt in enumerate(prompts):
        alone = list(chain.stream({"input_ids": [prompt]}, policy, max_new_tokens=4, temperature=0, stop=()))
        mine = [token for token in together if token.row == row]
        assert [token.exit for token in mine] == [token.exit for token in alone]
        for here, there in zip(mine, alone, strict=True):
            assert here.scores == pytest.approx(there.scores, rel=1e-4)


def test_all_tokens_of_a_chunk_where_all_are_compared(chain: offramp.Chain) -> None:
    """Full depth's picks for a chunk are those of its tokens one by one."""
    session = chain.session({"input_ids": [[1, 2], [3, 4]]}, offramp.Confidence(0.0, "top1-short"))
    session.step([np.array([1, 2]), np.array([3, 4])])
    for token in (5, 6):
        session.step([np.array([token])] * 2)
    wanted = Wanted(lambda: True)
    (one, two) = session.step([np.array([7])] * 2, {"decoder": _never(session)}, wanted).rows
    assert [len(next(iter(row.whole.values()))) for row in (one, two) if row.whole is not None] == [3, 3]


def _never(session: Any) -> Any:
    return offramp.runtime.policies.stack_policy.StackPolicy(
        offramp.Never(), session.plan.manifest.stacks["decoder"], 2
    )


def test_a_wrong_rewrite_is_found(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def wrong(editor: Editor, places: fx.Node, end: fx.Node, node: fx.Node, axis: int) -> fx.Node:
        return editor.call(aten.abs.default, taken(editor, places, end, node, axis), at=end.prev)

    monkeypatch.setattr(asked, "taken", wrong)
    with pytest.raises(ExportError, match=r"segment decoder\.\d differs from torch"):
        offramp.save(_cached("tied"), tmp_path / "wrong.offramp")
