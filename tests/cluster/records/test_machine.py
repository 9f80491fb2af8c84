"""What machines are doing: measured under MLflow's names, by one process a machine, delivered once."""

import json
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

import cluster
from cluster import machine
from cluster.actors.actor_pool import Beginning, HostActor
from cluster.machine import SAMPLES, Watch, record, sample
from cluster.records.run_folder import RunFolder
from cluster.records.tensorboard_delivery import EVENT_FILE
from cluster.records.tracking import sync
from cluster.rounds.conduct import conduct
from tests.cluster.records.test_sinks import in_tensorboard
from tests.cluster.records.tracked_runs import DEADLINE_S, finish, steps, tracker, wait_for, write
from tests.tiny_experiment import tiny_federation


@pytest.fixture(autouse=True)
def often(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(machine, "INTERVAL_S", 0.02)
    monkeypatch.setattr(machine.tempfile, "gettempdir", lambda: str(tmp_path))


def test_what_is_sampled_is_called_as_mlflow_calls_it() -> None:
    from mlflow.system_metrics.metrics.cpu_monitor import CPUMonitor
    from mlflow.system_metrics.metrics.disk_monitor import DiskMonitor
    from mlflow.system_metrics.metrics.network_monitor import NetworkMonitor

    theirs: set[str] = set()
    for monitor in (CPUMonitor(), DiskMonitor(), NetworkMonitor()):
        monitor.collect_metrics()
        theirs |= monitor.aggregate_metrics().keys()
    found = sample()
    assert theirs <= found.keys()
    assert 0 < found["system_memory_usage_percentage"] < 100
    assert found["disk_usage_megabytes"] > 1


def test_one_process_watches_a_machine_and_another_goes_on_after_it() -> None:
    first, second, other_run = list[dict](), list[dict](), list[dict]()
    one, two, three = Watch("run", first.append), Watch("run", second.append), Watch("x", other_run.append)
    for watch in (one, two, three):
        watch.start()
    wait_for(lambda: len(first) > 2 and other_run, "samples")
    assert second == []
    one.stop()
    seen = len(first)
    wait_for(lambda: second, "the other to take over")
    two.stop()
    three.stop()
    assert len(first) == seen


def test_a_failing_taker_does_not_end_the_watch() -> None:
    taken = []

    def full(numbers: dict[str, float]) -> None:
        taken.append(numbers)
        raise OSError("no space left on device")

    watch = Watch("run", full)
    watch.start()
    wait_for(lambda: len(taken) > 2, "samples")
    watch.stop()


def test_an_actor_tells_the_driver_of_its_machine() -> None:
    """The driver's handle, as Ray gives one: a method with ``remote``."""
    told = []
    driver = SimpleNamespace(
        sampled=SimpleNamespace(remote=lambda host, numbers: told.append((host, numbers)))
    )
    HostActor(None, 0.0)._look_around(Beginning("run", driver, "run"))  # type: ignore[arg-type]
    wait_for(lambda: told, "a sample")
    host, numbers = told[0]
    assert host == machine_name()
    assert "cpu_utilization_percentage" in numbers


def machine_name() -> str:
    import socket

    return socket.gethostname()


def test_an_engine_that_cannot_be_made_leaves_no_watch_behind(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    begun: list[Watch] = []
    start = Watch.start
    monkeypatch.setattr(Watch, "start", lambda self: [begun.append(self), start(self)])
    config = tiny_federation(tmp_path, tracking={"enabled": True})
    folder = RunFolder.create(tmp_path / "run", config)

    def broken(*_: object) -> None:
        raise OSError("no actors")

    with pytest.raises(OSError, match="no actors"):
        conduct(folder.path, broken, lambda line: None, lambda: False)  # type: ignore[arg-type]
    (watch,) = begun
    assert not watch._thread.is_alive()
    assert not watch._lock.is_locked


@pytest.mark.usefixtures("fast_tracking")
def test_samples_of_every_machine_are_delivered_once(store: str, tmp_path: Path) -> None:
    run = tracker(tmp_path, store, also=["tensorboard"])
    created = run._couriers[0].cursor.created_ms / 1000 + 0.5
    with pytest.MonkeyPatch.context() as patch:
        for age in range(0, 40, 10):
            patch.setattr(time, "time", lambda age=age: created + age)
            record(tmp_path, {"cpu_utilization_percentage": age / 2})
            record(tmp_path, {"cpu_utilization_percentage": 5.0}, host="node-b")
    run.start()
    wait_for(lambda: run.run_id, "the run")
    assert not any(courier.cursor.samples_delivered for courier in run._couriers)
    write(tmp_path, 1)
    run.round_written()
    wait_for(lambda: all(c.cursor.samples_delivered == 8 for c in run._couriers), "8 samples")
    notes = {path: path.read_bytes() for path in tmp_path.glob("tracking*.json")}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(time, "time", lambda: created + 40)
        record(tmp_path, {"cpu_utilization_percentage": 1.0})
    with (tmp_path / SAMPLES).open("a") as file:
        file.write('{"timestamp": 17')  # torn by a crash
    assert finish(run)
    for path, note in notes.items():  # what was noted since is lost
        path.write_bytes(note)
    for sink in ("mlflow", "tensorboard"):
        assert sync(tmp_path, sink, deadline_s=DEADLINE_S).complete
    from mlflow.tracking import MlflowClient

    # What MLflow's page of compared runs draws first is never what a machine was doing.
    assert next(iter(MlflowClient(store).get_run(str(run.run_id)).data.metrics)) == "test/accuracy"
    key = "system/cpu_utilization_percentage"
    assert steps(store, run.run_id, key) == [0, 10, 20, 30, 40]
    assert steps(store, run.run_id, "system/node-b/cpu_utilization_percentage") == [0, 10, 20, 30]
    assert [step for step, _ in in_tensorboard(tmp_path)[key]] == steps(store, run.run_id, key)
    assert in_tensorboard(tmp_path)["test/accuracy"] == [(1, 0.5)]


@pytest.mark.usefixtures("fast_tracking")
def test_a_run_watches_its_machine(tmp_path: Path) -> None:
    # Without MLflow; a delivery of its own is tested above.
    config = tiny_federation(tmp_path, rounds=3, tracking={"enabled": True, "also": ["tensorboard"]})
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("cluster.records.outputs.installed", lambda package: package == "tensorboard")
        cluster.run(config, tmp_path / "run")
    lines = [json.loads(line) for line in (tmp_path / "run" / SAMPLES).read_text().splitlines()]
    assert all("system/cpu_utilization_percentage" in line for line in lines)
    assert lines
    assert (tmp_path / "run" / EVENT_FILE).exists()
    # The watch ends after the last delivery: one sample may still lie in the file alone.
    delivered = len(in_tensorboard(tmp_path / "run")["system/cpu_utilization_percentage"])
    assert len(lines) - 1 <= delivered <= len(lines)
