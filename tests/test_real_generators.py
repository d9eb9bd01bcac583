"""Real models generate under ONNX Runtime, token for token, what transformers generates."""

from __future__ import annotations

import csv
import os
import re
import wave
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from demos import needs, shown

import offramp
from offramp import zoo
from offramp.demo import _two_ways, speech
from offramp.errors import OfframpError
from offramp.runtime.preprocess.audio import log_mel, read_wav, resample

DATA = Path(os.environ.get("OFFRAMP_DATA", Path(__file__).parent.parent.parent / "shared" / "data"))
PROMPTS = (
    "The capital of France is",
    "def fibonacci(n):",
    "Once upon a time, in a village by the sea,",
    "The three laws of thermodynamics are",
    "List four fruits:",
)


def _loaded(name: str) -> tuple[torch.nn.Module, dict[str, torch.Tensor]]:
    try:
        return zoo.load(name)
    except (OfframpError, ModuleNotFoundError) as error:
        pytest.skip(f"{name}: {error}")


def _bundle(name: str, folder: Path, pipeline: str = "insert-cache") -> tuple[torch.nn.Module, offramp.Chain, Path]:
    module, example = _loaded(name)
    program = offramp.apply(offramp.capture(module, example), pipeline)
    path = folder / f"{name}.offramp"
    figures = offramp.save(program, path, segments=2, generation=zoo.generation(name), files=zoo.tokenizer_files(name))
    assert max(value for key, value in figures.items() if key != "tolerance") <= figures["tolerance"]
    return module, offramp.load(path), path


def _clips() -> list[tuple[str, Any, str]]:
    """Name, log-mel features [1, 80, 3000] and transcript of the transcribed clips."""
    table = DATA / "ljspeech" / "metadata8.csv"
    if not table.exists():
        pytest.skip(f"no {table}: LJSpeech, in a folder that OFFRAMP_DATA names")
    with table.open(newline="") as stream:
        rows = list(csv.reader(stream, delimiter="|", quoting=csv.QUOTE_NONE))
    found = []
    for row in rows:
        samples, rate = read_wav(DATA / "ljspeech" / f"{row[0].removesuffix('.wav')}.wav")
        found.append((row[0], log_mel(resample(samples, rate, 16000)), row[-1]))
    return found


def _best(module: Any, features: Any, generation: dict[str, Any], tokens: list[int]) -> list[int]:
    """The greedy token of transformers' model behind the prompt, and behind each of the tokens but the last.

    The model is causal: one pass over the text gives what greedy decoding finds step by step, as long as both agree.
    """
    prompt = generation["prompt"]
    ids = torch.tensor([[*prompt, *tokens[:-1]]])
    with torch.no_grad():
        encoded = module.whisper.model.encoder(torch.from_numpy(features))
        logits = module.whisper(encoder_outputs=encoded, decoder_input_ids=ids, use_cache=False).logits[0]
    logits = logits[len(prompt) - 1 :]
    logits[:, generation["suppress"]] = -torch.inf
    logits[0, generation["suppress_first"]] = -torch.inf
    found: list[int] = logits.argmax(-1).tolist()
    return found


@pytest.fixture(scope="module")
def speech_demo(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path]:
    """What ``offramp demo speech`` prints, and Whisper base at full depth, which it has saved."""
    needs("whisper_base")
    try:
        speech.recording()
    except OfframpError as error:
        pytest.skip(str(error))
    path = tmp_path_factory.mktemp("speech") / "demo.offramp"
    return shown("speech", "-o", str(path)), _two_ways.full_of(path)


@pytest.mark.slow
def test_the_demo_of_speech(speech_demo: tuple[str, Path]) -> None:
    found, _ = speech_demo
    assert "ever failed. No matter. Try again." in found
    assert "the same text" in found
    assert "for 19 tokens, 19 of them proven the best of 51,865" in found
    assert re.search(r"The decoder is \S+x as fast as full depth", found)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["whisper_base", "whisper_tiny_en"])
def test_transcripts_are_those_of_transformers(name: str, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    clips = _clips()
    if name == "whisper_base":
        (module, _), (_, path) = _loaded(name), request.getfixturevalue("speech_demo")
        chain = offramp.load(path)
    else:
        module, chain, _ = _bundle(name, tmp_path)
    assert len(clips) == 8
    how: dict[str, Any] = dict(zoo.generation(name))
    alone: list[list[int]] = []
    for clip, features, _ in clips:
        found = chain.generate({"input_features": features}).tokens[0].tolist()
        assert found == _best(module, features, how, found), clip
        ends = [token in how["stop"] for token in found]
        assert not any(ends[:-1])
        assert ends[-1] or len(found) == how["max_length"] - len(how["prompt"])
        alone.append(found)
    pair = np.concatenate([clips[0][1], clips[1][1]])
    together = chain.generate({"input_features": pair}).tokens
    assert [row.tolist() for row in together] == alone[:2]


@pytest.fixture(scope="module")
def smollm2(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, offramp.Chain, Path]:
    pipeline = "insert-cache,insert-exits{after=10|20}"
    return _bundle("smollm2", tmp_path_factory.mktemp("smollm2"), pipeline)


@pytest.mark.slow
def test_64_greedy_tokens_of_5_prompts_are_those_of_transformers(smollm2: tuple[Any, offramp.Chain, Path]) -> None:
    from tokenizers import Tokenizer

    module, chain, path = smollm2
    tokenizer = Tokenizer.from_file(str(path / "tokenizer.json"))
    llama = next(child for child in module.children())
    rows = [tokenizer.encode(prompt).ids for prompt in PROMPTS]
    found = chain.generate({"input_ids": rows}, offramp.Never(), max_new_tokens=64, min_new_tokens=64, stop=(2,))
    for ids, tokens in zip(rows, found.tokens, strict=True):
        assert len(tokens) == 64
        with torch.no_grad():  # the model is causal: one pass finds what greedy decoding does, as long as both agree
            logits = llama(torch.tensor([[*ids, *tokens[:-1]]]), use_cache=False).logits[0, len(ids) - 1 :]
        logits[:, 2] = -torch.inf  # min_new_tokens
        assert tokens.tolist() == logits.argmax(-1).tolist()


@pytest.mark.slow
def test_leaving_early_is_exact_in_a_real_model(smollm2: tuple[Any, offramp.Chain, Path]) -> None:
    """Every third token goes deep: it gets what one pass over the text before it gives."""
    module, chain, _ = smollm2
    ids = [[1, 4093, 198, 28120, 42]]
    count = [0]

    def leave(state: offramp.State) -> Any:
        count[0] += state.after == 10
        return np.full(state.rows.size, state.after == 20 if count[0] % 2 else count[0] % 3 != 0)

    found = chain.generate({"input_ids": ids}, leave, max_new_tokens=24, stop=())
    assert set(found.exits[0].tolist()) == {10, 20, 30}
    text = torch.tensor([ids[0] + found.tokens[0].tolist()])
    with torch.no_grad():
        best = module(text)["logits"][0].argmax(-1)
    deep = [i for i, after in enumerate(found.exits[0]) if after == 30]
    assert [int(found.tokens[0][i]) for i in deep] == [int(best[len(ids[0]) - 1 + i]) for i in deep]


def test_a_recording_of_another_rate_is_resampled(tmp_path: Path) -> None:
    path = tmp_path / "tone.wav"
    tone = (np.sin(np.arange(44100) * 2 * np.pi * 440 / 44100) * 8000).astype("<i2")
    with wave.open(str(path), "wb") as stream:
        stream.setnchannels(1)
        stream.setsampwidth(2)
        stream.setframerate(44100)
        stream.writeframes(tone.tobytes())
    samples, rate = read_wav(path)
    assert log_mel(resample(samples, rate, 16000)).shape == (1, 80, 3000)
