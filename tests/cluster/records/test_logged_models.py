"""The final and the best model are in MLflow once, linked to run, metrics and data, and load without us."""

import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import nn

import cluster
from cluster.cli import main
from cluster.federation import Federation
from cluster.records import logged_models, tracking
from cluster.records.checkpoint import list_rounds
from cluster.records.logged_models import make_models
from cluster.records.outbox import Ending, StoredModel
from cluster.records.run_folder import RunFolder
from tests.cluster.records.tracked_runs import DEADLINE_S, runs_of, steps, wait_for
from tests.tiny_experiment import tiny_federation

pytestmark = pytest.mark.usefixtures("fast_tracking")

SOURCE = {"mlflow.source.name": "sparsyfed", "mlflow.source.type": "LOCAL"}

#: The best of these rounds is not the last one.
PLAN: dict[str, Any] = {"rounds": 3, "checkpoint_every": 1, "local": {"lr": 0.5}}


@pytest.fixture(scope="module")
def played(tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:
    """A run that is computed and tracked nowhere; the oldest round that has a checkpoint is made the best."""
    place = tmp_path_factory.mktemp("played")
    config = tiny_federation(place, **PLAN)
    result = cluster.run(config, place / "run")
    folder = RunFolder(result.folder)
    lines = folder.rounds()
    best = list_rounds(folder.checkpoints)[0]
    assert best < 3
    lines[best - 1]["test/accuracy"] = 0.99
    folder.rounds_file.unlink()
    for line in lines:
        folder.append_round(line)
    return SimpleNamespace(config=config, folder=folder, best=best, federation=Federation.of(config))


def tracker(store: str, folder: RunFolder, experiment: str, register: str | None) -> tracking.Tracker:
    """Of a run that was tracked nowhere before."""
    for cursor in folder.path.glob("tracking*"):
        cursor.unlink()
    target = tracking.TrackingTarget(store, experiment, "fedavg-s3", register)
    data = {"name": "tiny", "digest": "d" * 12, "source_type": "local", "source": "here"}
    return tracking.Tracker(
        folder.path, target, params={"rounds": 3}, tags={"method": "fedavg", **SOURCE}, dataset=data
    )


def deliver(store: str, played: SimpleNamespace, experiment: str, register: str | None = None) -> str:
    """Deliver the run's end with its models, as its driver does."""
    run = tracker(store, played.folder, experiment, register)
    run.start()
    make = lambda: make_models(played.folder, played.federation)  # noqa: E731
    assert run.finish("FINISHED", [], {}, DEADLINE_S, make)
    return str(run.run_id)


def models_of(store: str, run_id: str) -> dict[str, Any]:
    from mlflow.tracking import MlflowClient

    client = MlflowClient(store)
    found = client.search_logged_models([client.get_run(run_id).info.experiment_id])
    assert len({model.name for model in found}) == len(found)  # none is there twice
    return {model.name: model for model in found}


def test_final_and_best_are_linked_and_load_without_this_package(
    store: str, played: SimpleNamespace, tmp_path: Path
) -> None:
    from mlflow.tracking import MlflowClient

    run_id = deliver(store, played, "models-linked", register="models-linked")
    found = models_of(store, run_id)
    for model in found.values():  # what the page's column "Logged from" shows
        assert SOURCE.items() <= model.tags.items()
    assert {name: model.tags["round"] for name, model in found.items()} == {
        "final": "3",
        "best": str(played.best),
    }
    assert {str(model.status) for model in found.values()} == {"READY"}
    run = MlflowClient(store).get_run(run_id)
    assert {(each.model_id, each.step) for each in run.outputs.model_outputs} == {
        (found["final"].model_id, 3),
        (found["best"].model_id, played.best),
    }
    (metric,) = (each for each in found["best"].metrics if each.key == "test/accuracy")
    assert (metric.value, metric.step, metric.dataset_digest) == (0.99, played.best, "d" * 12)
    # In the run itself the point is still there once.
    assert len(MlflowClient(store).get_metric_history(run_id, "test/accuracy")) == 3
    assert not (played.folder.path / "models").exists()

    (version,) = MlflowClient(store).search_model_versions("name = 'models-linked'")
    assert (version.run_id, version.source) == (run_id, found["best"].artifact_location)

    inputs = np.random.default_rng(1).normal(size=(5, 1, 8, 8)).astype(np.float32)
    np.save(tmp_path / "inputs.npy", inputs)
    code = """
import sys
import mlflow, numpy as np, torch
mlflow.set_tracking_uri(sys.argv[1])
inputs = np.load(sys.argv[3] + "/inputs.npy")
one = mlflow.pyfunc.load_model("models:/" + sys.argv[2]).predict(inputs)
other = mlflow.pytorch.load_model("models:/" + sys.argv[2])(torch.from_numpy(inputs)).detach().numpy()
assert np.array_equal(one, other)
assert mlflow.models.get_model_info("models:/" + sys.argv[2]).signature is not None
assert not {"cluster", "algorithms"} & sys.modules.keys()
np.save(sys.argv[3] + "/outputs.npy", one)
"""
    command = [sys.executable, "-c", code, store, found["final"].model_id, str(tmp_path)]
    subprocess.run(command, check=True, cwd=tmp_path, timeout=DEADLINE_S)
    model = played.federation.model
    model.load_state_dict(load_file(played.folder.model_file))
    with torch.no_grad():
        expected = model.eval()(torch.from_numpy(inputs)).numpy()
    np.testing.assert_allclose(np.load(tmp_path / "outputs.npy"), expected, atol=1e-6)


@pytest.mark.parametrize(
    "call",
    [
        "create_logged_model",
        "log_model_artifacts",
        "log_outputs",
        "finalize_logged_model",
        "create_registered_model",
        "create_model_version",
    ],
)
def test_a_kill_between_two_steps_leads_to_no_second_model(
    store: str, played: SimpleNamespace, monkeypatch: pytest.MonkeyPatch, call: str
) -> None:
    """MLflow did what it was asked, and the one who asked is gone: another process goes on from the files."""
    from mlflow.tracking import MlflowClient

    original = getattr(MlflowClient, call)
    calls: list[int] = []

    def killed(self: MlflowClient, *arguments: Any, **named: Any) -> Any:
        result = original(self, *arguments, **named)
        calls.append(1)
        if len(calls) == 1:
            raise KeyboardInterrupt
        return result

    class Gone(tracking.Courier):
        def _work(self) -> None:
            try:
                super()._work()
            except KeyboardInterrupt:
                self._delivery.release()  # as the end of the process does

    monkeypatch.setattr(MlflowClient, call, killed)
    monkeypatch.setattr(tracking, "Courier", Gone)
    monkeypatch.setattr(logged_models, "_write", lambda model, example, place: _weights_alone(place))
    name = f"models-{call}"
    with monkeypatch.context() as patch:
        patch.setattr(tracking.Courier, "leave", lambda self, deadline: self.thread.join() is None)
        run_id = deliver(store, played, name, register=name)
    report = tracking.sync(played.folder.path, deadline_s=DEADLINE_S)
    assert (report.complete, report.run_id) == (True, run_id)
    found = models_of(store, run_id)
    assert {(name, str(model.status)) for name, model in found.items()} == {
        ("final", "READY"),
        ("best", "READY"),
    }
    outputs = MlflowClient(store).get_run(run_id).outputs.model_outputs
    assert sorted(each.model_id for each in outputs) == sorted(model.model_id for model in found.values())
    assert len(MlflowClient(store).search_model_versions(f"name = '{name}'")) == 1


def never_made() -> list[StoredModel]:
    raise AssertionError("MLflow was away: nobody asks the run's own process")


def test_sync_makes_the_models_that_the_run_could_not_deliver(
    store: str, played: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    from mlflow.tracking import MlflowClient

    monkeypatch.setattr(logged_models, "_write", lambda model, example, place: _weights_alone(place))
    run = tracker(store, played.folder, "models-late", "models-late")  # never started: MLflow is away
    assert not run.finish("FINISHED", [], {}, 0.0, never_made)
    report = tracking.sync(played.folder.path, deadline_s=DEADLINE_S)
    assert (report.complete, report.problem) == (True, None)
    found = models_of(store, str(report.run_id))
    assert {name: model.tags["round"] for name, model in found.items()} == {
        "final": "3",
        "best": str(played.best),
    }
    (version,) = MlflowClient(store).search_model_versions("name = 'models-late'")
    assert version.source == found["best"].artifact_location


def test_sync_says_what_is_missing_where_the_models_cannot_be_made(
    store: str, played: SimpleNamespace, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The folder was copied, and its configuration names code: looking at it runs nothing of that."""
    from mlflow.tracking import MlflowClient

    copied = RunFolder(Path(shutil.copytree(played.folder.path, tmp_path / "copied")))
    run = tracker(store, copied, "models-copied", None)
    assert not run.finish("FINISHED", [], {}, 0.0, never_made)
    assert main(["sync", str(copied.path)]) == 1
    said = capsys.readouterr()
    assert "has all" not in said.out
    assert "its models are missing and cannot be made here (sparsyfed resume makes them): " in said.err
    assert "copied was copied here" in said.err
    (run_id,) = runs_of(store, "models-copied")
    assert MlflowClient(store).get_run(run_id).info.status == "FINISHED"
    assert steps(store, run_id) == [1, 2, 3]


def test_a_registry_that_refuses_leaves_no_run_going_on(
    store: str, played: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    from mlflow.exceptions import MlflowException
    from mlflow.tracking import MlflowClient

    def refused(*_: object) -> None:
        raise MlflowException("no registry here")

    monkeypatch.setattr(logged_models, "_write", lambda model, example, place: _weights_alone(place))
    run = tracker(store, played.folder, "models-refused", "models-refused")
    with monkeypatch.context() as patch:
        patch.setattr(MlflowClient, "create_registered_model", refused)
        run.start()
        make = lambda: make_models(played.folder, played.federation)  # noqa: E731
        (courier,) = run._couriers
        courier.close(Ending("FINISHED", 1_700_000_000_000, [], {}), make)
        wait_for(lambda: run.problem, "the refusal")
        assert not courier.leave(0.0)
        courier.thread.join(DEADLINE_S)
    assert "no registry here" in str(run.problem)
    assert MlflowClient(store).get_run(str(run.run_id)).info.status == "FINISHED"
    assert tracking.sync(played.folder.path, deadline_s=DEADLINE_S).complete
    assert len(MlflowClient(store).search_model_versions("name = 'models-refused'")) == 1


def _weights_alone(place: Path) -> str:
    place.mkdir(parents=True, exist_ok=True)
    (place / "model.safetensors").write_bytes(b"weights")
    return "a test"


class Branching(nn.Module):
    """What it computes depends on its inputs, which no graph can hold."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 2)

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        return self.linear(inputs) if bool(inputs.sum() > 0) else -self.linear(inputs)


def test_a_model_that_cannot_be_exported_is_there_with_its_weights_and_says_why(tmp_path: Path) -> None:
    model = Branching().eval()
    why = logged_models._write(model, torch.ones(2, 4), tmp_path / "models" / "final")
    assert why is not None
    assert why.startswith("weights alone, as torch.export refuses the model: ")
    stored = load_file(tmp_path / "models" / "final" / "model.safetensors")
    assert torch.equal(stored["linear.weight"], model.linear.weight)
    assert not (tmp_path / "models" / "final" / "MLmodel").exists()


def test_what_goes_wrong_ends_no_run(
    played: SimpleNamespace, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def broken(*_: object) -> None:
        raise OSError("no space left")

    monkeypatch.setattr(logged_models, "_write", broken)
    assert make_models(played.folder, played.federation) == []
    assert "the final model is not logged: OSError: no space left" in caplog.text
