"""Wav files become samples, samples another rate, and sound the features that Whisper was trained on."""

from __future__ import annotations

import struct
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from offramp.errors import InputError
from offramp.runtime.preprocess.audio import log_mel, read_wav, resample

Samples = NDArray[np.float32]
PCM, FLOAT, EXTENSIBLE = 1, 3, 0xFFFE


def tone(hertz: float, rate: int, seconds: float = 0.5) -> Samples:
    places = np.arange(round(rate * seconds)) / rate
    return np.asarray(np.sin(2 * np.pi * hertz * places) / 2, np.float32)


def chunk(name: bytes, content: bytes) -> bytes:
    return name + struct.pack("<I", len(content)) + content + b"\0" * (len(content) % 2)


def riff(*chunks: bytes) -> bytes:
    return chunk(b"RIFF", b"WAVE" + b"".join(chunks))


def header(encoding: int, bits: int, channels: int = 1, rate: int = 16000) -> bytes:
    frame = channels * bits // 8
    return struct.pack("<HHIIHH", encoding, channels, rate, rate * frame, frame, bits)


def encoded(samples: Samples, encoding: int, bits: int) -> bytes:
    if encoding == FLOAT:
        return samples.astype("<f4").tobytes()
    if bits == 8:
        return (samples * 128 + 128).astype(np.uint8).tobytes()
    whole = np.round(samples.astype(np.float64) * 2 ** (bits - 1)).astype("<i4")
    return bytes(whole.view(np.uint8).reshape(-1, 4)[:, : bits // 8].tobytes())


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "clip.wav"


@pytest.mark.parametrize(("encoding", "bits"), [(PCM, 8), (PCM, 16), (PCM, 24), (PCM, 32), (FLOAT, 32)])
@pytest.mark.parametrize("channels", [1, 2, 3])
def test_every_encoding_is_read_and_channels_are_averaged(path: Path, encoding: int, bits: int, channels: int) -> None:
    written = np.stack([tone(440 * (1 + index), 8000) for index in range(channels)], axis=1)
    content = encoded(written.ravel(), encoding, bits)
    path.write_bytes(riff(chunk(b"fmt ", header(encoding, bits, channels, 8000)), chunk(b"data", content)))
    samples, rate = read_wav(path)
    assert rate == 8000
    assert samples.dtype == np.float32
    np.testing.assert_allclose(samples, written.mean(axis=1), atol=2.0**-7 if bits == 8 else 2.0**-15)


def test_the_extensible_header_and_other_chunks_are_read(path: Path) -> None:
    extension = struct.pack("<HHIH", 22, 16, 4, PCM) + bytes(14)
    other = chunk(b"LIST", b"odd")
    format_chunk = chunk(b"fmt ", header(EXTENSIBLE, 16) + extension)
    path.write_bytes(riff(other, format_chunk, other, chunk(b"data", b"\0\x40\0\xc0"), other))
    assert read_wav(path)[0].tolist() == [0.5, -0.5]


def test_float_samples_are_clipped(path: Path) -> None:
    content = np.array([2, -3, 0.25], "<f4").tobytes()
    path.write_bytes(riff(chunk(b"fmt ", header(FLOAT, 32)), chunk(b"data", content)))
    assert read_wav(path)[0].tolist() == [1, -1, 0.25]


FORMAT, DATA = chunk(b"fmt ", header(PCM, 16)), chunk(b"data", bytes(8))
NAN = chunk(b"data", np.array([0, np.nan], "<f4").tobytes())


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "no wav file"),
        (b"ID3\4 this is an mp3", "no wav file"),
        (riff(FORMAT), "no 'data' chunk"),
        (riff(DATA), "no 'fmt' chunk"),
        (riff(FORMAT, DATA)[:-3], "cut off: its 'data' chunk has 5 of 8 bytes"),
        (riff(FORMAT)[:30], "cut off: its 'fmt' chunk has 10 of 16 bytes"),
        (riff(chunk(b"fmt ", b"\1\0"), DATA), "'fmt' chunk has 2 bytes, expected 16"),
        (riff(chunk(b"fmt ", header(PCM, 12)), DATA), "encoding 1 of 12 bits, expected PCM"),
        (riff(chunk(b"fmt ", header(FLOAT, 64)), DATA), "encoding 3 of 64 bits"),
        (riff(chunk(b"fmt ", header(0x55, 16)), DATA), "encoding 85 .*(?s:.*)ffmpeg"),
        (riff(chunk(b"fmt ", header(PCM, 16, channels=0)), DATA), "0 channels"),
        (riff(chunk(b"fmt ", header(PCM, 16, rate=0)), DATA), "0 samples a second"),
        (riff(FORMAT, chunk(b"data", bytes(7))), "7 bytes of frames of 2"),
        (riff(FORMAT, chunk(b"data", b"")), "has no samples"),
        (riff(chunk(b"fmt ", header(FLOAT, 32)), NAN), "not finite"),
    ],
)
def test_a_file_that_cannot_be_read_says_why(path: Path, content: bytes, reason: str) -> None:
    path.write_bytes(content)
    with pytest.raises(InputError, match=reason) as caught:
        read_wav(path)
    assert str(path) in str(caught.value)


def test_a_missing_file_and_a_folder_are_input_errors(path: Path) -> None:
    with pytest.raises(InputError, match="No such file"):
        read_wav(path)
    with pytest.raises(InputError, match="directory"):
        read_wav(path.parent)


@pytest.mark.parametrize("rates", [(22050, 16000), (44100, 16000), (48000, 16000), (8000, 16000), (11025, 16000)])
def test_a_tone_is_the_same_tone_at_another_rate(rates: tuple[int, int]) -> None:
    rate, wanted = rates
    for hertz in (1000, 0.44 * min(rates)):
        expected = tone(hertz, wanted)
        found = resample(tone(hertz, rate), rate, wanted)
        assert found.dtype == np.float32
        assert abs(len(found) - len(expected)) <= 1
        inside = slice(wanted // 20, -wanted // 20)  # the ends border on silence
        np.testing.assert_allclose(found[: len(expected)][inside], expected[inside], atol=1e-5)


def test_what_the_new_rate_cannot_hold_is_left_out() -> None:
    assert abs(resample(tone(9000, 44100), 44100, 16000)[1000:-1000]).max() < 1e-5


def test_resampled_length() -> None:
    assert [len(resample(np.ones(n, np.float32), 3, 2)) for n in range(1, 8)] == [1, 2, 2, 3, 4, 4, 5]
    assert resample(tone(100, 16000), 16000, 16000).tolist() == tone(100, 16000).tolist()


@pytest.mark.parametrize(
    ("samples", "reason"),
    [
        (np.zeros((2, 3), np.float32), r"float32 \[2, 3\]"),
        (np.zeros(3, np.int16), r"int16 \[3\]"),
        (np.zeros(0, np.float32), "no samples"),
        (np.array([np.inf], np.float32), "not finite"),
    ],
)
def test_samples_that_are_none(samples: Samples, reason: str) -> None:
    with pytest.raises(InputError, match=reason):
        resample(samples, 8000, 16000)
    with pytest.raises(InputError, match=reason):
        log_mel(samples)


def test_rates_are_positive() -> None:
    with pytest.raises(InputError, match="found 0 and 16000"):
        resample(tone(100, 8000), 0, 16000)


def speech_like() -> Samples:
    """A voice's harmonics that glide, in bursts, over quiet noise."""
    time = np.arange(5 * 16000) / 16000
    pitch = np.cumsum(120 + 30 * np.sin(3 * time)) / 16000
    voice = sum(np.sin(2 * np.pi * harmonic * pitch) / harmonic for harmonic in range(1, 30))
    noise = np.random.default_rng(0).standard_normal(time.size)
    samples: Samples = (voice * (np.sin(9 * time) > 0) / 8 + noise / 1000).astype(np.float32)
    return samples


@pytest.mark.parametrize("name", ["speech", "noise of 30 s", "tone", "one sample", "silence"])
def test_features_are_those_of_transformers(name: str) -> None:
    transformers = pytest.importorskip("transformers")
    sounds: dict[str, Samples] = {
        "speech": speech_like(),
        "noise of 30 s": np.asarray(np.random.default_rng(0).standard_normal(480_000) / 10, np.float32),
        "tone": tone(440, 16000),
        "one sample": np.ones(1, np.float32),
        "silence": np.zeros(1000, np.float32),
    }
    samples = sounds[name]
    extractor = transformers.WhisperFeatureExtractor(feature_size=80)
    expected = extractor(samples, sampling_rate=16000, return_tensors="np").input_features
    found = log_mel(samples)
    assert found.dtype == np.float32
    assert found.shape == expected.shape == (1, 80, 3000)
    np.testing.assert_allclose(found, expected, atol=1e-4)


def test_other_sizes_of_features() -> None:
    assert log_mel(tone(440, 8000), rate=8000, n_fft=256, hop=80, mels=40, seconds=2).shape == (1, 40, 200)


def test_longer_sound_is_to_be_split() -> None:
    with pytest.raises(InputError, match=r"lasts 30\.1 s, the model takes 30 s\n  try: split"):
        log_mel(tone(440, 16000, seconds=30.1))
