"""Data from the hub, and from functions of one's own."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from cluster.workload.datasets import DataError, open_dataset
from cluster.workload.preparing import prepare
from tests.cluster.workload.parquet_folders import encoded, pictures, write_split

ROOT = Path(__file__).parents[3]

# --- the hub


def test_offline_hub_is_one_clear_error(tmp_path):
    code = (
        "import sys; from pathlib import Path; from cluster.workload.preparing import prepare\n"
        "from cluster.references import DataError\n"
        "try: prepare(name='uoft-cs/cifar10', cache_dir=Path(sys.argv[1]))\n"
        "except DataError as error: print(error)"
    )
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path / "home")}
    command = [sys.executable, "-c", code, str(tmp_path / "cache")]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=True)
    assert "data.name = 'uoft-cs/cifar10' could not be loaded from the Hugging Face hub" in done.stdout
    assert "data.path" in done.stdout


@pytest.fixture
def hub(monkeypatch):
    """A hub with one repository; everything but the download is the real library."""
    import datasets

    pixels = pictures(3, (4, 5, 3))
    features = datasets.Features(
        {
            "img": datasets.Image(),
            "label": datasets.ClassLabel(names=["cat", "dog"]),
            "user": datasets.Value("string"),
        }
    )
    columns = {"img": [Image.fromarray(one) for one in pixels], "label": [1, 0, 1], "user": ["b", "a", "b"]}
    split = datasets.Dataset.from_dict(columns, features=features)
    calls = []

    def load_dataset(name, revision, data_dir):
        calls.append((name, revision, data_dir))
        return datasets.DatasetDict({"train": split, "test": split.select([2])})

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    return pixels, calls


def test_hub_repositories_are_decoded_like_files(tmp_path, hub):
    pixels, calls = hub
    options = {"name": "some/pets", "revision": "v2", "group_column": "user", "cache_dir": tmp_path}
    options["data_dir"] = "v0.02"
    dataset = open_dataset(prepare(**options))
    np.testing.assert_array_equal(dataset.train.inputs, pixels.transpose(0, 3, 1, 2))
    assert dataset.test.targets.tolist() == [1]
    assert dataset.classes == ("cat", "dog")
    assert dataset.train.groups.tolist() == [1, 0, 1]
    assert dataset.folder.name == f"some-pets-{dataset.fingerprint}"
    prepare(**options)
    assert calls == [("some/pets", "v2", "v0.02")]  # the second call does not ask the hub
    with pytest.raises(DataError, match=r"data.test_split = 'tset' is no split.*'test', 'train'.*mean test"):
        prepare(name="some/pets", test_split="tset", cache_dir=tmp_path)


def test_a_part_of_a_split_is_a_split_of_the_hub(tmp_path, monkeypatch):
    import datasets

    pixels = pictures(20, (4, 4))
    writers = [f"w{row // 2}" for row in range(20)]
    write_split(
        tmp_path / "set", "train", [encoded(one) for one in pixels], [row % 2 for row in range(20)],
        extra={"writer": writers},
    )  # fmt: skip
    files = {"train": str(tmp_path / "set" / "train-00000-of-00001.parquet")}
    load = datasets.load_dataset

    def load_dataset(name, revision, data_dir, split=None):
        return load("parquet", data_files=files, split=split, cache_dir=str(tmp_path / "hub"))

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    asked = {"name": "some/writers", "group_column": "writer", "cache_dir": tmp_path / "cache"}
    dataset = open_dataset(prepare(**asked, train_split="train[:90%]", test_split="train[90%:]"))
    np.testing.assert_array_equal(dataset.train.inputs[:, 0], pixels[:18])
    np.testing.assert_array_equal(dataset.test.inputs[:, 0], pixels[18:])
    assert dataset.group_names == tuple(sorted(set(writers[:18])))
    with pytest.raises(DataError, match=r"'some/writers' could not be loaded .*(tset|split)"):
        prepare(**asked, test_split="tset[90%:]")


# --- user code


@pytest.fixture
def user_module(tmp_path, monkeypatch):
    """Write a module on the path whose function returns what the given lines say."""
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(sys, "dont_write_bytecode", True)

    def write(**arrays):
        defaults = {
            "train_images": "np.arange(36, dtype=np.uint8).reshape(3, 4, 3)",
            "train_labels": "np.array([0, 1, 0])",
            "test_images": "np.zeros((1, 4, 3), np.uint8)",
            "test_labels": "np.array([1])",
        }
        body = ", ".join(f"'{key}': {value}" for key, value in (defaults | arrays).items() if value)
        (tmp_path / "my_pictures.py").write_text(
            f"import numpy as np\ndef load():\n    return {{{body}}}\ndef nothing():\n    return 7\n"
            "def none():\n    pass\ndef asks(more):\n    pass\nDATA = {}\n"
        )
        sys.modules.pop("my_pictures", None)

    yield write
    sys.modules.pop("my_pictures", None)


def test_user_function_is_a_data_set(tmp_path, user_module):
    user_module(classes="['a', 'b']", train_groups="['y', 'x', 'y']")
    dataset = open_dataset(prepare(name="my_pictures:load", cache_dir=tmp_path / "cache"))
    expected = np.arange(36, dtype=np.uint8).reshape(3, 1, 4, 3)
    np.testing.assert_array_equal(dataset.train.inputs, expected)
    assert dataset.classes == ("a", "b")
    assert dataset.group_names == ("x", "y")
    assert dataset.train.groups.tolist() == [1, 0, 1]
    colour = "np.arange(72, dtype=np.uint8).reshape(3, 4, 3, 2)"
    user_module(train_images=colour, test_images="np.zeros((1, 4, 3, 2), np.uint8)")
    changed = open_dataset(prepare(name="my_pictures:load", cache_dir=tmp_path / "cache"))
    assert changed.input_shape == (2, 4, 3)  # the source changed, so it was asked again
    assert changed.train.inputs[0, 1].tolist() == [[1, 3, 5], [7, 9, 11], [13, 15, 17], [19, 21, 23]]
    assert changed.classes == ("0", "1")


@pytest.mark.parametrize(
    ("arrays", "match"),
    [
        (
            {"train_images": "np.zeros((3, 4, 3))"},
            r"train_images .* is float64 \[3, 4, 3\]; allowed is uint8",
        ),
        ({"train_images": "np.zeros((3, 3, 9, 9), np.uint8)"}, "channels last"),
        ({"test_images": "np.zeros((1, 4, 4), np.uint8)"}, "the same .H, W, C. in both splits"),
        ({"train_images": "np.zeros((0, 4, 3), np.uint8)"}, "at least one image"),
        ({"train_labels": "np.array([0, 1])"}, r"train_labels .* is int64 \[2\]; allowed are integers \[3\]"),
        ({"train_labels": "np.array([0., 1., 0.])"}, "train_labels .* is float64"),
        ({"test_labels": "np.array([5])"}, r"lie in 5\.\.5; allowed are 0\.\.1"),
        ({"test_labels": ""}, "must return a dictionary with.*'test_labels'"),
        ({"tset": "3"}, "found.*'tset'"),
        ({"train_groups": "[1, 2]"}, "train_groups .* has 2 entries for 3 images"),
        ({"train_groups": "[[1], [2], [3]]"}, r"train_groups .* has shape \[3, 1\]; allowed is \[3\]"),
        ({"train_groups": "[1., float('nan'), 2.]"}, "no value in row 1"),
        ({"train_images": "[np.zeros((4, 3)), np.zeros((4, 4)), 1]"}, "train_images .* is no array: "),
        ({"train_images": "np.zeros((3, 4, 3), object)"}, "train_images .* is object"),
        ({"train_images": "np.zeros((3, 4, 3), np.uint16)"}, "train_images .* is uint16"),
        ({"train_images": "np.zeros((3, 4, 3), bool)"}, "train_images .* is bool"),
        ({"train_images": "np.zeros((3, 4, 3), np.float32)"}, "uint8, train_images is float32; expected one"),
        ({"test_images": "np.zeros((0, 4, 3), np.uint8)"}, "at least one image"),
        ({"test_images": "np.zeros((1, 0, 3), np.uint8)"}, "at least one pixel"),
        ({"train_labels": "[[0], [1, 2], 3]"}, "train_labels .* is no array"),
        ({"train_labels": "np.array([0, 'a', None], object)"}, "train_labels .* is object"),
        ({"train_labels": "np.array([True, False, True])"}, "train_labels .* is bool"),
        ({"train_labels": "np.array([0, -1, 1])"}, r"lie in -1\.\.1; allowed are codes from 0 on"),
        ({"train_labels": "np.array([2**64 - 1, 0, 0], np.uint64)"}, r"holds \[1\], which the training"),
        ({"classes": "'ab'"}, "classes of .* is 'str'; allowed is a list of names"),
        ({"classes": "['a', 'a']"}, "class names hold .'a'. more than once"),
        ({"classes": "['a']"}, r"lie in 0\.\.1; allowed are 0\.\.0"),
        ({"train_labels": "", "train_lables": "1"}, "found.*train_lables.*did you mean train_labels"),
    ],
)
def test_user_arrays_that_cannot_be_used(tmp_path, user_module, arrays, match):
    user_module(**arrays)
    with pytest.raises(DataError, match=match):
        prepare(name="my_pictures:load", cache_dir=tmp_path / "cache")


@pytest.mark.parametrize("value", ["nan", "inf", "-inf"])
@pytest.mark.parametrize("row", [0, 1023, 1024, 1029])
def test_pixels_that_are_no_numbers_are_refused_with_their_row(tmp_path, user_module, value, row):
    labels = "np.arange(1030) % 2"
    images = "np.zeros((1030, 2, 2), np.float32)"
    broken = (
        f"np.where(np.arange(4120).reshape(1030, 2, 2) == {4 * row + 3}, np.float32('{value}'), {images})"
    )
    user_module(train_images=images, train_labels=labels, test_images=broken, test_labels=labels)
    with pytest.raises(
        DataError, match=rf"test_images of 'my_pictures:load': row {row} holds {value}; every"
    ):
        prepare(name="my_pictures:load", cache_dir=tmp_path / "cache")


def test_user_references_that_lead_nowhere(tmp_path, user_module):
    user_module()
    for name, match in (
        ("my_picture:load", "there is no module 'my_picture'"),
        ("my_pictures:laod", "has no 'laod'; did you mean load"),
        ("my_pictures:nothing", "must return a dictionary .* found 'int'"),
        ("my_pictures:none", "must return a dictionary .* found None"),
        ("my_pictures:DATA", "is 'dict'; allowed is a function without arguments"),
        ("my_pictures:asks", r"is 'asks'; allowed is a function without arguments \(missing .* 'more'"),
    ):
        with pytest.raises(DataError, match=match):
            prepare(name=name, cache_dir=tmp_path / "cache")
