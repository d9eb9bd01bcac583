"""Directories as `save_pretrained` writes them: what they bring along is in the bundle, and `run` uses it."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tokenizers
import torch
import transformers

import offramp
from offramp import cli, models
from offramp.cli import _text

SPECIAL = ["<unk>", "<pad>", "<s>", "</s>"]
WORDS = [*SPECIAL, *"hello world a good movie this is test of longer text".split()]  # noqa: SIM905
TEXTS = ("a good movie", "hello world this is a test of a longer text", "hello")
WIDTH = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 16}


def tokenizer(**settings: Any) -> Any:
    made = tokenizers.Tokenizer(tokenizers.models.WordLevel({word: i for i, word in enumerate(WORDS)}, "<unk>"))
    made.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    made.post_processor = tokenizers.processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 3)])
    special = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>"}
    return transformers.PreTrainedTokenizerFast(tokenizer_object=made, **special, **settings)


def saved(root: Path, model: Any, *others: Any) -> Path:
    for item in (model, *others):
        item.save_pretrained(root)
    return root


def seeded(kind: Any, config: Any) -> Any:
    torch.manual_seed(0)
    model = kind(config).eval()
    with torch.no_grad():
        for weights in model.parameters():
            weights.mul_(3)  # as they come, everything is nearly 0, and padding too
    return model


def exported(directory: Path, capsys: pytest.CaptureFixture[str], *argv: str) -> tuple[Path, str]:
    """The bundle of a directory by the command line, and what that said on stderr."""
    bundle = directory.with_suffix(".offramp")
    status = cli.main(["export", f"hf:{directory}", "-o", str(bundle), *argv])
    said = capsys.readouterr().err
    assert status == 0, said
    return bundle, said


def run(capsys: pytest.CaptureFixture[str], *argv: object) -> str:
    assert cli.main([str(item) for item in argv]) == 0
    return capsys.readouterr().out


def refused(capsys: pytest.CaptureFixture[str], *argv: object) -> str:
    assert cli.main([str(item) for item in argv]) == 1
    return capsys.readouterr().err


def logits(bundle: Path, texts: Sequence[str]) -> list[Any]:
    """The logits of every text, by the bundle's own tokenizer and padding."""
    chain = offramp.load(bundle)
    return [
        row
        for batch in _text.encode(chain, bundle, texts)
        for row in chain.run(batch, offramp.Never()).outputs["logits"]
    ]


# Padding


@pytest.fixture(scope="module")
def judge(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A classifier on a decoder whose padding is 3, the end: it reads the last token that is no padding."""
    config = transformers.GPT2Config(
        n_layer=2,
        n_embd=16,
        n_head=2,
        vocab_size=20,
        n_positions=12,
        pad_token_id=3,
        id2label={0: "bad", 1: "good"},
        label2id={"bad": 0, "good": 1},
    )
    model = seeded(transformers.GPT2ForSequenceClassification, config)
    return saved(tmp_path_factory.mktemp("judge") / "judge", model, tokenizer(pad_token="</s>"))


def bundle_of(directory: Path) -> Path:
    bundle = directory.with_suffix(".offramp")
    if not bundle.exists():
        name = f"hf:{directory}"
        module, inputs = models.resolve(name)()
        offramp.save(offramp.capture(module, inputs), bundle, **models.settings(name, module, inputs))
    return bundle


def test_rows_that_are_padded_give_what_they_give_alone(judge: Path) -> None:
    bundle = bundle_of(judge)
    settings = offramp.load(bundle).manifest.preprocessing.text
    assert settings is not None
    assert (settings.pad, settings.pad_side, settings.limit) == (3, "right", 12)
    model = transformers.AutoModelForSequenceClassification.from_pretrained(judge)
    encoded = transformers.AutoTokenizer.from_pretrained(judge)(list(TEXTS), padding=True, return_tensors="pt")
    expected = model(**encoded).logits.detach().numpy()
    together, alone = logits(bundle, TEXTS), [logits(bundle, [text])[0] for text in TEXTS]
    np.testing.assert_allclose(together, expected, atol=1e-5)
    np.testing.assert_allclose(alone, expected, atol=1e-5)


def test_text_that_is_too_long_is_an_error_or_cut(judge: Path, capsys: pytest.CaptureFixture[str]) -> None:
    bundle, long = bundle_of(judge), "hello " * 20
    said = refused(capsys, "run", bundle, "-t", "a good movie", "-t", long)
    assert "text 1 has 21 tokens, the model takes 12" in said
    assert "--truncate" in said
    assert "good" in run(capsys, "run", bundle, "-t", "a good movie", "-t", long, "--truncate")
    chain = offramp.load(bundle)
    (found,) = _text.encode(chain, bundle, [long], truncate=True)
    expected = transformers.AutoTokenizer.from_pretrained(judge)(long, truncation=True, max_length=12)["input_ids"]
    assert found["input_ids"].tolist() == [expected]


def test_classes_are_called_by_their_names(judge: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shown = run(capsys, "run", bundle_of(judge), "-t", "a good movie", "-t", "hello")
    expected = torch.tensor(np.array(logits(bundle_of(judge), ["a good movie", "hello"]))).softmax(-1)
    for row, chances in enumerate(expected.tolist()):
        best = int(np.argmax(chances))
        assert re.search(rf"^ *{row}  {['bad', 'good'][best]} {chances[best]:.1%}, ", shown, re.MULTILINE)


def test_rows_run_apart_where_it_is_not_known_how_to_pad(
    judge: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bundle, expected = tmp_path / "apart.offramp", logits(bundle_of(judge), TEXTS)
    shutil.copytree(bundle_of(judge), bundle)
    manifest = json.loads((bundle / "manifest.json").read_text())
    manifest["preprocessing"]["text"]["pad"] = None
    (bundle / "manifest.json").write_text(json.dumps(manifest))
    chain = offramp.load(bundle)
    assert [batch["input_ids"].shape for batch in _text.encode(chain, bundle, TEXTS)] == [(1, 4), (1, 11), (1, 2)]
    assert len(_text.encode(chain, bundle, ["a good movie", "this is test"])) == 1
    out = tmp_path / "out"
    shown = run(capsys, "run", bundle, "-o", out, *(part for text in TEXTS for part in ("-t", text)))
    np.testing.assert_allclose(np.load(out / "logits.npy"), expected, atol=1e-5)
    assert re.findall(r"^ *(\d)  decoder .*?((?:hello|a) .*|hello)$", shown, re.MULTILINE) == [
        (str(row), text) for row, text in enumerate(TEXTS)
    ]
    assert "it is not known how the model takes padding" in refused(capsys, "bench", bundle, "-t", "a", "-t", "a good")
