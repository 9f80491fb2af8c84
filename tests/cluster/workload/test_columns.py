"""Tables of numbers and categories: inputs by hand and by a naive reference, targets, what is refused."""

import datetime
import json
import math
import random
import statistics

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from cluster.references import DataError
from cluster.workload import cache as stored
from cluster.workload.datasets import open_dataset
from cluster.workload.preparing import prepare
from cluster.workload.tables import digest, given_table

pytestmark = pytest.mark.usefixtures("no_pictures")


def written(folder, train, test):
    """Parquet files of two tables."""
    folder.mkdir(parents=True, exist_ok=True)
    for split, columns in (("train", train), ("test", test)):
        table = columns if isinstance(columns, pa.Table) else pa.table(columns)
        pq.write_table(table, folder / f"{split}.parquet")
    return folder


def prepared(folder, cache, **options):
    return open_dataset(prepare(name="mine", path=str(folder), cache_dir=cache, **options))


TRAIN = {"age": [1, 3, 5], "colour": ["red", "blue", "red"], "sick": [True, False, True]}
TRAIN |= {"label": ["y", "n", "y"]}
TEST = {"age": [7], "colour": ["blue"], "sick": [False], "label": ["n"]}


def test_inputs_by_hand(tmp_path):
    dataset = prepared(written(tmp_path / "set", TRAIN, TEST), tmp_path / "cache")
    # Of train: mean 3 and variance (4 + 0 + 4) / 3 of the ages, 2/3 and 2/9 of the sick.
    age, sick = 2 / math.sqrt(8 / 3), (1 / 3) / math.sqrt(2 / 9)
    expected = [[-age, 0, 1, sick], [0, 1, 0, -2 * sick], [age, 0, 1, sick]]
    np.testing.assert_allclose(dataset.train.inputs, expected, rtol=1e-6)
    np.testing.assert_allclose(dataset.test.inputs, [[2 * age, 1, 0, -2 * sick]], rtol=1e-6)
    assert dataset.train.inputs.dtype == dataset.test.inputs.dtype == np.float32
    assert (dataset.classes, dataset.train.targets.tolist()) == (("n", "y"), [1, 0, 1])
    assert dataset.test.targets.tolist() == [0]
    said = stored.read_meta(dataset.folder)["inputs"]
    assert [one["name"] for one in said] == ["age", "colour", "sick"]
    assert (said[0]["mean"], said[1]["categories"]) == (3.0, ["blue", "red"])


def test_columns_are_chosen_in_their_order_and_groups_are_none(tmp_path):
    index = {"__index_level_0__": [5, 6, 7]}
    folder = written(
        tmp_path / "set", TRAIN | index | {"who": ["v", "u", "v"]}, TEST | {"__index_level_0__": [9]}
    )
    dataset = prepared(folder, tmp_path / "cache", group_column="who")
    assert dataset.input_shape == (4,)  # neither the groups nor what pandas counts rows by
    assert (dataset.group_names, dataset.train.groups.tolist()) == (("u", "v"), [1, 0, 1])
    chosen = prepared(folder, tmp_path / "cache", group_column="who", columns=["colour", "age"])
    np.testing.assert_array_equal(chosen.train.inputs[:, :2], [[0, 1], [1, 0], [0, 1]])
    assert chosen.input_shape == (3,)
    assert chosen.fingerprint != dataset.fingerprint


def test_any_table_as_dictionaries_have_it(tmp_path):
    drawn = random.Random(4)

    def rows(count):
        return [
            {
                "x": drawn.gauss(5, 2),
                "n": drawn.randrange(9),
                "k": drawn.choice("pqrs"),
                "c": drawn.choice(["one", "two"]),
                "y": drawn.gauss(0, 1),
            }
            for _ in range(count)
        ]

    train, test = rows(60), rows(25)

    def table(rows):
        columns = {name: pa.array([row[name] for row in rows]) for name in rows[0]}
        columns["x"] = columns["x"].cast(pa.float32())
        columns["k"] = columns["k"].dictionary_encode()
        return pa.table(columns)

    folder = tmp_path / "set"
    folder.mkdir()
    pq.write_table(table(train[:20]), folder / "train-00000-of-00002.parquet")  # in two files
    pq.write_table(table(train[20:]), folder / "train-00001-of-00002.parquet")
    pq.write_table(table(test), folder / "test.parquet")
    dataset = prepared(folder, tmp_path / "cache", label_column="y", targets="numbers")
    for split, mine in ((dataset.train, train), (dataset.test, test)):
        assert split.targets.dtype == np.float32
        for found, target, row in zip(split.inputs, split.targets, mine, strict=True):
            wanted = []
            for name in ("x", "n"):
                values = [float(np.float32(each[name])) for each in train]
                mean, deviation = statistics.fmean(values), statistics.pstdev(values)
                wanted.append((row[name] - mean) / deviation)
            for name, names in (("k", "pqrs"), ("c", ("one", "two"))):
                wanted += [float(row[name] == each) for each in names]
            np.testing.assert_allclose(found, wanted, rtol=1e-4, atol=1e-6)
            assert target == pytest.approx(row["y"])


def test_named_classes_are_categories_and_lists_of_them_labels(tmp_path):
    import datasets

    features = datasets.Features(
        {
            "kind": datasets.ClassLabel(names=["wet", "dry"]),
            "size": datasets.Value("int64"),
            "tags": datasets.Sequence(datasets.ClassLabel(names=["z", "a", "m"])),
        }
    )
    columns = {"kind": [1, 0, 1], "size": [1, 2, 3], "tags": [[2], [], [0, 2]]}
    made = datasets.Dataset.from_dict(columns, features=features)
    folder = tmp_path / "set"
    folder.mkdir()
    for split in ("train", "test"):
        made.to_parquet(str(folder / f"{split}.parquet"))
    dataset = prepared(folder, tmp_path / "cache", label_column="tags", targets="label_sets")
    assert dataset.train.inputs[:, :2].tolist() == [[1, 0], [0, 1], [1, 0]]  # dry, wet
    assert dataset.classes == ("z", "a", "m")
    assert dataset.train.targets.tolist() == [[0, 0, 1], [0, 0, 0], [1, 0, 1]]


def test_classes_are_left_out_with_their_rows(tmp_path):
    train = {"a": [1, 2, 4, 9], "k": ["u", "v", "u", "gone"], "label": ["n", "y", "n", "o"]}
    folder = written(tmp_path / "set", train, {"a": [2], "k": ["u"], "label": ["y"]})
    dataset = prepared(folder, tmp_path / "cache", exclude_classes=["o"])
    assert (dataset.classes, dataset.train.targets.tolist()) == (("n", "y"), [0, 1, 0])
    assert dataset.train.inputs[:, 1:].tolist() == [[1, 0], [0, 1], [1, 0]]
    assert dataset.train.inputs[:, 0].mean() == pytest.approx(0, abs=1e-6)


# --- what cannot be used is told in one line


@pytest.mark.parametrize(
    ("train", "test", "options", "message"),
    [
        ({"age": [2, 2, 2]}, {}, {}, r"column 'age' of .*train.parquet is 2 in every row, .* leave it out"),
        ({"colour": ["red"] * 3}, {}, {}, r"column 'colour' of .* is 'red' in every row"),
        ({"age": [1, None, 3]}, {}, {}, r"'age' of .*: row 1 has no value; allowed are finite numbers"),
        ({"age": [1.0, 2.0, math.nan]}, {}, {}, r"column 'age' of .*: row 2 has no value"),
        ({"age": [1.0, 2.0, math.inf]}, {}, {}, r"column 'age' of .*: row 2 has the value inf"),
        ({"age": [-1e308, 0.0, 1e308]}, {}, {}, r"column 'age' of .*standard deviation inf .*scale them"),
        ({}, {"age": [None]}, {}, r"column 'age' of .*test.parquet: row 0 holds None; allowed are num"),
        ({}, {"age": ["old"]}, {}, r"'age' of .*test.parquet: row 0 holds 'old'; allowed are numbers"),
        ({"colour": ["red", None, "blue"]}, {}, {}, r"column 'colour' of .*: row 1 has no value"),
        ({}, {"colour": ["green"]}, {}, r"test.parquet holds \['green'\], which the train.*'blue', 'red'"),
        ({}, {"age": [1e60]}, {}, r"column 'age' of .*test.parquet: row 0 becomes .*more than float32"),
        (
            {"y": [1.0, 2.0, 1e60]},
            {"y": [1.0]},
            {"targets": "numbers", "label_column": "y"},
            r"row 2 becomes 1e\+60, more than float32 holds; scale them",
        ),
        ({}, {"colour": [4]}, {}, r"column 'colour' of .*test.parquet: row 0 has the value 4"),
        ({}, {"label": ["maybe"]}, {}, r"\['maybe'\], which the training split does not: \['n', 'y'\]"),
        (
            {"day": [datetime.date(2026, 1, day) for day in (1, 2, 3)]},
            {"day": [datetime.date(2026, 1, 4)]},
            {},
            r"column 'day' of .* holds date32\[day\]; allowed are numbers and texts",
        ),
        ({}, {}, {"columns": ["agee"]}, r"data.columns = 'agee' is no column of .*did you mean age\?"),
        ({}, {}, {"columns": ["age", "age"]}, "data.columns: 'age' is there twice"),
        ({}, {}, {"columns": ["label"]}, "data.columns: 'label' is data.label_column; an input cannot be"),
        ({}, {}, {"columns": []}, r"has no column beside \['label'\]"),
        ({"extra": [1, 2, 3]}, {}, {}, r"data.columns = 'extra' is no column of .*test.parquet"),
        ({}, {}, {"label_column": "lable"}, r"data.label_column = 'lable' is no column .*mean label\?"),
        ({}, {}, {"targets": "numbers"}, r"column 'label' .*row 0 holds 'y'; allowed are numbers"),
        ({"y": [1.0, None, 2.0]}, {"y": [1.0]}, {"targets": "numbers", "label_column": "y"}, "row 1 has no"),
        ({}, {}, {"targets": "label_sets"}, r"column 'label' .*row 0 holds 'y'; allowed are lists"),
        ({}, {}, {"features": "logmel"}, "data.features = 'logmel' has no meaning for the columns of"),
        ({}, {}, {"columns": ["age"], "image_column": "x"}, "data.image_column = 'x' has no meaning beside"),
        ({}, {}, {"length": 3}, "data.length = 3 has no meaning without text"),
        ({}, {}, {"targets": "numbers", "exclude_classes": ["a"]}, "no meaning where targets are numbers"),
        ({"label": [1.5, 2.0, 1.0]}, {"label": [1.0]}, {}, "row 0 holds 1.5; allowed are integers or texts"),
        ({name: pa.array([], pa.int64()) for name in TRAIN}, {}, {}, r"train.parquet has no rows"),
    ],
)  # fmt: skip
def test_a_bad_table_says_so(tmp_path, train, test, options, message):
    folder = written(tmp_path / "set", TRAIN | train, TEST | test)
    with pytest.raises(DataError, match=message) as raised:
        prepared(folder, tmp_path / "cache", **options)
    assert "\n" not in str(raised.value)


def test_texts_of_nearly_every_row_its_own_are_no_categories(tmp_path):
    rows = 50
    table = {"said": [f"text {row % 30}" for row in range(rows)], "label": [0, 1] * 25}
    folder = written(tmp_path / "set", table, table)
    with pytest.raises(DataError, match=r"holds 30 texts in 50 rows, too many .*sequence_classification"):
        prepared(folder, tmp_path / "cache")


def test_codes_of_named_classes_are_no_quantities(tmp_path):
    feature = {"info": {"features": {"label": {"_type": "ClassLabel", "names": ["n", "y"]}}}}
    table = pa.table({"age": [1, 3, 5], "label": [0, 1, 0]})
    table = table.replace_schema_metadata({"huggingface": json.dumps(feature)})
    folder = written(tmp_path / "set", table, table)
    with pytest.raises(DataError, match=r"named classes, which are no quantities; set objective.name=class"):
        prepared(folder, tmp_path / "cache", targets="numbers")


def test_a_table_is_known_by_the_names_of_its_classes_too():
    def known(last):
        names = [f"class {number}" for number in range(99)] + [last]
        feature = {"info": {"features": {"label": {"_type": "ClassLabel", "names": names}}}}
        table = pa.table({"label": [0, 99]}).replace_schema_metadata({"huggingface": json.dumps(feature)})
        return digest(given_table("mine", table))

    assert known("cat") == known("cat") != known("dog")


@pytest.mark.parametrize(
    ("labels", "test", "message"),
    [
        ([["a"], None, []], [["a"]], r"row 1 holds None; allowed are lists of labels"),
        ([["a"], [None], []], [["a"]], r"row 1 holds the label None; allowed are integers or texts"),
        ([[1.5], [2.0], []], [[1.0]], r"row 0 holds the label 1.5; allowed are integers"),
        (pa.array([[], [], []], pa.list_(pa.string())), [["a"]], "no row holds a label"),
        ([["a"], ["b"], []], [["a", "c"]], r"test.parquet holds \['c'\], which the training split does not"),
        ([[1], [2], []], [["a"]], r"are texts such as 'a', those of the training split integers"),
    ],
)
def test_bad_sets_of_labels_say_so(tmp_path, labels, test, message):
    folder = written(tmp_path / "set", {"x": [1, 2, 3], "tags": labels}, {"x": [1], "tags": test})
    with pytest.raises(DataError, match=message) as raised:
        prepared(folder, tmp_path / "cache", label_column="tags", targets="label_sets")
    assert "\n" not in str(raised.value)


# --- tables that a function returns

OWN: dict = {}


def own():
    return OWN


@pytest.fixture
def returned():
    OWN.clear()
    OWN.update(train=TRAIN, test=TEST)
    return f"{__name__}:own"


def test_a_function_may_return_tables(tmp_path, returned):
    files = prepared(written(tmp_path / "set", TRAIN, TEST), tmp_path / "cache")
    mine = open_dataset(prepare(name=returned, cache_dir=tmp_path / "cache"))
    np.testing.assert_array_equal(mine.train.inputs, files.train.inputs)
    np.testing.assert_array_equal(mine.test.targets, files.test.targets)
    again = open_dataset(prepare(name=returned, cache_dir=tmp_path / "cache"))
    assert again.folder == mine.folder
    OWN["test"] = pa.table(TEST | {"age": [8]})
    other = open_dataset(prepare(name=returned, cache_dir=tmp_path / "cache"))
    assert other.folder != mine.folder
    assert other.test.inputs[0, 0] > mine.test.inputs[0, 0]


@pytest.mark.parametrize(
    ("train", "message"),
    [
        ({"a": [1, 2], "label": ["y"]}, r"train of '.*:own' is no table \("),
        (7, r"train of '.*:own' is no table \("),
        ({"a": [1, "x"], "label": ["y", "n"]}, r"train of '.*:own' is no table \("),
    ],
)
def test_what_is_no_table_says_so(tmp_path, returned, train, message):
    OWN["train"] = train
    with pytest.raises(DataError, match=message) as raised:
        prepare(name=returned, cache_dir=tmp_path)
    assert "\n" not in str(raised.value)


def test_columns_of_images_mean_nothing(tmp_path):
    name = "tests.tiny_experiment:tiny_images"
    with pytest.raises(DataError, match=r"data.label_column = 'y' has no meaning .*function returns no tabl"):
        prepare(name=name, label_column="y", cache_dir=tmp_path)
    with pytest.raises(DataError, match=r"data.columns = \['y'\] has no meaning for data.name = 'digits'"):
        prepare(name="digits", columns=["y"], cache_dir=tmp_path)
