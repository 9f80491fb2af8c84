"""TensorBoard and Weights & Biases get every round exactly once, from the same outbox as MLflow.

What they hold is read from their own files: TensorBoard's by its own reader, wandb's offline logs by the one
that decides what is still to be sent, whose records are wandb's own messages.
"""

import json
import os
import subprocess
import sys
from collections import defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

import cluster
from cluster.cli import main
from cluster.records import tracking
from cluster.records.outbox import Cursor
from cluster.records.tensorboard_delivery import EVENT_FILE
from cluster.records.tracking import Tracker, TrackingError, TrackingTarget, sync
from cluster.records.wandb_delivery import log_records
from cluster.references import installed
from tests.cluster.records.tracked_runs import DEADLINE_S, cursor_of, finish, steps, wait_for, write
from tests.tiny_experiment import tiny_federation

pytestmark = pytest.mark.usefixtures("fast_tracking")

Points = dict[str, list[tuple[int, float]]]


def in_tensorboard(folder: Path) -> Points:
    from tensorboard.backend.event_processing.event_file_loader import EventFileLoader
    from tensorboard.util.tensor_util import make_ndarray

    found: Points = defaultdict(list)
    for event in EventFileLoader(str(folder / EVENT_FILE)).Load():
        for value in event.summary.value:
            if not value.tag.startswith("_hparams_/"):
                found[value.tag].append((event.step, round(float(make_ndarray(value.tensor)), 6)))
    return found


def in_wandb(folder: Path) -> Points:
    found: Points = defaultdict(list)
    for record in wandb_records(folder):
        if record.WhichOneof("record_type") == "history":
            for item in record.history.item:
                key = item.key or "/".join(item.nested_key)
                if not key.startswith("_"):
                    found[key].append((record.history.step.num, json.loads(item.value_json)))
    return found


def wandb_records(folder: Path) -> Iterator:
    from wandb.proto.wandb_internal_pb2 import Record

    for path in sorted((folder / "wandb").glob("offline-run-*/*.wandb")):
        for data in log_records(path.read_bytes()):
            record = Record()
            record.ParseFromString(data)
            yield record


READ: dict[str, Callable[[Path], Points]] = {"tensorboard": in_tensorboard, "wandb": in_wandb}


@pytest.fixture(params=READ)
def sink(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    if not installed(request.param):
        pytest.skip(f"{request.param} is not installed: pip install 'sparsyfed[{request.param}]'")
    monkeypatch.setenv("WANDB_MODE", "offline")
    return str(request.param)


def tracker(folder: Path, *also: str, uri: str | None = None) -> Tracker:
    target = TrackingTarget(uri, folder.name, "fedavg-1")
    tags = {"method": "fedavg", "group": "fedavg 1a"}
    return Tracker(folder, target, params={"rounds": 3, "lr": 0.5}, tags=tags, also=also)


def test_a_run_arrives_whole_and_goes_on_where_it_ended(sink: str, tmp_path: Path) -> None:
    run = tracker(tmp_path, sink)
    run.start()
    for number in (1, 2):
        write(tmp_path, number, timestamp=1.7e9 + number, **{"val/accuracy": number / 10, "odd": None})
        run.round_written()
    assert finish(run, tmp_path / "rounds.jsonl", summary={"final/accuracy": 0.75})
    assert READ[sink](tmp_path)["val/accuracy"] == [(1, 0.1), (2, 0.2)]

    resumed = tracker(tmp_path, sink)
    resumed.start()
    write(tmp_path, 3, **{"val/accuracy": 0.3})
    assert finish(resumed, summary={"final/accuracy": 0.8})
    assert READ[sink](tmp_path)["val/accuracy"] == [(1, 0.1), (2, 0.2), (3, 0.3)]
    assert READ[sink](tmp_path)["comm/uplink_bytes"] == [(1, 1000), (2, 1000), (3, 1000)]
    assert "odd" not in READ[sink](tmp_path)
    again = sync(tmp_path, sink, deadline_s=DEADLINE_S)
    assert (again.complete, again.rounds, again.rounds_in_total) == (True, 0, 3)
    assert READ[sink](tmp_path)["val/accuracy"] == [(1, 0.1), (2, 0.2), (3, 0.3)]
    assert not (tmp_path / "tracking.json").exists()  # MLflow was not asked for


def test_a_kill_at_any_time_leads_to_no_second_copy_and_to_no_gap(sink: str, tmp_path: Path) -> None:
    """The process ends while rounds are delivered, and its note of what arrived is lost with it."""
    code = """
import os, sys, time, pathlib
from cluster.records import tracking
from tests.cluster.records.test_sinks import tracker, cursor_file, write
tracking._GATHER_S = 0.01
folder, sink = pathlib.Path(sys.argv[1]), sys.argv[2]
run = tracker(folder, sink)
write(folder, 1)
run.start()
while run._couriers[0].cursor.rounds_delivered < 1:
    time.sleep(0.01)
note = cursor_file(folder, sink).read_bytes()
for number in range(2, 200):
    write(folder, number)
    run.round_written()
while run._couriers[0].cursor.rounds_delivered < 199:
    time.sleep(0.01)
cursor_file(folder, sink).write_bytes(note)
os._exit(9)
"""
    command = [sys.executable, "-c", code, str(tmp_path), sink]
    assert subprocess.run(command, timeout=DEADLINE_S, env=environment()).returncode == 9
    if sink == "tensorboard":  # and the machine with it: a record is torn
        with (tmp_path / EVENT_FILE).open("r+b") as file:
            file.truncate((tmp_path / EVENT_FILE).stat().st_size - 5)
    write(tmp_path, 200)
    report = sync(tmp_path, sink, deadline_s=DEADLINE_S)
    assert report.complete
    assert report.rounds_in_total == 200
    assert READ[sink](tmp_path)["test/accuracy"] == [(number, 0.5) for number in range(1, 201)]


def test_an_event_file_that_is_gone_is_written_anew(tmp_path: Path) -> None:
    run = tracker(tmp_path, "tensorboard")
    run.start()
    write(tmp_path, 1)
    assert finish(run)
    (tmp_path / EVENT_FILE).unlink()
    assert sync(tmp_path, "tensorboard", deadline_s=DEADLINE_S).rounds_in_total == 1
    assert in_tensorboard(tmp_path)["test/accuracy"] == [(1, 0.5)]


def test_tensorboard_has_the_hyperparameters_and_the_end(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_file_loader import EventFileLoader
    from tensorboard.plugins.hparams.metadata import parse_session_end_info_plugin_data as parse_end
    from tensorboard.plugins.hparams.metadata import parse_session_start_info_plugin_data as parse_start

    run = tracker(tmp_path, "tensorboard")
    run.start()
    write(tmp_path, 7)
    assert finish(run, summary={"final/accuracy": 0.75})
    told = {
        value.tag: value.metadata.plugin_data.content
        for event in EventFileLoader(str(tmp_path / EVENT_FILE)).Load()
        for value in event.summary.value
    }
    start = parse_start(told["_hparams_/session_start_info"])
    assert {key: value.string_value for key, value in start.hparams.items()} == {"rounds": "3", "lr": "0.5"}
    assert parse_end(told["_hparams_/session_end_info"]).status == 1  # success
    assert in_tensorboard(tmp_path)["final/accuracy"] == [(7, 0.75)]


def test_a_run_that_failed_and_then_finished_ends_in_success(tmp_path: Path) -> None:
    """Resumed behind its last round, so that both ends are of the same step."""
    run = tracker(tmp_path, "tensorboard")
    run.start()
    write(tmp_path, 2)
    assert run.finish("FAILED", [], {}, DEADLINE_S)
    resumed = tracker(tmp_path, "tensorboard")
    resumed.start()
    assert finish(resumed, summary={"final/accuracy": 0.75})
    assert in_tensorboard(tmp_path)["final/accuracy"] == [(2, 0.75)]
    assert sync(tmp_path, "tensorboard", deadline_s=DEADLINE_S).complete
    assert in_tensorboard(tmp_path)["final/accuracy"] == [(2, 0.75)]


@pytest.mark.skipif(not installed("wandb"), reason="wandb is not installed: pip install 'sparsyfed[wandb]'")
def test_another_project_gets_the_rounds_that_the_first_one_has(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WANDB_MODE", "offline")
    run = tracker(tmp_path, "wandb")
    run.start()
    write(tmp_path, 1)
    assert finish(run)
    target = TrackingTarget(None, "another", "fedavg-1")
    moved = Tracker(tmp_path, target, params={}, tags={}, also=["wandb"])
    moved.start()
    write(tmp_path, 2)
    assert finish(moved)
    assert in_wandb(tmp_path)["test/accuracy"] == [(1, 0.5), (1, 0.5), (2, 0.5)]


@pytest.mark.skipif(not installed("wandb"), reason="wandb is not installed: pip install 'sparsyfed[wandb]'")
def test_wandb_has_the_configuration_the_summary_and_the_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WANDB_MODE", "offline")
    run = tracker(tmp_path, "wandb")
    run.start()
    write(tmp_path, 1)
    assert finish(run, summary={"final/accuracy": 0.75})
    records = list(wandb_records(tmp_path))
    (begun,) = (record.run for record in records if record.WhichOneof("record_type") == "run")
    assert (begun.project, begun.display_name, begun.run_group) == (tmp_path.name, "fedavg-1", "fedavg 1a")
    config = {each.key: json.loads(each.value_json) for each in begun.config.update}
    assert (config["rounds"], config["lr"]) == (3, 0.5)
    summary = {
        each.key or "/".join(each.nested_key): json.loads(each.value_json)
        for record in records
        for each in record.summary.update
    }
    assert summary["final/accuracy"] == 0.75
    assert [record.exit.exit_code for record in records if record.WhichOneof("record_type") == "exit"] == [0]


def test_a_sink_that_cannot_be_written_leaves_the_others_alone(store: str, tmp_path: Path) -> None:
    (tmp_path / EVENT_FILE).mkdir()
    run = tracker(tmp_path, "tensorboard", uri=store)
    run.start()
    write(tmp_path, 1)
    wait_for(lambda: run.problem, "the problem to be noticed")
    wait_for(lambda: cursor_of(tmp_path)["rounds_delivered"] == 1, "round 1 in MLflow")
    assert "TensorBoard is behind" in str(run.problem)
    assert not run.finish("FINISHED", [], {}, 1.0)
    (tmp_path / EVENT_FILE).rmdir()
    for sink in tracking.sinks_of(tmp_path):
        assert sync(tmp_path, sink, deadline_s=DEADLINE_S).complete
    assert steps(store, run.run_id) == [1]
    assert in_tensorboard(tmp_path)["test/accuracy"] == [(1, 0.5)]


def test_another_sink_s_problem_is_not_taken_for_mlflow_s(store: str, tmp_path: Path) -> None:
    (tmp_path / EVENT_FILE).mkdir()
    run = tracker(tmp_path, "tensorboard", uri=store)
    mlflow, tensorboard = run._couriers
    tensorboard.thread.start()
    wait_for(lambda: tensorboard.problem, "the problem to be noticed")
    mlflow.thread.start()
    assert run.wait_until_known(DEADLINE_S) is not None
    assert not run.finish("FAILED", [], {}, 0.0)
    wait_for(lambda: not mlflow.thread.is_alive(), "the thread to end")


def test_sync_goes_on_behind_a_sink_that_cannot_be_used(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "mlflow.db").write_text("no database, but long enough to be told from an empty one")
    tracker(tmp_path, "tensorboard", uri=f"sqlite:///{tmp_path}/mlflow.db")
    write(tmp_path, 1)
    assert main(["sync", str(tmp_path)]) == 2
    said = capsys.readouterr()
    assert "TensorBoard has all 1 rounds; 1 are new" in said.out
    assert said.err.count("error: ") == 1
    assert "mlflow.db" in said.err
    assert in_tensorboard(tmp_path)["test/accuracy"] == [(1, 0.5)]


@pytest.mark.skipif(not installed("wandb"), reason="wandb is not installed: pip install 'sparsyfed[wandb]'")
def test_a_wandb_server_that_is_away_gets_everything_later(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from cluster.records import wandb_delivery

    monkeypatch.setattr(wandb_delivery, "_PATIENCE_S", 1.0)
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")
    monkeypatch.setenv("WANDB_API_KEY", "a" * 40)
    run = tracker(tmp_path, "wandb", "tensorboard")
    run.start()
    write(tmp_path, 1)
    wait_for(lambda: run.problem, "the outage to be noticed")
    assert "Weights & Biases is behind" in str(run.problem)
    assert not run.finish("FINISHED", [], {}, 1.0)
    assert in_tensorboard(tmp_path)["test/accuracy"] == [(1, 0.5)]
    wait_for(lambda: not run._couriers[0].thread.is_alive(), "the thread to give up")
    command = [sys.executable, "-m", "cluster", "sync", str(tmp_path)]
    offline = environment() | {"WANDB_MODE": "offline"}
    said = subprocess.run(command, timeout=DEADLINE_S, env=offline, text=True, capture_output=True)
    assert said.returncode == 0, said.stderr
    assert "TensorBoard has all 1 rounds; 0 are new" in said.stdout
    assert "Weights & Biases has all 1 rounds" in said.stdout
    assert in_wandb(tmp_path)["test/accuracy"] == [(1, 0.5)]


def test_a_missing_library_is_named_before_anything_starts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tracking, "installed", lambda package: package != "tensorboard")
    config = tiny_federation(tmp_path, tracking={"enabled": True, "also": ["tensorboard"]})
    with pytest.raises(TrackingError, match=r"tensorboard is not installed.*sparsyfed\[tensorboard\]"):
        cluster.run(config, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def environment() -> dict[str, str]:
    """Of a process that does not share this one's service of wandb."""
    return {key: text for key, text in os.environ.items() if key != "WANDB_SERVICE"}


def cursor_file(folder: Path, sink: str) -> Path:
    assert Cursor.load(folder, sink) is not None
    return folder / f"tracking-{sink}.json"
