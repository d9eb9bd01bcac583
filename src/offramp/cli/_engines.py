"""Engines that generate, as they run in a process of their own: one is loaded, then asked again and again.

Each answer is the tokens, the milliseconds until the first (None where the engine does not tell) and until the last.
"""

from __future__ import annotations

import importlib
import json
from pathlib import Path
from time import perf_counter
from typing import Any, NamedTuple


class Made(NamedTuple):
    """The tokens of a run, and the milliseconds until the first and until the last."""

    tokens: list[int]
    first: float | None
    total: float


class Genai:
    """A directory that the builder of onnxruntime-genai wrote."""

    def __init__(self, path: str, threads: int) -> None:
        self._library: Any = importlib.import_module("onnxruntime_genai")
        about = json.loads((Path(path) / "genai_config.json").read_text())["model"]
        config = self._library.Config(path)
        # some token has to end a run; nothing is banned, which would cost time
        ends = {"eos_token_id": about["vocab_size"] - 1}
        session = {"decoder": {"session_options": {"intra_op_num_threads": threads}}}
        config.overlay(json.dumps({"model": {**ends, **session}}))
        self._model = self._library.Model(config)

    def __call__(self, prompt: list[int], others: list[Any], new: int) -> Made:
        """``new`` tokens after a prompt, greedily."""
        if others:
            raise ValueError("it takes token ids alone")
        options = self._library.GeneratorParams(self._model)
        options.set_search_options(do_sample=False, max_length=len(prompt) + new)
        started, first = perf_counter(), None
        generator = self._library.Generator(self._model, options)
        generator.append_tokens([prompt])
        while not generator.is_done():
            generator.generate_next_token()
            first = first or (perf_counter() - started) * 1e3
        total = (perf_counter() - started) * 1e3
        return Made([int(token) for token in generator.get_sequence(0)[len(prompt) :]], first, total)


class Ctranslate2:
    """A directory that CTranslate2's converter made of a Whisper."""

    def __init__(self, path: str, threads: int) -> None:
        self._library: Any = importlib.import_module("ctranslate2")
        self._model = self._library.models.Whisper(path, device="cpu", intra_threads=threads)

    def __call__(self, prompt: list[int], others: list[Any], new: int) -> Made:
        """What is said, greedily, to its end."""
        if len(others) != 1 or others[0].ndim != 3:
            raise ValueError("a Whisper takes features [1, mels, frames] beside token ids")
        started = perf_counter()
        (found,) = self._model.generate(self._library.StorageView.from_array(others[0]), [prompt], beam_size=1)
        return Made(list(found.sequences_ids[0]), None, (perf_counter() - started) * 1e3)


ENGINES = {"genai": Genai, "ctranslate2": Ctranslate2}
_loaded: Any = None


def load(engine: str, path: str, threads: int) -> None:
    """Load this process's engine."""
    global _loaded
    _loaded = ENGINES[engine](path, threads)


def generate(prompt: list[int], others: list[Any], new: int) -> Made:
    """What it generates after a prompt and the model's other inputs."""
    made: Made = _loaded(prompt, others, new)
    return made
