"""A split is all of its files, each once."""

import io

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from cluster.workload.datasets import DataError, open_dataset
from cluster.workload.preparing import prepare
from tests.cluster.workload.parquet_folders import encoded, pictures


def opened(tmp_path):
    return open_dataset(prepare(name="mine", path=str(tmp_path / "set"), cache_dir=tmp_path / "cache"))


def touch(folder, *names):
    buffer = io.BytesIO()
    cells = [{"bytes": encoded(pictures(1, (4, 4))[0]), "path": None}]
    pq.write_table(pa.table({"image": cells, "label": [0]}), buffer)
    for name in (*names, "test.parquet"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(buffer.getvalue())


@pytest.mark.parametrize(
    ("names", "match"),
    [
        (["train-00000-of-00003.parquet"], "number 00001, 00002 of 3 is missing"),
        (["train-00001-of-00002.parquet"], "number 00000 of 2 is missing"),
        (["train-00000-of-00002-1a2b.parquet"], "number 00001 of 2 is missing"),
        (["train/train-00000-of-00002.parquet"], "number 00001 of 2 is missing"),
        (["train/0000.parquet", "train/0002.parquet"], "number 0001 of 3 is missing"),
        (["train-00000-of-00001-1a2b.parquet", "train-00000-of-00001-3c4d.parquet"], "a number occurs twice"),
        (
            ["train-00000-of-00001.parquet", "train-00000-of-00002.parquet", "train-00001-of-00002.parquet"],
            "more than once, as train-00000-of-00001.parquet and as train-00000-of-00002.parquet",
        ),
        (["train-00000-of-00001.parquet", "train.parquet"], "as train.parquet and as train-00000-of-00001"),
        (["train-00000-of-00001.parquet", "train/0000.parquet"], "more than once"),
        (["train-00000-of-00001.parquet", "train-extra-00000-of-00001.parquet"], "as train-extra-00000"),
        (["train-00000-of-00001.parquet", "train-new.parquet"], "as train-new.parquet"),
    ],
)
def test_incomplete_and_mixed_sets_of_files_are_refused(tmp_path, names, match):
    touch(tmp_path / "set", *names)
    with pytest.raises(DataError, match=match):
        opened(tmp_path)


@pytest.mark.parametrize(
    "names",
    [
        ["train-00000-of-00002.parquet", "train-00001-of-00002.parquet"],
        ["train-00000-of-00002-1a2b.parquet", "train-00001-of-00002-3c4d.parquet"],
        ["data/train-00001-of-00002.parquet", "data/train-00000-of-00002.parquet"],
        ["train/0000.parquet", "train/0001.parquet"],
        ["train/1.parquet", "train/2.parquet"],
        ["train/2021.parquet", "train/2023.parquet"],  # years
        ["train-a.parquet", "train-b.parquet"],
    ],
)
def test_complete_sets_of_files_are_read(tmp_path, names):
    touch(tmp_path / "set", *names)
    (tmp_path / "set" / "data").mkdir(exist_ok=True)
    (tmp_path / "set" / "test.parquet").rename(
        tmp_path / "set" / ("data" if names[0].startswith("data") else ".") / "test.parquet"
    )
    assert len(opened(tmp_path).train.targets) == 2
