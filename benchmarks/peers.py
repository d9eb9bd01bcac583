"""Is a bundle faster than what one would pick instead? Same weights, precision and threads, quality in the same row.

    python -m benchmarks.peers [language] [speech] [sentiment] [translation] [--turns N]

Bundle and peer take turns. An item (a prompt, a clip, a batch, a sentence) takes the median of its turns, and "times as
fast" compares the sums over items. Engines that are not installed are named and left out;
``OFFRAMP_PEERS_PYTHON`` names a Python that has them.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import math
import shutil
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np
import onnxruntime as ort
import sacrebleu
from tokenizers import Tokenizer

import offramp
from benchmarks import _chains, _ctranslate2, _genai, _one_session, _translate, sentiment, speech
from benchmarks._common import BUILD, Row, report, rounded_by, say, steps
from benchmarks._peers import Took, installed, row, saved, turns
from benchmarks._translate import Way
from benchmarks._workers import Answer, Worker
from benchmarks.translation import choose, deed, free
from examples.train_language_adapters import text
from examples.translation.train import lines
from offramp import zoo
from offramp.runtime.engine.cores import physical_cores
from offramp.runtime.engine.sessions import session_options
from offramp.zoo.translator import BEGIN

CONTEXTS, NEW = (64, 1024), 128
TEXTS, LENGTH = 24, 512  # of WikiText-2, for perplexity
SENTENCES = 300  # to translate
KEEP = 0.99  # of full depth's accuracy or BLEU on the validation set
PAUSE = 0.3  # seconds
SCREENED = "insert-scores{stack=decoder,measure=prediction-screened},insert-cache"
QUANTIZED = "one session, quantize_dynamic"
VALIDATION = 400  # sentences that choose the translator's exits


def language(count: int) -> Iterator[Row]:
    """SmolLM2-135M: the first ``CONTEXTS`` tokens of WikiText-2's test text, and `NEW` more."""
    if not installed(_genai.PACKAGE):
        return
    files = zoo.tokenizer_files("smollm2")
    ids = Tokenizer.from_file(str(files[0])).encode(text("test")[:120_000]).ids
    program = functools.cache(lambda: offramp.apply(offramp.capture(*zoo.load("smollm2")), SCREENED))
    for precision in ("int4", "fp32"):
        options = {"segments": 1, "generation": zoo.generation("smollm2"), "files": files}
        options |= {"samples": rounded_by(precision)}
        path = saved("smollm2", precision, program, **options)
        ways = [
            functools.partial(_chains.chain, path),
            functools.partial(_genai.genai, _genai.smollm2(precision), physical_cores()),
        ]
        firsts = turns(count, *(functools.partial(_first, way, ids[: CONTEXTS[0]]) for way in ways), pause=PAUSE)
        with contextlib.ExitStack() as opened:
            own, other = (opened.enter_context(way()) for way in ways)
            say(f"perplexity of {TEXTS} texts of {LENGTH} tokens, {precision}")
            quality = " / ".join(f"{_perplexity(worker, ids):.2f}" for worker in (own, other))
            peer, told = f"onnxruntime-genai {other.loaded['version']}", f"perplexity {quality}"
            first = ([statistics.median(firsts[0])], [statistics.median(firsts[1])])
            yield row("SmolLM2, from the process to its first token", precision, peer, "ms", first, told)
            for context in CONTEXTS:
                ours, theirs = turns(count, *_decoding((own, other), ids[:context]), pause=PAUSE)
                prompt = ([_median(ours, "prefill_ms")], [_median(theirs, "prefill_ms")])
                token = ([_median(ours, "mean_ms")], [_median(theirs, "mean_ms")])
                yield row(f"SmolLM2, prompt of {context}", precision, peer, "ms", prompt, told)
                yield row(f"SmolLM2, {NEW} after {context}", precision, peer, "tokens/s", token, told)


def _first(way: Callable[[], Worker], prompt: Sequence[int]) -> float:
    """Milliseconds from the start of a process to the first token."""
    started = perf_counter()
    with way() as worker:
        worker.decode(prompt, 1)
        return (perf_counter() - started) * 1e3


def _perplexity(worker: Worker, ids: Sequence[int]) -> float:
    texts = [ids[start : start + LENGTH] for start in range(0, TEXTS * LENGTH, LENGTH)]
    return math.exp(statistics.mean(worker.loss(each) for each in texts))


def _median(answers: Sequence[Answer], what: str) -> float:
    return float(statistics.median(getattr(answer, what) for answer in answers))


def _decoding(workers: Sequence[Worker], prompt: Sequence[int]) -> list[Callable[[], Answer]]:
    return [functools.partial(worker.decode, prompt, NEW) for worker in workers]


def whisper(count: int) -> Iterator[Row]:
    """Whisper base: the LJSpeech clips that have transcripts, encoder and decoder, greedy, to the end of the text."""
    if not installed(_ctranslate2.PACKAGE):
        return
    files, generation = zoo.tokenizer_files("whisper_base"), zoo.generation("whisper_base")
    path = saved(
        "whisper",
        "int8",
        lambda: offramp.apply(offramp.capture(*zoo.load("whisper_base")), SCREENED),
        segments=1,
        generation=generation,
        files=files,
    )
    words, errors = Tokenizer.from_file(str(files[0])), [[0, 0], [0, 0]]
    times: tuple[list[float], list[float]] = ([], [])
    with contextlib.ExitStack() as opened:
        own = opened.enter_context(_chains.chain(path))
        other = opened.enter_context(_ctranslate2.ctranslate2(_ctranslate2.whisper_base(), physical_cores()))
        for clip in steps([clip for clip in speech.clips() if clip.said is not None], "clips"):
            heard = BUILD / "peers-clip.npy"
            np.save(heard, clip.features)
            runs = [functools.partial(worker.decode, generation["prompt"], None, heard) for worker in (own, other)]
            for k, answers in enumerate(turns(count, *runs, pause=PAUSE)):
                times[k].append(statistics.median(answer.total_ms for answer in answers))
                wrong, said = speech.word_errors(words.decode(answers[0].tokens), str(clip.said))
                errors[k] = [errors[k][0] + wrong, errors[k][1] + said]
        quality = " / ".join(f"{wrong / said:.3f}" for wrong, said in errors)
        peer = f"CTranslate2 {other.loaded['version']}"
        yield row("Whisper base, a clip", "int8", peer, "ms", times, f"WER {quality}")


def classified(count: int) -> Iterator[Row]:
    """MiniLM on SST-2's test sentences, at full depth and with exits that were calibrated on dev."""
    path = BUILD / "peers-minilm" / "int8.onnx"
    if not path.exists():  # the quantizer opens a session of its own, which the chain's threads would not allow
        _one_session.quantized(_one_session.exported(*zoo.load("minilm"), path.with_name("fp32.onnx")), path)
    chain = offramp.load(sentiment.bundle("int8"))
    session = ort.InferenceSession(path, session_options())
    policies = {"full depth": offramp.Never(), f"calibrated, keep={KEEP}": sentiment.calibrated(chain, KEEP)}
    ways: dict[str, Callable[[Mapping[str, Any]], Any]] = {"peer": lambda batch: session.run(None, dict(batch))[0]}
    ways |= {name: functools.partial(_logits, chain, policy) for name, policy in policies.items()}
    for size in sentiment.BATCHES:
        batches, labels = sentiment.batches(size)
        times: dict[str, list[float]] = {name: [] for name in ways}
        right = dict.fromkeys(ways, 0)
        for number, batch in enumerate(steps(batches, f"batches of {size}")):
            truth = labels[number * size :][:size]
            found = turns(count, *(functools.partial(_answered, way, batch) for way in ways.values()))
            for name, answers in zip(ways, found, strict=True):
                times[name].append(statistics.median(ms for _, ms in answers) / len(truth))
                right[name] += int((answers[0][0] == truth).sum())
        for name in policies:
            quality = f"accuracy {right[name] / len(labels):.4f} / {right['peer'] / len(labels):.4f}"
            task = f"MiniLM, a sentence of {size}, {name}"
            yield row(task, "int8", QUANTIZED, "ms", (times[name], times["peer"]), quality)


def _logits(chain: offramp.Chain, policy: offramp.Policy, batch: Mapping[str, Any]) -> Any:
    return chain.run(batch, policy).outputs["logits"]


def _answered(way: Callable[[Mapping[str, Any]], Any], batch: Mapping[str, Any]) -> tuple[Any, float]:
    """The likelier class of each row, and the milliseconds."""
    started = perf_counter()
    logits = way(batch)
    return logits.argmax(-1), (perf_counter() - started) * 1e3


def translation(count: int) -> Iterator[Row]:
    """The translator on Multi30k at full depth and with exits, against the same encoder and one decoder session."""
    _translate.on_one_core()
    split = "test_2016_flickr"
    sources, said = _translate.sources(split, SENTENCES), lines(f"{split}.en")[:SENTENCES]
    for precision in ("fp32", "int8"):
        full = Way("full depth", _translate.bundle(head="whole", precision=precision))
        early = [choose(functools.partial(made, precision), full, VALIDATION).get(KEEP) for made in (deed, free)]
        ways = {
            way.name: (way.chain, way.policy(0))
            for way in (full, *early)
            if way and isinstance(way.chain, offramp.Chain)
        }
        with _chains.chain(_with_single(precision), single=True) as worker:
            peer = functools.partial(_by_worker, worker)
            runs = {"peer": peer} | {name: functools.partial(_by_chain, *way) for name, way in ways.items()}
            times: dict[str, list[float]] = {name: [] for name in runs}
            texts: dict[str, list[str]] = {name: [] for name in runs}
            for source in steps(sources, f"sentences, {precision}"):
                inputs = {"input_ids": np.array([source]), "attention_mask": np.ones((1, len(source)), np.int64)}
                found = turns(count, *(functools.partial(run, inputs) for run in runs.values()))
                for name, answers in zip(runs, found, strict=True):
                    times[name].append(statistics.median(answer.total_ms for answer in answers))
                    texts[name].append(_translate.spoken(answers[0].tokens))
        bleu = {name: float(sacrebleu.corpus_bleu(hypotheses, [said]).score) for name, hypotheses in texts.items()}
        for name in ways:
            quality = f"BLEU {bleu[name]:.1f} / {bleu['peer']:.1f}"
            kind = "one session" if precision == "fp32" else QUANTIZED
            yield row(f"translator, a sentence, {name}", precision, kind, "ms", (times[name], times["peer"]), quality)


def _with_single(precision: str) -> Path:
    """The translator's bundle with its decoder in one file beside it, quantized where it is to be."""
    plain, path = (_translate.saved(head="whole", precision=encoding) for encoding in ("fp32", precision))
    folders = [bundle / _chains.SINGLE_FOLDER for bundle in (plain, path)]
    if not (folders[0] / _chains.SINGLE).exists():
        _chains.write_single(_translate.program(), plain)
    if not (folders[1] / _chains.SINGLE).exists():
        _one_session.quantized(folders[0] / "single.onnx", folders[1] / "single.onnx")
        shutil.copyfile(folders[0] / _chains.SINGLE, folders[1] / _chains.SINGLE)
    return path


def _by_worker(worker: Worker, inputs: Mapping[str, Any]) -> Took:
    heard = BUILD / "peers-sentence.npz"
    np.savez(heard, **inputs)
    answer = worker.decode([BEGIN], None, heard)
    return Took(answer.tokens, answer.total_ms)


def _by_chain(chain: offramp.Chain, policy: offramp.Policy, inputs: Mapping[str, Any]) -> Took:
    started = perf_counter()
    tokens = [step.token for step in chain.stream(inputs, policy)]
    return Took(tokens, (perf_counter() - started) * 1e3)


TASKS = {"language": language, "speech": whisper, "sentiment": classified, "translation": translation}


def main() -> None:
    """Print one table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("tasks", nargs="*", help=f"of {', '.join(TASKS)} (all)")
    parser.add_argument("--turns", metavar="N", type=int, default=5, help="of bundle and peer (5)")
    args = parser.parse_args()
    rows = [found for name in args.tasks or TASKS for found in TASKS[name](args.turns)]
    if rows:
        report("peers", f"bundle and peer, {physical_cores()} threads", rows)


if __name__ == "__main__":
    main()
