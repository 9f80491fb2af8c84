"""Labels mean the same in every file: classes by name, codes as they are, ids one by one."""

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from cluster.workload.datasets import DataError, open_dataset
from cluster.workload.labels import LabelCodes, group_codes
from cluster.workload.preparing import prepare
from tests.cluster.workload.parquet_folders import encoded, pictures, write_split


def class_label(*names):
    return {"image": {"_type": "Image"}, "label": {"_type": "ClassLabel", "names": list(names)}}


def write(folder, file, labels, features=None):
    images = [encoded(one) for one in pictures(len(labels), (4, 4))]
    write_split(folder, "part", images, labels, features=features)
    (folder / "part-00000-of-00001.parquet").rename(folder / file)


def opened(tmp_path, **options):
    return open_dataset(
        prepare(name="mine", path=str(tmp_path / "set"), cache_dir=tmp_path / "cache", **options)
    )


# --- named classes


def test_every_file_has_its_own_order_of_the_names(tmp_path):
    write(tmp_path / "set", "train-0.parquet", [0, 1, 2], class_label("cat", "dog", "emu"))
    write(tmp_path / "set", "train-1.parquet", [0, 1, 2], class_label("emu", "cat", "dog"))
    write(tmp_path / "set", "test.parquet", [0, 1], class_label("dog", "cat"))
    dataset = opened(tmp_path)
    assert dataset.classes == ("cat", "dog", "emu")
    assert dataset.train.targets.tolist() == [0, 1, 2, 2, 0, 1]
    assert dataset.test.targets.tolist() == [1, 0]


def test_names_that_one_file_of_train_has_alone_are_classes_too(tmp_path):
    write(tmp_path / "set", "train-0.parquet", [0, 0], class_label("dog"))
    write(tmp_path / "set", "train-1.parquet", [0, 1], class_label("cat", "ant"))
    write(tmp_path / "set", "test.parquet", ["ant", "dog"])  # the same names as texts
    dataset = opened(tmp_path)
    assert dataset.classes == ("dog", "cat", "ant")
    assert dataset.train.targets.tolist() == [0, 0, 1, 2]
    assert dataset.test.targets.tolist() == [2, 0]


def test_classes_left_out_are_left_out_by_name(tmp_path):
    write(tmp_path / "set", "train.parquet", [0, 1, 2], class_label("cat", "dog", "emu"))
    write(tmp_path / "set", "test.parquet", [0, 1, 2], class_label("emu", "dog", "cat"))
    dataset = opened(tmp_path, exclude_classes=["dog"])
    assert dataset.classes == ("cat", "emu")
    assert dataset.test.targets.tolist() == [1, 0]


NAMED, TEXTS, CODES = ([0, 1], class_label("cat", "dog")), (["cat", "dog"], None), ([0, 1], None)


@pytest.mark.parametrize(
    ("train", "test", "match"),
    [
        (
            TEXTS,
            CODES,
            "integers such as 0, those of the training split named classes or texts such as 'cat'",
        ),
        (
            NAMED,
            CODES,
            "integers such as 0, those of the training split named classes or texts such as 'cat'",
        ),
        (CODES, TEXTS, "texts such as 'cat', those of the training split integers such as 0"),
        (CODES, NAMED, "texts such as 'cat', those of the training split integers such as 0"),
        (NAMED, ([0, 1], class_label("cat", "cow")), r"holds \['cow'\], which the training split does not"),
        (NAMED, ([0, -1], class_label("cat", "dog")), r"row 1 holds -1.*there is no label"),
        (([0, 2], class_label("cat", "dog")), NAMED, r"row 1 holds 2; allowed are 0\.\.1"),
        (([0, 1], class_label("cat", "cat")), NAMED, r"the class names hold \['cat'\] more than once"),
        (([0.0, 1.0], None), CODES, "row 0 holds 0.0.*convert them to integers"),
    ],
)
def test_labels_that_do_not_belong_together(tmp_path, train, test, match):
    write(tmp_path / "set", "train.parquet", *train)
    write(tmp_path / "set", "test.parquet", *test)
    with pytest.raises(DataError, match=match):
        opened(tmp_path)


def test_files_of_a_split_that_differ_in_kind_are_refused(tmp_path):
    write(tmp_path / "set", "train-0.parquet", *NAMED)
    write(tmp_path / "set", "train-1.parquet", *CODES)
    write(tmp_path / "set", "test.parquet", *NAMED)
    with pytest.raises(DataError, match="row 2 holds 0; allowed are integers or texts, never both"):
        opened(tmp_path)


def test_dictionary_columns_are_texts(tmp_path):
    for split, labels in (("train", ["b", "a"]), ("test", ["a", "b"])):
        cells = [{"bytes": encoded(one), "path": None} for one in pictures(2, (4, 4))]
        table = pa.table({"image": cells, "label": pa.array(labels).dictionary_encode()})
        (tmp_path / "set").mkdir(exist_ok=True)
        pq.write_table(table, tmp_path / "set" / f"{split}.parquet")
    dataset = opened(tmp_path)
    assert (dataset.train.targets.tolist(), dataset.test.targets.tolist()) == ([1, 0], [0, 1])


# --- integers


def test_codes_with_gaps_stay_codes():
    codes = LabelCodes.of([0, 3, 1, 99_999], [], "here")
    assert len(codes.classes) == 100_000
    assert codes.encode([2, 99_999], "there").tolist() == [2, 99_999]


def test_ids_become_classes_of_their_own():
    codes = LabelCodes.of([1_300_000_007, 1_300_000_000, 1_300_000_007], [], "here")
    assert codes.classes == ["1300000000", "1300000007"]
    assert codes.encode([1_300_000_007, 1_300_000_000], "there").tolist() == [1, 0]
    with pytest.raises(DataError, match=r"there holds \[5\], which the training split does not"):
        codes.encode([5], "there")
    assert LabelCodes.of([2**63 + 1, 7], [], "here").encode([7], "there").tolist() == [0]


def test_names_beside_integers_are_in_the_order_of_the_codes():
    codes = LabelCodes.counted(["b", "a", "c"], "here")
    assert codes.encode([2, 0], "there").tolist() == [2, 0]
    with pytest.raises(DataError, match=r"lie in 0\.\.3; allowed are 0\.\.2, because there are 3 classes"):
        codes.encode([0, 3], "there")


# --- groups


def test_groups_are_coded_in_order_or_refused():
    codes, names = group_codes([3, 1, 3], "here")
    assert (codes.tolist(), codes.dtype, names) == ([1, 0, 1], np.int64, ["1", "3"])
    for values, match in (
        ([1, None], "no value in row 1"),
        ([float("nan"), 1.0], "no value in row 0"),
        ([1, "a"], "not of one kind"),
        ([[1], [2]], "not of one kind"),
    ):
        with pytest.raises(DataError, match=match):
            group_codes(values, "here")
