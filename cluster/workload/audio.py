"""Spoken clips as model inputs: plain WAV files, read and transformed once, when a data set is decoded.

The filter bank is a few lines of numpy. torchaudio, for the same numbers, is a heavy dependency of which
every version fits one version of torch only.

    samples, rate = read_wav(content)
    logmel(samples, rate)           # float32 [64, 98]: mel bands x 10 ms
"""

import struct
from collections.abc import Callable, Iterator

import numpy as np

RATE = 16_000  # Hz that logmel works at
MELS = 64
WINDOW, HOP, FFT = 400, 160, 1024  # 25 ms, 10 ms; zero-padded so that the narrowest band holds a bin
FLOOR = 1e-6  # power below which a band counts as silent


_PCM, _FLOAT, _EXTENSIBLE = 1, 3, 0xFFFE
_KINDS = {_PCM: "PCM", 2: "ADPCM", _FLOAT: "floats", 6: "A-law", 7: "mu-law", 0x55: "MP3"}
_READABLE = {*((_PCM, width) for width in (1, 2, 3, 4)), (_FLOAT, 4), (_FLOAT, 8)}
#: What follows a kind in the extensible form, and says that it means what it does in the simple one.
_SUBFORMAT = bytes.fromhex("00000000 1000 8000 00aa00389b71")


class AudioError(ValueError):
    """Not a WAV file that can be read; the message says what it is."""


def is_wav(content: bytes) -> bool:
    """Whether these are the bytes of a WAV file (WebP images, too, begin with RIFF)."""
    return content[:4] == b"RIFF" and content[8:12] == b"WAVE"


def read_wav(content: bytes) -> tuple[np.ndarray, int]:
    """Samples in [-1, 1], float64 [N], channels averaged, and their rate in Hz.

    Raises:
        AudioError: Neither uncompressed PCM of 8, 16, 24 or 32 bits nor floats of 32 or 64; cut short,
            damaged, or without a sample.
    """
    chunks = dict(_chunks(content))
    if b"fmt " not in chunks or b"data" not in chunks:
        raise AudioError("is no uncompressed WAV file: it ends too early")
    kind, channels, rate, bits = _format(chunks[b"fmt "])
    width, data = (bits + 7) // 8, np.frombuffer(chunks[b"data"], np.uint8)
    if (kind, width) not in _READABLE:
        raise AudioError(
            f"is no uncompressed WAV file: unknown format: {kind} ({_KINDS.get(kind, 'unknown')}) of {bits} "
            f"bits; PCM of 8, 16, 24 or 32 bits is read, and floats of 32 or 64"
        )
    count = len(data) // (width * channels) * channels if channels else 0
    if count == 0 or rate <= 0:
        raise AudioError(f"has {count} samples at {rate} Hz")
    data = data[: count * width]
    if kind == _FLOAT:
        samples = data.view(f"<f{width}").astype(np.float64)
        if not np.isfinite(samples).all():
            raise AudioError("holds samples that are not finite")
    elif width == 1:  # the one unsigned format
        samples = (data.astype(np.float64) - 128.0) / 128.0
    else:
        words = np.zeros((count, 4), np.uint8)
        words[:, 4 - width :] = data.reshape(count, width)
        samples = words.view("<i4")[:, 0] / 2.0**31
    return samples.reshape(-1, channels).mean(axis=1), rate


def _chunks(content: bytes) -> Iterator[tuple[bytes, bytes]]:
    """Names and contents of a WAV file's chunks, up to the samples."""
    if not is_wav(content):
        raise AudioError("is no uncompressed WAV file: it does not start with RIFF id and WAVE")
    start = 12
    while start + 8 <= len(content):
        name, size = struct.unpack_from("<4sI", content, start)
        body = content[start + 8 : start + 8 + size]
        # Programs that write into a pipe cannot know the size: the samples end where the file does.
        if len(body) < size and not (name == b"data" and size == 0xFFFFFFFF):
            chunk = name.decode("ascii", "replace")
            raise AudioError(f"is cut short: {len(body):,} of the {size:,} bytes of {chunk!r} are there")
        yield name, body
        if name == b"data":
            return
        start += 8 + size
        # A chunk of an odd size is followed by a byte that fills it up, which some programs forget.
        start += size % 2 if content[start : start + 4] not in (b"fmt ", b"data") else 0


def _format(chunk: bytes) -> tuple[int, int, int, int]:
    """Kind of the samples, channels, rate in Hz and bits a sample."""
    if len(chunk) < 16:
        raise AudioError("is no uncompressed WAV file: it ends too early")
    kind, channels, rate, _, _, bits = struct.unpack_from("<HHIIHH", chunk)
    if kind == _EXTENSIBLE and chunk[26:40] == _SUBFORMAT:
        kind = struct.unpack_from("<H", chunk, 24)[0]  # what the simple form would have said
    return kind, channels, rate, bits


def one_second(samples: np.ndarray, rate: int, target: int) -> np.ndarray:
    """The first second, filled up with silence, at ``target`` Hz: float64 [target].

    Over one second the Fourier bins are whole Hz at every rate: resampling keeps those that both rates have.
    """
    clip = np.zeros(rate)
    clip[: len(samples)] = samples[:rate]
    return clip if rate == target else np.fft.irfft(np.fft.rfft(clip), n=target) * (target / rate)


def mel_filters() -> np.ndarray:
    """Triangles of height 1, evenly spaced from 0 Hz to half of ``RATE`` in mel (O'Shaughnessy 1987).

    Returns:
        float64 [MELS, FFT // 2 + 1], weights of the power spectrum's bins.
    """
    highest = 2595.0 * np.log10(1.0 + RATE / 2 / 700.0)
    edges = 700.0 * (10.0 ** (np.linspace(0.0, highest, MELS + 2) / 2595.0) - 1.0)
    frequencies = np.fft.rfftfreq(FFT, 1.0 / RATE)
    low, centre, high = (edges[first : first + MELS, None] for first in range(3))
    rising, falling = (frequencies - low) / (centre - low), (high - frequencies) / (high - centre)
    return np.maximum(0.0, np.minimum(rising, falling))


# Band by band over the few bins of each: the whole product is 20 times the work, and wakes every BLAS thread.
_BANDS = [(slice(*np.flatnonzero(band)[[0, -1]] + (0, 1)), band[band > 0]) for band in mel_filters()]
_HANN = 0.5 - 0.5 * np.cos(2.0 * np.pi * np.arange(WINDOW) / WINDOW)


def logmel(samples: np.ndarray, rate: int) -> np.ndarray:
    """Logarithm of the power in each mel band, float32 [64, 98]; not yet normalised."""
    clip = one_second(samples, rate, RATE)
    frames = np.lib.stride_tricks.sliding_window_view(clip, WINDOW)[::HOP]
    spectrum = np.fft.rfft(frames * _HANN, n=FFT)
    power = spectrum.real**2 + spectrum.imag**2
    bands = np.stack([power[:, bins] @ weights for bins, weights in _BANDS])
    return np.log(bands + FLOOR).astype(np.float32)


def waveform8k(samples: np.ndarray, rate: int) -> np.ndarray:
    """The raw wave at 8 kHz as one line of 8,000 pixels, float32 [1, 8000] (the SparsyFed authors' input)."""
    return one_second(samples, rate, 8_000).astype(np.float32)[None]


#: By name: the transformation, the shape [H, W] of what it returns, and whether to normalise it by train.
FEATURES: dict[str, tuple[Callable[[np.ndarray, int], np.ndarray], tuple[int, int], bool]] = {
    "logmel": (logmel, (MELS, 1 + (RATE - WINDOW) // HOP), True),
    "waveform8k": (waveform8k, (1, 8_000), False),
}


def moments(values: np.ndarray) -> tuple[float, float]:
    """Mean and standard deviation of all values, summed in float64, a slice in memory at a time."""

    def total(function: Callable[[np.ndarray], np.ndarray]) -> float:
        starts = range(0, len(values), 1024)
        return sum(float(function(values[start : start + 1024].astype(np.float64)).sum()) for start in starts)

    mean = total(lambda part: part) / values.size
    return mean, (total(lambda part: (part - mean) ** 2) / values.size) ** 0.5
