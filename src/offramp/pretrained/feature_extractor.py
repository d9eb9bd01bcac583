"""A feature extractor of transformers as the settings of a bundle: read, then tried on sound."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np

from offramp.bundle.preprocessing import Audio
from offramp.errors import InputError
from offramp.pretrained.tokenization import reason
from offramp.runtime.preprocess.audio import features

_TOLERANCE = 2e-4  # of features of about 1: transformers makes spectra of float32, the runtime of float64
_SECONDS = (0.21, 0.73)


def audio_settings(extractor: Any) -> Audio:
    """What the extractor does with a row of samples.

    Raises:
        ValueError: no way of reading its settings gives what it gives; the message says what is different.
    """
    found = {key: value for key, value in extractor.to_dict().items() if value is not None}
    rate = int(found.get("sampling_rate", 16000))
    sounds = [_sound(rate, seconds) for seconds in _SECONDS]
    expected = [_extracted(extractor, sound, rate) for sound in sounds]
    least = float("inf")
    for settings in _readings(found, rate):
        error = _difference(settings, sounds, expected)
        if error <= _TOLERANCE:
            return settings
        least = min(least, error)
    made = f"{expected[0].dtype} {list(expected[0].shape)} of {sounds[0].size} samples"
    how = f"values differ by {least:.1e}" if np.isfinite(least) else f"it makes {made}"
    raise ValueError(
        f"{type(extractor).__name__} makes neither Whisper's log-mel spectrogram nor the waveform ({how}); what it "
        "makes can be given as an array"
    )


def _sound(rate: int, seconds: float) -> Any:
    """A tone in noise, which is not centred, float32 ``[samples]``."""
    random = np.random.default_rng(0)
    places = np.arange(int(rate * seconds)) / rate
    tone = 0.3 * np.sin(2 * np.pi * 440 * places) + 0.05
    return (tone + 0.1 * random.standard_normal(places.size)).astype(np.float32)


def _extracted(extractor: Any, sound: Any, rate: int) -> Any:
    try:
        made = extractor(sound, sampling_rate=rate, return_tensors="np")
        return np.asarray(made[extractor.model_input_names[0]])
    except Exception as error:
        raise ValueError(f"{type(extractor).__name__} fails on a row of samples: {reason(error)}") from error


def _difference(settings: Audio, sounds: list[Any], expected: list[Any]) -> float:
    greatest = 0.0
    for sound, values in zip(sounds, expected, strict=True):
        try:
            made = features(sound, settings)
        except InputError:
            return float("inf")
        if made.shape != values.shape:
            return float("inf")
        greatest = max(greatest, float(np.abs(made - values).max()))
    return greatest


def _readings(found: dict[str, Any], rate: int) -> Iterator[Audio]:
    """The ways to read the settings."""
    if {"n_fft", "hop_length", "chunk_length", "feature_size"} <= found.keys():
        yield Audio(
            kind="log-mel",
            rate=rate,
            n_fft=int(found["n_fft"]),
            hop=int(found["hop_length"]),
            mels=int(found["feature_size"]),
            seconds=int(found["chunk_length"]),
        )
    for normalize in (bool(found.get("do_normalize")), False):
        yield Audio(kind="waveform", rate=rate, normalize=normalize)
