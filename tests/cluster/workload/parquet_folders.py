"""Small data sets as folders of parquet files, and code in a process of its own."""

import io
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

ROOT = Path(__file__).parents[3]


def encoded(pixels, mode=None, format="PNG"):
    """The bytes of an image file with these pixels."""
    buffer = io.BytesIO()
    image = Image.fromarray(pixels)
    (image if mode is None else image.convert(mode)).save(buffer, format)
    return buffer.getvalue()


def pictures(count, shape, seed=0):
    return np.random.default_rng(seed).integers(0, 256, size=(count, *shape), dtype=np.uint8)


def write_split(folder, split, cells, labels, *, image="image", label="label", extra=None, features=None):
    """A parquet file as the hub stores it: a struct of bytes and path, features in the schema's metadata."""
    folder.mkdir(parents=True, exist_ok=True)
    cells = [cell if isinstance(cell, dict) else {"bytes": cell, "path": None} for cell in cells]
    struct = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    table = pa.table({image: pa.array(cells, struct), label: labels, **(extra or {})})
    if features is not None:
        table = table.replace_schema_metadata({"huggingface": json.dumps({"info": {"features": features}})})
    pq.write_table(table, folder / f"{split}-00000-of-00001.parquet")


def write_dataset(folder, *, shape=(6, 5, 3), train=7, test=3, **options):
    """A small set with labels 0, 1, 2, 0, ...; returns the pixels of both splits."""
    pixels = {"train": pictures(train, shape, 1), "test": pictures(test, shape, 2)}
    for split, images in pixels.items():
        labels = [row % 3 for row in range(len(images))]
        write_split(folder, split, [encoded(one) for one in images], labels, **options)
    return pixels


def fresh_process(code, *arguments):
    """Run code in an interpreter that has imported nothing; returns what it printed."""
    done = subprocess.run(
        [sys.executable, "-c", code, *map(str, arguments)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    return done.stdout
