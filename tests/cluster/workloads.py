"""Tiny data sets in the schemas of the hub: the columns, features and encodings, a few samples each."""

import io
import json
import wave

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

WORDS = ("yes", "no", "up", "_silence_")


def tone(frequency, *, seconds=1.0, rate=16_000, width=2, channels=1, amplitude=0.5):
    """A WAV file of a sine."""
    time = np.arange(round(seconds * rate)) / rate
    samples = np.repeat(amplitude * np.sin(2 * np.pi * frequency * time), channels)
    return wav(samples, rate, width, channels)


def wav(samples, rate=16_000, width=2, channels=1):
    """A WAV file of samples in [-1, 1], channels interleaved."""
    if width == 1:
        data = np.rint(np.asarray(samples) * 128 + 128).astype(np.uint8).tobytes()
    else:
        words = np.rint(np.asarray(samples) * 2.0 ** (8 * width - 1)).astype("<i4")
        data = words.view(np.uint8).reshape(-1, 4)[:, :width].tobytes()
    buffer = io.BytesIO()
    with wave.open(buffer, "wb") as file:
        file.setnchannels(channels)
        file.setsampwidth(width)
        file.setframerate(rate)
        file.writeframes(data)
    return buffer.getvalue()


def png(pixels):
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


def write(file, column, cells, others, features):
    """A parquet file as the hub stores it: structs of bytes and path, features in the schema's metadata."""
    file.parent.mkdir(parents=True, exist_ok=True)
    struct = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    table = pa.table({column: pa.array([{"bytes": cell, "path": None} for cell in cells], struct), **others})
    pq.write_table(
        table.replace_schema_metadata({"huggingface": json.dumps({"info": {"features": features}})}), file
    )


def images(folder, *, column, label, shape, classes, train=40, test=20, coarse=False):
    """CIFAR-10 (img, label), CIFAR-100 (img, fine_label, coarse_label) or Fashion-MNIST (image, label)."""
    rng = np.random.default_rng(0)
    names = [f"class{code}" for code in range(classes)]
    features = {column: {"_type": "Image"}, label: {"_type": "ClassLabel", "names": names}}
    if coarse:
        features["coarse_label"] = {"_type": "ClassLabel", "names": ["one", "two"]}
    for split, rows in (("train", train), ("test", test)):
        labels = [row % classes for row in range(rows)]
        # Brighter with the class, so that there is something to learn.
        pixels = [
            np.clip(rng.integers(0, 120, size=shape) + 12 * (code % 10), 0, 255).astype(np.uint8)
            for code in labels
        ]
        others = {label: labels} | ({"coarse_label": [code % 2 for code in labels]} if coarse else {})
        file = folder / f"{split}-00000-of-00001.parquet"
        write(file, column, [png(one) for one in pixels], others, features)
    return folder


def cifar10(folder, **options):
    return images(folder, column="img", label="label", shape=(32, 32, 3), classes=10, **options)


def cifar100(folder, **options):
    options = {"column": "img", "label": "fine_label", "shape": (32, 32, 3), "classes": 100} | options
    return images(folder, coarse=True, train=120, test=100, **options)


def fashion_mnist(folder, **options):
    return images(folder, column="image", label="label", shape=(28, 28), classes=10, **options)


def femnist(folder):
    """FEMNIST: ten writers, a column for each of writer and character."""
    rng = np.random.default_rng(0)
    names = [f"letter{code}" for code in range(62)]
    features = {"image": {"_type": "Image"}, "character": {"_type": "ClassLabel", "names": names}}
    for split, rows in (("train", 80), ("test", 20)):
        labels = [row % 62 for row in range(rows)]
        pixels = [rng.integers(0, 255, size=(28, 28), dtype=np.uint8) for _ in labels]
        others = {"character": labels, "writer_id": [f"f{row // 8:04}_14" for row in range(rows)]}
        write(folder / f"{split}-0.parquet", "image", [png(one) for one in pixels], others, features)
    return folder


def birds(folder):
    """40 pictures of CUB-200-2011's kind: colours, no two of one size."""
    rng = np.random.default_rng(0)
    features = {"image": {"_type": "Image"}, "label": {"_type": "ClassLabel", "names": ["crow", "wren"]}}
    for split, rows in (("train", 30), ("test", 10)):
        shapes = [(60 + row, 90 - row, 3) for row in range(rows)]
        pixels = [rng.integers(0, 255, size=shape, dtype=np.uint8) for shape in shapes]
        others = {"label": [row % 2 for row in range(rows)]}
        write(folder / f"{split}-0.parquet", "image", [png(one) for one in pixels], others, features)
    return folder


def shakespeare(folder, *, train=40, test=10):
    """Speeches of four speakers, in columns of texts as in plain parquet files."""
    rng = np.random.default_rng(0)
    folder.mkdir(parents=True, exist_ok=True)
    for split, rows in (("train", train), ("test", test)):
        texts = ["".join(rng.choice(list("abcdef ,."), size=rng.integers(300, 900))) for _ in range(rows)]
        speakers = [f"SPEAKER {row % 8}" for row in range(rows)]
        pq.write_table(pa.table({"speaker": speakers, "text": texts}), folder / f"{split}-0.parquet")
    return folder


def speech_commands(folder, *, train=24, test=9):
    """Speech Commands: a tone a word, three speakers, and one longer clip of silence without a speaker."""
    features = {
        "audio": {"sampling_rate": 16_000, "_type": "Audio"},
        "label": {"_type": "ClassLabel", "names": list(WORDS)},
        "speaker_id": {"dtype": "string", "_type": "Value"},
    }
    for split, rows in (("train", train), ("validation", test), ("test", test)):
        labels = [row % 3 for row in range(rows)]
        clips = [
            tone(300.0 * (code + 1), seconds=0.9, amplitude=0.1 + row / 100)
            for row, code in enumerate(labels)
        ]
        # In the middle, so that leaving it out shifts the rows behind it.
        labels.insert(3, 3)
        clips.insert(3, wav(np.zeros(20_000)))
        speakers = [None if code == 3 else f"speaker{row % 4}" for row, code in enumerate(labels)]
        # As in the hub's parquet branch, a folder a split.
        others = {"label": labels, "speaker_id": speakers}
        write(folder / split / "0000.parquet", "audio", clips, others, features)
    return folder


def import_timm():
    """timm, or the test is skipped: also where torchvision is of another build than torch."""
    try:
        return pytest.importorskip("timm")
    except RuntimeError as error:
        pytest.skip(f"timm cannot be imported: {error}")
