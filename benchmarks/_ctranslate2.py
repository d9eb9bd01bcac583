"""The baseline of CTranslate2: Whisper base from the zoo's own package, in a process of its own.

Needs ``pip install --no-deps ctranslate2==4.8.5``; ``OFFRAMP_PEERS_PYTHON`` names another Python that has it.
"""

from __future__ import annotations

import importlib
import shutil
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).parent.parent))  # a worker is started by this file's path, anywhere
from benchmarks._workers import Worker, python, serve

DIRECTORY = Path("build/benchmarks/ctranslate2-whisper-base")
PACKAGE = "ctranslate2"


def ctranslate2(path: Path, threads: int, compute: str = "int8") -> Worker:
    """A worker on a directory of CTranslate2's converter, its weights as ``compute`` says."""
    found = python(PACKAGE)
    if found is None:
        raise SystemExit("pip install --no-deps ctranslate2==4.8.5, or OFFRAMP_PEERS_PYTHON=a Python that has it")
    return Worker(found, "-P", __file__, str(path), str(threads), compute)


def whisper_base() -> Path:
    """The zoo's Whisper base as CTranslate2 reads it: the package's files, the halves of its weights joined."""
    if (DIRECTORY / "model.bin").exists():
        return DIRECTORY
    from offramp.zoo.whisper_base import WEIGHTS

    DIRECTORY.mkdir(parents=True, exist_ok=True)
    for name in ("config.json", "tokenizer.json", "vocabulary.txt"):
        shutil.copyfile(WEIGHTS.file("data/config.json").with_name(name), DIRECTORY / name)
    halves = [WEIGHTS.file(f"data/model.bin.part{part}").read_bytes() for part in (1, 2)]
    (DIRECTORY / "model.bin").write_bytes(b"".join(halves))
    return DIRECTORY


def _serve(path: str, threads: int, compute: str) -> None:
    engine: Any = importlib.import_module(PACKAGE)  # which has no type information
    model = engine.models.Whisper(path, device="cpu", compute_type=compute, intra_threads=threads, inter_threads=1)

    def decode(prompt: list[int], new: int | None, features: str | None) -> tuple[list[int], list[float]]:
        assert new is None, "it generates until the end of what it hears"
        assert features is not None
        heard = np.load(features)
        times = [time.perf_counter()]
        states = model.encode(engine.StorageView.from_array(heard))
        times.append(time.perf_counter())
        (found,) = model.generate(states, [prompt], beam_size=1)
        times.append(time.perf_counter())
        return found.sequences_ids[0], times

    serve({"version": engine.__version__, "compute": model.compute_type}, decode)


if __name__ == "__main__":
    _serve(sys.argv[1], int(sys.argv[2]), sys.argv[3])
