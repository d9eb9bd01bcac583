"""What happens where no passes are named: caches where the model generates text, and why not elsewhere."""

# mypy: disable-error-code="no-any-return, override"
from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import tiny
from torch import Tensor

import offramp
from offramp import cli
from offramp.check import check
from offramp.passes.default import with_caches
from offramp.program import Program

MODELS = """
import tiny
from test_defaults import Classifier

def speaker():
    return tiny.cut(tiny.seeded(tiny.Decoder), 2), {"input_ids": tiny.ids()}

def classifier():
    return tiny.seeded(Classifier), {"input_ids": tiny.ids()}
"""


class Classifier(tiny.Encoder):
    """A class of every row, of the mean of causal tokens, or of every token."""

    def __init__(self, pooled: bool = True) -> None:
        super().__init__(causal=True, pooled=pooled)
        self.blocks = self.blocks[:2]

    def forward(self, input_ids: Tensor) -> Any:
        x = self.embed(input_ids)
        for block in self.blocks:
            x = block(x, None)
        return self.head(self.leave(x).mean(1) if self.pooled else self.leave(x))


class Shifted(tiny.Decoder):
    """A generator whose tokens read the one before them, which no cache keeps."""

    def embed(self, input_ids: Tensor) -> Tensor:
        x = super().embed(input_ids)
        return x + x.roll(1, 1)


class Upright(tiny.Decoder):
    """A generator whose hidden states have features before tokens."""

    def forward(self, input_ids: Tensor) -> Tensor:
        x = self.embed(input_ids).transpose(1, 2)
        for block in self.blocks[:2]:
            x = x + block.attend(block.norms[0](x.transpose(1, 2)), None).transpose(1, 2)
            x = x + block.mlp(block.norms[1](x.transpose(1, 2))).transpose(1, 2)
        return self.head(self.leave(x.transpose(1, 2)))


IDS = {"input_ids": tiny.ids()}


def test_a_generator_gets_caches(decoder: tiny.Captured) -> None:
    program, reason = with_caches(decoder.program)
    assert program.cache is not None
    assert (reason, with_caches(program)) == (None, (program, None))


def test_an_encoder_is_as_it_was_and_nothing_is_said(encoder: tiny.Captured) -> None:
    assert with_caches(encoder.program) == (encoder.program, None)


@pytest.mark.parametrize(
    ("make", "expected"),
    [
        (Classifier, "no output is logits of each token, or of the last one"),
        (lambda: Classifier(pooled=False), "'output' has 3 classes, not one for each of the 11 token ids"),
        (Shifted, r"aten.roll.default goes over the tokens .*\.py:\d+.*; try: "),
        (Upright, r"hidden state of stack decoder, of shape \['batch', 16, 'tokens'\], does not have rows and tokens"),
    ],
)
def test_where_there_are_no_caches_a_reason_says_why(make: Any, expected: str) -> None:
    captured = offramp.capture(tiny.seeded(make), IDS)
    program, reason = with_caches(captured)
    assert program is captured
    assert reason is not None
    with pytest.raises(AssertionError, match=expected):
        raise AssertionError(reason)


def test_a_model_with_exits_but_no_caches_is_ok() -> None:
    report = check(tiny.seeded(Classifier), IDS)
    assert (report.ok, report.stage) == (True, None)
    assert report.reason is not None
    assert report.reason.startswith("no caches: insert-cache: no output is logits")
    assert [(stack.role, stack.cached) for stack in report.stacks] == [("decoder", False)]
    assert report.exits == 1
    assert report.max_error["cache"] is None
    assert json.loads(report.to_json())["reason"] == report.reason


def test_the_command_line_exports_with_caches_unless_told_otherwise(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "default_models.py").write_text(MODELS)
    monkeypatch.chdir(tmp_path)
    saved: list[Program] = []

    def save(program: Program, *_: Any, **__: Any) -> dict[str, float]:
        saved.append(program)
        return {"tolerance": 1e-4}

    monkeypatch.setattr(offramp, "save", save)
    monkeypatch.setattr(offramp, "load", str)
    for factory, options in (("speaker", []), ("speaker", ["-p", ""]), ("classifier", [])):
        assert cli.main(["export", f"default_models.py:{factory}", "-o", "x", *options]) == 0
    cached, plain, classifier = saved
    assert cached.history == ("insert-cache",)
    assert (plain.history, plain.cache, classifier.history, classifier.cache) == ((), None, (), None)
    (line,) = [line for line in capsys.readouterr().err.splitlines() if "no caches" in line]
    assert "so the bundle does not generate: insert-cache: no output is logits" in line
