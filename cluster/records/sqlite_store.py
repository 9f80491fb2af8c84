"""An SQLite store as a file: how a URI names it, whether it is whole, and how a new one is made."""

from __future__ import annotations

import os
import sqlite3
import urllib.parse
from contextlib import closing
from pathlib import Path

from filelock import FileLock

from cluster.references import UserError

#: Schema of the stores that the pinned MLflow makes and takes (its last migration).
SCHEMA = "dc11669786a5"

_SCHEMES = ("sqlite:///", "sqlite+pysqlite:///")
_BESIDE = ("", "-journal", "-wal", "-shm")


class TrackingError(UserError):
    """A tracking store or a run's tracking file that cannot be used; says which and what to do."""


# ------------------------------------------------------------------------------------------ names in URIs


def sqlite_uri(database: Path) -> str:
    """The URI of a database file, whatever its folders are called."""
    path = str(database)
    for sign in "%?#":  # the rest is readable as it is; % first
        path = path.replace(sign, urllib.parse.quote(sign))
    return f"sqlite:///{path}"


def is_sqlite(uri: str) -> bool:
    """Whether ``uri`` names an SQLite database."""
    return uri.startswith(("sqlite:", "sqlite+pysqlite:"))


def sqlite_file(uri: str) -> Path:
    """The absolute path of the database file of an ``sqlite:///`` URI.

    Raises:
        TrackingError: It names none.
    """
    scheme = next((scheme for scheme in _SCHEMES if uri.startswith(scheme)), None)
    path, _, options = uri.removeprefix(scheme or "").partition("?")
    if scheme is None or not path or path == ":memory:":
        raise TrackingError(f"tracking store {uri} names no file; write sqlite:////folder/mlflow.db")
    if "/" in options:
        right = sqlite_uri(Path(uri.removeprefix(scheme)))
        raise TrackingError(f"tracking store {uri}: in a URI the ? of a path is written %3F: {right}")
    return Path(os.path.abspath(urllib.parse.unquote(path)))


def absolute_uri(uri: str) -> str:
    """The URI that means the same from any working directory."""
    if not is_sqlite(uri):
        return uri.rstrip("/")
    return sqlite_uri(sqlite_file(uri)) + "".join(uri.partition("?")[1:])


def as_mlflow_takes_it(uri: str) -> str:
    """The store's absolute URI for MLflow, which would make folders named ``%3F`` for one that is quoted."""
    uri = absolute_uri(uri)
    return uri.replace("sqlite:", "sqlite+pysqlite:", 1) if is_sqlite(uri) and "%" in uri else uri


def artifact_folder(uri: str) -> Path:
    """Where an SQLite store's artifacts lie: beside it, not in the working directory as MLflow has it."""
    return sqlite_file(uri).parent / "mlartifacts"


# --------------------------------------------------------------------------------------- whole, or made anew


def check_file(uri: str) -> None:
    """Refuses a database that cannot be a store; one that is not there yet, or empty, can become one.

    Raises:
        TrackingError: Names the file, what is wrong with it and the cure.
    """
    database = sqlite_file(uri)
    if not database.parent.is_dir():
        raise TrackingError(f"tracking store {uri}: the folder {database.parent} does not exist")
    if not os.access(database if database.exists() else database.parent, os.W_OK):
        raise TrackingError(f"tracking store {uri}: {database} cannot be written")
    if database.exists():
        problem = _problem(database)
        if problem is not None:
            raise TrackingError(f"tracking store {uri}: {database} {problem}")


def prepare(uri: str) -> None:
    """Makes the store where there is none yet, for seconds, and whole or not at all, also after a kill.

    MLflow creates a store by some seventy migrations, none of which can be repeated: one that was cut off
    would be broken for good. So it is made under another name, which it gives up when it is done.
    """
    database = sqlite_file(uri)
    if _holds_something(database):
        return
    with FileLock(database.with_name(f"{database.name}.lock"), timeout=120):
        if _holds_something(database):  # another process was faster
            return
        building = database.with_name(f".{database.name}.building")
        for ending in _BESIDE:  # left by a process that was killed
            building.with_name(building.name + ending).unlink(missing_ok=True)
        _make(building, artifact_folder(uri).as_uri())
        os.replace(building, database)


def _make(building: Path, artifacts: str) -> None:
    from mlflow.store.tracking.sqlalchemy_store import SqlAlchemyStore

    uri = as_mlflow_takes_it(sqlite_uri(building))
    try:
        SqlAlchemyStore(uri, artifacts)
    finally:  # no connection may outlive the name: SQLite finds its journal by it
        engine = SqlAlchemyStore._engine_map.pop(uri, None)
        if engine is not None:
            engine.dispose()


def _holds_something(database: Path) -> bool:
    return database.exists() and database.stat().st_size > 0


def _problem(database: Path) -> str | None:
    """What is wrong with a file that is there, and the cure; None where nothing is."""
    if not database.is_file():
        return "is no file"
    with database.open("rb") as file:
        head = file.read(32)
    if not head:
        return None
    if head[:16] != b"SQLite format 3\0":
        return "is not an SQLite database; name another file"
    anew = "restore it, or move it away: `sparsyfed sync DIR` then delivers a run to a new one"
    page = int.from_bytes(head[16:18], "big")
    if database.stat().st_size < (65536 if page == 1 else page) * int.from_bytes(head[28:32], "big"):
        return f"is cut short; {anew}"
    try:
        with closing(sqlite3.connect(f"{database.as_uri()}?mode=ro", uri=True)) as store:
            tables = {
                name for (name,) in store.execute("select name from sqlite_master where type = 'table'")
            }
            if tables and not {"experiments", "runs"} & tables:
                return "is a database of something else; name another file"
            found = runs = None
            if "alembic_version" in tables:
                found = store.execute("select version_num from alembic_version").fetchone()
            if "runs" in tables:
                runs = store.execute("select count(*) from runs").fetchone()[0]
    except sqlite3.OperationalError:
        return None  # another process is writing it: the delivery will see
    except sqlite3.DatabaseError as error:
        return f"is damaged ({error}); {anew}"
    if not tables or (found is not None and found[0] == SCHEMA):
        return None
    schema = found[0] if found else "none"
    if runs:
        return (
            f"is of another version of MLflow (schema {schema}, here {SCHEMA}) and holds {runs} runs; "
            f"copy it, then: mlflow db upgrade {sqlite_uri(database)}"
        )
    return (
        f"was cut off while it was made (schema {schema} of {SCHEMA}) and holds no run: delete it, and "
        "`sparsyfed sync DIR` delivers what waits in a run's folder"
    )
