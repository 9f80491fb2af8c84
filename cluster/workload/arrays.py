"""Data sets that are arrays already: scikit-learn's digits, and what a function of a user's own returns."""

from __future__ import annotations

import inspect
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import xxhash

from cluster.references import DataError, did_you_mean, load_reference
from cluster.workload import cache
from cluster.workload.datasets import stratified_split
from cluster.workload.labels import LabelCodes, group_codes

_REQUIRED = ("train_images", "train_labels", "test_images", "test_labels")
_OPTIONAL = ("classes", "train_groups")
_ROWS = 1024  # images looked at or written at once
DIGITS_TEST_SAMPLES = 360  # a fifth of the 1,797 digits
DIGITS_SPLIT_SEED = 1337


@dataclass(frozen=True)
class Arrays:
    """A data set in memory, checked.

    Attributes:
        images: uint8 or float32 [N, H, W, C] by split.
        labels: int64 [N] by split.
        classes: Names of the classes.
        groups: Codes of the training groups, int64 [N], and their names; None without any.
    """

    images: Mapping[str, np.ndarray]
    labels: Mapping[str, np.ndarray]
    classes: list[str]
    groups: tuple[np.ndarray, list[str]] | None

    @classmethod
    def of(cls, arrays: Any, name: str) -> Arrays:
        """Check a dictionary of arrays; see :func:`cluster.workload.datasets.prepare`."""
        keys = list(map(str, arrays)) if isinstance(arrays, Mapping) else []
        unknown = [key for key in keys if key not in _REQUIRED + _OPTIONAL]
        if unknown or not set(_REQUIRED) <= set(keys):
            hint = did_you_mean(unknown[0], set(_REQUIRED + _OPTIONAL) - set(keys)) if unknown else ""
            raise DataError(
                f"data.name = {name!r} must return a dictionary with {sorted(_REQUIRED)} and optionally "
                f"'classes', 'train_groups', or tables 'train' and 'test'; found "
                f"{sorted(keys) if keys else _a(arrays)}{hint}"
            )
        images: dict[str, np.ndarray] = {}
        labels: dict[str, np.ndarray] = {}
        codes: LabelCodes | None = None
        for split in ("train", "test"):
            images[split] = _images(_array(arrays, f"{split}_images", name), f"{split}_images of {name!r}")
            shapes = [list(each.shape) for each in images.values()]
            if shapes[-1][1:] != shapes[0][1:]:
                raise DataError(
                    f"{split}_images of {name!r} has shape {shapes[-1]}; expected the same [H, W, C] in both "
                    f"splits (train: {shapes[0][1:]})"
                )
            if images[split].dtype != images["train"].dtype:
                raise DataError(
                    f"{split}_images of {name!r} is {images[split].dtype}, train_images is "
                    f"{images['train'].dtype}; expected one type in both: uint8 is scaled, float32 is not"
                )
            place = f"{split}_labels of {name!r}"
            values = _array(arrays, f"{split}_labels", name)
            if values.shape != images[split].shape[:1] or values.dtype.kind not in "iu":
                raise DataError(
                    f"{place} is {values.dtype} {list(values.shape)}; allowed are integers "
                    f"[{len(images[split])}], one for each image"
                )
            stored = values.tolist()
            if codes is None and arrays.get("classes") is not None:
                codes = LabelCodes.counted(_names(arrays["classes"], name), f"classes of {name!r}")
            codes = codes or LabelCodes.of(stored, [], place)
            labels[split] = codes.encode(stored, place)
        assert codes is not None
        return cls(images, labels, codes.classes, _groups(arrays, name))

    @classmethod
    def digits(cls) -> Arrays:
        """scikit-learn's handwritten digits, 8x8 pixels of 0..16, in a fixed stratified split."""
        try:
            from sklearn.datasets import load_digits
        except ModuleNotFoundError:
            raise DataError(
                "data.name = 'digits' is a part of scikit-learn, which is not installed here; install it "
                "(pip install scikit-learn), or give data.path, a folder of parquet files"
            ) from None

        stored = load_digits()
        images = np.rint(stored.images * (255 / 16)).astype(np.uint8)
        labels = stored.target.astype(np.int64)
        train, test = stratified_split(labels, DIGITS_TEST_SAMPLES / labels.size, DIGITS_SPLIT_SEED)
        arrays = {"train_images": images[train], "train_labels": labels[train]}
        return cls.of(arrays | {"test_images": images[test], "test_labels": labels[test]}, "digits")

    def digest(self) -> str:
        """Hash of all arrays and names."""
        hashed = xxhash.xxh3_128(json.dumps([self.classes, self.groups and self.groups[1]]).encode())
        groups = [] if self.groups is None else [self.groups[0]]
        for array in (*self.images.values(), *self.labels.values(), *groups):
            hashed.update(f"{array.dtype} {array.shape}".encode())
            for start in range(0, len(array), _ROWS):
                hashed.update(np.ascontiguousarray(array[start : start + _ROWS]).data)
        return hashed.hexdigest()

    def write(self, folder: Path) -> dict[str, Any]:
        """Write the arrays, images with channels first; returns the names for meta.json."""
        for split, images in self.images.items():
            rows, height, width, channels = images.shape
            shape = (rows, channels, height, width)
            written = cache.new_array(folder / f"{split}-images.npy", images.dtype.type, shape)
            for start in range(0, rows, _ROWS):
                written[start : start + _ROWS] = images[start : start + _ROWS].transpose(0, 3, 1, 2)
            written.flush()
            cache.save(folder / f"{split}-labels.npy", self.labels[split])
        if self.groups is not None:
            cache.save(folder / "train-groups.npy", self.groups[0])
        return {"classes": self.classes, "group_names": None if self.groups is None else self.groups[1]}


def returned_by(reference: str) -> Any:
    """What a user's function ``module:attribute`` returns.

    Raises:
        DataError: It is no function without arguments.
    """
    function = load_reference("data.name", reference, DataError)
    found = f"data.name = {reference!r} is {_a(function)}; allowed is a function without arguments"
    if not callable(function):
        raise DataError(found)
    try:
        inspect.signature(function).bind()
    except TypeError as error:
        raise DataError(f"{found} ({error})") from error
    except ValueError:  # a function in C that does not tell
        pass
    return function()


def refuse_not_finite(images: np.ndarray, place: str, first: int = 0) -> None:
    """Refuse pixels that are no numbers, of which one spoils every update of the client that holds it.

    Args:
        images: float32 [N, ...].
        place: What they are, for the message.
        first: Row of the first one.
    """
    for start in range(0, len(images), _ROWS):
        rows = images[start : start + _ROWS].reshape(min(_ROWS, len(images) - start), -1)
        finite = np.isfinite(rows)
        if not finite.all():
            row = int(np.flatnonzero(~finite.all(axis=1))[0])
            raise DataError(
                f"{place}: row {first + start + row} holds {rows[row][~finite[row]][0]}; every pixel must be "
                "a finite number"
            )


def _array(arrays: Mapping[str, Any], key: str, name: str) -> np.ndarray:
    try:
        return np.asarray(arrays[key])
    except (ValueError, TypeError, RuntimeError) as error:  # ragged lists, tensors of a GPU
        raise DataError(f"{key} of {name!r} is no array: {str(error).splitlines()[0]}") from error


def _images(images: np.ndarray, place: str) -> np.ndarray:
    """[N, H, W, C], of a type that is kept."""
    found = f"{place} is {images.dtype} {list(images.shape)}"
    if images.ndim == 3:
        images = images[..., None]
    if images.dtype not in (np.uint8, np.float32) or images.ndim != 4 or not 1 <= images.shape[3] <= 4:
        raise DataError(
            f"{found}; allowed is uint8 or float32 [N, H, W] or [N, H, W, C] with 1 to 4 channels last"
        )
    if images.size == 0:
        raise DataError(f"{found}; expected at least one image, of at least one pixel")
    if images.dtype == np.float32:
        refuse_not_finite(images, place)
    return images


def _names(classes: Any, name: str) -> list[str]:
    if isinstance(classes, (str, bytes, Mapping)) or not hasattr(classes, "__iter__"):
        raise DataError(f"classes of {name!r} is {_a(classes)}; allowed is a list of names")
    return [str(one) for one in classes]


def _groups(arrays: Mapping[str, Any], name: str) -> tuple[np.ndarray, list[str]] | None:
    if arrays.get("train_groups") is None:
        return None
    groups, rows = _array(arrays, "train_groups", name), len(arrays["train_labels"])
    if groups.ndim != 1:
        raise DataError(f"train_groups of {name!r} has shape {list(groups.shape)}; allowed is [{rows}]")
    if len(groups) != rows:
        raise DataError(f"train_groups of {name!r} has {len(groups)} entries for {rows} images")
    return group_codes(groups.tolist(), name)


def _a(thing: Any) -> str:
    """What something is, for a message."""
    if thing is None:
        return "None"
    kind = thing.__name__ if inspect.isclass(thing) or inspect.isfunction(thing) else type(thing).__name__
    return f"a class ({kind})" if inspect.isclass(thing) else f"{kind!r}"
