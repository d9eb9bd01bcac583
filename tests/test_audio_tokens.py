"""Recordings of different lengths among the tokens of a text: of the features of each as many as its mask says."""

# mypy: disable-error-code="no-any-return, override, no-untyped-call"
from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from test_image_tokens import FEATURES, Reader, greedy, scattered
from torch import Tensor, nn

import offramp
from offramp.check import check
from offramp.errors import ExecutionError, InputError, PassError
from offramp.passes.caches.chunks import check_chunks
from offramp.program import ops
from offramp.runtime.card import CARD_FILE

SOUND, FRAMES, COUNTS = tiny.WORDS - 1, 6, (5, 3)


class Hears(Reader):
    """A decoder that finds the frames of a recording among its tokens; what lies behind its end is dropped."""

    def __init__(self, returned: bool = False) -> None:
        super().__init__(scattered)
        self.returned = returned

    def forward(self, sound: Tensor, heard: Tensor, input_ids: Tensor) -> dict[str, Tensor]:
        frames = self.look(sound)[heard]
        x = self.embed(input_ids).masked_scatter((input_ids == SOUND)[..., None], frames)
        for block in self.blocks:
            x = block(x, None)
        return {"logits": self.head(self.leave(x)), **({"frames": frames} if self.returned else {})}


def hears(returned: bool = False) -> Hears:
    torch.manual_seed(0)
    return Hears(returned).eval()


def example() -> dict[str, Tensor]:
    random = torch.Generator().manual_seed(0)
    ids = torch.randint(3, SOUND, (2, 10), generator=random)
    for row, count in enumerate(COUNTS):
        ids[row, 1 : 1 + count] = SOUND
    heard = torch.arange(FRAMES) < torch.tensor(COUNTS)[:, None]
    return {"sound": torch.randn(2, FRAMES, FEATURES, generator=random), "heard": heard, "input_ids": ids}


@given(rows=st.integers(1, 3), count=st.integers(1, 5), more=st.integers(0, 4), data=st.data())
@settings(max_examples=40, deadline=None)
def test_places_are_filled_with_what_is_kept(rows: int, count: int, more: int, data: Any) -> None:
    tokens, features = torch.randn(rows, count + more, 2), torch.randn(rows, count, 2)
    kept = torch.tensor([data.draw(st.lists(st.booleans(), min_size=count, max_size=count)) for _ in range(rows)])
    order = torch.tensor([data.draw(st.permutations(range(count + more))) for _ in range(rows)])
    places = order < kept.sum(1, keepdim=True)
    found = ops.fill_places(tokens, places, features, kept)
    torch.testing.assert_close(found, tokens.masked_scatter(places[..., None], features[kept]))


def test_another_number_than_is_kept_is_an_error() -> None:
    tokens, rows, kept = torch.zeros(1, 4, 2), torch.ones(1, 3, 2), torch.tensor([[True, False, True]])
    for marked in (1, 3):
        with pytest.raises(IndexError):
            ops.fill_places(tokens, torch.arange(4)[None] < marked, rows, kept)
    with pytest.raises(IndexError, match="a mask"):
        ops.fill_places(tokens, torch.arange(4)[None] < 2, rows, kept[:, :2])


@pytest.mark.parametrize("returned", [False, True])
def test_each_row_generates_what_it_does_alone(returned: bool, tmp_path: Path) -> None:
    model, inputs = hears(returned), example()
    program = offramp.capture(model, inputs)
    assert (program.axes.batch is None) == returned
    cached = offramp.apply(program, "insert-exits,insert-cache")
    assert cached.axes.names[cached.axes.batch] == "batch"
    assert cached.outputs == ("logits",)
    assert check_chunks(offramp.capture(hears(), inputs), cached) < 1e-5
    assert offramp.save(cached, tmp_path / "m.offramp")["cache"] < 1e-5
    chain = offramp.load(tmp_path / "m.offramp")
    rows = [inputs["input_ids"][0, :8], inputs["input_ids"][1]]
    arrays = {"sound": inputs["sound"].numpy(), "heard": inputs["heard"].numpy()}
    found = chain.generate({**arrays, "input_ids": [row.numpy() for row in rows]}, max_new_tokens=5)
    for at, row in enumerate(rows):
        alone = {name: value[at : at + 1] for name, value in inputs.items()} | {"input_ids": row[None]}
        assert SOUND not in found.tokens[at]
        assert found.tokens[at].tolist() == greedy(model, alone, 5)


def test_what_is_left_out_is_said(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("INFO", logger="offramp"):
        offramp.apply(offramp.capture(hears(True), example()), "insert-cache")
    assert "output 'frames' is left out: only a run tells how many rows it has" in caplog.text


def test_an_exit_that_gives_such_rows_keeps_them() -> None:
    class Both(Hears):
        def forward(self, sound: Tensor, heard: Tensor, input_ids: Tensor) -> dict[str, Tensor]:
            found = super().forward(sound, heard, input_ids)
            return {**found, "heard of": found["logits"][input_ids == SOUND]}

    torch.manual_seed(0)
    program = offramp.apply(offramp.capture(Both().eval(), example()), "insert-exits{after=1}")
    assert "heard of" in program.exits[0].outputs
    with pytest.raises(PassError, match="not computed apart"):
        offramp.apply(program, "insert-cache")


def test_a_text_with_too_many_or_too_few_places_is_refused(tmp_path: Path) -> None:
    program = offramp.apply(offramp.capture(hears(), example()), "insert-cache")
    offramp.save(program, tmp_path / "m.offramp")
    chain = offramp.load(tmp_path / "m.offramp")
    (kept,) = chain.manifest.placeholders
    assert (kept.input, kept.token, kept.masks) == ("input_ids", SOUND, ("heard",))
    arrays = {"sound": example()["sound"].numpy(), "heard": example()["heard"].numpy()}
    with pytest.raises(InputError, match=rf"row 1 .* the id {SOUND} 7 times; .* each of at most 6, as heard says"):
        chain.generate({**arrays, "input_ids": [[SOUND] * 5 + [4], [SOUND] * 7 + [4]]})
    for counts in ((5, 4), (5, 2)):
        ids = [[SOUND] * count + [4] for count in counts]
        with pytest.raises(ExecutionError, match=r"(?s)out of data bounds.*as many ids that stand for features"):
            chain.generate({**arrays, "input_ids": ids}, max_new_tokens=2)
    arrays["heard"] = np.ones((2, FRAMES + 1), bool)
    with pytest.raises((ExecutionError, InputError)):
        chain.generate({**arrays, "input_ids": [[SOUND] * 7 + [4]] * 2}, max_new_tokens=2)


def test_the_lines_of_the_card_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    offramp.save(offramp.apply(offramp.capture(hears(), example()), "insert-cache"), tmp_path / "m.offramp")
    (code,) = re.findall(r"```python\n(.*?)```", (tmp_path / "m.offramp" / CARD_FILE).read_text(), re.DOTALL)
    monkeypatch.chdir(tmp_path)
    exec(compile(code, CARD_FILE, "exec"), {"__name__": "card"})


# models of transformers

_TEXT = {
    "vocab_size": 60, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 128,
}  # fmt: skip
_AUDIO = {"num_mel_bins": 8, "num_hidden_layers": 2, "num_attention_heads": 2, "hidden_size": 16}
_QWEN = {"num_mel_bins": 8, "d_model": 16, "encoder_layers": 2, "encoder_attention_heads": 2, "encoder_ffn_dim": 32}
_GRANITE = {
    "input_dim": 8, "num_layers": 2, "hidden_dim": 16, "num_heads": 2, "dim_head": 8, "output_dim": 6,
    "context_size": 8, "max_pos_emb": 16, "conv_kernel_size": 3,
}  # fmt: skip
_QFORMER = {
    "model_type": "blip_2_qformer", "hidden_size": 16, "encoder_hidden_size": 16, "num_hidden_layers": 1,
    "num_attention_heads": 2, "intermediate_size": 32, "vocab_size": 10,
}  # fmt: skip
HEARING: dict[str, tuple[str, dict[str, Any], tuple[int, int], str | None]] = {
    # the text's kind, settings, features of a whole and a shorter recording, what says which are heard
    "Qwen2Audio": ("qwen2", {"audio_config": {**_QWEN, "max_source_positions": 16}}, (8, 5), "feature_attention_mask"),
    "AudioFlamingo3": (
        "qwen2",
        {"audio_config": {**_AUDIO, "intermediate_size": 32, "max_source_positions": 16}},
        (8, 5),
        "input_features_mask",
    ),
    "GlmAsr": (
        "llama",
        {"audio_config": {**_AUDIO, "intermediate_size": 64, "max_position_embeddings": 16}},
        (4, 2),
        "input_features_mask",
    ),
    "Voxtral": (
        "llama",
        {"audio_config": {**_AUDIO, "intermediate_size": 64, "max_source_positions": 16}},
        (4, 4),
        None,
    ),
    "GraniteSpeech": (
        "granite",
        {
            "encoder_config": _GRANITE,
            "projector_config": _QFORMER,
            "has_lora_adapter": False,
            "downsample_rate": 2,
            "window_size": 4,
        },
        (8, 5),
        "input_features_mask",
    ),
}


def listener(kind: str) -> tuple[Any, dict[str, Tensor], list[Tensor]]:
    """The model, and an example of two rows that are padded on the left; the rows of ids without padding."""
    text, given, counts, mask = HEARING[kind]
    torch.manual_seed(0)
    token = {"audio_token_index" if kind == "GraniteSpeech" else "audio_token_id": 50}
    config = getattr(transformers, f"{kind}Config")(text_config={**_TEXT, "model_type": text}, **token, **given)
    model = getattr(transformers, f"{kind}ForConditionalGeneration")(config).eval()
    model.generation_config.eos_token_id = None
    with torch.no_grad():
        for weight in model.parameters():
            if weight.dim() > 1:
                weight.mul_(1.5)
    rows = [torch.tensor([3 + row, *[50] * count, 7, 8 + row, 9]) for row, count in enumerate(counts)]
    ids = torch.stack([nn.functional.pad(row, (len(rows[0]) - len(row), 0)) for row in rows])
    inputs = {"input_ids": ids, "attention_mask": (ids != 0).long()}
    if kind == "GraniteSpeech":
        inputs |= {"input_features": torch.randn(2, 16, 8)}
        inputs |= {str(mask): torch.arange(8) < torch.tensor(counts)[:, None]}
    else:
        inputs |= {"input_features": torch.randn(2, 8, 32)}
        inputs |= {mask: (torch.arange(32) < torch.tensor([32, 20])[:, None]).long()} if mask else {}
    return model, inputs, rows


@pytest.mark.slow
@pytest.mark.parametrize("kind", HEARING)
def test_rows_of_a_text_with_a_recording_generate_as_transformers_does(kind: str, tmp_path: Path) -> None:
    model, inputs, rows = listener(kind)
    report = check(model, inputs)
    assert report.ok, report.reason
    assert [stack.cached for stack in report.stacks if stack.name == "decoder"] == [True]
    program = offramp.apply(offramp.capture(model, inputs), "insert-exits{stack=decoder},insert-cache")
    offramp.save(program, tmp_path / "m.offramp")
    chain = offramp.load(tmp_path / "m.offramp")
    beside = {name: value for name, value in inputs.items() if name not in ("input_ids", "attention_mask")}
    arrays = {name: value.numpy() for name, value in beside.items()}
    found = chain.generate({**arrays, "input_ids": [row.numpy() for row in rows]}, max_new_tokens=8)
    for at, row in enumerate(rows):
        alone = {name: value[at : at + 1] for name, value in beside.items()}
        given = {"input_ids": row[None], "attention_mask": torch.ones_like(row[None])}
        wanted = model.generate(**given, **alone, max_new_tokens=8, do_sample=False)
        assert found.tokens[at].tolist() == wanted[0, len(row) :].tolist()
