"""The zoo's models that write: what they write is right, which proves the readers of their weights."""

from __future__ import annotations

import functools
import json
import math
import os
import re
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from test_zoo import load
from tokenizers import Tokenizer
from torch import Tensor
from torch.nn import functional as F

from offramp import zoo
from offramp.runtime.preprocess.audio import log_mel, read_wav, resample
from offramp.zoo._ctranslate2 import read_model, whisper_state

DATA = Path(os.environ.get("OFFRAMP_DATA", Path(__file__).parents[2] / "shared" / "data"))
WRITERS = ("annalog", "smollm2", "translator", "whisper_base", "whisper_tiny_en")
SPEECH = ("whisper_base", "whisper_tiny_en")


def data(*parts: str) -> Path:
    """A file of the shared data, or a skip."""
    path = DATA.joinpath(*parts)
    if not path.exists():
        pytest.skip(f"{path} is missing: it is beside the checkout, or under OFFRAMP_DATA")
    return path


@functools.cache
def tokenizer(name: str) -> Tokenizer:
    try:
        (path,) = zoo.tokenizer_files(name)
    except zoo.PackageMissingError as error:
        pytest.skip(str(error))
    return Tokenizer.from_file(str(path))


def greedy(logits: Callable[[Tensor], Tensor], name: str, prompt: list[int], at_most: int = 100) -> list[int]:
    """The tokens that follow the prompt; ``logits`` takes ``[1, T]`` and gives ``[1, T, V]``."""
    how, found = zoo.generation(name), list[int]()
    while len(found) < at_most:
        with torch.inference_mode():
            scores = logits(torch.tensor([prompt + found]))[0, -1].tolist()
        last = torch.tensor(scores)
        last[how["suppress"]] = -math.inf
        if not found:
            last[how["suppress_first"]] = -math.inf
        token = int(last.argmax())
        if token in how["stop"]:
            return found
        found.append(token)
    return found


@pytest.mark.parametrize("name", zoo.names())
def test_models_that_write_say_how(name: str) -> None:
    how, sound = zoo.generation(name), zoo.audio(name)
    assert bool(how) == (name in WRITERS)
    assert bool(sound) == (name in SPEECH)
    assert json.loads(json.dumps(how)) == how
    if how:
        assert {"prompt", "stop", "suppress", "suppress_first", "max_length"} <= how.keys()
        assert not set(how["stop"]) & set(how["suppress"])
        how["stop"].clear()
        assert zoo.generation(name)["stop"], "what is handed out is a copy"


@pytest.mark.parametrize("name", SPEECH)
def test_whisper_suppresses_what_its_configuration_says(name: str) -> None:
    tokenizer(name)
    from offramp.zoo import whisper_base, whisper_tiny_en

    paths = {
        "whisper_base": lambda: whisper_base.WEIGHTS.file("data/config.json"),
        "whisper_tiny_en": lambda: whisper_tiny_en.WEIGHTS.file("model/config.json"),
    }
    packaged = json.loads(paths[name]().read_text())
    how = zoo.generation(name)
    assert how["suppress"] == packaged["suppress_ids"]
    assert how["suppress_first"] == packaged["suppress_ids_begin"]


@pytest.mark.parametrize(
    ("name", "marks"),
    [
        ("whisper_base", "<|startoftranscript|><|en|><|transcribe|><|notimestamps|><|endoftext|>"),
        ("whisper_tiny_en", "<|startoftranscript|><|notimestamps|><|endoftext|>"),
        pytest.param("smollm2", "<|im_end|><|endoftext|>", marks=pytest.mark.slow),
        ("annalog", "<sos><eos>"),
    ],
)
def test_prompts_and_stops_are_what_the_tokenizer_calls_so(name: str, marks: str) -> None:
    how = zoo.generation(name)
    assert tokenizer(name).decode(how["prompt"] + how["stop"], skip_special_tokens=False) == marks


def words_wrong(found: str, expected: str) -> float:
    """Word error rate: edits of words over the words expected, letters and digits only."""
    left, right = (re.findall(r"[a-z0-9]+", text.lower()) for text in (found, expected))
    row = list(range(len(right) + 1))
    for index, word in enumerate(left, 1):
        diagonal, row[0] = row[0], index
        for place, other in enumerate(right, 1):
            diagonal, row[place] = row[place], min(row[place] + 1, row[place - 1] + 1, diagonal + (word != other))
    return row[-1] / len(right)


@pytest.mark.slow
@pytest.mark.parametrize("name", SPEECH)
def test_whisper_writes_what_is_said(name: str) -> None:
    metadata = data("ljspeech", "metadata8.csv").read_text(encoding="utf-8")
    clip, _, said = metadata.splitlines()[3].split("|")
    module: Any = load(name)[0]
    features = log_mel(resample(*read_wav(data("ljspeech", f"{clip}.wav")), 16000))
    with torch.inference_mode():
        memory = module.whisper.model.encoder(torch.from_numpy(features))

    def logits(ids: Tensor) -> Tensor:
        found: Tensor = module.whisper(encoder_outputs=memory, decoder_input_ids=ids, use_cache=False).logits
        return found

    written = tokenizer(name).decode(greedy(logits, name, zoo.generation(name)["prompt"]))
    assert words_wrong(written, said) <= 0.1, written


@pytest.mark.slow
def test_smollm2_finds_text_likely_and_answers() -> None:
    module: Any = load("smollm2")[0]
    words = tokenizer("smollm2")
    text = data("wikitext2", "test.txt").read_text(encoding="utf-8").strip()
    ids = torch.tensor([words.encode(text[:8000]).ids[:1024]])
    with torch.inference_mode():
        logits = module(input_ids=ids)["logits"]
    assert math.exp(F.cross_entropy(logits[0, :-1], ids[0, 1:])) < 11

    prompt = zoo.generation("smollm2")["template"].format(text="What is the capital of France?")
    answer = greedy(lambda ids: module(input_ids=ids)["logits"], "smollm2", words.encode(prompt).ids, at_most=20)
    assert "Paris" in words.decode(answer)


def test_smollm2_tokenizer_keeps_any_text() -> None:
    words = tokenizer("smollm2")
    for text in ("Hello world", "  two spaces\n\n", "1234 = 1 + 23", "naïve 東京 🙂"):
        assert words.decode(words.encode(text).ids) == text
    assert words.encode("<|im_start|>user\n").tokens == ["<|im_start|>", "user", "Ċ"]
    assert words.encode("2024").tokens == ["2", "0", "2", "4"]


@pytest.mark.parametrize("molecule", ["Clc1ccc(Br)cc1", "CC(C)Cc1ccc(cc1)[C@@H](C)C(=O)O"])
def test_annalog_writes_smiles(molecule: str) -> None:
    module, _ = load("annalog")
    from offramp.zoo import annalog

    source = annalog.encode(molecule)
    assert annalog.decode(source[0]) == molecule
    assert tokenizer("annalog").encode(molecule).ids == source[0].tolist()
    ids = greedy(lambda ids: module(input_ids=source, decoder_input_ids=ids)["logits"], "annalog", [annalog.START])
    written = annalog.decode(torch.tensor(ids))
    assert len(ids) > 5
    assert written.count("(") == written.count(")")
    assert all(written.count(ring) % 2 == 0 for ring in "123")
    assert set("Clc1(Br)") & set(written)


def test_annalog_does_not_see_padding() -> None:
    module, inputs = load("annalog")
    from offramp.zoo import annalog

    alone = annalog.encode(annalog.EXAMPLES[0])
    assert alone.shape[1] < inputs["input_ids"].shape[1]
    with torch.inference_mode():
        found = module(alone, inputs["decoder_input_ids"][:1])["logits"]
        torch.testing.assert_close(module(**inputs)["logits"][:1], found, atol=1e-5, rtol=1e-5)


def model_bin(*variables: tuple[str, Any], version: int = 6, alias: str = "decoder/projection/weight") -> bytes:
    """A file as CTranslate2 writes it, with one alias of its first variable."""

    def text(value: str) -> bytes:
        return struct.pack("<H", len(value) + 1) + value.encode() + b"\0"

    dtypes = {"float32": 0, "int8": 1, "int16": 2, "int32": 3, "float16": 4}
    parts = [struct.pack("<I", version), text("WhisperSpec"), struct.pack("<II", 3, len(variables))]
    for name, value in variables:
        shape = struct.pack(f"<B{value.ndim}I", value.ndim, *value.shape)
        parts += [text(name), shape, struct.pack("<BI", dtypes[str(value.dtype)], value.nbytes), value.tobytes()]
    return b"".join([*parts, struct.pack("<I", 1), text(alias), text(variables[0][0])])


MATRIX = np.arange(6, dtype=np.float16).reshape(2, 3)


def test_model_bin_is_read_as_float32_with_its_aliases() -> None:
    variables = read_model(model_bin(("decoder/embeddings/weight", MATRIX), ("encoder/num_heads", np.int16(8))))
    assert list(variables) == ["decoder/embeddings/weight", "encoder/num_heads", "decoder/projection/weight"]
    assert variables["decoder/embeddings/weight"].dtype == np.float32
    np.testing.assert_array_equal(variables["decoder/projection/weight"], MATRIX)
    assert int(variables["encoder/num_heads"]) == 8


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (model_bin(("w", MATRIX), version=7), "version 7 of the format, expected 6"),
        (model_bin(("w", MATRIX))[:60], "ends early"),
        (model_bin(("w", MATRIX)) + b"\0", "1 bytes behind"),
        (model_bin(("w", MATRIX.astype(np.int8))), "w of .* is int8, expected weights in float16"),
    ],
)
def test_model_bin_that_is_not_read_says_why(content: bytes, reason: str) -> None:
    with pytest.raises(zoo.ZooError, match=reason):
        read_model(content)


def test_another_model_of_ctranslate2_is_no_whisper() -> None:
    with pytest.raises(zoo.ZooError, match="no Whisper: it has no variable 'encoder/position_encodings/encodings'"):
        whisper_state(read_model(model_bin(("decoder/embeddings/weight", MATRIX))))
