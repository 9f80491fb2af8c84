"""Data sets are decoded once, exactly, and every bad input names itself."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cluster.workload.datasets import DataError, open_dataset, stratified_split
from cluster.workload.preparing import prepare
from tests.cluster.workload.parquet_folders import (
    encoded,
    fresh_process,
    pictures,
    write_dataset,
    write_split,
)

ROOT = Path(__file__).parents[3]


# --- digits


def test_digits_are_scaled_exactly_and_split_by_class(tmp_path):
    from sklearn.datasets import load_digits

    dataset = open_dataset(prepare(name="digits", cache_dir=tmp_path))
    assert dataset.input_shape == (1, 8, 8)
    assert dataset.train.inputs.shape == (1437, 1, 8, 8)
    assert dataset.test.inputs.shape == (360, 1, 8, 8)
    assert dataset.train.inputs.dtype == np.uint8
    assert dataset.train.targets.dtype == np.int64
    assert dataset.train.inputs.flags.c_contiguous
    assert not dataset.train.inputs.flags.writeable
    assert dataset.classes == tuple("0123456789")
    assert dataset.group_names is None
    assert dataset.train.groups is None
    # 0..16 become v * 255 / 16 rounded: 1 -> 15.94 -> 16, 8 -> 127.5 -> 128 (to even), 16 -> 255.
    scaled = {0: 0, 1: 16, 2: 32, 8: 128, 15: 239, 16: 255}
    assert {value: round(value * 255 / 16) for value in scaled} == scaled
    assert set(np.unique(dataset.train.inputs)) == {round(value * 255 / 16) for value in range(17)}
    # Both splits together are scikit-learn's digits, each image once.
    original = load_digits()
    rows = np.rint(original.images.reshape(1797, 64) * 255 / 16).astype(np.uint8)
    expected = sorted((bytes(row), int(label)) for row, label in zip(rows, original.target, strict=True))
    found = [
        (bytes(image.reshape(-1)), int(label))
        for split in (dataset.train, dataset.test)
        for image, label in zip(split.inputs, split.targets, strict=True)
    ]
    assert sorted(found) == expected
    # Stratified: 360 / 1797 of each class, within one sample.
    share = np.bincount(original.target) * 360 / 1797
    assert np.all(np.abs(np.bincount(dataset.test.targets) - share) < 1)


# --- parquet folders


@pytest.mark.parametrize("subfolder", ["", "data"])
def test_colour_pixels_survive_exactly_as_channels_first(tmp_path, subfolder):
    pixels = write_dataset(tmp_path / "set" / subfolder, image="img")
    dataset = open_dataset(prepare(name="mine", path=str(tmp_path / "set"), cache_dir=tmp_path / "cache"))
    for split in ("train", "test"):
        np.testing.assert_array_equal(getattr(dataset, split).inputs, pixels[split].transpose(0, 3, 1, 2))
    assert dataset.train.targets.tolist() == [0, 1, 2, 0, 1, 2, 0]
    assert dataset.test.targets.tolist() == [0, 1, 2]
    assert dataset.classes == ("0", "1", "2")
    assert dataset.folder.parent == tmp_path / "cache"
    assert dataset.folder.name == f"mine-{dataset.fingerprint}"


def test_grey_images_keep_one_channel(tmp_path):
    pixels = write_dataset(tmp_path / "set", shape=(4, 4))
    dataset = open_dataset(prepare(name="mine", path=str(tmp_path / "set"), cache_dir=tmp_path))
    np.testing.assert_array_equal(dataset.train.inputs, pixels["train"][:, None])


def test_one_colour_image_in_the_test_split_makes_all_of_them_colour(tmp_path):
    grey, colour = pictures(2, (4, 4)), pictures(1, (4, 4, 3))
    write_split(tmp_path / "set", "train", [encoded(one) for one in grey], [0, 1])
    write_split(tmp_path / "set", "test", [encoded(colour[0])], [1])
    dataset = open_dataset(prepare(name="mine", path=str(tmp_path / "set"), cache_dir=tmp_path))
    np.testing.assert_array_equal(dataset.train.inputs, np.repeat(grey[:, None], 3, axis=1))
    np.testing.assert_array_equal(dataset.test.inputs[0], colour[0].transpose(2, 0, 1))


def test_palette_images_become_colour(tmp_path):
    flat = np.full((4, 4, 3), (204, 0, 51), dtype=np.uint8)  # in PIL's default palette
    write_split(tmp_path / "set", "train", [encoded(flat, "P")], [0])
    write_split(tmp_path / "set", "test", [encoded(flat)], [0])
    dataset = open_dataset(prepare(name="mine", path=str(tmp_path / "set"), cache_dir=tmp_path))
    assert dataset.train.inputs.shape == (1, 3, 4, 4)
    np.testing.assert_array_equal(dataset.train.inputs, dataset.test.inputs)


def test_rows_of_several_files_follow_the_order_of_their_names(tmp_path):
    folder, pixels = tmp_path / "set", pictures(4, (4, 4))
    for part in (1, 0):
        write_split(folder, "train", [encoded(one) for one in pixels[2 * part : 2 * part + 2]], [part, part])
        (folder / "train-00000-of-00001.parquet").rename(folder / f"train-0000{part}-of-00002.parquet")
    write_split(folder, "test", [encoded(pixels[0])], [0])
    dataset = open_dataset(prepare(name="mine", path=str(folder), cache_dir=tmp_path))
    np.testing.assert_array_equal(dataset.train.inputs[:, 0], pixels)
    assert dataset.train.targets.tolist() == [0, 0, 1, 1]


def test_features_name_the_columns_and_the_classes(tmp_path):
    """As in CIFAR-100: two label columns, one with a usual name; the image column has an unusual one."""
    features = {
        "picture": {"_type": "Image"},
        "fine_label": {"_type": "ClassLabel", "names": ["ant", "bee", "cow", "dog"]},
        "coarse_label": {"_type": "ClassLabel", "names": ["insect", "mammal"]},
    }
    for split, rows in (("train", 3), ("test", 1)):
        write_split(
            tmp_path / "set",
            split,
            [encoded(one) for one in pictures(rows, (4, 4))],
            list(range(rows)),
            image="picture",
            label="fine_label",
            extra={"coarse_label": [0] * rows},
            features=features,
        )
    folder = str(tmp_path / "set")
    fine = open_dataset(prepare(name="mine", path=folder, cache_dir=tmp_path))
    assert fine.classes == ("ant", "bee", "cow", "dog")  # the dog has no sample and is a class all the same
    coarse = open_dataset(prepare(name="mine", path=folder, label_column="coarse_label", cache_dir=tmp_path))
    assert coarse.classes == ("insect", "mammal")
    assert coarse.folder != fine.folder


def test_text_labels_and_groups_become_codes(tmp_path):
    images = [encoded(one) for one in pictures(4, (4, 4))]
    extra = {"writer": ["zoe", "bob", "zoe", "amy"]}
    write_split(tmp_path / "set", "train", images, ["no", "yes", "no", "up"], extra=extra)
    write_split(tmp_path / "set", "test", images[:2], ["up", "no"])
    folder = prepare(name="mine", path=str(tmp_path / "set"), group_column="writer", cache_dir=tmp_path)
    dataset = open_dataset(folder)
    assert dataset.classes == ("no", "up", "yes")
    assert dataset.train.targets.tolist() == [0, 2, 0, 1]
    assert dataset.test.targets.tolist() == [1, 0]
    assert dataset.group_names == ("amy", "bob", "zoe")
    assert dataset.train.groups.tolist() == [2, 1, 2, 0]
    assert dataset.test.groups is None


def test_plain_bytes_and_paths_are_images_too(tmp_path):
    pixels = pictures(2, (4, 4))
    (tmp_path / "set").mkdir()
    pq.write_table(
        pa.table({"img": [encoded(one) for one in pixels], "labels": [0, 1]}), tmp_path / "set/train.parquet"
    )
    (tmp_path / "elsewhere.png").write_bytes(encoded(pixels[1]))
    cell = {"bytes": None, "path": str(tmp_path / "elsewhere.png")}
    write_split(tmp_path / "set", "test", [cell], [1], image="img", label="labels")
    dataset = open_dataset(prepare(name="mine", path=str(tmp_path / "set"), cache_dir=tmp_path))
    np.testing.assert_array_equal(dataset.train.inputs[:, 0], pixels)
    np.testing.assert_array_equal(dataset.test.inputs[0, 0], pixels[1])


# --- once per node


def test_second_call_decodes_nothing_and_imports_no_decoder(tmp_path):
    write_dataset(tmp_path / "set")
    code = (
        "import sys; from pathlib import Path; from cluster.workload.preparing import prepare\n"
        "from cluster.workload.datasets import open_dataset\n"
        "folder = prepare(name='mine', path=sys.argv[1], cache_dir=Path(sys.argv[2]))\n"
        "open_dataset(folder).train.inputs.sum()\n"
        "decoders = ('datasets', 'PIL', 'sklearn', 'pyarrow', 'torch', 'pandas', 'matplotlib')\n"
        "print(folder, [name for name in decoders if name in sys.modules])"
    )
    first = fresh_process(code, tmp_path / "set", tmp_path / "cache")
    assert "'pyarrow'" in first
    assert "'datasets'" not in first  # parquet needs pyarrow alone
    folder = Path(first.split(" [")[0])
    written = (folder / "train-images.npy").stat().st_mtime_ns
    assert fresh_process(code, tmp_path / "set", tmp_path / "cache") == f"{folder} []\n"
    assert (folder / "train-images.npy").stat().st_mtime_ns == written


def test_two_processes_at_once_share_one_folder(tmp_path):
    write_dataset(tmp_path / "set", train=200)
    code = (
        "import sys, time; from pathlib import Path; from cluster.workload import decoding, preparing\n"
        "original = decoding.decode_parquet\n"
        "def slow(*arguments, **options):\n"
        "    print('decoded'); time.sleep(1); return original(*arguments, **options)\n"
        "decoding.decode_parquet = slow\n"
        "print(preparing.prepare(name='mine', path=sys.argv[1], cache_dir=Path(sys.argv[2])))"
    )
    command = [sys.executable, "-c", code, str(tmp_path / "set"), str(tmp_path / "cache")]
    both = [subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    lines = [process.communicate(timeout=120)[0].splitlines() for process in both]
    assert [process.returncode for process in both] == [0, 0]
    assert lines[0][-1] == lines[1][-1]
    assert sorted(map(len, lines)) == [1, 2]  # one decoded and named the folder, the other only named it
    folders = [entry for entry in (tmp_path / "cache").iterdir() if entry.is_dir() and entry.name[0] != "."]
    assert folders == [Path(lines[0][-1])]
    assert open_dataset(folders[0]).train.inputs.shape == (200, 3, 6, 5)


def test_what_a_killed_decode_left_is_not_used(tmp_path):
    write_dataset(tmp_path / "set")
    options = {"name": "mine", "path": str(tmp_path / "set"), "cache_dir": tmp_path / "cache"}
    folder = prepare(**options)
    expected = np.array(open_dataset(folder).train.inputs)
    partial = folder.with_name(f".{folder.name}.partial")
    folder.rename(partial)
    (partial / "meta.json").unlink()
    (partial / "train-images.npy").write_bytes(b"half")
    assert prepare(**options) == folder
    np.testing.assert_array_equal(open_dataset(folder).train.inputs, expected)
    assert not partial.exists()


def test_a_failed_decode_leaves_no_folder(tmp_path):
    write_split(tmp_path / "set", "train", [b"no image"], [0])
    write_split(tmp_path / "set", "test", [encoded(pictures(1, (4, 4))[0])], [0])
    with pytest.raises(DataError, match=r"image 0 in column 'image'.*cannot be decoded"):
        prepare(name="mine", path=str(tmp_path / "set"), cache_dir=tmp_path / "cache")
    assert not list((tmp_path / "cache").glob("*mine-*/"))


# --- what users get wrong


def refused(tmp_path, match, **options):
    with pytest.raises(DataError, match=match):
        prepare(**{"name": "mine", "path": str(tmp_path / "set"), "cache_dir": tmp_path / "cache"} | options)


def test_wrong_columns_name_the_nearest(tmp_path):
    write_dataset(tmp_path / "set", extra=None)
    refused(
        tmp_path, "data.label_column = 'lable'.*'image', 'label'.*did you mean label", label_column="lable"
    )
    refused(tmp_path, "data.image_column = 'imag'.*did you mean image", image_column="imag")
    refused(tmp_path, "data.group_column = 'speaker' is no column", group_column="speaker")
    refused(tmp_path, "image 0 in column 'label'.*holds a value of type int", image_column="label")


def test_ambiguous_columns_are_listed(tmp_path):
    write_dataset(tmp_path / "set", image="left", label="kind")
    refused(tmp_path, r"data.label_column cannot be inferred.*\['left', 'kind'\]")
    write_split(tmp_path / "two", "train", [encoded(pictures(1, (4, 4))[0])], [0], extra={"labels": [1]})
    write_split(tmp_path / "two", "test", [encoded(pictures(1, (4, 4))[0])], [0], extra={"labels": [1]})
    refused(tmp_path, r"\['label', 'labels'\] would fit", path=str(tmp_path / "two"))


def test_missing_folders_files_and_splits(tmp_path):
    refused(tmp_path, "is no folder on this node")
    (tmp_path / "set").mkdir()
    refused(tmp_path, "parquet files found: none")
    write_dataset(tmp_path / "set" / "plain_text")
    refused(tmp_path, "plain_text/test-00000-of-00001.parquet")
    refused(tmp_path, r"no 'valid-.*", path=str(tmp_path / "set/plain_text"), test_split="valid")
    (tmp_path / "set" / "train.parquet").write_bytes(b"PAR1 not really")
    (tmp_path / "set" / "test.parquet").write_bytes(b"PAR1 not really")
    refused(tmp_path, "train.parquet is not a readable parquet file")


def test_images_that_do_not_fit(tmp_path):
    small, large = encoded(pictures(1, (4, 4))[0]), encoded(pictures(1, (4, 5))[0])
    write_split(tmp_path / "set", "train", [small, small, large], [0, 0, 0])
    write_split(tmp_path / "set", "test", [small], [0])
    refused(tmp_path, "image 2 in column 'image' of .*train.* is 5x4 pixels, those before it 4x4")
    write_split(tmp_path / "set", "train", [small, {"bytes": None, "path": None}], [0, 0])
    refused(tmp_path, "image 1 .* holds nothing")
    deep = encoded(np.zeros((4, 4), dtype=np.uint16))
    write_split(tmp_path / "set", "train", [deep], [0])
    refused(tmp_path, "8 bits a channel")
    write_split(tmp_path / "set", "train", [], pa.array([], pa.int64()))
    refused(tmp_path, "train.* has no rows")


@pytest.mark.parametrize(
    ("train", "test", "match"),
    [
        ([0, -1], [0, 0], r"lie in -1\.\.0; allowed are codes from 0 on: -1 often means"),
        ([0, 1], [2, 0], r"test.* lie in 0\.\.2; allowed are 0\.\.1, because there are 2 classes"),
        ([0.5, 1.0], [0, 0], "row 0 holds 0.5; allowed are integers or texts"),
        ([0, None], [0, 0], "row 1 holds None"),
        (["a", "b"], ["c", "a"], r"test.* holds \['c'\], which the training split does not"),
    ],
)
def test_labels_that_cannot_be_used(tmp_path, train, test, match):
    images = [encoded(one) for one in pictures(2, (4, 4))]
    write_split(tmp_path / "set", "train", images, train)
    write_split(tmp_path / "set", "test", images, test)
    refused(tmp_path, match)


def test_options_without_meaning_are_refused(tmp_path):
    refused(tmp_path, "data.label_column = 'x' has no meaning", name="digits", path=None, label_column="x")
    refused(tmp_path, "'digits' has no meaning with data.path", name="digits")
    refused(tmp_path, "data.revision = 'main' has no meaning with data.path", revision="main")
    refused(tmp_path, "'digit' is no data set.*did you mean digits", name="digit", path=None)


# --- validation


def test_stratified_split_by_hand():
    # 6 of class 0, 3 of class 1, 1 of class 2; 0.4 of 10 is 4 samples: shares 2.4, 1.2 and 0.4, so 2, 1
    # and 0, and the one left over goes to the largest remainder; 0.4 and 0.4 tie, and the lower class gives.
    labels = np.array([0, 0, 0, 1, 1, 1, 0, 0, 0, 2])
    rest, drawn = stratified_split(labels, 0.4, seed=3)
    assert np.bincount(labels[drawn], minlength=3).tolist() == [3, 1, 0]
    assert sorted([*rest, *drawn]) == list(range(10))


@settings(max_examples=60, deadline=None)
@given(
    labels=st.lists(st.integers(0, 4), min_size=1, max_size=200).map(np.array),
    fraction=st.floats(0, 0.99),
    seed=st.integers(0, 2**32),
)
def test_stratified_split_is_stratified_complete_and_seeded(labels, fraction, seed):
    total = round(fraction * labels.size)
    if fraction > 0 and total == 0:
        with pytest.raises(DataError, match="not one sample"):
            stratified_split(labels, fraction, seed)
        return
    rest, drawn = stratified_split(labels, fraction, seed)
    assert rest.dtype == drawn.dtype == np.int64
    assert drawn.size == total
    np.testing.assert_array_equal(np.union1d(rest, drawn), np.arange(labels.size))
    assert np.all(np.diff(drawn) > 0)
    assert np.all(np.diff(rest) > 0)
    share = np.bincount(labels) * total / labels.size
    assert np.all(np.abs(np.bincount(labels[drawn], minlength=share.size) - share) < 1)
    np.testing.assert_array_equal(stratified_split(labels, fraction, seed)[1], drawn)


def test_stratified_split_differs_by_seed_and_refuses_nonsense():
    labels = np.arange(100) % 2
    assert stratified_split(labels, 0.0, 1)[1].size == 0
    assert stratified_split(labels, 0.1, 1)[1].tolist() != stratified_split(labels, 0.1, 2)[1].tolist()
    for fraction in (-0.1, 1.0, float("nan")):
        with pytest.raises(DataError, match=r"outside \[0, 1\)"):
            stratified_split(labels, fraction, 1)
