"""The one slow step: decode a data set into arrays, once a node."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from cluster.references import DataError, did_you_mean
from cluster.workload import cache
from cluster.workload.embedded import TABLES, write_table
from cluster.workload.shards import parquet_files
from cluster.workload.simulated import SIMULATION, write_simulation
from cluster.workload.text import DEFAULT_LENGTH, DEFAULT_TOKENIZER, Documents, TextForm, write_text

TINY_TEXT = "tiny_text"
#: What needs no download.
EMBEDDED = ("digits", *TABLES, TINY_TEXT, SIMULATION)

FORMAT_VERSION = 2  # part of every fingerprint: raise it when the arrays written below change


def prepare(
    *,
    name: str,
    path: str | None = None,
    image_column: str | None = None,
    label_column: str | None = None,
    text_column: str | None = None,
    group_column: str | None = None,
    image_size: int | None = None,
    revision: str | None = None,
    data_dir: str | None = None,
    train_split: str = "train",
    test_split: str = "test",
    features: str | None = None,
    exclude_classes: Sequence[str] = (),
    takes_text: bool = False,
    tokenizer: str | None = None,
    length: int | None = None,
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
        name: One of `EMBEDDED`, a hub repository such as `uoft-cs/cifar10`, or `module:attribute`: a function
            without arguments that returns `train_images`, `train_labels`, `test_images`, `test_labels` (uint8
            [N, H, W] or [N, H, W, C], or float32, which is not scaled; integers [N]) and optionally `classes`
            and `train_groups`. With `path` it is only a name.
        path: Folder with `<split>-*.parquet`, `<split>.parquet` or `<split>/*.parquet`, directly or in its
            subfolder `data`.
        image_column: Column of encoded images or WAV clips; inferred from the features or the usual names.
        label_column: Column of integer or text labels; inferred likewise.
        text_column: Column of texts; inferred likewise.
        group_column: Column whose values (writer, speaker, device) define the natural partition.
        image_size: Pixels a side of every image; None where they have one size already.
        revision: Branch, tag or commit of the hub repository.
        data_dir: Folder of the hub repository that holds the files, where it has several data sets.
        train_split: Split, or prefix of the local files, to train on.
        test_split: The same for the test set.
        features: What spoken clips become: `logmel` (64 mel bands x 98 frames, normalised by the mean and
            standard deviation of train; the default) or `waveform8k` (1 x 8000 raw samples).
        exclude_classes: Classes whose samples are left out, such as `_silence_`.
        takes_text: Whether text is what is asked for; it is too where a column of it is named.
        tokenizer: What a text's tokens are, a key of `cluster.workload.text.TOKENIZERS`.
        length: Tokens of a sample of text.
        cache_dir: Folder that holds the prepared data sets of this node.

    Raises:
        DataError: See the class; every cause has its own message.
    """
    columns = {"image_column": image_column, "label_column": label_column, "group_column": group_column}
    asked: dict[str, Any] = {"format": FORMAT_VERSION, "name": name, "revision": revision, **columns}
    asked |= {"train_split": train_split, "test_split": test_split, "data_dir": data_dir}
    asked |= {"features": features, "exclude_classes": list(exclude_classes)}
    if image_size is not None:  # no prepared data set of an earlier version gets another name
        asked |= {"image_size": image_size}
    text = None
    if takes_text or text_column is not None or (path is None and name == TINY_TEXT):
        text = TextForm(text_column, tokenizer or DEFAULT_TOKENIZER, length or DEFAULT_LENGTH)
        asked |= {"text": asdict(text)}
    elsewhere: dict[str, Any] = {"tokenizer": tokenizer, "length": length}
    if text is not None:
        elsewhere = {**columns, "features": features, "exclude_classes": list(exclude_classes) or None}
        elsewhere |= {"image_size": image_size}
        del elsewhere["group_column"]
    for key, value in elsewhere.items():
        if value is not None:
            where = "for text" if text is not None else "without text (objective.name=language_model)"
            raise DataError(f"data.{key} = {value!r} has no meaning {where}: leave it out")
    generated = path is None and (name in EMBEDDED or ":" in name)
    of_tables = {
        **columns,
        "text_column": text_column,
        "revision": revision,
        "data_dir": data_dir,
        "features": features,
        "image_size": image_size,
    }
    for key, value in {**of_tables, "exclude_classes": list(exclude_classes) or None}.items():
        if generated and value is not None:
            raise DataError(f"data.{key} = {value!r} has no meaning for data.name = {name!r}: leave it out")
    of_hub = {"name": name if name in EMBEDDED else None, "revision": revision, "data_dir": data_dir}
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

    if generated and text is not None:
        if name != TINY_TEXT:
            raise DataError(
                f"data.name = {name!r} holds no text; use {TINY_TEXT}, a hub repository 'owner/name', or "
                "give data.path, a folder of parquet files"
            )
        return ensure(None, lambda folder: _write_tiny_text(folder, text))
    if generated:
        from cluster.workload.arrays import Arrays

        if name == "digits":
            return ensure(None, lambda folder: Arrays.digits().write(folder))
        if name in TABLES:
            return ensure(None, lambda folder: write_table(name, folder))
        if name == SIMULATION:
            return ensure(None, write_simulation)
        # One process of a node at a time holds the arrays, whose hash is only known when they are there.
        with cache.locked(cache_dir / _file_name(name)):
            arrays = Arrays.returned_by(name)
            return ensure(arrays.digest(), arrays.write)

    from cluster.workload import decoding

    wanted = decoding.Wanted(columns, features, exclude_classes, text, image_size)
    if path is not None:
        files = [parquet_files(Path(path), split) for split in (train_split, test_split)]
        try:
            content = [[(file.name, cache.digest(file, cache_dir)) for file in part] for part in files]
        except OSError as error:
            raise DataError(f"data.path: {error.filename} cannot be read: {error.strerror}") from error
        return ensure(content, lambda folder: decoding.decode_parquet(folder, wanted, files=files))
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", name):
        raise DataError(
            f"data.name = {name!r} is no data set: use {', '.join(EMBEDDED)}, a hub repository 'owner/name', "
            f"your own 'module:attribute', or give data.path, a folder of parquet files"
            f"{did_you_mean(name, EMBEDDED)}"
        )
    hub = decoding.Hub(name, revision, data_dir, (train_split, test_split))
    return ensure(None, lambda folder: decoding.decode_hub(folder, wanted, hub))


def _write_tiny_text(folder: Path, form: TextForm) -> dict[str, Any]:
    from cluster.workload.tiny_text import texts

    made = texts()
    splits = {
        split: Documents(f"{TINY_TEXT}, {split}", made[f"{split}_texts"].copy) for split in ("train", "test")
    }
    return write_text(folder, form, splits, list(made["train_groups"]))


def _file_name(name: str) -> str:
    return re.sub(r"[^A-Za-z0-9._]+", "-", name)
