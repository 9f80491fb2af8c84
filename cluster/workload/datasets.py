"""Data sets as memory-mapped arrays: decoded once per node, afterwards only opened.

`prepare` is the one slow step. It turns scikit-learn's digits, a Hugging Face hub repository, a folder of
parquet files or a user's function into uint8 images [N, C, H, W] (spoken clips: float32 spectrograms) and
int64 labels in a folder named after a fingerprint. `open_dataset` maps that folder; it is all a client actor
calls, and it imports no decoder.

    folder = prepare(name="digits", cache_dir=Path("~/.cache/sparsyfed").expanduser())
    dataset = open_dataset(folder)          # dataset.train.images: uint8 [1437, 1, 8, 8]
"""

import hashlib
import json
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np

from cluster.references import DataError, did_you_mean
from cluster.workload import cache
from cluster.workload.shards import parquet_files

FORMAT_VERSION = 2  # part of every fingerprint: raise it when the arrays written below change


@dataclass(frozen=True, eq=False)
class Split:
    """One split of a data set.

    Attributes:
        images: uint8 [N, C, H, W], contiguous, read-only and memory-mapped; or float32, used as they are.
        labels: int64 [N], codes into `Dataset.classes`.
        groups: int64 [N], codes into `Dataset.group_names`; None without a group column. The test split has
            none, because only training data is divided among clients.
    """

    images: np.ndarray
    labels: np.ndarray
    groups: np.ndarray | None


@dataclass(frozen=True, eq=False)
class Dataset:
    """A prepared data set; `fingerprint` is the one in the name of its folder."""

    name: str
    train: Split
    classes: tuple[str, ...]
    group_names: tuple[str, ...] | None
    fingerprint: str
    folder: Path

    @cached_property
    def test(self) -> Split:
        """The test split, opened when it is first asked for: a search of hyperparameters never does."""
        return _open_split(self.folder, "test", None)

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """(channels, height, width) of every image, in pixels."""
        _, channels, height, width = self.train.images.shape
        return channels, height, width


def open_dataset(folder: Path) -> Dataset:
    """Map a folder that `prepare` returned; costs milliseconds and no memory until images are read.

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
    )


def _open_split(folder: Path, split: str, groups: np.ndarray | None) -> Split:
    # A plain view of the map: np.memmap's own indexing takes 1.7 times as long.
    images = _open(folder, f"{split}-images", mmap_mode="r").view(np.ndarray)
    return Split(images, _open(folder, f"{split}-labels"), groups)


def _open(folder: Path, name: str, mmap_mode: Literal["r"] | None = None) -> np.ndarray:
    try:
        return np.load(folder / f"{name}.npy", mmap_mode=mmap_mode)
    except (OSError, ValueError) as error:
        raise cache.incomplete(folder, error) from error


def prepare(
    *,
    name: str,
    path: str | None = None,
    image_column: str | None = None,
    label_column: str | None = None,
    group_column: str | None = None,
    revision: str | None = None,
    data_dir: str | None = None,
    train_split: str = "train",
    test_split: str = "test",
    features: str | None = None,
    exclude_classes: Sequence[str] = (),
    cache_dir: Path,
) -> Path:
    """Decode a data set into arrays once per node and return their folder.

    The folder is `cache_dir/<name>-<fingerprint>`. The fingerprint is computed before decoding, from what was
    asked (name, columns, splits, revision) and from the content: a hash of every local file, or of the arrays
    that a user's function returns, which is called every time. A hub repository is identified by its name and
    `revision` alone, so that a prepared one needs no network: pin `revision`, or delete the folder, where the
    repository may change. Processes that ask at the same time wait for one of them; an interrupted decode
    leaves nothing that is used, and a folder that was damaged since is decoded again.

    Args:
        name: `digits`, a hub repository such as `uoft-cs/cifar10`, or `module:attribute`: a function without
            arguments that returns `train_images`, `train_labels`, `test_images`, `test_labels` (uint8 [N, H,
            W] or [N, H, W, C], or float32, which is not scaled; integers [N]) and optionally `classes` and
            `train_groups`. With `path` it is only a name.
        path: Folder with `<split>-*.parquet`, `<split>.parquet` or `<split>/*.parquet`, directly or in its
            subfolder `data`.
        image_column: Column of encoded images or WAV clips; inferred from the features or the usual names.
        label_column: Column of integer or text labels; inferred likewise.
        group_column: Column whose values (writer, speaker, device) define the natural partition.
        revision: Branch, tag or commit of the hub repository.
        data_dir: Folder of the hub repository that holds the files, where it has several data sets.
        train_split: Split, or prefix of the local files, to train on.
        test_split: The same for the test set.
        features: What spoken clips become: `logmel` (64 mel bands x 98 frames, normalised by the mean and
            standard deviation of train; the default) or `waveform8k` (1 x 8000 raw samples).
        exclude_classes: Classes whose samples are left out, such as `_silence_`.
        cache_dir: Folder that holds the prepared data sets of this node.

    Raises:
        DataError: See the class; every cause has its own message.
    """
    columns = {"image_column": image_column, "label_column": label_column, "group_column": group_column}
    asked: dict[str, Any] = {"format": FORMAT_VERSION, "name": name, "revision": revision, **columns}
    asked |= {"train_split": train_split, "test_split": test_split, "data_dir": data_dir}
    asked |= {"features": features, "exclude_classes": list(exclude_classes)}
    generated = path is None and (name == "digits" or ":" in name)
    of_tables = {**columns, "revision": revision, "data_dir": data_dir, "features": features}
    for key, value in {**of_tables, "exclude_classes": list(exclude_classes) or None}.items():
        if generated and value is not None:
            raise DataError(f"data.{key} = {value!r} has no meaning for data.name = {name!r}: leave it out")
    of_hub = {"name": name if name == "digits" else None, "revision": revision, "data_dir": data_dir}
    for key, value in of_hub.items():
        if path is not None and value is not None:
            raise DataError(
                f"data.{key} = {value!r} has no meaning with data.path = {path!r}: leave one of them out"
            )
    cache_dir = Path(cache_dir)

    def ensure(content: Any, decode: Callable[[Path], dict[str, Any]]) -> Path:
        text = json.dumps({**asked, "content": content}, sort_keys=True)
        fingerprint = hashlib.sha256(text.encode()).hexdigest()[:12]
        folder = cache_dir / f"{_file_name(name)}-{fingerprint}"
        cache.ensure(folder, lambda part: {"name": name, "fingerprint": fingerprint, **decode(part)})
        return folder

    if generated:
        from cluster.workload.arrays import Arrays

        if name == "digits":
            return ensure(None, lambda folder: Arrays.digits().write(folder))
        # One process of a node at a time holds the arrays, whose hash is only known when they are there.
        with cache.locked(cache_dir / _file_name(name)):
            arrays = Arrays.returned_by(name)
            return ensure(arrays.digest(), arrays.write)

    from cluster.workload import decoding

    wanted = decoding.Wanted(columns, features, exclude_classes)
    if path is not None:
        files = [parquet_files(Path(path), split) for split in (train_split, test_split)]
        try:
            content = [[(file.name, cache.digest(file, cache_dir)) for file in part] for part in files]
        except OSError as error:
            raise DataError(f"data.path: {error.filename} cannot be read: {error.strerror}") from error
        return ensure(content, lambda folder: decoding.decode_parquet(folder, wanted, files=files))
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", name):
        raise DataError(
            f"data.name = {name!r} is no data set: use 'digits', a hub repository 'owner/name', your own "
            f"'module:attribute', or give data.path, a folder of parquet files"
            f"{did_you_mean(name, ['digits'])}"
        )
    hub = decoding.Hub(name, revision, data_dir, (train_split, test_split))
    return ensure(None, lambda folder: decoding.decode_hub(folder, wanted, hub))


def _file_name(name: str) -> str:
    return re.sub(r"[^A-Za-z0-9._]+", "-", name)


def hold_out(labels: np.ndarray, fraction: float, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Set a stratified share of the training samples aside, to select hyperparameters on.

    Every class gives its share; what rounding leaves over goes to the largest remainders, so the validation
    set has exactly round(fraction N) samples and each class is within one sample of its share.

    Args:
        labels: int64 [N].
        fraction: Share held out, in [0, 1); 0 holds nothing out.
        seed: The only source of randomness.

    Returns:
        (kept, validation): sorted int64 indices that together are 0..N-1.

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
    held = np.zeros(labels.size, dtype=bool)
    for code, quota in enumerate(quotas):
        held[generator.permutation(np.flatnonzero(codes == code))[:quota]] = True
    return np.flatnonzero(~held), np.flatnonzero(held)
