"""``offramp demo speech``: Whisper tiny.en writes down a recording, at full depth and with early exits."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from offramp.cli import _inputs
from offramp.demo import _two_ways
from offramp.runtime import Confidence, InputError, load

BUNDLE = Path("build/whisper-tiny-en.offramp")
PIPELINE = (
    "insert-cache",
    "insert-exits{stack=decoder,after=2|3}",
    "insert-scores{stack=decoder,measure=top1}",
)
#: Asked after block 3 only: what block 2 makes of these weights, which were never trained to leave, is no text.
POLICY = Confidence(thresholds={3: 0.5})
_MODULE, _RECORDING = "moonshine_voice", "assets/beckett.wav"
REQUIREMENT = "moonshine-voice==0.1.5"


def build(path: Path, progress: Callable[[str, int, int], None] | None = None) -> None:
    """Capture Whisper, insert caches, exits after blocks 2 and 3 of its decoder and scores, and save it."""
    _two_ways.build("whisper_tiny_en", path, PIPELINE, POLICY, progress=progress)


def show(path: Path, words: Sequence[str]) -> None:
    """Write down the wav file that ``words`` name, or ten seconds of Beckett."""
    if len(words) > 1:
        raise InputError(f"one recording at a time, these are {len(words)}", hint="offramp demo speech FILE.wav")
    sound = Path(words[0]) if words else recording()
    chain = load(path)
    inputs = _inputs.hear(chain, path, sound)
    print(f"Whisper tiny.en listens to {sound.name}.")
    _two_ways.show(chain, path, inputs, POLICY)
    print(f"\nRun the bundle by hand, without torch:\n\n  offramp run {path} --audio {sound}")


def recording() -> Path:
    """A recording that a pip package carries.

    Raises:
        PackageMissingError: the package is not installed.
    """
    from offramp.zoo import Package

    sha256 = "e5a26b3d29e5b0bc8dbd72c11d16a3808a4ec0ac45b21f12a27d2a2fe5c5ae61"
    return Package(REQUIREMENT, _MODULE, {_RECORDING: sha256}).file(_RECORDING)
