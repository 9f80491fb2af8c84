"""The one slow step: decode a data set into arrays, once a node."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from cluster.references import DataError, did_you_mean
from cluster.workload import cache
from cluster.workload.embedded import TABLES, write_table
from cluster.workload.shards import parquet_files
from cluster.workload.simulated import SIMULATION, write_simulation
from cluster.workload.text import DEFAULT_LENGTH, DEFAULT_TOKENIZER, Documents, TextForm, write_text
from cluster.workload.tokens import tokenizer_file

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
    columns: Sequence[str] | None = None,
    image_size: int | None = None,
    revision: str | None = None,
    data_dir: str | None = None,
    train_split: str = "train",
    test_split: str = "test",
    features: str | None = None,
    exclude_classes: Sequence[str] = (),
    takes_text: bool = False,
    targets: str = "classes",
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
            and `train_groups`; or `train` and `test`, tables of columns that are read like files. With `path`
            it is only a name.
        path: Folder with `<split>-*.parquet`, `<split>.parquet` or `<split>/*.parquet`, directly or in its
            subfolder `data`.
        image_column: Column of encoded images or WAV clips; inferred from the features or the usual names.
        label_column: Column of the targets; inferred likewise.
        text_column: Column of texts; inferred likewise.
        group_column: Column whose values (writer, speaker, device) define the natural partition.
        columns: Columns of numbers and categories that are inputs; all others where there are no images.
        image_size: Pixels a side of every image; None where they have one size already.
        revision: Branch, tag or commit of the hub repository.
        data_dir: Folder of the hub repository that holds the files, where it has several data sets.
        train_split: Split, or prefix of the local files, to train on; of a hub repository also a part of a
            split, such as `train[:90%]`.
        test_split: The same for the test set.
        features: What spoken clips become: `logmel` (64 mel bands x 98 frames, normalised by the mean and
            standard deviation of train; the default) or `waveform8k` (1 x 8000 raw samples).
        exclude_classes: Classes whose samples are left out, such as `_silence_`.
        takes_text: Whether text is what is asked for; it is too where a column of it is named.
        targets: What the label column holds, see :mod:`cluster.workload.targets`; `tokens`: nothing, those of
            the text are foretold.
        tokenizer: What a text's tokens are, see `cluster.workload.tokens`.
        length: Tokens of a sample of text.
        cache_dir: Folder that holds the prepared data sets of this node.

    Raises:
        DataError: See the class; every cause has its own message.
    """
    by_key = {"image_column": image_column, "label_column": label_column, "group_column": group_column}
    asked: dict[str, Any] = {"format": FORMAT_VERSION, "name": name, "revision": revision, **by_key}
    asked |= {"train_split": train_split, "test_split": test_split, "data_dir": data_dir}
    asked |= {"features": features, "exclude_classes": list(exclude_classes)}
    if image_size is not None:  # no prepared data set of an earlier version gets another name
        asked |= {"image_size": image_size}
    embedded = path is None and name in EMBEDDED
    text = None
    if takes_text or text_column is not None or (path is None and name == TINY_TEXT):
        text = TextForm(text_column, tokenizer or DEFAULT_TOKENIZER, length or DEFAULT_LENGTH)
        targets = targets if takes_text else "tokens"
        asked |= {"text": asdict(text)}
        if (file := tokenizer_file(text.tokenizer)) is not None:
            asked["text"]["tokenizer"] = cache.digest(file, Path(cache_dir))  # wherever it lies
    if targets != ("classes" if text is None else "tokens") and (text is not None or not embedded):
        asked["targets"] = targets
    if columns is not None:
        asked["columns"] = list(columns)
    of_images = {"image_column": image_column, "features": features, "image_size": image_size}
    _refuse(
        {"tokenizer": tokenizer, "length": length} if text is None
        else {"columns": columns, **of_images},
        "for text" if text is not None
        else "without text (objective.name=language_model or sequence_classification)",
    )  # fmt: skip
    if columns is not None:
        _refuse(of_images, "beside data.columns")
    excluded = {"exclude_classes": list(exclude_classes) or None}
    if targets == "tokens":
        labels = "objective.name=sequence_classification learns labels of texts"
        _refuse({"label_column": label_column, **excluded}, f"for text that is foretold ({labels})")
    elif targets != "classes":
        _refuse(excluded, f"where targets are {targets.replace('_', ' ')}")
    of_tables = {**by_key, **of_images, "text_column": text_column, "columns": columns, **excluded}
    of_hub = {"revision": revision, "data_dir": data_dir}
    if embedded or (path is None and ":" in name):
        _refuse(of_hub, f"for data.name = {name!r}")
    if embedded:
        _refuse(of_tables, f"for data.name = {name!r}")
    if path is not None:
        of_hub |= {"name": name if name in EMBEDDED else None}
        _refuse(of_hub, f"with data.path = {path!r}", "leave one of them out")
    cache_dir = Path(cache_dir)

    def ensure(content: Any, decode: Callable[[Path], dict[str, Any]]) -> Path:
        text = json.dumps({**asked, "content": content}, sort_keys=True)
        fingerprint = hashlib.sha256(text.encode()).hexdigest()[:12]
        folder = cache_dir / f"{_file_name(name)}-{fingerprint}"
        cache.ensure(folder, lambda part: {"name": name, "fingerprint": fingerprint, **decode(part)})
        return folder

    if embedded and (text is not None) != (name == TINY_TEXT):
        raise _no_text(name)
    if embedded and text is not None:
        return ensure(None, lambda folder: _write_tiny_text(folder, text, targets))
    if embedded and name in TABLES:
        return ensure(None, lambda folder: write_table(name, folder))
    if embedded and name == SIMULATION:
        return ensure(None, write_simulation)
    if embedded:
        from cluster.workload.arrays import Arrays

        return ensure(None, lambda folder: Arrays.digits().write(folder))

    from cluster.workload import decoding
    from cluster.workload.tables import digest, given_table

    wanted = decoding.Wanted(by_key, columns, targets, features, exclude_classes, text, image_size)
    if path is None and ":" in name:
        from cluster.workload.arrays import Arrays, returned_by

        # One process of a node at a time holds what is returned, whose hash is only known when it is there.
        with cache.locked(cache_dir / _file_name(name)):
            returned = returned_by(name)
            if isinstance(returned, Mapping) and {"train", "test"} == set(returned):
                tables = [given_table(f"{split} of {name!r}", returned[split]) for split in ("train", "test")]
                return ensure(
                    [digest(table) for table in tables],
                    lambda folder: decoding.decode_tables(folder, wanted, *tables),
                )
            _refuse(of_tables, f"for data.name = {name!r}, whose function returns no tables")
            if text is not None:
                raise _no_text(name)
            arrays = Arrays.of(returned, name)
            return ensure(arrays.digest(), arrays.write)
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


def _refuse(values: Mapping[str, Any], where: str, fix: str = "leave it out") -> None:
    """Refuse keys of `data` that are given and mean nothing."""
    for key, value in values.items():
        if value is not None:
            raise DataError(f"data.{key} = {value!r} has no meaning {where}: {fix}")


def _no_text(name: str) -> DataError:
    return DataError(
        f"data.name = {name!r} holds no text; use {TINY_TEXT}, a hub repository 'owner/name', or give "
        "data.path, a folder of parquet files"
    )


def _write_tiny_text(folder: Path, form: TextForm, targets: str) -> dict[str, Any]:
    """The embedded text; where it is not foretold, who says it is what is learned."""
    from cluster.workload.tiny_text import texts

    made = texts()
    if targets == "tokens":
        splits = {
            split: Documents(f"{TINY_TEXT}, {split}", made[f"{split}_texts"].copy)
            for split in ("train", "test")
        }
        return write_text(folder, form, splits, list(made["train_groups"]))
    from cluster.workload import decoding
    from cluster.workload.tables import given_table

    columns = {"image_column": None, "label_column": "speaker", "group_column": "speaker"}
    tables = [
        given_table(
            f"{TINY_TEXT}, {split}", {"text": made[f"{split}_texts"], "speaker": made[f"{split}_groups"]}
        )
        for split in ("train", "test")
    ]
    wanted = decoding.Wanted(columns, targets=targets, text=form)
    return decoding.decode_tables(folder, wanted, *tables)


def _file_name(name: str) -> str:
    return re.sub(r"[^A-Za-z0-9._]+", "-", name)
