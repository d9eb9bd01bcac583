"""Train adapters with which Whisper base leaves its decoder early, on speech that nobody has transcribed.

    python -m examples.train_speech_adapters [--clips N] [--epochs N] [--out FILE]

Two synthesisers (``apt-get install espeak-ng flite``) read WikiText-2 aloud: ``wikitext2/valid.txt`` in
``$OFFRAMP_DATA``, or in ``../shared/data`` beside the checkout. What frozen Whisper hears in that is what the exits
learn to write as its last block does; no transcript is read. The frozen blocks run once, see ``remember``.
"""

from __future__ import annotations

import argparse
import gzip
import json
import math
import random
import re
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer
from torch import Tensor, nn

import offramp
from examples._data import data, wikitext
from offramp import zoo
from offramp.program import Program
from offramp.runtime.preprocess.audio import log_mel, read_wav, resample
from offramp.training import CurvePoint, computes_bf16, fit
from offramp.training.batches import Batch
from offramp.training.losses import IGNORED, Values
from offramp.training.objective_module import ObjectiveModule, remember
from offramp.training.objectives import Objective, SelfDistillation
from offramp.training.weights import save_weights

WEIGHTS = Path(__file__).with_name("speech_adapters.safetensors")
MODEL = "whisper_base"
COMMAND = "python -m examples.train_speech_adapters"
EXITS = (4, 5)
WORDS = 36  # a clip, at least; read slowly they take less than 30 s
LONGEST = 160  # tokens; what goes on longer has gone astray
UNSEEN = 4  # batches that are kept back, to tell how well it went
ESPEAK = ("en-us", "en-gb", "en-us+f3", "en-gb-x-rp+f2", "en-us-nyc", "en-gb-scotland")
FLITE = ("slt", "rms", "awb", "slt")


class Writer(nn.Module):
    """Whisper's decoder: encoder states and the tokens so far to the logits of every next token."""

    def __init__(self, whisper: Any) -> None:
        super().__init__()
        self.decoder, self.head = whisper.model.decoder, whisper.proj_out

    def forward(self, memory: Tensor, decoder_input_ids: Tensor) -> dict[str, Tensor]:
        """``memory`` [B, 1500, 512], ``decoder_input_ids`` [B, T] int64 -> ``{"logits": [B, T, V]}``."""
        made = self.decoder(input_ids=decoder_input_ids, encoder_hidden_states=memory, use_cache=False)
        return {"logits": self.head(made.last_hidden_state)}


class Listener(nn.Module):
    """Whisper's encoder."""

    def __init__(self, whisper: Any) -> None:
        super().__init__()
        self.encoder = whisper.model.encoder

    def forward(self, input_features: Tensor) -> dict[str, Tensor]:
        """``input_features`` [B, 80, 3000] -> ``{"memory": [B, 1500, 512]}``."""
        return {"memory": self.encoder(input_features).last_hidden_state}


@dataclass(frozen=True)
class Among(SelfDistillation):
    """Self-distillation among the tokens that a text has, and others drawn anew each step that stand for all others."""

    tokens: tuple[int, ...] = ()
    others: int = 2048

    @classmethod
    def of(cls, batches: Sequence[Batch], name: str, hard: float) -> Among:
        """Among the tokens of ``batches``."""
        every = torch.cat([batch[name].flatten() for batch in batches]).unique().tolist()
        return cls(hard=hard, tokens=tuple(token for token in every if token >= 0))

    def losses(self, program: Program, values: Values, batch: Values) -> dict[str, Tensor]:
        seen = torch.tensor(self.tokens)
        unseen = torch.ones(values[self.final(program)].shape[-1], dtype=torch.bool).index_fill(0, seen, False)
        others = unseen.nonzero().flatten()
        some = torch.cat((seen, others[torch.randperm(len(others))[: self.others]]))
        stands = torch.zeros(len(some))
        stands[len(seen) :] = math.log(len(others) / self.others)
        return super().losses(program, {k: v.index_select(-1, some) + stands for k, v in values.items()}, batch)


def passages(count: int) -> list[str]:
    """Runs of whole sentences of at least `WORDS` words, as one would print them, from all over the text."""
    found = []
    for line in wikitext("valid").read_text(encoding="utf-8").splitlines():
        if line.strip().startswith("=") or len(line) < 80:
            continue
        taken: list[str] = []
        for sentence in re.split(r"(?<= [.?!]) (?=[A-Z])", line.strip()):
            if "<unk>" in sentence or not sentence.isascii():
                taken = []
                continue
            taken.append(printed(sentence))
            words = sum(len(one.split()) for one in taken)
            if words >= WORDS:
                if words < WORDS * 1.6:
                    found.append(" ".join(taken))
                taken = []
    random.Random(0).shuffle(found)
    if len(found) < count:
        sys.exit(f"the text has {len(found)} passages; --clips takes no more")
    return found[:count]


def printed(sentence: str) -> str:
    """WikiText's tokens as a text."""
    text = re.sub(r" @([-,.])@ ", r"\1", sentence)
    text = re.sub(r" ('(?:t|s|m|re|ve|d|ll))\b", r"\1", text)
    text = re.sub(r'" ([^"]*) "', r'"\1"', text)
    return re.sub(r" ([.,;:?!)%])", r"\1", text).replace("( ", "(").strip()


def common(count: int) -> tuple[int, ...]:
    """The tokens that English has most of, as Whisper writes it: an encyclopedia, captions and reviews weigh alike."""
    made = json.loads(zoo.tokenizer_files(MODEL)[0].read_text(encoding="utf-8"))
    made["model"]["merges"].insert(0, "Ġ t")  # which the package's file lacks: " the" would be two tokens
    words = Tokenizer.from_str(json.dumps(made))
    shares: Counter[int] = Counter()
    for texts in english():
        rows = words.encode_batch([f" {text.strip()}" for text in texts], add_special_tokens=False)
        found = Counter(token for row in rows for token in row.ids)
        shares.update({token: number / found.total() for token, number in found.items()})
    (stop,) = zoo.generation(MODEL)["stop"]
    return (stop, *(token for token, _ in shares.most_common(count - 1)))


def english() -> Iterator[list[str]]:
    """Texts of three kinds, none of which anybody reads aloud in the recordings that are judged."""
    yield [
        printed(line.strip()) for split in ("valid", "test") for line in wikitext(split).read_text("utf-8").splitlines()
    ]
    captions = data("multi30k/train.en.gz", "Multi30k (github.com/multi30k/dataset): captions, one a line")
    yield gzip.decompress(captions.read_bytes()).decode().splitlines()
    reviews = data("sst2/train.tsv", "SST-2 (Socher et al. 2013): a header, then phrase<TAB>label")
    yield [line.split("\t")[0] for line in reviews.read_text("utf-8").splitlines()[1:]]


def spoken(texts: Sequence[str], folder: Path) -> list[Path]:
    """A wav file for each text; voices, speeds and pitches take turns."""
    if missing := [name for name in ("espeak-ng", "flite") if shutil.which(name) is None]:
        sys.exit(f"no {', '.join(missing)}\n  try: apt-get install espeak-ng flite")
    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    for at, text in enumerate(texts):
        path = folder / f"{at:04}.wav"
        paths.append(path)
        if path.exists():
            continue
        dice = random.Random(at)
        part = folder / "part.wav"
        if at % 2:
            voice = FLITE[at // 2 % len(FLITE)]
            stretch = f"duration_stretch={dice.uniform(0.9, 1.1):.2f}"
            subprocess.run(["flite", "-voice", voice, "--setf", stretch, "-t", text, "-o", part], check=True)
        else:
            voice = ESPEAK[at // 2 % len(ESPEAK)]
            how = ["-v", voice, "-s", str(dice.randint(140, 175)), "-p", str(dice.randint(30, 65))]
            subprocess.run(["espeak-ng", *how, "-w", part, text], check=True)
        part.rename(path)
    return paths


def features(path: Path) -> Tensor | None:
    """What Whisper hears, [1, 80, 3000]; None for more than 30 s."""
    samples, rate = read_wav(path)
    samples = resample(samples, rate, 16000)
    return torch.from_numpy(log_mel(samples)) if samples.size <= 30 * 16000 else None


@torch.inference_mode()
def written(whisper: Any, memory: Tensor) -> list[list[int]]:
    """Whisper's greedy tokens for each row of encoder states [B, 1500, 512], its end too; none where that is far."""
    how = zoo.generation(MODEL)
    (stop,) = how["stop"]
    ids, cache = torch.tensor([how["prompt"]] * len(memory)), None
    found: list[list[int]] = [[] for _ in memory]
    for step in range(LONGEST):
        made = whisper.model.decoder(ids, encoder_hidden_states=memory, past_key_values=cache, use_cache=True)
        cache = made.past_key_values
        logits = whisper.proj_out(made.last_hidden_state[:, -1])
        logits[:, how["suppress"]] = -torch.inf
        if step == 0:
            logits[:, how["suppress_first"]] = -torch.inf
        ids = logits.argmax(-1, keepdim=True)
        for row, token in zip(found, ids[:, 0].tolist(), strict=True):
            if not row or row[-1] != stop:
                row.append(token)
        if all(row[-1] == stop for row in found):
            break
    return [row if row[-1] == stop else [] for row in found]


def heard(whisper: Any, clips: Sequence[Path], rows: int = 8) -> Iterator[Batch]:
    """Batches of encoder states with what Whisper writes from them, fed back to it and as labels."""
    prompt = zoo.generation(MODEL)["prompt"]
    for start in range(0, len(clips), rows):
        sounds = [sound for path in clips[start : start + rows] if (sound := features(path)) is not None]
        with torch.inference_mode():
            with torch.autocast("cpu", torch.bfloat16, computes_bf16("cpu")):
                memory = whisper.model.encoder(torch.cat(sounds)).last_hidden_state.float()
            texts = written(whisper, memory)
        kept = [row for row, text in enumerate(texts) if text]
        given = [torch.tensor(prompt + texts[row][:-1]) for row in kept]
        wanted = [torch.tensor([IGNORED] * (len(prompt) - 1) + texts[row]) for row in kept]
        yield {
            "memory": memory[kept].clone(),
            "decoder_input_ids": nn.utils.rnn.pad_sequence(given, True, 0),
            "labels": nn.utils.rnn.pad_sequence(wanted, True, IGNORED),
        }


def pipeline(*exits: int) -> str:
    """The passes that insert some exits and their adapters."""
    return f"insert-exits{{after={'|'.join(map(str, exits))}}},insert-adapter{{kind=norm-linear}}"


def program(passes: str | None = None) -> Program:
    """Whisper's decoder with its exits and adapters, as they start."""
    module, example = zoo.load(MODEL)
    memory = torch.randn(2, 1500, 512, generator=torch.Generator().manual_seed(0))
    inputs = {"memory": memory, "decoder_input_ids": example["decoder_input_ids"]}
    passes = pipeline(*EXITS) if passes is None else passes
    return offramp.apply(offramp.capture(Writer(module.whisper), inputs), passes)


def agreement(program: Program, batches: Sequence[Batch]) -> dict[int, float]:
    """How often each exit prefers what Whisper wrote, given what it wrote before."""
    model = ObjectiveModule(program, Objective())
    outputs = {item.after: item.outputs["logits"] for item in program.exits_of("decoder")}
    right, count = dict.fromkeys(outputs, 0), 0
    for batch in batches:
        counts = batch["labels"] != IGNORED
        count += int(counts.sum())
        with torch.inference_mode():
            values = model.values(outputs.values(), batch)
        for after, name in outputs.items():
            right[after] += int((values[name].argmax(-1) == batch["labels"])[counts].sum())
    return {after: number / count for after, number in right.items()}


def show(point: CurvePoint) -> None:
    losses = ", ".join(f"{name} {value:.3f}" for name, value in point.losses.items())
    print(f"step {point.step:5} epoch {point.epoch:5.1f}  {losses}  {point.seconds:5.0f} s", flush=True)


def teach(trained: Program, states: Sequence[Batch], epochs: int) -> None:
    """Train the adapters on what `remember` gave, but for some batches that show what that is worth."""
    unseen, seen = states[:UNSEEN], states[UNSEEN:]
    print("as Whisper wrote, untrained:", agreement(trained, unseen), flush=True)
    objective = Among.of(seen, "labels", hard=1.0)
    fit(trained, seen, objective, epochs=epochs, precision="auto", warmup=20, progress=show, log_every=20)
    print("as Whisper wrote, trained:", agreement(trained, unseen), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--clips", type=int, default=264)
    parser.add_argument("--epochs", type=int, default=4)
    parser.add_argument("--folder", type=Path, default=Path("build/speech/wav"), help="where the sound goes")
    parser.add_argument("--out", type=Path, default=WEIGHTS)
    args = parser.parse_args()
    trained, whisper = program(), zoo.load(MODEL)[0].whisper
    clips = spoken(passages(args.clips), args.folder)
    states = remember(trained, heard(whisper, clips), "decoder")
    print(f"{len(clips)} clips, {sum(int((b['labels'] != IGNORED).sum()) for b in states):,} tokens", flush=True)
    teach(trained, states, args.epochs)
    save_weights(trained, args.out, dtype=torch.float16)
    print(f"wrote {args.out}: {args.out.stat().st_size:,} bytes")


if __name__ == "__main__":
    main()
