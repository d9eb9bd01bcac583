"""What does a chain cost when it decodes? Full depth by segments, against one session and onnxruntime-genai (fp32)."""

from __future__ import annotations

import contextlib
import statistics
from pathlib import Path

import numpy as np

import offramp
from benchmarks import _chains, _genai
from benchmarks._common import BUILD, report
from benchmarks._workers import Answer, Worker
from offramp import zoo
from offramp.runtime.cores import physical_cores

SEGMENTS = (1, 2, 6, 30)
CONTEXTS = (64, 512, 2048)
NEW, ROUNDS = 48, 5


def bundles() -> dict[int, Path]:
    """SmolLM2 with caches, cut into each number of segments; the first with the single session beside it."""
    paths = {count: BUILD / f"smollm2-{count}.offramp" for count in SEGMENTS}
    if all((path / "manifest.json").exists() for path in paths.values()):
        return paths
    program = offramp.apply(offramp.capture(*zoo.load("smollm2")), "insert-cache")
    for count, path in paths.items():
        offramp.save(program, path, segments=count)
    _chains.write_single(program, paths[1])
    return paths


def main() -> None:
    """Print one table: ratios are medians of rounds in which all took turns."""
    paths = bundles()
    baseline = _genai.smollm2()
    random = np.random.default_rng(0)
    rows = []
    for context in CONTEXTS:
        prompt = random.integers(1000, 20000, context).tolist()
        with contextlib.ExitStack() as opened:
            workers: dict[str, Worker] = {"genai": opened.enter_context(_genai.genai(baseline, physical_cores()))}
            workers["one session"] = opened.enter_context(_chains.chain(paths[1], single=True))
            workers |= {str(count): opened.enter_context(_chains.chain(path)) for count, path in paths.items()}
            found: dict[str, list[Answer]] = {name: [] for name in workers}
            for _ in range(ROUNDS + 1):
                for name, worker in workers.items():
                    found[name].append(worker.decode(prompt, NEW))
        texts = {tuple(answer.tokens) for answers in found.values() for answer in answers}
        for name, answers in found.items():
            rows.append(_row(context, name, answers[1:], found, same=len(texts) == 1))
    report("decoding", "SmolLM2-135M fp32, one stream, full depth, by segments", rows)


def _row(
    context: int, name: str, answers: list[Answer], found: dict[str, list[Answer]], *, same: bool
) -> dict[str, object]:
    def ratio(other: str, field: str = "decode_ms") -> float:
        pairs = zip(answers, found[other][1:], strict=True)
        return statistics.median(getattr(a, field) / getattr(b, field) for a, b in pairs)

    decode = statistics.median(answer.decode_ms for answer in answers)
    return {
        "context": context,
        "way": name,
        "ms a token": decode,
        "tokens/s": 1e3 / decode,
        "of one session": round(ratio("one session"), 3),
        "tokens/s of genai": round(1 / ratio("genai"), 3),
        "prefill ms": statistics.median(answer.prefill_ms for answer in answers),
        "peak MiB": max(answer.peak_mb for answer in answers),
        "same tokens": str(same),
    }


if __name__ == "__main__":
    main()
