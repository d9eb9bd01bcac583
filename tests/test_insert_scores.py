"""insert-scores: each measure against its formula, for every layout of rows and tokens."""

# mypy: disable-error-code="no-any-return"
from __future__ import annotations

from collections.abc import Callable
from functools import partial

import pytest
import tiny
import torch
from test_stacks import Flat
from torch import Tensor, nn

from offramp.bundle.measures import OF_LOGITS, OF_STATE
from offramp.errors import SpecError
from offramp.passes import InsertExits, InsertScores, apply
from offramp.program import Program, capture
from offramp.program.program import evaluate

MEASURES = (*OF_LOGITS, *OF_STATE)


def _scored(captured: tiny.Captured, *measures: str) -> Program:
    return apply(captured.program, f"insert-exits,insert-scores{{measure={'|'.join(measures)}}}")


def _scores(program: Program, captured: tiny.Captured, measure: str) -> dict[int, Tensor]:
    """The scores by count of blocks."""
    found = tiny.outputs(program.module, captured.inputs)
    return {e.after: found[e.scores[measure]] for e in program.exits if measure in e.scores}


def _logits(captured: tiny.Captured, after: int) -> Tensor:
    blocks = captured.program.stacks[captured.stack].blocks
    (logits,) = (captured.eager() if after == blocks else captured.truncated(after)).values()
    return logits


def _cuts(captured: tiny.Captured) -> list[Tensor]:
    program = captured.program
    nodes = [program.nodes[name] for name in program.stacks[captured.stack].cuts]
    values = evaluate(program.graph_module, nodes, captured.inputs)
    return [values[node] for node in nodes]


def _top1(logits: Tensor) -> Tensor:
    return logits.softmax(-1).amax(-1)


def _margin(logits: Tensor) -> Tensor:
    best = logits.softmax(-1).sort(-1, descending=True).values
    return best[..., 0] - best[..., 1]


def _entropy(logits: Tensor) -> Tensor:
    return torch.distributions.Categorical(logits=logits).entropy()


OF_PLACES: dict[str, Callable[[Tensor], Tensor]] = {"top1": _top1, "margin": _margin, "entropy": _entropy}


# Of logits


@pytest.mark.parametrize("measure", OF_PLACES)
@pytest.mark.parametrize("name", ["encoder", "time_first"])
def test_scores_of_the_logits_of_a_row(name: str, measure: str, request: pytest.FixtureRequest) -> None:
    captured: tiny.Captured = request.getfixturevalue(name)
    found = _scores(_scored(captured, measure), captured, measure)
    assert list(found) == list(range(1, captured.program.stacks[captured.stack].blocks + 1))
    for after, score in found.items():
        torch.testing.assert_close(score, OF_PLACES[measure](_logits(captured, after)))


@pytest.mark.parametrize("measure", OF_PLACES)
def test_the_least_sure_token_that_is_not_padding_decides(labeller: tiny.Captured, measure: str) -> None:
    real = labeller.inputs["attention_mask"].bool()
    for after, score in _scores(_scored(labeller, measure), labeller, measure).items():
        places = OF_PLACES[measure](_logits(labeller, after))
        worst = max if measure == "entropy" else min
        expected = torch.stack([worst(row[seen]) for row, seen in zip(places, real, strict=True)])
        torch.testing.assert_close(score, expected)


@pytest.mark.parametrize("measure", [*OF_PLACES, "prediction"])
def test_each_token_of_a_causal_stack_has_a_score(decoder: tiny.Captured, measure: str) -> None:
    for after, score in _scores(_scored(decoder, measure), decoder, measure).items():
        logits = _logits(decoder, after)
        expected = logits.argmax(-1) if measure == "prediction" else OF_PLACES[measure](logits)
        torch.testing.assert_close(score, expected)


def test_the_state_of_each_token_of_a_causal_stack_has_a_score(decoder: tiny.Captured) -> None:
    program, cuts = _scored(decoder, "cosine", "learned"), _cuts(decoder)
    for after, score in _scores(program, decoder, "cosine").items():
        torch.testing.assert_close(score, torch.cosine_similarity(cuts[after - 1], cuts[after], dim=-1))
    generator = torch.Generator().manual_seed(0)
    weights = {n: w.detach() for n, w in program.module.named_parameters() if ".gate." in n}
    for weight in weights.values():
        weight.copy_(torch.randn(weight.shape, generator=generator))
    for after, score in _scores(program, decoder, "learned").items():
        prefix = f"exits.{decoder.stack}.{after}.gate"
        logit = cuts[after] @ weights[f"{prefix}.weight"] + weights[f"{prefix}.bias"]
        torch.testing.assert_close(score, logit.sigmoid())


def test_padding_would_decide_were_it_counted(labeller: tiny.Captured) -> None:
    """What the test above rests on."""
    assert any(_top1(_logits(labeller, k))[-1].argmin() >= tiny.TOKENS - 2 for k in range(1, tiny.BLOCKS + 1))


@pytest.mark.parametrize("measure", OF_PLACES)
def test_where_rows_mix_there_is_one_score(mixing: tiny.Captured, measure: str) -> None:
    for after, score in _scores(_scored(mixing, measure), mixing, measure).items():
        places = OF_PLACES[measure](_logits(mixing, after))
        expected = places.amax() if measure == "entropy" else places.amin()
        torch.testing.assert_close(score, expected.reshape(1))


@pytest.mark.parametrize("name", ["encoder", "time_first"])
def test_prediction(name: str, request: pytest.FixtureRequest) -> None:
    captured: tiny.Captured = request.getfixturevalue(name)
    for after, score in _scores(_scored(captured, "prediction"), captured, "prediction").items():
        assert score.dtype == torch.int64
        torch.testing.assert_close(score, _logits(captured, after).argmax(-1))


# Of the state


def _real(captured: tiny.Captured) -> Tensor:
    """Which tokens count, bool[rows, tokens]."""
    mask = captured.inputs.get("attention_mask", torch.ones(tiny.ROWS, tiny.TOKENS))
    return mask.bool()


def _rows_first(captured: tiny.Captured, hidden: Tensor) -> Tensor:
    return hidden.transpose(0, 1) if "x" in captured.inputs else hidden


@pytest.mark.parametrize("name", ["encoder", "labeller", "time_first"])
def test_cosine(name: str, request: pytest.FixtureRequest) -> None:
    captured: tiny.Captured = request.getfixturevalue(name)
    cuts = [_rows_first(captured, hidden) * _real(captured)[..., None] for hidden in _cuts(captured)]
    found = _scores(_scored(captured, "cosine"), captured, "cosine")
    assert list(found) == list(range(1, len(cuts) - 1))
    for after, score in found.items():
        expected = torch.cosine_similarity(cuts[after - 1].flatten(1), cuts[after].flatten(1))
        torch.testing.assert_close(score, expected)


@pytest.mark.parametrize("name", ["encoder", "labeller", "time_first"])
def test_learned(name: str, request: pytest.FixtureRequest) -> None:
    captured: tiny.Captured = request.getfixturevalue(name)
    program = _scored(captured, "learned")
    for score in _scores(program, captured, "learned").values():
        torch.testing.assert_close(score, torch.full((tiny.ROWS,), 0.5))
    generator = torch.Generator().manual_seed(0)
    weights = {n: w.detach() for n, w in program.module.named_parameters() if ".gate." in n}
    for weight in weights.values():
        weight.copy_(torch.randn(weight.shape, generator=generator))
    real = _real(captured)[..., None]
    cuts = [_rows_first(captured, hidden) for hidden in _cuts(captured)]
    for after, score in _scores(program, captured, "learned").items():
        mean = (cuts[after] * real).sum(1) / real.sum(1)
        prefix = f"exits.{captured.stack}.{after}.gate"
        logit = mean @ weights[f"{prefix}.weight"] + weights[f"{prefix}.bias"]
        torch.testing.assert_close(score, logit.sigmoid())


def test_where_rows_mix_the_state_has_one_score(mixing: tiny.Captured) -> None:
    program = _scored(mixing, "cosine", "learned")
    cuts = _cuts(mixing)
    for after, score in _scores(program, mixing, "cosine").items():
        expected = torch.cosine_similarity(cuts[after - 1].flatten(), cuts[after].flatten(), dim=0)
        torch.testing.assert_close(score, expected.reshape(1))
    for score in _scores(program, mixing, "learned").values():
        torch.testing.assert_close(score, torch.tensor([0.5]))


def test_a_learned_gate_learns(encoder: tiny.Captured) -> None:
    program = _scored(encoder, "learned")
    gates = [weight for name, weight in program.module.named_parameters() if ".gate." in name]
    assert len(gates) == 2 * (tiny.BLOCKS - 1)
    optimizer = torch.optim.SGD(gates, lr=1.0)

    def loss() -> Tensor:
        found = program.module(**encoder.inputs)
        scores = torch.stack([found[item.scores["learned"]] for item in program.exits])
        return nn.functional.binary_cross_entropy(scores, torch.ones_like(scores))

    start = loss()
    start.backward()
    optimizer.step()
    assert loss() < start
    assert all(weight.grad is not None and bool((weight.grad != 0).any()) for weight in gates)
    encoder.program.module.zero_grad()


def test_scores_are_of_the_hidden_state_before_the_adapter(encoder: tiny.Captured) -> None:
    plain = _scores(_scored(encoder, "cosine"), encoder, "cosine")
    text = "insert-exits,insert-adapter{kind=norm-linear},insert-scores{measure=cosine|top1}"
    adapted = apply(encoder.program, text)
    torch.testing.assert_close(_scores(adapted, encoder, "cosine"), plain)
    found = tiny.outputs(adapted.module, encoder.inputs)
    for after, score in _scores(adapted, encoder, "top1").items():
        name = f"encoder.{after}/logits" if after < tiny.BLOCKS else "logits"
        torch.testing.assert_close(score, _top1(found[name]))


# Of all measures


@pytest.mark.parametrize("name", ["encoder", "labeller", "decoder", "two_stacks", "time_first", "mixing"])
def test_the_form_of_scores(name: str, request: pytest.FixtureRequest) -> None:
    captured: tiny.Captured = request.getfixturevalue(name)
    last = list(captured.program.stacks)[-1]
    measures = [m for m in MEASURES if m != "prediction" or name in ("encoder", "time_first")]
    text = f"insert-exits{{stack={last}}},insert-scores{{stack={last},measure={'|'.join(measures)}}}"
    program = apply(captured.program, text)
    found = tiny.outputs(program.module, captured.inputs)
    tiny.assert_same(found, captured.program.example_outputs, rtol=0, atol=0)
    blocks = captured.program.stacks[last].blocks
    for item in program.exits:
        expected = [m for m in measures if m in OF_LOGITS or item.after < blocks]
        assert list(item.scores) == expected
        for measure, key in item.scores.items():
            assert key == f"{last}.{item.after}/{measure}"
            of_tokens = {"decoder": (tiny.ROWS, tiny.TOKENS), "two_stacks": (tiny.ROWS, tiny.TOKENS), "mixing": (1,)}
            assert found[key].shape == of_tokens.get(name, (tiny.ROWS,))
            assert found[key].dtype == (torch.int64 if measure == "prediction" else torch.float32)


def test_no_prediction_where_rows_mix(mixing: tiny.Captured) -> None:
    """A prediction per row is no score of the one state that there is."""
    with pytest.raises(SpecError, match="measure=prediction"):
        _scored(mixing, "prediction")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_scores_of_a_half_precision_model_are_float32(dtype: torch.dtype) -> None:
    model = tiny.seeded(tiny.Encoder).to(dtype)
    captured = tiny.Captured(model, tiny.text(), capture(model, tiny.text()))
    measures = [measure for measure in MEASURES if measure != "prediction"]
    program = _scored(captured, *measures)
    for measure in measures:
        assert {score.dtype for score in _scores(program, captured, measure).values()} == {torch.float32}


def test_cosine_of_large_half_precision_states_is_finite() -> None:
    """Sums of squares leave float16's range long before the states do."""
    model = tiny.seeded(tiny.Encoder)
    with torch.no_grad():
        model.words.weight *= 100.0
    model = model.half()
    captured = tiny.Captured(model, tiny.text(), capture(model, tiny.text()))
    for score in _scores(_scored(captured, "cosine"), captured, "cosine").values():
        assert bool(score.isfinite().all())
        assert bool((score > 0.9).all())


def test_scores_follow_the_sizes_of_the_inputs(labeller: tiny.Captured) -> None:
    program = _scored(labeller, "top1", "cosine", "learned")
    inputs = {"input_ids": tiny.ids(5, 3), "attention_mask": tiny.padding(5, 3)}
    found = tiny.outputs(program.module, inputs)
    assert all(found[key].shape == (3,) for item in program.exits for key in item.scores.values())


# Padding


class Padded(tiny.Encoder):
    """The mask in one of the forms that models give it."""

    def __init__(self, form: str) -> None:
        super().__init__(pooled=False)
        self.form = form

    def mask(self, seen: Tensor) -> Tensor:
        rows, tokens = seen.shape
        if self.form == "added":
            return (1.0 - seen.float())[:, None, None] * torch.finfo(torch.float32).min
        if self.form == "causal":
            return seen[:, None, None] & torch.ones(tokens, tokens, dtype=torch.bool).tril()
        return seen[:, None, None].expand(rows, tiny.HEADS, tokens, tokens)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> dict[str, Tensor]:
        x = self.run(self.embed(input_ids), self.mask(attention_mask.bool()))
        return {"logits": self.head(self.leave(x))}


@pytest.mark.parametrize("form", ["added", "causal", "expanded"])
def test_padding_is_read_off_masks_of_every_form(form: str) -> None:
    captured = tiny.captured(partial(Padded, form), tiny.text())
    program = _scored(captured, "top1")
    real = captured.inputs["attention_mask"].bool()
    for after, score in _scores(program, captured, "top1").items():
        places = _top1(_logits(captured, after)).masked_fill(~real, 1.0)
        torch.testing.assert_close(score, places if form == "causal" else places.amin(1))


# Refusals


class Outputs(tiny.Encoder):
    """Several outputs, of kinds that hold no logits."""

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> dict[str, Tensor]:
        x = self.run(self.embed(input_ids), attention_mask.bool()[:, None, None])
        return {
            "states": x,
            "scalar": self.head(x)[:, 0, :1],
            "tokens_last": self.head(x).mT,
            "places": self.head(x).argmax(-1),
            "rows": x.mean((1, 2)),
        }


@pytest.fixture(scope="module")
def several() -> tiny.Captured:
    return tiny.captured(Outputs, tiny.text())


def test_the_output_can_be_named(several: tiny.Captured) -> None:
    program = apply(several.program, "insert-exits,insert-scores{output=states}")
    for after, score in _scores(program, several, "top1").items():
        states = (several.eager() if after == tiny.BLOCKS else several.truncated(after))["states"]
        real = several.inputs["attention_mask"].bool()
        torch.testing.assert_close(score, _top1(states).masked_fill(~real, 1.0).amin(1))


def test_features_are_no_classes_unless_it_is_said() -> None:
    """The one output of an encoder that has no head."""

    class Embeds(tiny.Encoder):
        def forward(self, input_ids: Tensor, attention_mask: Tensor) -> dict[str, Tensor]:
            states = self.run(self.embed(input_ids), attention_mask.bool()[:, None, None])
            return {"embedding": nn.functional.normalize(states[:, 0], dim=1)}

    program = apply(capture(tiny.seeded(Embeds), tiny.text()), "insert-exits")
    for measure in ("top1", "entropy", "prediction"):
        with pytest.raises(SpecError, match=r"'embedding' .* holds features, not classes\n  try: measure=cosine or"):
            apply(program, f"insert-scores{{measure={measure}}}")
        apply(program, f"insert-scores{{measure={measure},output=embedding}}")
    apply(program, "insert-scores{measure=cosine|learned}")


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("insert-scores", "has exits after no block"),
        ("insert-exits{after=1},insert-scores{after=1|2}", r"has exits after \[1\]"),
        ("insert-exits,insert-scores{after=4}", "after=4 is no place"),
        ("insert-exits,insert-scores{measure=top1|luck|hope}", r"measure=luck\|hope: there are top1"),
        ("insert-exits,insert-scores{measure=}", "measure=: there are top1"),
        ("insert-exits,insert-scores{stack=other}", "unknown stack 'other'"),
        ("insert-exits,insert-scores", r"which output holds logits\? The program has \['states', 'scalar'"),
        ("insert-exits,insert-scores{output=places}", "which output holds logits"),
        ("insert-exits,insert-scores{output=nothing}", "which output holds logits"),
        ("insert-exits,insert-scores{output=scalar}", "'scalar' .*has no classes on its last axis"),
        ("insert-exits,insert-scores{output=tokens_last}", "'tokens_last' .*has no classes on its last axis"),
        ("insert-exits,insert-scores{output=rows}", "'rows' .*has no classes on its last axis"),
        ("insert-exits,insert-scores{output=tokens_last}", r"of shape \['batch', \d+, 'tokens'\] has no classes"),
        ("insert-exits,insert-scores{output=rows}", "try: output=states, measure=cosine or learned"),
        ("insert-exits,insert-scores{output=states,measure=prediction}", r"\['batch', 'tokens', \d+\] .*\n  try: "),
        ("insert-exits,insert-scores{output=states,measure=prediction}", "measure=prediction: .* many per row"),
    ],
)
def test_refusals(several: tiny.Captured, text: str, reason: str) -> None:
    with pytest.raises(SpecError, match=reason):
        apply(several.program, text)


def test_no_measure_at_all_is_refused(encoder: tiny.Captured) -> None:
    with pytest.raises(SpecError, match="measure"):
        apply(encoder.program, [InsertExits(), InsertScores(measure=())])


class Labels(tiny.Encoder):
    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> dict[str, Tensor]:
        return {"labels": super().forward(input_ids, attention_mask)["logits"].argmax(-1)}


def test_a_model_without_logits_is_refused() -> None:
    captured = tiny.captured(Labels, tiny.text(), dynamic={})
    with pytest.raises(SpecError, match="logits"):
        _scored(captured, "top1")


class Towers(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.query, self.passage = tiny.Encoder(), tiny.Encoder("post")

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> dict[str, Tensor]:
        parts = {"query": self.query, "passage": self.passage}
        return {name: part(input_ids, attention_mask)["logits"] for name, part in parts.items()}


def test_logits_of_another_stack_are_refused() -> None:
    captured = tiny.captured(Towers, tiny.text(), dynamic={})
    query, passage = captured.program.stacks
    program = apply(captured.program, f"insert-exits{{stack={query}}}")
    assert [list(item.outputs) for item in program.exits] == [["query"]] * (tiny.BLOCKS - 1)
    with pytest.raises(SpecError, match="passage"):
        apply(program, f"insert-scores{{stack={query},output=passage}}")
    scored = apply(program, f"insert-scores{{stack={query},output=query}}")
    assert all(list(item.scores) == ["top1"] for item in scored.exits)
    assert passage not in {item.stack for item in scored.exits}


@pytest.mark.parametrize("measure", OF_LOGITS)
def test_a_stack_that_another_follows_has_no_logits(two_stacks: tiny.Captured, measure: str) -> None:
    text = f"insert-exits{{stack=encoder}},insert-scores{{stack=encoder,measure={measure}}}"
    with pytest.raises(SpecError, match="stack 'encoder' ends in stack 'decoder', not in logits"):
        apply(two_stacks.program, text)
    text = "insert-exits{stack=encoder},insert-scores{stack=encoder,measure=cosine|learned}"
    assert [list(item.scores) for item in apply(two_stacks.program, text).exits] == [["cosine", "learned"]] * 3


@pytest.fixture(scope="module")
def flat() -> tiny.Captured:
    return tiny.captured(Flat, tiny.text())


@pytest.mark.parametrize("measure", OF_STATE)
def test_rows_that_share_an_axis_with_tokens_are_refused(flat: tiny.Captured, measure: str) -> None:
    with pytest.raises(SpecError, match="batch"):
        _scored(flat, measure)


class Folded(tiny.Encoder):
    """Three tokens of a row lie one after the other on the axis of rows."""

    def forward(self, x: Tensor) -> dict[str, Tensor]:  # type: ignore[override]
        rows = x.shape[0]
        h = x.reshape(rows * 3, tiny.WIDTH)
        for block in self.blocks:
            h = h + block.attend(block.norms[0](h).reshape(rows, 3, -1), None).reshape(rows * 3, -1)
            h = h + block.mlp(block.norms[1](h))
        return {"logits": self.head(h.reshape(rows, 3, -1).mean(1))}


@pytest.fixture(scope="module")
def folded() -> tiny.Captured:
    return tiny.captured(Folded, {"x": torch.randn(2, 3, tiny.WIDTH)}, dynamic={"x": {0: "batch"}})


@pytest.mark.parametrize("measure", MEASURES)
def test_rows_of_several_places_have_one_score(folded: tiny.Captured, measure: str) -> None:
    for score in _scores(_scored(folded, measure), folded, measure).values():
        assert score.shape == (2,)


# Contract


def test_a_second_run_adds_nothing(encoder: tiny.Captured) -> None:
    once = _scored(encoder, *MEASURES)
    again = InsertScores(measure=MEASURES).run(once)
    assert not again.modified
    assert again.program is once
    assert "the exit after block 2 has entropy already" in again.notes


def test_measures_can_be_added_later(encoder: tiny.Captured) -> None:
    program = apply(_scored(encoder, "top1"), "insert-scores{measure=entropy,after=2}")
    assert [list(item.scores) for item in program.exits_of("encoder")] == [
        ["top1"],
        ["top1", "entropy"],
        ["top1"],
        ["top1", "entropy"],
    ]


def test_provenance(encoder: tiny.Captured) -> None:
    before = apply(encoder.program, "insert-exits")
    step = InsertScores(measure=MEASURES)
    result = step.run(before)
    tiny.assert_provenance(before, result.program, repr(step))
    assert result.edits["inserted"] == len(tiny.added(before, result.program))
    assert result.program.history == ("insert-exits", repr(step))


class Span(tiny.Encoder):
    """Where an answer starts and ends: places are its classes."""

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> dict[str, Tensor]:
        x = self.run(self.embed(input_ids), attention_mask.bool()[:, None, None])
        return {"start": x[..., 0], "end": x[..., 1]}


def test_no_output_without_classes_is_suggested() -> None:
    captured = tiny.captured(Span, tiny.text())
    with pytest.raises(SpecError, match=r"which output holds logits\?.*\n  try: measure=cosine or learned"):
        _scored(captured, "top1")
