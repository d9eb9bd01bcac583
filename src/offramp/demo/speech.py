"""``offramp demo speech``: Whisper base writes down a recording, most tokens picked from a short list."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from offramp import models, zoo
from offramp.cli import _inputs, _text, _words
from offramp.demo import _two_ways
from offramp.errors import InputError
from offramp.runtime import Confidence

MODEL = "whisper_base"
BUNDLE = Path("build/whisper-base.offramp")
BLOCKS, MEASURE, LEAST = 6, "top1-short", 0.8
#: All six blocks, and the head of the whole vocabulary only where the short list is unsure.
POLICY = Confidence(measure=MEASURE, thresholds={BLOCKS: LEAST})
_IDS = Path(zoo.__file__).with_name("whisper_english.txt")
PIPELINE = (
    f"insert-scores{{stack=decoder,measure={MEASURE}|prediction-short,after={BLOCKS},ids={_IDS}}}",
    "insert-cache",
)
_MODULE, _RECORDING = "moonshine_voice", "assets/beckett.wav"
REQUIREMENT = "moonshine-voice==0.1.5"


def bundles(path: Path) -> dict[Path, tuple[str, ...]]:
    """The bundles of the demo, and the passes that make them."""
    return {path: PIPELINE, _two_ways.full_of(path): _two_ways.FULL}


def build(path: Path, progress: Callable[[str, int, int], None] | None = None) -> None:
    """Save Whisper as it is, and with a short list of 10,000 candidates at full depth."""
    import offramp

    captured = offramp.capture(*zoo.load(MODEL))
    scores = offramp.InsertScores("decoder", (MEASURE, "prediction-short"), BLOCKS, ids=str(_IDS))
    quick = offramp.apply(captured, [scores, offramp.InsertCache()])
    full = offramp.apply(captured, ",".join(_two_ways.FULL))
    how = models.settings(f"zoo:{MODEL}") | models.origin(f"zoo:{MODEL}") | {"segments": 1, "progress": progress}
    for program, place, policy in ((full, _two_ways.full_of(path), None), (quick, path, POLICY.to_dict())):
        offramp.save(program, place, policy=policy, **how)


def show(path: Path, words: Sequence[str]) -> None:
    """Write down the wav file that ``words`` name, or ten seconds of Beckett."""
    if len(words) > 1:
        raise InputError(f"one recording at a time, these are {len(words)}", hint="offramp demo speech FILE.wav")
    sound = Path(words[0]) if words else recording()
    both = quick, _ = _two_ways.ways(path, POLICY)
    inputs = _inputs.hear(quick.chain, path, [sound])
    short, full = _two_ways.in_turns(both, inputs)
    decode = _words.decoder_of(_text.tokenizer_of(quick.chain, path))
    sure = sum(step.scores.get(MEASURE, 0) >= LEAST for step in short.steps)  # the first token has no score
    cache = quick.chain.manifest.cache
    print(f"\nWhisper base listens to {sound.name}:\n\n {decode(full.tokens)}\n")
    print(f"  full depth, whole head   {full.milliseconds:6.1f} ms for {len(full.steps)} tokens")
    print(
        f"  full depth, short list   {short.milliseconds:6.1f} ms for {len(short.steps)} tokens, {sure} of them from "
        f"the 10,000 of {cache.vocabulary if cache else 0:,} tokens that English has most of"
    )
    print(f"  the words                {_two_ways.difference(decode(full.tokens), decode(short.tokens))}")
    print(f"\nThe decoder is {_two_ways.summary([(short, full)], 'recording')}")
    print(f"Run the bundle by hand, without torch:\n\n  offramp run {path} --audio {sound}\n")


def recording() -> Path:
    """A recording that a pip package carries.

    Raises:
        PackageMissingError: the package is not installed.
    """
    sha256 = "e5a26b3d29e5b0bc8dbd72c11d16a3808a4ec0ac45b21f12a27d2a2fe5c5ae61"
    return zoo.Package(REQUIREMENT, _MODULE, {_RECORDING: sha256}).file(_RECORDING)
