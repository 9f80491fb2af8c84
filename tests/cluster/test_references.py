"""The one loader of a user's own code, and the nearest spelling."""

from __future__ import annotations

import os
import pwd
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from cluster.references import (
    UserError,
    default_cache,
    did_you_mean,
    file_name,
    in_home,
    is_file,
    is_folder,
    load_reference,
    nearest,
    no_path,
)


class Wrong(UserError):
    pass


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty working directory that is not on the path yet; modules imported from it are forgotten."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [p for p in sys.path if p not in ("", str(tmp_path))])
    before = set(sys.modules)
    yield tmp_path
    for name in set(sys.modules) - before:
        del sys.modules[name]


def test_a_module_of_the_working_directory_is_found(here):
    (here / "mine_of_a_user.py").write_text("thing = 3\n")
    assert load_reference("data.name", "mine_of_a_user:thing", Wrong) == 3
    assert sys.path[-1] == str(here)  # last, so that it hides no library


@pytest.mark.parametrize(
    ("reference", "says"),
    [
        ("mine_absent:thing", "there is no module 'mine_absent'"),
        ("mine_present:thin", "module 'mine_present' has no 'thin'; did you mean thing?"),
        ("mine_present:", "has no ''"),
        ("mine_present", "has no ''"),
        (":thing", "expected module:attribute"),
        ("..mine:thing", "expected module:attribute"),
    ],
)
def test_what_is_missing_is_named(here, reference, says):
    (here / "mine_present.py").write_text("thing = 3\n")
    with pytest.raises(Wrong) as caught:
        load_reference("model.name", reference, Wrong)
    assert says in str(caught.value)
    assert str(caught.value).startswith(f"model.name = {reference!r}: ")


@pytest.mark.parametrize("source", ["import no_such_module_at_all", "raise ValueError('mine')", "1 / 0"])
def test_a_failure_inside_the_module_keeps_its_own_traceback(here, source):
    (here / "mine_broken.py").write_text(source)
    with pytest.raises((ImportError, ValueError, ZeroDivisionError)) as caught:
        load_reference("algorithm.name", "mine_broken:A", Wrong)
    assert not isinstance(caught.value, UserError)


def test_a_clash_with_a_package_of_the_project_is_named(here):
    (here / "algorithms.py").write_text("Mine = 1\n")
    with pytest.raises(Wrong, match="algorithms is a package of sparsyfed itself: rename your own"):
        load_reference("algorithm.name", "algorithms:Mine", Wrong)


def test_nearest_spelling():
    assert nearest("sparsifed", ["topk", "sparsyfed"]) == "sparsyfed"
    assert nearest("xyz", ["topk"]) is None
    assert did_you_mean("tpok", ["topk"]) == "; did you mean topk?"
    assert did_you_mean(7, ["topk"]) == ""


def test_a_name_that_is_too_long_is_cut_and_stays_its_own():
    assert file_name("short") == "short"
    one, other = file_name("é" * 200 + "a"), file_name("é" * 200 + "b")
    assert one != other
    assert 140 < len(one.encode()) <= 160
    assert one.startswith("é" * 70)


@pytest.mark.parametrize("path", ["a" * 256, "x/" + "é" * 128 + "/y", "a\0b"])
def test_what_no_file_can_be_called(path):
    assert no_path(path) is not None
    assert not is_file(path)
    assert not is_folder(path)
    with pytest.raises(Wrong, match=r"at most 255 bytes|zero byte"):
        in_home(path, Wrong)


def test_paths_that_files_may_have():
    for path in ("a" * 255, "x/" * 1000 + "y", "", "é" * 127):
        assert no_path(path) is None


def test_a_home_that_is_not_there(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    assert in_home("~/data", Wrong) == tmp_path / "data"
    assert default_cache() == tmp_path / ".cache" / "sparsyfed"
    with pytest.raises(Wrong, match="there is no home folder ~nobody_at_all"):
        in_home("~nobody_at_all/data", Wrong)


@pytest.fixture
def homeless(monkeypatch, tmp_path):
    """A container's user with neither HOME nor an entry in passwd; returns where its cache goes."""

    def unknown(uid):
        raise KeyError(uid)

    monkeypatch.delenv("HOME", raising=False)
    monkeypatch.setattr(pwd, "getpwuid", unknown)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    return tmp_path / f"sparsyfed-{os.geteuid()}"


def test_without_a_home_there_is_a_folder_of_the_users_own(homeless):
    with pytest.raises(Wrong, match="there is no home folder ~; give the whole path"):
        in_home("~/data", Wrong)
    assert default_cache() == homeless / ".cache" / "sparsyfed" == default_cache()
    assert homeless.stat().st_mode & 0o777 == 0o700
    assert os.environ["HOME"] == str(homeless)  # for what this process starts


#: A process whose user is in no passwd, as in a container.
HOMELESS = """
import os, pwd

def unknown(uid):
    raise KeyError(uid)

pwd.getpwuid = unknown
from cluster.actors.ray_session import connection, private_cluster
from cluster.records.tracking_store import connect
"""


@pytest.mark.parametrize(
    "use", ["connect('http://127.0.0.1:9')", "with connection('local', **private_cluster(1, 1)): pass"]
)
def test_ray_and_mlflow_start_without_a_home(tmp_path, use):
    environment = {key: value for key, value in os.environ.items() if key != "HOME"}
    environment |= {"TMPDIR": str(tmp_path), "RAY_TMPDIR": tempfile.gettempdir()}
    code = f"{HOMELESS}\n{use}\nprint(os.environ['HOME'])"
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=120
    )
    assert done.stdout.split() == [f"{tmp_path}/sparsyfed-{os.geteuid()}"], done.stderr


@pytest.mark.parametrize("taken", ["writable by others", "link", "file"])
def test_a_cache_that_somebody_else_laid_out_is_not_taken(homeless, tmp_path, taken):
    if taken == "link":
        homeless.symlink_to(tmp_path)
    elif taken == "file":
        homeless.touch()
    else:
        homeless.mkdir()
        homeless.chmod(0o777)
    with pytest.raises(UserError, match="not this user's alone"):
        default_cache()
