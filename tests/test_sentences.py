"""Directories of sentence-transformers: pooling and what else stands behind the model is in the bundle."""

from __future__ import annotations

import copy
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from breadth import slow_but
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.modules import Dense, Normalize, Pooling, Transformer
from test_pretrained_settings import TEXTS, WIDTH, WORDS, saved, seeded, tokenizer

import offramp
from offramp import cli, models
from offramp.cli import _text
from offramp.errors import PretrainedModelError
from offramp.pretrained import sentences


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    config = transformers.BertConfig(vocab_size=len(WORDS), max_position_embeddings=24, **WIDTH)
    words = tokenizer(pad_token="<pad>", model_max_length=24)
    return saved(tmp_path_factory.mktemp("base"), seeded(transformers.BertModel, config), words)


def written(base: Path, folder: Path, *behind: Any, **settings: Any) -> Path:
    """A directory that sentence-transformers wrote, with these modules behind the transformer."""
    modules = [Transformer(str(base)), *behind]
    SentenceTransformer(modules=modules, device="cpu", **settings).save_pretrained(str(folder))
    return folder


def embeddings(directory: Path, bundle: Path, passes: str = "") -> Any:
    """What a bundle of the directory makes of the texts, in one padded batch."""
    module, inputs = models.resolve(f"hf:{directory}")()
    program = offramp.apply(offramp.capture(module, inputs), passes or [])
    offramp.save(program, bundle, **models.settings(f"hf:{directory}", module, inputs))
    chain = offramp.load(bundle)
    (batch,) = _text.encode(chain, bundle, TEXTS)
    return chain, batch


def test_all_that_stands_behind_the_model(base: Path, tmp_path: Path) -> None:
    torch.manual_seed(0)
    directory = written(base, tmp_path / "whole", Pooling(16, ["mean", "cls"]), Dense(32, 8), Normalize())
    chain, batch = embeddings(directory, tmp_path / "bundle", "insert-exits")
    expected: Any = SentenceTransformer(str(directory), device="cpu")
    found = chain.run(batch).outputs
    assert list(found) == ["sentence_embedding"]
    np.testing.assert_allclose(found["sentence_embedding"], expected.encode(list(TEXTS)), atol=1e-5)
    expected[0].auto_model.encoder.layer = expected[0].auto_model.encoder.layer[:1]
    early = chain.run(batch, offramp.Depth({"encoder": 1})).outputs["sentence_embedding"]
    np.testing.assert_allclose(early, expected.encode(list(TEXTS)), atol=1e-5)
    assert np.abs(early - found["sentence_embedding"]).max() > 0.01


@pytest.mark.parametrize(
    "mode",
    slow_but(["cls"], ["cls", "mean", "max", "weightedmean", "lasttoken"]),
)
def test_pooling(base: Path, tmp_path: Path, mode: str) -> None:
    directory = written(base, tmp_path / "whole", Pooling(16, mode))
    chain, batch = embeddings(directory, tmp_path / "bundle")
    expected = SentenceTransformer(str(directory), device="cpu").encode(list(TEXTS))
    np.testing.assert_allclose(chain.run(batch).outputs["sentence_embedding"], expected, atol=1e-4)


def test_through_the_command(base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    directory = written(base, tmp_path / "whole", Pooling(16, "mean"))
    assert cli.main(["export", f"hf:{directory}", "-o", str(tmp_path / "bundle")]) == 0
    assert cli.main(["run", str(tmp_path / "bundle"), "-t", TEXTS[0]]) == 0
    found = capsys.readouterr()
    assert "sentence_embedding  float32  [1, 16]" in found.out
    assert "random" not in found.err  # the pooler, which BERT has and this directory does not need


def test_a_copy_is_one_of_its_own(base: Path, tmp_path: Path) -> None:
    module, inputs = models.resolve(f"hf:{written(base, tmp_path / 'whole', Pooling(16, 'mean'))}")()
    assert isinstance(inputs, dict)
    other, before = copy.deepcopy(module), module(**inputs)["sentence_embedding"]
    with torch.no_grad():
        for weight in other.parameters():
            weight.zero_()
    assert torch.equal(module(**inputs)["sentence_embedding"], before)
    assert not other(**inputs)["sentence_embedding"].any()


@pytest.mark.slow
def test_an_id_of_the_hub(base: Path, tmp_path: Path) -> None:
    """As a machine without a network has it: what was downloaded before."""
    place = tmp_path / "hub" / "models--some--one"
    written(base, place / "snapshots" / "0", Pooling(16, "mean"))
    (place / "refs").mkdir()
    (place / "refs" / "main").write_text("0")
    asked = "from offramp import models; m, x = models.resolve('hf:some/one')(); print(*m(**x).keys())"
    env = {**os.environ, "HF_HUB_CACHE": str(tmp_path / "hub"), "HF_HUB_OFFLINE": "1"}
    found = subprocess.run([sys.executable, "-c", asked], env=env, capture_output=True, text=True, check=False)
    assert found.stdout == "sentence_embedding\n", found.stderr


def test_what_a_bundle_does_not_do_to_texts_is_said(base: Path, tmp_path: Path) -> None:
    prompts = {"prompts": {"query": "find: "}, "default_prompt_name": "query"}
    directory = written(base, tmp_path / "whole", Pooling(16, "mean"), **prompts)
    (directory / "sentence_bert_config.json").write_text(json.dumps({"do_lower_case": True, "max_seq_length": 8}))
    notes: list[str] = []
    module, inputs = models.resolve(f"hf:{directory}", notes.append)()
    assert [note.partition(": ")[2].partition(";")[0] for note in notes] == [
        "sentence-transformers puts 'find: ' before each text",
        "sentence-transformers makes texts lower case",
    ]
    settings = models.settings(f"hf:{directory}", module, inputs)
    assert settings["preprocessing"]["text"]["limit"] == 8


def test_without_the_library_it_is_left_out(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    directory = written(base, tmp_path / "whole", Pooling(16, "mean"), Normalize())
    monkeypatch.setattr(sentences, "find_spec", lambda name: None)
    notes: list[str] = []
    module, inputs = models.resolve(f"hf:{directory}", notes.append)()
    assert isinstance(inputs, dict)
    assert module(**inputs).last_hidden_state.shape[-1] == 16
    (note,) = notes
    assert "BertModel modules.json has Pooling, Normalize, left out" in note
    assert note.endswith("for all of it, pip install sentence-transformers")


def test_one_that_does_not_load(base: Path, tmp_path: Path) -> None:
    directory = written(base, tmp_path / "whole", Pooling(16, "mean"))
    (directory / "1_Pooling" / "config.json").write_text('{"embedding_dimension": 16, "pooling_mode": "middle"}')
    with pytest.raises(PretrainedModelError, match=r"could not be loaded: .*middle"):
        models.resolve(f"hf:{directory}")()


def test_one_that_reads_something_else_of_the_model(base: Path, tmp_path: Path) -> None:
    directory = written(base, tmp_path / "whole", Pooling(16, "mean"))
    settings = json.loads((directory / "sentence_bert_config.json").read_text())
    settings["modality_config"]["text"]["method_output_name"] = "pooler_output"
    (directory / "sentence_bert_config.json").write_text(json.dumps(settings))
    with pytest.raises(PretrainedModelError, match="Pooling behind BertModel get something else"):
        models.resolve(f"hf:{directory}")()
