"""Runs kept on shared storage: what is copied, in which order, and a run rebuilt elsewhere."""

import shutil

import fsspec
import pytest
import yaml

import cluster
from cluster.cli import main
from cluster.records.run_folder import RunFolder, comparable
from cluster.records.shared_storage import SharedStorage, StorageError
from cluster.rounds.driver import Driver
from tests.tiny_experiment import tiny_federation

pytestmark = pytest.mark.usefixtures("no_pictures")


@pytest.fixture
def shared(tmp_path):
    """An empty folder in memory, as storage that outlives a machine."""
    memory = fsspec.filesystem("memory")
    memory.store.clear()
    yield f"memory://runs-{tmp_path.name}"
    memory.store.clear()


def config(tmp_path, **more):
    return tiny_federation(tmp_path, rounds=6, checkpoint_every=2, **more)


def files(uri):
    system, root = fsspec.core.url_to_fs(uri)
    return {path.removeprefix(root).lstrip("/") for path in system.find(root)}


def assert_same_run(one, other):
    assert (one / "model.safetensors").read_bytes() == (other / "model.safetensors").read_bytes()
    lines = [[comparable(line) for line in RunFolder(folder).rounds()] for folder in (one, other)]
    assert lines[0] == lines[1]


@pytest.mark.parametrize("system", ["memory", "file"])
def test_a_run_whose_machine_is_lost_goes_on_elsewhere_to_the_same_bits(shared, tmp_path, system):
    uri = shared if system == "memory" else f"file://{tmp_path / 'shared'}"
    cluster.run(config(tmp_path), tmp_path / "whole")
    cluster.run(config(tmp_path, checkpoint_uri=uri, stop_after=3), tmp_path / "lost" / "mine")
    shutil.rmtree(tmp_path / "lost")
    # Checkpoints after round 2 and, because it was stopped there, 3; no half-written file is left.
    assert files(f"{uri}/mine") == {
        "config.yaml",
        "rounds.jsonl",
        "result.json",
        "model.safetensors",
        "README.md",
        "checkpoints/round-000002.safetensors",
        "checkpoints/round-000003.safetensors",
    }
    result = cluster.resume(f"{uri}/mine", ["stop_after=null"], tmp_path / "new" / "mine", trust=True)
    assert result.summary["complete"]
    assert_same_run(tmp_path / "new" / "mine", tmp_path / "whole")
    # The copy went on too; what the folder dropped, it dropped.
    checkpoints = (tmp_path / "new" / "mine" / "checkpoints").glob("*.safetensors")
    kept = {f"checkpoints/{path.name}" for path in checkpoints}
    assert {name for name in files(f"{uri}/mine") if name.startswith("checkpoints/")} == kept


def test_a_killed_run_is_resumed_from_its_last_copied_checkpoint(shared, tmp_path, monkeypatch):
    cluster.run(config(tmp_path), tmp_path / "whole")

    def killed(self, held):
        raise KeyboardInterrupt

    settings = config(tmp_path, checkpoint_uri=shared)
    original = Driver.checkpoint
    monkeypatch.setattr(
        Driver,
        "checkpoint",
        lambda self, held: original(self, held) if self.state.round < 4 else killed(self, held),
    )
    with pytest.raises(KeyboardInterrupt):
        cluster.run(settings, tmp_path / "mine")
    monkeypatch.undo()
    assert "result.json" not in files(f"{shared}/mine")
    cluster.resume(f"{shared}/mine", output=tmp_path / "elsewhere", trust=True)
    assert_same_run(tmp_path / "elsewhere", tmp_path / "whole")


def test_storage_that_is_away_stops_nothing_and_is_caught_up_with(shared, tmp_path, monkeypatch):
    write, away = SharedStorage._write, [True]

    def sometimes(self, name, content):
        if name.startswith("checkpoints/round-000002") and away[0]:
            away[0] = False
            raise OSError("no route to host")
        write(self, name, content)

    monkeypatch.setattr(SharedStorage, "_write", sometimes)
    result = cluster.run(config(tmp_path, checkpoint_uri=shared), tmp_path / "mine")
    assert result.summary["complete"]
    assert "checkpoint_uri_behind" not in result.summary
    kept = {f"checkpoints/{path.name}" for path in (tmp_path / "mine" / "checkpoints").glob("*.safetensors")}
    assert kept == {name for name in files(f"{shared}/mine") if name.startswith("checkpoints/")}


def test_another_runs_copy_is_not_overwritten(shared, tmp_path):
    cluster.run(config(tmp_path, checkpoint_uri=shared, stop_after=1), tmp_path / "a" / "mine")
    with pytest.raises(StorageError, match=r"holds a run already; .*sparsyfed resume memory://.*/mine"):
        cluster.run(config(tmp_path, checkpoint_uri=shared), tmp_path / "b" / "mine")
    assert not (tmp_path / "b").exists()


@pytest.mark.parametrize(
    ("uri", "complaint"),
    [
        ("nosuch://bucket/runs", r"checkpoint_uri: nosuch://bucket/runs/mine: Protocol not known: nosuch"),
        ("file:///proc/runs", r"checkpoint_uri: file:///proc/runs/mine cannot be written: .*Error"),
    ],
)
def test_storage_that_cannot_be_used_is_found_out_before_anything_starts(tmp_path, uri, complaint):
    with pytest.raises(StorageError, match=complaint):
        cluster.run(config(tmp_path, checkpoint_uri=uri), tmp_path / "mine")
    assert not (tmp_path / "mine").exists()


def test_a_uri_without_a_run_names_what_is_there(shared, tmp_path, monkeypatch, capsys):
    cluster.run(config(tmp_path, checkpoint_uri=shared, stop_after=1), tmp_path / "mine")
    monkeypatch.chdir(tmp_path)
    assert main(["resume", shared]) == 2
    assert f"{shared} holds no run; it holds mine" in capsys.readouterr().err
    assert main(["resume", "--trust", f"{shared}/mine", "--output", "mine"]) == 2
    assert "exists and is not empty" in capsys.readouterr().err
    assert main(["resume", "mine", "--output", "other"]) == 2
    assert "--output is for a run named by its URI" in capsys.readouterr().err
    assert main(["resume", "--trust", f"{shared}/mine", "stop_after=2"]) == 0  # into runs/mine
    assert len(RunFolder(tmp_path / "runs" / "mine").rounds()) == 2


def test_a_tracking_store_of_the_lost_machine_becomes_one_beside_the_new_folder(shared, tmp_path):
    folder = RunFolder.create(tmp_path / "mine", config(tmp_path))
    tree = yaml.safe_load((folder.path / "config.yaml").read_text())
    tree["tracking"] = {"enabled": True, "uri": "sqlite:////lost/machine/mlflow.db"}
    (folder.path / "config.yaml").write_text(yaml.safe_dump(tree))
    storage = SharedStorage.of_run(shared, folder.path)
    assert storage.push(folder)
    rebuilt = storage.fetch(tmp_path / "new" / "mine")
    assert rebuilt.config().tracking.uri == f"sqlite:///{tmp_path / 'new' / 'mlflow.db'}"
