"""The baseline of onnxruntime-genai: SmolLM2 by its own builder, decoding in a process of its own.

Two pools of threads in one process disturb each other, so a benchmark asks a `Worker`, in turns with its own runs::

    with genai(smollm2(), threads=2) as worker:
        answer = worker.decode(prompt, 64)

Needs ``pip install --no-deps onnxruntime-genai==0.18.0`` (and to build torch, transformers, onnx-ir and psutil);
``OFFRAMP_PEERS_PYTHON`` names another Python that has them, where builder and worker are to run.
"""

from __future__ import annotations

import importlib
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

sys.path.insert(0, str(Path(__file__).parent.parent))  # a worker is started by this file's path, anywhere
from benchmarks._workers import Worker, python, serve

DIRECTORY = Path("build/benchmarks")
PACKAGE = "onnxruntime_genai"


class Saves(Protocol):
    """What transformers writes to a directory: a model, a tokenizer."""

    def save_pretrained(self, save_directory: Path) -> object: ...


def genai(path: Path, threads: int | None = None) -> Worker:
    """A worker on a directory of genai's builder.

    ``threads`` are the session's; None is genai's own choice: half of the processors that it sees, at most 16.
    """
    return Worker(_python(), "-P", __file__, str(path), str(threads or 0))


def smollm2(precision: str = "fp32") -> Path:
    """SmolLM2-135M as genai's builder makes it, "fp32" or "int4", built once, with a head for the last token only."""
    path = DIRECTORY / f"genai-smollm2-{precision}"
    if (path / "genai_config.json").exists():
        return path
    from transformers import PreTrainedTokenizerFast

    from offramp import zoo

    module: Any = zoo.load("smollm2")[0]
    tokenizer = PreTrainedTokenizerFast(tokenizer_file=str(zoo.tokenizer_files("smollm2")[0]))
    return build(path, module.llama, tokenizer, precision=precision, options=("prune_lm_head=true",))


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


def build(path: Path, *parts: Saves, precision: str = "fp32", options: Sequence[str] = ()) -> Path:
    """Have genai's builder write a transformers model and its tokenizer to ``path``, for the CPU.

    A ``WhisperForConditionalGeneration`` serves as well.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent) as scratch:
        source, target = Path(scratch) / "hf", Path(scratch) / "onnx"
        for part in parts:
            part.save_pretrained(source)
        command = [_python(), "-m", f"{PACKAGE}.models.builder", "-p", precision, "-e", "cpu"]
        command += ["-i", str(source), "-o", str(target), "-c", f"{scratch}/cache"]
        command += ["--extra_options", "hf_token=false", *options]
        ran = subprocess.run(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
        if ran.returncode:
            raise SystemExit(f"{' '.join(command)}\n{ran.stderr}")
        target.rename(path)
    return path


def _python() -> str:
    found = python(PACKAGE)
    if found is None:
        raise SystemExit(
            "pip install --no-deps onnxruntime-genai==0.18.0, or OFFRAMP_PEERS_PYTHON=a Python that has it"
        )
    return found


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

    def decode(prompt: list[int], new: int | None, features: str | None) -> tuple[list[int], list[float]]:
        assert new is not None
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

    def logits(text: list[int]) -> Any:
        options = og.GeneratorParams(model)
        options.set_search_options(do_sample=False, max_length=len(text) + 1)
        generator, found = og.Generator(model, options), []
        for token in text:
            generator.append_tokens([[token]])
            found.append(generator.get_output("logits")[0, -1].astype(np.float32))
        return np.stack(found)

    serve({"version": og.__version__}, decode, logits)


if __name__ == "__main__":
    _serve(sys.argv[1], int(sys.argv[2]))
