"""Feature extractors of transformers as settings: the runtime makes of any sound what the extractor makes of it."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import transformers

from offramp.bundle.preprocessing import Audio
from offramp.errors import InputError
from offramp.pretrained.feature_extractor import audio_settings
from offramp.runtime.preprocess.audio import features

EXTRACTORS: list[tuple[str, dict[str, Any]]] = [
    ("Whisper", {"chunk_length": 2}),
    ("Whisper", {"feature_size": 24, "chunk_length": 1, "n_fft": 512, "hop_length": 200}),
    ("Wav2Vec2", {}),
    ("Wav2Vec2", {"do_normalize": False, "sampling_rate": 8000}),
    ("SpeechT5", {}),
]


@pytest.mark.parametrize(("name", "settings"), EXTRACTORS)
def test_features_are_those_of_the_extractor(name: str, settings: dict[str, Any]) -> None:
    extractor = getattr(transformers, f"{name}FeatureExtractor")(**settings)
    found = audio_settings(extractor)
    random = np.random.default_rng(3)
    for samples in (401, 5000, 16000):
        sound = (0.3 * random.standard_normal(samples)).clip(-1, 1).astype(np.float32)
        made = extractor(sound, sampling_rate=found.rate, return_tensors="np")
        expected = made[extractor.model_input_names[0]]
        np.testing.assert_allclose(features(sound, found), expected, rtol=0, atol=1e-4)


def test_extractors_that_do_something_else_are_refused_by_name() -> None:
    for name in ("Clap", "EnCodec"):
        extractor = getattr(transformers, f"{name}FeatureExtractor", None)
        if extractor is None:
            continue
        with pytest.raises(ValueError, match=f"{name}FeatureExtractor makes neither"):
            audio_settings(extractor())


def test_a_refused_extractor_says_what_it_makes() -> None:
    """Frames of features, here two of 80 bands side by side, are neither of the two."""
    said = r"\(it makes float32 \[1, 10, 160\] of 3360 samples\); what it makes can be given as an array"
    with pytest.raises(ValueError, match=said):
        audio_settings(transformers.SeamlessM4TFeatureExtractor())


def test_a_waveform_has_to_be_a_row_of_finite_floats() -> None:
    settings = Audio(kind="waveform", normalize=True)
    for samples in (np.zeros((1, 9), np.float32), np.zeros(0, np.float32), np.full(3, np.nan, np.float32)):
        with pytest.raises(InputError):
            features(samples, settings)
