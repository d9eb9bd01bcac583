"""What do fewer bits give and cost? SmolLM2, Whisper base and MiniLM in fp32, int8, int4 and auto: size, time, answers.

SmolLM2 (six segments) is asked for each token of 2,048 of WikiText-2, in pieces of 256; Whisper base (three) writes
down the eight recordings whose words are known; MiniLM judges the 872 sentences of SST-2's test set. All precisions
take turns, those that generate each in a process of its own.
"""

from __future__ import annotations

import argparse
import contextlib
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import Tokenizer

import offramp
from benchmarks import _chains
from benchmarks._common import BUILD, Row, alternate, data, report, rounded_by, rounds, say, shown, spread, steps
from benchmarks.sentiment import batches
from benchmarks.speech import Clip, clips, word_errors
from offramp import zoo

PRECISIONS = ("fp32", "int8", "int4", "auto")
PIECES = {"smollm2": 6, "whisper_base": 3, "minilm": 3}
PROMPT, NEW, TURNS = 256, 32, 5
LOSS = 1.0  # what is lost is what is measured here; of "auto" it is the default


def bundles(name: str) -> dict[str, Path]:
    """A bundle in each precision."""
    paths = {precision: BUILD / f"precision-{name}-{precision}.offramp" for precision in PRECISIONS}
    if all((path / "manifest.json").exists() for path in paths.values()):
        return paths
    program = offramp.capture(*zoo.load(name))
    program = program if name == "minilm" else offramp.apply(program, "insert-cache")
    generation = None if name == "minilm" else zoo.generation(name)
    for precision, path in paths.items():
        say(f"exporting {name} in {precision}")
        loss = None if precision == "auto" else LOSS
        options: dict[str, Any] = {"segments": PIECES[name], "generation": generation}
        rounded = transcribed if (name, precision) == ("whisper_base", "int4") else rounded_by(precision, name)
        offramp.save(program, path, precision, samples=rounded, loss=loss, **options)
    return paths


def transcribed(chain: offramp.Chain, _: Path) -> list[dict[str, Any]]:
    """The recordings whose words are not known, with what Whisper base hears in them."""
    prompt = chain.manifest.generation.prompt
    samples = []
    for clip in clips():
        if not clip.said:
            made = chain.generate({"input_features": clip.features}, offramp.Never(), max_new_tokens=100)
            ids = np.array([[*prompt, *made.tokens[0]]])
            samples.append({"input_features": clip.features, "decoder_input_ids": ids})
    return samples


def size(path: Path) -> int:
    """Bytes of a bundle."""
    return sum(file.stat().st_size for file in path.iterdir())


def perplexity(path: Path) -> tuple[str, list[int]]:
    """Of WikiText-2's beginning, and the likeliest token at each place."""
    chain = offramp.load(path)
    words = Tokenizer.from_file(str(zoo.tokenizer_files("smollm2")[0]))
    ids = np.array(words.encode((data("wikitext2") / "test.txt").read_text()[:20000]).ids[: 8 * PROMPT])
    losses, likeliest = [], list[int]()
    for piece in steps(list(ids.reshape(-1, 1, PROMPT)), f"{path.name}: text"):
        logits = chain.run({"input_ids": piece}, offramp.Never()).outputs["logits"][0].astype(np.float64)
        logits -= logits.max(-1, keepdims=True)
        scores = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
        losses.append(-scores[np.arange(PROMPT - 1), piece[0, 1:]].mean())
        likeliest += logits.argmax(-1).tolist()
    return f"perplexity {np.exp(np.mean(losses)):.2f}", likeliest


def heard(path: Path, said: Sequence[Clip]) -> tuple[str, list[Any]]:
    """The words that are wrong, of recordings whose words are known, and the texts."""
    chain, texts, wrong, count = offramp.load(path), list[Any](), 0, 0
    words = Tokenizer.from_file(str(zoo.tokenizer_files("whisper_base")[0]))
    for clip in steps(said, f"{path.name}: recordings"):
        made = chain.generate({"input_features": clip.features}, offramp.Never(), max_new_tokens=100)
        texts.append(tuple(made.tokens[0].tolist()))
        errors = word_errors(words.decode(texts[-1]), clip.said or "")
        wrong, count = wrong + errors[0], count + errors[1]
    return f"WER {wrong / count:.3f}", texts


def judged(path: Path) -> tuple[str, list[int]]:
    """Accuracy on SST-2's test set, and the answers."""
    chain = offramp.load(path)
    found, labels = batches(1)
    answers = [int(chain.run(batch, offramp.Never()).outputs["logits"].argmax()) for batch in found]
    return f"accuracy {(np.array(answers) == labels).mean():.3f}", answers


def generators(name: str, said: Sequence[Clip]) -> list[Row]:
    """Milliseconds of a prompt and of a token, memory and answers."""
    paths = bundles(name)
    features = None
    if name == "whisper_base":
        features = BUILD / "features.npy"
        np.save(features, said[0].features)
        prompt = list(zoo.generation(name)["prompt"])
    else:
        prompt = np.random.default_rng(0).integers(1000, 20000, PROMPT).tolist()
    with contextlib.ExitStack() as opened:
        workers = {each: opened.enter_context(_chains.chain(path)) for each, path in paths.items()}
        found = {each: [worker.decode(prompt, NEW, features)] for each, worker in workers.items()}
        for _ in range(TURNS):
            for each, worker in workers.items():
                found[each].append(worker.decode(prompt, NEW, features))
    times = {
        each: {
            "first token ms": statistics.median(answer.prefill_ms for answer in answers[1:]),
            "ms a token": statistics.median(answer.decode_ms for answer in answers[1:]),
            "peak MiB": round(max(answer.peak_mb for answer in answers)),
        }
        for each, answers in found.items()
    }
    answered = {each: perplexity(path) if features is None else heard(path, said) for each, path in paths.items()}
    return _rows(name, paths, times, answered)


def classifier(name: str) -> list[Row]:
    """Milliseconds of a sentence, and answers."""
    paths = bundles(name)
    sentences, _ = batches(1)
    chains = {each: offramp.load(path) for each, path in paths.items()}

    def run(chain: offramp.Chain) -> None:
        for batch in sentences[:64]:
            chain.run(batch, offramp.Never())

    took = alternate({each: lambda chain=chain: run(chain) for each, chain in chains.items()})  # type: ignore[misc]
    times = {each: {"first token ms": ms / 64, "ms a token": "", "peak MiB": ""} for each, ms in took.items()}
    return _rows(name, paths, times, {each: judged(path) for each, path in paths.items()})


def _rows(
    name: str,
    paths: Mapping[str, Path],
    times: Mapping[str, Mapping[str, Any]],
    answered: Mapping[str, tuple[str, Sequence[Any]]],
) -> list[Row]:
    whole = answered["fp32"][1]
    same = {each: np.mean([a == b for a, b in zip(found, whole, strict=True)]) for each, (_, found) in answered.items()}
    return [
        shown(
            {
                "model": name,
                "precision": offramp.load(path).manifest.precision,
                "of fp32's bytes": round(size(path) / size(paths["fp32"]), 3),
                **times[each],
                "quality": answered[each][0],
                "same answers": round(float(same[each]), 3),
            }
        )
        for each, path in paths.items()
    ]


def main() -> None:
    """Print one table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    rounds(parser)
    args = parser.parse_args()
    said = [clip for clip in clips() if clip.said]
    runs = [
        [*generators("smollm2", said), *generators("whisper_base", said), *classifier("minilm")]
        for _ in range(args.rounds)
    ]
    report("precision", "one stream, greedy, full depth, by precision", spread(runs))


if __name__ == "__main__":
    main()
