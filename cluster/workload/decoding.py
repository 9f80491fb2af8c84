"""Decoding a data set into the arrays that `cluster.workload.datasets` maps; runs once per node.

Four sources, one result: `<split>-images.npy`, `<split>-labels.npy` and, with groups, `train-groups.npy` in a
folder. Every function here returns the names (`classes`, `group_names`) that belong beside them in
`meta.json`. Tables are decoded one image after the other into a memory map: a data set never has to fit in
memory, and threads only lose (PIL's small images hold the interpreter lock: two threads take 1.5 to 1.8 times
as long as one).
"""

import io
import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from cluster.workload.datasets import DataError, did_you_mean, hold_out, load_reference

USUAL_IMAGE_COLUMNS = ("image", "img")
USUAL_LABEL_COLUMNS = ("label", "labels", "fine_label")
DIGITS_TEST_SAMPLES = 360  # a fifth of the 1,797 digits
DIGITS_SPLIT_SEED = 1337


def decode_digits(folder: Path) -> dict[str, Any]:
    """scikit-learn's handwritten digits, 8x8 pixels of 0..16, in a fixed stratified split."""
    from sklearn.datasets import load_digits

    digits = load_digits()
    images = np.rint(digits.images * (255 / 16)).astype(np.uint8)
    labels = digits.target.astype(np.int64)
    train, test = hold_out(labels, DIGITS_TEST_SAMPLES / labels.size, DIGITS_SPLIT_SEED)
    arrays = {"train_images": images[train], "train_labels": labels[train]}
    arrays |= {"test_images": images[test], "test_labels": labels[test]}
    return _write_arrays(folder, arrays, "digits")


def decode_user(folder: Path, reference: str) -> dict[str, Any]:
    """What a user's function `module:attribute` returns."""
    return _write_arrays(folder, load_reference(reference, "data.name", DataError)(), reference)


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


@dataclass(frozen=True)
class _Table:
    """One split in Arrow's form: where it is from, its schema, its row count, and its rows batch by batch."""

    place: str
    schema: Any
    rows: int
    batches: Callable[[str], Iterator[Any]]  # column name -> consecutive arrays of that column

    def column(self, name: str) -> Iterator[Any]:
        """The values of a column as Python objects, in order, a batch in memory at a time."""
        for batch in self.batches(name):
            yield from batch.to_pylist()

    @property
    def features(self) -> dict[str, dict[str, Any]]:
        """Hugging Face's feature of every column, as stored in the schema; empty for plain parquet files."""
        stored = json.loads((self.schema.metadata or {}).get(b"huggingface", b"{}"))
        features = stored.get("info", {}).get("features", {})
        return {name: feature if isinstance(feature, dict) else {} for name, feature in features.items()}


class _ColourFound(Exception):
    """An image that is not grey was met while decoding to one channel."""


def decode_parquet(
    folder: Path, *, files: list[list[Path]], columns: Mapping[str, str | None]
) -> dict[str, Any]:
    """Parquet files of the train and of the test split."""
    return _decode_tables(folder, columns, *map(_parquet_table, files))


def decode_hub(
    folder: Path,
    *,
    name: str,
    revision: str | None,
    splits: tuple[str, str],
    columns: Mapping[str, str | None],
) -> dict[str, Any]:
    """A Hugging Face hub repository, downloaded into the user's own Hugging Face cache."""
    import datasets

    at = f" at revision {revision!r}" if revision else ""
    try:
        loaded = datasets.load_dataset(name, revision=revision)
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
    return _decode_tables(folder, columns, *(_hub_table(name, split, loaded[split]) for split in splits))


def _hub_table(name: str, split: str, dataset: Any) -> "_Table":
    def batches(column: str) -> Iterator[Any]:
        # The Arrow format hands out the encoded bytes, the default one would decode every image.
        for table in dataset.select_columns([column]).with_format("arrow").iter(batch_size=512):
            yield table[column]

    return _Table(f"split {split!r} of {name!r}", dataset.features.arrow_schema, len(dataset), batches)


def _parquet_table(files: list[Path]) -> "_Table":
    import pyarrow
    import pyarrow.parquet

    parts = []
    for file in files:
        try:
            parts.append(pyarrow.parquet.ParquetFile(file))
        except pyarrow.ArrowInvalid as error:
            raise DataError(f"{file} is not a readable parquet file: {error}") from error

    def batches(column: str) -> Iterator[Any]:
        for file, part in zip(files, parts, strict=True):
            if column not in part.schema_arrow.names:
                raise DataError(f"{file} has no column {column!r}, which {files[0].name} has")
            for batch in part.iter_batches(batch_size=512, columns=[column]):
                yield batch.column(column)

    rows = sum(part.metadata.num_rows for part in parts)
    return _Table(str(files[0]), parts[0].schema_arrow, rows, batches)


def _decode_tables(
    folder: Path, columns: Mapping[str, str | None], train: _Table, test: _Table
) -> dict[str, Any]:
    image_column = _choose(
        train, "image_column", columns["image_column"], _image_candidates(train), USUAL_IMAGE_COLUMNS
    )
    label_column = _choose(
        train, "label_column", columns["label_column"], _label_candidates(train), USUAL_LABEL_COLUMNS
    )
    names = {"image_column": image_column, "label_column": label_column}
    for key, column in names.items():
        _choose(test, key, column, [], ())
    if train.rows == 0 or test.rows == 0:
        raise DataError(f"{(test if train.rows else train).place} has no rows")
    feature = train.features.get(label_column, {})
    classes = feature.get("names") if feature.get("_type") == "ClassLabel" else None
    for split, table in (("train", train), ("test", test)):
        values = list(table.column(label_column))
        labels, classes = _encode(values, classes, f"labels in column {label_column!r} of {table.place}")
        np.save(folder / f"{split}-labels.npy", labels)
    group_names = None
    if columns["group_column"] is not None:
        group_column = _choose(train, "group_column", columns["group_column"], [], ())
        group_names = _write_groups(
            folder, list(train.column(group_column)), f"{train.place}, {group_column!r}"
        )
    try:
        size = _decode_images(folder / "train-images.npy", train, image_column, 1, None)
        _decode_images(folder / "test-images.npy", test, image_column, 1, size)
    except _ColourFound:  # at the first image of nearly every colour data set
        size = _decode_images(folder / "train-images.npy", train, image_column, 3, None)
        _decode_images(folder / "test-images.npy", test, image_column, 3, size)
    return {"classes": classes, "group_names": group_names}


def _image_candidates(table: _Table) -> list[str]:
    """Columns with the Image feature; else structs with encoded bytes that no other feature claims."""
    import pyarrow.types

    features = table.features
    declared = [name for name, feature in features.items() if feature.get("_type") == "Image"]
    structs = [
        field.name
        for field in table.schema
        if "_type" not in features.get(field.name, {})
        and pyarrow.types.is_struct(field.type)
        and field.type.get_field_index("bytes") >= 0
    ]
    return declared or structs


def _label_candidates(table: _Table) -> list[str]:
    """Columns with the ClassLabel feature; `_choose` falls back to the usual names."""
    return [name for name, feature in table.features.items() if feature.get("_type") == "ClassLabel"]


def _choose(
    table: _Table, key: str, wanted: str | None, candidates: list[str], usual: tuple[str, ...]
) -> str:
    """The column asked for, the only candidate, or the only one with a usual name; otherwise an error."""
    columns = table.schema.names
    if wanted is not None:
        if wanted not in columns:
            raise DataError(
                f"data.{key} = {wanted!r} is no column of {table.place}; columns are {columns}"
                f"{did_you_mean(wanted, columns)}"
            )
        return wanted
    if len(candidates) != 1:
        candidates = [name for name in candidates or columns if name in usual]
    if len(candidates) != 1:
        raise DataError(
            f"data.{key} cannot be inferred for {table.place}: {candidates or 'no column'} would fit; "
            f"name one of the columns {columns}"
        )
    return candidates[0]


def _decode_images(
    path: Path, table: _Table, column: str, channels: int, size: tuple[int, int] | None
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
        content = cell.get("bytes") or cell.get("path") if isinstance(cell, dict) else cell
        if not isinstance(content, (bytes, str)):
            found = "nothing" if content is None else f"a value of type {type(content).__name__}"
            raise DataError(
                f"{place} holds {found}; allowed are encoded images as bytes, or bytes with a path"
            )
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
