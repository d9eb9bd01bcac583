"""Models that return more than logits, or those of the last token alone: caches, exits, generation, against torch."""

# mypy: disable-error-code="no-any-return, override"
from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import torch
from breadth import slow_but
from torch import Tensor, nn

import offramp
from offramp.program.forward import named_outputs

WORDS, NEW = tiny.WORDS, 6
PROMPTS = [[3], [1, 2, 5, 4], [7, 7], [2, 9, 8]]


class Speaker(tiny.Decoder):
    """A causal decoder of two blocks; ``tail`` makes the outputs of the last hidden state and the ids."""

    def __init__(self, tail: Callable[[Speaker, Tensor, Tensor], Any]) -> None:
        super().__init__()
        self.blocks, self.tail = self.blocks[:2], tail
        self.value, self.gate = nn.Linear(tiny.WIDTH, 1), nn.Linear(tiny.WIDTH, 1)
        self.around = tiny.Attention()

    def forward(self, input_ids: Tensor) -> Any:
        x = self.embed(input_ids)
        for block in self.blocks:
            x = block(x, None)
        return self.tail(self, self.leave(x), input_ids)


class Translator(nn.Module):
    """An encoder and a causal decoder that attends to it; ``extra`` makes outputs of the memory and the decoder."""

    def __init__(self, extra: Callable[[Translator, Tensor, Tensor], dict[str, Tensor]], stride: int = 1) -> None:
        super().__init__()
        self.encoder, self.decoder, self.extra = tiny.Encoder(), tiny.Encoder(causal=True, cross=True), extra
        self.encoder.blocks, self.decoder.blocks = self.encoder.blocks[:2], self.decoder.blocks[:2]
        self.decoder.head = nn.Linear(tiny.WIDTH, WORDS)
        self.conv = nn.Conv1d(tiny.WIDTH, tiny.WIDTH, 3, stride, 1) if stride > 1 else None

    def forward(self, source_ids: Tensor, input_ids: Tensor) -> dict[str, Tensor]:
        x = self.encoder.embed(source_ids)
        if self.conv is not None:
            x = self.conv(x.transpose(1, 2)).transpose(1, 2)
        for block in self.encoder.blocks:
            x = block(x, None)
        memory = self.encoder.leave(x)
        x = self.decoder.embed(input_ids)
        for block in self.decoder.blocks:
            x = block(x, None, memory, None)
        x = self.decoder.leave(x)
        return {"logits": self.decoder.head(x), **self.extra(self, memory, x)}


def attended(model: Speaker, x: Tensor) -> Tensor:
    """Every token sees all others, and the pool is their mean."""
    return model.around(x, x, None).mean(1)


def where_greatest(x: Tensor, ids: Tensor) -> Tensor:
    """The hidden state at the greatest id of each row, as CLIP's text tower pools."""
    return x[torch.arange(x.shape[0]), ids.argmax(-1)]


def everything(m: Speaker, x: Tensor, ids: Tensor) -> dict[str, Tensor]:
    """Outputs of each token, and outputs that mix tokens, before and behind the logits."""
    y = m.head(x)
    return {
        "value": m.value(x).squeeze(-1),
        "pooled": x.mean(1),
        "first": x[:, 0],
        "third": x[:, 2:4],
        "logits": y,
        "chances": y.softmax(-1),
        "loss": y.logsumexp(-1).mean(1),
        "sums": x.cumsum(1),
        "attended": attended(m, x),
        "weighted": (x * m.gate(x).softmax(1)).sum(1),
        "hidden": x,
        "greatest": where_greatest(x, ids),
        "shifted": x - x.roll(1, 1),
        "places": x + m.places.weight[: x.shape[1]],
    }


def of_memory(m: Translator, memory: Tensor, x: Tensor) -> dict[str, Tensor]:
    """Outputs made of the encoder's side alone, and of both."""
    alone = {"memory": memory, "pooled": memory.mean(1), "scored": m.encoder.head(memory)}
    return {**alone, "both": x.mean(1) + memory.mean(1), "alike": x @ memory.transpose(1, 2), "x": x}


LAST: dict[str, Callable[[Speaker, Tensor, Tensor], Any]] = {
    "place": lambda m, x, ids: m.head(x[:, -1]),
    "slice": lambda m, x, ids: m.head(x[:, -1:]),
    "list": lambda m, x, ids: m.head(x[:, [-1], :]),
    "size": lambda m, x, ids: m.head(x[:, x.shape[1] - 1]),
    "narrow": lambda m, x, ids: m.head(x.narrow(1, x.shape[1] - 1, 1)),
    "rows": lambda m, x, ids: m.head(x[torch.arange(x.shape[0]), -1]),
    "filled": lambda m, x, ids: m.head(x[torch.arange(x.shape[0]), torch.full_like(ids[:, 0], x.shape[1] - 1)]),
    "of logits": lambda m, x, ids: m.head(x)[:, -1, :],
}
IDS = {"input_ids": tiny.ids()}
CASES: dict[str, tuple[Callable[[], nn.Module], tiny.Inputs]] = {
    "everything": (partial(Speaker, everything), IDS),
    "last": (partial(Speaker, lambda m, x, ids: {"logits": m.head(x[:, [-1]]), "hidden": x, "pooled": x.amax(1)}), IDS),
    "memory": (partial(Translator, of_memory), {"source_ids": tiny.ids(9, seed=2), **IDS}),
    "as long": (partial(Translator, of_memory), {"source_ids": tiny.ids(seed=2), **IDS}),
    "convolved": (partial(Translator, of_memory, 2), {"source_ids": tiny.ids(9, seed=2), **IDS}),
}
BREADTH = slow_but(["everything"], CASES)
Made = tuple[nn.Module, tiny.Inputs, offramp.Chain]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Made]:
    known: dict[str, Made] = {}

    def get(name: str) -> Made:
        if name not in known:
            make, inputs = CASES[name]
            module = tiny.seeded(make)
            program = offramp.capture(module, inputs)
            stack = list(program.stacks)[-1]
            scores = f"insert-scores{{stack={stack},measure=top1|prediction,output=logits}}"
            path = tmp_path_factory.mktemp("more") / "model.offramp"
            offramp.save(offramp.apply(program, f"insert-cache,insert-exits{{stack={stack},after=1}},{scores}"), path)
            known[name] = module, inputs, offramp.load(path)
        return known[name]

    return get


def loop(module: nn.Module, inputs: dict[str, Any], row: int) -> list[int]:
    """What a row generates, the whole text run again for every token."""
    text = list(inputs["input_ids"][row])
    around = {name: value[row : row + 1] for name, value in inputs.items() if name != "input_ids"}
    for _ in range(NEW):
        with torch.no_grad():
            found = named_outputs(module(**around, input_ids=torch.tensor([text])))["logits"]
        text.append(int(found.reshape(-1, WORDS)[-1].argmax()))
    return text[-NEW:]


def prompts(inputs: tiny.Inputs) -> dict[str, Any]:
    """Four rows with prompts of different lengths, their sources longer than the example's."""
    around = {name: tiny.ids(11, len(PROMPTS), seed=5) for name in inputs if name != "input_ids"}
    return {**around, "input_ids": PROMPTS}


@pytest.mark.parametrize("name", BREADTH)
def test_run_gives_what_the_model_gives(made: Callable[[str], Made], name: str) -> None:
    module, inputs, chain = made(name)
    for rows, more in ((1, 0), (3, 4)):
        given = {key: tiny.ids(value.shape[1] + more, rows, seed=8) for key, value in inputs.items()}
        with torch.no_grad():
            expected = named_outputs(module(**given))
        found = chain.run({key: value.numpy() for key, value in given.items()}, offramp.Never()).outputs
        assert found.keys() == expected.keys()
        for output, value in expected.items():
            np.testing.assert_allclose(found[output], value.numpy(), atol=1e-5)


@pytest.mark.parametrize("name", BREADTH)
def test_generation_is_the_models_own(made: Callable[[str], Made], name: str) -> None:
    module, inputs, chain = made(name)
    given = prompts(inputs)
    expected = [loop(module, given, row) for row in range(len(PROMPTS))]
    arrays = {key: value.numpy() if isinstance(value, Tensor) else value for key, value in given.items()}
    for policy in (None, offramp.Verify(1, drafts=3)):
        found = chain.generate(arrays, policy, max_new_tokens=NEW)
        assert [row.tolist() for row in found.tokens] == expected


@pytest.mark.parametrize("name", ["everything", "last", "memory"])
def test_tokens_that_leave_early(made: Callable[[str], Made], name: str) -> None:
    """Forced after a block, tokens are those of the model without the blocks behind it; a mix, whatever the batch."""
    module, inputs, chain = made(name)
    given = {**prompts(inputs), "input_ids": [[5], [2], [9], [0]]}
    arrays = {key: value.numpy() if isinstance(value, Tensor) else value for key, value in given.items()}
    stack = list(chain.stacks)[-1]
    short = tiny.cut(module, 1, "decoder.blocks" if isinstance(module, Translator) else "blocks")
    found = chain.generate(arrays, offramp.Depth({stack: 1}), max_new_tokens=NEW)
    assert [row.tolist() for row in found.tokens] == [loop(short, given, row) for row in range(4)]
    policy = offramp.Confidence(0.2, measure="top1")
    together = chain.generate(arrays, policy, max_new_tokens=NEW)
    for row in range(4):
        alone = chain.generate({key: value[row : row + 1] for key, value in arrays.items()}, policy, max_new_tokens=NEW)
        assert alone.tokens[0].tolist() == together.tokens[row].tolist()
        assert alone.exits[0].tolist() == together.exits[row].tolist()


def test_beams_read_the_same_output(made: Callable[[str], Made]) -> None:
    """Of a model that gives the last token's logits alone, and of one that gives all."""
    every = tiny.seeded(partial(Speaker, lambda m, x, ids: m.head(x)))
    _, _, chain = made("last")
    found = chain.generate({"input_ids": PROMPTS}, beams=3, max_new_tokens=3)
    for row, prompt in enumerate(PROMPTS):
        beams = [(0.0, list(prompt))]
        for _ in range(3):
            with torch.no_grad():
                chances = [every(torch.tensor([text]))[0, -1].log_softmax(-1).tolist() for _, text in beams]
            grown = [(s + p, [*t, i]) for (s, t), c in zip(beams, chances, strict=True) for i, p in enumerate(c)]
            beams = sorted(grown, reverse=True)[:3]
        assert found.tokens[row].tolist() == beams[0][1][len(prompt) :]


@pytest.mark.parametrize("name", LAST)
def test_the_last_place_however_it_is_written(name: str) -> None:
    program = offramp.capture(tiny.seeded(partial(Speaker, LAST[name])), IDS)
    made = offramp.apply(program, "insert-cache")  # which compares the end of every chunk with one pass
    assert made.cache is not None
    assert (made.cache.logits, made.cache.whole) == ("output", ())


def test_the_output_that_has_a_class_for_each_token() -> None:
    program = offramp.capture(tiny.seeded(partial(Speaker, lambda m, x, ids: (x, m.head(x), x.mean(1)))), IDS)
    made = offramp.apply(program, "insert-cache")
    assert made.cache is not None
    assert (made.cache.logits, made.cache.whole) == ("output1", ("output2",))


# Refusals

REFUSED: dict[str, tuple[Callable[[Speaker, Tensor, Tensor], Any], str]] = {
    "which": (lambda m, x, ids: (m.head(x), -m.head(x)), r"which output is the logits .*\['output0', 'output1'\]"),
    "pooled alone": (lambda m, x, ids: m.head(x.mean(1)), "no output is logits of each token, or of the last one"),
    "pooled beside hidden states": (
        lambda m, x, ids: {"logits": m.head(x.mean(1)), "hidden": x},
        r"no output is logits of each token.*: logits \['batch', 11\], hidden",
    ),
    "second last": (lambda m, x, ids: m.head(x[:, -2]), "no output is logits of each token, or of the last one"),
    "mixed before": (lambda m, x, ids: m.head(x + x.mean(1, keepdim=True)), r"aten.mean.dim goes over the tokens"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refusals(name: str) -> None:
    tail, reason = REFUSED[name]
    program = offramp.capture(tiny.seeded(partial(Speaker, tail)), {"input_ids": tiny.ids()})
    with pytest.raises(offramp.OfframpError, match=reason):
        offramp.apply(program, "insert-cache")


def test_a_short_list_needs_the_logits_of_all_tokens() -> None:
    program = offramp.capture(tiny.seeded(partial(Speaker, LAST["list"])), IDS)
    with pytest.raises(offramp.OfframpError, match="'output' is of the last token alone") as caught:
        offramp.apply(program, "insert-exits{after=1},insert-scores{measure=top1-short,candidates=4}")
    assert "return the logits of all tokens" in str(caught.value.hint)


class Understood(tiny.TwoStacks):
    """An encoder and a causal decoder of the same tokens, whose last states are pooled."""

    def forward(self, input_ids: Tensor) -> dict[str, Tensor]:
        mask = torch.ones_like(input_ids)
        pooled = super().forward(input_ids, mask, input_ids).mean(1)
        reach = mask.bool()[:, None, None]
        return {"scores": pooled, "memory": self.encoder.run(self.encoder.embed(input_ids), reach)}


@pytest.mark.slow
def test_states_of_an_encoder_are_no_logits() -> None:
    program = offramp.capture(tiny.seeded(Understood), {"input_ids": tiny.ids()})
    with pytest.raises(offramp.OfframpError, match=r"no output is logits .*: scores \['batch', 3\], memory"):
        offramp.apply(program, "insert-cache")


class Typed(tiny.Decoder):
    """A second input of tokens, which generation could not extend."""

    def forward(self, input_ids: Tensor, kind_ids: Tensor) -> Tensor:
        x = self.embed(input_ids) + self.places(kind_ids)
        for block in self.blocks[:2]:
            x = block(x, None)
        return self.head(self.leave(x))


class Wrapped(torch.nn.Module):
    """Makes the second input itself."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = Typed()

    def forward(self, input_ids: Tensor) -> Tensor:
        return self.inner(input_ids, torch.ones_like(input_ids))


def test_a_wrapper_that_makes_the_other_input_generates(tmp_path: Path) -> None:
    program = offramp.capture(tiny.seeded(Wrapped), IDS)
    offramp.save(offramp.apply(program, "insert-cache"), tmp_path / "model.offramp")
    assert offramp.load(tmp_path / "model.offramp").generates == "input_ids"


def test_a_bundle_with_caches_that_cannot_generate_is_not_written(tmp_path: Path) -> None:
    program = offramp.capture(tiny.seeded(Typed), {**IDS, "kind_ids": tiny.ids(seed=6)})
    with pytest.raises(offramp.OfframpError, match=r"cannot generate: .*\['input_ids', 'kind_ids'\]") as caught:
        offramp.save(offramp.apply(program, "insert-cache"), tmp_path / "model.offramp")
    assert "leave insert-cache out; or a wrapper around the model whose forward takes the ids" in str(caught.value)
    assert not (tmp_path / "model.offramp").exists()
