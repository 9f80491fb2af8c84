"""Errors of paths are one line that names path, cause and cure; those of a user's own code are left alone."""

import errno
import json
import os
import pickle
import resource
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path

import pytest

import cluster
from cluster.disk import DiskError, in_one_line, naming, told_by_path
from cluster.federation import Federation
from cluster.records.run_folder import RunFolder, RunFolderError
from tests.cluster.records.interrupted_runs import assert_same_run, drive, federated

pytestmark = pytest.mark.usefixtures("no_pictures")

HERE = str(Path(__file__).parent)


@pytest.fixture
def of_the_product(monkeypatch):
    """These tests stand for the product's own code, not for a user's."""
    from cluster import disk

    monkeypatch.setattr(disk, "_OURS", (*disk._OURS, HERE))


@pytest.mark.parametrize(
    ("number", "told"),
    [
        (errno.ENOSPC, "No space left on device; make room on that disk"),
        (errno.EDQUOT, "Disk quota exceeded; your quota there is used up"),
        (errno.EROFS, "Read-only file system; choose a place that can be written"),
        (errno.EIO, "Input/output error; the disk or its connection fails"),
        (errno.EMFILE, "Too many open files; allow more of them: ulimit -n"),
        (errno.ENAMETOOLONG, "File name too long; choose a shorter name"),
        (errno.ENOTDIR, "Not a directory; a file stands where a folder is needed"),
        (errno.EACCES, "Permission denied; choose a place that is yours"),
    ],
)
def test_path_cause_and_cure(number, told, of_the_product):
    with pytest.raises(DiskError) as shown, told_by_path(), naming(Path("/data/runs/rounds.jsonl")):
        raise OSError(number, os.strerror(number))
    assert str(shown.value).startswith(f"/data/runs/rounds.jsonl: {told}")
    assert shown.value.status == 1
    assert str(pickle.loads(pickle.dumps(shown.value))) == str(shown.value)  # from a Ray actor


def test_what_is_no_error_of_a_path_is_left_alone(of_the_product):
    refused = ConnectionRefusedError(errno.ECONNREFUSED, "refused")
    for error in (refused, OSError("words"), TimeoutError()):
        assert in_one_line(error) is None


def test_an_error_in_a_users_own_code_keeps_its_traceback_also_from_an_actor():
    with pytest.raises(FileNotFoundError) as raised, told_by_path():
        Path("/nowhere/my_data.csv").read_text()
    there = pickle.loads(pickle.dumps(raised.value))
    assert in_one_line(there) is None  # its traceback stayed behind; its note says where it came from
    assert "test_disk.py" in there.__notes__[0]


def test_a_name_that_is_there_already_is_kept():
    with pytest.raises(FileNotFoundError, match="/nowhere/x"), naming(Path("/other")):
        Path("/nowhere/x").read_text()


# ---------------------------------------------------------------------------------- a run on a full disk


@contextmanager
def small_files(size):
    """Files may grow to so many bytes: the nearest to a full disk that every machine can play.

    Only inside: the log that pytest writes may be a file too.
    """
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_full_disk_in_mid_run_is_one_line_and_nothing_is_lost(cache, tmp_path):
    config = federated(cache)
    drive(RunFolder.create(tmp_path / "reference", config), Federation.of(config))
    size = (tmp_path / "reference" / "rounds.jsonl").stat().st_size * 3 // 5
    says = r"run/(rounds.jsonl|checkpoints/.*): File too large; files may not grow"
    with small_files(size), pytest.raises(DiskError, match=says):
        cluster.run(config, tmp_path / "run")
    kept = RunFolder(tmp_path / "run")
    assert kept.begun
    assert not list(kept.path.rglob("*.tmp"))
    assert cluster.resume(kept.path).summary["complete"]
    assert_same_run(kept.path, tmp_path / "reference")


def test_a_full_disk_at_the_start_leaves_nothing_that_could_be_neither_run_nor_resumed(cache, tmp_path):
    config = federated(cache)
    Federation.of(config)
    with small_files(100), pytest.raises(OSError, match="File too large"):
        cluster.run(config, tmp_path / "run")
    assert not (tmp_path / "run").exists()


# ------------------------------------------------------------------------------------------ what is there


class Stop(Exception):
    pass


def fails_in_its_first_round(monkeypatch):
    from cluster.rounds.driver import Driver

    def run(self):
        raise Stop("what really failed")

    monkeypatch.setattr(Driver, "run", run)


@pytest.mark.parametrize("kind", ["new", "empty", "link", "link to a link"])
def test_a_failing_run_removes_what_it_made_and_no_more(kind, cache, tmp_path, monkeypatch):
    fails_in_its_first_round(monkeypatch)
    output, scratch = tmp_path / "out", tmp_path / "scratch"
    scratch.mkdir()
    if kind == "empty":
        output.mkdir()
    elif kind == "link":
        output.symlink_to(scratch)
    elif kind == "link to a link":
        (tmp_path / "middle").symlink_to(scratch)
        output.symlink_to(tmp_path / "middle")
    with pytest.raises(Stop, match="what really failed"):
        cluster.run(federated(cache), output)
    assert output.is_symlink() == kind.startswith("link")
    assert output.exists() == (kind != "new")
    assert list(scratch.iterdir()) == []
    assert not output.exists() or list(output.iterdir()) == []


def test_a_place_that_is_taken_says_by_what(cache, tmp_path):
    config = federated(cache)
    (tmp_path / "file").write_text("mine")
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "notes.txt").write_text("mine")
    with pytest.raises(RunFolderError, match=r"file is a file; choose another --output"):
        cluster.run(config, tmp_path / "file")
    with pytest.raises(RunFolderError, match=r"folder exists and is not empty; choose another") as refusal:
        cluster.run(config, tmp_path / "folder")
    assert "resume" not in str(refusal.value)  # it holds no run


PLACES = {
    "below a file": ("file/run", "Not a directory; a file stands where a folder is needed"),
    "a broken link": ("dangling", "dangling: File exists; choose another name"),
    "in a circle": ("circle/run", "Too many levels of symbolic links; its links lead in a circle"),
    "not writable": ("/proc/run", "/proc/run"),
}


def test_places_that_cannot_be_are_one_line_on_the_command_line(cache, tmp_path, monkeypatch, capsys):
    from cluster.cli import main

    monkeypatch.chdir(tmp_path)
    Path("file").write_text("mine")
    Path("dangling").symlink_to("nowhere")
    Path("circle").symlink_to("circle")
    config = federated(cache)
    Path("tiny.json").write_text(json.dumps(config.dump()))
    for place, told in PLACES.values():
        assert main(["run", "tiny.json", "--output", place]) == 2, place
        complaint = capsys.readouterr().err
        assert told in complaint, place
        assert "Traceback" not in complaint


def test_too_many_open_files_are_one_line(tmp_path):
    code = (
        "import resource, sys; import cluster.cli, cluster.execution, cluster.command_line.progress;"
        "resource.setrlimit(resource.RLIMIT_NOFILE, (4, 4)); sys.exit(cluster.cli.main(sys.argv[1:]))"
    )
    command = [sys.executable, "-c", code, "resume", str(tmp_path)]
    (tmp_path / "config.yaml").write_text("seed: 1\n")
    ended = subprocess.run(command, capture_output=True, text=True, timeout=200)
    assert ended.returncode == 2, ended.stderr
    assert "Too many open files" in ended.stderr
    assert "Traceback" not in ended.stderr
