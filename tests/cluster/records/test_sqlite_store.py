"""An SQLite store is made whole or not at all, is told from what is broken, and lies where its URI says."""

import os
import signal
import sqlite3
import subprocess
import sys
from contextlib import closing
from pathlib import Path

import pytest

from cluster.records import tracking_store
from cluster.records.sqlite_store import (
    SCHEMA,
    TrackingError,
    absolute_uri,
    check_file,
    sqlite_file,
    sqlite_uri,
)
from cluster.records.tracking import sync
from tests.cluster.records.tracked_runs import finish, steps, tracker, write

pytestmark = pytest.mark.usefixtures("fast_tracking")

#: Folders as people name them, and what would be read as something else in a URI.
NAMES = ["lr?x=1", "100%", "a%20b", "a#b", "a & b", "q'u\"o", "ünï é", "a;b,c=[1]", "b\\s", "sqlite:", "?"]


def whole(database: Path) -> bool:
    with closing(sqlite3.connect(database)) as store:
        return store.execute("select version_num from alembic_version").fetchall() == [(SCHEMA,)]


# ------------------------------------------------------------------------------------------------- names


@pytest.mark.parametrize("name", NAMES)
def test_a_uri_names_its_file_whatever_the_folder_is_called(name: str) -> None:
    from sqlalchemy import make_url

    database = Path("/data") / name / "mlflow.db"
    uri = sqlite_uri(database)
    assert sqlite_file(uri) == database
    assert absolute_uri(uri) == uri
    assert make_url(uri).database == str(database)  # who else reads it: MLflow's and Optuna's SQLAlchemy


def test_ordinary_uris_are_as_they_were() -> None:
    assert sqlite_uri(Path("/a b/ü/mlflow.db")) == "sqlite:////a b/ü/mlflow.db"
    assert absolute_uri("sqlite:////a/mlflow.db?timeout=5") == "sqlite:////a/mlflow.db?timeout=5"
    assert absolute_uri("http://host:5000/") == "http://host:5000"


def test_a_question_mark_that_was_not_written_as_one_is_named() -> None:
    with pytest.raises(TrackingError, match=r"written %3F: sqlite:////a/lr%3Fx/mlflow\.db$"):
        sqlite_file("sqlite:////a/lr?x/mlflow.db")


@pytest.mark.parametrize("name", ["lr?x=1", "100%", "a#b & 'c' ü"])
def test_store_and_artifacts_lie_beside_the_run(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, template: Path
) -> None:
    root = tmp_path / name
    (root / "run").mkdir(parents=True)
    (root / "mlflow.db").write_bytes(template.read_bytes())
    monkeypatch.chdir(tmp_path)
    uri = sqlite_uri(root / "mlflow.db")
    picture = root / "run" / "curves.png"
    picture.write_bytes(b"picture")
    run = tracker(root / "run", uri)
    write(root / "run", 1)
    run.start()
    assert finish(run, picture)
    assert sync(root / "run").complete
    client = tracking_store.connect(uri)
    assert run.run_id is not None
    assert [point.step for point in client.get_metric_history(run.run_id, "test/accuracy")] == [1]
    assert Path(client.download_artifacts(run.run_id, "curves.png")).read_bytes() == b"picture"
    assert len(list((root / "mlartifacts").rglob("curves.png"))) == 1
    assert [path.name for path in tmp_path.iterdir()] == [name]


# ------------------------------------------------------------------------------------------------- making


@pytest.fixture(scope="module")
def template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A new store, made by the product; its file holds all of it."""
    folder = tmp_path_factory.mktemp("a? new store")
    tracking_store.connect(sqlite_uri(folder / "mlflow.db"))
    assert whole(folder / "mlflow.db")
    assert sorted(path.name for path in folder.iterdir()) == ["mlflow.db", "mlflow.db.lock"]
    return folder / "mlflow.db"


KILLED = """
import os, signal, sys
from pathlib import Path

uri = sys.argv[1]
from cluster.records import sqlite_store, tracking_store
import alembic.runtime.migration as migration

def die(*_, **__):
    os.kill(os.getpid(), signal.SIGKILL)

for point in ("first migration", "fortieth migration", "before its name"):
    child = os.fork()
    if child:
        print(os.WTERMSIG(os.waitpid(child, 0)[1]))
        continue
    wanted, seen = {"first migration": 1, "fortieth migration": 40}.get(point), []
    run = migration.HeadMaintainer.update_to_step
    def counted(self, step):
        seen.append(step)
        if len(seen) == wanted:
            die()
        return run(self, step)
    migration.HeadMaintainer.update_to_step = counted
    if wanted is None:
        os.replace = die
    tracking_store.connect(uri)
    os._exit(0)
"""


def test_a_kill_while_it_is_made_leaves_none_and_the_next_run_makes_it(tmp_path: Path) -> None:
    database = tmp_path / "mlflow.db"
    command = [sys.executable, "-c", KILLED, sqlite_uri(database)]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=200)
    assert ended.stdout.split() == [str(int(signal.SIGKILL))] * 3, ended.stderr
    assert not database.exists()
    assert [path.name for path in tmp_path.glob(".*")] == [".mlflow.db.building"]
    (tmp_path / "run").mkdir()
    run = tracker(tmp_path / "run", sqlite_uri(database))
    write(tmp_path / "run", 1)
    run.start()
    assert finish(run)
    assert whole(database)
    assert not list(tmp_path.glob(".*"))
    assert steps(sqlite_uri(database), run.run_id) == [1]


# ------------------------------------------------------------------------------------------------- broken


def half_made(database: Path) -> None:
    """What a kill in MLflow's migrations left behind."""
    with closing(sqlite3.connect(database)) as store:
        store.executescript(
            "create table experiments (id); create table runs (id);"
            "create table alembic_version (version_num);"
            "insert into alembic_version values ('451aebb31d03')"
        )


def unversioned(database: Path) -> None:
    with closing(sqlite3.connect(database)) as store:
        store.executescript("create table experiments (id)")


def of_another_version(database: Path) -> None:
    half_made(database)
    with closing(sqlite3.connect(database)) as store:
        store.execute("insert into runs values (1)")
        store.commit()


def of_something_else(database: Path) -> None:
    with closing(sqlite3.connect(database)) as store:
        store.executescript("create table studies (id)")


BROKEN = {
    "half made": (half_made, r"was cut off while it was made \(schema 451aebb31d03 of .*: delete it"),
    "unversioned": (unversioned, r"was cut off while it was made \(schema none of .*sparsyfed sync DIR"),
    "another version": (
        of_another_version,
        r"another version of MLflow .* 1 runs; copy it, .*mlflow db upgrade",
    ),
    "something else": (of_something_else, "is a database of something else"),
    "text": (lambda path: path.write_text("not a database at all"), "is not an SQLite database"),
    "zeros": (lambda path: path.write_bytes(bytes(9000)), "is not an SQLite database"),
    "a folder": (Path.mkdir, "is no file"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_a_broken_store_is_named_with_the_cure(case: str, tmp_path: Path) -> None:
    make, message = BROKEN[case]
    database = tmp_path / "mlflow.db"
    make(database)
    before = os.stat(database).st_size
    with pytest.raises(TrackingError, match=message) as refusal:
        check_file(sqlite_uri(database))
    assert str(database) in str(refusal.value)
    with pytest.raises(TrackingError, match=message):
        tracking_store.connect(sqlite_uri(database))
    assert os.stat(database).st_size == before


@pytest.mark.parametrize("share", [0.1, 0.5, 0.99])
def test_a_store_that_was_cut_short_is_named(share: float, tmp_path: Path, template: Path) -> None:
    content = template.read_bytes()
    database = tmp_path / "mlflow.db"
    database.write_bytes(content[: int(share * len(content))])
    with pytest.raises(TrackingError, match=r"mlflow\.db is cut short; restore it, or move it away"):
        check_file(sqlite_uri(database))


def test_an_empty_file_becomes_a_store(tmp_path: Path) -> None:
    """Nothing can be lost of it, and SQLite itself takes it for an empty database."""
    database = tmp_path / "mlflow.db"
    database.touch()
    tracking_store.connect(sqlite_uri(database))
    assert whole(database)


def test_the_schema_is_that_of_the_installed_mlflow() -> None:
    from mlflow.store.db.utils import _get_latest_schema_revision

    assert _get_latest_schema_revision() == SCHEMA
