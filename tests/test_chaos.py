"""What the chaos script looks at: a run that is whole, and every way in which it could not be."""

import random
import shutil
import sqlite3

import pytest

import cluster
from tests.chaos import Chaos, Violation
from tests.tiny_experiment import tiny_federation

pytestmark = pytest.mark.usefixtures("no_pictures")


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """An undisturbed run of six rounds."""
    root = tmp_path_factory.mktemp("chaos")
    cluster.run(tiny_federation(root, rounds=6), root / "whole-inline")
    return root


@pytest.fixture
def story(whole, tmp_path):
    """A chaos, and a story's folder that equals the undisturbed run, in MLflow too."""
    shutil.copytree(whole / "whole-inline", tmp_path / "whole-inline")
    shutil.copytree(whole / "whole-inline", tmp_path / "story")
    with sqlite3.connect(tmp_path / "mlflow.db") as database:
        database.execute("create table tags (run_uuid, key, value)")
        database.execute("create table metrics (run_uuid, key, step)")
        database.execute("create table runs (run_uuid, status)")
        database.execute("insert into tags values ('a', 'story', 'story')")
        database.execute("insert into runs values ('a', 'FINISHED')")
        for key in ("train/loss", "test/accuracy", "comm/uplink_bytes"):
            database.executemany(
                "insert into metrics values ('a', ?, ?)", [(key, step) for step in range(1, 7)]
            )
    database.close()
    return Chaos(tmp_path, random.Random(0)), tmp_path / "story"


def test_a_run_that_equals_the_undisturbed_one_is_taken(story):
    chaos, folder = story
    chaos.check(folder)


def changed(file, change):
    file.write_text(change(file.read_text(encoding="utf-8")), encoding="utf-8")


@pytest.mark.parametrize(
    ("change", "found"),
    [
        (lambda text: text + text.splitlines(keepends=True)[-1], "has rounds"),
        (lambda text: "".join(text.splitlines(keepends=True)[:-1]), "has rounds"),
        (lambda text: "".join(reversed(text.splitlines(keepends=True))), "has rounds"),
        (lambda text: text[:-1], "not whole"),
        (lambda text: text.replace('"train/loss": ', '"train/loss": 1'), "other lines"),
    ],
    ids=["doubled", "lost", "in another order", "cut short", "changed"],
)
def test_lines_that_are_not_whole_and_there_once(story, change, found):
    chaos, folder = story
    changed(folder / "rounds.jsonl", change)
    with pytest.raises(Violation, match=found):
        chaos.check(folder)


def test_another_bit_in_the_model(story):
    chaos, folder = story
    content = bytearray((folder / "model.safetensors").read_bytes())
    content[-1] ^= 1
    (folder / "model.safetensors").write_bytes(content)
    with pytest.raises(Violation, match="another model"):
        chaos.check(folder)


@pytest.mark.parametrize(
    ("statement", "found"),
    [
        ("insert into tags values ('b', 'story', 'story')", "2 runs in MLflow"),
        ("delete from tags", "0 runs in MLflow"),
        ("insert into metrics values ('a', 'test/accuracy', 3)", "points of test/accuracy .* more than once"),
        ("delete from metrics where key = 'train/loss' and step = 6", "has train/loss of rounds"),
        ("update runs set status = 'RUNNING'", "is RUNNING"),
    ],
)
def test_what_mlflow_has_too_often_or_not_at_all(story, statement, found):
    chaos, folder = story
    with sqlite3.connect(folder.parent / "mlflow.db") as database:
        database.execute(statement)
    database.close()
    with pytest.raises(Violation, match=found):
        chaos.check(folder)
