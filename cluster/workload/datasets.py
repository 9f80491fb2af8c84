"""Data sets as memory-mapped arrays: decoded once per node, afterwards only opened.

`prepare` is the one slow step. It turns scikit-learn's digits, a Hugging Face hub repository, a folder of
parquet files or a user's function into uint8 images [N, C, H, W] (spoken clips: float32 spectrograms; text:
tokens) and int64 labels in a folder named after a fingerprint. `open_dataset` maps that folder; it is all a
client actor calls, and it imports no decoder.

    folder = prepare(name="digits", cache_dir=Path("~/.cache/sparsyfed").expanduser())
    dataset = open_dataset(folder)          # dataset.train.inputs: uint8 [1437, 1, 8, 8]
"""

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Literal

import numpy as np

from cluster.references import DataError
from cluster.workload import cache


@dataclass(frozen=True, eq=False)
class Split:
    """One split of a data set.

    Attributes:
        inputs: [N, ...], contiguous, read-only and memory-mapped: images uint8 [N, C, H, W]; numbers of any
            floating type; tokens of any other integer type. See :mod:`cluster.workload.inputs`.
        targets: [N, ...], what the objective compares a model's outputs with: of classes int64 [N], codes
            into `Dataset.classes`.
        groups: int64 [N], codes into `Dataset.group_names`; None without a group column. The test split has
            none, because only training data is divided among clients.
    """

    inputs: np.ndarray
    targets: np.ndarray
    groups: np.ndarray | None


@dataclass(frozen=True, eq=False)
class Dataset:
    """A prepared data set; `fingerprint` is the one in the name of its folder.

    `classes` names the classes, in the order of their codes; it is empty where the targets are none.
    `vocabulary` names the tokens of a text likewise.
    """

    name: str
    train: Split
    classes: tuple[str, ...]
    group_names: tuple[str, ...] | None
    fingerprint: str
    folder: Path
    vocabulary: tuple[str, ...] = ()

    @cached_property
    def test(self) -> Split:
        """The test split, opened when it is first asked for: a search of hyperparameters never does."""
        return _open_split(self.folder, "test", None)

    @property
    def input_shape(self) -> tuple[int, ...]:
        """Shape of one sample's inputs: of images (channels, height, width), in pixels."""
        return tuple(self.train.inputs.shape[1:])


def open_dataset(folder: Path) -> Dataset:
    """Map a folder that `prepare` returned; costs milliseconds and no memory until inputs are read.

    Raises:
        DataError: The folder is not one that `prepare` completed, or was damaged since.
    """
    folder = Path(folder)
    meta = cache.read_meta(folder)
    groups = None if meta["group_names"] is None else _open(folder, "train-groups")
    return Dataset(
        name=meta["name"],
        train=_open_split(folder, "train", groups),
        classes=tuple(meta["classes"]),
        group_names=None if groups is None else tuple(meta["group_names"]),
        fingerprint=meta["fingerprint"],
        folder=folder,
        vocabulary=tuple(meta.get("vocabulary", ())),
    )


def _open_split(folder: Path, split: str, groups: np.ndarray | None) -> Split:
    # A plain view of the map: np.memmap's own indexing takes 1.7 times as long.
    inputs = _open(folder, f"{split}-images", mmap_mode="r").view(np.ndarray)
    return Split(inputs, _open(folder, f"{split}-labels"), groups)


def _open(folder: Path, name: str, mmap_mode: Literal["r"] | None = None) -> np.ndarray:
    try:
        return np.load(folder / f"{name}.npy", mmap_mode=mmap_mode)
    except (OSError, ValueError) as error:
        raise cache.incomplete(folder, error) from error


def stratified_split(labels: np.ndarray, fraction: float, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Draw a stratified share of samples: validation data of the training split, or the digits' test split.

    Every class gives its share; what rounding leaves over goes to the largest remainders, so that
    exactly round(fraction N) samples are drawn and each class is within one sample of its share.

    Args:
        labels: int64 [N].
        fraction: Share drawn, in [0, 1).
        seed: The only source of randomness.

    Returns:
        (rest, drawn): sorted int64 indices that together are 0..N-1.

    Raises:
        DataError: `fraction` is outside [0, 1), or above 0 but too small for a single sample.
    """
    if not 0 <= fraction < 1:
        raise DataError(f"data.validation fraction {fraction} is outside [0, 1)")
    total = round(fraction * labels.size)
    if fraction > 0 and total == 0:
        raise DataError(f"data.validation fraction {fraction} of {labels.size} samples is not one sample")
    generator = np.random.Generator(np.random.PCG64(seed))
    _, codes, counts = np.unique(labels, return_inverse=True, return_counts=True)
    # In integers, so that equal remainders tie exactly: the lower class gives first.
    quotas, remainders = np.divmod(counts * total, max(labels.size, 1))
    quotas[np.argsort(-remainders, kind="stable")[: total - quotas.sum()]] += 1
    drawn = np.zeros(labels.size, dtype=bool)
    for code, quota in enumerate(quotas):
        drawn[generator.permutation(np.flatnonzero(codes == code))[:quota]] = True
    return np.flatnonzero(~drawn), np.flatnonzero(drawn)
