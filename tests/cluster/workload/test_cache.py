"""Decoded data is what the source holds now, as it was written; and a disk that fails says so in one line."""

import json
import os
import resource
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import xxhash

from cluster.workload import cache
from cluster.workload.datasets import DataError, open_dataset
from cluster.workload.preparing import prepare
from tests.cluster.workload.parquet_folders import encoded, pictures, write_dataset, write_split

ROOT = Path(__file__).parents[3]


@pytest.fixture
def folder(tmp_path):
    """Options of ``prepare`` for a folder of two grey images in each split."""
    for split in ("train", "test"):
        write_split(tmp_path / "set", split, [encoded(one) for one in pictures(2, (4, 4))], [0, 1])
    return {"name": "mine", "path": str(tmp_path / "set"), "cache_dir": tmp_path / "cache"}


# --- never stale


def test_equal_names_sizes_and_times_with_another_content_are_decoded_again(tmp_path, folder):
    first = prepare(**folder)
    file = tmp_path / "set" / "train-00000-of-00001.parquet"
    before, content = file.stat(), file.read_bytes()
    os.utime(file, ns=(0, 0))
    assert prepare(**folder) == first  # another time alone is the same data
    swapped = encoded(pictures(2, (4, 4))[0]), encoded(pictures(2, (4, 4))[1])
    assert len(swapped[0]) == len(swapped[1])
    write_split(tmp_path / "set", "train", swapped[::-1], [0, 1])
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert (file.stat().st_size, file.stat().st_mtime_ns) == (before.st_size, before.st_mtime_ns)
    assert file.read_bytes() != content
    second = prepare(**folder)
    assert second != first
    images = [open_dataset(one).train.inputs for one in (first, second)]
    np.testing.assert_array_equal(images[0], images[1][::-1])


def test_files_that_cells_name_are_looked_at_too(tmp_path):
    pixels = pictures(2, (4, 4))
    for split in ("train", "test"):
        (tmp_path / f"{split}.png").write_bytes(encoded(pixels[0]))
        write_split(tmp_path / "set", split, [{"bytes": None, "path": str(tmp_path / f"{split}.png")}], [0])
    options = {"name": "mine", "path": str(tmp_path / "set"), "cache_dir": tmp_path / "cache"}
    made = prepare(**options)
    written = (made / "test-images.npy").stat().st_mtime_ns
    assert (prepare(**options) / "test-images.npy").stat().st_mtime_ns == written
    (tmp_path / "test.png").write_bytes(encoded(pixels[1]))
    np.testing.assert_array_equal(open_dataset(prepare(**options)).test.inputs[0, 0], pixels[1])
    (tmp_path / "test.png").unlink()
    with pytest.raises(DataError, match=r"image 0 .* names a file that cannot be read: .*No such file"):
        prepare(**options)
    assert made.exists()  # what runs have mapped stays


def test_what_a_function_returns_now_counts(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(tmp_path))
    (tmp_path / "my_file_data.py").write_text(
        "import numpy as np\nfrom pathlib import Path\n"
        "def load(): return dict(np.load(Path(__file__).with_name('data.npz')))\n"
    )
    arrays = {"train_images": np.zeros((2, 4, 4), np.uint8), "train_labels": np.array([0, 1])}
    arrays |= {"test_images": np.zeros((1, 4, 4), np.uint8), "test_labels": np.array([0])}
    found = []
    for test_label in (0, 1, 0):
        np.savez(tmp_path / "data.npz", **arrays | {"test_labels": np.array([test_label])})
        found.append(prepare(name="my_file_data:load", cache_dir=tmp_path / "cache"))
        assert open_dataset(found[-1]).test.targets.tolist() == [test_label]
    assert found[0] == found[2] != found[1]
    # Every part counts: names, groups, and an array of the same bytes but another shape.
    for key, value in (("classes", ["a", "b"]), ("train_groups", [1, 2]), ("train_groups", [2, 1])):
        np.savez(tmp_path / "data.npz", **arrays | {key: value})
        found.append(prepare(name="my_file_data:load", cache_dir=tmp_path / "cache"))
    wide = {f"{split}_images": arrays[f"{split}_images"].reshape(-1, 2, 8) for split in ("train", "test")}
    np.savez(tmp_path / "data.npz", **arrays | wide)
    found.append(prepare(name="my_file_data:load", cache_dir=tmp_path / "cache"))
    assert len(set(found)) == 6


def test_hashes_are_remembered_only_of_files_at_rest(tmp_path, monkeypatch):
    file = tmp_path / "file"
    file.write_bytes(b"one")
    one = xxhash.xxh3_128_hexdigest(b"one")
    assert cache.digest(file, tmp_path / "cache") == one
    assert not (tmp_path / "cache").exists()  # it changed just now, and could again within the clock's tick
    monkeypatch.setattr(cache, "_SETTLED_NS", 0)
    assert cache.digest(file, tmp_path / "cache") == one
    (note,) = (tmp_path / "cache" / ".digests").iterdir()
    note.write_text("0" * 32)
    assert cache.digest(file, tmp_path / "cache") == "0" * 32  # remembered: the file was not read
    times = file.stat()
    file.write_bytes(b"two")
    os.utime(file, ns=(times.st_atime_ns, times.st_mtime_ns))
    assert cache.digest(file, tmp_path / "cache") == xxhash.xxh3_128_hexdigest(b"two")
    note.write_text("half")
    assert cache.digest(file, tmp_path / "cache") == xxhash.xxh3_128_hexdigest(b"two")


# --- never damaged


def flip(content):
    return content[:-3] + bytes([content[-3] ^ 1]) + content[-2:]


def zero(content):
    return content[:128] + bytes(len(content) - 128)


@pytest.mark.parametrize("damage", [flip, zero, lambda content: content[:-1], lambda content: b""])
@pytest.mark.parametrize("name", ["train-images.npy", "test-labels.npy", "train-groups.npy", "meta.json"])
def test_damaged_arrays_are_decoded_again(tmp_path, name, damage):
    write_dataset(tmp_path / "set", extra=None)
    for split in ("train", "test"):
        images = [encoded(one) for one in pictures(2, (4, 4))]
        write_split(tmp_path / "set", split, images, [1, 2], extra={"writer": [5, 6]})
    options = {"name": "mine", "path": str(tmp_path / "set"), "cache_dir": tmp_path / "cache"}
    made = prepare(**options, group_column="writer")
    whole = (made / name).read_bytes()
    (made / name).write_bytes(damage(whole))
    assert prepare(**options, group_column="writer") == made
    assert (made / name).read_bytes() == whole


def test_a_folder_that_is_opened_must_be_whole(tmp_path):
    with pytest.raises(DataError, match="not a complete prepared data set"):
        open_dataset(tmp_path)
    made = prepare(name="digits", cache_dir=tmp_path)
    whole = (made / "train-images.npy").read_bytes()
    (made / "train-images.npy").write_bytes(whole[:1000])
    with pytest.raises(DataError, match=r"train-images\.npy has not the .* delete it and prepare it again"):
        open_dataset(made)
    (made / "train-images.npy").write_bytes(whole)
    meta = json.loads((made / "meta.json").read_text())
    (made / "meta.json").write_text(json.dumps(meta | {"classes": meta["classes"][::-1]}))
    with pytest.raises(DataError, match=r"meta\.json was changed"):
        open_dataset(made)


# --- disks


def test_a_cache_that_cannot_be_written_names_itself(tmp_path, folder):
    (tmp_path / "cache").write_text("a file")
    with pytest.raises(DataError, match=r"^data.cache = '.*cache' cannot hold decoded data sets \("):
        prepare(**folder)


def test_a_full_disk_is_one_line_and_leaves_nothing(tmp_path):
    write_dataset(tmp_path / "set", shape=(64, 64, 3), train=20)
    code = (
        "import sys; from pathlib import Path; from cluster.workload.preparing import prepare\n"
        "from cluster.references import DataError\n"
        "try: prepare(name='mine', path=sys.argv[1], cache_dir=Path(sys.argv[2]))\n"
        "except DataError as error: print(error)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "set"), str(tmp_path / "cache")],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000)),
    )
    assert done.stdout.startswith("data.cache = ")
    assert "cannot hold decoded data sets (File too large)" in done.stdout
    assert not list((tmp_path / "cache").glob("*mine-*/"))
