"""Decoding a data set into the arrays that `cluster.workload.datasets` maps; runs once per node.

Four sources, one result: `<split>-images.npy`, `<split>-labels.npy` and, with groups, `train-groups.npy` in a
folder. Every function here returns the names (`classes`, `group_names`) that belong beside them in
`meta.json`. Tables are decoded one image or clip after the other into a memory map: a data set never has
to fit in memory, and threads only lose (PIL's small images hold the interpreter lock: two threads take 1.5 to
1.8 times as long as one).
"""

import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from cluster.references import did_you_mean, load_reference
from cluster.workload import audio
from cluster.workload.datasets import DataError, hold_out
from cluster.workload.tables import (
    Table,
    choose_column,
    hub_table,
    image_candidates,
    label_candidates,
    parquet_table,
)

USUAL_IMAGE_COLUMNS = ("image", "img", "audio")
USUAL_LABEL_COLUMNS = ("label", "labels", "fine_label")
DIGITS_TEST_SAMPLES = 360  # a fifth of the 1,797 digits
DIGITS_SPLIT_SEED = 1337


def decode_digits(folder: Path) -> dict[str, Any]:
    """scikit-learn's handwritten digits, 8x8 pixels of 0..16, in a fixed stratified split."""
    try:
        from sklearn.datasets import load_digits
    except ModuleNotFoundError:
        raise DataError(
            "data.name = 'digits' is a part of scikit-learn, which is not installed here; install it "
            "(pip install scikit-learn), or give data.path, a folder of parquet files"
        ) from None

    digits = load_digits()
    images = np.rint(digits.images * (255 / 16)).astype(np.uint8)
    labels = digits.target.astype(np.int64)
    train, test = hold_out(labels, DIGITS_TEST_SAMPLES / labels.size, DIGITS_SPLIT_SEED)
    arrays = {"train_images": images[train], "train_labels": labels[train]}
    arrays |= {"test_images": images[test], "test_labels": labels[test]}
    return _write_arrays(folder, arrays, "digits")


def decode_user(folder: Path, reference: str) -> dict[str, Any]:
    """What a user's function `module:attribute` returns."""
    return _write_arrays(folder, load_reference("data.name", reference, DataError)(), reference)


def _write_arrays(folder: Path, arrays: Any, name: str) -> dict[str, Any]:
    """Check and write a dictionary of arrays as described in `prepare`; returns the names for meta.json."""
    required = {"train_images", "train_labels", "test_images", "test_labels"}
    allowed = required | {"classes", "train_groups"}
    found = set(arrays) if isinstance(arrays, Mapping) else {type(arrays).__name__}
    if not required <= found <= allowed:
        raise DataError(
            f"data.name = {name!r} must return a dictionary with {sorted(required)} and optionally "
            f"'classes', 'train_groups'; found {sorted(map(str, found))}"
        )
    classes = None if arrays.get("classes") is None else [str(one) for one in arrays["classes"]]
    shape: tuple[int, ...] | None = None
    for split in ("train", "test"):
        images = np.asarray(arrays[f"{split}_images"])
        if images.ndim == 3:
            images = images[..., None]
        if images.dtype not in (np.uint8, np.float32) or images.ndim != 4 or not 1 <= images.shape[3] <= 4:
            raise DataError(
                f"{split}_images of {name!r} is {images.dtype} {list(images.shape)}; allowed is uint8 or "
                f"float32 [N, H, W] or [N, H, W, C] with 1 to 4 channels last"
            )
        if images.shape[0] == 0 or (shape is not None and images.shape[1:] != shape):
            raise DataError(
                f"{split}_images of {name!r} has shape {list(images.shape)}; expected at least one image, "
                f"and the same [H, W, C] in both splits (train: {list(shape or images.shape[1:])})"
            )
        shape = images.shape[1:]
        values = np.asarray(arrays[f"{split}_labels"])
        if values.shape != images.shape[:1] or values.dtype.kind not in "iu":
            raise DataError(
                f"{split}_labels of {name!r} is {values.dtype} {list(values.shape)}; allowed are integers "
                f"[{images.shape[0]}], one for each image"
            )
        labels, classes = _encode(values.tolist(), classes, f"{split}_labels of {name!r}")
        np.save(folder / f"{split}-images.npy", np.ascontiguousarray(images.transpose(0, 3, 1, 2)))
        np.save(folder / f"{split}-labels.npy", labels)
    groups = arrays.get("train_groups")
    if groups is not None and len(groups) != len(arrays["train_labels"]):
        raise DataError(
            f"train_groups of {name!r} has {len(groups)} entries for {len(arrays['train_labels'])} images"
        )
    return {
        "classes": classes,
        "group_names": None if groups is None else _write_groups(folder, np.asarray(groups).tolist(), name),
    }


def _encode(values: list[Any], classes: list[str] | None, place: str) -> tuple[np.ndarray, list[str]]:
    """Integer or text labels as int64 codes into `classes`, which the training split decides if None."""
    for row, value in enumerate(values):
        if not isinstance(value, (int, str)) or isinstance(value, str) != isinstance(values[0], str):
            raise DataError(f"{place}: row {row} holds {value!r}; allowed are integers or texts, never both")
    if isinstance(values[0], str):
        classes = sorted(set(values)) if classes is None else classes
        unknown = set(values) - set(classes)
        if unknown:
            raise DataError(
                f"{place} holds {sorted(unknown)[:5]}, which the training split does not: {classes}"
            )
        code = {label: index for index, label in enumerate(classes)}
        values = [code[value] for value in values]
    labels = np.array(values, dtype=np.int64)
    classes = [str(index) for index in range(labels.max() + 1)] if classes is None else classes
    if labels.min() < 0 or labels.max() >= len(classes):
        raise DataError(
            f"{place} lie in {labels.min()}..{labels.max()}; allowed are 0..{len(classes) - 1}, "
            f"because there are {len(classes)} classes"
        )
    return labels, classes


def _write_groups(folder: Path, values: list[Any], place: str) -> list[str]:
    """Write the training groups as int64 codes and return their names in the order of the codes."""
    if None in values:
        raise DataError(
            f"the groups of {place} have no value in row {values.index(None)}; every sample needs one"
        )
    names = sorted(set(values))
    code = {value: index for index, value in enumerate(names)}
    np.save(folder / "train-groups.npy", np.array([code[value] for value in values], dtype=np.int64))
    return [str(value) for value in names]


class _ColourFound(Exception):
    """An image that is not grey was met while decoding to one channel."""


@dataclass(frozen=True)
class Wanted:
    """What is asked of a table.

    Attributes:
        columns: `image_column`, `label_column` and `group_column`; None to infer, or for no groups.
        features: What clips become, a key of `audio.FEATURES`; None for `logmel`.
        exclude_classes: Classes whose rows are left out.
    """

    columns: Mapping[str, str | None]
    features: str | None = None
    exclude_classes: Sequence[str] = ()


def decode_parquet(folder: Path, wanted: Wanted, *, files: list[list[Path]]) -> dict[str, Any]:
    """Parquet files of the train and of the test split."""
    return _decode_tables(folder, wanted, *map(parquet_table, files))


def decode_hub(
    folder: Path,
    wanted: Wanted,
    *,
    name: str,
    revision: str | None,
    data_dir: str | None,
    splits: tuple[str, str],
) -> dict[str, Any]:
    """A Hugging Face hub repository, downloaded into the user's own Hugging Face cache."""
    try:
        import datasets
    except ModuleNotFoundError:
        raise DataError(
            f"data.name = {name!r} is loaded from the Hugging Face hub by the package datasets, which is not "
            "installed here; install it (pip install datasets), or give data.path, a folder of parquet files"
        ) from None

    at = f" at revision {revision!r}" if revision else ""
    try:
        loaded = datasets.load_dataset(name, revision=revision, data_dir=data_dir)
    except Exception as error:  # the library raises a dozen unrelated types, of other libraries too
        raise DataError(
            f"data.name = {name!r}{at} could not be loaded from the Hugging Face hub "
            f"({type(error).__name__}: {error}). Check the name and the network (HF_HUB_OFFLINE=1 allows "
            f"only what is cached), or give data.path, a folder of its parquet files"
        ) from error
    for key, split in zip(("train_split", "test_split"), splits, strict=True):
        if split not in loaded:
            raise DataError(
                f"data.{key} = {split!r} is no split of {name!r}{at}; allowed are {sorted(loaded)}"
                f"{did_you_mean(split, loaded)}"
            )
    return _decode_tables(folder, wanted, *(hub_table(name, split, loaded[split]) for split in splits))


def _decode_tables(folder: Path, wanted: Wanted, train: Table, test: Table) -> dict[str, Any]:
    columns = wanted.columns
    image_column = choose_column(
        train, "image_column", columns["image_column"], image_candidates(train), USUAL_IMAGE_COLUMNS
    )
    label_column = choose_column(
        train, "label_column", columns["label_column"], label_candidates(train), USUAL_LABEL_COLUMNS
    )
    for key, column in (("image_column", image_column), ("label_column", label_column)):
        choose_column(test, key, column, [], ())
    feature = train.features.get(label_column, {})
    classes = feature.get("names") if feature.get("_type") == "ClassLabel" else None
    tables, labels = {"train": train, "test": test}, {}
    for split, table in tables.items():
        if table.rows == 0:
            raise DataError(f"{table.place} has no rows")
        place = f"labels in column {label_column!r} of {table.place}"
        labels[split], classes = _encode(list(table.column(label_column)), classes, place)
    assert classes is not None, "the training split decides the classes"
    if wanted.exclude_classes:
        codes = _excluded(wanted.exclude_classes, classes, train.place)
        for split, table in tables.items():
            kept = ~np.isin(labels[split], codes)
            if not kept.any():
                raise DataError(f"data.exclude_classes leaves no row of {table.place}")
            tables[split] = table.only(kept)
            labels[split] = labels[split][kept] - np.searchsorted(codes, labels[split][kept])
        classes = [name for code, name in enumerate(classes) if code not in codes]
    for split in tables:
        np.save(folder / f"{split}-labels.npy", labels[split])
    group_names = None
    if columns["group_column"] is not None:
        group_column = choose_column(train, "group_column", columns["group_column"], [], ())
        groups = list(tables["train"].column(group_column))
        group_names = _write_groups(folder, groups, f"{train.place}, {group_column!r}")
    names = {"classes": classes, "group_names": group_names}
    first = next(tables["train"].column(image_column))
    content = first.get("bytes") if isinstance(first, dict) else first
    declared = train.features.get(image_column, {}).get("_type")
    if declared == "Audio" or (isinstance(content, bytes) and audio.is_wav(content)):
        return names | _decode_clips(folder, tables, image_column, wanted.features or "logmel")
    if wanted.features is not None:
        raise DataError(
            f"data.features = {wanted.features!r} has no meaning for the images in column {image_column!r} "
            f"of {train.place}: leave it out"
        )
    _decode_pictures(folder, tables, image_column)
    return names


def _excluded(wanted: Sequence[str], classes: list[str], place: str) -> np.ndarray:
    """Codes of the classes that are left out, sorted."""
    for name in wanted:
        if name not in classes:
            raise DataError(
                f"data.exclude_classes: {name!r} is no class of {place}; classes are {classes}"
                f"{did_you_mean(name, classes)}"
            )
    return np.array(sorted({classes.index(name) for name in wanted}))


def _content(cell: Any, place: str, kind: str) -> bytes | str:
    """Encoded bytes, or the path of a file that holds them."""
    content = cell.get("bytes") or cell.get("path") if isinstance(cell, dict) else cell
    if not isinstance(content, (bytes, str)):
        found = "nothing" if content is None else f"a value of type {type(content).__name__}"
        raise DataError(f"{place} holds {found}; allowed are encoded {kind} as bytes, or bytes with a path")
    return content


def _decode_clips(folder: Path, tables: Mapping[str, Table], column: str, features: str) -> dict[str, Any]:
    """Write the features of every clip, float32 [N, 1, H, W]; spectrograms with mean 0, deviation 1.

    Returns:
        Name, and what was subtracted and divided by (both of train), to be kept beside the arrays.
    """
    transform, shape, normalised = audio.FEATURES[features]
    written = {}
    for split, table in tables.items():
        path = folder / f"{split}-images.npy"
        written[split] = clips = np.lib.format.open_memmap(
            path, mode="w+", dtype=np.float32, shape=(table.rows, 1, *shape)
        )
        for row, cell in enumerate(table.column(column)):
            place = f"clip {row} in column {column!r} of {table.place}"
            content = _content(cell, place, "WAV files")
            try:
                content = Path(content).read_bytes() if isinstance(content, str) else content
                clips[row, 0] = transform(*audio.read_wav(content))
            except (OSError, audio.AudioError) as error:
                raise DataError(f"{place} {error}") from error
    mean, deviation = audio.moments(written["train"]) if normalised else (0.0, 1.0)
    for clips in written.values():
        if normalised:
            for start in range(0, len(clips), 1024):
                clips[start : start + 1024] = (clips[start : start + 1024] - mean) / max(deviation, 1e-12)
        clips.flush()
    return {"features": {"name": features, "mean": mean, "deviation": deviation}}


def _decode_pictures(folder: Path, tables: Mapping[str, Table], column: str) -> None:
    """Write every image, uint8 [N, C, H, W], grey if all of them are."""
    for channels in (1, 3):
        size: tuple[int, int] | None = None
        try:
            for split, table in tables.items():
                size = _decode_images(folder / f"{split}-images.npy", table, column, channels, size)
            return
        except _ColourFound:  # at the first image of nearly every colour data set
            continue


def _decode_images(
    path: Path, table: Table, column: str, channels: int, size: tuple[int, int] | None
) -> tuple[int, int]:
    """Decode a column into uint8 [N, channels, H, W] at `path`.

    Args:
        path: File to write.
        table: The split.
        column: Its images: structs with `bytes` or `path`, or plain bytes.
        channels: 1 for grey or 3 for colour.
        size: (width, height) that every image must have; None lets the first image decide.

    Returns:
        The size.

    Raises:
        _ColourFound: `channels` is 1 and an image is not grey.
        DataError: An image cannot be decoded, has another size, or more than 8 bits a channel.
    """
    from PIL import Image

    pixels: np.memmap | None = None
    for row, cell in enumerate(table.column(column)):
        place = f"image {row} in column {column!r} of {table.place}"
        content = _content(cell, place, "images")
        try:
            image = Image.open(io.BytesIO(content) if isinstance(content, bytes) else content)
            image.load()
        except (OSError, SyntaxError, Image.DecompressionBombError) as error:
            raise DataError(f"{place} cannot be decoded: {error}") from error
        if image.mode.startswith(("I", "F")):
            raise DataError(
                f"{place} has pixels of mode {image.mode!r}; allowed are images with 8 bits a channel"
            )
        if channels == 1 and image.mode not in ("L", "1"):
            raise _ColourFound
        size = image.size if size is None else size
        if image.size != size:
            raise DataError(
                f"{place} is {image.width}x{image.height} pixels, those before it {size[0]}x{size[1]}; "
                f"all images must share one size"
            )
        if pixels is None:
            shape = (table.rows, channels, size[1], size[0])
            pixels = np.lib.format.open_memmap(path, mode="w+", dtype=np.uint8, shape=shape)
        mode = "L" if channels == 1 else "RGB"
        decoded = np.asarray(image if image.mode == mode else image.convert(mode))
        pixels[row] = decoded if channels == 1 else decoded.transpose(2, 0, 1)
    assert pixels is not None, "the caller has refused a split without rows"
    assert size is not None
    pixels.flush()
    return size
