"""Sound to features: a wav file's samples, at the rate that a model wants, as a log-mel spectrogram.

::

    samples, rate = read_wav("clip.wav")
    features = log_mel(resample(samples, rate, 16000))      float32 [1, 80, 3000]
"""

from __future__ import annotations

import math
import struct
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from offramp.bundle.preprocessing import Audio
from offramp.errors import InputError

_PCM, _FLOAT, _EXTENSIBLE = 1, 3, 0xFFFE
_ENCODINGS = {(_PCM, 8), (_PCM, 16), (_PCM, 24), (_PCM, 32), (_FLOAT, 32)}
# resampy's "kaiser_best": 64 zero crossings on each side, and a cut-off that leaves the window room to fall
_CROSSINGS, _CUTOFF, _BETA = 64, 0.9475937167399596, 14.769656459379492


def features(samples: NDArray[np.floating[Any]], settings: Audio) -> NDArray[np.float32]:
    """Samples ``[samples]`` at the settings' rate as a model takes them, float32 ``[1, ...]``.

    Raises:
        InputError: the samples are not a row of finite floats, or last longer than the model's window.
    """
    if settings.kind == "waveform":
        return waveform(samples, normalize=settings.normalize)
    return log_mel(samples, settings.rate, settings.n_fft, settings.hop, settings.mels, settings.seconds)


def waveform(samples: NDArray[np.floating[Any]], *, normalize: bool = False) -> NDArray[np.float32]:
    """The samples themselves, float32 ``[1, samples]``; with ``normalize`` of mean 0 and variance 1.

    As wav2vec 2.0 takes them (Baevski et al. 2020, section 4.2). Raises `InputError` as `features` does.
    """
    _check(samples)
    row = samples.astype(np.float32)
    if normalize:
        row = (row - row.mean()) / np.sqrt(row.var() + 1e-7)
    return row[None]


def read_wav(path: str | Path) -> tuple[NDArray[np.float32], int]:
    """The samples of a wav file, channels averaged, float32 ``[samples]`` in [-1, 1], and how many make a second.

    Reads PCM of 8, 16, 24 or 32 bits and float of 32 bits (clipped to [-1, 1]), any number of channels, also under
    the extensible header.

    Raises:
        InputError: the file cannot be read, is no wav file, ends early, has another encoding, or has no samples.
    """
    try:
        data = Path(path).read_bytes()
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror}") from error
    if len(data) < 12 or data[:4] != b"RIFF" or data[8:12] != b"WAVE":
        raise InputError(
            f"{path} is no wav file: it does not start with RIFF and WAVE",
            hint="write another format as wav first: ffmpeg -i FILE FILE.wav",
        )
    chunks = _chunks(path, data)
    for name in ("fmt ", "data"):
        if name not in chunks:
            raise InputError(f"{path} is a broken wav file: it has no {name.strip()!r} chunk")
    encoding, bits, channels, rate = _format(path, chunks["fmt "])
    frame = channels * bits // 8
    if len(chunks["data"]) % frame:
        raise InputError(f"{path} is a broken wav file: {len(chunks['data'])} bytes of frames of {frame}")
    if not chunks["data"]:
        raise InputError(f"{path} has no samples")
    samples = _decode(chunks["data"], encoding, bits).reshape(-1, channels).mean(axis=1)
    if not np.isfinite(samples).all():
        raise InputError(f"{path} has samples that are not finite")
    return samples.clip(-1, 1).astype(np.float32), rate


def resample(samples: NDArray[np.floating[Any]], rate: int, wanted: int) -> NDArray[np.float32]:
    """The samples ``[samples]`` at another rate, float32 ``[ceil(samples * wanted / rate)]``.

    Band-limited interpolation by a sinc under a Kaiser window (J. O. Smith, "Digital Audio Resampling", section
    "Theory of Ideal Bandlimited Interpolation"), one filter for each place between two samples. Beyond the ends is
    silence.

    Raises:
        InputError: the samples are not a row of finite floats, or a rate is not positive.
    """
    _check(samples)
    if rate < 1 or wanted < 1:
        raise InputError(f"rates are samples a second, at least 1; found {rate} and {wanted}")
    if rate == wanted:
        return samples.astype(np.float32)
    step = math.gcd(rate, wanted)
    phases, stride = wanted // step, rate // step  # output n lies at n * stride / phases
    cutoff = _CUTOFF * min(1.0, wanted / rate)
    half = math.ceil(_CROSSINGS / cutoff)
    result = np.empty(-(-samples.size * phases // stride), np.float32)
    padded = np.pad(samples.astype(np.float32), (half, half + stride))
    windows = np.lib.stride_tricks.sliding_window_view(padded, 2 * half)
    for phase in range(min(phases, result.size)):
        first, rest = divmod(phase * stride, phases)
        offsets = np.arange(-half, half) + 1 - rest / phases  # of the window's samples from the output
        taps = np.sinc(cutoff * offsets) * _kaiser(offsets / half)
        outputs = result[phase::phases]
        outputs[:] = windows[first + 1 :: stride][: outputs.size] @ (taps / taps.sum()).astype(np.float32)
    return result


def log_mel(
    samples: NDArray[np.floating[Any]],
    rate: int = 16000,
    n_fft: int = 400,
    hop: int = 160,
    mels: int = 80,
    seconds: int = 30,
) -> NDArray[np.float32]:
    """Whisper's features, float32 ``[1, mels, seconds * rate // hop]``, of at most ``seconds`` of sound.

    Silence is appended up to ``seconds``; frames of ``n_fft`` samples, ``hop`` apart, under a Hann window; power in
    ``mels`` bands; log10, no more than 8 below the largest, scaled to about [-1, 1] (Radford et al. 2022, section 2.2,
    and ``log_mel_spectrogram`` of openai/whisper). Samples are floats ``[samples]`` in [-1, 1] at ``rate``.

    Raises:
        InputError: the samples are not a row of finite floats, or last longer than ``seconds``.
    """
    _check(samples)
    length = seconds * rate
    if samples.size > length:
        raise InputError(
            f"the sound lasts {samples.size / rate:.1f} s, the model takes {seconds} s", hint="split it into parts"
        )
    padded = np.pad(samples.astype(np.float64), (0, length - samples.size))
    padded = np.pad(padded, n_fft // 2, mode="reflect")
    frames = np.lib.stride_tricks.sliding_window_view(padded, n_fft)[::hop][: length // hop]
    hann = np.hanning(n_fft + 1)[:-1]
    power = np.abs(np.fft.rfft(frames * hann)) ** 2
    spectrum = np.log10(np.maximum(mel_filters(rate, n_fft, mels) @ power.T, 1e-10))
    spectrum = np.maximum(spectrum, spectrum.max() - 8.0)
    features: NDArray[np.float32] = ((spectrum + 4.0) / 4.0).astype(np.float32)[None]
    return features


@cache
def mel_filters(rate: int, n_fft: int, mels: int) -> NDArray[np.float64]:
    """Triangular bands ``[mels, n_fft // 2 + 1]`` up to half the rate, each of the same area.

    Slaney's scale (Auditory Toolbox, 1998): linear up to 1 kHz, 15 mel, and from there 27 mel for a factor of 6.4.
    """
    top = 15 + 27 * math.log(rate / 2000) / math.log(6.4) if rate > 2000 else rate * 3 / 400
    places = np.linspace(0, top, mels + 2)
    edges = np.where(places < 15, places * 200 / 3, 1000 * 6.4 ** ((places - 15) / 27))[:, None]
    bins = np.linspace(0, rate / 2, n_fft // 2 + 1)
    rising = (bins - edges[:-2]) / (edges[1:-1] - edges[:-2])
    falling = (edges[2:] - bins) / (edges[2:] - edges[1:-1])
    filters: NDArray[np.float64] = np.maximum(0, np.minimum(rising, falling)) * 2 / (edges[2:] - edges[:-2])
    return filters


def _check(samples: NDArray[np.floating[Any]]) -> None:
    if samples.ndim != 1 or not np.issubdtype(samples.dtype, np.floating):
        raise InputError(f"samples are floats [samples], these are {samples.dtype} {list(samples.shape)}")
    if not samples.size:
        raise InputError("there are no samples")
    if not np.isfinite(samples).all():
        raise InputError("some samples are not finite")


def _kaiser(places: NDArray[np.float64]) -> NDArray[np.float64]:
    """The window at places in [-1, 1]."""
    window: NDArray[np.float64] = np.i0(_BETA * np.sqrt(np.maximum(0, 1 - places**2))) / np.i0(_BETA)
    return window


def _chunks(path: str | Path, data: bytes) -> dict[str, memoryview]:
    """The parts of a RIFF file by name, of several of one name the first."""
    found: dict[str, memoryview] = {}
    place = 12
    while place + 8 <= len(data):
        name, size = data[place : place + 4].decode("latin-1"), int.from_bytes(data[place + 4 : place + 8], "little")
        place += 8
        if place + size > len(data):
            raise InputError(
                f"{path} is cut off: its {name.strip()!r} chunk has {len(data) - place} of {size} bytes",
                hint="a program that writes wav to a pipe leaves the sizes out; let it write to a file",
            )
        found.setdefault(name, memoryview(data)[place : place + size])
        place += size + size % 2
    return found


def _format(path: str | Path, chunk: memoryview) -> tuple[int, int, int, int]:
    """Encoding, bits of a sample, channels, and samples a second, all checked."""
    if len(chunk) < 16:
        raise InputError(f"{path} is a broken wav file: its 'fmt' chunk has {len(chunk)} bytes, expected 16")
    encoding, channels, rate, _, _, bits = struct.unpack("<HHIIHH", chunk[:16])
    if encoding == _EXTENSIBLE and len(chunk) >= 26:
        encoding = int.from_bytes(chunk[24:26], "little")
    if (encoding, bits) not in _ENCODINGS:
        raise InputError(
            f"{path} has encoding {encoding} of {bits} bits, expected PCM (1) of 8, 16, 24 or 32 or float (3) of 32",
            hint=f"ffmpeg -i {path} -c:a pcm_s16le out.wav",
        )
    if not channels or not rate:
        raise InputError(f"{path} is a broken wav file: {channels} channels, {rate} samples a second")
    return encoding, bits, channels, rate


def _decode(data: memoryview, encoding: int, bits: int) -> NDArray[np.float32] | NDArray[np.float64]:
    """All samples, channels interleaved, full scale at 1."""
    if encoding == _FLOAT:
        return np.frombuffer(data, "<f4")
    if bits == 8:  # the only width without a sign
        return (np.frombuffer(data, np.uint8).astype(np.float32) - 128) / 128
    if bits == 24:
        wide = np.zeros((len(data) // 3, 4), np.uint8)
        wide[:, 1:] = np.frombuffer(data, np.uint8).reshape(-1, 3)
        return wide.view("<i4")[:, 0] / 2.0**31
    return np.frombuffer(data, f"<i{bits // 8}") / 2.0 ** (bits - 1)
