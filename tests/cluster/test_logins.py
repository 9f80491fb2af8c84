"""Passwords in addresses: refused and not repeated, hidden in older files, looked up where they are used."""

import json
from pathlib import Path

import fsspec
import pytest
import yaml

import cluster
from cluster.cli import main
from cluster.configuration.config import resolve
from cluster.logins import LoginError, hidden, masked, place, problem, written_out
from cluster.records.run_folder import RunFolder
from cluster.records.shared_storage import SharedStorage
from tests.cluster.compare.made import write_run
from tests.tiny_experiment import tiny_federation
from tuning.storage import open_database
from tuning.study import load_plan

PASSWORD = "hunter2/@:x"


@pytest.mark.parametrize(
    "address",
    [
        "postgresql://me:hunter2@host/db",
        "postgresql://me:hun@ter2/x@host/db",
        "ftp://:hunter2@host/runs",
        "s3://KEY:hunter2@bucket/runs",
        "x://host/db?sslmode=1&password=hunter2",
        "x://host/db?api_key=hunter2",
        "postgresql://me:hunter2${PASSWORD}@host/db",
        "simplecache::ftp://me:hunter2@host/x",
    ],
)
def test_a_password_is_found_and_hidden(address):
    assert "unter2" not in masked(address)
    assert "ter2" not in masked(f"cannot reach {address}: no route")
    assert problem("checkpoint_uri", address) is not None
    assert "ter2" not in problem("checkpoint_uri", address)


@pytest.mark.parametrize(
    "address",
    [
        "s3://bucket/a:b@c",
        "file:///data/a:b@c",
        "http://host:5000/path",
        "sqlite:////folder/mlflow.db",
        "ftp://me@host/runs",
        "postgresql://me:${PASSWORD}@host/db",
        "${STORAGE}",
        "x://host/db?password=${PASSWORD}&x=1",
        "abfs://container@account.dfs.core.windows.net/runs",
    ],
)
def test_what_holds_none_is_left_as_it_is(address):
    assert masked(address) == address
    assert problem("study.storage", address) is None


@pytest.mark.parametrize("key", ["checkpoint_uri", "tracking.uri", "study.storage"])
@pytest.mark.parametrize("how", ["override", "file"])
def test_a_password_in_an_experiment_is_refused_and_not_repeated(tmp_path, monkeypatch, capsys, key, how):
    monkeypatch.chdir(tmp_path)
    address = "postgresql://me:hunter2@host/db"
    command = "tune" if key.startswith("study") else "run"
    preset = "study-digits" if command == "tune" else "quickstart"
    words = [preset, f"{key}={address}"]
    if how == "file":
        section, _, last = key.rpartition(".")
        text = f"{section}: {{{last}: '{address}'}}" if section else f"{key}: {address}"
        study = "  methods: [topk]\n  storage: " + address
        Path("mine.yaml").write_text(
            f"extends: {preset}\n" + (f"study:\n{study}\n" if section == "study" else text)
        )
        words = ["mine.yaml"]
    assert main([command, *words, "--output", "out"]) == 2
    said = capsys.readouterr()
    assert f"{key}: no password belongs into an address" in said.err
    assert "MLFLOW_TRACKING_PASSWORD" in said.err if key == "tracking.uri" else "${PASSWORD}" in said.err
    assert "hunter2" not in said.out + said.err
    assert not Path("out").exists()


def test_other_mistakes_in_the_same_section_do_not_repeat_it_either(tmp_path, capsys):
    assert main(["run", "quickstart", "tracking=http://me:hunter2@host"]) == 2
    assert main(["run", "quickstart", "checkpoint_uri=[ftp://me:hunter2@host]"]) == 2
    assert "hunter2" not in capsys.readouterr().err


@pytest.mark.parametrize(
    "words",
    [
        ["resume", "ftp://me:hunter2@host/runs/x"],
        ["ui", "--store", "http://me:hunter2@host"],
        ["compare", "digits", "--store", "postgresql://me:hunter2@host/db"],
        ["tune", "study-digits", "study.storage=x://host/db?password=hunter2"],
    ],
)
def test_what_is_typed_is_not_repeated(tmp_path, monkeypatch, capsys, words):
    monkeypatch.chdir(tmp_path)
    assert main(words) == 2
    said = capsys.readouterr()
    assert "hunter2" not in said.out + said.err


def test_a_variable_is_looked_up_where_it_is_used_and_nowhere_else(monkeypatch):
    monkeypatch.setenv("PASSWORD", PASSWORD)
    address = "postgresql://me:${PASSWORD}@host/db"
    assert written_out("study.storage", address) == f"postgresql://me:{PASSWORD}@host/db"
    # As SQLAlchemy reads it: every special character of the login as %XX.
    assert written_out("study.storage", address, quoted=True) == ("postgresql://me:hunter2%2F%40%3Ax@host/db")
    assert hidden(f"no {PASSWORD} and no hunter2%2F%40%3Ax", address) == "no ${PASSWORD} and no ${PASSWORD}"
    assert place(address) == "postgresql://host/db"
    monkeypatch.delenv("PASSWORD")
    with pytest.raises(LoginError, match=r"study.storage: .* the environment has no variable PASSWORD"):
        written_out("study.storage", address)


def test_a_run_keeps_the_name_of_the_variable_alone(tmp_path, cache, monkeypatch, no_pictures):
    memory = fsspec.filesystem("memory")
    monkeypatch.setenv("SPARSYFED_TEST_BUCKET", "secret-bucket")
    config = tiny_federation(tmp_path, checkpoint_uri="memory://${SPARSYFED_TEST_BUCKET}", rounds=1)
    cluster.run(config, tmp_path / "mine")
    assert memory.exists("/secret-bucket/mine/config.yaml")
    for file in (path for path in (tmp_path / "mine").rglob("*") if path.is_file()):
        assert b"secret-bucket" not in file.read_bytes(), file
    assert b"secret-bucket" not in memory.cat_file("/secret-bucket/mine/config.yaml")


def test_storage_that_cannot_be_used_is_named_without_the_password(monkeypatch):
    monkeypatch.setenv("PASSWORD", "hunter2")
    with pytest.raises(ValueError, match=r"\$\{PASSWORD\}") as refused:
        SharedStorage("nosuchsystem-${PASSWORD}://x")
    assert "hunter2" not in str(refused.value)
    with pytest.raises(ValueError, match=r"checkpoint_uri: ftp://me:\$\{PASSWORD\}@no-such-host.invalid"):
        SharedStorage("ftp://me:${PASSWORD}@no-such-host.invalid/x")
    with pytest.raises(ValueError, match=r"study.storage: nosuch://me:\$\{PASSWORD\}@host/db") as refused:
        open_database("nosuch://me:${PASSWORD}@host/db")
    assert "hunter2" not in str(refused.value)


def test_an_older_folder_with_a_password_is_read_and_shown_without_it(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    folder = write_run(tmp_path / "runs" / "old", [0.5])
    tree = yaml.safe_load((folder / "config.yaml").read_text())
    tree["checkpoint_uri"] = "ftp://me:hunter2@host/runs"
    tree["tracking"]["uri"] = "http://me:hunter2@host"
    (folder / "config.yaml").write_text(yaml.safe_dump(tree))
    assert RunFolder(folder).config().checkpoint_uri == "ftp://me:***@host/runs"
    assert main(["describe", str(folder)]) == 0
    assert main(["compare", "--output", "table"]) == 0
    said = capsys.readouterr()
    assert "ftp://me:***@host/runs" in said.out
    assert "hunter2" not in said.out + said.err
    (folder / "checkpoints").mkdir()
    assert main(["resume", str(folder)]) == 2  # its storage is used: the password has to be given anew
    assert "checkpoint_uri: no password belongs into an address" in capsys.readouterr().err


def test_a_study_goes_on_where_its_password_became_a_variable(tmp_path):
    plan = load_plan("study-digits", ["study.storage=postgresql://me:${PASSWORD}@host/db"])
    before = json.loads(json.dumps(plan.dump()))
    before["study"]["storage"] = "postgresql://me:***@host/db"
    plan.check_continues(before, tmp_path)
    before["study"]["storage"] = "postgresql://me:***@other/db"
    with pytest.raises(cluster.ConfigError, match=r"study\.storage was"):
        plan.check_continues(before, tmp_path)
    assert (
        resolve("quickstart", ["checkpoint_uri=s3://bucket/${USER}"]).checkpoint_uri == "s3://bucket/${USER}"
    )
