"""Do early exits pay in Whisper? 32 recordings: words and tokens that differ, and time, for each policy in one row.

The adapters come from ``examples/train_speech_adapters.py``, which heard synthetic speech only. Encoder and decoder are
bundles of their own, so that all ways decode what was encoded once. "decoder ms" are all steps of a recording; "clip"
is the encoder, what the decoder makes of its states, and the steps. Ratios compare with full depth on the same
recording in the same turn. A perfect gate leaves where the exit says what full depth would: it has seen the answers.
"""

from __future__ import annotations

import argparse
import csv
import statistics
import time
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer
from transformers.models.whisper.english_normalizer import EnglishTextNormalizer

import offramp
from benchmarks import _chains
from benchmarks._common import BUILD, Known, Row, data, report, rounds, say, shown, spread, steps
from examples import train_speech_adapters as recipe
from offramp import zoo
from offramp.bundle.manifest import Exit
from offramp.bundle.measures import PICK, SCREENED
from offramp.runtime.policies.base import Rows
from offramp.runtime.policies.builtin import Verify
from offramp.runtime.preprocess.audio import log_mel, read_wav, resample
from offramp.training.weights import load_weights

MODEL = "whisper_base"
FULL = "full depth"
AT = 0.9
BLOCKS = 6
SHORT, CANDIDATES = "top1-short", {"end": 10000, "short": 4096}


class Clip(NamedTuple):
    """A recording: its features [1, 80, 3000], and what is said in it where that is known."""

    name: str
    features: NDArray[np.float32]
    said: str | None


class Heard(NamedTuple):
    """A recording's encoder states [1, 1500, 512], and the milliseconds that they took."""

    memory: NDArray[np.float32]
    ms: float


class Way(NamedTuple):
    """A way to decode: the decoder's bundle, who decides, and ``propagate``."""

    chain: offramp.Chain
    policy: offramp.Policy
    propagate: str = "defer"


@dataclass(frozen=True)
class Run:
    """What decoding one recording gave: milliseconds of the decoder and of all, tokens, and the exit of each."""

    tokens: list[int]
    exits: list[int]
    decoder_ms: float
    clip_ms: float


class Watch(offramp.Policy):
    """The whole head for all, and what each exit would have picked: ``seen[step][after]``."""

    def __init__(self) -> None:
        self.seen: dict[int, dict[int, int]] = defaultdict(dict)

    def measures(self, stack: str, exit_: Exit) -> tuple[str, ...] | None:
        return (PICK,) if stack == "decoder" else None

    def leave(self, state: offramp.State) -> Rows:
        assert state.steps is not None
        self.seen[int(state.steps[0])][state.after] = int(state.scores[PICK][0])
        return np.zeros(state.rows.size, np.bool_)


def distance(found: Sequence[Any], wanted: Sequence[Any]) -> int:
    """The fewest insertions, deletions and substitutions that make one of the other (Levenshtein)."""
    row = list(range(len(wanted) + 1))
    for at, one in enumerate(found, 1):
        before, row = row, [at]
        for column, other in enumerate(wanted, 1):
            row.append(min(row[-1] + 1, before[column] + 1, before[column - 1] + (one != other)))
    return row[-1]


def word_errors(found: str, said: str) -> tuple[int, int]:
    """Wrong words, and how many were said; case, punctuation and ways to write numbers do not count."""
    normal = EnglishTextNormalizer({})
    words = normal(said).split()
    return distance(normal(found).split(), words), len(words)


def clips() -> list[Clip]:
    """All recordings, the transcribed ones first."""
    folder = data("ljspeech")
    with (folder / "metadata8.csv").open(newline="") as stream:
        said = {row[0]: row[-1] for row in csv.reader(stream, delimiter="|", quoting=csv.QUOTE_NONE)}
    found = []
    for path in sorted(folder.glob("*.wav")):
        samples, rate = read_wav(path)
        found.append(Clip(path.stem, log_mel(resample(samples, rate, 16000)), said.get(path.stem)))
    return sorted(found, key=lambda clip: clip.said is None)


def bundles() -> dict[str, Path]:
    """The encoder; the decoder plain (and in one session), screened, with a short list at its end, with exits, cut."""
    if not recipe.WEIGHTS.is_file():
        raise SystemExit(f"no {recipe.WEIGHTS.name}\n  try: {recipe.COMMAND}")
    names = ("encoder", "plain", "screened", "end", "short", *map(cut, recipe.EXITS))
    paths = {name: BUILD / f"speech-{name.replace(' ', '-')}.offramp" for name in names}
    how: dict[str, Any] = {"generation": zoo.generation(MODEL), "files": zoo.tokenizer_files(MODEL), "segments": 1}
    if not (paths["encoder"] / "manifest.json").exists():
        say("exporting the encoder")
        module, example = zoo.load(MODEL)
        listener = recipe.Listener(module.whisper)
        features = {"input_features": example["input_features"]}
        offramp.save(offramp.capture(listener, features), paths["encoder"], segments=1)
    if not (paths["plain"] / "single" / _chains.SINGLE).exists():
        say("exporting the decoder, plain")
        program = recipe.program("insert-cache")
        offramp.save(program, paths["plain"], **how)
        _chains.write_single(program, paths["plain"])
    if not (paths["screened"] / "manifest.json").exists():
        say("exporting the decoder, screened")
        scores = offramp.InsertScores("decoder", SCREENED)
        offramp.save(offramp.apply(recipe.program(""), [scores, offramp.InsertCache()]), paths["screened"], **how)
    for name, exits in (("end", ()), ("short", recipe.EXITS)):
        trained = recipe.WEIGHTS.stat().st_mtime
        if not (paths[name] / "manifest.json").exists() or paths[name].stat().st_mtime < trained:
            say(f"exporting the decoder, {name}")
            program = recipe.program(recipe.pipeline(*exits) if exits else "")
            if exits:
                load_weights(program, recipe.WEIGHTS)
            few = recipe.common(CANDIDATES[name])
            scores = offramp.InsertScores(measure=(SHORT, PICK), after=(*exits, BLOCKS), ids=few)
            offramp.save(offramp.apply(program, [scores, offramp.InsertCache()]), paths[name], **how)
    for after in recipe.EXITS:
        path = paths[cut(after)]
        if not (path / "manifest.json").exists() or path.stat().st_mtime < recipe.WEIGHTS.stat().st_mtime:
            say(f"exporting the decoder, {cut(after)}")
            program = recipe.program(recipe.pipeline(after))
            load_weights(program, recipe.WEIGHTS, part=True)
            passes = [offramp.Truncate("decoder", after), offramp.InsertCache()]
            offramp.save(offramp.apply(program, passes), path, **how)
    return paths


def cut(after: int) -> str:
    """What the decoder without its deeper blocks is called."""
    return f"truncated to {after}"


def listened(encoder: offramp.Chain, clip: Clip) -> Heard:
    """The encoder's part."""
    started = time.perf_counter()
    memory = encoder.run({"input_features": clip.features}).outputs["memory"]
    return Heard(memory, (time.perf_counter() - started) * 1e3)


def decoded(heard: Heard, way: Way) -> Run:
    """One recording, greedy."""
    started = time.perf_counter()
    steps = list(way.chain.stream({"memory": heard.memory}, way.policy, propagate=way.propagate))
    spent = (time.perf_counter() - started) * 1e3
    return Run([s.token for s in steps], [s.exit for s in steps], sum(s.milliseconds for s in steps), heard.ms + spent)


def perfect(short: offramp.Chain, heard: Heard) -> dict[str, Way]:
    """Gates that leave at the first of some exits that says what full depth says, given full depth's text."""
    watch, found = Watch(), {}
    tokens = decoded(heard, Way(short, watch)).tokens
    for some in sets():
        right = [next((e for e in some if watch.seen[i].get(e) == token), None) for i, token in enumerate(tokens)]
        found[f"a perfect gate after {listed(some)}"] = Way(short, Known(right))
    return found


def sets() -> list[tuple[int, ...]]:
    """Each exit together with the short list at full depth, and all."""
    return [*((after, BLOCKS) for after in recipe.EXITS), (*recipe.EXITS, BLOCKS)]


def listed(exits: Sequence[int]) -> str:
    return " and ".join(map(str, exits))


def ways(
    plain: offramp.Chain, screened: offramp.Chain, end: offramp.Chain, short: offramp.Chain, *truncated: offramp.Chain
) -> dict[str, Way]:
    """Every way but perfect gates and the single session; ``truncated`` are what each exit would be without gates."""
    found = {FULL: Way(plain, offramp.Never()), "full depth, screened head": Way(screened, offramp.Never())}
    found["full depth, exits unused"] = Way(short, offramp.Never())
    for at in (0.8, 0.85, AT):
        found[f"short list >= {at} after {BLOCKS}"] = Way(
            end, offramp.Confidence(measure=SHORT, thresholds={BLOCKS: at})
        )
    for some in sets():
        cheap = offramp.Confidence(measure=SHORT, thresholds=dict.fromkeys(some, AT))
        found[f"short list >= {AT} after {listed(some)}"] = Way(short, cheap)
    for after, chain in zip(recipe.EXITS, truncated, strict=True):
        found[cut(after)] = Way(chain, offramp.Never())
        found[f"verify after {after}"] = Way(short, Verify(after, threshold=0.5, measure=SHORT))
        found[f"always after {after}"] = Way(short, offramp.Depth({"decoder": after}))
    return found


def row(name: str, recordings: Sequence[Clip], texts: Sequence[str], runs: Sequence[Run], full: Sequence[Run]) -> Row:
    """What one way did, against full depth in the same turns."""
    pairs = list(zip(recordings, texts, runs, full, strict=True))
    errors = [word_errors(text, clip.said) for clip, text, _, _ in pairs if clip.said is not None]
    others = [(run.tokens, whole.tokens) for clip, _, run, whole in pairs if clip.said is None]
    wrong = sum(distance(tokens, wanted) for tokens, wanted in others)
    depths = [exit_ for run in runs for exit_ in run.exits]
    return {
        "way": name,
        "WER of 8": round(sum(wrong for wrong, _ in errors) / sum(words for _, words in errors), 4),
        "tokens as full, of 24": round(1 - wrong / max(1, sum(len(wanted) for _, wanted in others)), 4),
        "same texts, of 32": sum(run.tokens == whole.tokens for run, whole in zip(runs, full, strict=True)),
        "mean blocks": round(statistics.mean(depths), 2),
        "decoder ms": statistics.median(run.decoder_ms for run in runs),
        "of full": round(statistics.median(a.decoder_ms / b.decoder_ms for a, b in zip(runs, full, strict=True)), 3),
        "clip ms": statistics.median(run.clip_ms for run in runs),
        "clip of full": round(statistics.median(a.clip_ms / b.clip_ms for a, b in zip(runs, full, strict=True)), 3),
    }


def main() -> None:
    """Print one table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--clips", type=int, help="how many recordings (32)")
    rounds(parser)
    args = parser.parse_args()
    recordings = clips()[: args.clips]
    paths = bundles()
    encoder, *decoders = (offramp.load(path) for path in paths.values())
    short = decoders[3]
    words = Tokenizer.from_file(str(paths["plain"] / "tokenizer.json"))
    every = ways(*decoders)
    for way in every.values():
        decoded(listened(encoder, recordings[0]), way)  # warms up
    measured = []
    for number in range(args.rounds):
        runs = measure(recordings, encoder, every, short, paths["plain"], f"round {number + 1} of {args.rounds}")
        rows = []
        for name, found in runs.items():
            texts = [words.decode(run.tokens) for run in found]
            rows.append(shown(row(name, recordings, texts, found, runs[FULL])))
        measured.append(rows)
    report("speech", f"Whisper base, greedy, fp32, {len(recordings)} LJSpeech recordings", spread(measured))


def measure(
    recordings: Sequence[Clip],
    encoder: offramp.Chain,
    every: dict[str, Way],
    short: offramp.Chain,
    plain: Path,
    what: str,
) -> dict[str, list[Run]]:
    """Every way on every recording, in turns, and one session with the file beside the bundle ``plain``."""
    runs: dict[str, list[Run]] = {}
    with _chains.chain(plain, single=True) as worker:
        for clip in steps(recordings, what):
            heard = listened(encoder, clip)
            for name, way in (every | perfect(short, heard)).items():
                runs.setdefault(name, []).append(decoded(heard, way))
            full = runs[FULL][-1]
            states = BUILD / "speech.npy"
            np.save(states, heard.memory)
            alone = worker.decode(zoo.generation(MODEL)["prompt"], len(full.tokens), states)
            later = alone.mean_ms * (len(full.tokens) - 1)
            one = Run(full.tokens, full.exits, later + alone.mean_ms, heard.ms + alone.prefill_ms + later)
            runs.setdefault("full depth, one session", []).append(one)
    return runs


if __name__ == "__main__":
    main()
