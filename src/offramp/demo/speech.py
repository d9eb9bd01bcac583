"""``offramp demo speech``: Whisper base writes down a recording, its vocabulary screened for each token."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from offramp import models, zoo
from offramp.cli import _inputs, _text, _words
from offramp.demo import _two_ways
from offramp.errors import InputError
from offramp.runtime import Never

MODEL = "whisper_base"
BUNDLE = Path("build/whisper-base.offramp")
PIPELINE = ("insert-scores{stack=decoder,measure=prediction-screened}", "insert-cache")
_MODULE, _RECORDING = "moonshine_voice", "assets/beckett.wav"
REQUIREMENT = "moonshine-voice==0.1.5"


def bundles(path: Path) -> dict[Path, tuple[str, ...]]:
    """The bundles of the demo, and the passes that make them."""
    return {path: PIPELINE, _two_ways.full_of(path): _two_ways.FULL}


def build(path: Path, progress: Callable[[str, int, int], None] | None = None) -> None:
    """Save Whisper as it is, and with a head that screens its vocabulary."""
    import offramp

    captured = offramp.capture(*zoo.load(MODEL))
    how = models.settings(f"zoo:{MODEL}") | models.origin(f"zoo:{MODEL}") | {"segments": 1, "progress": progress}
    for place, passes in bundles(path).items():
        offramp.save(offramp.apply(captured, ",".join(passes)), place, **how)


def show(path: Path, words: Sequence[str]) -> None:
    """Write down the wav file that ``words`` name, or ten seconds of Beckett."""
    if len(words) > 1:
        raise InputError(f"one recording at a time, these are {len(words)}", hint="offramp demo speech FILE.wav")
    sound = Path(words[0]) if words else recording()
    both = quick, _ = _two_ways.ways(path, Never())
    (inputs,) = _inputs.hear(quick.chain, path, [sound])
    screened, full = _two_ways.in_turns(both, inputs)
    decode = _words.decoder_of(_text.tokenizer_of(quick.chain, path))
    whole, classes = quick.chain.stacks["decoder"].exits[-1].segments, quick.chain.outputs["logits"].shape[-1]
    proven = sum(not any(ran.segment in whole for ran in step.trace) for step in screened.steps)
    print(f"\nWhisper base listens to {sound.name}:\n\n {decode(full.tokens)}\n")
    print(f"  full depth, whole head   {full.milliseconds:6.1f} ms for {len(full.steps)} tokens")
    print(
        f"  screened head            {screened.milliseconds:6.1f} ms for {len(screened.steps)} tokens, {proven} of "
        f"them proven the best of {classes:,}"
    )
    print(f"  the words                {_two_ways.difference(decode(full.tokens), decode(screened.tokens))}")
    print(f"\nThe decoder is {_two_ways.summary([(screened, full)], 'recording')}")
    print(f"Run the bundle by hand, without torch:\n\n  offramp run {path} --audio {sound}\n")


def recording() -> Path:
    """A recording that a pip package carries.

    Raises:
        PackageMissingError: the package is not installed.
    """
    sha256 = "e5a26b3d29e5b0bc8dbd72c11d16a3808a4ec0ac45b21f12a27d2a2fe5c5ae61"
    return zoo.Package(REQUIREMENT, _MODULE, {_RECORDING: sha256}).file(_RECORDING)
