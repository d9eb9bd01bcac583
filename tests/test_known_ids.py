"""Numbers that are looked up in tables: which of them a bundle takes, and of how many positions."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import torch
from torch import Tensor, nn

import offramp
from offramp.bundle.manifest import MANIFEST_FILE
from offramp.errors import ExecutionError, InputError
from offramp.program import Program, capture
from offramp.program.analysis.lookups import known_ids, longest

WORDS = (0, tiny.WORDS - 1)


class Reading(tiny.Encoder):
    """An encoder that makes something of its ids first, by a function of the model and the ids."""

    def __init__(self, embed: Callable[[Any, Tensor], Tensor]) -> None:
        super().__init__()
        self.few, self._read = nn.Embedding(5, tiny.WIDTH), embed

    def embed(self, input_ids: Tensor) -> Tensor:
        return self._read(self, input_ids)


def program_of(embed: Callable[[Any, Tensor], Tensor], tokens: int = tiny.TOKENS) -> Program:
    return tiny.captured(partial(Reading, embed), tiny.text(tokens)).program


def ids_of(embed: Callable[[Any, Tensor], Tensor]) -> tuple[int, int] | None:
    return known_ids(program_of(embed), {}).get("input_ids")


AS_THEY_ARE: dict[str, tuple[Callable[[Any, Tensor], Tensor], tuple[int, int]]] = {
    "as they are": (lambda m, ids: m.words(ids), WORDS),
    "in another dtype": (lambda m, ids: m.words(ids.int()), WORDS),
    "in another shape": (lambda m, ids: m.words(ids.reshape(-1)).reshape(*ids.shape, -1), WORDS),
    "once more": (lambda m, ids: m.words(ids) + m.words((ids + 1) % 11), WORDS),
    "in a smaller table too": (lambda m, ids: m.words(ids) + m.few(ids % 5) + m.few(ids), (0, 4)),
    "by index_select": (lambda m, ids: m.words.weight.index_select(0, ids.flatten()).reshape(*ids.shape, -1), WORDS),
    # torch counts these from the table's end
    "by an index": (lambda m, ids: m.words.weight[ids], (-tiny.WORDS, tiny.WORDS - 1)),
    # no place may hold more than the largest table has
    "in parts": (lambda m, ids: torch.cat([m.few(ids[:, :1]), m.words(ids[:, 1:])], 1), WORDS),
}


@pytest.mark.parametrize("case", AS_THEY_ARE)
def test_ids_that_are_looked_up_as_they_are(case: str) -> None:
    embed, expected = AS_THEY_ARE[case]
    few = torch.randint(5, (2, tiny.TOKENS), generator=torch.Generator().manual_seed(0))
    program = tiny.captured(partial(Reading, embed), {**tiny.text(), "input_ids": few}).program
    assert known_ids(program, {}) == {"input_ids": expected}


OTHERWISE: dict[str, Callable[[Any, Tensor], Tensor]] = {
    "an offset": lambda m, ids: m.words((ids + 3) % 11),
    "clamped": lambda m, ids: m.words(ids.clamp(0, 10)),
    "masked": lambda m, ids: m.words(torch.where(ids == -100, 0, ids)),
    "filled": lambda m, ids: m.words(ids.masked_fill(ids < 0, 0)),
    "a part is a number": lambda m, ids: torch.cat(
        [m.words(ids[:, 1:]), ids[:, :1, None].float().expand(-1, -1, tiny.WIDTH)], 1
    ),
    "floats": lambda m, ids: ids[..., None] * m.words.weight.sum(0),
}


@pytest.mark.parametrize("case", OTHERWISE)
def test_nothing_is_said_of_others(case: str) -> None:
    assert ids_of(OTHERWISE[case]) is None


def counted(tokens: Tensor, first: int = 0) -> Tensor:
    return torch.arange(first, first + tokens.shape[1])


LENGTHS: dict[str, tuple[Callable[[Any, Tensor], Tensor], int | None]] = {
    "positions": (lambda m, ids: m.words(ids) + m.places(counted(ids)), 64),
    "positions from two on": (lambda m, ids: m.words(ids) + m.places(counted(ids, 2)), 62),
    "the shorter table": (
        lambda m, ids: m.words(ids) + m.places(counted(ids)) + m.places.weight[: tiny.WORDS][counted(ids)],
        tiny.WORDS,
    ),
    "half as many": (lambda m, ids: m.words(ids) + m.places(counted(ids) // 2), 128),
    "no more than there are": (lambda m, ids: m.words(ids) + m.places(counted(ids).clamp(max=63)), None),
    "as many as words": (lambda m, ids: m.words(ids) + m.places((ids != 0).cumsum(1)), None),
    "none": (lambda m, ids: m.words(ids), None),
}


@pytest.mark.parametrize("case", LENGTHS)
def test_positions_limit_an_axis(case: str) -> None:
    embed, expected = LENGTHS[case]
    program = program_of(embed)
    found = {program.axes.names[symbol]: limit for symbol, limit in longest(program).items()}
    assert found == ({} if expected is None else {"tokens": expected})


def test_two_axes_have_their_own_limits() -> None:
    class Other(tiny.TwoStacks):
        def __init__(self) -> None:
            super().__init__()
            self.decoder.places = nn.Embedding(20, tiny.WIDTH)

    program = tiny.captured(Other, tiny.two_texts()).program
    found = {program.axes.names[symbol]: limit for symbol, limit in longest(program).items()}
    assert sorted(found.values()) == [20, 64]
    assert found[str(program.axes.describe(program.nodes["input_ids"].meta["val"].shape[1]))] == 20
    assert known_ids(program, {}) == {"source_ids": WORDS, "input_ids": WORDS}


# The bundle refuses others


def saved(program: Program, path: Path) -> offramp.Chain:
    offramp.save(program, path)
    return offramp.load(path)


def text(*rows: list[int]) -> dict[str, Any]:
    return {"input_ids": np.array(rows), "attention_mask": np.ones((len(rows), len(rows[0])), np.int64)}


@pytest.fixture(scope="module")
def encoder_bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("known") / "encoder"
    saved(tiny.captured(tiny.Encoder, tiny.text()).program, path)
    return path


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ([1, -1, 3], r"'input_ids' has the ids \[-1\]; they go from 0 to 10"),
        ([11, -1, 3], r"'input_ids' has the ids \[11, -1\]; they go from 0 to 10"),
        ([11, 12, 13, 14, 15, 16, 17], r"'input_ids' has the ids \[11, 12, 13, 14, 15\]; they go from 0 to 10"),
        ([0] * 65, "tokens is 65 in 'input_ids'; this bundle is for 1 to 64"),
    ],
)
def test_an_encoder(encoder_bundle: Path, row: list[int], said: str) -> None:
    chain = offramp.load(encoder_bundle)
    assert chain.run(text([0, 10, *[3] * 62])).outputs["logits"].shape == (1, tiny.CLASSES)
    with pytest.raises(InputError, match=said):
        chain.run(text([1] * len(row), row))


def test_a_bundle_that_does_not_say(encoder_bundle: Path, tmp_path: Path) -> None:
    """One whose manifest lacks the field runs as it did: ONNX Runtime says what is too high."""
    for file in encoder_bundle.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    manifest = json.loads((tmp_path / MANIFEST_FILE).read_text())
    assert manifest.pop("ids") == {"input_ids": list(WORDS)}
    (tmp_path / MANIFEST_FILE).write_text(json.dumps(manifest))
    chain = offramp.load(tmp_path)
    assert chain.run(text([1, 2])).outputs["logits"].shape == (1, tiny.CLASSES)
    with pytest.raises(ExecutionError, match=r"(?s)out of data bounds.*try: ids that the model has"):
        chain.run(text([1, 11]))


class Talking(tiny.TwoStacks):
    def __init__(self) -> None:
        super().__init__()
        self.decoder.head = nn.Linear(tiny.WIDTH, tiny.WORDS)


@pytest.fixture(scope="module", params=["", "insert-cache"], ids=["plain", "cached"])
def translator(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> offramp.Chain:
    """An encoder and a decoder, without caches and with."""
    program = offramp.apply(tiny.captured(Talking, tiny.two_texts()).program, request.param)
    return saved(program, tmp_path_factory.mktemp("known") / "translator")


def pair(source: list[int], target: list[int]) -> dict[str, Any]:
    return {
        "source_ids": np.array([source]),
        "source_mask": np.ones((1, len(source)), np.int64),
        "input_ids": np.array([target]),
    }


@pytest.mark.parametrize(
    ("source", "target", "said"),
    [
        ([1, -2], [1], r"'source_ids' has the ids \[-2\]; they go from 0 to 10"),
        ([1, 11], [1], r"'source_ids' has the ids \[11\]; they go from 0 to 10"),
        ([1, 2], [-1], r"'input_ids' has the ids \[-1\]; they go from 0 to 10"),
        ([1, 2], [1, 11], r"'input_ids' has the ids \[11\]; they go from 0 to 10"),
        ([1] * 65, [1], "is 65 in 'source_ids'; this bundle is for 1 to 64"),
    ],
)
def test_an_encoder_and_a_decoder(translator: offramp.Chain, source: list[int], target: list[int], said: str) -> None:
    calls = [translator.run] + [partial(translator.generate, max_new_tokens=2)] * bool(translator.manifest.cache)
    for call in calls:
        with pytest.raises(InputError, match=said):
            call(pair(source, target))
        call(pair([0, 10], [10, 0]))


def test_a_pass_over_more_tokens_than_positions(translator: offramp.Chain) -> None:
    assert translator.run(pair([1], [1] * 64)).outputs["output"].shape == (1, 64, tiny.WORDS)
    with pytest.raises(InputError, match="is 65 in 'input_ids'; this bundle is for 1 to 64"):
        translator.run(pair([1], [1] * 65))


@pytest.mark.parametrize("case", ["an offset", "masked"])
def test_ids_that_are_no_rows_of_a_table_run(case: str, tmp_path: Path) -> None:
    program = program_of(OTHERWISE[case])
    chain = saved(program, tmp_path / "b")
    assert chain.manifest.ids == {}
    ids = torch.tensor([[1, 2, -100 if case == "masked" else -2]])
    mask = torch.ones_like(ids)
    expected = tiny.outputs(program.module, {"input_ids": ids, "attention_mask": mask})["logits"]
    found = chain.run({"input_ids": ids.numpy(), "attention_mask": mask.numpy()}).outputs["logits"]
    np.testing.assert_allclose(found, expected.numpy(), rtol=1e-4, atol=1e-5)


class Typed(tiny.Encoder):
    """Positions and segments are inputs."""

    def __init__(self) -> None:
        super().__init__()
        self.kinds = nn.Embedding(2, tiny.WIDTH)

    def forward(  # type: ignore[override]
        self, input_ids: Tensor, attention_mask: Tensor, token_type_ids: Tensor, position_ids: Tensor
    ) -> dict[str, Tensor]:
        x = self.words(input_ids) + self.kinds(token_type_ids) + self.places(position_ids)
        return {"logits": self.head(self.run(x, attention_mask.bool()[:, None, None]).mean(1))}


def test_segments_and_positions(tmp_path: Path) -> None:
    ids = tiny.text()
    kinds, positions = ids["input_ids"] % 2, torch.arange(tiny.TOKENS).expand(2, -1).contiguous()
    given = {**ids, "token_type_ids": kinds, "position_ids": positions}
    chain = saved(capture(tiny.seeded(Typed), given), tmp_path / "b")
    assert chain.manifest.ids == {"input_ids": WORDS, "token_type_ids": (0, 1), "position_ids": (0, 63)}
    arrays = {name: value.numpy() for name, value in given.items()}
    wrong = {"token_type_ids": arrays["token_type_ids"].copy(), "position_ids": arrays["position_ids"] - 1}
    wrong["token_type_ids"][1, 3] = 2
    said = {"token_type_ids": r"\[2\]; they go from 0 to 1", "position_ids": r"\[-1, -1\]; they go from 0 to 63"}
    for name, array in wrong.items():
        with pytest.raises(InputError, match=f"'{name}' has the ids {said[name]}"):
            chain.run({**arrays, name: array})
