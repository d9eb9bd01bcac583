"""Masks that hide nothing: an hf: model that is for one length with one is captured without, and gives the same."""

# mypy: disable-error-code="no-untyped-call"
from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import directories
import pytest
import torch
import transformers

import offramp
from offramp import models
from offramp.cli import main
from offramp.pretrained.masks import without_masks

SAID = "captured once more without attention_mask, with which it is for one length alone"


@pytest.fixture(scope="module")
def moonshine(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """It makes a number of the mask's length, and its feature extractor a mask."""
    folder = tmp_path_factory.mktemp("moonshine")
    heads = {f"{part}_num_{what}_heads": 4 for part in ("encoder", "decoder") for what in ("attention", "key_value")}
    blocks = {f"{part}_num_hidden_layers": 2 for part in ("encoder", "decoder")}
    config = transformers.MoonshineConfig(
        vocab_size=directories.VOCAB, hidden_size=32, intermediate_size=64, decoder_start_token_id=directories.START,
        pad_token_id=directories.PAD, bos_token_id=directories.START, eos_token_id=directories.END, **heads, **blocks,
    )  # fmt: skip
    torch.manual_seed(0)
    directories._save(folder, transformers.MoonshineForConditionalGeneration(config).eval(), max_new_tokens=8)
    directories._tokenizer(folder, "plain")
    transformers.Wav2Vec2FeatureExtractor(do_normalize=False, return_attention_mask=True).save_pretrained(folder)
    return folder


@pytest.mark.slow
def test_sounds_of_any_length_give_what_they_give_with_the_mask(
    moonshine: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["export", f"hf:{moonshine}", "-o", str(tmp_path / "m.offramp")]) == 0
    assert SAID in capsys.readouterr().err
    chain = offramp.load(tmp_path / "m.offramp")
    assert "attention_mask" not in chain.inputs
    model: Any = transformers.MoonshineForConditionalGeneration.from_pretrained(moonshine).eval()
    for rows, samples in ((1, 3000), (2, 6200)):
        values = torch.randn(rows, samples, generator=torch.Generator().manual_seed(samples))
        found = chain.generate({"input_values": values.numpy()}, max_new_tokens=5).tokens
        mask = torch.ones(rows, samples, dtype=torch.int64)
        with torch.no_grad():
            wanted = model.generate(values, attention_mask=mask, max_new_tokens=5, do_sample=False)
        for row, whole in zip(found, wanted, strict=True):
            assert row.tolist() == whole[1 : 1 + row.size].tolist()


@pytest.mark.slow
def test_a_mask_that_costs_nothing_stays(tmp_path: Path) -> None:
    directories.DIRECTORIES["llama_chat"].make(tmp_path)
    name, notes = f"hf:{tmp_path}", list[str]()
    module, inputs = models.resolve(name)()
    program, kept = models.captured(name, module, inputs, offramp.capture, notes.append)
    assert isinstance(inputs, dict)
    assert set(kept) == set(inputs) == {"input_ids", "attention_mask"}
    assert not notes
    assert program.inputs


def _program(*, fixed: bool) -> Any:
    """As far as it is looked at: what is known of its one axis of tokens."""
    return SimpleNamespace(axes=SimpleNamespace(tokens={"s"}, ranges={"s": (9, 9 if fixed else None)}))


class Adding(torch.nn.Module):
    """Adds a number to its input, another one where there is a mask if ``apart``."""

    def __init__(self, *, apart: bool) -> None:
        super().__init__()
        self.apart = apart

    def forward(self, x: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
        return x + (2 if self.apart and mask is not None else 1)


@pytest.mark.parametrize(
    ("apart", "fixed", "still", "left_out"),
    [(False, True, False, True), (True, True, False, False), (False, False, False, False), (False, True, True, False)],
    ids=["freed", "other-outputs", "not-fixed", "still-fixed"],
)
def test_a_mask_is_left_out_only_where_that_helps_and_changes_nothing(
    apart: bool, fixed: bool, still: bool, left_out: bool
) -> None:
    inputs = {"x": torch.randn(2, 9), "mask": torch.ones(2, 9, dtype=torch.int64)}
    program, notes = _program(fixed=fixed), list[str]()
    made, kept = without_masks(program, Adding(apart=apart), inputs, lambda *_: _program(fixed=still), notes.append)
    assert (made is not program) == ("mask" not in kept) == bool(notes) == left_out
