"""insert-scores: top1-short, margin-short and prediction-short, against slices of the whole logits in torch."""

# mypy: disable-error-code="no-any-return"
from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import tiny
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import offramp
from offramp.bundle.manifest import Exit
from offramp.bundle.measures import OF_SHORT
from offramp.errors import SpecError
from offramp.export import save
from offramp.export.partition import partition
from offramp.passes import InsertScores, apply
from offramp.passes.infra.spec import parse
from offramp.program import Program, capture
from offramp.program.graph import results
from offramp.runtime.policies.base import Agreement, Cost, Policy, Rows, State

IDS = (7, 2, 9, 0, 4)
TEXT = f"insert-scores{{measure={'|'.join(OF_SHORT)},ids={'|'.join(map(str, IDS))}}}"


class Tailed(tiny.Encoder):
    """A word for every token, by a head in one of the forms that models give it."""

    bias: Tensor

    def __init__(self, form: str) -> None:
        super().__init__(causal=True, pooled=False)
        self.form, self.head = form, nn.Linear(tiny.WIDTH, tiny.WORDS)
        self.table = nn.Parameter(torch.randn(tiny.WIDTH, tiny.WORDS) / 4)
        self.heat = nn.Linear(tiny.WIDTH, 1)
        self.register_buffer("bias", torch.randn(1, tiny.WORDS))

    def spoken(self, h: Tensor) -> Tensor:
        rows, tokens, _ = h.shape
        logits: dict[str, Callable[[], Tensor]] = {
            "tied": lambda: F.linear(h, self.words.weight),
            "matmul": lambda: h @ self.table,
            "transposed": lambda: h @ self.words.weight.t(),
            "flat": lambda: (h.reshape(rows * tokens, -1) @ self.table).reshape(rows, tokens, tiny.WORDS),
            "addmm": lambda: torch.addmm(self.head.bias, h.flatten(0, 1), self.table).reshape(rows, tokens, -1),
            "capped": lambda: 5 * torch.tanh(self.head(h) / 5),
            "biased": lambda: self.head(h) * 0.5 + self.bias,
            "double": lambda: self.head(h).double(),
            "heated": lambda: self.head(h) / (1 + self.heat(h).exp()),
            "normed": lambda: F.linear(h, F.normalize(self.words.weight, dim=-1)) * 4,
        }
        return logits[self.form]()

    def forward(self, input_ids: Tensor) -> dict[str, Tensor]:  # type: ignore[override]
        x = self.embed(input_ids)
        for block in self.blocks:
            x = block(x, None)
        return {"logits": self.spoken(self.leave(x))}


FORMS = ["tied", "matmul", "transposed", "flat", "addmm", "capped", "biased", "double", "heated", "normed"]


def _captured(form: str) -> tiny.Captured:
    return tiny.captured(partial(Tailed, form), {"input_ids": tiny.ids()})


def _expected(logits: Tensor, ids: tuple[int, ...] = IDS) -> dict[str, Tensor]:
    best, at = logits.float()[..., list(ids)].softmax(-1).sort(-1, descending=True)
    classes = torch.tensor(ids)[at[..., 0]]
    return {"top1-short": best[..., 0], "margin-short": best[..., 0] - best[..., 1], "prediction-short": classes}


def _assert_scores(program: Program, inputs: tiny.Inputs, ids: tuple[int, ...] = IDS) -> None:
    """Scores of early exits are those of the exits' own logits, of the candidates among them."""
    found = tiny.outputs(program.module, inputs)
    early = [item for item in program.exits if item.after < program.stacks[item.stack].blocks]
    assert early
    for item in early:
        (logits,) = item.outputs.values()
        for measure, expected in _expected(found[logits], ids).items():
            assert found[item.scores[measure]].dtype == expected.dtype
            torch.testing.assert_close(found[item.scores[measure]], expected)


def _short(program: Program) -> dict[str, Tensor]:
    return {name: rows for name, rows in program.module.named_buffers() if ".short." in name}


# Numbers


@pytest.mark.parametrize("form", FORMS)
def test_scores_are_of_the_candidates_logits(form: str) -> None:
    captured = _captured(form)
    program = apply(captured.program, f"insert-exits,{TEXT}")
    _assert_scores(program, captured.inputs)
    _assert_scores(program, {"input_ids": tiny.ids(5, 3)})
    tiny.assert_same(tiny.outputs(program.module, captured.inputs), captured.program.example_outputs, rtol=0, atol=0)
    assert all(len(IDS) in rows.shape and tiny.WORDS not in rows.shape for rows in _short(program).values())


@pytest.mark.parametrize(
    "passes",
    [
        "insert-exits{head=own}",
        "insert-exits,insert-adapter{kind=norm-linear}",
        "insert-exits,insert-adapter{kind=block}",
    ],
)
def test_heads_and_adapters_of_exits(decoder: tiny.Captured, passes: str) -> None:
    program = apply(decoder.program, passes)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, weight in program.module.named_parameters():
            if name.startswith("exits."):
                weight.add_(torch.randn(weight.shape, generator=generator) / 8)
    _assert_scores(apply(program, TEXT), decoder.inputs)


def test_the_least_sure_token_that_is_not_padding_decides(labeller: tiny.Captured) -> None:
    program = apply(labeller.program, "insert-exits,insert-scores{measure=top1-short|margin-short,ids=2|0}")
    found = tiny.outputs(program.module, labeller.inputs)
    real = labeller.inputs["attention_mask"].bool()
    for item in program.exits:
        (logits,) = item.outputs.values()
        for measure, places in _expected(found[logits], (2, 0)).items():
            if measure == "prediction-short":
                continue  # a row with many of them has no such score
            torch.testing.assert_close(found[item.scores[measure]], places.masked_fill(~real, 1.0).amin(1))


def test_scores_of_a_row(encoder: tiny.Captured) -> None:
    _assert_scores(apply(encoder.program, f"insert-exits,{TEXT.replace('7|2|9|0|4', '1|2')}"), encoder.inputs, (1, 2))


def test_half_precision() -> None:
    model = tiny.seeded(tiny.Decoder).bfloat16()
    program = apply(capture(model, {"input_ids": tiny.ids()}), f"insert-exits,{TEXT}")
    _assert_scores(program, {"input_ids": tiny.ids()})


# Candidates


def test_candidates_are_the_likeliest_of_the_models_answer(decoder: tiny.Captured) -> None:
    program = apply(decoder.program, f"insert-exits,insert-scores{{measure={'|'.join(OF_SHORT)},candidates=5}}")
    (logits,) = decoder.eager().values()
    ids = logits.softmax(-1).sum((0, 1)).topk(5).indices.tolist()
    _assert_scores(program, decoder.inputs, tuple(ids))


def test_candidates_can_stand_in_a_file(decoder: tiny.Captured, tmp_path: Path) -> None:
    (tmp_path / "ids.txt").write_text("7 2\n9\n0\n4\n1\n")
    text = f"insert-exits,insert-scores{{measure={'|'.join(OF_SHORT)},candidates=5,ids={tmp_path / 'ids.txt'}}}"
    program = apply(decoder.program, text)
    _assert_scores(program, decoder.inputs)
    assert ",".join(program.history) == text
    (step,) = parse(program.history[-1])
    assert step == parse(repr(step))[0]
    same = apply(
        decoder.program,
        [*parse("insert-exits"), InsertScores(measure=OF_SHORT, candidates=5, ids=str(tmp_path / "ids.txt"))],
    )
    assert same.history == program.history


def test_exits_share_rows_and_training_leaves_them_alone(decoder: tiny.Captured) -> None:
    program = apply(decoder.program, f"insert-exits,{TEXT}")
    (name, rows), (listed, ids) = sorted(_short(program).items(), reverse=True)
    assert (name, listed) == ("exits.decoder.short.words.weight", "exits.decoder.short.candidates")
    assert ids.tolist() == list(IDS)
    torch.testing.assert_close(rows, decoder.model.get_parameter("words.weight")[list(IDS)].detach())
    assert dict(program.module.named_parameters()).keys() == dict(decoder.program.module.named_parameters()).keys()


# Refusals


class Odd(Tailed):
    """Heads that are no product with a weight."""

    def spoken(self, h: Tensor) -> Tensor:
        logits: dict[str, Callable[[], Tensor]] = {
            "softmax": lambda: self.head(h).log_softmax(-1),
            "sum": lambda: self.head(h) + h @ self.table,
            "computed": lambda: torch.matmul(h, self.table * self.heat(h).mean()),
            "many": lambda: torch.einsum("btd,dv->btv", h, self.table).cumsum(-1),
            "masked": lambda: self.head(h).masked_fill(self.bias > 0, -9.0),
        }
        return logits[self.form]()


@pytest.mark.parametrize(
    ("form", "reason"),
    [
        ("softmax", r"found aten.log_softmax.int at .*test_short_scores.py:\d+"),
        ("sum", "found 2 products"),
        ("computed", "a product with a value that depends on the inputs"),
        ("many", "found aten.cumsum.default"),
        ("masked", "torch.bool values for every class"),
    ],
)
def test_tails_that_end_in_no_such_product_are_refused(form: str, reason: str) -> None:
    captured = tiny.captured(partial(Odd, form), {"input_ids": tiny.ids()})
    with pytest.raises(SpecError, match=f"one product with a weight.*{reason}"):
        apply(captured.program, f"insert-exits,{TEXT}".replace("|prediction-short", ""))
    assert apply(captured.program, "insert-exits,insert-scores").exits[0].scores


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ("measure=top1-short", "candidates=512: from 2 to 10, of 11 classes"),
        ("measure=top1-short,candidates=11", "candidates=11: from 2 to 10"),
        ("measure=top1-short,candidates=1", "candidates=1: from 2"),
        ("measure=top1-short,candidates=few", "candidates=few is not None or a whole number"),
        ("measure=top1-short,candidates=4,ids=1|2|3", "candidates=4: from 2 to 3"),
        ("measure=top1-short,ids=1", "ids: 1 of them"),
        ("measure=top1-short,ids=1|2|1", "ids: 3 of them, 2 different"),
        ("measure=top1-short,ids=1|11|-1", r"\[11, -1\] not among the classes"),
        ("measure=top1-short,ids=" + "|".join(map(str, range(11))), "ids: 11 of them"),
        ("measure=top1-short,ids=nowhere.txt", "ids=nowhere.txt: no text file of token ids"),
        (
            "measure=top1,candidates=4",
            "candidates and ids belong to measure=top1-short, margin-short",
        ),
        ("measure=cosine,ids=1|2", "candidates and ids belong to"),
    ],
)
def test_refused_candidates(decoder: tiny.Captured, options: str, reason: str) -> None:
    with pytest.raises(SpecError, match=reason):
        apply(decoder.program, f"insert-exits,insert-scores{{{options}}}")


def test_a_stack_that_another_follows_has_no_head(two_stacks: tiny.Captured) -> None:
    with pytest.raises(SpecError, match="stack 'encoder' ends in stack 'decoder', not in logits"):
        apply(two_stacks.program, "insert-exits{stack=encoder},insert-scores{stack=encoder,measure=top1-short}")


def test_a_stack_has_one_list(decoder: tiny.Captured) -> None:
    once = apply(decoder.program, "insert-exits,insert-scores{measure=top1-short,after=1,candidates=5}")
    with pytest.raises(SpecError, match=r"exits\.decoder\.short\..* holds other rows already"):
        apply(once, "insert-scores{measure=top1-short,after=2,candidates=4}")


# Contract


def test_a_second_run_adds_nothing(decoder: tiny.Captured) -> None:
    once = apply(decoder.program, f"insert-exits,{TEXT}")
    again = InsertScores(measure=OF_SHORT, ids=IDS).run(once)
    assert not again.modified
    assert again.program is once
    assert "the exit after block 2 has margin-short already" in again.notes


def test_scores_can_be_added_later(decoder: tiny.Captured) -> None:
    one = apply(decoder.program, f"insert-exits,{TEXT.replace('{', '{after=1,')}")
    program = apply(one, TEXT)
    _assert_scores(program, decoder.inputs)
    assert _short(program).keys() == _short(one).keys()


def test_provenance(decoder: tiny.Captured) -> None:
    before = apply(decoder.program, "insert-exits,insert-adapter{kind=linear}")
    step = InsertScores(measure=OF_SHORT, ids=IDS)
    result = step.run(before)
    tiny.assert_provenance(before, result.program, repr(step))
    assert result.edits["inserted"] == len(tiny.added(before, result.program))
    assert [list(item.scores) for item in result.program.exits] == [list(OF_SHORT)] * (tiny.BLOCKS - 1)


# Bundles


@pytest.mark.parametrize("passes", ["insert-exits{head=own}", "insert-exits,insert-adapter{kind=linear}"])
def test_scores_are_made_by_the_block(decoder: tiny.Captured, passes: str) -> None:
    program = apply(decoder.program, f"{passes},{TEXT}")
    (stack,) = partition(program).stacks
    returned, blocks = results(program.graph), dict(stack.blocks)
    for item in program.exits:
        assert {returned[name] for name in item.scores.values()} <= set(blocks[item.after].outputs)
        assert not {returned[name] for name in item.outputs.values()} & set(blocks[item.after].nodes)


def test_a_row_that_stays_does_not_run_the_head(tmp_path: Path) -> None:
    captured = _captured("biased")
    program = apply(captured.program, f"insert-exits,insert-adapter{{kind=linear,after=2}},{TEXT}")
    save(program, tmp_path / "short.offramp")
    chain = offramp.load(tmp_path / "short.offramp")
    inputs = {name: value.numpy() for name, value in captured.inputs.items()}
    expected = tiny.outputs(program.module, captured.inputs)
    for threshold in (0.0, 2.0):
        result = chain.run(inputs, offramp.Confidence(threshold, measure="top1-short"))
        depth = 1 if threshold == 0.0 else tiny.BLOCKS
        assert result.exits["decoder"].tolist() == np.full(result.exits["decoder"].shape, depth).tolist()
        assert sum("tail" in step.segment for step in result.trace) == 1
        logits = expected["decoder.1/logits" if depth == 1 else "logits"]
        np.testing.assert_allclose(result.outputs["logits"], logits.numpy(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("order", "picks", "prompt"),
    [
        ("insert-cache,insert-exits,{}", True, [3, 1, 4]),
        pytest.param("insert-cache,insert-exits,{}", False, [3], marks=pytest.mark.slow),
        pytest.param("insert-exits,{},insert-cache", True, [3], marks=pytest.mark.slow),
    ],
)
def test_generation(tmp_path: Path, order: str, picks: bool, prompt: list[int]) -> None:
    """Each token leaves at the first exit whose short score, in torch on the whole text, is high enough.

    A prompt of several tokens goes to full depth, and where the exit picks the token, it is the best candidate.
    """
    captured = tiny.captured(tiny.Talker, {"input_ids": tiny.ids()}, seed=4)
    scored = apply(captured.program, f"insert-exits,{TEXT}")
    text = TEXT if picks else TEXT.replace("|prediction-short", "")
    save(apply(captured.program, order.format(text)), tmp_path / "talker.offramp", target="portable")
    chain = offramp.load(tmp_path / "talker.offramp")
    count, threshold = 16, 0.5
    words, depths = list(prompt), []
    for step in range(count):
        found = tiny.outputs(scored.module, {"input_ids": torch.tensor([words])})
        sure = [item for item in scored.exits if found[item.scores["top1-short"]][0, -1] >= threshold]
        leave = sure[0] if sure and (step or len(prompt) == 1) else None
        depths.append(leave.after if leave else tiny.BLOCKS)
        made = "output" if leave is None else leave.scores["prediction-short"] if picks else leave.outputs["output"]
        words.append(int(found[made][0, -1] if leave and picks else found[made][0, -1].argmax()))
    policy = offramp.Confidence(threshold, measure="top1-short")
    steps = list(chain.stream({"input_ids": [prompt]}, policy, max_new_tokens=count))
    assert [step.token for step in steps] == words[len(prompt) :]
    assert [step.exit for step in steps] == depths
    assert len(set(depths)) > 2
    for token in steps:
        assert any("tail" in ran.segment for ran in token.trace) == (token.exit == tiny.BLOCKS or not picks)


@pytest.mark.parametrize("passes", ["insert-exits{after=2}", ""])
def test_full_depth_picks_tokens_too(tmp_path: Path, passes: str) -> None:
    """Where the short score is high enough, full depth does without its head; sampling and beams never do."""
    captured = tiny.captured(tiny.Talker, {"input_ids": tiny.ids()}, seed=4)
    text = TEXT.replace("{", f"{{after={tiny.BLOCKS},")
    program = apply(captured.program, ",".join(filter(None, [passes, text, "insert-cache"])))
    save(program, tmp_path / "talker.offramp", target="portable")
    chain = offramp.load(tmp_path / "talker.offramp")
    scored = apply(captured.program, text)
    (full,) = [item for item in scored.exits if item.after == tiny.BLOCKS]
    prompt, count, threshold = [3, 1], 24, 0.4
    words, picked = list(prompt), []
    for _ in range(count):
        found = tiny.outputs(scored.module, {"input_ids": torch.tensor([words])})
        picked.append(bool(found[full.scores["top1-short"]][0, -1] >= threshold) and len(words) > len(prompt))
        best, few = found["output"][0, -1].argmax(), found[full.scores["prediction-short"]][0, -1]
        words.append(int(few if picked[-1] else best))
    policy = offramp.Confidence(thresholds={tiny.BLOCKS: threshold}, measure="top1-short")
    steps = list(chain.stream({"input_ids": [prompt]}, policy, max_new_tokens=count))
    assert [step.token for step in steps] == words[len(prompt) :]
    assert [not any("tail" in ran.segment for ran in step.trace) for step in steps] == picked
    assert {step.exit for step in steps} == {tiny.BLOCKS}
    assert len(set(picked)) == 2
    shallow = offramp.ShallowDeep(tiny.BLOCKS, 2.0, "top1-short", pick=threshold)
    assert [step.token for step in chain.stream({"input_ids": [prompt]}, shallow, max_new_tokens=count)] == words[2:]
    for options in ({"temperature": 1.0}, {"suppress": IDS}, {"processors": (lambda tokens, logits: logits,)}):
        steps = list(chain.stream({"input_ids": [prompt]}, policy, max_new_tokens=4, **options))
        assert all(any("tail" in ran.segment for ran in step.trace) for step in steps)
    exact = chain.generate({"input_ids": [prompt]}, offramp.Never(), beams=2, max_new_tokens=8)
    assert (
        chain.generate({"input_ids": [prompt]}, policy, beams=2, max_new_tokens=8).tokens[0].tolist()
        == exact.tokens[0].tolist()
    )


class Compared(Policy):
    """Lets two of three tokens leave after two blocks, takes full depth's picks from a score on, is told of both."""

    def __init__(self, pick: float) -> None:
        self.pick = pick
        self.agreed: list[bool] = []

    @property
    def observes(self) -> frozenset[type[Agreement | Cost]]:
        return frozenset({Agreement})

    def observe(self, seen: Agreement | Cost) -> None:
        assert isinstance(seen, Agreement)
        self.agreed += seen.agreed.tolist()

    def measures(self, stack: str, exit_: Exit) -> tuple[str, ...] | None:
        return ("top1-short",)

    def leave(self, state: State) -> Rows:
        if state.after == state.blocks:
            return np.greater_equal(state.scores["top1-short"], self.pick)
        assert state.steps is not None
        return state.steps % 3 != 0


@pytest.fixture(scope="module")
def picking(tmp_path_factory: pytest.TempPathFactory) -> tuple[Program, offramp.Chain]:
    """A talker that picks tokens after two blocks and at full depth."""
    captured = tiny.captured(tiny.Talker, {"input_ids": tiny.ids()}, seed=4)
    scored = apply(captured.program, "insert-exits{after=2}," + TEXT.replace("{", f"{{after=2|{tiny.BLOCKS},"))
    path = tmp_path_factory.mktemp("picking") / "talker.offramp"
    save(apply(scored, "insert-cache"), path, target="portable")
    return scored, offramp.load(path)


@pytest.mark.parametrize("pick", [0.0, 0.35, 2.0])
def test_exits_are_compared_with_what_full_depth_picks(picking: tuple[Program, offramp.Chain], pick: float) -> None:
    """If its picks will do for all tokens that are caught up, no head runs; else they are compared with the head's."""
    scored, chain = picking
    policy, prompt = Compared(pick), [3, 1]
    steps = list(chain.stream({"input_ids": [prompt]}, policy, max_new_tokens=25))
    early, full = scored.exits
    text = torch.tensor([[*prompt, *(step.token for step in steps)]])
    made = tiny.outputs(scored.module, {"input_ids": text})
    few, deep, sure = (
        made[name][0].numpy()
        for name in (
            early.scores["prediction-short"],
            full.scores["prediction-short"],
            full.scores["top1-short"],
        )
    )
    whole, agreed, heads = made["output"][0].argmax(-1).numpy(), [], []
    for at in range(len(prompt) + 2, len(prompt) + len(steps) - 1, 3):  # a token that goes deep; two wait
        caught = slice(at - 2, at + 1)
        heads.append(bool((sure[caught] < pick).any()))
        agreed += (few[caught] == (whole if heads[-1] else deep)[caught]).tolist()
    assert policy.agreed == agreed
    assert [any("tail" in ran.segment for ran in step.trace) for step in steps if step.caught_up] == heads
    assert len(set(heads)) == (2 if pick == 0.35 else 1)
    assert 3 < sum(agreed) < len(agreed)


class EverySecond(Compared):
    """Is told of every second step that goes deep."""

    asked = 0

    def compares(self, stack: str) -> bool:
        self.asked += 1
        return self.asked % 2 == 0


@pytest.mark.parametrize("pick", [0.0, 2.0])
def test_whether_to_compare_is_asked_once_a_step(picking: tuple[Program, offramp.Chain], pick: float) -> None:
    policy = EverySecond(pick)
    steps = list(picking[1].stream({"input_ids": [[3, 1]]}, policy, max_new_tokens=25))
    deep = [step for step in steps[1:] if step.exit == tiny.BLOCKS]  # the first step is the prompt's
    assert policy.asked == len(deep)
    assert len(policy.agreed) == 3 * (len(deep) // 2)  # a token and the two that waited for it


def test_without_exits_only_full_depth_can_be_scored(decoder: tiny.Captured) -> None:
    with pytest.raises(SpecError, match="has exits after no block"):
        apply(decoder.program, TEXT)
    with pytest.raises(SpecError, match="has exits after no block"):
        apply(decoder.program, TEXT.replace("{", "{after=1,"))
    assert apply(decoder.program, TEXT.replace("{", f"{{after={tiny.BLOCKS},")).exits[0].scores.keys() == set(OF_SHORT)
