"""What does a chain cost when it decodes? Full depth by segments, against one session and onnxruntime-genai (fp32)."""

from __future__ import annotations

import contextlib
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

import offramp
from benchmarks import _chains, _genai
from benchmarks._common import BUILD, report
from benchmarks._workers import Answer, Worker
from offramp import zoo
from offramp.runtime.engine.cores import physical_cores

NEW, ROUNDS = 48, 7


@dataclass(frozen=True)
class Case:
    """A model: its name in the zoo, pieces of its decoder, lengths of prompts (0: the model's own)."""

    name: str
    segments: tuple[int, ...]
    contexts: tuple[int, ...]


CASES = (Case("smollm2", (1, 2, 6, 30), (64, 512, 2048)), Case("whisper_base", (1, 2, 3, 6), (0,)))


def bundles(case: Case) -> dict[str, Path]:
    """A bundle for each number of segments, the first with the single session beside it, and a portable one."""
    paths = {str(count): BUILD / f"{case.name}-{count}.offramp" for count in case.segments}
    paths["portable"] = BUILD / f"{case.name}-portable.offramp"
    if all((path / "manifest.json").exists() for path in paths.values()):
        return paths
    program = offramp.apply(offramp.capture(*zoo.load(case.name)), "insert-cache")
    for name, path in paths.items():
        count = case.segments[-2] if name == "portable" else int(name)
        offramp.save(program, path, segments=count, target="portable" if name == "portable" else "ort")
    _chains.write_single(program, paths["1"])
    return paths


def main() -> None:
    """Print one table: ratios are medians of rounds in which all took turns."""
    rows = []
    for case in CASES:
        paths = bundles(case)
        baseline = _genai.smollm2() if case.name == "smollm2" else _genai.whisper_base()
        features = None
        if case.name != "smollm2":
            features = BUILD / "features.npy"
            np.save(features, np.random.default_rng(0).standard_normal((1, 80, 3000), np.float32) / 4)
        for context in case.contexts:
            random = np.random.default_rng(0)
            prompt: list[int] = random.integers(1000, 20000, context).tolist() or zoo.generation(case.name)["prompt"]
            with contextlib.ExitStack() as opened:
                workers: dict[str, Worker] = {"genai": opened.enter_context(_genai.genai(baseline, physical_cores()))}
                workers["one session"] = opened.enter_context(_chains.chain(paths["1"], single=True))
                workers |= {name: opened.enter_context(_chains.chain(path)) for name, path in paths.items()}
                found: dict[str, list[Answer]] = {name: [] for name in workers}
                for _ in range(ROUNDS + 1):  # the first warms up
                    for name, worker in workers.items():
                        found[name].append(worker.decode(prompt, NEW, features))
            rows += [_row(case.name, len(prompt), name, found) for name in workers]
    report("decoding", "one stream, fp32, greedy, full depth, by segments of the decoder", rows)


def _row(model: str, context: int, name: str, found: dict[str, list[Answer]]) -> dict[str, Any]:
    answers = found[name][1:]

    def ratio(others: Sequence[Answer]) -> float:
        return float(statistics.median(a.decode_ms / b.decode_ms for a, b in zip(answers, others[1:], strict=True)))

    decode = statistics.median(answer.decode_ms for answer in answers)
    return {
        "model": model,
        "context": context,
        "way": name,
        "ms a token": decode,
        "of one session": round(ratio(found["one session"]), 3),
        "tokens/s of genai": round(1 / ratio(found["genai"]), 3),
        "prefill ms": statistics.median(answer.prefill_ms for answer in answers),
        "peak MiB": max(answer.peak_mb for answer in answers),
        "same tokens as genai": str(answers[0].tokens == found["genai"][0].tokens),
    }


if __name__ == "__main__":
    main()
