"""Clips become spectrograms: exact WAV reading, bands where the tone is, normalised by train alone."""

import json
import struct

import numpy as np
import pytest

from cluster.workload import audio
from cluster.workload.datasets import DataError, open_dataset
from cluster.workload.preparing import prepare
from tests.cluster.workloads import WORDS, speech_commands, tone, wav, write


@pytest.mark.parametrize("width", [1, 2, 3, 4])
def test_pcm_of_every_width_is_read_exactly(width):
    wanted = [0.0, 0.5, -0.5, -1.0, 0.25]  # powers of two are exact in every format
    samples, rate = audio.read_wav(wav(wanted, rate=8_000, width=width))
    assert samples.tolist() == wanted
    assert rate == 8_000


def chunk(name, content, fill=True):
    return name + struct.pack("<I", len(content)) + content + b"\0" * (len(content) % 2 if fill else 0)


def chunked(form=None, data=b"\x00\x40\x00\xc0", before=b"", more=b"", size=None):
    """A WAV file by hand: (kind, channels, bits), chunks before the samples, the samples."""
    body = before
    if form is not None:
        kind, channels, bits = form
        frame = channels * bits // 8
        body += chunk(b"fmt ", struct.pack("<HHIIHH", kind, channels, 8000, 8000 * frame, frame, bits) + more)
    samples = chunk(b"data", data)
    if size is not None:
        samples = b"data" + struct.pack("<I", size) + data
    return b"RIFF" + struct.pack("<I", 4 + len(body + samples)) + b"WAVE" + body + samples


def extensible(kind, bits):
    """What follows in the extensible form: its size, valid bits, speakers, and the kind as a GUID."""
    guid = struct.pack("<H", kind) + bytes.fromhex("000000001000800000aa00389b71")
    return struct.pack("<HHI", 22, bits, 4) + guid


FLOATS = {bits: np.array([0.5, -0.5], f"<f{bits // 8}").tobytes() for bits in (32, 64)}


@pytest.mark.parametrize(
    "content",
    [
        chunked((1, 1, 16)),
        chunked((0xFFFE, 1, 16), more=extensible(1, 16)),
        chunked((0xFFFE, 1, 24), b"\0\0\x40\0\0\xc0", more=extensible(1, 24)),
        chunked((0xFFFE, 1, 8), b"\xc0\x40", more=extensible(1, 8)),
        chunked((3, 1, 32), FLOATS[32]),
        chunked((3, 1, 64), FLOATS[64]),
        chunked((0xFFFE, 1, 32), FLOATS[32], more=extensible(3, 32)),
        chunked((1, 1, 16), more=b"\0\0"),
        chunked((1, 1, 16), before=chunk(b"LIST", b"odd")),
        chunked((1, 1, 16), before=chunk(b"LIST", b"odd", fill=False)),
        chunked((1, 1, 16)) + chunk(b"LIST", b"behind the samples")[:-3],
        chunked((1, 1, 16), size=0xFFFFFFFF),  # written into a pipe
        chunked((1, 1, 16), b"\x00\x40\x00\xc0\x01"),  # half a sample at the end
        chunked((1, 2, 16), b"\x00\x40\x00\x40\x00\xc0\x00\xc0"),
    ],
)
def test_every_form_of_uncompressed_samples_is_read_exactly(content):
    samples, rate = audio.read_wav(content)
    assert (samples.tolist(), rate) == ([0.5, -0.5], 8000)


def test_channels_are_averaged():
    samples, _ = audio.read_wav(wav([0.5, 0.25, -0.5, -0.25], channels=2))
    assert samples.tolist() == [0.375, -0.375]


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        (b"fLaC" + bytes(40), "no uncompressed WAV file"),
        (tone(300)[:20], "cut short: 0 of the 16 bytes of 'fmt '"),
        (tone(300)[:36], "no uncompressed WAV file: it ends too early"),
        (tone(300)[:-1], "cut short: 31,999 of the 32,000 bytes of 'data'"),
        (wav([]), "has 0 samples"),
        (chunked(data=b"\x01\x02"), "ends too early"),
        (chunked((7, 1, 8)), r"unknown format: 7 \(mu-law\) of 8 bits; PCM of 8, 16, 24"),
        (chunked((3, 1, 16)), "unknown format: 3 .floats. of 16 bits"),
        (chunked((1, 1, 64)), "unknown format: 1 .PCM. of 64 bits"),
        (chunked((1, 1, 40)), "unknown format: 1 .PCM. of 40 bits"),
        (chunked((0xFFFE, 1, 16)), "unknown format: 65534"),
        (chunked((1, 0, 16)), "has 0 samples"),
        (chunked((3, 1, 32), np.array([0, np.nan], "<f4").tobytes()), "not finite"),
        (chunked((3, 1, 64), np.array([0, -np.inf]).tobytes()), "not finite"),
    ],
)
def test_what_is_no_wav_file_says_so(content, problem):
    with pytest.raises(audio.AudioError, match=problem):
        audio.read_wav(content)


def test_webp_pictures_are_not_taken_for_clips():
    assert audio.is_wav(tone(300))
    assert not audio.is_wav(b"RIFF\x00\x00\x00\x00WEBPVP8 ")


def test_every_band_has_a_bin_and_neighbours_share_what_lies_between():
    filters = audio.mel_filters()
    assert filters.shape == (64, 513)
    assert (filters.max(axis=1) > 0.4).all()
    # Between the first and the last centre the rising and the falling flank of two neighbours sum to 1.
    centres = 700 * (10 ** (np.linspace(0, 2595 * np.log10(1 + 8000 / 700), 66) / 2595) - 1)
    frequencies = np.fft.rfftfreq(1024, 1 / 16_000)
    between = (frequencies >= centres[1]) & (frequencies <= centres[64])
    np.testing.assert_allclose(filters.sum(axis=0)[between], 1.0)


@pytest.mark.parametrize("rate", [8_000, 16_000, 22_050])
def test_a_tone_lights_the_band_it_lies_in_whatever_the_rate(rate):
    # 1,000 Hz is 1,000 mel; 8,000 Hz is 2,840 mel, and 65 steps of 43.7 mel lead there: 22.9 steps, band 22.
    features = audio.logmel(*audio.read_wav(tone(1_000, rate=rate)))
    assert features.shape == (64, 98)
    assert features.dtype == np.float32
    assert (features.argmax(axis=0) == 22).all()


def test_a_short_clip_is_filled_up_and_a_long_one_cut():
    half = audio.logmel(*audio.read_wav(tone(440, seconds=0.5)))
    silent = np.log(np.float32(audio.FLOOR))
    np.testing.assert_allclose(half[:, 60:], silent, rtol=1e-3)  # after 0.6 s
    assert half[:, :40].max() > 5
    long, one = (audio.logmel(*audio.read_wav(tone(440, seconds=s))) for s in (3.0, 1.0))
    np.testing.assert_array_equal(long, one)


def test_waveform8k_keeps_the_wave_below_four_kilohertz():
    wave = audio.waveform8k(*audio.read_wav(tone(440, width=4)))
    expected = 0.5 * np.sin(2 * np.pi * 440 * np.arange(8_000) / 8_000)
    np.testing.assert_allclose(wave[0], expected, atol=1e-6)
    assert np.abs(audio.waveform8k(*audio.read_wav(tone(5_000, width=4)))).max() < 1e-6


def load(tmp_path, **options):
    options = {"name": "speech", "path": str(tmp_path / "set"), "cache_dir": tmp_path / "cache"} | options
    return open_dataset(prepare(**options))


def test_spectrograms_are_normalised_by_train_and_silence_is_left_out(tmp_path):
    speech_commands(tmp_path / "set")
    dataset = load(tmp_path, exclude_classes=["_silence_"], group_column="speaker_id")
    assert dataset.input_shape == (1, 64, 98)
    assert dataset.train.inputs.dtype == np.float32
    assert dataset.classes == WORDS[:3]
    assert dataset.train.targets.tolist() == [0, 1, 2] * 8
    assert dataset.test.targets.tolist() == [0, 1, 2] * 3
    # Row 3 was the silence: rows 0, 1, 2, 4, 5, ... of the file are left, spoken in turn by four speakers.
    assert dataset.train.groups.tolist() == [row % 4 for row in range(25) if row != 3]
    kept = json.loads((dataset.folder / "meta.json").read_text())["features"]
    assert kept["name"] == "logmel"
    values = dataset.train.inputs.astype(np.float64)
    assert abs(values.mean()) < 1e-5
    assert abs(values.std() - 1) < 1e-5
    # By the moments of train, the test split too: its first clip is the same as that of train.
    np.testing.assert_array_equal(dataset.test.inputs[0], dataset.train.inputs[0])
    raw = audio.logmel(*audio.read_wav(tone(300, seconds=0.9, amplitude=0.1)))
    restored = dataset.test.inputs[0, 0] * kept["deviation"] + kept["mean"]
    np.testing.assert_allclose(restored, raw, atol=1e-4)


def test_raw_waveforms_are_one_line_and_stay_as_they_are(tmp_path):
    speech_commands(tmp_path / "set")
    dataset = load(tmp_path, features="waveform8k")
    assert dataset.input_shape == (1, 1, 8_000)
    assert dataset.classes == WORDS
    assert dataset.train.targets.tolist()[:5] == [0, 1, 2, 3, 0]
    expected = audio.waveform8k(*audio.read_wav(tone(300, seconds=0.9, amplitude=0.1)))
    np.testing.assert_array_equal(dataset.train.inputs[0, 0], expected)


def test_features_are_part_of_the_fingerprint(tmp_path):
    speech_commands(tmp_path / "set", train=3, test=3)
    folders = {load(tmp_path, **options).folder for options in ({}, {"features": "waveform8k"})}
    assert len(folders) == 2


def refused(tmp_path, message, **options):
    with pytest.raises(DataError, match=message):
        load(tmp_path, **options)
    assert not list((tmp_path / "cache").glob("speech*"))


def test_bad_input_names_itself(tmp_path):
    speech_commands(tmp_path / "set", train=3, test=3)
    refused(tmp_path, "exclude_classes: 'silence' is no class.*mean _silence_", exclude_classes=["silence"])
    refused(tmp_path, "exclude_classes leaves no row", exclude_classes=list(WORDS))
    refused(tmp_path, "no value in row 3", group_column="speaker_id")  # nobody speaks in the silence
    refused(tmp_path, "data.data_dir = 'v2' has no meaning with data.path", data_dir="v2")
    digits = {"name": "digits", "path": None}
    refused(tmp_path, "data.features = 'logmel' has no meaning for data.name", features="logmel", **digits)
    refused(tmp_path, "data.exclude_classes = .* no meaning for", exclude_classes=["0"], **digits)


def test_a_damaged_clip_is_named(tmp_path):
    features = {"audio": {"_type": "Audio"}}
    for split in ("train", "test"):
        clips = [tone(300), b"fLaC" + bytes(40)]
        write(tmp_path / "set" / f"{split}.parquet", "audio", clips, {"label": [0, 1]}, features)
    refused(tmp_path, "clip 1 in column 'audio' of .*train.parquet is no uncompressed WAV file")


def test_features_of_images_are_refused(tmp_path):
    from tests.cluster.workloads import fashion_mnist

    fashion_mnist(tmp_path / "set", train=2, test=2)
    refused(tmp_path, "data.features = 'logmel' has no meaning for the images", features="logmel")
