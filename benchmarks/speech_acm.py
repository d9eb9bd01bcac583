"""Does adaptive width pay in a speech encoder? Whisper base: at the same FLOPs, words and time in one row.

The encoder's MLPs (``--sites``: or its projections, or both) learn widths from 24 recordings that nobody transcribed:
first each for itself, then gates, then all to make the states that the whole encoder makes. "static" has the same
learners, trained for as many steps, and every frame takes as many. Frames of the silence behind a clip count too: the
decoder reads them.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from tokenizers import Tokenizer
from torch import Tensor

import offramp
from benchmarks import speech
from benchmarks._common import BUILD, Row, data, report, rounds, say, shown, spread, steps
from benchmarks.speech import MODEL, Clip, Heard, clips, decoded, distance, word_errors
from examples import train_speech_adapters as recipe
from offramp import training, zoo
from offramp.cli._learners_figure import draw
from offramp.cli._learners_picture import Picture
from offramp.program import Program
from offramp.runtime.preprocess.audio import log_mel, read_wav, resample

RESULTS = Path("benchmarks/results/speech_acm")
LEAST = 0.1  # the smallest width that is trained for
SECOND = 16000  # samples
FRAMES, FEATURES, HIDDEN, GATE, LEARNERS = 1500, 512, 2048, 16, 4
SITES = {"mlp": (1, 2 * FEATURES * HIDDEN), "projections": (4, 4 * FEATURES**2)}  # of a block: how many, their FLOPs
FIGURE = "adaptive 0.3"
ADAPTIVE, STATIC = (0.75, 0.5, 0.4, 0.3, 0.25, 0.2), (0.75, 0.5, 0.25)


@dataclass
class Windows:
    """Batches of one window each of what is said, padded to 30 s; every fourth is longer than clips are."""

    sound: NDArray[np.float32]
    steps: int
    seed: int

    def __len__(self) -> int:
        return self.steps

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        random = np.random.default_rng(self.seed)
        for step in range(self.steps):
            size = int(SECOND * (random.uniform(12, 30) if step % 4 == 3 else random.uniform(3, 12)))
            start = random.integers(len(self.sound) - size)
            loudness = np.float32(random.uniform(0.5, 1.2))
            yield {"input_features": torch.from_numpy(log_mel(self.sound[start : start + size] * loudness))}


def untranscribed() -> NDArray[np.float32]:
    """All recordings without a transcript, one after another, 16 kHz."""
    names = [clip.name for clip in clips() if clip.said is None]
    heard = [read_wav(data("ljspeech") / f"{name}.wav") for name in names]
    return np.concatenate([resample(samples, rate, SECOND) for samples, rate in heard])


def captured() -> Program:
    """The encoder as a program; its example orders hidden units."""
    features = [torch.from_numpy(clip.features) for clip in clips() if clip.said is None][:2]
    return offramp.capture(recipe.Listener(zoo.load(MODEL)[0].whisper), {"input_features": torch.cat(features)})


class Students:
    """Encoders with learners, trained or read: the learners alone, then with gates, and with as many for each frame."""

    def __init__(self, folder: Path, steps: int, sites: Sequence[str]) -> None:
        self.folder, self.steps, self.sites, self.teacher = folder, steps, sites, captured()
        same = training.WidthBudget(teacher=self.teacher, output="memory", distance="mse", low=LEAST)
        self._budget = replace(same, entropy=0.0, diversity=0.0)  # a batch is one recording

    def learnt(self, name: str) -> Program:
        """ "adaptive", "static", or the "learners" that both start from."""
        passes = f"insert-acm{{sites={'|'.join(self.sites)},learners={LEARNERS}}}"
        program, path = offramp.apply(self.teacher, passes), self.weights(name)
        if not path.exists():
            if name != "learners":
                self.learnt("learners")
                training.load_weights(program, self.weights("learners"))
            say(f"training {name}")
            getattr(self, f"_{name}")(program)
            self.folder.mkdir(parents=True, exist_ok=True)
            training.save_weights(program, path)
        training.load_weights(program, path)
        return program

    def named(self, name: str) -> str:
        """With the sites before it, where they are not the MLPs."""
        return name if self.sites == ["mlp"] else f"{'-'.join(self.sites)}-{name}"

    def weights(self, name: str) -> Path:
        """The file of a student's weights."""
        return self.folder / f"{self.named(name)}.safetensors"

    def _learners(self, program: Program) -> None:
        self._fit(program, training.LearnerDistillation(self.teacher), self.steps // 3, 5e-4)

    def _adaptive(self, program: Program) -> None:
        self._fit(program, training.GateDistillation(self.teacher, low=LEAST), self.steps, 5e-3)
        self._fit(program, replace(self._budget, budget=1.0), self.steps, 5e-5)

    def _static(self, program: Program) -> None:
        gates = {id(weight) for name, weight in program.module.named_parameters() if ".gate." in name}
        self._fit(program, replace(self._budget, budget=0.0), 2 * self.steps, 5e-5, gates)

    def _fit(
        self, program: Program, what: training.Objective, steps: int, rate: float, frozen: Collection[int] = ()
    ) -> None:
        training.fit(
            program,
            Windows(untranscribed(), steps, seed=steps),
            what,
            rate=rate,
            warmup=steps // 10,
            optimizer=lambda weights: torch.optim.AdamW(
                [w for w in weights if id(w) not in frozen], rate, weight_decay=0
            ),
            precision="auto",
            progress=lambda at: say(f"step {at.step}: {', '.join(f'{k} {v:.4f}' for k, v in at.losses.items())}"),
            log_every=20,
        )


class Way(NamedTuple):
    """An encoder, the policy that it runs with, and its sites that have learners."""

    name: str
    chain: offramp.Chain
    policy: offramp.Policy | None = None
    sites: Sequence[str] = ()


@dataclass(frozen=True)
class Run:
    """What one way made of a recording: tokens, the encoder's milliseconds, and the widths that were executed.

    ``spoken`` and ``silent`` are the mean widths of frames of the recording, and of those behind its end.
    """

    tokens: list[int]
    ms: float
    width: float
    spoken: float
    silent: float


def bundle(name: str, program: Program, learners: Literal["dense", "grouped"] | None, weights: Path) -> offramp.Chain:
    """The encoder as a bundle with one segment, loaded."""
    path = BUILD / f"speech_acm.{name}-{learners}.offramp"
    path.parent.mkdir(parents=True, exist_ok=True)
    if not path.exists() or (weights.exists() and path.stat().st_mtime < weights.stat().st_mtime):
        say(f"exporting the encoder, {name}")
        offramp.save(program, path, segments=1, learners=learners)
    loaded = offramp.load(path)
    for site, item in loaded.manifest.learners.items():
        say(f"{name}, {site}: {item.form}, measured {loaded.manifest.provenance.get('learners', {}).get(site)}")
    return loaded


def ways(students: Students, learners: Literal["dense", "grouped"] | None) -> list[Way]:
    """The whole encoder first."""
    found = [Way("whole", bundle("whole", students.teacher, None, students.folder / "none"))]
    for name, widths in (("adaptive", ADAPTIVE), ("static", STATIC)):
        program = students.learnt(name)
        loaded = bundle(students.named(name), program, learners, students.weights(name))
        found += [Way(f"{name} {width}", loaded, offramp.Width(width), students.sites) for width in widths]
    return found


def writer() -> tuple[speech.Way, Tokenizer]:
    """The decoder, as it is, and its tokenizer."""
    path = BUILD / "speech_acm.decoder.offramp"
    if not (path / "manifest.json").exists():
        say("exporting the decoder")
        generation, files = zoo.generation(MODEL), zoo.tokenizer_files(MODEL)
        offramp.save(recipe.program("insert-cache"), path, segments=1, generation=generation, files=files)
    return speech.Way(offramp.load(path), offramp.Never()), Tokenizer.from_file(str(path / "tokenizer.json"))


def ran(way: Way, clip: Clip, decoder: speech.Way) -> Run:
    """One recording."""
    started = time.perf_counter()
    result = way.chain.run({"input_features": clip.features}, way.policy)
    ms = (time.perf_counter() - started) * 1e3
    tokens = decoded(Heard(result.outputs["memory"], ms), decoder).tokens
    if result.width is None:
        return Run(tokens, ms, 1.0, 1.0, 1.0)
    costs = [way.chain.manifest.learners[site].flops for site in result.learners]
    counts = np.stack([taken[0] for taken in result.learners.values()])
    taken = np.average(counts, 0, costs) / LEARNERS  # of each frame
    sounds = (clip.features != clip.features[..., -1:]).any((0, 1)).reshape(FRAMES, -1).any(-1)
    return Run(tokens, ms, result.width, float(taken[sounds].mean()), float(taken[~sounds].mean()))


def share(width: float, sites: Sequence[str]) -> float:
    """The share of the blocks' FLOPs, gates too, that is left with so much of those sites."""
    every = 2 * FRAMES * FEATURES + sum(flops for _, flops in SITES.values())
    split = sum(SITES[site][1] for site in sites)
    gates = sum(SITES[site][0] for site in sites) * (FEATURES * GATE + GATE * (LEARNERS + 1))
    return (every - split + gates + width * split) / every


def row(way: Way, recordings: Sequence[Clip], runs: Sequence[Run], whole: Sequence[Run], words: Tokenizer) -> Row:
    """What one way did, against the whole encoder in the same turns."""
    pairs = zip(recordings, runs, strict=True)
    errors = [word_errors(words.decode(run.tokens), clip.said) for clip, run in pairs if clip.said is not None]
    wrong = sum(distance(run.tokens, full.tokens) for run, full in zip(runs, whole, strict=True))
    width = statistics.mean(run.width for run in runs)
    left = share(width, way.sites)
    ratio = statistics.median(run.ms / full.ms for run, full in zip(runs, whole, strict=True))
    return {
        "encoder": way.name,
        "width": round(width, 3),
        "speech": round(statistics.mean(run.spoken for run in runs), 3),
        "silence": round(statistics.mean(run.silent for run in runs), 3),
        "blocks' FLOPs": round(left, 3),
        "WER of 8": round(sum(wrong for wrong, _ in errors) / max(1, sum(said for _, said in errors)), 4),
        "tokens as whole": round(1 - wrong / sum(len(full.tokens) for full in whole), 4),
        "same texts": sum(run.tokens == full.tokens for run, full in zip(runs, whole, strict=True)),
        "encoder ms": statistics.median(run.ms for run in runs),
        "of whole": round(ratio, 3),
        "saved, of FLOPs saved": round((1 - ratio) / (1 - left), 2) if left < 0.98 else 0.0,
    }


def drawn(way: Way, clip: Clip, file: Path) -> None:
    """Draw how many learners each frame took below the waveform; the silence behind it is left out."""
    samples, rate = read_wav(data("ljspeech") / f"{clip.name}.wav")
    counts = way.chain.run({"input_features": clip.features}, way.policy).learners
    frames = round(len(samples) / rate * FRAMES / 30)
    shares = np.stack([taken[0, :frames] for taken in counts.values()]) / LEARNERS
    blocks, stack = tuple(range(1, len(shares) + 1)), next(iter(way.chain.stacks))
    draw(Picture("sound", stack, blocks, shares, shares[:, :0], samples, len(samples) / rate), file)


def main() -> None:
    """Train or read, measure, print one table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--weights", type=Path, default=RESULTS, help=f"trained weights ({RESULTS})")
    parser.add_argument("--sites", nargs="+", choices=tuple(SITES), default=["mlp"], help="what has widths (mlp)")
    parser.add_argument("--steps", type=int, default=240, help="of training, each 30 s of sound (240)")
    parser.add_argument("--learners", choices=("dense", "grouped"), help="how learners run (what is faster)")
    parser.add_argument("--clips", type=int, help="how many recordings (32)")
    parser.add_argument("--figure", type=Path, help="where one recording and what its frames took is drawn")
    rounds(parser)
    args = parser.parse_args()
    recordings = clips()[: args.clips]
    every = ways(Students(args.weights, args.steps, args.sites), args.learners)
    if args.figure:
        drawn(next(way for way in every if way.name == FIGURE), recordings[0], args.figure)
    decoder, words = writer()
    for way in every:
        ran(way, recordings[0], decoder)  # warms up
    measured = []
    for number in range(args.rounds):
        turns = [[ran(way, clip, decoder) for way in every] for clip in steps(recordings, f"round {number + 1}")]
        rows = zip(every, zip(*turns, strict=True), strict=True)
        whole = [runs[0] for runs in turns]
        measured.append([shown(row(way, recordings, runs, whole, words)) for way, runs in rows])
    what = f"adaptive width in the encoder's {' and '.join(args.sites)}"
    report("speech_acm", f"Whisper base, {what}, {len(recordings)} recordings", spread(measured))


if __name__ == "__main__":
    main()
