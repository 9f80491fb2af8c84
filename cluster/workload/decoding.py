"""Decoding a data set into the arrays that `cluster.workload.datasets` maps; runs once per node.

Tables of any origin, one result: `<split>-images.npy`, `<split>-labels.npy` and, with groups,
`train-groups.npy` in a folder. Every function here returns the names (`classes`, `group_names`) that belong
beside them in `meta.json`. What is arrays already, `arrays.py` writes in the same form; texts are read by
`text.py`, numbers and categories by `columns.py`. Images and clips are decoded one after the other into a
memory map: a data set of them never has to fit in memory, and threads only lose (PIL's small images hold the
interpreter lock: two threads take 1.5 to 1.8 times as long as one).
"""

import io
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from cluster.references import DataError, did_you_mean
from cluster.workload import audio, cache
from cluster.workload.arrays import refuse_not_finite
from cluster.workload.columns import write_columns
from cluster.workload.labels import group_codes
from cluster.workload.tables import (
    Table,
    choose_column,
    hub_table,
    image_candidates,
    label_candidates,
    parquet_table,
)
from cluster.workload.targets import read_targets
from cluster.workload.text import TextForm, write_sequences, write_tables

if TYPE_CHECKING:
    from PIL.Image import Image as Picture

USUAL_IMAGE_COLUMNS = ("image", "img", "audio")
USUAL_LABEL_COLUMNS = ("label", "labels", "fine_label")
_DEEP = re.compile(
    r";16[BLN]"
)  # as PIL calls how 16 bits a channel are stored; ";16" alone is 5, 6 and 5 bits


#: Files that cells name instead of holding their bytes, and their state when they were read.
Outside = dict[str, list[int]]


class _ColourFound(Exception):
    """An image that is not grey was met while decoding to one channel."""


@dataclass(frozen=True)
class Wanted:
    """What is asked of a table.

    Attributes:
        columns: `image_column`, `label_column` and `group_column`; None to infer, or for no groups.
        inputs: Columns of numbers and categories; None to infer whether they are what there is.
        targets: What the column of labels is, see `cluster.workload.targets`; `tokens`: there is none.
        features: What clips become, a key of `audio.FEATURES`; None for `logmel`.
        exclude_classes: Classes whose rows are left out.
        text: What the texts become, where text is what is asked for.
        image_size: Pixels a side that every image is brought to; None where all have one size.
    """

    columns: Mapping[str, str | None]
    inputs: Sequence[str] | None = None
    targets: str = "classes"
    features: str | None = None
    exclude_classes: Sequence[str] = ()
    text: TextForm | None = None
    image_size: int | None = None


def decode_parquet(folder: Path, wanted: Wanted, *, files: list[list[Path]]) -> dict[str, Any]:
    """Parquet files of the train and of the test split."""
    return decode_tables(folder, wanted, *map(parquet_table, files))


@dataclass(frozen=True)
class Hub:
    """Where in the Hugging Face hub a data set lies; see `cluster.workload.datasets.prepare`."""

    name: str
    revision: str | None
    data_dir: str | None
    splits: tuple[str, str]


def decode_hub(folder: Path, wanted: Wanted, hub: Hub) -> dict[str, Any]:
    """A Hugging Face hub repository, downloaded into the user's own Hugging Face cache."""
    try:
        import datasets
    except ModuleNotFoundError:
        raise DataError(
            f"data.name = {hub.name!r} is loaded from the Hugging Face hub by the package datasets, which is "
            "not installed here; install it (pip install datasets), or give data.path, a folder of parquet "
            "files"
        ) from None

    name, at = hub.name, f" at revision {hub.revision!r}" if hub.revision else ""
    where = {"revision": hub.revision, "data_dir": hub.data_dir}
    try:
        loaded = dict(datasets.load_dataset(name, **where))
        for split in hub.splits:
            if "[" in split:  # a part of a split, as the library writes it
                loaded[split] = datasets.load_dataset(name, split=split, **where)
    except Exception as error:  # the library raises a dozen unrelated types, of other libraries too
        raise DataError(
            f"data.name = {name!r}{at} could not be loaded from the Hugging Face hub "
            f"({type(error).__name__}: {error}). Check the name and the network (HF_HUB_OFFLINE=1 allows "
            f"only what is cached), or give data.path, a folder of its parquet files"
        ) from error
    for key, split in zip(("train_split", "test_split"), hub.splits, strict=True):
        if split not in loaded:
            raise DataError(
                f"data.{key} = {split!r} is no split of {name!r}{at}; allowed are {sorted(loaded)}"
                f"{did_you_mean(split, loaded)}"
            )
    return decode_tables(folder, wanted, *(hub_table(name, split, loaded[split]) for split in hub.splits))


def decode_tables(folder: Path, wanted: Wanted, train: Table, test: Table) -> dict[str, Any]:
    """The train and the test split, wherever they are from."""
    columns, text = wanted.columns, wanted.text
    if text is not None and wanted.targets == "tokens":
        return write_tables(folder, text, columns["group_column"], train, test)
    image_column = None
    if text is None and not _has_columns(wanted, train):
        image_column = choose_column(
            train, "image_column", columns["image_column"], image_candidates(train), USUAL_IMAGE_COLUMNS
        )
    label_column = choose_column(
        train, "label_column", columns["label_column"], label_candidates(train), USUAL_LABEL_COLUMNS
    )
    for key, column in (("image_column", image_column), ("label_column", label_column)):
        if column is not None:
            choose_column(test, key, column, [], ())
    tables = {"train": train, "test": test}
    targets, classes = read_targets(wanted.targets, label_column, tables)
    if wanted.exclude_classes:
        codes = _excluded(wanted.exclude_classes, classes, train.place)
        for split, table in tables.items():
            kept = ~np.isin(targets[split], codes)
            if not kept.any():
                raise DataError(f"data.exclude_classes leaves no row of {table.place}")
            tables[split] = table.only(kept)
            targets[split] = targets[split][kept] - np.searchsorted(codes, targets[split][kept])
        classes = [name for code, name in enumerate(classes) if code not in codes]
    for split in tables:
        cache.save(folder / f"{split}-labels.npy", targets[split])
    group_column, group_names = columns["group_column"], None
    if group_column is not None:
        choose_column(train, "group_column", group_column, [], ())
        groups = list(tables["train"].column(group_column))
        values, group_names = group_codes(groups, f"{train.place}, {group_column!r}")
        cache.save(folder / "train-groups.npy", values)
    names: dict[str, Any] = {"classes": classes, "group_names": group_names, "outside": {}}
    if text is not None:
        return names | write_sequences(folder, text, (label_column, group_column), tables)
    if image_column is not None:
        return names | _decode_images_or_clips(folder, wanted, tables, image_column, names["outside"])
    for key, value in (("features", wanted.features), ("image_size", wanted.image_size)):
        if value is not None:
            raise DataError(
                f"data.{key} = {value!r} has no meaning for the columns of {train.place}: leave it out"
            )
    others = {"label_column": label_column, "group_column": group_column}
    return names | write_columns(folder, wanted.inputs, others, tables)


def _has_columns(wanted: Wanted, train: Table) -> bool:
    """Whether columns of numbers and categories are what is asked for, or all that there is."""
    if wanted.inputs is not None or wanted.columns["image_column"] is not None:
        return wanted.inputs is not None
    return not (image_candidates(train) or set(USUAL_IMAGE_COLUMNS) & set(train.schema.names))


def _decode_images_or_clips(
    folder: Path, wanted: Wanted, tables: Mapping[str, Table], column: str, outside: Outside
) -> dict[str, Any]:
    train = tables["train"]
    first = next(train.column(column))
    content = first.get("bytes") if isinstance(first, dict) else first
    kind = train.features.get(column, {}).get("_type")
    if kind == "Audio" or (isinstance(content, bytes) and audio.is_wav(content)):
        if wanted.image_size is not None:
            raise DataError(
                f"data.image_size = {wanted.image_size} has no meaning for the clips in column {column!r} of "
                f"{train.place}: leave it out"
            )
        return _decode_clips(folder, tables, column, wanted.features or "logmel", outside)
    if wanted.features is not None:
        raise DataError(
            f"data.features = {wanted.features!r} has no meaning for the images in column {column!r} "
            f"of {train.place}: leave it out"
        )
    _decode_pictures(folder, tables, column, wanted.image_size, outside)
    return {}


def _excluded(wanted: Sequence[str], classes: list[str], place: str) -> np.ndarray:
    """Codes of the classes that are left out, sorted."""
    for name in wanted:
        if name not in classes:
            raise DataError(
                f"data.exclude_classes: {name!r} is no class of {place}; classes are {classes}"
                f"{did_you_mean(name, classes)}"
            )
    return np.array(sorted({classes.index(name) for name in wanted}))


def _content(cell: Any, place: str, kind: str, outside: Outside) -> bytes:
    """Encoded bytes, from the cell or the file that it names, which is noted in ``outside``."""
    content = cell.get("bytes") or cell.get("path") if isinstance(cell, dict) else cell
    if not isinstance(content, (bytes, str)):
        found = "nothing" if content is None else f"a value of type {type(content).__name__}"
        raise DataError(f"{place} holds {found}; allowed are encoded {kind} as bytes, or bytes with a path")
    if isinstance(content, bytes):
        return content
    file = Path(content).absolute()
    try:
        outside[str(file)] = cache.state(file)
        return file.read_bytes()
    except (OSError, ValueError) as error:
        raise DataError(f"{place} names a file that cannot be read: {error}") from error


def _decode_clips(
    folder: Path, tables: Mapping[str, Table], column: str, features: str, outside: Outside
) -> dict[str, Any]:
    """Write the features of every clip, float32 [N, 1, H, W]; spectrograms with mean 0, deviation 1.

    Returns:
        Name, and what was subtracted and divided by (both of train), to be kept beside the arrays.
    """
    transform, shape, normalised = audio.FEATURES[features]
    written = {}
    for split, table in tables.items():
        path = folder / f"{split}-images.npy"
        written[split] = clips = cache.new_array(path, np.float32, (table.rows, 1, *shape))
        for row, cell in enumerate(table.column(column)):
            place = f"clip {row} in column {column!r} of {table.place}"
            content = _content(cell, place, "WAV files", outside)
            try:
                clips[row, 0] = transform(*audio.read_wav(content))
            except audio.AudioError as error:
                raise DataError(f"{place} {error}") from error
            refuse_not_finite(clips[row : row + 1], place, row)
    mean, deviation = audio.moments(written["train"]) if normalised else (0.0, 1.0)
    for clips in written.values():
        if normalised:
            for start in range(0, len(clips), 1024):
                clips[start : start + 1024] = (clips[start : start + 1024] - mean) / max(deviation, 1e-12)
        clips.flush()
    return {"features": {"name": features, "mean": mean, "deviation": deviation}}


def _decode_pictures(
    folder: Path, tables: Mapping[str, Table], column: str, side: int | None, outside: Outside
) -> None:
    """Write every image, uint8 [N, C, H, W], grey if all of them are."""
    for channels in (1, 3):
        size: tuple[int, int] | None = None
        try:
            for split, table in tables.items():
                path = folder / f"{split}-images.npy"
                size = _decode_images(path, table, column, channels, size, side, outside)
            return
        except _ColourFound:  # at the first image of nearly every colour data set
            continue


def _decode_images(
    path: Path,
    table: Table,
    column: str,
    channels: int,
    size: tuple[int, int] | None,
    side: int | None,
    outside: Outside,
) -> tuple[int, int]:
    """Decode a column into uint8 [N, channels, H, W] at `path`.

    Args:
        path: File to write.
        table: The split.
        column: Its images: structs with `bytes` or `path`, or plain bytes.
        channels: 1 for grey or 3 for colour.
        size: (width, height) that every image must have; None lets the first image decide.
        side: Pixels a side that it is brought to; None where it has that size by itself.
        outside: Files that were read beside the table; added to.

    Returns:
        The size.

    Raises:
        _ColourFound: `channels` is 1 and an image is not grey.
        DataError: An image cannot be decoded, moves, has another size, or more than 8 bits a channel.
    """
    from PIL import Image

    pixels: np.memmap | None = None
    for row, cell in enumerate(table.column(column)):
        place = f"image {row} in column {column!r} of {table.place}"
        content = _content(cell, place, "images", outside)
        try:
            image = Image.open(io.BytesIO(content))
            # PIL reads the colours of 16 bits as if they had 8, and tells only beforehand.
            deep = image.mode.startswith(("I", "F")) or any(_DEEP.search(str(tile[3])) for tile in image.tile)
            frames = getattr(image, "n_frames", 1) if image.format != "MPO" else 1  # a photo and its preview
            image.load()
        except Exception as error:  # of a damaged file a decoder may raise anything
            reason = " ".join(str(error).split()) or type(error).__name__
            raise DataError(f"{place} cannot be decoded: {reason}") from error
        if deep:
            raise DataError(
                f"{place} has more than 8 bits a channel (mode {image.mode!r}); allowed are images with 8"
            )
        if frames > 1:
            raise DataError(f"{place} has {frames} frames; allowed are still images")
        if channels == 1 and image.mode not in ("L", "1"):
            raise _ColourFound
        mode = "L" if channels == 1 else "RGB"
        shown: Picture = image if image.mode == mode else image.convert(mode)
        if side is not None:
            shown = _resized(shown, side)
        size = shown.size if size is None else size
        if shown.size != size:
            raise DataError(
                f"{place} is {shown.width}x{shown.height} pixels, those before it {size[0]}x{size[1]}; "
                f"bring all images to one size with data.image_size={min(size)}"
            )
        if pixels is None:
            shape = (table.rows, channels, size[1], size[0])
            pixels = cache.new_array(path, np.uint8, shape)
        decoded = np.asarray(shown)
        pixels[row] = decoded if channels == 1 else decoded.transpose(2, 0, 1)
    assert pixels is not None, "the caller has refused a split without rows"
    assert size is not None
    pixels.flush()
    return size


def _resized(image: "Picture", side: int) -> "Picture":
    """The shorter side as long as ``side``, bilinear with antialiasing, and of the longer one the middle.

    What torchvision's ``Resize(side)`` and ``CenterCrop(side)`` do with an image.
    """
    from PIL.Image import Resampling

    width, height = image.size
    shorter = min(width, height)
    if shorter != side:
        width, height = side * width // shorter, side * height // shorter
        image = image.resize((width, height), Resampling.BILINEAR)
    left, top = round((width - side) / 2), round((height - side) / 2)
    return image.crop((left, top, left + side, top + side))
